"""A token and its behaviour log-prob from logits: two-level inverse CDF, one key per row and position, no sort.

Letters: B rows, V vocabulary, n = ceil(V / BLOCK) blocks.
"""

import jax
import jax.numpy as jnp

BLOCK = 128
"""Vocabulary entries per block: the lane width of a TPU; a 152k vocabulary has 1,187 blocks."""


def row_uniforms(key: jax.Array, sample_ids: jax.Array, position: jax.Array) -> jax.Array:
    """Two uniforms per row [B, 2] in [0, 1): a function of (key, sample id [B], position []) and of nothing else.

    So what a row samples does not depend on the rows beside it, on padding, or on where it is computed.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), position))(sample_ids)
    return jax.vmap(lambda k: jax.random.uniform(k, (2,)))(keys)


def _pick(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index [B] into `mass` [B, n] >= 0 whose cumulative interval holds `uniform` [B] of the total.

    An index without mass is never picked: its interval is empty, and `uniform` < 1 stays below the total.
    """
    cumulative = jnp.cumsum(mass, axis=-1)
    reached = cumulative <= uniform[:, None] * cumulative[:, -1:]
    return jnp.sum(reached, axis=-1, dtype=jnp.int32)


def draw(logits: jax.Array, uniforms: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token [B] int32 and its log-prob [B] float32 under softmax(logits / temperature), full vocabulary.

    Two uniforms, one for the block and one inside it, so a rare token keeps its probability where one float32
    uniform would round it away. `temperature` is data, not a compile-time constant: 0 takes the argmax, with the
    log-prob at temperature 1.

    Args:
      logits: [B, V] float32.
      uniforms: [B, 2] in [0, 1).
      temperature: [] float32, >= 0.
    """
    rows, vocab = logits.shape
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    highest = scaled.max(axis=-1, keepdims=True)
    width = min(BLOCK, vocab)
    mass = jnp.pad(jnp.exp(scaled - highest), ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)
    block_mass = mass.sum(axis=-1)
    block = _pick(block_mass, uniforms[:, 0])
    inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    token = jnp.where(greedy, jnp.argmax(logits, axis=-1), block * width + _pick(inside, uniforms[:, 1]))
    token = token.astype(jnp.int32)
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)
    return token, (chosen - highest)[:, 0] - jnp.log(block_mass.sum(axis=-1))
