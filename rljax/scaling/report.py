"""One run folder as one HTML page that needs nothing else: no network, no script, no font.

The page is read on a phone as well as on a desk, in light or dark as the reader's system is. What a model wrote is
hostile text: everything is escaped, and the page's own policy forbids scripts and requests.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rljax.config import ConfigError
from rljax.scaling.page import document, escape, section, table
from rljax.scaling.runs import read_curve

Point = tuple[float, float]

CHARTS = (
    ("Reward, mean", "reward/mean"),
    ("Completion length, tokens", "completion/length_tokens"),
    ("Entropy", "policy/entropy"),
    ("KL to the reference", "policy/reference_kl"),
    ("Gradient norm", "policy/grad_norm"),
    ("Behaviour gap, mean", "policy/behaviour_gap_mean"),
    ("Groups with equal rewards, fraction", "reward/zero_spread_group_fraction"),
    ("Truncated completions, fraction", "completion/truncated_fraction"),
)
"""Title and metric of each chart after pass@1; one that was never logged is left out."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder says; a missing file is empty here."""

    name: str
    metrics: list[dict[str, Any]]  # one per step, in order
    pass_at_1: dict[str, list[Point]]  # (step, pass@1) of each evaluation, by held-out set
    rollouts: list[tuple[str, list[dict[str, Any]]]]  # (file name, rows), the first and the last step sampled
    config: str

    def series(self, metric: str) -> list[Point]:
        """(step, value) where it was logged; a value that was not finite is NaN."""
        rows = [row for row in self.metrics if metric in row]
        return [(row["step"], math.nan if row[metric] is None else row[metric]) for row in rows]

    def last(self, metric: str) -> float | None:
        series = self.series(metric)
        return series[-1][1] if series else None


def write_report(run_dir: str | Path) -> Path:
    """Writes `run_dir/report.html` from metrics.jsonl, curves.csv, rollouts/ and config.yaml; returns its path.

    Raises:
      ConfigError: the folder is not there, or holds neither metrics nor curves.
    """
    folder = Path(run_dir)
    if not (folder / "metrics.jsonl").is_file() and not (folder / "curves.csv").is_file():
        raise ConfigError(
            f"run folder {run_dir} holds neither metrics.jsonl nor curves.csv; give the run_dir of a run "
            "that has started"
        )
    report = folder / "report.html"
    # errors: half a surrogate pair, which a model can write, has no UTF-8.
    report.write_text(render(read_run(folder)), encoding="utf-8", errors="replace")
    return report


# --------------------------------------------------------------------------------------------------------------- read


def read_run(folder: Path) -> Run:
    """The files of a run folder; a half-written last line is skipped."""
    metrics = _read_jsonl(folder / "metrics.jsonl")
    pass_at_1: dict[str, list[Point]] = {}
    if rows := read_curve(folder):
        for row in rows:
            try:
                point = (int(row["step"]), 1 - float(row["test_loss"]))
            except (TypeError, ValueError):
                continue
            pass_at_1.setdefault(row.get("eval") or "held-out", []).append(point)
    elif evaluated := [(row["step"], row["eval/pass@1"]) for row in metrics if row.get("eval/pass@1") is not None]:
        pass_at_1["held-out"] = evaluated
    files = sorted((folder / "rollouts").glob("step_*.jsonl"))
    rollouts = [(file.stem, _read_jsonl(file)) for file in dict.fromkeys(files[:1] + files[-1:])]
    config = folder / "config.yaml"
    return Run(
        name=folder.resolve().name,
        metrics=metrics,
        pass_at_1=pass_at_1,
        rollouts=rollouts,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )


def _read_jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    # split, not splitlines: a completion may hold any of the characters Unicode calls a line end.
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


# --------------------------------------------------------------------------------------------------------------- page


def render(run: Run) -> str:
    """The page."""
    sections = [
        _headline(run),
        section("Curves, by step", "".join(_charts(run)), "charts"),
        section("Seconds by phase", _phases(run)),
        *(section(f"Completions, {_step_name(name)}", completions(rows)) for name, rows in run.rollouts),
        section("Configuration", f"<pre>{escape(run.config)}</pre>" if run.config else ""),
    ]
    return document(run.name, "".join(sections))


def _step_name(stem: str) -> str:
    return f"step {int(stem.removeprefix('step_'))}"


def _headline(run: Run) -> str:
    tiles: list[tuple[str, str, str]] = []
    for name, points in run.pass_at_1.items():
        label = "pass@1" if len(run.pass_at_1) == 1 else f"pass@1, {name}"
        (_, before), (step, after) = points[0], points[-1]
        if len(points) == 1:
            tiles.append((label, f"{after:.3f}", f"step {step:.0f}, the only evaluation"))
        else:
            tiles.append((label, f"{before:.3f} → {after:.3f}", f"{after - before:+.3f} by step {step:.0f}"))
    tiles += _forecast_tile(run)
    if run.metrics:
        tiles.append(("steps", f"{run.metrics[-1]['step']:,}", ""))
    for label, metric, form in (
        ("prompts", "progress/prompts_seen", _count),
        ("tokens", "progress/tokens", _count),
        ("training FLOPs", "progress/compute_flops", lambda value: f"{value:.3g}"),
    ):
        if (value := run.last(metric)) is not None:
            tiles.append((label, form(value), ""))
    seconds = sum(_seconds(run).values())
    if seconds:
        tiles.append(("time", _duration(seconds), ""))
    cells = (
        f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for label, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>\n'


def _forecast_tile(run: Run) -> list[tuple[str, str, str]]:
    """None once the last step has been evaluated: a run forecasts after every evaluation but that one."""
    newest = max((points[-1][0] for points in run.pass_at_1.values()), default=-1)
    made = _forecasts(run)
    if not made or made["median"][-1][0] != newest:
        return []
    median, low, high = (made[name][-1][1] for name in ("median", "low", "high"))
    return [("pass@1 at the end, forecast", f"{median:.3f}", f"95 %: {low:.3f} to {high:.3f}")]


def _forecasts(run: Run) -> dict[str, list[Point]]:
    """pass@1 at the end of the run as it was forecast after each evaluation: the median, and the 95 % interval."""
    names = {"median": "", "low": "_high", "high": "_low"}  # a high loss is a low pass@1
    found = {}
    for name, end in names.items():
        points = run.series(f"forecast/final_test_loss{end}")
        found[name] = [(step, 1 - loss) for step, loss in points if math.isfinite(loss)]
    return found if all(found.values()) else {}


def _seconds(run: Run) -> dict[str, float]:
    """Total of each phase over the run; `other` is what of the steps no phase covers."""
    totals: dict[str, float] = {"other": 0.0}
    for row in run.metrics:
        phases = {
            n[5:-8]: s for n, s in row.items() if n.startswith("time/") and n.endswith("_seconds") and s is not None
        }
        step = phases.pop("step", 0.0)
        totals["other"] += max(step - sum(phases.values()), 0.0)
        for phase, seconds in phases.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
    return {phase: seconds for phase, seconds in totals.items() if seconds}


def _phases(run: Run) -> str:
    totals, steps = _seconds(run), sum("time/step_seconds" in row for row in run.metrics) or len(run.metrics)
    everything = sum(totals.values())
    if not everything:
        return ""
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    rows = [(phase, f"{s:,.1f}", f"{s / steps:,.2f}", f"{100 * s / everything:.1f} %") for phase, s in ordered]
    return table(("phase", "total", "per step", "share"), rows)


def completions(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a rollouts file, to read."""
    blocks = []
    for row in rows:
        facts = "".join(
            f"<span>{escape(str(key))} <b>{escape(_text(value))}</b></span>"
            for key, value in row.items()
            if key not in ("prompt", "completion")
        )
        blocks.append(
            f'<article><div class="facts">{facts}</div><details><summary>prompt</summary>'
            f"<pre>{escape(_text(row.get('prompt', '')))}</pre></details>"
            f"<pre>{escape(_text(row.get('completion', '')))}</pre></article>"
        )
    return "".join(blocks)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"


# ------------------------------------------------------------------------------------------------------------- charts

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 190, 46, 16, 8, 24
_MOST_POINTS = 600


def _charts(run: Run) -> Iterable[str]:
    if run.pass_at_1:
        yield chart("pass@1", run.pass_at_1)
    if forecasts := _forecasts(run):
        yield chart("pass@1 at the end, forecast", forecasts)
    for title, metric in CHARTS:
        points = run.series(metric)
        if any(math.isfinite(value) for _, value in points):
            yield chart(title, {metric: points})


def chart(title: str, lines: Mapping[str, Sequence[Point]]) -> str:
    """A figure of one or more lines over the step; NaN breaks a line, a single point is a dot."""
    lines = {name: thin(points) for name, points in lines.items()}
    finite = [point for points in lines.values() for point in points if math.isfinite(point[1])]
    first, last = min(x for x, _ in finite), max(x for x, _ in finite)
    last = max(last, first + 1)
    x_ticks = [tick for tick in ticks(first, last, whole=True) if first <= tick <= last]
    y_ticks = ticks(min(y for _, y in finite), max(y for _, y in finite))
    x = _scale(first, last, _LEFT, _WIDTH - _RIGHT)
    y = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = []
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{_number(tick)}</text>')
    for number, points in enumerate(lines.values()):
        parts.append(_line(points, x, y, f"line{number % 4}"))
    newest = "".join(
        f'<b class="line{number % 4}">{escape(name) + " " if len(lines) > 1 else ""}{points[-1][1]:.4g}</b> '
        for number, (name, points) in enumerate(lines.items())
    )
    return (
        f"<figure><figcaption><span>{escape(title)}</span><span>{newest}</span></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} by step">'
        f"{''.join(parts)}</svg></figure>"
    )


def _line(points: Sequence[Point], x: Callable[[float], float], y: Callable[[float], float], kind: str) -> str:
    path, pen_down = "", False
    for step, value in points:
        if math.isfinite(value):
            path += f"{'L' if pen_down else 'M'}{x(step):.1f} {y(value):.1f}"
        pen_down = math.isfinite(value)
    dots = ""
    if len(points) <= 40:
        dots = "".join(
            f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"><title>step {step:g}: {value:.5g}</title></circle>'
            for step, value in points
            if math.isfinite(value)
        )
    return f'<g class="{kind}"><path class="curve" d="{path}"/>{dots}</g>'


def thin(points: Sequence[Point]) -> list[Point]:
    """At most 600 points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    kept: list[Point] = []
    size = math.ceil(len(points) / (_MOST_POINTS // 2))
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        if finite:
            kept += sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])})
        else:
            kept.append(stretch[0])
    return kept


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About five round numbers that enclose [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    if whole:
        step = max(step, 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _number(value: float) -> str:
    return _count(value) if abs(value) >= 1e4 else f"{value:.6g}"
