"""A fit as `fit.json` holds it, and as people read it."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rljax.config import ConfigError
from rljax.scaling.curves import AXES, Curve
from rljax.scaling.fit import (
    Data,
    Solution,
    aicc,
    collect,
    constant_baseline,
    layout,
    parameters_of,
    r_squared,
    rmse,
    size_name,
    solve,
)
from rljax.scaling.forms import FORMS
from rljax.scaling.intervals import Draws, bootstrap, interval, spreads_of_runs
from rljax.scaling.predict import Transfer, score

FIELDS = ("form", "x", "params", "intervals", "r2", "r2_baseline", "per_curve", "warnings")
"""Of fit.json, all of them."""

EXTENT = ("x_min", "x_max", "samples_per_step", "flops_per_sample")
"""Of an entry of per_curve, what advice reads beside the law."""

UNLIKE_SPREADS = 3.0
"""Times as far apart as those of the others: the runs of one size that intervals over runs, which take one spread for
all, do not fit. Chance alone takes three runs of one of seven sizes there in 3 of 100 cases (F of 2 and 12)."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law fitted to curves, with how sure it is."""

    form: str
    x: str
    by: str
    """What tells the curves apart: num_params, repeats or group_size."""
    curves: tuple[Curve, ...]
    """The points fitted."""
    later: tuple[Curve | None, ...]
    """Of each curve the points that were held out, if any."""
    data: Data
    solution: Solution
    draws: Draws | None
    notes: tuple[str, ...]
    transfer: Transfer | None = None
    target: Curve | None = None
    """The curve `transfer` predicts."""
    level: float = 0.95

    @property
    def law(self) -> np.ndarray:  # [n] at the points fitted
        return self.solution.predict(self.data.points.log_x, self.data.points.curve)

    @property
    def r2(self) -> float:
        return r_squared(self.data.loss, self.law)

    @property
    def aicc(self) -> float:
        """Of all points, to compare forms on the same curves."""
        return aicc(self.data.loss, self.law, self.solution.form.count(self.data.num_curves))


def fit_curves(
    curves: Sequence[Curve],
    *,
    form: str = "loglinear_kn",
    x: str = "flops",
    by: str = "num_params",
    weighting: str = "size",
    later: Sequence[Curve | None] | None = None,
    draws: int = 1000,
    over: str = "auto",
    seed: int = 0,
    notes: Sequence[str] = (),
) -> Fit:
    """Fits a law and draws its intervals.

    Args:
      curves: the points to fit, ascending in size.
      later: of each curve the points held out; scored, never fitted.
      draws: of the bootstrap; 0: no intervals.
      over: what is drawn: "steps", "runs" or "auto".

    Raises:
      ConfigError: the curves do not determine the law.
    """
    data = collect(curves, x, weighting)
    solution = solve(data, FORMS[form])
    found = bootstrap(data, solution, draws=draws, seed=seed, over=over) if draws else None
    held_out = tuple(later) if later is not None else (None,) * len(curves)
    return Fit(form, x, by, tuple(curves), held_out, data, solution, found, tuple(notes))


# ---------------------------------------------------------------------------------------------------------------- json


def fit_json(fit: Fit) -> dict[str, Any]:
    """The content of fit.json: `FIELDS`. What is not finite is None."""
    values = (
        fit.form,
        fit.x,
        parameters_of(fit.solution),
        _intervals(fit),
        fit.r2,
        constant_baseline(fit.data),
        per_curve(fit),
        warnings_of(fit),
    )
    return _finite(dict(zip(FIELDS, values, strict=True)))


def write_fit(fit: Fit, path: str | Path) -> None:
    """Writes fit.json, overwriting one that is there."""
    Path(path).write_text(json.dumps(fit_json(fit), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _intervals(fit: Fit) -> dict[str, Any]:
    """[low, high] of each parameter, in the shape of `params`; and the draws, for what is computed from them."""
    if fit.draws is None:
        return {}
    drawn = [
        parameters_of(dataclasses.replace(fit.solution, theta=theta, scale=scale))
        for theta, scale in zip(fit.draws.theta, fit.draws.scale, strict=True)
    ]

    def ends(values: Sequence[float]) -> list[float]:
        low, high = interval(np.array(values), fit.level)
        return [float(low), float(high)]

    found: dict[str, Any] = {"level": fit.level, "over": fit.draws.over}
    for name, value in parameters_of(fit.solution).items():
        found[name] = (
            {size: ends([one[name][size] for one in drawn]) for size in value}
            if isinstance(value, dict)
            else ends([one[name] for one in drawn])
        )
    found["draws"] = {
        "theta": [[float(f"{v:.7g}") for v in row] for row in fit.draws.theta],
        "scale": [[float(f"{v:.7g}") for v in row] for row in fit.draws.scale],
    }
    return found


def per_curve(fit: Fit) -> list[dict[str, Any]]:
    """One entry per curve, the one that was predicted last."""
    data, law = fit.data, fit.law
    parameters = fit.solution.form.own_count() + len(fit.solution.form.shared)
    slopes = slopes_of(fit.solution)
    drawn = None if fit.draws is None else _drawn_slopes(fit.draws)
    entries = []
    for i, (curve, later) in enumerate(zip(fit.curves, fit.later, strict=True)):
        mine = data.points.curve == i
        loss, predicted = data.loss[mine], law[mine]
        entry = {fit.by: curve.key, "role": "fitted", **_extent(curve, fit.x)}
        if slopes is not None:
            entry["k"] = float(slopes[i])
            entry["k_interval"] = None if drawn is None else [float(v) for v in interval(drawn[:, i], fit.level)]
        entry |= {
            "r2": r_squared(loss, predicted),
            "rmse": rmse(loss, predicted),
            "aicc": aicc(loss, predicted, parameters),
            "held_out": None,
        }
        if later is not None and len(later):
            x = np.log10(later.x[fit.x])
            entry["held_out"] = dataclasses.asdict(score(later.loss, fit.solution.predict(x, np.full(len(x), i))))
        entries.append(entry)
    if fit.transfer is not None and fit.target is not None:
        entries.append(_predicted_entry(fit, fit.transfer, fit.target))
    return entries


def _extent(curve: Curve, x: str) -> dict[str, Any]:
    """What was measured: points, runs, range, and how X goes with steps, for advice."""

    def rate(above: np.ndarray, below: np.ndarray) -> float | None:
        """Median over the last half, where a run has found its length."""
        half = slice(len(curve) // 2, None)
        there = np.isfinite(above[half]) & np.isfinite(below[half]) & (below[half] > 0)
        return float(np.median(above[half][there] / below[half][there])) if there.any() else None

    return {
        "n": len(curve),
        "runs": len(curve.runs),
        "x_min": float(np.nanmin(curve.x[x])),
        "x_max": float(np.nanmax(curve.x[x])),
        "samples_per_step": rate(curve.x["samples"], curve.x["step"]),
        "flops_per_sample": rate(curve.x["flops"], curve.x["samples"]),
    }


def _predicted_entry(fit: Fit, found: Transfer, target: Curve) -> dict[str, Any]:
    slope = slopes_of(fit.solution, np.array([found.size]))
    drawn = None if fit.draws is None else _drawn_slopes(fit.draws, np.array([found.size]))
    entry: dict[str, Any] = {fit.by: found.size, "role": "predicted", **_extent(target, fit.x)}
    if slope is not None:
        entry["k"] = float(slope[0])
        entry["k_interval"] = None if drawn is None else [float(v) for v in interval(drawn[:, 0], fit.level)]
    for name, scored in found.scores.items():
        entry[name] = dataclasses.asdict(scored)
        if name in found.intercept:
            entry[name]["e"] = found.intercept[name]
    ends = None if found.final_interval is None else list(found.final_interval)
    return entry | {"final_loss": found.final_loss, "final_interval": ends, "final_measured": found.measured}


def slopes_of(solution: Solution, size: np.ndarray | None = None) -> np.ndarray | None:
    """k(N) [m] of a log-linear law, at the sizes fitted or others; None for laws of another kind."""
    names = {parameter.name: i for i, (parameter, _) in reversed(list(enumerate(layout(solution.form, 1))))}
    if "k_max" in names and "n0" in names:
        size = solution.size if size is None else size
        return solution.theta[names["k_max"]] / (1 + 10.0 ** solution.theta[names["n0"]] / size)
    if "k" in names and size is None:
        return solution.theta[names["k"] :]
    return None


def _drawn_slopes(draws: Draws, size: np.ndarray | None = None) -> np.ndarray | None:
    """k(N) [b, m] by each draw."""
    rows = [slopes_of(dataclasses.replace(draws.solution, theta=theta), size) for theta in draws.theta]
    return None if rows[0] is None else np.stack([row for row in rows if row is not None])


# ------------------------------------------------------------------------------------------------------------ warnings


def warnings_of(fit: Fit) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = list(fit.notes)
    sizes, names = fit.solution.size, [parameter.name for parameter, _ in layout(fit.solution.form, 1)]
    for name in fit.solution.at_bound:
        found.append(f"{name} ended at a bound of its search: the curves do not determine it")
    if "n0" in names and "k_max" in names:
        found += _n0_warnings(fit)
    if fit.form.startswith("loglinear_kn") and len(sizes) == 2:
        found.append("two sizes give two slopes, and k_max and N0 are two parameters: nothing checks the law")
    if fit.draws is not None and fit.draws.over == "runs":
        found += _spread_warnings(fit)
    baseline = constant_baseline(fit.data)
    if fit.r2 <= baseline:
        found.append(f"R² {fit.r2:.4f} is no better than that of a constant per curve, {baseline:.4f}")
    entries = per_curve(fit)
    if below := [size_name(e[fit.by]) for e in entries if e["role"] == "fitted" and e["r2"] < 0]:
        found.append(f"R² below 0, worse than the curve's own mean, at {fit.by} {', '.join(below)}")
    if below := [size_name(e[fit.by]) for e in entries if e.get("held_out") and e["held_out"]["r2"] < 0]:
        found.append(f"held-out R² below 0, worse than the held-out mean, at {fit.by} {', '.join(below)}")
    uneven = [
        size_name(curve.key) for curve in fit.curves if len(set(np.isfinite(curve.runs).sum(axis=0).tolist())) > 1
    ]
    if uneven:
        found.append(f"the number of runs differs along the curve at {fit.by} {', '.join(uneven)}")
    return found


def _spread_warnings(fit: Fit) -> list[str]:
    """Sizes whose runs are further apart than intervals over runs, which take one spread for all, allow for."""
    spreads, found = spreads_of_runs(fit.data), []
    for i, curve in enumerate(fit.curves):
        others = np.sqrt(np.mean(np.delete(spreads, i) ** 2)) if len(spreads) > 1 else math.inf
        if spreads[i] > UNLIKE_SPREADS * others:
            found.append(
                f"the runs of {fit.by} {size_name(curve.key)} are more than {UNLIKE_SPREADS:g} times as far apart as "
                "those of the others: its intervals are too narrow, and the others' too wide"
            )
    return found


def _n0_warnings(fit: Fit) -> list[str]:
    sizes, n0 = fit.solution.size, parameters_of(fit.solution)["n0"]
    span = f"the sizes measured, {size_name(sizes.min())} to {size_name(sizes.max())}"
    if not sizes.min() <= n0 <= sizes.max():
        return [f"N0 = {n0:.3g} is outside {span}: k_max is an extrapolation"]
    if fit.draws is not None:
        low, high = interval(np.array([row[1] for row in fit.draws.theta]), fit.level)
        if 10.0**low < sizes.min() or 10.0**high > sizes.max():
            return [f"the interval of N0, {10.0**low:.3g} to {10.0**high:.3g}, reaches outside {span}"]
    return []


# ---------------------------------------------------------------------------------------------------------------- load


@dataclasses.dataclass(frozen=True)
class Saved:
    """A fit.json, ready to predict."""

    path: str
    form: str
    x: str
    by: str
    curves: list[dict[str, Any]]
    """Entries of per_curve that were fitted."""
    solution: Solution
    draws: Draws | None
    level: float


def load_fit(path: str | Path) -> Saved:
    """Reads what `write_fit` wrote.

    Raises:
      ConfigError: the file is not there or is no fit.json.
    """
    try:
        return _saved(str(path), json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, LookupError) as error:  # whatever is wrong with it, it is no fit of ours
        raise ConfigError(
            f"{path} cannot be read as a fit ({type(error).__name__}: {error}); give the fit.json of `rljax fit`"
        ) from None


def _saved(path: str, raw: dict[str, Any]) -> Saved:
    if missing := [name for name in FIELDS if name not in raw]:
        raise LookupError(f"it has no {', '.join(missing)}")
    if raw["form"] not in FORMS:
        raise LookupError(f"its form is {raw['form']!r}, none of {', '.join(FORMS)}")
    form = FORMS[raw["form"]]
    curves = [entry for entry in raw["per_curve"] if entry["role"] == "fitted"]
    if not all(name in entry for entry in curves for name in EXTENT):
        raise LookupError(f"a fitted curve lacks one of {', '.join(EXTENT)}")
    (by,) = [axis for axis in AXES if axis in curves[0]]
    size = np.array([entry[by] for entry in curves], float)
    theta = []
    for parameter, curve in layout(form, len(size)):
        value = raw["params"][parameter.name]
        value = value if curve is None else value[size_name(size[curve])]
        theta.append(math.log10(value) if parameter.log else value)
    scale = np.ones(len(size))
    if form.scale:
        scale = np.array([raw["params"][form.scale][size_name(n)] for n in size], float)
        scale = 10.0**scale if form.scale == "e" else scale
    solution = Solution(form, size, np.array(theta, float), scale, math.nan, ())
    kept, intervals = None, raw["intervals"]
    if "draws" in intervals:
        thetas, scales = (np.array(intervals["draws"][name], float) for name in ("theta", "scale"))
        if thetas.shape[1:] != solution.theta.shape or scales.shape != (len(thetas), len(size)):
            raise ValueError(f"its draws are {thetas.shape} and {scales.shape}")
        kept = Draws(solution, thetas, scales, intervals["over"])
    level = float(intervals["level"]) if "level" in intervals else 0.95
    return Saved(path, raw["form"], raw["x"], by, curves, solution, kept, level)
