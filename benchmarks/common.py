"""What benchmarks share: lines of results, and measuring while nothing else runs. Imports no JAX.

The format of a line is in README.md beside this file.
"""

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Line = dict[str, Any]

# -------------------------------------------------------------------------------------------------------------- lines


def commit() -> str:
    """Short commit of the checkout, with `+` when the code has changes that are not in it.

    A copy without its history says so, or what BENCH_COMMIT holds.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("BENCH_COMMIT", "unknown")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "rljax", "configs", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def describe_cpu() -> str:
    """The device of results taken on the CPU."""
    return f"{os.cpu_count()} x {platform.processor() or platform.machine()} CPU"


def versions(packages: Sequence[str], **others: str) -> dict[str, str]:
    """Of Python and of those of `packages` that are installed, then `others` as given."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):  # rljax may be a folder on PYTHONPATH
            found[name] = metadata.version(name)
    return found | others


def run_fields(bench: str, device: str, versions: dict[str, str]) -> Line:
    """The fields that all lines of one run have alike."""
    date = datetime.date.today().isoformat()
    return {"bench": bench, "device": device, "commit": commit(), "date": date, "versions": versions}


def summary(values: Sequence[float]) -> Line:
    """median, min, max and n, to four digits after the point, or four significant ones if smaller."""

    def short(value: float) -> float:
        return round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")

    middle = statistics.median(values)
    return {"median": short(middle), "min": short(min(values)), "max": short(max(values)), "n": len(values)}


def line(
    fields: Line,
    case: Line,
    metric: str,
    unit: str,
    values: Sequence[float],
    *,
    against: tuple[str, Line] | None = None,
) -> Line:
    """One line of results.

    Args:
      fields: `run_fields`.
      case: flat object of what was run.
      values: the repeats.
      against: name of a peer and fields about it: `peer_median`, `ratio`, and what else is worth keeping.
    """
    made = {**fields, "case": case, "metric": metric, "unit": unit, **summary(values)}
    if against:
        made |= {"peer": against[0], **against[1]}
    return made


def compared(ours: Sequence[float], peers: Sequence[float], *, more_is_better: bool = True) -> Line:
    """`peer_median` and friends of a comparison; a ratio above 1 means rljax is better."""
    mine, theirs = summary(ours)["median"], summary(peers)
    ratio = mine / theirs["median"] if more_is_better else theirs["median"] / mine
    return {
        "peer_median": theirs["median"],
        "peer_min": theirs["min"],
        "peer_max": theirs["max"],
        "ratio": round(ratio, 3),
    }


def append(file: Path, lines: Iterable[Line]) -> None:
    """Adds `lines` to `file` (JSON Lines), making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(made) + "\n" for made in lines)


# ---------------------------------------------------------------------------------------------------- a quiet machine

QUIET_CORES = 0.15
"""A repeat counts when everything but the process measured used fewer cores than this on average."""

_TICKS = os.sysconf("SC_CLK_TCK")


def machine_seconds() -> float:
    """CPU seconds the machine has been busy since it started; time taken by a hypervisor counts as busy."""
    with open("/proc/stat") as lines:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, lines.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def process_seconds(pid: int) -> float:
    """CPU seconds used by a process and by the children it has waited for."""
    return sum(map(int, _stat(pid)[11:15])) / _TICKS


def family_seconds(pid: int) -> float:
    """As `process_seconds`, and what those of its children that still run have used."""
    seconds = process_seconds(pid)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if int(_stat(int(entry.name))[1]) == pid:
                seconds += process_seconds(int(entry.name))
    return seconds


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may hold blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Meter:
    """Cores used by all but one process since the meter was made. Ticks of 10 ms: for a second and more."""

    def __init__(self, pid: int, own_seconds: Callable[[int], float] = process_seconds) -> None:
        self._pid, self._own_seconds = pid, own_seconds
        self._start = self._read()

    def _read(self) -> tuple[float, float]:
        return time.perf_counter(), machine_seconds() - self._own_seconds(self._pid)

    def foreign_cores(self) -> float:
        (then, before), (now, after) = self._start, self._read()
        return max(0.0, after - before) / max(now - then, 1e-9)


def wait_until_quiet(patience: float) -> bool:
    """Waits, `patience` seconds at most, for a second in which the rest of the machine was quiet."""
    until = time.perf_counter() + patience
    while True:
        meter = Meter(os.getpid())
        time.sleep(1.0)
        if meter.foreign_cores() <= QUIET_CORES:
            return True
        if time.perf_counter() > until:
            return False


@dataclass
class Contender:
    """Something to be timed."""

    name: str
    pid: int
    """The process that works while it runs."""
    run: Callable[[int], float]
    """Seconds of one repeat with this seed."""
    own_seconds: Callable[[int], float] = process_seconds
    """CPU seconds that are its own, of `pid`."""


def undisturbed(contender: Contender, seed: int, *, patience: float = 60.0, tries: int = 3) -> float | None:
    """Seconds of a repeat during which nothing else ran; None when every try was disturbed.

    Not for its share of a core: torch on two cores gets ten times slower when a third thread wants one.
    """
    for _ in range(tries):
        wait_until_quiet(patience)
        meter = Meter(contender.pid, contender.own_seconds)
        seconds = contender.run(seed)
        cores = meter.foreign_cores()
        counts = cores <= QUIET_CORES or seconds < 0.2  # too short for the clock's ticks
        note = "" if counts else f", not counted: {cores:.2f} cores used by others"
        print(f"    {contender.name}: {seconds:.2f} s{note}", flush=True)
        if counts:
            return seconds
    return None


def interleaved(
    contenders: Sequence[Contender],
    repeats: int,
    *,
    keep: Callable[[dict[str, list[float]]], set[str]] | None = None,
    measure: Callable[[Contender, int], float | None] = undisturbed,
) -> dict[str, list[float]]:
    """Seconds of the counted repeats of each contender, taken in turns: A B C A B C.

    Args:
      keep: called after the first round with what there is; those it does not name are not run again.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    running = list(contenders)
    for repeat in range(repeats):
        for contender in running:
            seconds = measure(contender, repeat)
            if seconds is not None:
                times[contender.name].append(seconds)
        if repeat == 0 and keep:
            named = keep(times)
            running = [contender for contender in running if contender.name in named]
    return times
