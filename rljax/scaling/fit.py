"""Bounded least squares of a law on curves: deterministic, analytic derivatives, the paper's weighting by default.

What is minimised is the weighted squared error in L itself, not in log L: so does the analysis code of arXiv
2509.25300, and the numbers of its Table 6 come out. A free scale per curve is projected out: see `forms`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rljax.config import ConfigError
from rljax.scaling.curves import Curve
from rljax.scaling.forms import Form, Parameter, Parts, Points

RESOURCES = ("flops", "samples", "tokens", "step")

WEIGHTS = {
    "size": lambda loss, counts: 1.0 / counts,
    "point": lambda loss, counts: np.ones_like(loss),
    "relative": lambda loss, counts: 1.0 / np.maximum(loss, 1e-3) ** 2,
    "binomial": lambda loss, counts: 1.0 / np.clip(loss * (1 - loss), 1e-3, None),
}
"""Weight of a point, from its loss and the number of points of its curve. `size`, the paper's: every curve the same in
all; `point`: every point the same; `relative`: the error as a share of L, log L's to first order; `binomial`: the
inverse variance of a pass rate over a fixed number of problems."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Points to fit."""

    points: Points
    loss: np.ndarray  # [n]
    weight: np.ndarray  # [n], mean 1
    runs: tuple[np.ndarray, ...]  # of each curve [R, its points], the loss of each run, NaN where not evaluated

    @property
    def num_curves(self) -> int:
        return len(self.points.size)

    def with_loss(self, loss: np.ndarray) -> "Data":
        return dataclasses.replace(self, loss=loss)


@dataclasses.dataclass(frozen=True)
class Solution:
    """A law that was fitted."""

    form: Form
    size: np.ndarray  # [m] N of each curve
    theta: np.ndarray  # [p] as searched
    scale: np.ndarray  # [m], ones where the form has no scale
    cost: float
    """Weighted mean squared error."""
    at_bound: tuple[str, ...]
    """Searched parameters that ended on a bound."""

    def predict(self, log_x: np.ndarray, curve: np.ndarray) -> np.ndarray:
        """L [n] at log10 X [n] on curves [n] of those fitted."""
        return loss_of(self.form.evaluate(self.theta, Points(log_x, curve, self.size)), self.scale, curve)


def loss_of(parts: Parts, scale: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """L [n] of a law, given the free scale [m] of each curve."""
    return parts.offset if parts.basis is None else parts.offset + scale[curve] * parts.basis


def collect(curves: Sequence[Curve], x: str, weighting: str = "size") -> Data:
    """The points of `curves` that have an X above 0.

    Args:
      x: one of `RESOURCES`.
      weighting: one of `WEIGHTS`.

    Raises:
      ConfigError: a curve has no point with such an X.
    """
    log_x, loss, curve, runs = [], [], [], []
    for i, one in enumerate(curves):
        there = np.isfinite(one.x[x]) & (one.x[x] > 0)
        if not there.any():
            raise ConfigError(
                f"the curve of {one.key:g} has {len(one)} points and none with {x} above 0; choose another --x of "
                f"{', '.join(RESOURCES)}, or give a table with that column filled"
            )
        log_x.append(np.log10(one.x[x][there]))
        loss.append(one.loss[there])
        curve.append(np.full(there.sum(), i))
        runs.append(one.runs[:, there])
    index, losses = np.concatenate(curve), np.concatenate(loss)
    weight = WEIGHTS[weighting](losses, np.bincount(index)[index].astype(float))
    points = Points(np.concatenate(log_x), index, np.array([one.key for one in curves], float))
    return Data(points, losses, weight / weight.mean(), tuple(runs))


# -------------------------------------------------------------------------------------------------------------- search


def layout(form: Form, num_curves: int) -> list[tuple[Parameter, int | None]]:
    """The searched parameters in their order: (parameter, curve it belongs to or None)."""
    shared: list[tuple[Parameter, int | None]] = [(parameter, None) for parameter in form.shared]
    return shared + [(parameter, i) for parameter in form.own for i in range(num_curves)]


def solve(data: Data, form: Form, *, start: np.ndarray | None = None) -> Solution:
    """The least-squares law.

    Args:
      start: searched parameters to begin from; without it, the form's own starts are compared and the best three run.

    Raises:
      ConfigError: fewer curves or points than the form needs.
    """
    from scipy.optimize import least_squares  # 0.2 s, which --help need not pay

    _require_enough(data, form)
    places = layout(form, data.num_curves)
    bounds = np.array([parameter.bounds(data.points) for parameter, _ in places])
    low, high = bounds.T
    problem = _Problem(data, form)
    starts = [start] if start is not None else _starts(problem, form, low, high)
    exact = 1e-12 if start is None else 1e-8  # a draw is one of a thousand
    best: Any = None
    for theta in starts:
        inside = np.clip(theta, low + 1e-9 * (high - low), high - 1e-9 * (high - low))
        found = least_squares(
            problem.residuals,
            inside,
            problem.jacobian,  # pyright: ignore[reportArgumentType]  # a function is documented, the stub lags
            bounds=(low, high),
            x_scale="jac",
            ftol=exact,
            xtol=exact,
            gtol=exact,
            max_nfev=500,
        )
        if best is None or found.cost < best.cost * (1 - 1e-9):
            best = found
    near = (best.x - low < 1e-4 * (high - low)) | (high - best.x < 1e-4 * (high - low))
    names = dict.fromkeys(parameter.name for (parameter, _), touches in zip(places, near, strict=True) if touches)
    _, scale = problem.evaluate(best.x)
    return Solution(form, data.points.size, best.x, scale, 2 * float(best.cost) / len(data.loss), tuple(names))


def _require_enough(data: Data, form: Form) -> None:
    if data.num_curves < form.min_curves:
        raise ConfigError(
            f"{data.num_curves} size(s) were given and the law {form.formula} needs {form.min_curves} or more; give "
            "more sizes, or fit --form loglinear, a line per size"
        )
    counts = np.bincount(data.points.curve, minlength=data.num_curves)
    needed = form.own_count() + 1
    if counts.min() < needed:
        raise ConfigError(
            f"the curve of {data.points.size[counts.argmin()]:g} has {counts.min()} point(s) and the law "
            f"{form.formula} needs {needed} or more of each; leave the curve out, clip less, or evaluate more often"
        )
    if len(data.loss) <= form.count(data.num_curves):
        raise ConfigError(
            f"{len(data.loss)} points were given and the law {form.formula} has {form.count(data.num_curves)} free "
            "parameters here; give longer curves"
        )


class _Problem:
    """Weighted residuals and their derivatives, scales projected out; remembers the last point evaluated."""

    def __init__(self, data: Data, form: Form) -> None:
        self._data, self._form = data, form
        self._root = np.sqrt(data.weight)
        self._last: tuple[np.ndarray, Parts, np.ndarray] | None = None

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """[n] -> [m], the weighted sum over each curve."""
        data = self._data
        return np.bincount(data.points.curve, data.weight * values, data.num_curves)

    def evaluate(self, theta: np.ndarray) -> tuple[Parts, np.ndarray]:
        """The law, and the best scale of each curve [m]."""
        if self._last is None or not np.array_equal(self._last[0], theta):
            with np.errstate(over="ignore"):  # far from the optimum an exponent may leave float64; the step is refused
                parts = self._form.evaluate(theta, self._data.points)
            scale = np.ones(self._data.num_curves)
            if parts.basis is not None:
                scale = self._sum(parts.basis * (self._data.loss - parts.offset)) / self._sum(parts.basis**2)
            self._last = theta.copy(), parts, scale
        return self._last[1:]

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        parts, scale = self.evaluate(theta)
        with np.errstate(over="ignore"):
            residual = self._root * (loss_of(parts, scale, self._data.points.curve) - self._data.loss)
        return np.clip(np.nan_to_num(residual, nan=1e6), -1e6, 1e6)

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """[n, p], with the derivative of the projected scale."""
        parts, scale = self.evaluate(theta)
        derivative = parts.d_offset
        if parts.basis is not None and parts.d_basis is not None:
            curve = self._data.points.curve
            wanted, norm = self._data.loss - parts.offset, self._sum(parts.basis**2)
            d_scale = np.stack(
                [
                    (self._sum(db * (wanted - 2 * scale[curve] * parts.basis)) - self._sum(parts.basis * do)) / norm
                    for db, do in zip(parts.d_basis, parts.d_offset, strict=True)
                ]
            )  # [p, m]
            derivative = derivative + scale[curve] * parts.d_basis + d_scale[:, curve] * parts.basis
        return np.clip(np.nan_to_num(self._root * derivative), -1e9, 1e9).T

    def cost(self, theta: np.ndarray) -> float:
        return float(np.sum(self.residuals(theta) ** 2))


def _starts(problem: _Problem, form: Form, low: np.ndarray, high: np.ndarray) -> list[np.ndarray]:
    """The best three of all combinations of the form's starts; a curve's own parameters start alike in all curves."""
    points, m = problem._data.points, problem._data.num_curves
    names = [*form.shared, *form.own]
    grid = np.stack(np.meshgrid(*(parameter.starts(points) for parameter in names), indexing="ij"), -1)
    combinations = grid.reshape(-1, len(names))
    repeats = [1] * len(form.shared) + [m] * len(form.own)
    starts = [np.clip(np.repeat(combination, repeats), low, high) for combination in combinations]
    return sorted(starts, key=problem.cost)[:3]


# -------------------------------------------------------------------------------------------------------------- scores


def r_squared(loss: np.ndarray, predicted: np.ndarray) -> float:
    """1 - SS_res / SS_tot in L, every point the same; NaN where the losses are all equal."""
    total = float(np.sum((loss - loss.mean()) ** 2))
    return 1 - float(np.sum((loss - predicted) ** 2)) / total if total > 0 else math.nan


def rmse(loss: np.ndarray, predicted: np.ndarray) -> float:
    """Root mean squared error, in L."""
    return float(np.sqrt(np.mean((loss - predicted) ** 2)))


def constant_baseline(data: Data) -> float:
    """R² of a constant per curve, that is of no learning at all: what any law must beat."""
    curve = data.points.curve
    means = np.bincount(curve, data.loss) / np.bincount(curve)
    return r_squared(data.loss, means[curve])


def aicc(loss: np.ndarray, predicted: np.ndarray, num_parameters: int) -> float:
    """Akaike's criterion with the small-sample correction, for errors of one variance; lower is better.

    n ln(RSS/n) + 2p + 2p(p+1)/(n-p-1), the variance counted in p; infinite where n <= p + 1. Source: Hurvich and Tsai
    1989.
    """
    n, p = len(loss), num_parameters + 1
    if n <= p + 1:
        return math.inf
    squares = max(float(np.sum((loss - predicted) ** 2)), 1e-300)
    return n * math.log(squares / n) + 2 * p + 2 * p * (p + 1) / (n - p - 1)


def parameters_of(solution: Solution) -> dict[str, Any]:
    """Names to values in their own units; of a curve's own parameters, one value by size: `{"e": {"5e8": ...}}`."""
    found: dict[str, Any] = {}
    for (parameter, curve), value in zip(layout(solution.form, len(solution.size)), solution.theta, strict=True):
        plain = float(10.0**value if parameter.log else value)
        if curve is None:
            found[parameter.name] = plain
        else:
            found.setdefault(parameter.name, {})[size_name(solution.size[curve])] = plain
    if solution.form.scale:
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.log10(solution.scale) if solution.form.scale == "e" else solution.scale
        found[solution.form.scale] = {size_name(n): float(v) for n, v in zip(solution.size, scale, strict=True)}
    return found


def size_name(size: float) -> str:
    """A size as a key of fit.json: its digits."""
    return f"{size:.12g}"
