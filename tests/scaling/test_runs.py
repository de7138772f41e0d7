"""How far a run is, from its files; and the curves of many as one table."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from rljax.config import RunConfig
from rljax.config_file import config_of, dump_config
from rljax.scaling.runs import merge_curves, progress_of, state_of


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return config_of([({"run_dir": str(tmp_path / "run"), "steps": 4}, "")])


def _leave(config: RunConfig, *, checkpoint: bool = False, finished: bool = False, remat: str = "dots") -> None:
    """What a run leaves in its folder."""
    folder = Path(config.run_dir)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config).replace("remat: auto", f"remat: {remat}"))
    if checkpoint:
        (folder / "checkpoints" / "2").mkdir(parents=True)
    if finished:
        (folder / "finished.json").write_text('{"step": 4}')


def test_states(config: RunConfig) -> None:
    assert state_of(config) == ("waiting", [])
    _leave(config)
    (Path(config.run_dir) / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    assert state_of(dataclasses.replace(config, seed=3)) == ("waiting", [])  # there is nothing to lose
    _leave(config, checkpoint=True)
    assert state_of(config) == ("begun", [])
    _leave(config, finished=True)
    assert state_of(config) == ("finished", [])  # although remat is no longer "auto"
    assert state_of(dataclasses.replace(config, steps=6)) == ("begun", [])
    assert state_of(dataclasses.replace(config, seed=3)) == ("begun", ["seed: 0 -> 3"])


def test_a_run_with_stop_tokens_is_itself(config: RunConfig) -> None:
    """Tuples are lists in YAML."""
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, stop_token_ids=(1, 2)))
    _leave(config, finished=True)
    assert state_of(config) == ("finished", [])


def test_progress(tmp_path: Path) -> None:
    empty = progress_of(tmp_path)
    assert (empty.step, empty.first, empty.last, empty.accelerator_seconds) == (-1, None, None, 0.0)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(300):
            row = {"step": step, "progress/accelerator_seconds": 2.0 * step, **{f"m{i}": 0.5 for i in range(60)}}
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 300, "progress/acc')
    (tmp_path / "curves.csv").write_text("step,test_loss\n0,0.75\n4,0.5\n8,0.")  # the last line is torn
    done = progress_of(tmp_path)
    assert (done.step, done.first, done.last, done.accelerator_seconds) == (299, 0.25, 0.5, 598.0)


def test_curves_of_several_runs_are_one_table(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "curves.csv").write_text("run,step,test_loss,seed\na,0,0.9,0\na,1,0.8,0\na,2,0.7")
    (tmp_path / "b" / "curves.csv").write_text("run,step,test_loss,seed\nb,0,0.6,1\n")
    runs = [
        (str(tmp_path / "a"), {"size": "tiny", "seed": "zero"}),
        (str(tmp_path / "b"), {"size": "large", "recipe": "x, y"}),
        (str(tmp_path / "c"), {"size": "none yet"}),
    ]
    file = tmp_path / "curves.csv"
    assert merge_curves(file, runs[2:]) == 0 and not file.exists()
    assert merge_curves(file, runs) == 3
    assert list(csv.DictReader(file.read_text().splitlines())) == [
        {"run": "a", "size": "tiny", "seed": "0", "step": "0", "test_loss": "0.9", "recipe": ""},
        {"run": "a", "size": "tiny", "seed": "0", "step": "1", "test_loss": "0.8", "recipe": ""},
        {"run": "b", "size": "large", "seed": "1", "step": "0", "test_loss": "0.6", "recipe": "x, y"},
    ]
    assert file.read_text().startswith("run,size,")
    before = file.read_bytes()
    assert merge_curves(file, runs[2:]) == 0 and file.read_bytes() == before


def test_the_table_says_how_long_completions_were(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "curves.csv").write_text("run,step,test_loss\na,0,0.9\na,1,0.8\na,2,0.7\n")
    (tmp_path / "a" / "metrics.jsonl").write_text(
        '{"step": 0, "eval/pass@1": 0.1}\n{"step": 1, "completion/length_tokens": 31.5}\n{"step": 2, "completion/len'
    )
    file = tmp_path / "curves.csv"
    assert merge_curves(file, [(str(tmp_path / "a"), {})]) == 3
    assert [row["completion_tokens"] for row in csv.DictReader(file.read_text().splitlines())] == ["", "31.5", ""]


def test_a_table_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "curves.csv").write_text("run,step,test_loss\na,0,0.9\n")
    file = tmp_path / "merged.csv"
    file.write_text("old")

    def stop(*places: object) -> None:
        assert file.read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_curves(file, [(str(tmp_path), {})])
    assert file.read_text() == "old"
