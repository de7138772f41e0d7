"""What a completion's reward says relative to its group.

Letters: P prompts, G completions of each, r rewards [P, G], l completion lengths [P, G] in tokens.

`judged`, [P, G] bool or True for all, says which rewards there are. One that is missing, for its verifier failed, is in
no mean, deviation or sum, and its advantage is 0, as in TRL that of a reward of None.
"""

from collections.abc import Callable

import numpy as np

Judged = np.ndarray | bool


def _spread(rewards: np.ndarray, judged: Judged) -> np.ndarray:
    """[P, 1] bool: not all rewards of the group are equal."""
    most = rewards.max(axis=1, keepdims=True, where=judged, initial=-np.inf)
    return most > rewards.min(axis=1, keepdims=True, where=judged, initial=np.inf)


def has_spread(rewards: np.ndarray, judged: Judged = True) -> np.ndarray:
    """[P] bool: which groups teach something, because not all of their rewards are equal."""
    return _spread(rewards, judged)[:, 0]


def groups_to_train_on(rewards: np.ndarray, count: int, judged: Judged = True) -> np.ndarray:
    """Ascending places [count] of the first groups with a spread in rewards [P, G], P >= count (DAPO).

    Where there are too few, the first groups without a spread fill up.
    """
    spread = has_spread(rewards, judged)
    kept = np.flatnonzero(spread)[:count]
    return np.sort(np.concatenate([kept, np.flatnonzero(~spread)[: count - len(kept)]]))


def _minus(rewards: np.ndarray, baseline: np.ndarray, judged: Judged) -> np.ndarray:
    """r - baseline; exactly 0 where all rewards of a group are equal, whatever the baseline rounds to."""
    return np.where(_spread(rewards, judged), rewards - baseline, 0.0)


def _centred(rewards: np.ndarray, judged: Judged) -> np.ndarray:
    return _minus(rewards, rewards.mean(axis=1, keepdims=True, where=judged), judged)


def grpo(rewards: np.ndarray, lengths: np.ndarray, judged: Judged, eps: float) -> np.ndarray:
    """(r - mean) / (std + eps) of the group, std with ddof 1 as torch's (the paper; arXiv:2402.03300 4.1.2)."""
    return _centred(rewards, judged) / (rewards.std(axis=1, ddof=1, keepdims=True, where=judged) + eps)


def dr_grpo(rewards: np.ndarray, lengths: np.ndarray, judged: Judged, eps: float) -> np.ndarray:
    """r - mean of the group (Dr.GRPO, arXiv:2503.20783)."""
    return _centred(rewards, judged)


def batch_std(rewards: np.ndarray, lengths: np.ndarray, judged: Judged, eps: float) -> np.ndarray:
    """(r - mean of the group) / (std + eps) of all rewards, ddof 1 (Lite PPO, arXiv:2508.08221; TRL's "batch")."""
    return _centred(rewards, judged) / (rewards.std(ddof=1, where=judged) + eps)


def rloo(rewards: np.ndarray, lengths: np.ndarray, judged: Judged, eps: float) -> np.ndarray:
    """r - mean of the others of the group = G / (G - 1) (r - mean) (RLOO, arXiv:2402.14740)."""
    group = np.broadcast_to(judged, rewards.shape).sum(axis=1, keepdims=True)
    return _centred(rewards, judged) * (group / (group - 1))


def reinforce_pp(rewards: np.ndarray, lengths: np.ndarray, judged: Judged, eps: float) -> np.ndarray:
    """(r - mean) / (std + eps) over all tokens of all completions, ddof 1 (REINFORCE++, arXiv:2501.03262).

    Every token of a completion has its reward as return (no discount, KL in the loss); there is no group baseline, so a
    group of equal rewards keeps an advantage unless all of the batch are equal.
    """
    tokens = lengths.sum(where=judged)
    mean = (rewards * lengths).sum(where=judged) / tokens
    variance = ((rewards - mean) ** 2 * lengths).sum(where=judged) / max(tokens - 1, 1)
    if rewards.max(where=judged, initial=-np.inf) == rewards.min(where=judged, initial=np.inf):
        return np.zeros_like(rewards)
    return (rewards - mean) / (np.sqrt(variance) + eps)


def max_rl(rewards: np.ndarray, lengths: np.ndarray, judged: Judged, eps: float) -> np.ndarray:
    """(r - mean) / mean of the group, 0 where the mean is 0 (MaxRL, for rewards from 0; prime-rl)."""
    mean = rewards.mean(axis=1, keepdims=True, where=judged)
    return np.where(mean > 0, _centred(rewards, judged) / np.where(mean > 0, mean, 1.0), 0.0)


def opo(rewards: np.ndarray, lengths: np.ndarray, judged: Judged, eps: float) -> np.ndarray:
    """r - sum(l r) / sum(l) of the group: the baseline of least variance if gradients grow with length
    (OPO, arXiv:2505.23585)."""
    total = (rewards * lengths).sum(axis=1, keepdims=True, where=judged)
    return _minus(rewards, total / lengths.sum(axis=1, keepdims=True, where=judged), judged)


ADVANTAGES: dict[str, Callable[[np.ndarray, np.ndarray, Judged, float], np.ndarray]] = {
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
    judged: np.ndarray | None = None,
) -> np.ndarray:
    """Advantages [P, G] float32 of rewards [P, G] for completions of `lengths` [P, G] tokens.

    Computed in float64. A group of equal rewards gets exactly 0 (but for `reinforce_pp`), and so does one of fewer than
    two that are judged, which has no part in the rest either. At least -`clip_low`, at most `clip_high`, where those
    are above 0.

    Args:
      judged: [P, G] bool: the rewards there are; the others may be any number. None: all.

    Raises:
      ValueError: the group size is 1, a judged reward is not finite, or `max_rl` meets a negative one.
    """
    if rewards.ndim != 2 or (rewards.shape[1] < 2 and name != "reinforce_pp"):
        raise ValueError(f"rewards have shape {rewards.shape}; {name} needs [prompts, group] with a group of >= 2")
    there = np.ones(rewards.shape, bool) if judged is None else judged
    given = rewards[there]
    if not np.isfinite(given).all():
        raise ValueError("a reward is not finite; a verifier must give a number for every completion")
    if name == "max_rl" and given.min(initial=0) < 0:
        raise ValueError(f"a reward is {given.min()}; max_rl divides by the mean and needs rewards of at least 0")
    groups = there.sum(axis=1) >= (1 if name == "reinforce_pp" else 2)
    advantages = np.zeros(rewards.shape)
    if groups.any():
        kept = there[groups]
        advantages[groups] = ADVANTAGES[name](
            np.where(kept, rewards[groups], 0.0).astype(np.float64),
            lengths[groups].astype(np.float64),
            True if kept.all() else kept,  # a mask changes NumPy's order of adding, and so the last bits
            eps,
        )
    advantages[~there] = 0.0
    bounds = -clip_low if clip_low > 0 else -np.inf, clip_high if clip_high > 0 else np.inf
    return np.clip(advantages, *bounds).astype(np.float32)
