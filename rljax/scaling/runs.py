"""Run folders as a sweep sees them: how far each is, and their curves as one table."""

import contextlib
import csv
import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rljax.config import FINISHED, RunConfig
from rljax.config_file import config_differences, read_yaml

State = Literal["waiting", "begun", "finished"]


def state_of(config: RunConfig) -> tuple[State, list[str]]:
    """How far the run of `config` is, and what of it differs from the run that its folder holds.

    A folder with nothing to lose, no checkpoint and no end, is that of a waiting run, whatever its config was. A run
    that ended under settings which may change, such as fewer `steps`, has begun: `rljax train` knows how to go on.
    """
    folder = Path(config.run_dir)
    is_finished = (folder / FINISHED).is_file()
    has_checkpoint = any(step.name.isdigit() for step in (folder / "checkpoints").glob("*"))
    if not is_finished and not has_checkpoint:
        return "waiting", []
    saved, now = read_yaml(folder / "config.yaml"), plain(config)
    differences = config_differences(saved, now)
    for side in (saved, now):
        side["model"]["remat"] = "auto"  # a run notes its choice
    return "finished" if is_finished and saved == now else "begun", differences


def plain(config: RunConfig) -> dict[str, Any]:
    """As its YAML is read: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run's files say so far."""

    step: int
    """The last that was logged; -1 before any."""
    first: float | None
    """pass@1 of the first evaluation."""
    last: float | None
    accelerator_seconds: float


def progress_of(run_dir: str | Path) -> Progress:
    """How far a run is; a half-written last line is skipped."""
    rows = read_curve(run_dir)
    metrics = _last_json_line(Path(run_dir) / "metrics.jsonl")
    return Progress(
        step=int(metrics.get("step", -1)),
        first=1 - float(rows[0]["test_loss"]) if rows else None,
        last=1 - float(rows[-1]["test_loss"]) if rows else None,
        accelerator_seconds=float(metrics.get("progress/accelerator_seconds", 0.0)),
    )


def _last_json_line(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 65_536))  # the end will do: a line has some thousand bytes
        for line in reversed(lines.read().split(b"\n")):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                return row
    return {}


def read_curve(run_dir: str | Path) -> list[dict[str, str]]:
    """Rows of a run's curves.csv; none where there is no file, and not the line a killed process was writing."""
    file = Path(run_dir) / "curves.csv"
    if not file.is_file():
        return []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    return list(csv.DictReader(whole.splitlines()))


def merge_curves(file: Path, runs: Sequence[tuple[str, Mapping[str, str]]]) -> int:
    """Writes the curves of several runs as one table, whole or not at all; returns the number of its rows.

    Rows of a step that trained also say how long its completions were, `completion_tokens`.

    Args:
      file: replaced where it exists; without any row, left as it is.
      runs: folder of each, and the columns that its rows get beside their own: its value on each axis of a sweep. A
        column that the run writes itself keeps the run's value.
    """
    rows: list[dict[str, str]] = []
    for folder, labels in runs:
        lengths = _lengths(folder)
        for row in read_curve(folder):
            measured = {"completion_tokens": lengths.get(row["step"], "")} if lengths else {}
            rows.append(dict(labels) | row | measured)
    if not rows:
        return 0
    written = list(dict.fromkeys(name for row in rows for name in row))
    # First what says which run it is, as people read it.
    columns = [name for name in ("run", "size", "tau") if name in written]
    columns += [name for name in written if name not in columns]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text.getvalue(), encoding="utf-8", newline="")
    os.replace(partial, file)
    return len(rows)


def _lengths(run_dir: str | Path) -> dict[str, str]:
    """Mean completion length by step, both as text, from a run's metrics.jsonl."""
    file = Path(run_dir) / "metrics.jsonl"
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").split("\n") if file.is_file() else ():
        with contextlib.suppress(ValueError):  # the line a killed process was writing
            row = json.loads(line)
            if row.get("completion/length_tokens") is not None:
                found[str(row["step"])] = f"{row['completion/length_tokens']:.6g}"
    return found
