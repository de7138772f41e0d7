"""One run folder as one HTML page that needs nothing else: no network, no script, no font.

The page is read on a phone as well as on a desk, in light or dark as the reader's system is. What a model wrote is
hostile text: everything is escaped, and the page's own policy forbids scripts and requests.
"""

import csv
import dataclasses
import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rljax.config import ConfigError

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
    if (folder / "curves.csv").is_file():
        with (folder / "curves.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
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
        _section("Curves, by step", "".join(_charts(run)), "charts"),
        _section("Seconds by phase", _phases(run)),
        *(_section(f"Completions, {_step_name(name)}", _rollouts(rows)) for name, rows in run.rollouts),
        _section("Configuration", f"<pre>{escape(run.config)}</pre>" if run.config else ""),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(run.name)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{escape(run.name)}</h1>\n{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section><h2>{escape(title)}</h2><div class="{kind}">{body}</div></section>\n' if body else ""


def _step_name(stem: str) -> str:
    return f"step {int(stem.removeprefix('step_'))}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are escaped; the first column is text, the others numbers."""
    line = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{line}</tr></thead><tbody>{body}</tbody></table></div>'


def _headline(run: Run) -> str:
    tiles: list[tuple[str, str, str]] = []
    for name, points in run.pass_at_1.items():
        label = "pass@1" if len(run.pass_at_1) == 1 else f"pass@1, {name}"
        (_, before), (step, after) = points[0], points[-1]
        if len(points) == 1:
            tiles.append((label, f"{after:.3f}", f"step {step:.0f}, the only evaluation"))
        else:
            tiles.append((label, f"{before:.3f} → {after:.3f}", f"{after - before:+.3f} by step {step:.0f}"))
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
    return _table(("phase", "total", "per step", "share"), rows)


def _rollouts(rows: Sequence[Mapping[str, Any]]) -> str:
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


def escape(text: str) -> str:
    """HTML of the text. Control characters, which HTML forbids, become their Unicode pictures."""
    return html.escape("".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text))


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


_STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1c1e21;--soft:#666b73;--rule:#e3e4e6;
--c0:#2563c9;--c1:#b4570b;--c2:#1b7f4d;--c3:#8a3fb5}
@media(prefers-color-scheme:dark){:root{--page:#131517;--card:#1b1e21;--ink:#e8e9eb;--soft:#9aa0a8;--rule:#2e3237;
--c0:#7fb0ff;--c1:#f0a45d;--c2:#68cf97;--c3:#cf9cf0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.5rem;margin:0 0 12px;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:32px 0 10px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tile,figure,article{background:var(--card);border:1px solid var(--rule);border-radius:8px}
.tile{padding:10px 12px;display:flex;flex-direction:column}
.tile span{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
.tile b{font-size:1.2rem;font-weight:600;white-space:nowrap;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:12px}
figure{margin:0;padding:10px 12px 6px}
figcaption{display:flex;justify-content:space-between;gap:8px;flex-wrap:wrap;font-size:.9rem}
figcaption b{font-variant-numeric:tabular-nums;font-weight:600}
svg{display:block;width:100%;height:auto;margin-top:4px}
svg text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--rule);stroke-width:1}
.curve{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
circle{fill:currentColor}
.line0{color:var(--c0)}.line1{color:var(--c1)}.line2{color:var(--c2)}.line3{color:var(--c3)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 14px 4px 0;text-align:right;border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:500}
th:first-child,td:first-child{text-align:left}
article{padding:10px 12px;margin:0 0 10px}
.facts{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.85rem;color:var(--soft)}
.facts b{color:var(--ink);font-weight:600;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--soft);font-size:.85rem}
pre{margin:6px 0 0;font:13px/1.45 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
"""
