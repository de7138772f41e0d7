"""Numbers of a step, and how they merge.

A metric's type says how it merges (`WeightedMean`, `Sum`, `Max`, `Min`, ...), never its name. Names are
`area/quantity_unit`: `reward/mean`, `time/sample_seconds`.
"""

import contextlib
import dataclasses
import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np

Scalar = jax.Array | np.ndarray | float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedMean:
    """A mean kept as its two sums, so that it merges exactly: [1, 3] and [5] give 3, not 3.5."""

    total: Scalar
    """Sum of weight x value."""
    weight: Scalar

    def __add__(self, other: "WeightedMean") -> "WeightedMean":
        return WeightedMean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float:
        """total / weight, on the host; 0.0 when nothing was counted (weight 0), so that an empty part is no NaN."""
        return float(self.total) / float(self.weight) if float(self.weight) else 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
    """A count or a total."""

    amount: Scalar

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.amount + other.amount)

    def value(self) -> float:
        return float(self.amount)


class _Sums:
    """What merges by adding every field."""

    def __add__(self, other: Self) -> Self:
        return jax.tree.map(operator.add, self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spread(_Sums):
    """A standard deviation kept as its sums (ddof 1, as torch's); 0.0 of fewer than two values."""

    total: Scalar
    squares: Scalar
    count: Scalar

    def value(self) -> float:
        total, squares, count = float(self.total), float(self.squares), float(self.count)
        return math.sqrt(max(squares - total**2 / count, 0.0) / (count - 1)) if count > 1 else 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Correlation(_Sums):
    """Pearson's of x and y kept as its sums; 0.0 where one of them does not vary.

    In float32 good to 1e-6 times mean^2 / variance.
    """

    x: Scalar
    y: Scalar
    xx: Scalar
    yy: Scalar
    xy: Scalar
    count: Scalar

    def value(self) -> float:
        x, y, xx, yy, xy, count = (float(getattr(self, field.name)) for field in dataclasses.fields(self))
        if not count:
            return 0.0
        of_x, of_y = xx - x * x / count, yy - y * y / count
        if of_x <= 0 or of_y <= 0:
            return 0.0
        return max(-1.0, min((xy - x * y / count) / math.sqrt(of_x * of_y), 1.0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EffectiveShare(_Sums):
    """Effective sample size of weights w over their number, sum(w)^2 / (n sum(w^2)): 1 where all are the same."""

    total: Scalar
    squares: Scalar
    count: Scalar

    def value(self) -> float:
        divisor = float(self.count) * float(self.squares)
        return float(self.total) ** 2 / divisor if divisor else 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max:
    """The largest; a NaN anywhere stays NaN."""

    amount: Scalar

    def __add__(self, other: "Max") -> "Max":
        return Max(_library(self.amount, other.amount).maximum(self.amount, other.amount))

    def value(self) -> float:
        return float(self.amount)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Min:
    """The smallest, infinity before anything was counted; a NaN anywhere stays NaN."""

    amount: Scalar

    def __add__(self, other: "Min") -> "Min":
        return Min(_library(self.amount, other.amount).minimum(self.amount, other.amount))

    def value(self) -> float:
        """The amount, on the host; 0.0 when nothing was counted."""
        return 0.0 if float(self.amount) == math.inf else float(self.amount)


Metric = WeightedMean | Spread | Correlation | EffectiveShare | Sum | Max | Min


def _library(*amounts: Scalar) -> Any:
    """jax.numpy if any amount lives on a device or is traced, else numpy: host numbers stay on the host."""
    return jax.numpy if any(isinstance(a, jax.Array) for a in amounts) else np


def nothing_counted(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Of the shapes of `metrics`, and such that merging with it changes nothing (a `Max` is of numbers from 0)."""

    def empty(metric: Metric) -> Metric:
        fill = math.inf if isinstance(metric, Min) else 0
        return jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, fill, leaf.dtype), metric)

    return {name: empty(metric) for name, metric in metrics.items()}


def merge(a: Mapping[str, Metric], b: Mapping[str, Metric]) -> dict[str, Metric]:
    """Every metric of both; one named in both is merged by its type. Works under jit."""
    merged = dict(a)
    for name, metric in b.items():
        if name in merged:
            assert type(merged[name]) is type(metric), (
                f"{name} is a {type(merged[name])} here and a {type(metric)} there"
            )
            metric = merged[name] + metric  # pyright: ignore[reportOperatorIssue]
        merged[name] = metric
    return merged


def to_floats(metrics: Mapping[str, Metric | Scalar]) -> dict[str, float]:
    """Values as Python floats, in one transfer from the device; plain numbers pass."""
    fetched = jax.device_get(dict(metrics))
    return {name: m.value() if isinstance(m, Metric) else float(m) for name, m in fetched.items()}


class PhaseTimer:
    """Seconds spent in each phase of a step.

    `with timer("sample"): ...` adds to `time/sample_seconds`. JAX returns before the device has finished: block on the
    result inside the phase, or its time lands in the next one.

    Args:
      entered: told of every phase that begins, and of the one around it, "" at last, when it ends.
    """

    def __init__(self, entered: Callable[[str], None] = lambda phase: None) -> None:
        self._seconds: dict[str, float] = {}
        self._entered, self._inside = entered, [""]

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        self._inside.append(phase)
        self._entered(phase)
        try:
            yield
        finally:
            self._inside.pop()
            self._entered(self._inside[-1])
            name = f"time/{phase}_seconds"
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """`{"time/PHASE_seconds": seconds}` since the last call; starts over."""
        seconds, self._seconds = self._seconds, {}
        return seconds
