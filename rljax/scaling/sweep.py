"""`rljax sweep`: many runs, one after the other on this machine, or as commands for others.

What is done is read from the run folders themselves, so it does not matter who did it, nor when the sweep was stopped:
finished runs are skipped, one that has begun resumes from its checkpoint, and a run that failed is tried again.
"""

import contextlib
import dataclasses
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from rljax.config import ConfigError, RunConfig
from rljax.config_file import config_differences, dump_config, read_yaml
from rljax.scaling.grid import PlannedRun, Sweep, WarmStart
from rljax.scaling.runs import Progress, merge_curves, plain, progress_of, state_of

logger = logging.getLogger(__name__)

TAIL_LINES = 15
"""Of what a failed command said, shown at the end."""
_GRACE_SECONDS = 30.0
"""For an interrupted run to end by itself."""

_BOUND = """
import ctypes, os, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv.pop(1)):  # it ended before that
    sys.exit(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a script it would be ignored
runpy.run_module("rljax.cli", run_name="__main__", alter_sys=True)
"""
"""`python -m rljax.cli`, killed by the kernel when the sweep ends: in a session of its own, the run would outlive a
sweep that was killed, and hold its folder. Not a preexec_fn: with it Python really forks, and threads do not survive
that."""

_LOCK_SECONDS = 5.0
"""For the run of a sweep that was just killed to be gone."""

_START_READS = (
    *("data.train", "data.task_records", "data.seed", "data.system_prompt"),
    *("seed", "model", "sft", "optimizer", "lora"),
)
_START_REPLACES = ("sft.output", "optimizer.learning_rate", "optimizer.weight_decay")

Outcome = Literal["waiting", "running", "finished", "failed", "no warm start"]


@dataclasses.dataclass
class Status:
    """A run in the table."""

    run: PlannedRun
    outcome: Outcome
    progress: Progress


@dataclasses.dataclass(frozen=True)
class Failure:
    """A command that did not end well."""

    name: str
    exit_code: int
    log: Path
    tail: str
    """Last lines of what it said."""


def check(sweep: Sweep) -> list[PlannedRun]:
    """The runs that are not finished.

    Raises:
      ConfigError: a run, or a warm start, was made with other settings than the sweep gives it now.
    """
    changed: list[str] = []
    left: list[PlannedRun] = []
    for run in sweep.runs:
        state, differences = state_of(run.config)
        if differences:
            changed.append(f"{run.config.run_dir} ({'; '.join(differences)})")
        elif state != "finished":
            left.append(run)
    changed += [f"{start.folder} ({'; '.join(lines)})" for start in sweep.starts if (lines := _start_changes(start))]
    if changed:
        raise ConfigError(
            f"{sweep.file} now differs from what was begun (then -> now): {', '.join(changed)}. To go on, give the "
            "values of then; to start anew, give another folder, or remove those named"
        )
    return left


def _start_changes(start: WarmStart) -> list[str]:
    """What of a warm start that is there was made otherwise; its config is kept beside it."""
    kept = _config_file(start)
    if not start.folder.is_dir() or not kept.is_file():
        return []
    lines = config_differences(read_yaml(kept), plain(start.config), but=("sft",))

    def is_under(line: str, names: tuple[str, ...]) -> bool:
        return line.startswith(tuple(f"{name}{mark}" for name in names for mark in ".:"))

    return [line for line in lines if is_under(line, _START_READS) and not is_under(line, _START_REPLACES)]


def _config_file(made: PlannedRun | WarmStart) -> Path:
    """Where the config that its command reads is."""
    if isinstance(made, WarmStart):
        return made.folder.with_suffix(f"{made.folder.suffix}.yaml")
    folder = Path(made.config.run_dir)
    return folder.parents[1] / "configs" / f"{made.name}.yaml"


def _write_config(file: Path, config: RunConfig) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(dump_config(config), encoding="utf-8")
    os.replace(partial, file)


def commands(sweep: Sweep) -> list[str]:
    """Shell lines that do what is left, for other machines that see the same folder; writes the configs they read.

    Each line holds for itself: warm starts first, then runs in any order. A comment line stands before either.

    Raises:
      ConfigError: as `check`.
    """
    left = check(sweep)
    lines: list[str] = []
    missing = [start for start in sweep.starts if not start.folder.is_dir() and any(r.start == start for r in left)]
    for start in missing:
        _write_config(_config_file(start), start.config)
        partial, whole = shlex.quote(start.config.sft.output), shlex.quote(str(start.folder))
        sft = f"rljax sft {shlex.quote(str(_config_file(start)))}"
        lines.append(f"rm -rf {partial} && {sft} && mv {partial} {whole}")
    if missing:
        lines.insert(0, "# warm starts, before the runs")
    count = f"{len(left)} of {len(sweep.runs)} runs"
    lines.append(f"# {count}, in any order; then `rljax sweep {sweep.file}` for the table")
    for run in left:
        _write_config(_config_file(run), run.config)
        lines.append(f"rljax train {shlex.quote(str(_config_file(run)))}")
    return lines


def run_sweep(sweep: Sweep, show: Callable[[list[Status]], None]) -> list[Failure]:
    """Does what is left, one command at a time; returns those that failed.

    `folder`/curves.csv, the curves of all runs, is written anew before the first and after each.

    Args:
      show: called with the state of all runs, now and then.

    Raises:
      ConfigError: as `check`; or another sweep is at work in the folder.
    """
    with _only_one(sweep.folder) as lock, _terminable():
        left = [run.name for run in check(sweep)]
        statuses = [
            Status(run, "waiting" if run.name in left else "finished", progress_of(run.config.run_dir))
            for run in sweep.runs
        ]
        failures: list[Failure] = []
        _merge(sweep)
        show(statuses)
        for status in statuses:
            if status.outcome == "finished":
                continue
            start = status.run.start
            if start is not None and not start.folder.is_dir():
                tried = any(failure.name == f"warm start {start.name}" for failure in failures)
                if tried or not _make_start(sweep, start, failures, lock, lambda: show(statuses)):
                    status.outcome = "no warm start"
                    continue
            _train(sweep, status, failures, lock, lambda: show(statuses))
            _merge(sweep)
        show(statuses)
        return failures


def _make_start(sweep: Sweep, start: WarmStart, failures: list[Failure], lock: int, tick: Callable[[], None]) -> bool:
    """Whether it is there now."""
    _write_config(_config_file(start), start.config)
    shutil.rmtree(start.config.sft.output, ignore_errors=True)  # of one that was killed
    name = f"warm start {start.name}"
    failure = _execute(name, ["sft", str(_config_file(start))], _log(sweep, f"start-{start.name}"), lock, tick)
    if failure is None:
        os.rename(start.config.sft.output, start.folder)  # whole, or not there
        return True
    failures.append(failure)
    return False


def _train(sweep: Sweep, status: Status, failures: list[Failure], lock: int, tick: Callable[[], None]) -> None:
    run = status.run
    _write_config(_config_file(run), run.config)
    status.outcome = "running"

    def look() -> None:
        status.progress = progress_of(run.config.run_dir)
        tick()

    look()
    failure = _execute(run.name, ["train", str(_config_file(run))], _log(sweep, run.name), lock, look)
    status.progress = progress_of(run.config.run_dir)
    status.outcome = "finished" if failure is None else "failed"
    if failure is not None:
        failures.append(failure)


def _execute(name: str, arguments: list[str], log: Path, lock: int, tick: Callable[[], None]) -> Failure | None:
    """Runs a subcommand in a process of its own and waits; what it says is added to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = log.stat().st_size if log.is_file() else 0
    logger.info("%s: begins; its log is %s", name, log)
    started = time.perf_counter()
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOUND, str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            # Held by the run as well: until it has ended too, no second sweep starts the same run beside it.
            pass_fds=(lock,),
            # Ctrl-C reaches every process of the terminal's foreground; the run is to hear of it once, from `_stop`.
            start_new_session=True,
        )
        try:
            code = _wait(process, tick)
        except BaseException:
            _stop(process)
            raise
    logger.info("%s: exit code %d after %.0f s", name, code, time.perf_counter() - started)
    if code == 0:
        return None
    with log.open("rb") as said:
        said.seek(begin)
        lines = said.read().decode(errors="replace").splitlines()
    return Failure(name, code, log, "\n".join(lines[-TAIL_LINES:]))


def _wait(process: "subprocess.Popen[bytes]", tick: Callable[[], None]) -> int:
    while True:
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            tick()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Interrupts a command, and ends it if that is not enough or Ctrl-C comes again."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning("what was running did not end within %.0f s of its interruption: killed", _GRACE_SECONDS)
    finally:
        process.kill()  # nothing, where it has ended
        process.wait()


def _log(sweep: Sweep, name: str) -> Path:
    return sweep.folder / "logs" / f"{name}.log"


def _merge(sweep: Sweep) -> None:
    merge_curves(sweep.folder / "curves.csv", [(run.config.run_dir, run.labels) for run in sweep.runs])


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    """Holds the folder for this sweep; gives the descriptor of the lock, for the processes it starts."""
    import fcntl  # not on Windows, where the rest of this module can still be imported

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"another sweep, or a run that one started, is at work in {folder}; wait until it has ended, "
                        "or end it"
                    ) from None
                time.sleep(0.1)
        yield file.fileno()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that closes, are as Ctrl-C, so that the run is stopped too."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signals = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in signals}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
