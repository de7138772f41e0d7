"""Which figures a table of curves allows, and their files: everything of the paper's that the table has data for.

write_figures("runs/sweep/curves.csv", Path("figures"))
"""

import csv
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rljax.config import ConfigError
from rljax.scaling import plot
from rljax.scaling.curves import ALIASES, AXES, MEASURES, Curve, read_held
from rljax.scaling.fit import Solution, collect, parameters_of, solve
from rljax.scaling.forms import FORMS
from rljax.scaling.predict import PRESETS, Clip, clipped, split_largest, transfer

LAW = "loglinear_kn"
"""The paper's law, whose lines the figures show."""
PAPER_POINTS = 100
"""Evaluations of one of the paper's curves, at least: its clips count from the end."""
FIRST_POINTS = 3
"""Of the largest size, what the strict protocol would see; its line is not drawn."""


Draw = Callable[[Any], None]
"""Draws on one axes."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A file of curves and what tells its rows apart."""

    path: Path
    kinds: tuple[tuple[str, str], ...]
    """(source, evaluation set) of its rows; "" where there is no such column."""
    varied: frozenset[str]
    """Of `curves.AXES`, those with more than one value."""
    measures: frozenset[str]
    """Of `curves.MEASURES`, those it holds any of."""


def open_table(path: str | Path) -> Table:
    """What a table holds. Raises ConfigError when it is no file or has no row."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path} is not a file; give a curves.csv that a run or `rljax sweep` wrote")
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = list(csv.DictReader(lines, skipinitialspace=True))
    if not rows:
        raise ConfigError(f"{path} holds no row; give a table of runs that were evaluated")

    def values(column: str) -> list[str]:
        name = next((name for name in ALIASES.get(column, (column,)) if name in rows[0]), None)
        return [row[name] or "" if name else "" for row in rows]

    kinds = tuple(dict.fromkeys(zip(values("source"), values("eval"), strict=True)))
    varied = frozenset(axis for axis in AXES if len(set(values(axis))) > 1)
    return Table(file, kinds, varied, frozenset(measure for measure in MEASURES if any(values(measure))))


@dataclasses.dataclass(frozen=True)
class Figure:
    """One axes, or a grid of them."""

    panels: tuple[tuple[str, Draw], ...]
    """(title, what draws it)."""

    def draw(self, axes: np.ndarray) -> None:
        """On axes [rows, columns], those left over empty."""
        for one, panel in itertools.zip_longest(axes.flat, self.panels):
            if panel is None:
                one.set_visible(False)
                continue
            title, draw = panel
            draw(one)
            one.set_title(title, fontsize=10, y=1.0)  # else it looks for its place each time


def write_figures(
    path: str | Path, folder: Path, *, beside: str | Path | None = None, models: str | Path | None = None
) -> list[Path]:
    """Writes every figure that the table allows, as PNG and SVG, and returns the files.

    Args:
      path: a table that `curves.read_curves` reads.
      beside: another such table, such as the paper's: what both allow is shown side by side.
      models: a table of other models (`read_models`), to be drawn beside the sizes of this one.

    Raises:
      ConfigError: matplotlib is missing, or a table is not one or allows no figure.
    """
    ours = _figures(open_table(path))
    if models is not None:
        ours["models"] = _models(open_table(path), read_models(models))
    theirs = {} if beside is None else _figures(open_table(beside))
    if not ours:
        raise ConfigError(
            f"{path} holds one curve of a single size, reuse and group size; a figure compares several: give the table "
            "of a sweep"
        )
    files = []
    for name, one in ours.items():
        # Sources differ (the paper's are base and instruct): one that the other table lacks stands beside its first.
        other = theirs.get(name) or next((f for n, f in theirs.items() if n.split("-")[0] == name.split("-")[0]), None)
        if other is not None and len(one.panels) == len(other.panels) == 1:
            titles = (Path(path).stem, Path(str(beside)).stem)
            one = Figure(tuple((title, f.panels[0][1]) for title, f in zip(titles, (one, other), strict=True)))
        columns = min(len(one.panels), 2)
        rows = -(-len(one.panels) // columns)
        size = (6.0, 4.0) if columns == 1 else (12.0, max(4.0, 3.0 * rows))
        with plot.figure(size, rows, columns) as (drawn, axes):
            one.draw(axes)
            names = axes.flat[0].get_legend_handles_labels()
            if axes.flat[0].get_legend() is None and names[0]:
                drawn.legend(*names, loc="outside lower center", ncols=8)
            files += plot.save(drawn, folder, name)
    return files


def read_models(path: str | Path) -> dict[str, list[tuple[float, float]]]:
    """Other models by family, (parameters, test loss) in the order of the file.

    Args:
      path: a .csv file with the columns family, num_params and test_loss, as `configs/scaling/paper_models.csv`.

    Raises:
      ConfigError: there is no such file, a column is missing, or a value is no number above 0.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{path} is not a file; give a table of models with columns family, num_params and test_loss")
    found: dict[str, list[tuple[float, float]]] = {}
    with file.open(newline="", encoding="utf-8-sig") as lines:
        for number, row in enumerate(csv.DictReader(lines, skipinitialspace=True), 2):
            try:
                pair = float(row["num_params"]), float(row["test_loss"])
                found.setdefault(row["family"], []).append(pair)
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"line {number} of {path} has no family with num_params and test_loss in numbers ({error!r}); give "
                    "the three in every line"
                ) from None
            if not min(pair) > 0:
                raise ConfigError(f"line {number} of {path} has {pair}; parameters and a loss are above 0")
    if not found:
        raise ConfigError(f"{path} holds no model; give one in each line")
    return found


def _models(table: Table, models: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Loss over N where each source's sizes have used as many prompts, and of other models.

    Raises:
      ConfigError: the table has one size alone, or no losses over prompts.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for source in dict.fromkeys(source for source, _ in table.kinds):
        evaluation = next(name for s, name in table.kinds if s == source)
        curves = read_varied(table, source, evaluation, "num_params")[0]
        if len(curves) > 1 and all(len(plot.positive(curve, "samples")[0]) for curve in curves):
            end = min(span(curve, "samples")[1] for curve in curves)
            name = f"{source or 'trained'}, {end:,.0f} prompts"
            lines[name] = [(curve.key, _loss_at(curve, end)) for curve in curves]
    if not lines:
        raise ConfigError(f"{table.path} has no two sizes with losses over prompts, so no line to set models beside")
    return Figure((("", lambda axes: plot.draw_models(axes, lines, models)),))


def _loss_at(curve: Curve, samples: float) -> float:
    """Mean of the last evaluations until then, five at most."""
    x, loss = plot.positive(curve, "samples")
    return float(loss[x <= samples][-5:].mean())


def _figures(table: Table) -> dict[str, Figure]:
    """By name: the kind, then "-" and the source where there are several."""
    found: dict[str, Figure] = {}
    for source in dict.fromkeys(source for source, _ in table.kinds):
        sets = [evaluation for s, evaluation in table.kinds if s == source]
        suffix = f"-{source}" if source else ""
        for axis in sorted(table.varied, key=AXES.index):
            if table.measures != {"completion_tokens"}:
                curves, held = read_varied(table, source, sets[0], axis)
                for kind, draw in _panels(curves, source, axis):
                    found[f"{kind}{suffix}"] = Figure(((_title(sets[0], held), draw),))
                if len(sets) > 1:
                    found |= {f"{kind}{suffix}": figure for kind, figure in _grids(table, source, sets, axis)}
            if "completion_tokens" in table.measures:
                curves, held = read_varied(table, source, sets[0], axis, "completion_tokens")
                if len(curves) > 1:
                    found[f"lengths_{axis}{suffix}"] = Figure(((_title(sets[0], held), _lengths(curves, axis)),))
    return found


def _title(evaluation: str, held: Mapping[str, str]) -> str:
    return ", ".join(filter(None, (evaluation, *(f"{column} {value}" for column, value in held.items()))))


def _grids(table: Table, source: str, sets: Sequence[str], axis: str) -> Iterator[tuple[str, Figure]]:
    """Every evaluation set in an axes of its own."""
    curves = {name: read_varied(table, source, name, axis)[0] for name in sets}
    yield (
        f"evals_{axis}",
        Figure(tuple((name, _smoothed(of, "samples", axis, in_grid=True)) for name, of in curves.items())),
    )
    if axis == "num_params":
        yield "evals_ends", Figure(tuple((name, _ends(of)) for name, of in curves.items()))


def read_varied(
    table: Table, source: str, evaluation: str, axis: str, measure: str = "test_loss"
) -> tuple[list[Curve], dict[str, str]]:
    """Curves of one source on one evaluation set that differ by `axis` alone, and what else was held at which value."""
    kind = {column: value for column, value in (("source", source), ("eval", evaluation)) if value}
    return read_held(table.path, where=kind, by=axis, measure=measure)


def _panels(curves: Sequence[Curve], source: str, axis: str) -> Iterator[tuple[str, Draw]]:
    """(kind, what draws it) of the curves of one source on one evaluation set."""
    if len(curves) < 2:
        return
    for x in ("flops", "samples"):
        if not all(len(plot.positive(curve, x)[0]) for curve in curves):
            continue
        if axis != "num_params":
            yield f"{axis}_{x}", _smoothed(curves, x, axis)
            continue
        if len(curves) < 3 or min(len(curve) for curve in curves) < 3:
            yield f"law_{x}", _law(curves, x, None)
            continue
        intra, early = _early(curves, x, source)
        inter, extended = _inter(curves, x)
        smaller = {curve.key: span(curve, x) for curve in curves[:-1]}
        yield f"law_{x}", _law(curves, x, _fitted(curves, x))
        yield f"inter_{x}", _law(curves, x, extended, smaller)
        yield f"intra_{x}", _law(curves, x, intra, early)
        yield f"slopes_{x}", _slopes(curves, intra, inter)
    if axis == "num_params" and max(len(curve.runs) for curve in curves) > 1:
        yield "intervals", lambda axes: plot.draw_intervals(axes, curves)


def _fitted(curves: Sequence[Curve], x: str) -> Solution:
    return solve(collect(curves, x), FORMS[LAW])


def _inter(curves: Sequence[Curve], x: str) -> tuple[Solution, Solution]:
    """The law of all sizes but the largest, and the same with the largest's intercept: only its slope is predicted."""
    smaller, largest = split_largest(curves)
    data = collect(smaller, x)
    law = solve(data, FORMS[LAW])
    intercept = transfer(data, law, None, collect([largest], x), FIRST_POINTS).intercept["slope_only"]
    size, scale = np.append(law.size, largest.key), np.append(law.scale, 10.0**intercept)
    return law, dataclasses.replace(law, size=size, scale=scale)


def _early(curves: Sequence[Curve], x: str, source: str) -> tuple[Solution, dict[float, tuple[float, float]]]:
    """The law of the first part of every curve, and the X that it saw: the paper's part of curves as long as its own,
    else a half."""
    long_enough = min(len(curve) for curve in curves) >= PAPER_POINTS
    preset = PRESETS.get(source) if long_enough else None
    parts = [clipped(curve, preset or Clip(drop_last=len(curve) // 2))[0] for curve in curves]
    return _fitted(parts, x), {part.key: span(part, x) for part in parts}


def span(curve: Curve, x: str) -> tuple[float, float]:
    """First and last X."""
    resource, _ = plot.positive(curve, x)
    return float(resource[0]), float(resource[-1])


def _law(
    curves: Sequence[Curve],
    x: str,
    fitted: Solution | None,
    spans: dict[float, tuple[float, float]] | None = None,
) -> Draw:
    return lambda axes: plot.draw_law(axes, curves, x, fitted=fitted, spans=spans)


def _smoothed(curves: Sequence[Curve], x: str, axis: str, *, in_grid: bool = False) -> Draw:
    return lambda axes: plot.draw_smoothed(axes, curves, x, axis, in_grid=in_grid)


def _lengths(curves: Sequence[Curve], axis: str) -> Draw:
    return lambda axes: plot.draw_lengths(axes, curves, axis)


def _ends(curves: Sequence[Curve]) -> Draw:
    return lambda axes: plot.draw_ends(axes, curves)


def _slopes(curves: Sequence[Curve], intra: Solution, inter: Solution) -> Draw:
    laws = {"intra": parameters_of(intra), "inter": parameters_of(inter)}
    both = {name: (float(law["k_max"]), float(law["n0"])) for name, law in laws.items()}
    sizes = [curve.key for curve in curves]
    return lambda axes: plot.draw_slopes(axes, both, sizes, float(np.max(sizes)))
