"""The records that cross files. Read these, and the rest of the project is functions between them.

Letters: P prompts, G group size, B = P*G completions, S prompt slots, R completion slots, T learner positions.
Every `[B, T]` array is token-aligned: index t is about `tokens[:, t]`. The one shift is in `models/scoring.py`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """One problem, in the words of the verl schema."""

    prompt: tuple[dict[str, str], ...]
    """Chat messages: `{"role": ..., "content": ...}`."""
    data_source: str
    """Names the verifier."""
    ground_truth: str
    """What the verifier compares with."""
    solution: str = ""
    """A full worked answer for supervised fine-tuning; empty when the file has none."""
    extra_info: dict[str, Any] = dataclasses.field(default_factory=dict)
    """index, split, pass rates, ...: JSON-able."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of one step, on the host."""

    tokens: np.ndarray  # [P, S] int32, right-padded
    lengths: np.ndarray  # [P] int32, >= 1
    positions: np.ndarray  # [P] int64, place in the run's stream of prompts; seeds the draws
    records: tuple[PromptRecord, ...]  # P of them

    def __len__(self) -> int:
        return len(self.records)


STOP, LENGTH = 0, 1
"""Stop reasons: a stop token or a stop string was sampled; the completion reached the cap."""

STOP_REASONS = {STOP: "stop", LENGTH: "length"}
"""As files have them."""


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Completions of P prompts, G each, on the host; row p * G + g is completion g of prompt p.

    Example, R = 4, stop id 9: the tokens sampled were [5, 9] and [7, 7, 7, 7]:
      tokens [[5, 9, 0, 0], [7, 7, 7, 7]]   lengths [2, 4]   stop_reasons [STOP, LENGTH]
    """

    prompts: Prompts
    group_size: int
    tokens: np.ndarray  # [B, R] int32, stop token included, 0 after `lengths`
    lengths: np.ndarray  # [B] int32, 1..R
    behaviour_logprobs: np.ndarray  # [B, R] float32 of the distribution sampled; 0 after `lengths`
    stop_reasons: np.ndarray  # [B] int8, STOP or LENGTH
    kept_mass: np.ndarray | None = None
    """[B, R] float32, share of the full distribution that truncation left: log p_full = log p + log(kept_mass); 1 after
    `lengths`. None: nothing was cut."""


def prompt_block(prompts: Prompts, block: slice) -> Prompts:
    """The prompts of `block`, perhaps none."""
    return Prompts(prompts.tokens[block], prompts.lengths[block], prompts.positions[block], prompts.records[block])


def prompts_at(prompts: Prompts, places: np.ndarray) -> Prompts:
    """The prompts at `places`, perhaps none, copied."""
    return Prompts(
        tokens=prompts.tokens[places],
        lengths=prompts.lengths[places],
        positions=prompts.positions[places],
        records=tuple(prompts.records[place] for place in places),
    )


def select_prompts(rollouts: Rollouts, places: Sequence[int] | np.ndarray) -> Rollouts:
    """The rollouts of the prompts at `places`, copied."""
    places = np.asarray(places)
    rows = (places[:, None] * rollouts.group_size + np.arange(rollouts.group_size)).reshape(-1)
    return Rollouts(
        prompts=prompts_at(rollouts.prompts, places),
        group_size=rollouts.group_size,
        tokens=rollouts.tokens[rows],
        lengths=rollouts.lengths[rows],
        behaviour_logprobs=rollouts.behaviour_logprobs[rows],
        stop_reasons=rollouts.stop_reasons[rows],
        kept_mass=None if rollouts.kept_mass is None else rollouts.kept_mass[rows],
    )


def join_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """The prompts of `parts` and their completions, one part after the other; all of one group size, S and R."""
    prompts = Prompts(
        tokens=np.concatenate([part.prompts.tokens for part in parts]),
        lengths=np.concatenate([part.prompts.lengths for part in parts]),
        positions=np.concatenate([part.prompts.positions for part in parts]),
        records=tuple(record for part in parts for record in part.prompts.records),
    )
    masses = [part.kept_mass for part in parts if part.kept_mass is not None]
    assert len({part.group_size for part in parts}) == 1 and len(masses) in (0, len(parts)), "of one kind"
    return Rollouts(
        prompts=prompts,
        group_size=parts[0].group_size,
        tokens=np.concatenate([part.tokens for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        behaviour_logprobs=np.concatenate([part.behaviour_logprobs for part in parts]),
        stop_reasons=np.concatenate([part.stop_reasons for part in parts]),
        kept_mass=np.concatenate(masses) if masses else None,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Token-aligned rows the learner trains on. A row may hold several sequences (`group`)."""

    tokens: jax.Array  # [B, T] int32
    positions: jax.Array  # [B, T] int32, rotary position within the sequence
    group: jax.Array  # [B, T] int32, which prompt of the row; -1 is padding
    completion: jax.Array  # [B, T] int32, 0 on the prompt, k >= 1 on its k-th completion
    source: jax.Array  # [B, T] int32, position whose hidden state predicts the token; 0 outside the loss mask
    loss_mask: jax.Array  # [B, T] bool, True on completion tokens, the stop token included
    advantages: jax.Array  # [B, T] float32
    weights: jax.Array  # [B, T] float32, the aggregation's weight of each token in the update's loss
    old_logprobs: jax.Array  # [B, T] float32, denominator of the ratio
    behaviour_logprobs: jax.Array  # [B, T] float32, what the sampler reported
    reference_logprobs: jax.Array  # [B, T] float32, frozen starting model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes."""

    params: Any  # learner layout, float32 masters
    opt_state: Any
    updates: jax.Array  # [] int32, optimizer updates attempted
    skipped: jax.Array  # [] int32, of those, skipped: of no token, or not finite
