"""The objective: per-token losses, summed with weights that the whole update shares.

Written for log-ratios that may be anything outside the mask: they are replaced before `exp`, since a masked infinity
still has a NaN gradient.

Letters: B rows, T positions. rho = exp(log pi - log pi_old), A the advantage, sg = stop_gradient. All are minimised.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.config import AlgorithmConfig
from rljax.metrics import Correlation, EffectiveShare, Max, Metric, Min, Spread, Sum, WeightedMean
from rljax.rl.correction import SEQUENCE_CORRECTIONS, behaviour_weights
from rljax.rl.sequences import num_sequences, sequence_ids, sequence_mean
from rljax.types import TrainBatch

MAX_LOG_RATIO = 20.0
"""|log-ratio| beyond which `exp` is not taken further (verl `core_algos.py`: 20)."""
MAX_SEQUENCE_LOG_RATIO = 10.0
"""The same for a mean over a sequence (verl `compute_policy_loss_gspo`: 10)."""
MAX_KL = 10.0
"""Clamp of the k3 estimate per token (verl `core_algos.py`: 10)."""


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """What a policy loss sees, [B, T] each; numbers outside the mask are harmless ones."""

    logprobs: jax.Array
    """log pi of the tokens drawn; 0 outside the mask."""
    old_logprobs: jax.Array
    """log pi_old, likewise."""
    log_ratio: jax.Array
    """log pi - log pi_old; 0 outside the mask."""
    ratio: jax.Array
    """rho, its logarithm clamped to MAX_LOG_RATIO."""
    behaviour_logprobs: jax.Array
    """log-probs the sampler reported; 0 outside the mask."""
    advantages: jax.Array
    mask: jax.Array
    sequences: jax.Array
    """Number of the sequence a token belongs to (`rl/sequences.py`)."""


TokenLosses = tuple[jax.Array, jax.Array, jax.Array | bool]
"""(loss, clipped, dual clipped) [B, T]: the second says where the trust region, not the advantage, decides; the third,
where of those it was the dual clip."""
PolicyLoss = Callable[[LossInputs, AlgorithmConfig], TokenLosses]


def clipped_surrogate(ratio: jax.Array, advantages: jax.Array, algorithm: AlgorithmConfig) -> TokenLosses:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)), at most -A * dual_clip for A < 0; and where a bound decided."""
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high)
    loss = jnp.maximum(plain, clipped)
    is_clipped = clipped > plain
    if algorithm.dual_clip == 0:
        return loss, is_clipped, False
    bound = -advantages * algorithm.dual_clip
    below = (advantages < 0) & (bound < loss)
    return jnp.where(below, bound, loss), is_clipped | below, below


def clip_loss(inputs: LossInputs, algorithm: AlgorithmConfig) -> TokenLosses:
    """PPO's clipped surrogate per token (arXiv:1707.06347) with dual clip (arXiv:1912.09729), as verl's
    `compute_policy_loss_vanilla`. A high bound above the low one is DAPO's clip-higher (arXiv:2503.14476); the dual
    clip is also the delta of INTELLECT-2's two-sided clip (arXiv:2505.07291)."""
    return clipped_surrogate(inputs.ratio, inputs.advantages, algorithm)


def cispo_loss(inputs: LossInputs, algorithm: AlgorithmConfig) -> TokenLosses:
    """-sg(clip(rho, 1 - low, 1 + high)) A log pi (MiniMax-M1, arXiv:2506.13585): every token keeps a gradient.

    A cap c alone, as TRL's `epsilon_high` and ScaleRL write it, is clip_low 1 and clip_high c - 1. `dual_clip` has no
    part.
    """
    bounded = jnp.clip(inputs.ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high)
    loss = -jax.lax.stop_gradient(bounded) * inputs.advantages * inputs.logprobs
    return loss, bounded != inputs.ratio, False


def gspo_loss(inputs: LossInputs, algorithm: AlgorithmConfig) -> TokenLosses:
    """The clipped surrogate of s = exp(mean over the sequence of log rho) (GSPO, arXiv:2507.18071, its token form).

    The token's ratio is sg(s) pi / sg(pi): its value is s for all tokens of a sequence, and the mean of their gradients
    is that of s. `dual_clip` applies as in `clip`.
    """
    mean = sequence_mean(inputs.log_ratio, inputs.mask, inputs.sequences)
    mean = jax.lax.stop_gradient(jnp.clip(mean, -MAX_SEQUENCE_LOG_RATIO, MAX_SEQUENCE_LOG_RATIO))
    ratio = jnp.exp(mean + inputs.logprobs - jax.lax.stop_gradient(inputs.logprobs))
    return clipped_surrogate(ratio, inputs.advantages, algorithm)


def dppo_mask_loss(inputs: LossInputs, algorithm: AlgorithmConfig) -> TokenLosses:
    """-A rho + dppo_penalty log(rho)^2, without the tokens whose probability has moved with A beyond `dppo_mask`.

    Dropped: pi - mu > dppo_mask where A > 0, pi - mu < -dppo_mask where A < 0; mu is the sampler's probability. The
    default loss of prime-rl; rho is against the sampler, hence `old_logprobs: behaviour`.
    """
    moved = jnp.exp(jax.lax.stop_gradient(inputs.logprobs)) - jnp.exp(inputs.behaviour_logprobs)
    away = jnp.where(inputs.advantages > 0, moved, -moved)
    dropped = (away > algorithm.dppo_mask) & (inputs.advantages != 0)
    policy = jnp.where(dropped, 0.0, -inputs.advantages * inputs.ratio)
    return policy + algorithm.dppo_penalty * inputs.log_ratio**2, dropped, False


LOSSES: dict[str, PolicyLoss] = {
    "clip": clip_loss,
    "cispo": cispo_loss,
    "gspo": gspo_loss,
    "dppo_mask": dppo_mask_loss,
}
LOSS_METRICS = ("policy/loss", "policy/objective")
"""Of those that `grpo_loss` returns, the parts of an update's loss: they add up over its micro-batches."""
SEQUENCE_LOSSES = {"gspo"}
"""Those in which a token's loss depends on its whole completion."""


def is_by_token(algorithm: AlgorithmConfig) -> bool:
    """Whether `grpo_loss` of a batch is the sum of those of its parts, wherever completions are cut."""
    of_sequences = algorithm.loss in SEQUENCE_LOSSES or algorithm.correction in SEQUENCE_CORRECTIONS
    return not of_sequences and algorithm.off_policy_mask == 0


def is_off_policy(inputs: LossInputs, threshold: float) -> jax.Array:
    """[B, T] bool: A < 0, and the mean of log mu - log pi over the sequence is above `threshold`.

    mu is the sampler and pi the policy as it is now, so earlier updates on the batch count as much as the sampler's
    arithmetic (DeepSeek-V3.2, arXiv:2512.02556, equation 9; TRL's `off_policy_mask_threshold`, slime's `--use-opsm`).
    """
    behind = inputs.behaviour_logprobs - jax.lax.stop_gradient(inputs.logprobs)
    mean = sequence_mean(behind, inputs.mask, inputs.sequences)
    return inputs.mask & (inputs.advantages < 0) & (mean > threshold)


# ------------------------------------------------------------------------------------------------------------------ KL


def _k1(log_ratio: jax.Array) -> jax.Array:
    return log_ratio


def _abs(log_ratio: jax.Array) -> jax.Array:
    return jnp.abs(log_ratio)


def _k2(log_ratio: jax.Array) -> jax.Array:
    return 0.5 * log_ratio**2


def _k3(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(jnp.exp(-log_ratio) - 1 + log_ratio, -MAX_KL, MAX_KL)


def _straight_through(value: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The value of an estimator with the gradient of k2, which is the reverse KL's in expectation."""

    def estimate(log_ratio: jax.Array) -> jax.Array:
        gradient = _k2(log_ratio)
        return jax.lax.stop_gradient(value(log_ratio) - gradient) + gradient

    return estimate


KL_ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "k1": _k1,
    "abs": _abs,
    "k2": _k2,
    "k3": _k3,
    "k1+": _straight_through(_k1),
    "k3+": _straight_through(_k3),
}
"""KL(policy || reference) per token from l = log policy - log reference, sampled from the policy
(joschu.net/blog/kl-approx.html). k3 = exp(-l) - 1 + l >= 0, clamped as in the paper's code.

As a loss, k1 has a gradient of mean 0, and k3 that of the other direction's KL; k2's is the one meant. The names with +
keep the first's value and take k2's gradient (verl's notation)."""


def kl_of(log_ratio: jax.Array, estimator: str) -> jax.Array:
    """The estimate per token, its log-ratio clamped to MAX_LOG_RATIO."""
    return KL_ESTIMATORS[estimator](jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


# ----------------------------------------------------------------------------------------------------------- objective


def loss_inputs(logprobs: jax.Array, batch: TrainBatch, algorithm: AlgorithmConfig) -> LossInputs:
    """Ratios of `logprobs` [B, T], of the policy.

    With `old_logprobs: current` the denominator is the policy itself: the ratio is exactly 1 and its gradient that of
    log pi, the right one when a batch is used for a single update.
    """
    logprobs = jnp.where(batch.loss_mask, logprobs, 0.0)
    old = jax.lax.stop_gradient(logprobs) if algorithm.old_logprobs == "current" else batch.old_logprobs
    old = jnp.where(batch.loss_mask, old, 0.0)
    log_ratio = logprobs - old
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        log_ratio=log_ratio,
        ratio=jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)),
        behaviour_logprobs=jnp.where(batch.loss_mask, batch.behaviour_logprobs, 0.0),
        advantages=jnp.where(batch.loss_mask, batch.advantages, 0.0),
        mask=batch.loss_mask,
        sequences=sequence_ids(batch.group, batch.completion),
    )


def grpo_loss(
    logprobs: jax.Array, entropies: jax.Array, batch: TrainBatch, algorithm: AlgorithmConfig
) -> tuple[jax.Array, dict[str, Metric]]:
    """Sum over tokens of weight * (policy loss + kl_coefficient KL - entropy_coefficient H), and metrics as sums.

    `policy/objective` is that sum, `policy/loss` its first part; those of an update's micro-batches add up.

    Args:
      logprobs, entropies: [B, T] of the policy, 0 outside `batch.loss_mask`.
    """
    inputs, mask = loss_inputs(logprobs, batch, algorithm), batch.loss_mask
    token_loss, clipped, dual_clipped = LOSSES[algorithm.loss](inputs, algorithm)
    metrics: dict[str, Metric] = {}
    if algorithm.correction != "off":
        gap = inputs.old_logprobs - inputs.behaviour_logprobs
        correction, metrics = behaviour_weights(gap, mask, inputs.sequences, algorithm)
        token_loss = token_loss * correction
    if algorithm.off_policy_mask > 0:
        dropped = is_off_policy(inputs, algorithm.off_policy_mask)
        token_loss = jnp.where(dropped, 0.0, token_loss)
        metrics["policy/off_policy_dropped_fraction"] = WeightedMean(
            num_sequences(dropped, inputs.sequences), num_sequences(mask, inputs.sequences)
        )
    policy = jnp.sum(jnp.where(mask, token_loss, 0.0) * batch.weights)
    count = jnp.sum(mask, dtype=jnp.float32)

    def share(where: jax.Array | bool) -> WeightedMean:
        return WeightedMean(jnp.sum(mask & where, dtype=jnp.float32), count)

    up = inputs.advantages > 0  # where A > 0 it is the high bound that binds, else the low one or the dual clip
    metrics |= {
        "policy/loss": Sum(policy),
        "policy/entropy": WeightedMean(jnp.sum(jnp.where(mask, entropies, 0.0)), count),
        "policy/clip_fraction": share(clipped),
        "policy/clip_high_fraction": share(clipped & up),
        "policy/clip_low_fraction": share(clipped & ~up),
        "policy/dual_clip_fraction": share(dual_clipped),
        "policy/ratio_min": Min(jnp.min(jnp.where(mask, inputs.ratio, jnp.inf))),
        "policy/ratio_max": Max(jnp.max(jnp.where(mask, inputs.ratio, 0.0))),
        "policy/old_kl": WeightedMean(-jnp.sum(inputs.log_ratio), count),
    }
    loss = policy
    if algorithm.kl_coefficient > 0 and algorithm.kl_in == "loss":
        to_reference = jnp.where(mask, inputs.logprobs - batch.reference_logprobs, 0.0)
        kl = jnp.where(mask, kl_of(to_reference, algorithm.kl_estimator), 0.0)
        if algorithm.kl_importance_weight:
            kl = kl * inputs.ratio
        metrics["policy/reference_kl"] = WeightedMean(jnp.sum(kl), count)
        loss = loss + algorithm.kl_coefficient * jnp.sum(kl * batch.weights)
    if algorithm.entropy_coefficient:
        loss = loss - algorithm.entropy_coefficient * jnp.sum(jnp.where(mask, entropies, 0.0) * batch.weights)
    return loss, metrics | {"policy/objective": Sum(loss)}


MISMATCH_BAND = 0.1
"""Tokens whose ratio of learner to sampler differs from 1 by more than this are counted as outside."""


def behaviour_gap(logprobs: jax.Array, batch: TrainBatch) -> dict[str, Metric]:
    """How far apart learner pi and sampler mu are on the sampled tokens: the health gauges. rho = pi / mu.

    `gap` is |log pi - log mu|, `probability_gap` |pi - mu| with Pearson's `correlation` of the two, `error_factor` the
    mean of max(rho, 1 / rho) (NeMo-RL's `token_mult_prob_error`), `kl` and `kl_k1` estimates of KL(mu || pi), `chi2`
    the mean of rho^2, less 1, `effective_fraction` the effective sample size of the rho, `outside_fraction` the tokens
    outside `MISMATCH_BAND`. Call it before the first update only.

    Args:
      logprobs: [..., T] of the policy, as are the fields of `batch`.
    """
    return _behaviour_gap(logprobs, batch.behaviour_logprobs, batch.loss_mask)


@jax.jit
def _behaviour_gap(logprobs: jax.Array, behaviour_logprobs: jax.Array, mask: jax.Array) -> dict[str, Metric]:
    learner, sampler = (jnp.where(mask, x, 0.0) for x in (logprobs, behaviour_logprobs))
    count = jnp.sum(mask, dtype=jnp.float32)
    gap = sampler - learner
    log_ratio = jnp.clip(-gap, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.where(mask, jnp.exp(log_ratio), 0.0)
    pi, mu = (jnp.where(mask, jnp.exp(x), 0.0) for x in (learner, sampler))
    apart = jnp.abs(jnp.expm1(learner) - jnp.expm1(sampler))  # less 1 each: near 1 float32 would round them to 1e-7
    total, squares = jnp.sum(ratio), jnp.sum(ratio**2)

    def mean(values: jax.Array) -> WeightedMean:
        return WeightedMean(jnp.sum(values, dtype=jnp.float32), count)

    gauges = {
        "kl": mean(kl_of(gap, "k3")),
        "kl_k1": mean(gap),
        "gap_max": Max(jnp.max(jnp.abs(gap))),
        "gap_mean": mean(jnp.abs(gap)),
        "probability_gap_max": Max(jnp.max(apart)),
        "probability_gap_mean": mean(apart),
        "probability_gap_std": Spread(jnp.sum(apart), jnp.sum(apart**2), count),
        "correlation": Correlation(jnp.sum(pi), jnp.sum(mu), jnp.sum(pi**2), jnp.sum(mu**2), jnp.sum(pi * mu), count),
        "error_factor": mean(jnp.where(mask, jnp.exp(jnp.abs(log_ratio)), 0.0)),
        "ratio_mean": WeightedMean(total, count),
        "ratio_min": Min(jnp.min(jnp.where(mask, ratio, jnp.inf))),
        "ratio_max": Max(jnp.max(ratio)),
        "chi2": mean(jnp.expm1(2 * log_ratio)),
        "effective_fraction": EffectiveShare(total, squares, count),
        "outside_fraction": mean(mask & (jnp.abs(jnp.expm1(log_ratio)) > MISMATCH_BAND)),
    }
    return {f"policy/behaviour_{name}": metric for name, metric in gauges.items()}
