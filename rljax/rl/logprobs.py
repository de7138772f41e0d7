"""Log-probs of given tokens under the learner. The only next-token shift of the project is here.

Letters: B rows, T positions, D width, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rljax.config import Architecture
from rljax.models.attention import AttentionLayout
from rljax.models.qwen2 import Params, forward, logits
from rljax.types import TrainBatch

MAX_LOGITS = 2**24
"""Logits alive at once: 64 MB of float32. A [B, T, V] array of Qwen's 152k vocabulary never exists."""


def batch_logprobs(
    params: Params,
    arch: Architecture,
    batch: TrainBatch,
    *,
    temperature: float,
    compute_dtype: Any,
    remat: str,
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) [B, T] float32 of each token of `batch` given those before it in its sequence.

    Of softmax(logits / temperature) over the full vocabulary, the distribution that was sampled. Values outside
    `batch.loss_mask` are 0. Entropies carry no gradient.
    """
    layout = AttentionLayout(batch.group, batch.completion)
    hidden = forward(params, arch, batch.tokens, batch.positions, layout, compute_dtype=compute_dtype, remat=remat)
    # Token-aligned: what predicts token t is the hidden state at t - 1. Position 0 is never in a loss mask.
    predicting = jnp.roll(hidden, 1, axis=1)
    rows, length, width = hidden.shape
    total = rows * length
    chunk = min(total, max(1, MAX_LOGITS // arch.vocab_size))
    fill = -total % chunk
    flat_hidden = jnp.pad(predicting.reshape(total, width), ((0, fill), (0, 0))).reshape(-1, chunk, width)
    flat_tokens = jnp.pad(batch.tokens.reshape(total), (0, fill)).reshape(-1, chunk)
    score = partial(_score_chunk, params, arch, temperature)
    # Recomputed in the backward pass: keeping the logits would be the [B, T, V] array after all.
    logprobs, entropies = jax.lax.map(jax.checkpoint(score), (flat_hidden, flat_tokens))

    def masked(flat: jax.Array) -> jax.Array:
        return jnp.where(batch.loss_mask, flat.reshape(-1)[:total].reshape(rows, length), 0.0)

    return masked(logprobs), masked(jax.lax.stop_gradient(entropies))


def _score_chunk(
    params: Params, arch: Architecture, temperature: float, chunk: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Log-prob and entropy [C] of tokens [C] from hidden states [C, D]; float32 log-softmax."""
    hidden, tokens = chunk
    all_logprobs = jax.nn.log_softmax(logits(params, arch, hidden) / temperature, axis=-1)
    chosen = jnp.take_along_axis(all_logprobs, tokens[:, None], axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(all_logprobs) * all_logprobs, axis=-1)
    return chosen, entropy
