"""`rljax eval` from the command line: sets in, predictions and tables out, whatever the weights come from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rljax.cli import USAGE_ERROR, main
from rljax.config import ConfigError
from rljax.data.tasks import TASKS
from rljax.evaluate import sets
from rljax.evaluate.held_out import repaired_prompt
from rljax.evaluate.sets import read_sets
from rljax.policy import LoadedRun, load_run
from rljax.types import PromptRecord

SETTINGS: dict[str, Any] = {
    "model": {"architecture": "tiny", "remat": "none"},
    "data": {"train": "task:char_count", "prompts_per_step": 4, "max_prompt_tokens": 32, "task_records": 16},
    "sampling": {"max_completion_tokens": 8},
    "reward": {"workers": 1, "timeout_seconds": 60},
    "algorithm": {"group_size": 4, "updates_per_step": 1, "kl_coefficient": 0.0, "microbatch_tokens": 512},
    "steps": 1,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, two sets in a folder, and a run of one step with its folder of weights."""
    root = tmp_path_factory.mktemp("eval")
    (root / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    (root / "sets").mkdir()
    records = TASKS["char_count"].records("eval", 6, 0)
    for name, part in (("easy", records[:4]), ("hard", records[4:])):
        rows = [
            {"prompt": r.prompt[0]["content"], "ground_truth": r.ground_truth, "data_source": r.data_source}
            for r in part
        ]
        if name == "easy":
            rows.insert(1, rows[0] | {"prompt": "a:" + "b" * 60})  # too long
        (root / "sets" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["train", str(root / "run.yaml"), "--run_dir", str(root / "run")]) == 0
    assert main(["convert", str(root / "run"), str(root / "hf")]) == 0
    return root


def evaluate(root: Path, name: str, *flags: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(predictions, results) of `rljax eval` on the sets."""
    out = root / name
    given = ["--eval.data", str(root / "sets"), "--eval.output", str(out), "--eval.samples_per_prompt", "4", *flags]
    assert main(["eval", str(root / "run.yaml"), *given]) == 0
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return lines, json.loads((out / "results.json").read_text())


def drawn(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(line[k] for k in ("set", "place", "sample", "response", "score", "num_tokens")) for line in lines]


def test_a_run_and_the_folder_written_of_it_are_one_policy(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, results = evaluate(root, "of run", "--eval.run", str(root / "run"))
    assert "mean over data sources" in capsys.readouterr().out
    again, of_folder = evaluate(root, "of folder", "--model.path", str(root / "hf"))
    assert drawn(lines) == drawn(again)
    assert len({line["response"] for line in lines}) > 5
    assert (results["step"], of_folder["step"]) == (1, None)
    other, _ = evaluate(root, "of random weights", "--seed", "1")
    assert drawn(other) != drawn(lines)


def test_a_run_is_computed_in_what_was_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[LoadedRun] = []

    def load(*given: Any, **named: Any) -> LoadedRun:
        opened.append(load_run(*given, **named))
        return opened[-1]

    monkeypatch.setattr(sets, "load_run", load)
    evaluate(root, "bfloat16", "--eval.run", str(root / "run"), "--model.compute_dtype", "bfloat16")
    assert opened[0].policy.compute_dtype == "bfloat16"


def test_counts_and_places(root: Path) -> None:
    lines, results = evaluate(root, "counts", "--model.path", str(root / "hf"))
    easy, hard = results["sets"]
    assert (easy["name"], easy["prompts"], easy["dropped"]) == ("easy", 4, 1)
    assert (hard["name"], hard["prompts"], hard["dropped"]) == ("hard", 2, 0)
    assert [line["place"] for line in lines if line["set"] == "easy"][::4] == [0, 2, 3, 4]
    assert results["overall"] == pytest.approx(np.mean([easy["mean"]["value"], hard["mean"]["value"]]))
    assert set(easy["passed"]) == {"1", "2", "4"}
    assert results["settings"]["temperature"] == 0.7 and results["mode"] == "fixed"
    assert results["reward"]["name"] == "auto" and results["reward"]["timeout_seconds"] == 60


def test_a_prompt_is_drawn_alike_whatever_is_beside_it(root: Path) -> None:
    whole, _ = evaluate(root, "whole", "--model.path", str(root / "hf"))
    first, _ = evaluate(root, "first", "--model.path", str(root / "hf"), "--eval.max_prompts", "1")
    assert drawn(first) == [line for line in drawn(whole) if line[:2] in (("easy", 0), ("hard", 0))]


def test_greedy_completions_are_all_the_same(root: Path) -> None:
    lines, _ = evaluate(root, "greedy", "--model.path", str(root / "hf"), "--eval.temperature", "0")
    for place in (0, 2):
        assert len({line["response"] for line in lines if line["place"] == place and line["set"] == "easy"}) == 1


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "eval.data is empty"),
        (["--eval.data", "nowhere.jsonl"], "nowhere.jsonl' does not exist"),
        (["--eval.data", "SETS", "SETS/easy.jsonl"], "more than one set easy"),
        (["--eval.data", "SETS", "--eval.run", "SETS"], "holds no config.yaml"),
        (["--eval.data", "SETS", "--eval.run", "RUN", "--eval.step", "7"], "step 7 was asked for"),
        (["--eval.data", "SETS", "--eval.step", "1"], "eval.step = 1 is a step of a run, and eval.run is empty"),
        (
            ["--eval.data", "SETS", "--eval.run", "RUN", "--model.path", "SETS"],
            "(the run's -> given): model.path: ",
        ),
        (
            ["--eval.data", "SETS", "--eval.run", "RUN", "--sampling.stop_token_ids", "2", "3"],
            "ids: [] -> [2, 3]",
        ),
        (["--eval.data", "SETS", "--eval.run", "RUN", "--mesh.fsdp", "99"], "mesh.fsdp = 99"),
        (["--eval.data", "SETS", "--eval.output", "DONE"], "holds predictions already"),
        (["--eval.data", "POETRY"], "data_source = 'poetry' has no verifier"),
    ],
)
def test_what_is_refused(root: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    (root / "done").mkdir(exist_ok=True)
    (root / "done" / "predictions.jsonl").touch()
    (root / "poetry.jsonl").write_text('{"prompt": "a:b", "ground_truth": "1"}\n')
    names = {"SETS": root / "sets", "RUN": root / "run", "DONE": root / "done", "POETRY": root / "poetry.jsonl"}
    for name, path in names.items():
        flags = [flag.replace(name, str(path)) for flag in flags]
    assert main(["eval", str(root / "run.yaml"), *flags]) == USAGE_ERROR
    assert says in capsys.readouterr().err


def test_a_folder_without_sets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \.parquet or \.jsonl file"):
        read_sets([str(tmp_path)])


@pytest.mark.parametrize(
    "content, repaired",
    [
        ("[{'role': 'user', 'content': 'def f():\\n    pass'}]", ({"role": "user", "content": "def f():\n    pass"},)),
        ("[{'role': 'user'}]", None),
        ("[{broken", None),
        ("def f():", None),
    ],
)
def test_stringified_prompts(content: str, repaired: Any) -> None:
    record = PromptRecord(({"role": "user", "content": content},), "codegen__humaneval", "{}")
    assert repaired_prompt(record).prompt == (repaired or record.prompt)


def test_every_prompt_of_the_papers_humaneval_is_stringified(shared_data: Path) -> None:
    file = shared_data / "guru_math" / "online_eval" / "codegen__humaneval_164.parquet"
    (one,) = read_sets([str(file)])
    assert len(one.records) == 164
    for record in one.records:
        fixed = repaired_prompt(record).prompt
        assert fixed != record.prompt and fixed[-1]["role"] == "user" and not fixed[-1]["content"].startswith("[")
