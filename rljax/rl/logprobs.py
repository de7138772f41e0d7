"""Hidden states and log-probs of a batch under the learner.

Letters: B rows, T positions, D width.
"""

from typing import Any

import jax

from rljax.config import Architecture
from rljax.models.attention import AttentionLayout
from rljax.models.qwen2 import Params, forward
from rljax.models.scoring import token_logprobs
from rljax.types import TrainBatch


def batch_states(
    params: Params,
    arch: Architecture,
    batch: TrainBatch,
    *,
    compute_dtype: Any,
    remat: str = "none",
    head_dtype: Any = None,
) -> jax.Array:
    """Final hidden states [B, T, D] of `batch`, in `head_dtype` (None: the compute dtype)."""
    layout = AttentionLayout(batch.group, batch.completion)
    how = {"compute_dtype": compute_dtype, "remat": remat, "head_dtype": head_dtype}
    return forward(params, arch, batch.tokens, batch.positions, layout, **how)


def batch_logprobs(
    params: Params,
    arch: Architecture,
    batch: TrainBatch,
    *,
    temperature: float,
    compute_dtype: Any,
    head_dtype: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) [B, T] float32 of each token of `batch` given those before it in its sequence.

    Of softmax(logits / temperature) over the full vocabulary, the distribution that was sampled. Values outside
    `batch.loss_mask` are 0. Has no gradient; `head.batch_loss` has.
    """
    hidden = batch_states(params, arch, batch, compute_dtype=compute_dtype, head_dtype=head_dtype)
    return token_logprobs(params, arch, hidden, batch.source, batch.tokens, batch.loss_mask, temperature)
