"""Where a run will end, from its evaluations so far.

log L is taken to be a line in log step plus a deviation that bends it (integrated Brownian motion in log step: the
slope wanders) plus noise. How much it bends is not known: the forecast averages over bends by how well each explains
the points so far, noise and line integrated out, so that few points give wide intervals and smooth curves narrow ones.
With no bend it is the regression line of arXiv 2509.25300 with its prediction interval; in between, a smoothing spline
with its own. Source of the method: Wahba 1978; Rasmussen and Williams 2006, chapters 2.7 and 6.3.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rljax.config import ConfigError
from rljax.scaling.runs import read_curve

MIN_POINTS = 4
"""Two for the line, and two for the noise."""
MAX_POINTS = 200
"""More are averaged into as many neighbourhoods: the work grows with the cube."""
BENDS = 10.0 ** np.arange(-3.0, 4.5, 0.5)
"""Variance of the bend over the span seen, in variances of the noise."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A test loss to come."""

    loss: float
    """Median."""
    low: float
    high: float
    """Between these the evaluation falls with the probability asked for, its own noise included."""


def forecast(
    step: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, at: float, *, level: float = 0.95
) -> Forecast:
    """The test loss that an evaluation at step `at` will show.

    Args:
      step: [n] steps so far (or prompts, or FLOPs: any X that `at` is given in), ascending, above 0.
      loss: [n] test loss at each; one that is 0 counts as half the least above 0.
      at: beyond the last of `step`, or equal to it.
      level: probability of the interval.

    Raises:
      ConfigError: fewer than `MIN_POINTS` points, or steps that do not ascend from above 0.
    """
    steps, losses = np.asarray(step, float), np.asarray(loss, float)
    if len(steps) < MIN_POINTS:
        raise ConfigError(f"{len(steps)} evaluation(s) were given; a forecast takes {MIN_POINTS} or more after step 0")
    if steps[0] <= 0 or np.any(np.diff(steps) <= 0) or at < steps[-1]:
        raise ConfigError(
            f"steps from {steps[0]:g} to {steps[-1]:g} were given to forecast step {at:g}; they must be above 0 and "
            "ascend to it"
        )
    positive = losses[losses > 0]
    if not len(positive):
        return Forecast(0.0, 0.0, 1.0)  # nothing was ever wrong: no noise to learn from
    y = np.log(np.maximum(losses, positive.min() / 2))
    u, y, noise = _thinned(np.log(steps), y)
    means, spreads, weights = _posterior((u - u[0]) / (u[-1] - u[0]), y, noise, (math.log(at) - u[0]) / (u[-1] - u[0]))
    quantiles = [_quantile(p, means, spreads, weights, len(y) - 2) for p in (0.5, (1 - level) / 2, (1 + level) / 2)]
    middle, low, high = (min(math.exp(min(q, 0.0)), 1.0) for q in quantiles)  # a loss is at most 1
    return Forecast(middle, low, high)


def _thinned(u: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most MAX_POINTS means of neighbours, and the noise variance of each in variances of one point."""
    parts = np.array_split(np.arange(len(u)), min(len(u), MAX_POINTS))
    counts = np.array([len(part) for part in parts])
    return np.array([u[p].mean() for p in parts]), np.array([y[p].mean() for p in parts]), 1.0 / counts


def _bending(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Covariance of integrated Brownian motion between times a [n] and b [m]: s² (3t - s) / 6, s the earlier."""
    s, t = np.minimum.outer(a, b), np.maximum.outer(a, b)
    return s * s * (3 * t - s) / 6


def _posterior(u: np.ndarray, y: np.ndarray, noise: np.ndarray, at: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, spread and weight of the forecast for each of BENDS: Student's t of n - 2 degrees each."""
    n = len(y)
    line, line_at = np.stack([np.ones(n), u], axis=1), np.array([1.0, at])
    bend, bend_at = _bending(u, u), _bending(u, np.array([at]))[:, 0]
    bend_far = float(_bending(np.array([at]), np.array([at]))[0, 0])
    means, spreads, logs = [], [], []
    for q in BENDS:
        root = np.linalg.cholesky(q * bend + np.diag(noise))
        white = np.linalg.solve(root, np.column_stack([line, y, q * bend_at]))
        h, z, k = white[:, :2], white[:, 2], white[:, 3]
        normal = h.T @ h
        line_fit = np.linalg.solve(normal, h.T @ z)
        rest = z - h @ line_fit
        squares = max(float(rest @ rest), 1e-12)
        gap = line_at - h.T @ k
        variance = q * bend_far + 1.0 - k @ k + gap @ np.linalg.solve(normal, gap)
        means.append(line_at @ line_fit + k @ rest)
        spreads.append(math.sqrt(squares / (n - 2) * max(float(variance), 0.0)))
        # Marginal likelihood, with flat priors on the line and on the logarithm of the noise.
        logs.append(-np.log(np.diag(root)).sum() - 0.5 * np.linalg.slogdet(normal)[1] - (n - 2) / 2 * math.log(squares))
    weights = np.exp(np.array(logs) - max(logs))
    return np.array(means), np.array(spreads), weights / weights.sum()


def _quantile(p: float, means: np.ndarray, spreads: np.ndarray, weights: np.ndarray, degrees: int) -> float:
    """Of a mixture of Student's t, by bisection between its parts' own quantiles."""
    from scipy.special import stdtr, stdtrit  # slow to import, and only runs that evaluate need it

    own = means + spreads * stdtrit(degrees, p)
    low, high = float(own.min()), float(own.max())
    for _ in range(60):
        middle = (low + high) / 2
        below = float(weights @ stdtr(degrees, (middle - means) / np.maximum(spreads, 1e-12)))
        low, high = (middle, high) if below < p else (low, middle)
    return (low + high) / 2


def forecast_run(run_dir: str | Path, num_steps: int) -> Forecast | None:
    """The test loss at step `num_steps` of the run in `run_dir`, from its curves.csv.

    None before `MIN_POINTS` evaluations, and where the end has been evaluated.
    """
    rows = {int(row["step"]): float(row["test_loss"]) for row in read_curve(run_dir)}
    points = {step: loss for step, loss in sorted(rows.items()) if step > 0 and math.isfinite(loss)}
    if len(points) < MIN_POINTS or max(points) >= num_steps:
        return None
    return forecast(list(points), list(points.values()), num_steps)


def forecast_metrics(run_dir: str | Path, num_steps: int) -> dict[str, float]:
    """`forecast_run` as metrics of a step; none where there is no forecast."""
    made = forecast_run(run_dir, num_steps)
    if made is None:
        return {}
    return {
        "forecast/final_test_loss": made.loss,
        "forecast/final_test_loss_low": made.low,
        "forecast/final_test_loss_high": made.high,
    }
