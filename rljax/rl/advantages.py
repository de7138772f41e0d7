"""What a completion's reward says relative to its group.

Letters: P prompts, G completions of each, r rewards [P, G], l completion lengths [P, G] in tokens.
"""

from collections.abc import Callable

import numpy as np


def _spread(rewards: np.ndarray) -> np.ndarray:
    """[P, 1] bool: not all rewards of the group are equal."""
    return rewards.max(axis=1, keepdims=True) > rewards.min(axis=1, keepdims=True)


def has_spread(rewards: np.ndarray) -> np.ndarray:
    """[P] bool: which groups teach something, because not all of their rewards are equal."""
    return _spread(rewards)[:, 0]


def groups_to_train_on(rewards: np.ndarray, count: int) -> np.ndarray:
    """Ascending places [count] of the first groups with a spread in rewards [P, G], P >= count (DAPO).

    Where there are too few, the first groups without a spread fill up.
    """
    spread = has_spread(rewards)
    kept = np.flatnonzero(spread)[:count]
    return np.sort(np.concatenate([kept, np.flatnonzero(~spread)[: count - len(kept)]]))


def _minus(rewards: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """r - baseline; exactly 0 where all rewards of a group are equal, whatever the baseline rounds to."""
    return np.where(_spread(rewards), rewards - baseline, 0.0)


def _centred(rewards: np.ndarray) -> np.ndarray:
    return _minus(rewards, rewards.mean(axis=1, keepdims=True))


def grpo(rewards: np.ndarray, lengths: np.ndarray, eps: float) -> np.ndarray:
    """(r - mean) / (std + eps) of the group, std with ddof 1 as torch's (the paper; arXiv:2402.03300 4.1.2)."""
    return _centred(rewards) / (rewards.std(axis=1, ddof=1, keepdims=True) + eps)


def dr_grpo(rewards: np.ndarray, lengths: np.ndarray, eps: float) -> np.ndarray:
    """r - mean of the group (Dr.GRPO, arXiv:2503.20783)."""
    return _centred(rewards)


def batch_std(rewards: np.ndarray, lengths: np.ndarray, eps: float) -> np.ndarray:
    """(r - mean of the group) / (std + eps) of all rewards, ddof 1 (Lite PPO, arXiv:2508.08221; TRL's "batch")."""
    return _centred(rewards) / (rewards.std(ddof=1) + eps)


def rloo(rewards: np.ndarray, lengths: np.ndarray, eps: float) -> np.ndarray:
    """r - mean of the others of the group = G / (G - 1) (r - mean) (RLOO, arXiv:2402.14740)."""
    group = rewards.shape[1]
    return _centred(rewards) * (group / (group - 1))


def reinforce_pp(rewards: np.ndarray, lengths: np.ndarray, eps: float) -> np.ndarray:
    """(r - mean) / (std + eps) over all tokens of all completions, ddof 1 (REINFORCE++, arXiv:2501.03262).

    Every token of a completion has its reward as return (no discount, KL in the loss); there is no group baseline, so a
    group of equal rewards keeps an advantage unless all of the batch are equal.
    """
    tokens = lengths.sum()
    mean = (rewards * lengths).sum() / tokens
    variance = ((rewards - mean) ** 2 * lengths).sum() / max(tokens - 1, 1)
    if rewards.max() == rewards.min():
        return np.zeros_like(rewards)
    return (rewards - mean) / (np.sqrt(variance) + eps)


def max_rl(rewards: np.ndarray, lengths: np.ndarray, eps: float) -> np.ndarray:
    """(r - mean) / mean of the group, 0 where the mean is 0 (MaxRL, for rewards from 0; prime-rl)."""
    mean = rewards.mean(axis=1, keepdims=True)
    return np.where(mean > 0, _centred(rewards) / np.where(mean > 0, mean, 1.0), 0.0)


def opo(rewards: np.ndarray, lengths: np.ndarray, eps: float) -> np.ndarray:
    """r - sum(l r) / sum(l) of the group: the baseline of least variance if gradients grow with length
    (OPO, arXiv:2505.23585)."""
    baseline = (rewards * lengths).sum(axis=1, keepdims=True) / lengths.sum(axis=1, keepdims=True)
    return _minus(rewards, baseline)


ADVANTAGES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "batch_std": batch_std,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "max_rl": max_rl,
    "opo": opo,
}


def group_advantages(
    rewards: np.ndarray,
    lengths: np.ndarray,
    name: str,
    eps: float,
    *,
    clip_low: float = 0.0,
    clip_high: float = 0.0,
) -> np.ndarray:
    """Advantages [P, G] float32 of rewards [P, G] for completions of `lengths` [P, G] tokens.

    Computed in float64. A group of equal rewards gets exactly 0 (but for `reinforce_pp`). At least -`clip_low`, at most
    `clip_high`, where those are above 0.

    Raises:
      ValueError: the group size is 1, a reward is not finite, or `max_rl` meets a negative one.
    """
    if rewards.ndim != 2 or (rewards.shape[1] < 2 and name != "reinforce_pp"):
        raise ValueError(f"rewards have shape {rewards.shape}; {name} needs [prompts, group] with a group of >= 2")
    if not np.isfinite(rewards).all():
        raise ValueError("a reward is not finite; a verifier must give a number for every completion")
    if name == "max_rl" and rewards.min() < 0:
        raise ValueError(f"a reward is {rewards.min()}; max_rl divides by the mean and needs rewards of at least 0")
    advantages = ADVANTAGES[name](rewards.astype(np.float64), lengths.astype(np.float64), eps)
    bounds = -clip_low if clip_low > 0 else -np.inf, clip_high if clip_high > 0 else np.inf
    return np.clip(advantages, *bounds).astype(np.float32)
