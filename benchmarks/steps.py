"""Parts of a decode step, two ways each: the layers scanned or unrolled, a token drawn with noise or by inverse CDF.

Letters: B rows, W samples per lane, L layers, V vocabulary.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from models import random_params

from rljax.config import Architecture
from rljax.models.layers import decoder_block, rms_norm, rope_tables
from rljax.models.qwen2 import Params, logits, sampler_params
from rljax.sampling.cache import decode_attention, visible_slots, write_key, write_value
from rljax.sampling.draw import draw, row_uniforms

STEPS = 32
PROMPT, SLOTS, SAMPLES = 64, 128, 8
"""Prompt slots, completion slots, and samples per prompt of a step."""


class Program:
    """A compiled function of a key and of arrays, which as constants would be folded into it."""

    def __init__(self, function: Callable[..., jax.Array], work: int, *arrays: Any) -> None:
        self._function, self._arrays, self.work = jax.jit(function), arrays, work
        self._last = jnp.zeros(0)
        self.run(0)

    def run(self, seed: int) -> float:
        """Seconds of one run."""
        key = jax.block_until_ready(jax.random.key(seed))
        started = time.perf_counter()
        self._last = jax.block_until_ready(self._function(key, *self._arrays))
        return time.perf_counter() - started

    def result(self) -> np.ndarray:
        """What the last run returned."""
        return np.asarray(self._last)


# -------------------------------------------------------------------------------------------------------------- layers

Caches = tuple[jax.Array, jax.Array]


def _layer(
    weights: Any, arch: Architecture, x: jax.Array, step: jax.Array, shared: Caches, own: Caches
) -> tuple[jax.Array, Caches]:
    """One layer of step `step` [], x [B, D]: the new x and the row's own keys and values with this token's."""
    rows = x.shape[0]
    in_prompt = jnp.ones((shared[1].shape[0], PROMPT), bool)
    visible = visible_slots(jnp.full(rows, step + 1), step, SLOTS)
    rope = rope_tables(jnp.full(rows, PROMPT + step), arch.head_dim, arch.rope_theta)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Caches]:
        keys, values = write_key(own[0], step, k), write_value(own[1], step, v)
        return decode_attention(q, shared, in_prompt, (keys, values), visible), (keys, values)

    return decoder_block(weights, arch, x, rope, attend)


def _through_list(params: Params, arch: Architecture, shared: Any, x: jax.Array, step: jax.Array, own: Any) -> Any:
    kept = []
    for weights, prompt, mine in zip(params["layers"], shared, own, strict=True):
        x, new = _layer(weights, arch, x, step, prompt, mine)
        kept.append(new)
    return x, kept


def _through_scan(params: Params, arch: Architecture, shared: Any, x: jax.Array, step: jax.Array, own: Any) -> Any:
    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, Caches]:
        weights, prompt, mine = layer
        return _layer(weights, arch, x, step, prompt, mine)

    return jax.lax.scan(body, x, (params["layers"], shared, own))


def _decode(
    key: jax.Array, params: Params, shared: Any, own: Any, *, arch: Architecture, rows: int, through: Any
) -> Any:
    """Tokens [B, STEPS] of greedy steps after a random first one."""

    def body(step: jax.Array, carry: Any) -> Any:
        token, own, drawn = carry
        x, own = through(params, arch, shared, params["embed"][token], step, own)
        scores = logits(params, arch, rms_norm(x, params["final_norm"], arch.rms_norm_eps))
        token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return token, own, drawn.at[:, step].set(token)

    first = jax.random.randint(key, (rows,), 0, arch.vocab_size, jnp.int32)
    return jax.lax.fori_loop(0, STEPS, body, (first, own, jnp.zeros((rows, STEPS), jnp.int32)))[2]


def _caches(key: jax.Array, arch: Architecture, rows: int, slots: int, dtype: str) -> list[Caches]:
    """Per layer keys [rows, K, H, slots] and values [rows, K, slots, H]."""
    keys = jax.random.split(key, 2 * arch.num_layers)
    heads, dim = arch.num_kv_heads, arch.head_dim
    return [
        (
            jax.random.normal(keys[2 * layer], (rows, heads, dim, slots), dtype),
            jax.random.normal(keys[2 * layer + 1], (rows, heads, slots, dim), dtype),
        )
        for layer in range(arch.num_layers)
    ]


def step_programs(arch: Architecture, rows: int, dtype: str) -> dict[str, Program]:
    """STEPS greedy decode steps of `rows` rows with equal weights and caches; results are the tokens [B, STEPS]."""
    learner = random_params(jax.random.key(0), arch, dtype)
    params = jax.jit(partial(sampler_params, arch=arch, compute_dtype=dtype))(learner)
    shared = _caches(jax.random.key(1), arch, -(-rows // SAMPLES), PROMPT, dtype)
    own = _caches(jax.random.key(2), arch, rows, SLOTS, dtype)
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *part) for part in (params["layers"], shared, own)]
    decode = partial(_decode, arch=arch, rows=rows)
    return {
        "scan": Program(
            partial(decode, through=_through_scan), rows * STEPS, {**params, "layers": stacked[0]}, *stacked[1:]
        ),
        "unrolled": Program(partial(decode, through=_through_list), rows * STEPS, params, shared, own),
    }


# --------------------------------------------------------------------------------------------------------------- draws


def _gumbel(scores: jax.Array, key: jax.Array, samples: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of scores [B, V] plus noise, a key per row as in the engine, and its log-prob [B]."""
    keys = jax.vmap(lambda sample: jax.random.fold_in(jax.random.fold_in(key, sample), step))(samples)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
    token = jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0]
    return token, chosen - jax.nn.logsumexp(scores, axis=-1)


def _two_level(scores: jax.Array, key: jax.Array, samples: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    token, logprob, _ = draw(scores, row_uniforms(key, samples, step), jnp.float32(1))
    return token, logprob


def _draws(key: jax.Array, scores: jax.Array, *, drawn: Callable[..., tuple[jax.Array, jax.Array]]) -> jax.Array:
    """[2, B, STEPS] float32: tokens and log-probs, one after the other from scores [B, V]."""
    rows = scores.shape[0]
    samples = jnp.arange(rows, dtype=jnp.uint32)

    def body(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        token, out = carry
        # Depends on the draw before, or what is the same at every step would be computed once.
        token, logprob = drawn(scores + 1e-9 * token[:, None].astype(jnp.float32), key, samples, step)
        return token, out.at[:, :, step].set(jnp.stack([token.astype(jnp.float32), logprob]))

    return jax.lax.fori_loop(0, STEPS, body, (jnp.zeros(rows, jnp.int32), jnp.zeros((2, rows, STEPS))))[1]


def draw_programs(rows: int, vocab: int) -> dict[str, Program]:
    """STEPS draws of a token and its log-prob for every row; results [2, B, STEPS]."""
    scores = 2 * jax.random.normal(jax.random.key(3), (rows, vocab))
    return {
        name: Program(partial(_draws, drawn=drawn), rows * STEPS, scores)
        for name, drawn in (("Gumbel-max", _gumbel), ("two-level", _two_level))
    }


def check_draws(program: Program, rows: int, vocab: int) -> float:
    """The largest error of the log-probs that `program` last returned for its tokens."""
    scores = np.asarray(2 * jax.random.normal(jax.random.key(3), (rows, vocab)), np.float64)
    tokens, logprobs = program.result()
    chosen = np.take_along_axis(scores, tokens.astype(np.int64), axis=1)
    highest = scores.max(axis=1, keepdims=True)
    return float(np.abs(chosen - highest - np.log(np.exp(scores - highest).sum(1, keepdims=True)) - logprobs).max())
