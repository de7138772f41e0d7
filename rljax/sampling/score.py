"""Log-probs of given completions under the sampler's parameters: whole sequences at once, no cache."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rljax.config import Architecture
from rljax.hosts import readable, to_devices
from rljax.mesh import num_row_shards, replicated, row_sharding
from rljax.models.qwen2 import Params, prefill
from rljax.models.scoring import token_logprobs
from rljax.sampling.programs import Programs
from rljax.types import Prompts

_TOKENS = 16384
"""Positions per shard and pass, padding included."""


def score_completions(
    params: Params,
    arch: Architecture,
    mesh: Mesh,
    programs: Programs,
    prompts: Prompts,
    completions: Sequence[np.ndarray],
    *,
    temperature: float,
) -> np.ndarray:
    """See `Sampler.score`."""
    each = len(completions) // len(prompts)
    starts = np.repeat(prompts.lengths, each)
    ends = starts + np.array([len(completion) for completion in completions], np.int32)
    positions = -(-int(ends.max()) // 64) * 64
    shards = num_row_shards(mesh)
    rows = min(max(1, _TOKENS // positions), -(-len(completions) // shards)) * shards
    tokens = np.zeros((-(-len(completions) // rows) * rows, positions), np.int32)
    for row, completion in enumerate(completions):
        tokens[row, : starts[row]] = prompts.tokens[row // each, : starts[row]]
        tokens[row, starts[row] : ends[row]] = completion
    fill = len(tokens) - len(completions)
    bounds = np.stack(
        [np.pad(starts, (0, fill), constant_values=1), np.pad(ends, (0, fill), constant_values=1)], axis=1
    )
    by_rows = row_sharding(mesh)
    warmth = to_devices(np.float32(temperature), replicated(mesh))
    scored = []
    for start in range(0, len(tokens), rows):
        part = [to_devices(x[start : start + rows].astype(np.int32), by_rows) for x in (tokens, bounds)]
        arguments = (params, *part, warmth)
        with jax.set_mesh(mesh):
            run = programs.get(
                ("score", rows, positions),
                lambda a=arguments: jax.jit(partial(_score, arch=arch), out_shardings=readable(by_rows)).lower(*a),
            )
        scored.append(run(*arguments))
    whole = np.concatenate([np.asarray(part) for part in scored])
    logprobs = np.zeros((len(completions), int((ends - starts).max())), np.float32)
    for row, (first, end) in enumerate(zip(starts, ends, strict=True)):
        logprobs[row, : end - first] = whole[row, first:end]
    return logprobs


def _score(
    params: Params, tokens: jax.Array, bounds: jax.Array, temperature: jax.Array, *, arch: Architecture
) -> jax.Array:
    """Log-probs [B, T] of `tokens` [B, T] from the first to before the second of `bounds` [B, 2]."""
    place = jnp.arange(tokens.shape[1])
    mask = (place >= bounds[:, :1]) & (place < bounds[:, 1:])
    hidden, _, _ = prefill(params, arch, tokens, bounds[:, 1])
    source = jnp.broadcast_to(jnp.maximum(place - 1, 0), tokens.shape)
    return token_logprobs(params, arch, hidden, source, tokens, mask, temperature)[0]
