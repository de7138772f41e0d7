"""Weights by formula, so that golden logits need no committed weights."""

import zlib
from collections.abc import Mapping

import numpy as np


def formula_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 tensors drawn from their names: norms near 1, biases near 0.3 in size, matrices of unit gain."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        # RandomState: its stream is frozen, default_rng's is not.
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
        if len(shape) == 1:
            return (0.3 * noise if name.endswith("bias") else 1 + 0.3 * noise).astype(np.float32)
        return (noise / (1 if "embed" in name else np.sqrt(shape[-1]))).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}
