"""The two jitted programs of a wave: start it (prefill and first token), and decode a chunk of tokens.

Invariant of `DecodeState` at `step` = t: completion tokens 0..t-1 of every row are drawn; those before t-1 are in the
suffix cache. A chunk step feeds token t-1 (slot t-1, rotary position prompt length + t-1) and draws token t.

Letters: P prompts, G samples per prompt, B = P * G rows, S prompt slots, R completion slots.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rljax.config import Architecture
from rljax.models.layers import decoder_block, rms_norm, rope_tables
from rljax.models.qwen2 import Params, logits, prefill
from rljax.sampling.cache import PrefixCache, SuffixCache, decode_attention, empty_suffix, write_slot
from rljax.sampling.draw import draw, row_uniforms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DrawSettings:
    """What decides a draw beside the logits; all of it data, none of it compiled in."""

    key: jax.Array  # [] typed key of the run and purpose
    sample_ids: jax.Array  # [B] uint32, unique in the run
    temperature: jax.Array  # [] float32, 0 is greedy
    stop_ids: jax.Array  # [n] int32
    max_tokens: jax.Array  # [] int32, cap on a completion


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything of a wave that changes from token to token; donated from chunk to chunk."""

    step: jax.Array  # [] int32, tokens drawn per row
    tokens: jax.Array  # [R, B] int32, 0 after the end; time-major so that a step writes one contiguous line
    logprobs: jax.Array  # [R, B] float32, 0 after the end
    lengths: jax.Array  # [B] int32, tokens of the completion so far
    stopped: jax.Array  # [B] bool, a stop token was drawn
    suffix: SuffixCache

    def done(self, max_tokens: jax.Array) -> jax.Array:
        """[B] bool: nothing more will be drawn for the row."""
        return self.stopped | (self.lengths >= max_tokens)


def _record(state: DecodeState, hidden: jax.Array, params: Params, arch: Architecture, settings: DrawSettings):
    """`state` with token `state.step` of every live row drawn from `hidden` [B, D]."""
    uniforms = row_uniforms(settings.key, settings.sample_ids, state.step)
    token, logprob = draw(logits(params, arch, hidden), uniforms, settings.temperature)
    live = ~state.done(settings.max_tokens)
    line = partial(jax.lax.dynamic_update_index_in_dim, index=state.step, axis=0)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        tokens=line(state.tokens, jnp.where(live, token, 0)),
        logprobs=line(state.logprobs, jnp.where(live, logprob, 0.0)),
        lengths=state.lengths + live,
        stopped=state.stopped | (live & jnp.isin(token, settings.stop_ids)),
    )


@partial(jax.jit, static_argnames=("arch", "samples_per_prompt", "slots"))
def start_wave(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    settings: DrawSettings,
    *,
    arch: Architecture,
    samples_per_prompt: int,
    slots: int,
) -> tuple[PrefixCache, DecodeState]:
    """Runs each prompt once, tokens [P, S] right-padded, and draws the first token of its samples.

    `slots` is R: room for completion tokens, a multiple of the chunk plus one.
    """
    hidden, keys, values = prefill(params, arch, tokens, lengths)
    prefix = PrefixCache(keys, values, lengths)
    rows = tokens.shape[0] * samples_per_prompt
    state = DecodeState(
        step=jnp.int32(0),
        tokens=jnp.zeros((slots, rows), jnp.int32),
        logprobs=jnp.zeros((slots, rows), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
        stopped=jnp.zeros(rows, bool),
        suffix=empty_suffix(prefix, rows, slots),
    )
    return prefix, _record(state, jnp.repeat(hidden, samples_per_prompt, axis=0), params, arch, settings)


def _feed(
    params: Params, arch: Architecture, prefix: PrefixCache, suffix: SuffixCache, token: jax.Array, slot: jax.Array
) -> tuple[jax.Array, SuffixCache]:
    """Hidden state [B, D] after `token` [B], whose keys and values go to `slot`."""
    rows = token.shape[0]
    positions = jnp.repeat(prefix.lengths, rows // prefix.lengths.shape[0]) + slot
    rope = rope_tables(positions, arch.head_dim, arch.rope_theta)
    x = params["embed"][token]
    new_keys: list[jax.Array] = []
    new_values: list[jax.Array] = []
    for layer, weights in enumerate(params["layers"]):

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: int = layer) -> tuple[jax.Array, Any]:
            # Write, then read the written array: the other order makes XLA copy the cache.
            keys = write_slot(suffix.keys[layer], slot, k)
            values = write_slot(suffix.values[layer], slot, v)
            shared = prefix.keys[layer], prefix.values[layer]
            return decode_attention(q, shared, prefix.lengths, (keys, values), slot), (keys, values)

        x, (keys, values) = decoder_block(weights, arch, x, rope, attend)
        new_keys.append(keys)
        new_values.append(values)
    return rms_norm(x, params["final_norm"], arch.rms_norm_eps), SuffixCache(new_keys, new_values)


@partial(jax.jit, static_argnames=("arch", "chunk_tokens"), donate_argnames="state")
def decode_chunk(
    params: Params,
    prefix: PrefixCache,
    state: DecodeState,
    settings: DrawSettings,
    *,
    arch: Architecture,
    chunk_tokens: int,
) -> tuple[DecodeState, jax.Array]:
    """Draws `chunk_tokens` more tokens per row; returns the state and how many rows are not done ([] int32).

    The trip count is known at compile time: on a GPU an unknown one would wait for the host at every token.
    """

    def body(_: jax.Array, state: DecodeState) -> DecodeState:
        slot = state.step - 1
        last = jax.lax.dynamic_index_in_dim(state.tokens, slot, axis=0, keepdims=False)
        hidden, suffix = _feed(params, arch, prefix, state.suffix, last, slot)
        return _record(dataclasses.replace(state, suffix=suffix), hidden, params, arch, settings)

    state = jax.lax.fori_loop(0, chunk_tokens, body, state)
    return state, jnp.sum(~state.done(settings.max_tokens), dtype=jnp.int32)
