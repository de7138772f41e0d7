"""Which record each place of a run's stream of prompts uses: unique samples against repeats, nothing else.

A run consumes positions 0, 1, 2, ...: `unique` records, each `repeats` (tau) times, epoch after epoch. The map from
position to record is a pure function, so resuming is counting, and every host computes the same.
No JAX, no files: numbers in, numbers out.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from rljax.config import ConfigError

PAPER_POOL = 51_200
"""The paper's reuse sets are drawn from the first 51,200 rows of its easy-to-hard file: 100 steps of 512."""
PAPER_EASY = 0.3
"""Pass rate from which the paper calls a problem easy."""
PAPER_SEEDS = (42, 43)
"""What the paper's code draws easy and hard problems with, for its reuse sets and for its holdout alike."""
PAPER_TAUS = (2, 4, 5, 10, 20, 25, 50, 100)
"""The paper's reuse sets: 51,200 / tau unique problems."""


@dataclasses.dataclass(frozen=True)
class ReusePlan:
    """The index map of a run; made by `make_plan`.

    Example, chosen (0, 2, 5), repeats 2, order "file": positions 0..5 use records 0, 2, 5, 0, 2, 5.
    """

    num_records: int
    chosen: tuple[int, ...]
    """Indices of the unique records, in the order of an epoch (before the shuffle of each epoch, if there is one)."""
    repeats: int
    order: Literal["file", "curriculum", "reverse", "shuffle", "shuffle_once"]
    subset: Literal["first", "paper", "independent", "difficulty_matched"]
    seed: int

    @property
    def unique(self) -> int:
        return len(self.chosen)

    @property
    def total(self) -> int:
        """Prompts of the run: unique x repeats."""
        return self.unique * self.repeats

    def epoch(self, position: int) -> int:
        """How many times the whole set was used before this position."""
        assert 0 <= position < self.total, f"position {position} is outside the run's {self.total} prompts"
        return position // self.unique

    def record_index(self, position: int) -> int:
        """Index of the record used at a position in [0, unique * repeats)."""
        epoch, place = self.epoch(position), position % self.unique
        if self.order == "shuffle":
            place = int(_permutation(self.unique, self.seed, _EPOCH, epoch)[place])
        return self.chosen[place]

    def exposures(self, served: int) -> np.ndarray:
        """[unique] int64: how often each record of `chosen` is used at the positions 0 .. served - 1."""
        assert 0 <= served <= self.total, f"{served} prompts are more than the run's {self.total}"
        epochs, rest = divmod(served, self.unique)
        places = np.arange(self.unique)
        if self.order == "shuffle" and rest:
            places = _permutation(self.unique, self.seed, _EPOCH, epochs)
        uses = np.full(self.unique, epochs, np.int64)
        uses[places[:rest]] += 1
        return uses

    def describe(self, prompts_per_step: int, steps: int) -> str:
        """One line: "512 unique x tau 100 = 51,200 prompts = 100 steps x 512"."""
        left = self.total - steps * prompts_per_step
        return (
            f"{self.unique:,} unique x tau {self.repeats:,} = {self.total:,} prompts = {steps:,} steps x "
            f"{prompts_per_step:,}" + (f", {left:,} prompts left unused" if left else "")
        )


def needs_difficulties(order: str, subset: str) -> bool:
    """Whether `make_plan` must be given the records' pass rates."""
    return order in ("curriculum", "reverse") or subset in ("paper", "difficulty_matched")


def make_plan(
    num_records: int,
    *,
    unique: int = 0,
    repeats: int = 1,
    order: str = "file",
    subset: str = "first",
    seed: int = 0,
    difficulties: Sequence[float | None] | None = None,
) -> ReusePlan:
    """The plan of a run over records 0 .. num_records - 1.

    Args:
      unique: records used; 0: all that the subset rule may draw from.
      repeats: times each is used.
      order: a name in `ORDERS`. file: as read, every epoch alike (the paper). curriculum: easy to hard, ties as read,
        every epoch alike; reverse: hard to easy, the same. shuffle: a new permutation every epoch, from the seed;
        shuffle_once: one permutation, every epoch alike.
      subset: a name in `SUBSETS`. first: the first rows. paper: a share of easy and hard ones, nested (arXiv
        2509.25300's code, `sample_dataset_by_difficulty_full.py`). independent: uniform without replacement,
        unrelated for different `unique` or seed. difficulty_matched: independent within each pass rate, and each pass
        rate has its share of all records, off by less than one record.
      difficulties: pass rate of each record, 1 easiest; None counts as 0 (the paper), i.e. hardest.

    Raises:
      ConfigError: more unique records than there are; an order or subset that needs difficulties has none.
    """
    assert order in ORDERS and subset in SUBSETS, f"order {order!r}, subset {subset!r}"
    if difficulties is None and needs_difficulties(order, subset):
        raise ConfigError(
            f"data.order = {order!r} with data.subset = {subset!r} needs a pass rate for each record and there is "
            "none; set data.difficulty_field, or use order 'file', 'shuffle' or 'shuffle_once' with subset 'first' or "
            "'independent'"
        )
    rates = None if difficulties is None else np.array([0.0 if d is None else d for d in difficulties])
    assert rates is None or len(rates) == num_records, "one difficulty per record"
    pool = min(num_records, PAPER_POOL) if subset == "paper" else num_records
    unique = unique or pool
    if repeats < 1 or seed < 0:
        raise ConfigError(f"data.repeats = {repeats} must be at least 1 and data.seed = {seed} at least 0")
    if not 1 <= unique <= pool:
        raise ConfigError(
            f"data.unique = {unique} prompts cannot be taken from {pool} records (subset {subset!r}, {num_records} "
            f"kept after dropping overlong ones); use at most {pool}, or raise data.repeats to train longer"
        )
    chosen = SUBSETS[subset](pool, unique, seed, rates)
    chosen = ORDERS[order](chosen, seed, rates)
    return ReusePlan(num_records, tuple(chosen.tolist()), repeats, order, subset, seed)  # pyright: ignore[reportArgumentType]


def steps_for(plan: ReusePlan, prompts_per_step: int, steps: int = 0) -> int:
    """Steps of a run: `steps`, or with 0 as many whole steps as the plan gives (`describe` says what is left over).

    Raises:
      ConfigError: the plan has fewer prompts than asked for, or than one step takes.
    """
    wanted = max(steps, 1) * prompts_per_step
    if wanted > plan.total:
        raise ConfigError(
            f"steps = {max(steps, 1)} x data.prompts_per_step = {prompts_per_step} take {wanted} prompts, and "
            f"data.unique = {plan.unique} x data.repeats = {plan.repeats} give {plan.total}; set data.repeats to at "
            f"least {-(-wanted // plan.unique)}, or take fewer steps or prompts per step"
        )
    return steps or plan.total // prompts_per_step


# ------------------------------------------------------------------------------------------------ subsets and orders

Rates = np.ndarray | None
_EPOCH, _SUBSET, _ONCE, _MATCHED = 0, 1, 2, 3  # keep the draws of one seed apart


def paper_sample(size: int, count: int, seed: int) -> np.ndarray:
    """`count` of range(size) without replacement, in the order drawn: the rows of pandas' `df.sample(count,
    random_state=seed)` for a frame of `size` rows, which the paper's code draws with.

    pandas draws `RandomState(seed).choice(size, count, replace=False)`, and numpy's choice is the beginning of a
    permutation. That generator is frozen for good.
    """
    assert 0 <= count <= size, f"{count} of {size}"
    return np.random.RandomState(seed).permutation(size)[:count]


def _first(pool: int, unique: int, seed: int, rates: Rates) -> np.ndarray:
    return np.arange(unique)


def _paper(pool: int, unique: int, seed: int, rates: Rates) -> np.ndarray:
    """Easy and hard records in the proportion of the pool, each class a prefix of one permutation, in file order.

    The seeds are the paper's, so that its released files come out to the row; `seed` plays no part.
    """
    assert rates is not None, "difficulties are needed"
    if unique == pool:
        return np.arange(pool)
    easy, hard = np.flatnonzero(rates[:pool] >= PAPER_EASY), np.flatnonzero(rates[:pool] < PAPER_EASY)
    num_easy = int(unique * (len(easy) / pool))  # floored, in the paper's float arithmetic
    easy = easy[paper_sample(len(easy), num_easy, PAPER_SEEDS[0])]
    hard = hard[paper_sample(len(hard), unique - num_easy, PAPER_SEEDS[1])]
    return np.sort(np.concatenate([easy, hard]))


def _independent(pool: int, unique: int, seed: int, rates: Rates) -> np.ndarray:
    # `unique` is in the key: sets of two sizes are unrelated, not nested.
    return np.sort(_permutation(pool, seed, _SUBSET, unique)[:unique])


def _difficulty_matched(pool: int, unique: int, seed: int, rates: Rates) -> np.ndarray:
    """Each pass rate gets the whole part of its share of `unique`; what is left goes to the largest remainders, the
    harder rate first where two are equal."""
    assert rates is not None, "difficulties are needed"
    levels, level_of, sizes = np.unique(rates, return_inverse=True, return_counts=True)
    quotas, remainders = np.divmod(sizes * unique, pool)
    quotas[np.argsort(-remainders, kind="stable")[: unique - quotas.sum()]] += 1
    draws = [
        np.flatnonzero(level_of == level)[_permutation(int(size), seed, _MATCHED, unique, level)[:quota]]
        for level, size, quota in zip(range(len(levels)), sizes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(draws))


SUBSETS: dict[str, Callable[[int, int, int, Rates], np.ndarray]] = {
    "first": _first,
    "paper": _paper,
    "independent": _independent,
    "difficulty_matched": _difficulty_matched,
}
"""(pool, unique, seed, pass rates) -> indices in file order, by `data.subset`."""


def _as_read(chosen: np.ndarray, seed: int, rates: Rates) -> np.ndarray:
    return chosen


def _curriculum(chosen: np.ndarray, seed: int, rates: Rates) -> np.ndarray:
    assert rates is not None, "difficulties are needed"
    return chosen[np.argsort(-rates[chosen], kind="stable")]


def _reverse(chosen: np.ndarray, seed: int, rates: Rates) -> np.ndarray:
    # Ties as read, not the curriculum backwards: a set of one pass rate is then in file order under both.
    assert rates is not None, "difficulties are needed"
    return chosen[np.argsort(rates[chosen], kind="stable")]


def _shuffle_once(chosen: np.ndarray, seed: int, rates: Rates) -> np.ndarray:
    return chosen[_permutation(len(chosen), seed, _ONCE)]


ORDERS: dict[str, Callable[[np.ndarray, int, Rates], np.ndarray]] = {
    "file": _as_read,
    "curriculum": _curriculum,
    "reverse": _reverse,
    "shuffle": _as_read,  # permuted anew each epoch, by `record_index`
    "shuffle_once": _shuffle_once,
}
"""(chosen, seed, pass rates) -> chosen in the order of an epoch, by `data.order`."""


@functools.lru_cache(maxsize=4)  # a run walks epoch by epoch; a batch may straddle two
def _permutation(size: int, *key: int) -> np.ndarray:
    # MT19937 under RandomState, not default_rng: numpy promises these streams across versions, and resume needs that.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key))).permutation(size)
