"""Log-probs of given tokens from hidden states, for learner and sampler. The only next-token shift of the project.

Letters: B rows, T positions, D width, V vocabulary, C tokens of a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rljax.config import Architecture
from rljax.models.qwen2 import Params, logits

MAX_LOGITS = 2**24
"""Logits alive at once: 64 MB of float32. A [B, T, V] array of Qwen's 152k vocabulary never exists."""


def token_logprobs(
    params: Params,
    arch: Architecture,
    hidden: jax.Array,
    source: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    temperature: jax.Array,
    *,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) [B, T] float32 of each of `tokens` [B, T] given the hidden state [B, T, D] before it.

    Of softmax(logits / temperature) over the full vocabulary. Values outside `mask` [B, T] are 0.

    Args:
      source: [B, T] int32, position in the row of the hidden state that predicts each token.
      entropy_gradient: whether entropies carry a gradient, which costs a further pass over the logits.
    """
    predicting = jnp.take_along_axis(hidden, source[..., None], axis=1)
    rows, length, width = hidden.shape
    total = rows * length
    chunk = min(total, max(1, MAX_LOGITS // arch.vocab_size))
    fill = -total % chunk
    flat_hidden = jnp.pad(predicting.reshape(total, width), ((0, fill), (0, 0))).reshape(-1, chunk, width)
    flat_tokens = jnp.pad(tokens.reshape(total), (0, fill)).reshape(-1, chunk)
    score = partial(_score_chunk, params, arch, temperature)
    # Recomputed in the backward pass: keeping the logits would be the [B, T, V] array after all.
    logprobs, entropies = jax.lax.map(jax.checkpoint(score), (flat_hidden, flat_tokens))

    def masked(flat: jax.Array) -> jax.Array:
        return jnp.where(mask, flat.reshape(-1)[:total].reshape(rows, length), 0.0)

    return masked(logprobs), masked(entropies if entropy_gradient else jax.lax.stop_gradient(entropies))


def _score_chunk(
    params: Params, arch: Architecture, temperature: jax.Array, chunk: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Log-prob and entropy [C] of tokens [C] from hidden states [C, D]; float32 log-softmax."""
    hidden, tokens = chunk
    all_logprobs = jax.nn.log_softmax(logits(params, arch, hidden) / temperature, axis=-1)
    chosen = jnp.take_along_axis(all_logprobs, tokens[:, None], axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(all_logprobs) * all_logprobs, axis=-1)
    return chosen, entropy
