"""Importance weights between the sampler mu and the learner at the start of the update, pi_old.

Both compute the same policy; their numbers differ by rounding (in bfloat16 by a percent), by staleness if a batch is
older than the weights, and by truncation of the distribution. The ratio pi_old / mu, bounded, weighs the policy loss;
it never carries a gradient.

Letters: B rows, T positions.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from rljax.config import AlgorithmConfig
from rljax.metrics import EffectiveShare, Max, Metric, Min, WeightedMean
from rljax.rl.sequences import sequence_ids, sequence_mean, sequence_sum
from rljax.types import TrainBatch

MAX_LOG_WEIGHT = 20.0
"""|log-weight| beyond which `exp` is not taken further."""

Bounds = tuple[float, float]
"""The lowest and highest ratio that is trusted."""


def _weight(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_WEIGHT, MAX_LOG_WEIGHT))


def _token_truncate(gap: jax.Array, mask: jax.Array, sequences: jax.Array, bounds: Bounds) -> jax.Array:
    """min(ratio, high) per token (truncated importance sampling)."""
    return jnp.minimum(_weight(gap), bounds[1])


def _token_mask(gap: jax.Array, mask: jax.Array, sequences: jax.Array, bounds: Bounds) -> jax.Array:
    """The ratio where it lies within the bounds, else 0 (IcePop)."""
    weight = _weight(gap)
    return jnp.where((weight >= bounds[0]) & (weight <= bounds[1]), weight, 0.0)


def _sequence_truncate(gap: jax.Array, mask: jax.Array, sequences: jax.Array, bounds: Bounds) -> jax.Array:
    """min(product of the sequence's ratios, high), the same for all its tokens."""
    return jnp.minimum(_weight(sequence_sum(gap, sequences)), bounds[1])


def _sequence_mask(gap: jax.Array, mask: jax.Array, sequences: jax.Array, bounds: Bounds) -> jax.Array:
    """The product of the sequence's ratios where it lies within the bounds, else 0 (TRL's default is low 0, high 3)."""
    weight = _weight(sequence_sum(gap, sequences))
    return jnp.where((weight >= bounds[0]) & (weight <= bounds[1]), weight, 0.0)


def _geometric_mask(gap: jax.Array, mask: jax.Array, sequences: jax.Array, bounds: Bounds) -> jax.Array:
    """1 where the geometric mean of the sequence's ratios lies within the bounds, else 0 (verl's `seq_mean_k1`)."""
    mean = _weight(sequence_mean(gap, mask, sequences))
    return jnp.where((mean >= bounds[0]) & (mean <= bounds[1]), 1.0, 0.0)


def _error_mask(gap: jax.Array, mask: jax.Array, sequences: jax.Array, bounds: Bounds) -> jax.Array:
    """1 where the mean over the sequence of max(ratio, 1 / ratio) is at most high, else 0 (NeMo-RL's
    `seq_logprob_error_threshold`): deviations up and down do not cancel."""
    return jnp.where(sequence_mean(_weight(jnp.abs(gap)), mask, sequences) <= bounds[1], 1.0, 0.0)


CORRECTIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, Bounds], jax.Array]] = {
    "token_truncate": _token_truncate,
    "token_mask": _token_mask,
    "sequence_truncate": _sequence_truncate,
    "sequence_mask": _sequence_mask,
    "geometric_mask": _geometric_mask,
    "error_mask": _error_mask,
}
"""(log pi_old - log mu [B, T], mask, sequences, bounds) -> weights [B, T]. Names as in verl's and TRL's options.

`clip` with `old_logprobs: recompute` and `token_truncate` is decoupled PPO (arXiv:2110.00641; AReaL, arXiv:2505.24298):
the surrogate is clipped around pi_old, and pi_old / mu corrects for who sampled."""

SEQUENCE_CORRECTIONS = {"sequence_truncate", "sequence_mask", "geometric_mask", "error_mask"}
"""Those whose weights depend on the whole completion."""


def behaviour_weights(
    gap: jax.Array, mask: jax.Array, sequences: jax.Array, algorithm: AlgorithmConfig
) -> tuple[jax.Array, dict[str, Metric]]:
    """Weights [B, T] of the policy loss, 0 outside `mask`, and what they were.

    Args:
      gap: [B, T], log pi_old - log mu of the tokens drawn; 0 outside `mask`.
      sequences: [B, T], see `rl/sequences.py`.
    """
    bounds = algorithm.correction_low, algorithm.correction_high
    weight = CORRECTIONS[algorithm.correction](gap, mask, sequences, bounds)
    weight = jax.lax.stop_gradient(jnp.where(mask, weight, 0.0))
    count, total = jnp.sum(mask, dtype=jnp.float32), jnp.sum(weight)
    dropped = jnp.sum(mask & (weight == 0), dtype=jnp.float32)
    return weight, {
        "policy/correction_mean": WeightedMean(total, count),
        "policy/correction_min": Min(jnp.min(jnp.where(mask, weight, jnp.inf))),
        "policy/correction_max": Max(jnp.max(weight)),
        "policy/correction_dropped_fraction": WeightedMean(dropped, count),
        "policy/correction_effective_fraction": EffectiveShare(total, jnp.sum(weight**2), count),
    }


def mean_weight(batch: TrainBatch, algorithm: AlgorithmConfig) -> WeightedMean:
    """Mean of the weights of `batch` ([B, T] leaves): over tokens, or over completions where each has one weight."""
    mask, sequences = batch.loss_mask, sequence_ids(batch.group, batch.completion)
    gap = jnp.where(mask, batch.old_logprobs - batch.behaviour_logprobs, 0.0)
    weight, _ = behaviour_weights(gap, mask, sequences, algorithm)
    each = mask.astype(jnp.float32)
    if algorithm.correction in SEQUENCE_CORRECTIONS:
        each = each / jnp.maximum(sequence_sum(each, sequences), 1.0)
    return WeightedMean(jnp.sum(weight * each), jnp.sum(each))


@partial(jax.jit, static_argnames="algorithm")
def normalised_advantages(batch: TrainBatch, algorithm: AlgorithmConfig) -> jax.Array:
    """Advantages of an update [M, B, T] over the mean weight of all of it; unchanged where all weights are 0.

    Every policy loss that takes a correction is proportional to |A|, so this is the loss with weights of mean 1.
    """
    parts = jax.vmap(lambda rows: mean_weight(rows, algorithm))(batch)
    mean = jnp.sum(parts.total) / jnp.maximum(jnp.sum(parts.weight), 1.0)
    return batch.advantages / jnp.where(mean > 0, mean, 1.0)
