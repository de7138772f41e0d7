"""What is said of n scored completions of each prompt: mean@k, pass@k, maj@k, each with a standard error.

Prompts are the independent draws and completions of one prompt are not, so every estimate is a mean over prompts of one
number per prompt, and its error is the spread of these numbers: errors are clustered by prompt.

Letters: P prompts, n completions of each.
"""

import dataclasses
from collections.abc import Sequence
from math import comb, sqrt

import numpy as np

from rljax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its standard error; 0 for a single prompt, which has no spread."""

    value: float
    standard_error: float

    @classmethod
    def of(cls, per_prompt: np.ndarray) -> "Estimate":
        """Of numbers [P], one a prompt."""
        error = per_prompt.std(ddof=1) / sqrt(len(per_prompt)) if len(per_prompt) > 1 else 0.0
        return cls(float(per_prompt.mean()), float(error))


def mean_at_k(scores: np.ndarray) -> Estimate:
    """Mean score of a completion, of scores [P, n]: the expected score of one draw, from n of them."""
    return Estimate.of(scores.mean(axis=1, dtype=np.float64))


def pass_at_k(scores: np.ndarray, k: int) -> Estimate:
    """Chance that one of k completions passes, without bias, of scores [P, n] with n >= k; 1 passes, less does not.

    1 - C(n - c, k) / C(n, k) with c of n passing (arXiv:2107.03374, eq. 1).

    Raises:
      ConfigError: k is not in 1 .. n.
    """
    n = scores.shape[1]
    if not 1 <= k <= n:
        raise ConfigError(f"pass@{k} of {n} completions per prompt; k is at least 1 and at most {n}")
    passed = (scores >= 1).sum(axis=1)
    return Estimate.of(np.array([1 - comb(n - c, k) / comb(n, k) for c in passed.tolist()]))


def majority_at_k(scores: np.ndarray, answers: Sequence[Sequence[str | None]]) -> Estimate:
    """Score of the answer that most of the n completions give, of scores [P, n] and final answers [P][n].

    Answers are compared as text, spaces aside; None abstains. Among equally frequent ones the one given first counts; a
    prompt without any answer scores 0.
    """
    voted = np.zeros(len(scores))
    for place, row in enumerate(answers):
        votes: dict[str, list[int]] = {}
        for draw, answer in enumerate(row):
            if answer is not None:
                votes.setdefault("".join(answer.split()), []).append(draw)
        if votes:
            voted[place] = scores[place, max(votes.values(), key=len)[0]]  # the first of the longest: dicts keep order
    return Estimate.of(voted)


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4 ... and n itself: the k that are reported."""
    return sorted({1 << i for i in range(n.bit_length())} | {n})
