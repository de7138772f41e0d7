"""The objective: per-token losses, summed with weights that add to 1 over an update.

Written for log-ratios that may be anything outside the mask: they are replaced before `exp`, since a masked infinity
still has a NaN gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.config import AlgorithmConfig
from rljax.metrics import Max, Metric, WeightedMean
from rljax.types import TrainBatch

MAX_LOG_RATIO = 20.0
"""|log-ratio| beyond which `exp` is not taken further (verl `core_algos.py`: 20)."""
MAX_KL = 10.0
"""Clamp of the k3 estimate per token (verl `core_algos.py`: 10)."""


def clip_loss(ratio: jax.Array, advantages: jax.Array, algorithm: AlgorithmConfig) -> tuple[jax.Array, jax.Array]:
    """(loss, clipped) per token: max(-A ratio, -A clip(ratio, 1 - low, 1 + high)), bounded by -A * dual_clip for A < 0.

    Source: PPO (arXiv:1707.06347), dual clip (arXiv:1912.09729), as verl's `compute_policy_loss`.
    """
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high)
    loss = jnp.maximum(plain, clipped)
    is_clipped = clipped > plain
    if algorithm.dual_clip > 0:
        bound = -advantages * algorithm.dual_clip
        below = (advantages < 0) & (bound < loss)
        loss = jnp.where(below, bound, loss)
        is_clipped = is_clipped | below
    return loss, is_clipped


LOSSES: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {"clip": clip_loss}


def _k1(log_ratio: jax.Array) -> jax.Array:
    return log_ratio


def _k2(log_ratio: jax.Array) -> jax.Array:
    return 0.5 * log_ratio**2


def _k3(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(jnp.exp(-log_ratio) - 1 + log_ratio, -MAX_KL, MAX_KL)


KL_ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {"k1": _k1, "k2": _k2, "k3": _k3}
"""KL(policy || reference) per token from l = log policy - log reference, sampled from the policy
(joschu.net/blog/kl-approx.html). k3 = exp(-l) - 1 + l >= 0, clamped as in the paper's code."""


def grpo_loss(
    logprobs: jax.Array, entropies: jax.Array, batch: TrainBatch, algorithm: AlgorithmConfig
) -> tuple[jax.Array, dict[str, Metric]]:
    """Sum over tokens of weight * (policy loss + kl_coefficient * KL), and metrics as sums.

    Args:
      logprobs, entropies: [B, T] of the policy, 0 outside `batch.loss_mask`.
    """
    mask = batch.loss_mask
    log_ratio = jnp.where(mask, logprobs - batch.old_logprobs, 0.0)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    policy, clipped = LOSSES[algorithm.loss](ratio, batch.advantages, algorithm)
    loss = jnp.sum(jnp.where(mask, policy, 0.0) * batch.weights)
    count = jnp.sum(mask, dtype=jnp.float32)
    metrics: dict[str, Metric] = {
        "policy/loss": WeightedMean(loss, jnp.sum(batch.weights)),
        "policy/entropy": WeightedMean(jnp.sum(entropies), count),
        "policy/clip_fraction": WeightedMean(jnp.sum(jnp.where(mask, clipped, False), dtype=jnp.float32), count),
        "policy/ratio_max": Max(jnp.max(jnp.where(mask, ratio, 0.0))),
        "policy/old_kl": WeightedMean(-jnp.sum(log_ratio), count),
    }
    if algorithm.kl_coefficient > 0:
        to_reference = jnp.where(mask, logprobs - batch.reference_logprobs, 0.0)
        clamped = jnp.clip(to_reference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = jnp.where(mask, KL_ESTIMATORS[algorithm.kl_estimator](clamped), 0.0)
        loss = loss + algorithm.kl_coefficient * jnp.sum(kl * batch.weights)
        metrics["policy/reference_kl"] = WeightedMean(jnp.sum(kl), count)
    return loss, metrics


def behaviour_gap(logprobs: jax.Array, batch: TrainBatch) -> dict[str, Metric]:
    """|learner - sampler| log-prob of the sampled tokens: the health gauge. Call it before the first update only."""
    gap = jnp.where(batch.loss_mask, jnp.abs(logprobs - batch.behaviour_logprobs), 0.0)
    return {
        "policy/behaviour_gap_max": Max(jnp.max(gap)),
        "policy/behaviour_gap_mean": WeightedMean(jnp.sum(gap), jnp.sum(batch.loss_mask, dtype=jnp.float32)),
    }
