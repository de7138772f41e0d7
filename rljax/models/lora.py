"""LoRA (arXiv:2106.09685): low-rank factors beside frozen matrices, x W + scale (x A) B.

  adapter          {"layers": {target: {"a": [L, *in, r], "b": [L, r, *out]}}}, float32: what is trained
  adapted params   the learner layout with `target_lora_a` and `target_lora_b` beside each target: what runs

`in` and `out` are the matrix's own dims, [D] and [N, H] for q, so both factors are split over the mesh as it is. A
starts as PEFT's does and B at 0: an adapter changes nothing until it has learnt something.

Letters: L layers, r rank, D width, N query heads, H head dim.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rljax.config import Architecture, LoraConfig
from rljax.models.layers import LINEARS, matrix_dims, merge_adapters
from rljax.models.qwen2 import Params, param_axes, param_shapes


def init_adapter(key: jax.Array, arch: Architecture, config: LoraConfig) -> Params:
    """A fresh adapter: A uniform within 1 / sqrt(size of in) of 0, B zero."""
    shapes = adapter_shapes(arch, config)["layers"]

    def factors(index: int, name: str) -> Params:
        a, b = shapes[name]["a"].shape, shapes[name]["b"].shape
        bound = 1 / math.sqrt(math.prod(a[1:-1]))
        own = jax.random.fold_in(key, index)  # the same whatever else is a target
        return {"a": jax.random.uniform(own, a, jnp.float32, -bound, bound), "b": jnp.zeros(b)}

    return {"layers": {name: factors(index, name) for index, name in enumerate(LINEARS) if name in shapes}}


def adapter_shapes(arch: Architecture, config: LoraConfig) -> Params:
    """Tree of `ShapeDtypeStruct` of an adapter."""
    layers = param_shapes(arch)["layers"]

    def leaf(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return _split_each(config, {name: layers[name].shape for name in LINEARS}, config.rank, leaf)


def adapter_axes(arch: Architecture, config: LoraConfig) -> Params:
    """Tree of logical axis names of an adapter: those of its matrices, and the rank, which is not split."""
    return _split_each(config, param_axes(arch)["layers"], "lora_rank", tuple)


def _split_each(config: LoraConfig, dims: dict[str, Any], rank: Any, leaf: Any) -> Params:
    """`leaf` of each factor's dims, whatever a dim is: (L, *in, *out) is (L, *in, rank) and (L, rank, *out)."""

    def factors(name: str) -> Params:
        stacked, *rest = dims[name]
        num_in = len(matrix_dims(name)[0])
        return {"a": leaf((stacked, *rest[:num_in], rank)), "b": leaf((stacked, rank, *rest[num_in:]))}

    return {"layers": {name: factors(name) for name in LINEARS if name in config.targets}}


def attach(base: Params | None, trained: Params, scale: float) -> Params:
    """The parameters to run: `trained` itself where there is no `base`, else `base` with the adapter `trained` beside.

    Args:
      scale: factor of A B, taken into B.
    """
    if base is None:
        return trained
    factors: Params = {}
    for name, adapter in trained["layers"].items():
        factors |= {f"{name}_lora_a": adapter["a"], f"{name}_lora_b": adapter["b"] * scale}
    return {**base, "layers": base["layers"] | factors}


def merge(params: Params) -> Params:
    """The learner layout without adapters: each one added to its matrix, in float32."""
    return {**params, "layers": merge_adapters(params["layers"])}
