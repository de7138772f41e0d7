"""Predictions put to the test: the rest of a run from its start, and the largest size from the smaller ones.

`intra`: all sizes are fitted on an early part of their curves, and the law is scored on what comes later. `inter`: all
sizes but the largest are fitted, and the law is scored on that one, in two ways. `slope_only` is the paper's: k(N)
comes from the law, and E from all points of the curve that is predicted. `strict` takes E from its first points alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rljax.config import ConfigError
from rljax.scaling.curves import Curve
from rljax.scaling.fit import Data, Solution, loss_of, r_squared, rmse
from rljax.scaling.forms import Points
from rljax.scaling.intervals import Draws, blocks_of_residuals, interval


@dataclasses.dataclass(frozen=True)
class Clip:
    """Which points of a curve are fitted."""

    first_step: int = 1
    last_step: int | None = None
    drop_first: int = 0
    """Points, counted after first_step."""
    drop_last: int = 0
    """Points, counted from the end of the curve, as the paper does: what is left differs by a point or two by size."""


PRESETS: dict[str, Clip] = {"base": Clip(drop_last=80), "instruct": Clip(first_step=4, drop_last=65)}
"""Of the paper's intra-model fits: it calls them the first 25 and 40 % of the run."""


def clipped(curve: Curve, clip: Clip) -> tuple[Curve, Curve]:
    """(the points that are fitted, those after them).

    Raises:
      ConfigError: nothing is left to fit.
    """
    usable = np.flatnonzero(curve.step >= clip.first_step)[clip.drop_first :]
    fitted = usable[usable < len(curve) - clip.drop_last]
    if clip.last_step is not None:
        fitted = fitted[curve.step[fitted] <= clip.last_step]
    if not len(fitted):
        raise ConfigError(
            f"the curve of {curve.key:g} has {len(curve)} points, steps {curve.step[0]} to {curve.step[-1]}, and "
            f"{clip} leaves none to fit; clip less"
        )
    return curve.part(fitted), curve.part(slice(fitted[-1] + 1, len(curve)))


@dataclasses.dataclass(frozen=True)
class Predicted:
    """A law against points that it was not fitted to."""

    n: int
    r2: float
    """NaN below two points."""
    rmse: float


def score(loss: np.ndarray, law: np.ndarray) -> Predicted:
    """R² and RMSE in L of a prediction [n] of losses [n]."""
    return Predicted(len(loss), r_squared(loss, law), rmse(loss, law))


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The largest size, predicted by the law of the smaller ones."""

    size: float
    intercept: dict[str, float]
    """log10 of the free scale, by protocol: "slope_only", "strict". Empty for a law without one."""
    scores: dict[str, Predicted]
    """"slope_only": on all points; "strict": on those after the first; "law": where nothing was left to fit."""
    final_loss: float
    """The law at the last X, by the strictest protocol there is."""
    final_interval: tuple[float, float] | None
    """Of the law, not of one noisy evaluation."""
    measured: float
    """Mean loss of the last points, ten at most."""


def transfer(data: Data, solution: Solution, draws: Draws | None, target: Data, first_points: int) -> Transfer:
    """Predicts a curve that was not fitted.

    Args:
      data: what `solution` was fitted to.
      target: the one curve to predict.
      first_points: of it, that the strict protocol may see.

    Raises:
      ConfigError: the law has parameters of each curve beyond a scale, or there are too few points.
    """
    form, n = solution.form, len(target.loss)
    if form.own:
        raise ConfigError(
            f"the law {form.formula} has parameters of every curve ({', '.join(p.name for p in form.own)}), so it says "
            "nothing of a size that was not fitted; use loglinear_kn, loglinear_kn_floor, loglinear_kn_e0, powlaw or "
            "powlawmul for --protocol inter"
        )
    if not 1 <= first_points < n:
        raise ConfigError(
            f"the strict protocol was to see {first_points} points of the {n} of {target.points.size[0]:g}; "
            "give 1 or more and leave some to predict"
        )
    last = slice(max(n - 10, 0), n)
    one = np.zeros(n, int)

    def law(theta: np.ndarray, scale: float) -> np.ndarray:
        return loss_of(form.evaluate(theta, target.points), np.array([scale]), one)

    intercept, scores = {}, {}
    if form.scale is None:
        at_end = law(solution.theta, 1.0)
        scores["law"] = score(target.loss, at_end)
    else:
        loose = _scale(solution, solution.theta, target.points, target.loss, slice(None), logs=True)
        strict = _scale(solution, solution.theta, target.points, target.loss, slice(0, first_points))
        at_end = law(solution.theta, strict)
        intercept = {"slope_only": float(np.log10(loose)), "strict": float(np.log10(strict))}
        scores["slope_only"] = score(target.loss, law(solution.theta, loose))
        scores["strict"] = score(target.loss[first_points:], at_end[first_points:])
    ends = _final_interval(data, solution, draws, target, first_points) if draws else None
    return Transfer(
        float(target.points.size[0]), intercept, scores, float(at_end[-1]), ends, float(target.loss[last].mean())
    )


def _scale(
    solution: Solution, theta: np.ndarray, points: Points, loss: np.ndarray, part: slice, *, logs: bool = False
) -> float:
    """The free scale of one curve from a part of its points; with `logs` by least squares in log L, as in the paper."""
    parts = solution.form.evaluate(theta, points)
    assert parts.basis is not None
    wanted, basis = (loss - parts.offset)[part], parts.basis[part]
    if logs and np.all(wanted > 0):
        return float(10.0 ** np.mean(np.log10(wanted / basis)))
    return max(float(wanted @ basis / (basis @ basis)), 1e-12)


def _final_interval(
    data: Data, solution: Solution, draws: Draws, target: Data, first_points: int
) -> tuple[float, float]:
    """Of the law at the last X: the draws' k(N), and E from first points with noise like the largest fitted size's."""
    largest = int(np.argmax(solution.size))
    rng = np.random.default_rng(0)
    noise = blocks_of_residuals(data, solution, largest)
    first = slice(0, first_points)
    smooth = target.loss[first]
    end = Points(target.points.log_x[-1:], np.zeros(1, int), target.points.size)
    ends = []
    for theta in draws.theta:
        scale = 1.0
        if solution.form.scale is not None:
            drawn = np.append(smooth + np.resize(noise(rng), len(smooth)), target.loss[first_points:])
            scale = _scale(solution, theta, target.points, drawn, first)
        ends.append(loss_of(solution.form.evaluate(theta, end), np.array([scale]), np.zeros(1, int))[0])
    low, high = interval(np.array(ends))
    return float(low), float(high)


def split_largest(curves: Sequence[Curve]) -> tuple[list[Curve], Curve]:
    """(all sizes but the largest, the largest).

    Raises:
      ConfigError: fewer than three sizes.
    """
    if len(curves) < 3:
        raise ConfigError(f"{len(curves)} size(s) were given; to predict the largest from the others takes 3 or more")
    return list(curves[:-1]), curves[-1]
