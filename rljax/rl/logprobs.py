"""Log-probs of a batch under the learner.

Letters: B rows, T positions.
"""

from typing import Any

import jax

from rljax.config import Architecture
from rljax.models.attention import AttentionLayout
from rljax.models.qwen2 import Params, forward
from rljax.models.scoring import token_logprobs
from rljax.types import TrainBatch


def batch_logprobs(
    params: Params,
    arch: Architecture,
    batch: TrainBatch,
    *,
    temperature: float,
    compute_dtype: Any,
    remat: str,
    entropy_gradient: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) [B, T] float32 of each token of `batch` given those before it in its sequence.

    Of softmax(logits / temperature) over the full vocabulary, the distribution that was sampled. Values outside
    `batch.loss_mask` are 0. Entropies carry a gradient only if asked to.
    """
    layout = AttentionLayout(batch.group, batch.completion)
    hidden = forward(params, arch, batch.tokens, batch.positions, layout, compute_dtype=compute_dtype, remat=remat)
    return token_logprobs(
        params,
        arch,
        hidden,
        batch.source,
        batch.tokens,
        batch.loss_mask,
        temperature,  # type: ignore[arg-type]
        entropy_gradient=entropy_gradient,
    )
