"""What a completion's reward says relative to its group."""

from collections.abc import Callable

import numpy as np


def _centred(rewards: np.ndarray) -> np.ndarray:
    """r - mean over the group; exactly 0 where all rewards of a group are equal, whatever the mean rounds to."""
    spread = rewards.max(axis=1, keepdims=True) > rewards.min(axis=1, keepdims=True)
    return np.where(spread, rewards - rewards.mean(axis=1, keepdims=True), 0.0)


def grpo(rewards: np.ndarray, eps: float) -> np.ndarray:
    """(r - mean) / (std + eps), std with ddof 1 as torch's (the paper; arXiv:2402.03300 4.1.2)."""
    return _centred(rewards) / (rewards.std(axis=1, ddof=1, keepdims=True) + eps)


def dr_grpo(rewards: np.ndarray, eps: float) -> np.ndarray:
    """r - mean (arXiv:2503.20783); `eps` is not used."""
    return _centred(rewards)


ADVANTAGES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {"grpo": grpo, "dr_grpo": dr_grpo}


def group_advantages(rewards: np.ndarray, name: str, eps: float) -> np.ndarray:
    """Advantages [P, G] float32 of rewards [P, G]; a group of equal rewards gets exactly 0.

    Raises:
      ValueError: the group size is 1, or a reward is not finite.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {rewards.shape}; advantages need [prompts, group] with a group of >= 2")
    if not np.isfinite(rewards).all():
        raise ValueError("a reward is not finite; a verifier must give a number for every completion")
    return ADVANTAGES[name](rewards.astype(np.float64), eps).astype(np.float32)
