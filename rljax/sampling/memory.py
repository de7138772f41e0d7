"""How many rows a device's free memory holds."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from rljax.config import Architecture
from rljax.costs import kv_bytes_per_token
from rljax.mesh import free_bytes, num_row_shards

_SHARE = 0.8
"""Of the free memory; the rest is for logits, activations and fragments."""
_ONE_LAYER_TWICE = 1.25
"""A cache that grows or is compacted holds one layer twice for a moment; small models have few layers."""


def rows_that_fit(
    arch: Architecture,
    dtype: Any,
    mesh: Mesh,
    prompt_slots: int,
    max_tokens: int,
    samples_per_prompt: int,
    free: int | None = None,
) -> int:
    """`rows_in` of the free memory of `mesh`, all devices together.

    Args:
      free: bytes of a device; None: what it has now.
    """
    each = rows_in(
        free_bytes(mesh) if free is None else free,
        arch,
        jnp.dtype(dtype).name,
        prompt_slots=prompt_slots,
        max_tokens=max_tokens,
        samples_per_prompt=samples_per_prompt,
        tensor=mesh.shape["tensor"],
    )
    return num_row_shards(mesh) * each


def rows_in(
    free: int,
    arch: Architecture,
    dtype: str,
    *,
    prompt_slots: int,
    max_tokens: int,
    samples_per_prompt: int,
    tensor: int,
) -> int:
    """Rows of `max_tokens` slots in `free` bytes of each of `tensor` devices, with their share of a prompt's cache and
    float32 logits.

    At least one: whether that much fits is the device's to say. One of few numbers, 2^n or 3 * 2^n, so that a little
    more or less free memory does not ask for other programs.
    """
    slots = max_tokens + prompt_slots / samples_per_prompt
    cache = kv_bytes_per_token(arch, dtype) * slots * _ONE_LAYER_TWICE
    each = (cache + 3 * 4 * arch.vocab_size) / tensor
    fitting = max(1, int(_SHARE * free / each))
    power = 2 ** (fitting.bit_length() - 1)
    return 3 * power // 2 if power > 1 and fitting >= 3 * power // 2 else power
