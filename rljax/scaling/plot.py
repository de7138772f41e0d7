"""The figures of arXiv 2509.25300, from any table of curves: PNG and SVG (extra `report`).

Colours, scales and labels are the paper's. Smoothed lines are for the eye: no law is fitted to them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from rljax.config import ConfigError
from rljax.scaling.curves import Curve
from rljax.scaling.fit import Solution

# fmt: off
SIZES = {0.5: "#fde725", 1.5: "#aadc32", 3: "#5ec962", 7: "#27ad81", 14: "#2c728e", 32: "#5a67a8", 72: "#440154"}
REPEATS: dict[float, str] = {
    1: "#FF4500", 2: "#FFA500", 5: "#ADFF2F", 10: "#00FF00", 20: "#00FF00", 25: "#00BFFF", 50: "#4169E1",
    100: "#8A2BE2",
}
GROUPS: dict[float, str] = {4: "#FF6B35", 8: "#F7931E", 16: "#FFD23F", 32: "#06D6A0"}
# fmt: on
BEFORE, AFTER = "#888888", "#27ad81"
PREDICTED, FITTED, LAW = "#F18F01", "#A23B72", "#2E86AB"

LABELS = {"flops": "Compute (FLOPs)", "samples": "Data Size", "tokens": "Tokens", "step": "Steps"}


@dataclasses.dataclass(frozen=True)
class Style:
    """How the curves of one axis are told apart."""

    legend: str
    colours: Mapping[float, str]
    unit: float = 1.0
    """What a key is divided by for its name."""
    suffix: str = ""

    def name(self, key: float) -> str:
        return f"{key / self.unit:.3g}{self.suffix}"

    def colour(self, key: float, place: float) -> Any:
        """The paper's where it had this value, else by `place` in [0, 1] along the same range of colours."""
        import matplotlib

        return self.colours.get(round(key / self.unit, 9)) or matplotlib.colormaps["viridis_r"](0.05 + 0.95 * place)


def style_of(axis: str, keys: Sequence[float]) -> Style:
    """The style of an axis of `curves.AXES`."""
    if axis == "repeats":
        return Style("τ", REPEATS)
    if axis == "group_size":
        return Style("ρ", GROUPS)
    million = max(keys) < 1e9
    return Style("Size", {} if million else SIZES, 1e6 if million else 1e9, "M" if million else "B")


@contextmanager
def figure(size: tuple[float, float] = (6, 4), rows: int = 1, columns: int = 1) -> Iterator[tuple[Any, np.ndarray]]:
    """A figure in the paper's look and its axes [rows, columns], to be drawn and saved inside the `with`.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("figures need matplotlib; install the extra: pip install 'rljax[report]'") from error
    from matplotlib.figure import Figure  # not pyplot: no display, no figures of the caller's

    look = {
        "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True, "axes.labelweight": "bold",
        "axes.titleweight": "bold", "legend.fontsize": 8, "svg.fonttype": "none", "svg.hashsalt": "rljax",
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(cast(Any, look)):
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn, drawn.subplots(rows, columns, squeeze=False)


def save(drawn: Any, folder: Path, name: str) -> list[Path]:
    """Writes NAME.png (300 dots an inch) and NAME.svg, with the same bytes for the same figure; returns their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    # Laid out once and drawn once for each: `savefig` lays out twice and draws twice, each time.
    drawn.set_dpi(300)
    canvas = FigureCanvasAgg(drawn)
    drawn.get_layout_engine().execute(drawn)
    drawn.set_layout_engine("none")
    canvas.print_png(files[0], metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    FigureCanvasSVG(drawn).print_svg(files[1], metadata={"Date": None})
    return files


# ------------------------------------------------------------------------------------------------------------ one axes


def draw_law(
    axes: Any,
    curves: Sequence[Curve],
    x: str,
    axis: str = "num_params",
    fitted: Solution | None = None,
    spans: Mapping[float, tuple[float, float]] | None = None,
) -> None:
    """Points of each curve, and the law's lines over them: solid where it was fitted, dashed where it predicts.

    Args:
      x: one of `fit.RESOURCES`.
      fitted: the law, of all these curves in their order; without one, points only.
      spans: key -> (first X, last X) that the law was fitted on; a curve without one was predicted whole. None: all
        points of all curves were fitted.
    """
    style = style_of(axis, [curve.key for curve in curves])
    for i, curve in enumerate(curves):
        colour = style.colour(curve.key, i / max(len(curves) - 1, 1))
        resource, loss = positive(curve, x)
        axes.scatter(resource, loss, s=15, alpha=0.4, color=colour, linewidths=0, label=style.name(curve.key))
        if fitted is None or not len(resource):
            continue
        first, last = (resource[0], resource[-1]) if spans is None else spans.get(curve.key, (np.inf, np.inf))
        grid = np.geomspace(resource[0], resource[-1], 200)
        line = fitted.predict(np.log10(grid), np.full(len(grid), i))
        inside = (grid >= first * (1 - 1e-9)) & (grid <= last * (1 + 1e-9))
        axes.plot(grid, np.where(inside, line, np.nan), color=colour, linewidth=2)
        axes.plot(grid, np.where(inside, np.nan, line), color=colour, linewidth=2, linestyle="--")
    log_log(axes, x, [curve.loss for curve in curves])
    handles, labels = axes.get_legend_handles_labels()
    if spans is not None:
        handles += [*axes.plot([], [], color="#555555"), *axes.plot([], [], color="#555555", linestyle="--")]
        labels += ["Fitted", "Extrapolated"]
    legend = axes.legend(handles, labels, title=style.legend, loc="best", ncols=1 + len(labels) // 8)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def draw_smoothed(axes: Any, curves: Sequence[Curve], x: str, axis: str, *, in_grid: bool = False) -> None:
    """Raw points and one smoothed line a curve; in a grid without a legend and over a linear loss, as in the paper."""
    style = style_of(axis, [curve.key for curve in curves])
    for i, curve in enumerate(curves):
        colour = style.colour(curve.key, i / max(len(curves) - 1, 1))
        resource, loss = positive(curve, x)
        if not len(resource):
            continue
        axes.scatter(resource, loss, s=15, alpha=0.3, color=colour, linewidths=0)
        axes.plot(resource, smooth(resource, loss), color=colour, linewidth=2, label=style.name(curve.key))
    log_log(axes, x, [curve.loss for curve in curves])
    if in_grid:
        axes.set_yscale("linear")
    else:
        axes.legend(title=style.legend, loc="best")


def draw_lengths(axes: Any, curves: Sequence[Curve], axis: str) -> None:
    """Mean completion length over data, raw and smoothed; curves of `completion_tokens`."""
    style = style_of(axis, [curve.key for curve in curves])
    x = "samples" if all(len(positive(curve, "samples")[0]) for curve in curves) else "step"
    for i, curve in enumerate(curves):
        colour = style.colour(curve.key, i / max(len(curves) - 1, 1))
        resource, tokens = positive(curve, x)
        axes.scatter(resource, tokens, s=15, alpha=0.3, color=colour, linewidths=0)
        line = smooth(resource, tokens, monotone=False)
        axes.plot(resource, line, color=colour, linewidth=2, label=style.name(curve.key))
    log_x(axes)
    axes.set_xlabel(LABELS[x])
    axes.set_ylabel("Response Length")
    axes.legend(title=style.legend, ncols=1 + len(curves) // 5)


def draw_slopes(axes: Any, laws: Mapping[str, tuple[float, float]], sizes: Sequence[float], largest: float) -> None:
    """K(N) = K_max N / (N + N0) of laws by name, (K_max, N0), with the sizes each was measured at.

    Args:
      largest: the size that the law named "inter" predicted, drawn as a diamond; 0: none.
    """
    grid = np.geomspace(min(sizes) / 2, max(sizes) * 2, 200)
    for (name, (k_max, n0)), colour in zip(laws.items(), (FITTED, PREDICTED, LAW), strict=False):
        at = np.array([n for n in sizes if name != "inter" or n < largest])
        axes.plot(grid, k_max * grid / (grid + n0), color=colour, linestyle="-" if name == "inter" else "--")
        axes.scatter(at, k_max * at / (at + n0), color=colour, s=25, label=name, zorder=3)
        if name == "inter" and largest:
            axes.scatter([largest], [k_max * largest / (largest + n0)], color=colour, marker="D", s=45, zorder=3)
    log_x(axes)
    axes.set_xlabel("Parameters")
    axes.set_ylabel("K(N)")
    axes.legend()


def draw_ends(axes: Any, curves: Sequence[Curve], points: int = 10) -> None:
    """Loss over N, the mean of the first evaluations and of the last, the area between them filled.

    The paper draws step 0 and the best of all steps; the best of many noisy evaluations flatters, so this does not.
    """
    sizes = [curve.key for curve in curves]
    first = [float(curve.loss[: min(points, len(curve) // 2 or 1)].mean()) for curve in curves]
    last = [float(curve.loss[-min(points, len(curve) // 2 or 1) :].mean()) for curve in curves]
    axes.plot(sizes, first, "s--", color=BEFORE, markerfacecolor="none", label="first")
    axes.plot(sizes, last, "o-", color=AFTER, label="last")
    axes.fill_between(sizes, last, first, alpha=0.2, color=AFTER)
    log_x(axes)
    axes.set_xlabel("Parameters")
    axes.set_ylabel("Test Loss")
    axes.legend()


def draw_models(
    axes: Any,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    models: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Loss over N: of what was trained, by name, as solid lines, and of other models, by family, as dashed ones."""
    colours = ("#CC0000", "#CC6600", "#228B22", "#0066CC", "#663399")
    every = [(name, points, "o-") for name, points in lines.items()]
    every += [(family, points, "s--") for family, points in models.items()]
    for (name, points, marker), colour in zip(every, itertools.cycle(colours), strict=False):
        sizes, losses = zip(*sorted(points), strict=True)
        axes.plot(sizes, losses, marker, color=colour, label=name)
    log_x(axes)
    axes.set_xlabel("Parameters")
    axes.set_ylabel("Test Loss")
    axes.legend()


def draw_intervals(axes: Any, curves: Sequence[Curve]) -> None:
    """Last common step of each curve: mean over its runs and the 95 % t-interval of that mean (paper Table 5)."""
    from scipy.special import stdtrit

    style = style_of("num_params", [curve.key for curve in curves])
    for i, curve in enumerate(curves):
        full = np.flatnonzero(np.isfinite(curve.runs).all(axis=0))
        if not len(full):
            continue
        losses = curve.runs[:, full[-1]]
        half = stdtrit(len(losses) - 1, 0.975) * losses.std(ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
        axes.errorbar([style.name(curve.key)], [losses.mean()], yerr=[half], fmt="o", capsize=4,
                      color=style.colour(curve.key, i / max(len(curves) - 1, 1)))  # fmt: skip
    axes.set_xlabel("Size")
    axes.set_ylabel("Test Loss, last step")


# --------------------------------------------------------------------------------------------------------------- parts


def positive(curve: Curve, x: str) -> tuple[np.ndarray, np.ndarray]:
    """(X, loss) of the points that have an X above 0, ascending in X."""
    there = np.isfinite(curve.x[x]) & (curve.x[x] > 0)
    order = np.argsort(curve.x[x][there], kind="stable")
    return curve.x[x][there][order], curve.loss[there][order]


def smooth(x: np.ndarray, loss: np.ndarray, *, monotone: bool = True) -> np.ndarray:
    """A decorative line in the paper's manner: a cubic spline in log x, as smooth as the noise allows, then made
    monotone, whichever way fits better. The noise is that of neighbouring points; curves of fewer than eight are
    returned as they are."""
    if len(x) < 8:
        return loss
    from scipy.interpolate import UnivariateSpline
    from scipy.optimize import isotonic_regression

    log_x, places = np.unique(np.log(x), return_inverse=True)
    mean = np.bincount(places, loss) / np.bincount(places)
    noise = max(float(np.std(np.diff(mean))) / 2**0.5, 1e-3)
    spline = UnivariateSpline(log_x, mean, w=np.full(len(mean), 1 / noise), k=3, s=1.2 * len(mean))
    if not monotone:
        return np.asarray(spline(log_x))[places]
    both = (isotonic_regression(spline(log_x), increasing=up).x for up in (False, True))
    return min(both, key=lambda line: float(np.sum((line - mean) ** 2)))[places]


def log_x(axes: Any) -> None:
    """A logarithmic axis of what has been drawn, with labels at 1, 2 and 5 where decades alone are too few."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    axes.tick_params(axis="x", which="minor", labelbottom=False)  # empty labels would be laid out, too


def power_of_ten(value: float) -> str:
    """`value`, one digit times a power of ten, as text: 10³, 2×10⁴. Mathtext looks the same and takes far longer."""
    exponent = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10**exponent)
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if digit == 1 else f"{digit}×{power}"


def log_log(axes: Any, x: str, losses: Sequence[np.ndarray]) -> None:
    """Logarithmic axes whose loss is written in plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    log_x(axes)
    axes.set_yscale("log")
    values = np.concatenate([loss[loss > 0] for loss in losses] or [np.ones(1)])
    low, high = float(values.min()), float(values.max())
    step = next(s for s in (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001) if (high - low) / s >= 3 or s == 0.001)
    wanted = [round(step * i, 6) for i in range(int(low / step), int(high / step) + 2) if i]
    axes.yaxis.set_major_locator(FixedLocator(cast(Any, wanted)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(low * 0.98, high * 1.02)
    axes.set_xlabel(LABELS[x])
    axes.set_ylabel("Test Loss")
