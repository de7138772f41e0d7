"""The device programs of a decode: start a wave, admit prompts to freed lanes, decode a chunk, change shape.

Plain functions of arrays; `device.py` compiles them. Invariant of `DecodeState`: `token` is the last one drawn of each
row and not yet fed; the `lengths - 1` tokens before it are in the suffix cache, in the slots before `slot`. A step
feeds `token` (to slot `slot`, at rotary position prompt length + lengths - 1) and draws the next.

Letters: L lanes, W samples per lane, B = L * W rows, S prompt slots, R completion slots, K steps of a chunk, A admitted
lanes, U prompts that are run, V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rljax.config import Architecture
from rljax.models.layers import Rope, Weights, decoder_block, rope_tables
from rljax.models.qwen2 import Params, embedded, final_states, logits, prefill
from rljax.sampling.cache import (
    PrefixCache,
    SuffixCache,
    decode_attention,
    empty_suffix,
    visible_slots,
    without_hidden,
    write_key,
    write_value,
)
from rljax.sampling.draw import Truncation, draw, row_uniforms

PREFILL_SCORES = 2**28
"""Attention scores alive at once while prompts are run: 1 GiB of float32. Longer lists of prompts go in pieces."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DrawSettings:
    """What decides a draw beside the logits; all of it data, none of it compiled in."""

    key: jax.Array  # [] typed key of the run and purpose
    temperature: jax.Array  # [] float32, 0 is greedy
    stop_ids: jax.Array  # [n] int32
    min_tokens: jax.Array | None  # [] int32, stop ids cannot be drawn before; None: off
    truncation: Truncation | None  # None: the full distribution


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What changes from step to step; donated from chunk to chunk."""

    suffix: SuffixCache
    slot: jax.Array  # [] int32, where the next step writes
    token: jax.Array  # [B] int32, drawn last
    lengths: jax.Array  # [B] int32, tokens drawn
    stopped: jax.Array  # [B] bool, a stop token was drawn
    limits: jax.Array  # [B] int32, cap of each row; 0: nobody is there
    sample_ids: jax.Array  # [B] uint32, unique in the run: seeds the draws

    def live(self) -> jax.Array:
        """[B] bool: more will be drawn for the row."""
        return ~self.stopped & (self.lengths < self.limits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a program drew, for the host. Lines after a row's end hold 0."""

    tokens: jax.Array  # [K, B] int32
    logprobs: jax.Array  # [K, B] float32
    kept_mass: jax.Array  # [K, B] float32, 1 where nothing was cut
    lengths: jax.Array  # [B] int32, tokens drawn by now
    stopped: jax.Array  # [B] bool


def _draw_next(
    state: DecodeState, scores: jax.Array, settings: DrawSettings
) -> tuple[DecodeState, tuple[jax.Array, jax.Array, jax.Array]]:
    """`state` with one more token for every live row from `scores` [B, V]; token, log-prob and kept mass [B]."""
    live = state.live()
    banned = None
    if settings.min_tokens is not None:
        banned = settings.stop_ids, state.lengths + 1 < settings.min_tokens
    uniforms = row_uniforms(settings.key, state.sample_ids, state.lengths)
    token, logprob, kept = draw(scores, uniforms, settings.temperature, settings.truncation, banned)
    token = jnp.where(live, token, 0)
    state = dataclasses.replace(
        state,
        token=token,
        lengths=state.lengths + live,
        stopped=state.stopped | (live & jnp.isin(token, settings.stop_ids)),
    )
    return state, (token, jnp.where(live, logprob, 0.0), jnp.where(live, kept, 1.0))


# --------------------------------------------------------------------------------------------------------------- start


def _prefill(
    params: Params, arch: Architecture, tokens: jax.Array, lengths: jax.Array, shards: int
) -> tuple[jax.Array, PrefixCache]:
    """Runs prompts, tokens [U, S] right-padded: scores [U, V] of the first token, and the cache.

    Pieces of prompts go one after the other where the attention scores of all would not fit.
    """
    prompts, slots = tokens.shape
    each = prompts // shards
    piece = max(1, PREFILL_SCORES // (arch.num_heads * slots * slots))
    count = next(n for n in range(-(-each // piece), each + 1) if each % n == 0)

    def run(piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        hidden, keys, values = prefill(params, arch, *piece)
        # The last token's state is all that is needed; padded slots must hold no NaN (`decode_attention`).
        last = jnp.take_along_axis(hidden, (piece[1] - 1)[:, None, None], axis=1)[:, 0]
        in_prompt = jnp.arange(slots) < piece[1][:, None]
        return last, keys, [without_hidden(v, in_prompt) for v in values]

    if count == 1:
        hidden, keys, values = run((tokens, lengths))
    else:

        def cut(x: jax.Array) -> jax.Array:  # the pieces of a shard stay on it
            return x.reshape(shards, count, -1, *x.shape[1:]).swapaxes(0, 1).reshape(count, -1, *x.shape[1:])

        def join(x: jax.Array) -> jax.Array:
            return x.reshape(count, shards, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])

        hidden, keys, values = jax.tree.map(join, jax.lax.map(run, (cut(tokens), cut(lengths))))
    return logits(params, arch, hidden), PrefixCache(keys, values, lengths)


def _prefill_lanes(
    params: Params, arch: Architecture, tokens: jax.Array, lengths: jax.Array, place: jax.Array | None, shards: int
) -> tuple[jax.Array, PrefixCache]:
    """Scores [L, V] and the cache of lanes whose prompts lie at `place` [L] among those of their shard."""
    scores, prefix = _prefill(params, arch, tokens, lengths, shards)
    if place is None:
        return scores, prefix
    return jax.tree.map(lambda leaf: _take(leaf, place, shards), (scores, prefix))


def _first_tokens(
    scores: jax.Array, sample_ids: jax.Array, limits: jax.Array, suffix: SuffixCache, settings: DrawSettings
) -> tuple[DecodeState, Drawn]:
    """Rows with their first token, drawn from the `scores` [L, V] of their prompts."""
    rows = sample_ids.shape[0]
    state = DecodeState(
        suffix=suffix,
        slot=jnp.int32(0),
        token=jnp.zeros(rows, jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        stopped=jnp.zeros(rows, bool),
        limits=limits,
        sample_ids=sample_ids,
    )
    state, (token, logprob, kept) = _draw_next(state, jnp.repeat(scores, rows // scores.shape[0], axis=0), settings)
    return state, Drawn(token[None], logprob[None], kept[None], state.lengths, state.stopped)


def start_wave(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    place: jax.Array | None,
    sample_ids: jax.Array,
    limits: jax.Array,
    settings: DrawSettings,
    *,
    arch: Architecture,
    slots: int,
    shards: int,
) -> tuple[PrefixCache, DecodeState, Drawn]:
    """Runs the prompts, tokens [U, S] right-padded, and draws the first token of the rows, ids and limits [B].

    `place` [L] says which of its shard's prompts a lane continues, None: one of each lane. `slots` is R; `shards` how
    many devices the rows are split over.
    """
    scores, prefix = _prefill_lanes(params, arch, tokens, lengths, place, shards)
    suffix = empty_suffix(prefix, sample_ids.shape[0], slots)
    state, drawn = _first_tokens(scores, sample_ids, limits, suffix, settings)
    return prefix, state, drawn


def admit(
    params: Params,
    prefix: PrefixCache,
    state: DecodeState,
    lane: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    place: jax.Array | None,
    sample_ids: jax.Array,
    limits: jax.Array,
    settings: DrawSettings,
    *,
    arch: Architecture,
    shards: int,
) -> tuple[PrefixCache, DecodeState, Drawn]:
    """New prompts, tokens [U, S], take over the lanes `lane` [A]; `place` [A] as in `start_wave`, ids, limits [A * W].

    `lane` counts within a shard; a value of L / shards or more is padding and changes nothing. `Drawn` is of the
    admitted rows, in their order.
    """
    scores, fresh = _prefill_lanes(params, arch, tokens, lengths, place, shards)
    width = sample_ids.shape[0] // lane.shape[0]
    new, drawn = _first_tokens(scores, sample_ids, limits, SuffixCache([], []), settings)
    rows_lane = (lane[:, None] * width + jnp.arange(width)).reshape(-1)

    def put(old: jax.Array, values: jax.Array, index: jax.Array) -> jax.Array:
        """`old` with `values` at `index` of dim 0, each shard by itself."""
        split = old.reshape(shards, -1, *old.shape[1:])
        values, index = values.reshape(shards, -1, *values.shape[1:]), index.reshape(shards, -1)
        return jax.vmap(lambda o, v, i: o.at[i].set(v, mode="drop"))(split, values, index).reshape(old.shape)

    prefix = PrefixCache(
        [put(old, x, lane) for old, x in zip(prefix.keys, fresh.keys, strict=True)],
        [put(old, x, lane) for old, x in zip(prefix.values, fresh.values, strict=True)],
        put(prefix.lengths, fresh.lengths, lane),
    )
    changed = {
        name: put(getattr(state, name), getattr(new, name), rows_lane)
        for name in ("token", "lengths", "stopped", "limits", "sample_ids")
    }
    return prefix, dataclasses.replace(state, **changed), drawn


# --------------------------------------------------------------------------------------------------------------- chunk


def _feed(
    params: Params, arch: Architecture, prefix: PrefixCache, state: DecodeState, in_prompt: jax.Array, angles: Rope
) -> tuple[jax.Array, SuffixCache]:
    """Hidden state [B, D] after `state.token`, whose keys and values go to `state.slot`; `angles` of all positions."""
    suffix = state.suffix
    samples = state.token.shape[0] // prefix.lengths.shape[0]
    positions = jnp.repeat(prefix.lengths, samples) + state.lengths - 1
    # Only a row that has ended can lie beyond the table.
    cos, sin = (table.at[positions].get(mode="clip") for table in angles)
    visible = visible_slots(state.lengths, state.slot, suffix.values[0].shape[2])
    x = embedded(params, state.token)
    new_keys: list[jax.Array] = []
    new_values: list[jax.Array] = []

    @partial(jax.jit, inline=True)  # the layers are alike: traced once
    def layer(weights: Weights, x: jax.Array, shared: Any, keys: jax.Array, values: jax.Array) -> tuple[jax.Array, Any]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            # Write, then read the written array: the other order makes XLA copy the cache.
            own = write_key(keys, state.slot, k), write_value(values, state.slot, v)
            return decode_attention(q, shared, in_prompt, own, visible), own

        return decoder_block(weights, arch, x, (cos, sin), attend)

    caches = zip(prefix.keys, prefix.values, suffix.keys, suffix.values, strict=True)
    for weights, (*shared, keys, values) in zip(params["layers"], caches, strict=True):
        x, (keys, values) = layer(weights, x, tuple(shared), keys, values)
        new_keys.append(keys)
        new_values.append(values)
    return final_states(params, arch, x), SuffixCache(new_keys, new_values)


def decode_chunk(
    params: Params,
    prefix: PrefixCache,
    state: DecodeState,
    settings: DrawSettings,
    *,
    arch: Architecture,
    steps: int,
    early_exit: bool,
) -> tuple[DecodeState, Drawn]:
    """Draws up to `steps` more tokens per row.

    Hidden slots of the suffix may hold anything, as of a row that was here before. Values of hidden prompt slots are
    finite, as `_prefill` leaves them: to write 0 there for every chunk would take memory for half of that cache.

    Without `early_exit` the trip count is known when compiling: on a GPU an unknown one makes every step wait for the
    host. With it the loop ends when no row is live.
    """
    rows, slots = state.token.shape[0], state.suffix.values[0].shape[2]
    in_prompt = jnp.arange(prefix.values[0].shape[2]) < prefix.lengths[:, None]
    seen = visible_slots(state.lengths - 1, state.slot - 1, slots)
    clean = dataclasses.replace(state.suffix, values=[without_hidden(v, seen) for v in state.suffix.values])
    # Looked up in the loop: computed there, XLA would do so again in each layer, and for each head.
    positions = jnp.arange(in_prompt.shape[1] + slots)
    angles = rope_tables(positions, arch.head_dim, arch.rope_theta)
    lines = (
        jnp.zeros((steps, rows), jnp.int32),
        jnp.zeros((steps, rows), jnp.float32),
        jnp.ones((steps, rows), jnp.float32),
    )

    def body(step: jax.Array, carry: tuple[DecodeState, Any]) -> tuple[DecodeState, Any]:
        state, lines = carry
        hidden, suffix = _feed(params, arch, prefix, state, in_prompt, angles)
        state = dataclasses.replace(state, suffix=suffix, slot=(state.slot + 1) % slots)
        state, line = _draw_next(state, logits(params, arch, hidden), settings)
        write = partial(jax.lax.dynamic_update_index_in_dim, index=step, axis=0)
        return state, tuple(write(old, new) for old, new in zip(lines, line, strict=True))

    carry = (dataclasses.replace(state, suffix=clean), lines)
    if early_exit:
        _, carry = jax.lax.while_loop(
            lambda c: (c[0] < steps) & jnp.any(c[1][0].live()), lambda c: (c[0] + 1, body(*c)), (jnp.int32(0), carry)
        )
    else:
        carry = jax.lax.fori_loop(0, steps, body, carry)
    state, (tokens, logprobs, kept_mass) = carry
    return state, Drawn(tokens, logprobs, kept_mass, state.lengths, state.stopped)


# --------------------------------------------------------------------------------------------------------------- shape


def _take(x: jax.Array, index: jax.Array, shards: int) -> jax.Array:
    """`x[index]` along dim 0 where both are split into `shards` and `index` counts within a shard."""
    split, index = x.reshape(shards, -1, *x.shape[1:]), index.reshape(shards, -1)
    return jax.vmap(lambda part, i: part[i])(split, index).reshape(-1, *x.shape[1:])


def take_rows(
    state: DecodeState, lengths: jax.Array, rows: jax.Array, lanes: jax.Array, *, shards: int
) -> tuple[DecodeState, jax.Array]:
    """The small arrays of new rows that continue the old `rows` [B'], and of lanes with the prompts of `lanes` [L'].

    Indices count within a shard; -1: nobody is there. `lengths` [L] are the prompts'. The caches go through
    `take_cache`.
    """
    kept = {
        name: _take(getattr(state, name), rows, shards)
        for name in ("token", "lengths", "stopped", "limits", "sample_ids")
    }
    kept["limits"] = jnp.where(rows < 0, 0, kept["limits"])
    return dataclasses.replace(state, **kept), jnp.where(lanes < 0, 1, _take(lengths, lanes, shards))


def take_cache(
    keys: jax.Array, values: jax.Array, rows: jax.Array | None, slot: jax.Array, *, slots: int, shards: int
) -> tuple[jax.Array, jax.Array]:
    """A layer's keys [B, K, H, R] and values [B, K, R, H] of the old `rows` [B'] (None: all) in rings of `slots` >= R.

    A ring that grows gets its new slots before `slot`, the next to be written, which holds the oldest token: they are
    written next, and from the newest token backwards nothing changes.
    """

    def take(cache: jax.Array, axis: int) -> jax.Array:
        if rows is not None:
            cache = _take(cache, jnp.maximum(rows, 0), shards)
        more = slots - cache.shape[axis]
        if more:
            whole = [(0, 0)] * cache.ndim
            early, late = (jnp.pad(cache, [*whole[:axis], each, *whole[axis + 1 :]]) for each in ((0, more), (more, 0)))
            cache = jnp.where(jax.lax.broadcasted_iota(jnp.int32, early.shape, axis) < slot, early, late)
        return cache

    return take(keys, 3), take(values, 2)
