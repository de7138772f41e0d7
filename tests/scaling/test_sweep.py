"""A sweep as a user meets it: killed and started again it gives the table of one unbroken, what is finished is not done
again, what failed is said and stops nothing, and runs of other settings are refused."""

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rljax.cli import USAGE_ERROR, main
from rljax.config import ConfigError
from rljax.config_file import parse_config
from rljax.scaling.grid import read_sweep
from rljax.scaling.sweep import _terminable, commands, run_sweep

SETTINGS: dict[str, Any] = {
    "steps": 6,
    "model": {"architecture": "tiny", "remat": "none"},
    "data": {
        "train": "task:char_count",
        "prompts_per_step": 4,
        "unique": 24,
        "order": "shuffle",
        "max_prompt_tokens": 32,
        "task_records": 32,
    },
    "sampling": {"max_completion_tokens": 8, "chunk_tokens": 7},
    "reward": {"workers": 1},
    "algorithm": {"group_size": 4, "updates_per_step": 1, "kl_coefficient": 0.0, "old_logprobs": "behaviour"},
    "optimizer": {"learning_rate": "3e-4"},
    "evaluation": {"data": "task:char_count", "max_prompts": 4, "samples_per_prompt": 4, "temperature": 1.0},
    "checkpoint": {"every": 2},
    "logging": {"rollouts": 0},
    "sft": {"steps": 3, "batch_size": 8, "learning_rate": "5e-3"},
}


def write(folder: Path, **keys: Any) -> Path:
    """A sweep file in `folder` that writes below it; two taus from one warm start unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"folder": str(folder / "out"), "settings": SETTINGS, "warm_start": {}, "axes": {"tau": [1, 2]}} | keys
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "sweep.yaml"


def table(folder: Path) -> list[dict[str, str]]:
    """The merged curves without what a clock gives."""
    rows = csv.DictReader((folder / "out" / "curves.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "accelerator_seconds"} for row in rows]


def made(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below the folder, with its size and time."""
    files = (file for file in (folder / "out").rglob("*") if file.is_file() and file.name not in ("lock", "curves.csv"))
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert main(["sweep", str(write(folder))]) == 0
    return folder


def test_the_table_of_a_sweep(unbroken: Path) -> None:
    rows = table(unbroken)
    assert [(row["run"], row["size"], row["tau"], row["step"]) for row in rows] == [
        (f"tau{tau}", "tiny", str(tau), str(step)) for tau in (1, 2) for step in range(7)
    ]
    assert {row["unique"] for row in rows[:7]} == {"24"} and {row["unique"] for row in rows[7:]} == {"12"}
    last = rows[6]
    assert (last["samples"], last["group_size"], last["order"], last["seed"]) == ("24", "4", "shuffle", "0")
    for name in ("flops", "full_flops", "full_flops_non_embedding", "tokens", "num_non_embedding_params"):
        assert float(last[name]) > 0
    assert float(last["full_flops_non_embedding"]) < float(last["full_flops"])
    # Both begin from the one warm start, with the same questions and draws.
    assert rows[0]["test_loss"] == rows[7]["test_loss"]
    assert sorted(file.name for file in (unbroken / "out" / "starts").iterdir()) == ["start", "start.yaml"]


def test_a_sweep_killed_in_the_middle_of_a_run_gives_the_same_table(unbroken: Path, tmp_path: Path) -> None:
    file = write(tmp_path)
    run = tmp_path / "out" / "runs" / "tau1"
    shutil.copytree(unbroken / "out" / "starts", tmp_path / "out" / "starts")  # saves the time to make it again
    process = subprocess.Popen(
        [sys.executable, "-m", "rljax.cli", "sweep", str(file)], start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / "2").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "finished.json").exists() and not run.with_name("tau2").exists()
    warm = (tmp_path / "out" / "starts" / "start" / "model.safetensors").stat().st_mtime_ns
    assert main(["sweep", str(file)]) == 0
    assert table(tmp_path) == table(unbroken)
    assert "resuming" in (tmp_path / "out" / "logs" / "tau1.log").read_text()
    assert (tmp_path / "out" / "starts" / "start" / "model.safetensors").stat().st_mtime_ns == warm


def test_what_is_finished_is_not_done_again(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, rows = made(unbroken), table(unbroken)
    (unbroken / "out" / "curves.csv").unlink()
    assert main(["sweep", str(unbroken / "sweep.yaml")]) == 0
    assert made(unbroken) == before and table(unbroken) == rows
    said = capsys.readouterr().out
    assert "2 of 2 runs finished" in said and "6/6" in said and "curves.csv" in said


def test_other_settings_than_those_of_a_run_are_refused(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = made(unbroken)
    other = SETTINGS | {"optimizer": {"learning_rate": "1e-4"}, "logging": {"rollouts": 2}}
    file = unbroken / "other.yaml"
    tree = yaml.safe_load((unbroken / "sweep.yaml").read_text())
    file.write_text(yaml.safe_dump(tree | {"settings": other, "axes": {"tau": [2, 4]}}, sort_keys=False))
    for flags in ([], ["--print"]):
        assert main(["sweep", str(file), *flags]) == USAGE_ERROR
        said = capsys.readouterr().err
        assert "runs/tau2 (optimizer.learning_rate: 0.0003 -> 0.0001)" in said and said.count("->") == 2
        assert "give another folder, or remove those named" in said
    assert made(unbroken) == before


def test_another_warm_start_than_the_one_there_is_refused(unbroken: Path) -> None:
    file = unbroken / "other.yaml"
    tree = yaml.safe_load((unbroken / "sweep.yaml").read_text())
    file.write_text(yaml.safe_dump(tree | {"warm_start": {"sft.steps": 4}, "axes": {"tau": [4]}}))
    with pytest.raises(ConfigError, match=r"starts/start \(sft.steps: 3 -> 4\)"):
        commands(read_sweep(file))
    settings = tree["settings"] | {"data.system_prompt": "a"}
    file.write_text(yaml.safe_dump(tree | {"settings": settings, "axes": {"tau": [4]}}))
    with pytest.raises(ConfigError, match=r"starts/start \(data.system_prompt:  -> a\)"):
        commands(read_sweep(file))
    # What a warm start does not read may differ: it is shared by runs that do.
    file.write_text(yaml.safe_dump(tree | {"axes": {"tau": [4], "group_size": [2], "optimizer.learning_rate": [0.1]}}))
    assert len(commands(read_sweep(file))) == 2


def test_a_run_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = SETTINGS | {"steps": 1, "evaluation": SETTINGS["evaluation"] | {"every": 0}}
    sizes = {"lost": {"data.train": "task:chess"}, "found": {}}
    file = write(tmp_path, settings=quick, axes={"which": sizes})
    del (tree := yaml.safe_load(file.read_text()))["warm_start"]
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert main(["sweep", str(file)]) == 1
    said = capsys.readouterr().out
    log = tmp_path / "out" / "logs" / "lost.log"
    assert f"lost: exit code 64; the end of {log}:" in said and "'task:chess'" in said and "1 of 2 runs" in said
    assert {(row["run"], row["which"]) for row in table(tmp_path)} == {("found", "found")}
    assert [line for line in commands(read_sweep(file)) if line[0] != "#"] == [
        f"rljax train {tmp_path}/out/configs/lost.yaml"
    ]
    assert parse_config([f"{tmp_path}/out/configs/lost.yaml"]) == read_sweep(file).runs[0].config
    # It has nothing to lose, so it may be put right; the other is not touched.
    found = made(tmp_path / "out" / "runs")
    tree["axes"]["which"]["lost"] = {"seed": 1}
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert main(["sweep", str(file)]) == 0
    assert {row["run"] for row in table(tmp_path)} == {"lost", "found"}
    assert found.items() <= made(tmp_path / "out" / "runs").items()


def test_without_its_warm_start_no_run_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, warm_start={"data.train": "task:chess"})
    shown: list[list[str]] = []
    failures = run_sweep(read_sweep(file), lambda statuses: shown.append([status.outcome for status in statuses]))
    assert [failure.name for failure in failures] == ["warm start start"] and "'task:chess'" in failures[0].tail
    assert main(["sweep", str(file)]) == 1
    assert capsys.readouterr().out.count("no warm start") == 2
    assert not (tmp_path / "out" / "runs").exists()


def test_the_printed_commands_are_what_the_sweep_does(unbroken: Path, tmp_path: Path) -> None:
    file = write(tmp_path)
    lines = commands(read_sweep(file))
    out = tmp_path / "out"
    assert [line for line in lines if line[0] != "#"] == [
        f"rm -rf {out}/starts/start.partial && rljax sft {out}/starts/start.yaml && "
        f"mv {out}/starts/start.partial {out}/starts/start",
        f"rljax train {out}/configs/tau1.yaml",
        f"rljax train {out}/configs/tau2.yaml",
    ]
    assert not (out / "runs").exists() and not (out / "curves.csv").exists()
    for name, config in (("tau1", read_sweep(file).runs[0].config), ("tau2", read_sweep(file).runs[1].config)):
        assert parse_config([f"{out}/configs/{name}.yaml"]) == config
    assert [line for line in commands(read_sweep(unbroken / "sweep.yaml")) if line[0] != "#"] == []


def children(process: int) -> list[int]:
    """Processes that it started and that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == process and state != "Z":
                found.append(int(folder.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; elsewhere the lock alone keeps a second run away")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_by_a_signal_it_ends_its_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    # A warm start that is still at work when the signal comes, however fast the machine.
    endless = {"sft": {"steps": 1_000_000}}
    file = write(tmp_path, settings=SETTINGS | {"steps": 0}, axes={"tau": [1], "repeats": [9]}, warm_start=endless)
    log = tmp_path / "out" / "logs" / "start-start.log"
    process = subprocess.Popen(
        [sys.executable, "-m", "rljax.cli", "sweep", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text()):  # its first words come after it bound itself to the sweep
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    (run,) = children(process.pid)
    assert (
        os.getpgid(run) == run
    )  # a terminal's Ctrl-C, for the sweep's group, does not reach it beside the sweep's own
    with pytest.raises(ConfigError, match=r"another sweep, or a run that one started, is at work in"):
        run_sweep(read_sweep(file), lambda statuses: None)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130 and b"interrupted; the same command resumes" in said
        assert "interrupted" in log.read_text()
    assert not (tmp_path / "out" / "starts" / "start").exists()
    # The folder is free again: no process of the sweep lives on.
    failures = run_sweep(read_sweep(write(tmp_path, warm_start={"data.train": "task:chess"})), lambda statuses: None)
    assert len(failures) == 1


def test_a_closed_terminal_is_as_ctrl_c_but_not_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with pytest.raises(KeyboardInterrupt), _terminable():
            signal.raise_signal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with _terminable():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
