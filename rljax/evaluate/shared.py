"""Scored rollouts of every process's prompts, brought together on all of them."""

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rljax.hosts import exchange
from rljax.rewards.pool import Verdict
from rljax.types import Prompts, Rollouts, join_rollouts, prompt_block


@dataclasses.dataclass(frozen=True)
class Scored:
    """Rollouts with their rewards."""

    rollouts: Rollouts
    rewards: np.ndarray  # [P, G] float32
    judged: np.ndarray  # [P, G] bool: the verifier did not fail
    texts: list[str]  # row by row, as the verdicts
    verdicts: list[Verdict]
    others: list[Verdict | None]  # of the other mode of the verifier, where it was asked


def join_scored(parts: Sequence[Scored]) -> Scored:
    """Those of `parts`, one after the other."""
    return Scored(
        join_rollouts([part.rollouts for part in parts]),
        np.concatenate([part.rewards for part in parts]),
        np.concatenate([part.judged for part in parts]),
        [text for part in parts for text in part.texts],
        [verdict for part in parts for verdict in part.verdicts],
        [verdict for part in parts for verdict in part.others],
    )


def shared(own: Scored | None, prompts: Prompts) -> Scored:
    """What all processes scored, in the order of `prompts`, of which they have one block each; all call it together.

    Args:
      own: of this process's block; None where that is empty.
    """
    if jax.process_count() == 1:
        assert own is not None, "one process has all prompts"
        return own
    parts, first = [], 0
    for payload in exchange(b"" if own is None else to_bytes(own)):
        if payload:
            part = from_bytes(payload, prompts, first)
            first += len(part.rewards)
            parts.append(part)
    assert first == len(prompts), f"{first} of {len(prompts)} prompts came back"
    return join_scored(parts)


_ARRAYS = ("tokens", "lengths", "behaviour_logprobs", "stop_reasons", "kept_mass")


def to_bytes(scored: Scored) -> bytes:
    """All of `scored` but its prompts, which every process has."""
    arrays = {name: getattr(scored.rollouts, name) for name in _ARRAYS}
    said = {"texts": scored.texts, "verdicts": _plain(scored.verdicts), "others": _plain(scored.others)}
    out = io.BytesIO()
    np.savez(
        out,
        **{name: array for name, array in arrays.items() if array is not None},
        rewards=scored.rewards,
        judged=scored.judged,
        # ASCII: half a surrogate pair, which a completion may hold, has no UTF-8.
        said=np.frombuffer(json.dumps(said).encode("ascii"), np.uint8),
    )
    return out.getvalue()


def from_bytes(payload: bytes, prompts: Prompts, first: int) -> Scored:
    """What `to_bytes` was given, of the prompts from place `first` on."""
    with np.load(io.BytesIO(payload), allow_pickle=False) as file:
        arrays = dict(file)
    said, rewards = json.loads(arrays.pop("said").tobytes()), arrays.pop("rewards")
    judged = arrays.pop("judged")
    block = prompt_block(prompts, slice(first, first + len(rewards)))
    rollouts: Any = Rollouts(block, rewards.shape[1], **arrays)
    return Scored(
        rollouts,
        rewards,
        judged,
        said["texts"],
        [Verdict(**verdict) for verdict in said["verdicts"]],
        [None if verdict is None else Verdict(**verdict) for verdict in said["others"]],
    )


def _plain(verdicts: Sequence[Verdict | None]) -> list[dict[str, Any] | None]:
    return [None if verdict is None else dataclasses.asdict(verdict) for verdict in verdicts]
