"""A token and its behaviour log-prob from logits: two-level inverse CDF, one key per row and position, no sort.

Letters: B rows, V vocabulary, n blocks.
"""

import dataclasses
import math
from collections.abc import Callable

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
    cut = _Cut.of(logits.shape[1])
    # Held back, or XLA takes the maximum of maxima, and the sum of sums, from all entries again in a pass of its own.
    tops = jax.lax.optimization_barrier(cut.by_block(jnp.max, offered))
    highest = tops.max(axis=-1)
    depth = highest[:, None] - offered  # >= 0; compared as it is, since exp differs by an ulp between programs
    limit = None
    if truncation is not None:
        limit = jnp.where(greedy, jnp.inf, _limit(depth, truncation))
    block_mass = jax.lax.optimization_barrier(cut.by_block(jnp.sum, _mass(depth, limit)))
    total = block_mass.sum(axis=-1)

    weights = jnp.where(greedy, (tops == highest[:, None]).astype(jnp.float32), block_mass)
    block = _locate(weights, jnp.where(greedy, 0.0, uniforms[:, 0]))
    near = cut.take(depth, block)
    inside = jnp.where(greedy, (near == 0).astype(jnp.float32), _mass(near, limit))
    column = _locate(inside, jnp.where(greedy, 0.0, uniforms[:, 1]))
    logprob = -jnp.take_along_axis(near, column[:, None], axis=1)[:, 0] - jnp.log(total)

    kept = jnp.ones_like(total)
    if truncation is not None or banned is not None:
        kept = total / cut.by_block(jnp.sum, _mass(highest[:, None] - scaled, None)).sum(axis=-1)
    return cut.start(block) + column.astype(jnp.int32), logprob, kept


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How a vocabulary is cut into blocks: `segments`, each of `whole` blocks of `width` entries and one of the `rest`.

    Nothing is padded: a pass over the logits reads them as they lie.
    """

    segments: int
    whole: int
    width: int
    rest: int

    @classmethod
    def of(cls, vocab: int) -> "_Cut":
        segments = math.gcd(vocab, _SEGMENTS)
        length = vocab // segments
        width = min(BLOCK, length)
        return cls(segments, length // width, width, length % width)

    @property
    def _blocks(self) -> int:
        """Of a segment."""
        return self.whole + (self.rest > 0)

    def _parts(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, V] as the whole blocks [B, segments, whole, width] and the rests [B, segments, rest]."""
        x = x.reshape(x.shape[0], self.segments, -1)
        inside = self.whole * self.width
        return x[..., :inside].reshape(*x.shape[:2], self.whole, self.width), x[..., inside:]

    def by_block(self, reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        """`reduce` of each block of `x` [B, V]: [B, n]."""
        whole, rest = self._parts(x)
        reduced = reduce(whole, axis=-1)
        if self.rest:
            reduced = jnp.concatenate([reduced, reduce(rest, axis=-1)[..., None]], axis=-1)
        return reduced.reshape(x.shape[0], -1)

    def take(self, depth: jax.Array, block: jax.Array) -> jax.Array:
        """Block `block` [B] of `depth` [B, V]: [B, width], inf beyond its end."""
        whole, rest = self._parts(depth)
        segment, number = block // self._blocks, block % self._blocks
        flat = whole.reshape(len(block), -1, self.width)
        place = segment * self.whole + jnp.minimum(number, self.whole - 1)
        taken = jnp.take_along_axis(flat, place[:, None, None], axis=1)[:, 0]
        if not self.rest:
            return taken
        last = jnp.take_along_axis(rest, segment[:, None, None], axis=1)[:, 0]
        last = jnp.pad(last, ((0, 0), (0, self.width - self.rest)), constant_values=jnp.inf)
        return jnp.where((number == self.whole)[:, None], last, taken)

    def start(self, block: jax.Array) -> jax.Array:
        """[B] int32: the first entry of block `block` [B]."""
        length = self.whole * self.width + self.rest
        return (block // self._blocks * length + block % self._blocks * self.width).astype(jnp.int32)


def _mass(depth: jax.Array, limit: jax.Array | None) -> jax.Array:
    """exp(-depth) [B, n], 0 deeper than `limit` [B]."""
    mass = jnp.exp(-depth)
    return mass if limit is None else jnp.where(depth <= limit[:, None], mass, 0.0)


def _locate(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index [B] into `mass` [B, n] >= 0 whose part of the total holds `uniform` [B].

    Never one without mass: rounding may leave the cumulative sum of a parallel scan unordered by an ulp, so an entry
    without mass is taken out of it.
    """
    ends = jnp.where(mass > 0, jnp.cumsum(mass, axis=-1), 0.0)
    return jnp.argmax(ends > uniform[:, None] * ends.max(axis=-1, keepdims=True), axis=-1)


def _limit(depth: jax.Array, truncation: Truncation) -> jax.Array:
    """How far below the likeliest token [B] is kept; depth [B, V]."""
    offered = jnp.where(depth < jnp.inf, 1.0, 0.0)
    wanted = jnp.where(truncation.top_k > 0, truncation.top_k.astype(jnp.float32), jnp.inf)
    first = _shallowest(depth, offered, jnp.minimum(wanted, offered.sum(axis=1)))
    left = _mass(depth, first)
    nucleus = _shallowest(depth, left, truncation.top_p * left.sum(axis=1))
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
        down_to = jnp.where(depth <= limit[:, None], weight, 0.0).sum(axis=1)
        return jnp.where(down_to >= enough, bits, bits + bit)

    bits = jax.lax.fori_loop(0, _FLOAT_BITS, body, jnp.zeros(depth.shape[0], jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
