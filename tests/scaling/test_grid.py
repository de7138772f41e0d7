"""What a sweep file means: which runs, with which settings, under which names, from which warm starts."""

from pathlib import Path

import pytest
import yaml

from rljax.config import ConfigError
from rljax.config_file import config_of, parse_config
from rljax.scaling.grid import Sweep, read_sweep

SETTINGS = {"data": {"train": "task:arithmetic", "unique": 64, "prompts_per_step": 8}, "steps": 8}


@pytest.fixture
def meant(tmp_path: Path):
    """The sweep of a file with these keys."""

    def read(**keys: object) -> Sweep:
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump({"settings": SETTINGS, "folder": "out"} | keys, sort_keys=False))
        return read_sweep(file)

    return read


def test_every_combination_is_a_run_of_its_own_settings(meant) -> None:
    sweep = meant(axes={"size": ["tiny", "qwen2.5-0.5b"], "group_size": [2, 4], "seed": [0, 1]})
    assert [run.name for run in sweep.runs] == [
        f"{size}_group_size{group}_seed{seed}"
        for size in ("tiny", "qwen2.5-0.5b")
        for group in (2, 4)
        for seed in (0, 1)
    ]
    run = sweep.runs[3]
    assert run.config == config_of(
        [
            (SETTINGS, ""),
            ({"algorithm.group_size": 4, "seed": 1, "run_dir": "out/runs/tiny_group_size4_seed1"}, ""),
            ({"model": {"architecture": "tiny"}}, ""),
        ]
    )
    assert run.labels == {"size": "tiny", "group_size": "4", "seed": "1", "tau": "1"}
    assert run.start is None and sweep.starts == []


def test_any_setting_is_an_axis_and_labels_stand_for_several(meant) -> None:
    recipes = {"plain": {}, "dapo": {"algorithm": {"clip_high": 0.28}, "algorithm.overlong": "mask"}}
    sweep = meant(axes={"optimizer.learning_rate": ["1e-3", 0.01], "recipe": recipes, "order": ["file", "shuffle"]})
    assert [run.name for run in sweep.runs[:4]] == [
        "learning_rate1e-3_plain_order-file",
        "learning_rate1e-3_plain_order-shuffle",
        "learning_rate1e-3_dapo_order-file",
        "learning_rate1e-3_dapo_order-shuffle",
    ]
    config = sweep.runs[-1].config
    assert (config.optimizer.learning_rate, config.algorithm.clip_high, config.data.order) == (0.01, 0.28, "shuffle")
    assert (config.algorithm.overlong, sweep.runs[0].config.algorithm.overlong) == ("mask", "keep")
    assert sweep.runs[-1].labels["recipe"] == "dapo"


def test_tau_keeps_the_number_of_prompts(meant) -> None:
    sweep = meant(axes={"tau": [1, 4, 64], "size": ["tiny"]})
    assert [(r.config.data.unique, r.config.data.repeats) for r in sweep.runs] == [(64, 1), (16, 4), (1, 64)]
    assert [(run.name, run.labels["tau"]) for run in sweep.runs][1] == ("tau4_tiny", "4")


@pytest.mark.parametrize("tau", [3, 0, 128, "four"])
def test_a_tau_that_does_not_divide(meant, tau: object) -> None:
    with pytest.raises(ConfigError, match=r"divides data.unique x data.repeats = 64 x 1, the prompts of a run; set"):
        meant(axes={"tau": [tau]})


def test_a_run_in_two_grids_is_done_once_with_the_labels_of_both(meant) -> None:
    sizes, taus = {"size": ["tiny", "qwen2.5-0.5b"]}, {"size": ["tiny"], "tau": [1, 2], "unused": {"x": {}}}
    sweep = meant(axes=[sizes, taus])
    assert [run.name for run in sweep.runs] == ["tiny", "qwen2.5-0.5b", "tiny_tau2_x"]
    assert sweep.runs[0].labels == {"size": "tiny", "tau": "1", "unused": "x"}


def test_a_warm_start_is_shared_by_all_but_what_it_is_made_of(meant) -> None:
    sweep = meant(
        warm_start={"sft": {"steps": 7}, "seed": 5},
        axes={"size": ["tiny", "qwen2.5-0.5b"], "seed": [0, 1], "optimizer.learning_rate": [0.1, 0.2], "tau": [1, 2]},
    )
    assert len(sweep.runs) == 16
    assert [start.name for start in sweep.starts] == ["tiny", "qwen2.5-0.5b"]
    start = sweep.starts[1]
    assert start.folder == Path("out/starts/qwen2.5-0.5b")
    assert start.config == config_of(
        [
            (SETTINGS, ""),
            ({"model.architecture": "qwen2.5-0.5b", "sft.steps": 7, "seed": 5}, ""),
            ({"run_dir": "out/starts/qwen2.5-0.5b", "sft.output": "out/starts/qwen2.5-0.5b.partial"}, ""),
        ]
    )
    for run in sweep.runs:
        assert run.start is not None and run.config.model.path == str(run.start.folder)
        assert run.config.model.architecture == run.labels["size"] == run.start.name
        assert run.config.sft.steps == parse_config([]).sft.steps  # what is of the warm start stays there
    assert {run.config.seed for run in sweep.runs} == {0, 1}
    asked = meant(warm_start={}, axes={"data.system_prompt": ["Think.", "Answer."], "seed": [0, 1]})
    assert [start.config.data.system_prompt for start in asked.starts] == ["Think.", "Answer."]


def test_settings_lie_over_config_files(meant, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("steps: 3\nseed: 9\nrun_dir: elsewhere\n")
    (run,) = meant(config=str(tmp_path / "base.yaml"), axes={"size": ["tiny"]}).runs
    assert (run.config.steps, run.config.seed, run.config.run_dir) == (8, 9, "out/runs/tiny")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"axis": {}, "axes": {"seed": [0]}}, ["has the key 'axis'", "its keys are folder, config, settings"]),
        ({}, ["has no axes", "axes: {seed: [0, 1, 2]}"]),
        ({"axes": {"seed": 3}}, ["axis seed", "is 3", "write a list of values"]),
        ({"axes": {"run_dir": ["a", "b"]}}, ["axis run_dir", "are none"]),
        ({"axes": {"data.ordr": ["file"]}}, ["data.ordr", "perhaps you meant data.order", "sweep.yaml"]),
        ({"axes": {"group_size": ["many"]}}, ["algorithm.group_size = 'many'", "a whole number"]),
        ({"axes": ["seed"]}, ["axes in", "holds 'seed'", "a mapping of axes"]),
        ({"axes": {"seed": [0]}, "settings": {"run_dir": "x"}}, ["gives run_dir", "remove it"]),
        ({"axes": {"seed": [0]}, "warm_start": {"sft": {"output": "x"}}}, ["gives sft.output", "remove it"]),
        ({"axes": {"seed": [0]}, "settings": [1]}, ["settings in", "must be a mapping"]),
        ({"axes": [{"order": ["file"]}, {"order": {"file": {"steps": 9}}}]}, []),
        ({"axes": [{"a": {"x": {}}}, {"a": {"x": {"steps": 9}}}]}, ["would both be called x", "other labels"]),
    ],
)
def test_what_a_sweep_file_cannot_say(meant, keys: dict, words: list[str]) -> None:
    if not words:  # different names
        assert len(meant(**keys).runs) == 2
        return
    with pytest.raises(ConfigError) as caught:
        meant(**keys)
    assert all(word in str(caught.value) for word in words), caught.value


def test_names_are_those_of_files(meant) -> None:
    (run,) = meant(axes={"model.tokenizer": ["../a b/c"], "data.system_prompt": ["x;y"]}).runs
    assert run.name == "tokenizer-..-a-b-c_system_prompt-x-y"
