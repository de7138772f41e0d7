"""How sure a fit is: the same fit on curves drawn again, from blocks of steps or from whole runs.

`steps`: the law plus its residuals, drawn in blocks of neighbouring steps within each curve (moving-block bootstrap,
Künsch 1989), which keeps how noise hangs together along a run but cannot see what shifts a whole run.

`runs`: three runs say little of what shifts a whole run, so that is learnt from the runs of all sizes. The deviation of
each run from its size's mean, along the whole run, is put in units of the noise of that size's evaluations, which
neighbouring steps show well, and widened by sqrt(R / (R - 1)), without which R deviations from their own mean show
(R - 1) / R of the variance. A size's mean is drawn anew from as many of all these as it has runs (Davison and Hinkley,
Bootstrap Methods and their Application, 1997, section 3.2: standardised residuals, pooled). What they say of the spread
is d = sum of R - 1 degrees of freedom, so each draw is stretched by the root of d over a chi-squared variate of d: what
was normal becomes Student's t of d (Gelman et al., Bayesian Data Analysis, section 3.2).
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from rljax.config import ConfigError
from rljax.scaling.fit import Data, Solution, loss_of, solve
from rljax.scaling.forms import Points

MIN_RUNS = 3
"""Of every size, for `auto` to draw runs: of two there is but one difference."""


@dataclasses.dataclass(frozen=True)
class Draws:
    """Fits of drawn curves, b of them."""

    solution: Solution
    """Of the curves as they are."""
    theta: np.ndarray  # [b, p]
    scale: np.ndarray  # [b, m]
    over: str
    """"steps" or "runs"."""

    def __len__(self) -> int:
        return len(self.theta)

    def predict(self, log_x: np.ndarray, curve: np.ndarray) -> np.ndarray:
        """L [b, n] at log10 X [n] on curves [n], by each of the fits."""
        points, form = Points(log_x, curve, self.solution.size), self.solution.form
        with np.errstate(over="ignore"):
            return np.stack(
                [loss_of(form.evaluate(t, points), s, curve) for t, s in zip(self.theta, self.scale, strict=True)]
            )


def bootstrap(data: Data, solution: Solution, *, draws: int = 1000, seed: int = 0, over: str = "auto") -> Draws:
    """`draws` fits of drawn curves, each begun at the solution; the same seed gives the same draws.

    Args:
      data: what `solution` was fitted to.
      over: "steps", "runs", or "auto": runs where every size has `MIN_RUNS` or more, else steps.

    Raises:
      ConfigError: runs were asked for and a size has only one, or fewer than 2 draws.
    """
    if draws < 2:
        raise ConfigError(f"draws = {draws}; an interval needs 2 or more, and 1000 for steady ends")
    fewest = min(len(runs) for runs in data.runs)
    if over == "auto":
        over = "runs" if fewest >= MIN_RUNS else "steps"
    if over == "runs" and fewest < 2:
        raise ConfigError(
            f"runs were to be drawn and a size has {fewest}; 2 or more of every size are required: train with more "
            "seeds, or draw steps"
        )
    rng = np.random.default_rng(seed)
    draw = _steps(data, solution) if over == "steps" else _runs(data)
    found = [solve(data.with_loss(draw(rng)), solution.form, start=solution.theta) for _ in range(draws)]
    return Draws(solution, np.stack([s.theta for s in found]), np.stack([s.scale for s in found]), over)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the central `level` of `values` along their first axis."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
    return low, high


# --------------------------------------------------------------------------------------------------------------- draws


Draw = Callable[[np.random.Generator], np.ndarray]


def _steps(data: Data, solution: Solution) -> Draw:
    """Draws of law plus residuals in blocks, [n]."""
    law = solution.predict(data.points.log_x, data.points.curve)
    noise = [blocks_of_residuals(data, solution, i) for i in range(data.num_curves)]
    return lambda rng: law + np.concatenate([one(rng) for one in noise])


def blocks_of_residuals(data: Data, solution: Solution, curve: int) -> Draw:
    """Draws of a curve's residuals in blocks, as many as it has points; widened by what the fit took of them, and by
    what blocks lose of how they hang together."""
    mine = data.points.curve == curve
    residuals = data.loss[mine] - solution.predict(data.points.log_x[mine], data.points.curve[mine])
    n, parameters = len(residuals), solution.form.own_count() + len(solution.form.shared) / data.num_curves
    residuals = residuals - residuals.mean()
    r = autocorrelation(residuals)
    length = block_length(n, r)
    # Points that hang together are worth fewer, so the fit takes a larger share of what they show.
    worth = max(n * (1 - r) / (1 + r), parameters + 1)
    residuals = residuals * math.sqrt(worth / (worth - parameters) / kept_by_blocks(length, r))
    return lambda rng: _blocks(residuals, length, rng)


def autocorrelation(residuals: np.ndarray) -> float:
    """Lag-one autocorrelation, 0 to .95; 0 where it is no more than chance gives: 95 of 100 white residuals are.

    Around an estimated mean it comes out (1 + 3 r) / n too small (Marriott and Pope 1954), which is added.
    """
    n, spread = len(residuals), float(np.sum(residuals**2))
    r = float(np.sum(residuals[1:] * residuals[:-1])) / spread if spread > 0 else 0.0
    return min(r + (1 + 3 * r) / n, 0.95) if r > 1.645 / math.sqrt(n) else 0.0


def block_length(n: int, r: float) -> int:
    """Steps per block: (sqrt(6) r / (1 - r²))^(2/3) n^(1/3) for lag-one autocorrelation r, 1 to n / 4.

    The length that estimates the variance of a mean best when residuals are autoregressive of order one (Bühlmann and
    Künsch 1999); without autocorrelation there are no blocks.
    """
    wanted = (math.sqrt(6) * r / (1 - r**2)) ** (2 / 3) * n ** (1 / 3)
    return int(min(max(round(wanted), 1), max(n // 4, 1)))


def kept_by_blocks(length: int, r: float) -> float:
    """Share of the variance of a mean that drawing blocks of `length` keeps.

    Blocks are drawn apart from each other, so of the covariance k steps apart, r^k, they keep 1 - k / length, and
    nothing from `length` on (Künsch 1989): sum of (1 - |k| / length) r^|k| over the (1 + r) / (1 - r) of all of it.
    """
    k = np.arange(1, length)
    return float(1 + 2 * np.sum((1 - k / length) * r**k)) * (1 - r) / (1 + r)


def _blocks(values: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """As many values, in blocks that begin anywhere; past the end they go on at the start."""
    n = len(values)
    begins = rng.integers(0, n, math.ceil(n / length))
    return values[(begins[:, None] + np.arange(length)).ravel()[:n] % n]


def _runs(data: Data) -> Draw:
    """Draws of means over runs, [n]."""
    means = [np.nanmean(runs, axis=0) for runs in data.runs]
    units, standard = _standardised(data)
    pools = [np.concatenate([_as_long_as(one, mean.size) for one in standard]) for mean in means]
    degrees = sum(len(runs) - 1 for runs in data.runs)

    def one(curve: int, rng: np.random.Generator) -> np.ndarray:
        """The drawn deviation of a curve's mean."""
        runs, pool = data.runs[curve], pools[curve]
        chosen = pool[rng.integers(0, len(pool), len(runs))]
        # A drawn run stands for one that may have stopped early; where none says anything, the mean stands.
        there = np.isfinite(chosen) & np.isfinite(runs)
        return units[curve] * np.where(there, chosen, 0.0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)

    def draw(rng: np.random.Generator) -> np.ndarray:
        stretch = math.sqrt(degrees / rng.chisquare(degrees))
        return np.concatenate([mean + stretch * one(curve, rng) for curve, mean in enumerate(means)])

    return draw


def spreads_of_runs(data: Data) -> np.ndarray:
    """[m] how far the runs of each curve are apart, in units of its evaluations' noise; NaN of a curve with one run."""
    _, standard = _standardised(data)
    return np.array([np.sqrt(np.nanmean(one**2)) if np.isfinite(one).any() else np.nan for one in standard])


def _standardised(data: Data) -> tuple[np.ndarray, list[np.ndarray]]:
    """The noise of an evaluation of each curve [m], and in units of it the deviations of its runs [R, n], widened; NaN
    where there are not two."""
    counts = [np.isfinite(runs).sum(axis=0) for runs in data.runs]
    widened = [np.sqrt(count / np.where(count > 1, count - 1, np.nan)) for count in counts]
    deviations = [(runs - np.nanmean(runs, axis=0)) * wide for runs, wide in zip(data.runs, widened, strict=True)]
    jumps = [np.diff(one, axis=1) for one in deviations]
    noise = np.array([math.sqrt(np.nanmean(one**2) / 2) if np.isfinite(one).any() else 0.0 for one in jumps])
    usual = math.sqrt(np.mean(noise[noise > 0] ** 2)) if (noise > 0).any() else 1.0
    noise = np.where(noise > usual / 10, noise, usual)  # of one point, or of runs that happen to agree: as the others
    return noise, [one / unit for one, unit in zip(deviations, noise, strict=True)]


def _as_long_as(values: np.ndarray, length: int) -> np.ndarray:
    """[R, m] -> [R, length]: at the same share of the way along."""
    return values[:, np.linspace(0, values.shape[1] - 1, length).round().astype(int)]
