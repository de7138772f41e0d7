"""Sums over the completions of rows that may hold several.

Letters: B rows, T positions.
"""

import jax
import jax.numpy as jnp


def sequence_ids(group: jax.Array, completion: jax.Array) -> jax.Array:
    """[B, T] int32: tokens of one completion (or prompt) share a number below T, different ones of a row never do."""
    first = jnp.zeros_like(group[:, :1], bool)
    changes = (group[:, 1:] != group[:, :-1]) | (completion[:, 1:] != completion[:, :-1])
    return jnp.cumsum(jnp.concatenate([first, changes], axis=1), axis=1, dtype=jnp.int32)


def sequence_sum(values: jax.Array, sequences: jax.Array) -> jax.Array:
    """[B, T]: at every token the sum of `values` [B, T] over its sequence."""
    segments = sequences.shape[1]

    def one(row: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(row, ids, num_segments=segments)[ids]

    return jax.vmap(one)(values, sequences)


def sequence_mean(values: jax.Array, mask: jax.Array, sequences: jax.Array) -> jax.Array:
    """[B, T]: at every token the mean of `values` over the tokens of its sequence in `mask`; 0 where there is none."""
    total = sequence_sum(jnp.where(mask, values, 0.0), sequences)
    return total / jnp.maximum(sequence_sum(mask.astype(values.dtype), sequences), 1.0)


def num_sequences(mask: jax.Array, sequences: jax.Array) -> jax.Array:
    """[] float32: how many sequences have a token in `mask` [B, T]."""
    lengths = sequence_sum(mask.astype(jnp.float32), sequences)
    return jnp.sum(jnp.where(mask, 1 / jnp.maximum(lengths, 1.0), 0.0))
