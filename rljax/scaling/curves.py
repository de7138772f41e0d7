"""Tables of learning curves, read into one curve per model size (or reuse, or group size).

Two schemas are read. `curves.csv`, which runs and sweeps write: `run, source, num_params, step, samples, flops, tokens,
test_loss` and perhaps `unique, repeats, group_size, eval, seed, order` and the axes of a sweep. And that of the paper's
recovered curves: `source, size_b, step, flops_cum, loss_mean`, with `loss`, `tau` or `rollout_n` in some files; one
holds `mean_response_tokens` instead of a loss.

A curve is a mean over runs that differ in nothing but their seed: whatever else differs within one is refused.
"""

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rljax.config import ConfigError

ALIASES = {
    "num_params": ("num_params", "size_b"),
    "samples": ("samples",),
    "flops": ("flops", "flops_cum"),
    "test_loss": ("test_loss", "loss_mean", "loss"),
    "repeats": ("repeats", "tau"),
    "group_size": ("group_size", "rollout_n"),
    "completion_tokens": ("completion_tokens", "mean_response_tokens"),
}
"""Our column, and the names it may have in a table; the first that is there counts."""

TEXT = ("run", "seed", "source", "eval", "order")
MEASURES = ("test_loss", "completion_tokens")
"""What a curve may be of: 1 - pass@1, or the mean length of the completions trained on."""
NUMBERS = ("num_params", "step", "samples", "flops", "tokens", *MEASURES, "repeats", "group_size", "unique")
AXES = ("num_params", "repeats", "group_size")
"""What may tell the curves of a table apart."""

MEASURED = frozenset(
    name for column in ("step", "samples", "flops", "tokens", *MEASURES) for name in (column, *ALIASES.get(column, ()))
) | {"full_flops", "full_flops_non_embedding", "accelerator_seconds"}
"""Columns that may differ within a curve, beside the name of the run and its seeds; all others are settings."""

PAPER_PROMPTS_PER_STEP = 512
"""Of every run of arXiv 2509.25300, whose tables have no `samples`."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Test loss, or another of `MEASURES`, along training at one size (or reuse, or group size); steps ascend."""

    key: float
    """Value of the axis that tells the curves apart: parameters, repeats or completions per prompt."""
    step: np.ndarray  # [n] int64, above 0
    x: Mapping[str, np.ndarray]  # "samples", "flops", "tokens", "step": [n] float64, NaN where the table has none
    loss: np.ndarray  # [n] float64, 1 - pass@1 or what else was measured, mean over the runs that have it at that step
    runs: np.ndarray  # [R, n] float64, that of each run, NaN where it was not measured

    def __len__(self) -> int:
        return len(self.step)

    def part(self, keep: np.ndarray | slice) -> "Curve":
        """The points `keep` selects."""
        return Curve(
            self.key, self.step[keep], {k: v[keep] for k, v in self.x.items()}, self.loss[keep], self.runs[:, keep]
        )


Row = dict[str, float | str]


def read_curves(
    files: str | Path | Sequence[str | Path], *, where: Mapping[str, str] | None = None, by: str = "num_params"
) -> tuple[list[Curve], list[str]]:
    """Curves of one or more tables, ascending in `by`, and notes on what was left out.

    Step 0 is left out (log 0), and so are rows without a finite loss. Of rows that repeat a run's step, the last
    counts. Loss and x are averaged over runs, per size and step.

    Args:
      files: .csv files.
      where: column -> value, the rows that count, as `{"source": "base", "eval": "gsm8k"}`; any column of the files.
      by: the axis that tells curves apart, one of `AXES`.

    Raises:
      ConfigError: a file is not there, has not the columns, holds a value that is no number, mixes what must be told
        apart, or nothing is left.
    """
    paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    rows = [row for path in paths for row in _read_table(path, by)]
    name = ", ".join(str(path) for path in paths)
    return _curves(_filtered(rows, where or {}, name), by, name)


def read_held(
    path: str | Path, *, where: Mapping[str, str], by: str, measure: str = "test_loss"
) -> tuple[list[Curve], dict[str, str]]:
    """Curves that differ by one axis alone, of a table that varies others too; and at which values those were held.

    Another axis, and the order of prompts, are held if they vary at all; what else differs, if it differs within a
    curve: unique prompts go with repeats. Each is held at the value that most curves have.

    Args:
      path: a .csv file.
      where: as for `read_curves`.
      by: the axis that varies.
      measure: what the curves are of, one of `MEASURES`.

    Raises:
      ConfigError: as `read_curves`.
    """
    rows = _filtered(_read_table(Path(path), by, measure), where, str(path))
    held: dict[str, str] = {}
    for column in _settings(rows, by):
        curves: dict[str, list[float]] = {}
        for row in rows:
            curves.setdefault(_text(row, column), []).append(_number(row, by))
        must = column in (*AXES, "order") or len(_most_mixed(rows, by, column)[1]) > 1
        if len(curves) > 1 and must:
            held[column] = max(curves, key=lambda value: (len(set(curves[value])), len(curves[value])))
            rows = [row for row in rows if _text(row, column) == held[column]]
    return _curves(rows, by, str(path), measure)[0], held


# ---------------------------------------------------------------------------------------------------------------- rows


def _number(row: Row, column: str) -> float:
    value = row[column]
    assert isinstance(value, float), (column, value)
    return value


def _read_table(path: Path, by: str, measure: str = "test_loss") -> list[Row]:
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; give a curves.csv that a run or `rljax sweep` wrote")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        present = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = present
        sources = {column: _first(ALIASES.get(column, (column,)), present) for column in (*NUMBERS, *TEXT)}
        for column in ("step", measure, by):
            if sources[column] is None:
                needed = " or ".join(ALIASES.get(column, (column,)))
                raise ConfigError(
                    f"{path} has the columns {', '.join(present) or '(none)'} and no {needed}; a curves table needs "
                    f"step, {measure} and {by}"
                )
        return [_row(raw, sources, f"{path}:{number}") for number, raw in enumerate(reader, 2)]


def _first(names: Iterable[str], present: Sequence[str]) -> str | None:
    return next((name for name in names if name in present), None)


def _row(raw: Mapping[str, str | None], sources: Mapping[str, str | None], place: str) -> Row:
    # A column without a name, or cells beyond the last, could not be asked for.
    row: Row = {name: (value or "").strip() for name, value in raw.items() if name}
    row |= {column: (raw.get(sources[column] or "") or "").strip() for column in TEXT}
    for column in NUMBERS:
        source = sources[column]
        text = (raw.get(source) or "").strip() if source else ""
        try:
            value = float(text) if text else math.nan
        except ValueError:
            raise ConfigError(f"{place}: {source} is {text!r}; a number or nothing is required") from None
        row[column] = value * 1e9 if source == "size_b" else value
    # The paper's schema only: a table of ours that leaves samples out does not say how many there were.
    if sources["samples"] is None and sources["test_loss"] != "test_loss":
        row["samples"] = _number(row, "step") * PAPER_PROMPTS_PER_STEP
    return row


def _text(row: Row, column: str) -> str:
    value = row.get(column, "")  # of several tables, one may lack it
    return value if isinstance(value, str) else f"{value:.12g}"


def _filtered(rows: list[Row], where: Mapping[str, str], name: str) -> list[Row]:
    known = dict.fromkeys(column for row in rows for column in row) or dict.fromkeys(TEXT + NUMBERS)
    for column, wanted in where.items():
        if column not in known:
            raise ConfigError(
                f"where {column} = {wanted}: {name} has no such column; it may be one of {', '.join(known)}"
            )
        if column in NUMBERS and _parsed(wanted) is None:
            raise ConfigError(f"where {column} = {wanted}: {column} is compared with a number; give one")
        kept = [row for row in rows if _is(row, column, wanted)]
        if not kept:
            raise ConfigError(
                f"no row of {name} has {column} = {wanted}; it holds {_listed({_text(row, column) for row in rows})}"
            )
        rows = kept
    return rows


def _is(row: Row, column: str, wanted: str) -> bool:
    """Whether a row has this value: the same text, or but for names the same number, as 1e-4 is 0.0001."""
    text = _text(row, column)
    if text == wanted or column in TEXT:
        return text == wanted
    value, other = _parsed(text), _parsed(wanted)
    return value is not None and other is not None and f"{value:.12g}" == f"{other:.12g}"


def _parsed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _require_one_kind(rows: list[Row], by: str, name: str) -> None:
    """Rows that must not be averaged: other sources and evaluation sets; within a curve, any other setting."""
    for column in ("source", "eval"):
        values = {_text(row, column) for row in rows}
        if len(values) > 1:
            raise ConfigError(
                f"{name} holds the {column}s {_listed(values)}, and one law describes one; choose it by "
                f"--where {column}={_choice(values)}"
            )
    for column in _settings(rows, by):
        key, mixed = _most_mixed(rows, by, column)
        if len(mixed) > 1:
            apart = f", or tell the curves apart by it: --by {column}" if column in AXES else ""
            measured = "" if column in (*TEXT, *NUMBERS) else ", or leave the column out if it is no setting"
            raise ConfigError(
                f"{name} mixes {column} {_listed(mixed)} at {by} {key:g}; choose one by "
                f"--where {column}={_choice(mixed)}{apart}{measured}"
            )


def _settings(rows: list[Row], by: str) -> list[str]:
    """Columns that say how a run was made, `by` and seeds left out; those we know first."""
    columns = dict.fromkeys((*AXES, "order", "unique", *(column for row in rows for column in row)))
    seeds = {column for column in columns if column.rpartition(".")[2] == "seed"}  # `data.seed` of a sweep too
    return [column for column in columns if column not in {by, "run", "source", "eval", *seeds, *MEASURED}]


def _most_mixed(rows: list[Row], by: str, column: str) -> tuple[float, set[str]]:
    """The curve in which a column has most values, and these."""
    at: dict[float, set[str]] = {}
    for row in rows:
        at.setdefault(_number(row, by), set()).add(_text(row, column))
    return max(at.items(), key=lambda item: len(item[1]), default=(0.0, set()))


def _choice(values: Iterable[str]) -> str:
    """An example for --where."""
    return next((value for value in sorted(values) if value), "")


def _listed(values: Iterable[str]) -> str:
    names = sorted(value or "(empty)" for value in values)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _require_losses(rows: list[Row], name: str) -> None:
    losses = [_number(row, "test_loss") for row in rows]
    low, high = min(losses), max(losses)
    if low < -0.5 or high > 1.5:  # noise around 0 or 1 passes, percentages do not
        raise ConfigError(
            f"{name} holds losses from {low:g} to {high:g}; a test loss is 1 - pass@1, a fraction between 0 and 1"
        )


# -------------------------------------------------------------------------------------------------------------- curves


def _curves(rows: list[Row], by: str, name: str, measure: str = "test_loss") -> tuple[list[Curve], list[str]]:
    """Curves of the rows of `name`, and notes."""
    _require_one_kind(rows, by, name)
    kept = [row for row in rows if math.isfinite(_number(row, measure)) and _number(row, "step") > 0]
    notes = []
    if dropped := sum(not math.isfinite(_number(row, measure)) for row in rows):
        notes.append(f"{dropped} rows without a {'loss' if measure == 'test_loss' else measure} were left out")
    if not kept:
        raise ConfigError(
            f"{name} holds {len(rows)} rows and none with a finite {measure} and a step above 0; give a table of runs "
            "that were evaluated after training began"
        )
    if measure == "test_loss":
        _require_losses(kept, name)
    if nameless := [row for row in kept if not 0 < _number(row, by) < math.inf]:
        raise ConfigError(
            f"{name} holds {len(nameless)} rows whose {by} is {_number(nameless[0], by):g}; it tells the curves apart "
            "and must be above 0: fill it in, or leave those rows out"
        )
    groups: dict[float, list[Row]] = {}
    for row in kept:
        groups.setdefault(_number(row, by), []).append(row)
    curves = []
    for key in sorted(groups):
        curve, repeated = _curve(key, groups[key], measure)
        curves.append(curve)
        if repeated:
            notes.append(f"{by} {key:g}: {repeated} rows repeat a step of their run; the last of each was kept")
    return curves, notes


def _curve(key: float, rows: list[Row], measure: str) -> tuple[Curve, int]:
    """The mean over runs, and how many rows repeated a step of their run."""
    last: dict[tuple[str, str, float], Row] = {}
    for row in rows:
        last[_text(row, "run"), _text(row, "seed"), _number(row, "step")] = row
    names = sorted({(run, seed) for run, seed, _ in last})
    steps = sorted({step for _, _, step in last})
    place = {step: i for i, step in enumerate(steps)}

    def grid(column: str) -> np.ndarray:  # [R, n]
        values = np.full((len(names), len(steps)), np.nan)
        for (run, seed, step), row in last.items():
            values[names.index((run, seed)), place[step]] = _number(row, column)
        return values

    loss = grid(measure)
    x = {column: _mean(grid(column)) for column in ("samples", "flops", "tokens")}
    step = np.array(steps, np.float64)
    return Curve(key, step.astype(np.int64), {**x, "step": step}, _mean(loss), loss), len(rows) - len(last)


def _mean(values: np.ndarray) -> np.ndarray:
    """[R, n] -> [n], over what is there; NaN where nothing is."""
    there = np.isfinite(values)
    counts = there.sum(axis=0)
    return np.where(counts, np.where(there, values, 0.0).sum(axis=0) / np.maximum(counts, 1), np.nan)
