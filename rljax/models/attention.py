"""Attention of the learner: one function, one layout record, backends by name.

Letters: B rows, T positions, N query heads, K key/value heads, g = N/K, H head dim.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

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


BACKENDS: dict[str, Callable[..., jax.Array]] = {"dense": dense_attention}


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, layout: AttentionLayout, *, backend: str = "dense"
) -> jax.Array:
    """Context [B, T, N, H] of q [B, T, N, H] over k, v [B, T, K, H] under `layout`."""
    return BACKENDS[backend](q, k, v, layout)
