"""A token and its behaviour log-prob from logits: two-level inverse CDF, one key per row and position, no sort.

Letters: B rows, V vocabulary, n blocks of W entries.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

BLOCK = 128
"""Vocabulary entries per block: the lane width of a TPU; a 152k vocabulary has about 1,200 blocks."""

_SEGMENTS = 8
"""The vocabulary is cut into this many parts (or their greatest common divisor) before it is cut into blocks: a shard
of a vocabulary split over up to so many devices holds whole blocks, and the blocks are the same on one device."""

_FLOAT_BITS = 31
"""A float32 >= 0 read as an integer is below 2^31, and in the same order."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Truncation:
    """Which tokens may be drawn, in the order of transformers: after the temperature, top-k, then top-p, then min-p.

    Tokens as likely as the last one kept are kept as well. All of it is data: other values need no other program.
    """

    top_k: jax.Array  # [] int32, so many of the likeliest; 0: off
    top_p: jax.Array  # [] float32, the fewest likeliest that hold this share of what top-k left; 1: off
    min_p: jax.Array  # [] float32, those at least this part as likely as the likeliest; 0: off


def row_uniforms(key: jax.Array, sample_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """Two uniforms per row [B, 2] in [0, 1): a function of (key, sample id [B], position [B] or []) and nothing else.

    So what a row samples does not depend on the rows beside it, on padding, or on where it is computed.
    """

    def of_row(sample_id: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, sample_id), position), (2,))

    return jax.vmap(of_row)(sample_ids, jnp.broadcast_to(positions, sample_ids.shape))


def draw(
    logits: jax.Array,
    uniforms: jax.Array,
    temperature: jax.Array,
    truncation: Truncation | None = None,
    banned: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token [B] int32, its log-prob [B] and the kept mass [B], float32, under softmax(logits / temperature).

    The log-prob is of the distribution that is drawn from, so of the tokens that `truncation` and `banned` leave; that
    of the full softmax is log-prob + log(kept mass). Two uniforms, one for the block and one inside it, so a rare token
    keeps its probability where one float32 uniform would round it away. `temperature` is data: 0 takes the first
    maximum and no notice of `truncation`, with the log-prob at temperature 1.

    Args:
      logits: [B, V] float32, finite.
      uniforms: [B, 2] in [0, 1).
      temperature: [] float32, >= 0.
      truncation: None keeps all tokens, in one pass less.
      banned: ids [k] that are not drawn in the rows of [B] bool.
    """
    greedy = temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    offered = scaled
    if banned is not None:
        ids, rows = banned
        named = (jnp.arange(logits.shape[1])[:, None] == ids).any(axis=1)
        offered = jnp.where(rows[:, None] & named, -jnp.inf, scaled)
    blocks = _blocks(offered)
    tops = blocks.max(axis=-1)
    highest = tops.max(axis=-1)
    depth = highest[:, None, None] - blocks  # >= 0; compared as it is, since exp differs by an ulp between programs
    limit = None
    if truncation is not None:
        limit = jnp.where(greedy, jnp.inf, _limit(depth, truncation))
    block_mass = _mass(depth, limit).sum(axis=-1)
    total = block_mass.sum(axis=-1)

    weights = jnp.where(greedy, (tops == highest[:, None]).astype(jnp.float32), block_mass)
    block = _locate(weights, jnp.where(greedy, 0.0, uniforms[:, 0]))
    near = jnp.take_along_axis(depth, block[:, None, None], axis=1)
    inside = jnp.where(greedy, (near == 0).astype(jnp.float32), _mass(near, limit))[:, 0]
    column = _locate(inside, jnp.where(greedy, 0.0, uniforms[:, 1]))
    logprob = -jnp.take_along_axis(near[:, 0], column[:, None], axis=1)[:, 0] - jnp.log(total)

    kept = jnp.ones_like(total)
    if truncation is not None or banned is not None:
        kept = total / _mass(highest[:, None, None] - _blocks(scaled), None).sum(axis=-1).sum(axis=-1)
    return _token(block, column, logits.shape[1]), logprob, kept


def _cut(vocab: int) -> tuple[int, int, int, int]:
    """Segments, entries of each, blocks of each, entries of a block."""
    segments = math.gcd(vocab, _SEGMENTS)
    length = vocab // segments
    count = -(-length // BLOCK)
    return segments, length, count, -(-length // count)


def _blocks(scores: jax.Array) -> jax.Array:
    """[B, V] as [B, n, W]; places beyond the vocabulary hold -inf."""
    segments, length, count, width = _cut(scores.shape[1])
    parts = jnp.pad(
        scores.reshape(-1, segments, length), ((0, 0), (0, 0), (0, count * width - length)), constant_values=-jnp.inf
    )
    return parts.reshape(-1, segments * count, width)


def _token(block: jax.Array, column: jax.Array, vocab: int) -> jax.Array:
    """[B] int32 id of the entry at `column` of `block`."""
    _, length, count, width = _cut(vocab)
    return (block // count * length + block % count * width + column).astype(jnp.int32)


def _mass(depth: jax.Array, limit: jax.Array | None) -> jax.Array:
    """exp(-depth) [B, n, W], 0 deeper than `limit` [B]."""
    mass = jnp.exp(-depth)
    return mass if limit is None else jnp.where(depth <= limit[:, None, None], mass, 0.0)


def _locate(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index [B] into `mass` [B, n] >= 0 whose part of the total holds `uniform` [B].

    Never one without mass: rounding may leave the cumulative sum of a parallel scan unordered by an ulp, so an entry
    without mass is taken out of it.
    """
    ends = jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0.0)
    return jnp.argmax(ends > uniform[:, None] * ends.max(axis=-1, keepdims=True), axis=-1)


def _limit(depth: jax.Array, truncation: Truncation) -> jax.Array:
    """How far below the likeliest token [B] is kept; depth [B, n, W]."""
    offered = jnp.where(depth < jnp.inf, 1.0, 0.0)
    wanted = jnp.where(truncation.top_k > 0, truncation.top_k.astype(jnp.float32), jnp.inf)
    first = _shallowest(depth, offered, jnp.minimum(wanted, offered.sum(axis=(1, 2))))
    left = _mass(depth, first)
    nucleus = _shallowest(depth, left, truncation.top_p * left.sum(axis=(1, 2)))
    nucleus = jnp.where(truncation.top_p < 1, nucleus, jnp.inf)
    return jnp.minimum(jnp.minimum(first, nucleus), -jnp.log(truncation.min_p))


def _shallowest(depth: jax.Array, weight: jax.Array, enough: jax.Array) -> jax.Array:
    """The least limit [B] such that the weights [B, n, W] down to it add up to `enough` [B].

    Bisection on the bits of a float32, from the top: exact in 31 passes whatever the vocabulary, and only sums cross
    devices where that is split over them.
    """

    def body(step: jax.Array, bits: jax.Array) -> jax.Array:
        bit = jnp.int32(1) << (_FLOAT_BITS - 1 - step)
        limit = jax.lax.bitcast_convert_type(bits + bit - 1, jnp.float32)  # the last one with this bit still 0
        down_to = jnp.where(depth <= limit[:, None, None], weight, 0.0).sum(axis=(1, 2))
        return jnp.where(down_to >= enough, bits, bits + bit)

    bits = jax.lax.fori_loop(0, _FLOAT_BITS, body, jnp.zeros(depth.shape[0], jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
