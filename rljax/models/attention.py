"""Attention of the learner: one function, one layout record, backends by name.

Letters: B rows, T positions, N query heads, K key/value heads, g = N/K, H head dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from rljax.mesh import AXES, ROWS, platform
from rljax.models.blockwise import blockwise_attention
from rljax.models.splash import splash_attention

Backend = Callable[[jax.Array, jax.Array, jax.Array, "AttentionLayout"], jax.Array]

NEVER = -1e30
"""Score of a key that may not be seen: finite, so that a row with no visible key gives numbers and not NaN."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionLayout:
    """Who sees whom in rows that may hold several sequences.

    A query sees a key when both are of one group, the key is not later, and the key is prompt or of the same
    completion. Example, a prompt of 2 with two completions, then padding:
      group [0, 0, 0, 0, 0, -1]   completion [0, 0, 1, 1, 2, 0]
    Independent packed sequences take one group each and completion 0.
    """

    group: jax.Array  # [B, T] int32, -1 is padding
    completion: jax.Array  # [B, T] int32, 0 on prompt tokens

    @classmethod
    def right_padded(cls, lengths: jax.Array, num_positions: int) -> "AttentionLayout":
        """One sequence per row, `lengths` [B] tokens each."""
        group = jnp.where(jnp.arange(num_positions) < lengths[:, None], 0, -1).astype(jnp.int32)
        return cls(group, jnp.zeros_like(group))

    def mask(self) -> jax.Array:
        """[B, T query, T key] bool."""
        same_group = (self.group[:, :, None] == self.group[:, None, :]) & (self.group[:, None, :] >= 0)
        own = (self.completion[:, None, :] == 0) | (self.completion[:, :, None] == self.completion[:, None, :])
        causal = jnp.tri(self.group.shape[1], dtype=bool)
        return same_group & own & causal


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, layout: AttentionLayout) -> jax.Array:
    """Softmax attention with the whole score matrix: the reference every other backend is held against.

    q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]. Scores and softmax in float32.
    """
    rows, length, heads, head_dim = q.shape
    grouped = q.reshape(rows, length, k.shape[2], heads // k.shape[2], head_dim)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(layout.mask()[:, None, None], scores * head_dim**-0.5, NEVER)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    context = jnp.einsum("bkgts,bskh->btkgh", probs, v, precision=precision)
    return context.reshape(q.shape)


CUDNN_TILE = 128
"""cuDNN gets T padded to a multiple of it: it refuses odd T in the backward pass and, on Hopper with a mask and
T = 64 mod 128, can return NaN (pytorch/pytorch#196678)."""


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, layout: AttentionLayout, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> jax.Array:
    """cuDNN's fused attention, the mask as a bias [B, 1, T, T] in the dtype of q; all blocks are computed.

    q [B, T, N, H], k and v [B, T, K, H], bfloat16 or float16, H a multiple of 8 and at most 128. With "xla" the same
    arguments are computed anywhere, for tests.
    """
    extra = -q.shape[1] % CUDNN_TILE
    mask = jnp.pad(layout.mask(), ((0, 0), (0, extra), (0, extra)))
    # Padding sees itself, for the kernels do badly on queries that see nothing.
    mask |= jnp.eye(mask.shape[1], dtype=bool)
    padded = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
    context = jax.nn.dot_product_attention(*padded, mask=mask[:, None], implementation=implementation)
    return context[:, : q.shape[1]]


BACKENDS: dict[str, Backend] = {
    "dense": dense_attention,
    "blockwise": blockwise_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
"""Functions of q [B, T, N, H], k and v [B, T, K, H] and the layout; what they return at padded positions is finite."""

DENSE_UP_TO, DENSE_UP_TO_ON_CPU = 512, 64
"""Positions T up to which the whole score matrix is used."""


def choose_backend(length: int, head_dim: int, dtype: Any) -> str:
    """Key of `BACKENDS` for rows of T = `length` positions in `dtype` on the platform compiled for."""
    kind = platform()
    if length <= (DENSE_UP_TO_ON_CPU if kind == "cpu" else DENSE_UP_TO):
        return "dense"
    if kind == "gpu" and dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128 and _has_fused_cudnn():
        return "cudnn"
    if kind == "tpu" and dtype == jnp.bfloat16:
        return "splash"
    return "blockwise"


def _has_fused_cudnn() -> bool:
    """Whether the GPU is one of NVIDIA's from Ampere on."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return capability[:1].isdigit() and float(capability) >= 8.0


def _per_device(backend: Backend, k: jax.Array) -> Backend:
    """`backend` on each device's own rows and heads, if the caller has entered the project's mesh (`jax.set_mesh`).

    XLA, left to split a loop over blocks, would send every device all rows, and a kernel it refuses to split. Without a
    mesh, or where it does not divide rows and heads, that is what happens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.axis_names) or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return backend
    if k.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) or k.shape[2] % mesh.shape["tensor"]:
        return backend
    heads = PartitionSpec(*ROWS, None, "tensor")
    return jax.shard_map(backend, in_specs=(heads, heads, heads, ROWS), out_specs=heads, check_vma=False)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, layout: AttentionLayout, *, backend: str = "auto") -> jax.Array:
    """Context [B, T, N, H] of q [B, T, N, H] over k, v [B, T, K, H] under `layout`; 0 at padded positions.

    What q, k, v and the context's gradient hold at padded positions, NaN included, has no effect.

    Args:
      backend: a key of `BACKENDS`, or "auto", which asks `choose_backend`.
    """
    if backend == "auto":
        backend = choose_backend(q.shape[1], q.shape[3], q.dtype)
    attend = BACKENDS[backend]
    if backend in ("blockwise", "splash"):
        attend = _per_device(attend, k)
    real = (layout.group >= 0)[..., None, None]
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    return jnp.where(real, attend(q, k, v, layout), 0)
