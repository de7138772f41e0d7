"""Saved predictions: the table made of them, and scoring them anew without a model."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rljax.cli import USAGE_ERROR, main
from rljax.config import ConfigError, RewardConfig
from rljax.evaluate.predictions import (
    PREDICTIONS,
    RESULTS,
    overall,
    rescore,
    summarise_set,
    table_rows,
    write_results,
)

CHEAP = "\\boxed{2}"
"""For the truth 2 sqrt 3: what the paper's rule rewards and the fixed one does not."""


def line(place: int, score: float, **others: Any) -> dict[str, Any]:
    made = {
        "set": "math",
        "place": place,
        "sample": 0,
        "data_source": "math__math",
        "response": "so \\boxed{2\\sqrt{3}}",
        "ground_truth": "2\\sqrt{3}",
        "extra_info": {"index": place},
        "stop_reason": "stop",
        "num_tokens": 10,
        "score": score,
        "error": "",
        "seconds": 0.1,
    }
    return made | others


def test_a_set() -> None:
    lines = [
        line(0, 1, sample=0),
        line(0, 0, sample=1, response="\\boxed{7}", stop_reason="length"),
        line(3, 0, sample=0, response="none", data_source="math__deep", error="unparseable: no"),
        line(3, 0, sample=1, response="none", data_source="math__deep", num_tokens=30),
    ]
    found = summarise_set("math", lines, dropped=5)
    assert (found.prompts, found.dropped, found.samples_per_prompt) == (2, 5, 2)
    assert (found.mean.value, found.mean.standard_error) == (0.25, pytest.approx(0.25))
    assert (found.passed[1].value, found.passed[2].value) == (0.25, 0.5)
    assert found.majority is not None and found.majority.value == 0.5
    assert {name: estimate.value for name, estimate in found.by_source.items()} == {"math__math": 0.5, "math__deep": 0}
    assert found.undecided == {"unparseable": 0.25}
    assert (found.truncated, found.mean_tokens) == (0.25, 15)
    assert overall([found]) == 0.25


def test_the_overall_score_weighs_sources_alike() -> None:
    """As the paper's, which is not the mean over problems."""
    first = summarise_set("a", [line(i, 1) for i in range(9)] + [line(9, 0, data_source="math__deep")])
    second = summarise_set("b", [line(0, 0, data_source="openai/gsm8k")])
    assert overall([first, second]) == pytest.approx(1 / 3)


def test_unequal_numbers_of_completions_are_refused() -> None:
    with pytest.raises(ConfigError, match="with 1 and with 2 completions"):
        summarise_set("math", [line(0, 1), line(0, 1), line(1, 1)])


def test_the_table() -> None:
    one = summarise_set("math", [line(0, 1), line(1, 0, stop_reason="length")], dropped=1)
    assert table_rows([one]) == [
        ["set", "prompts", "dropped", "pass@1", "tokens", "truncated", "undecided"],
        ["math", "2", "1", "0.500 ± 0.500", "10", "50.0 %", "0.0 %"],
    ]
    grids = [line(0, s, data_source="logic__zebra_puzzle_dataset", sample=i) for i, s in enumerate((0.5, 1, 0, 0.5))]
    four = [line(0, 1, sample=i) for i in range(4)]
    header, zebra, math = table_rows([summarise_set("zebra", grids), summarise_set("math", four)])
    assert header[3:7] == ["mean@4", "pass@2", "pass@4", "maj@4"]
    assert zebra[3:7] == ["0.500 ± 0.000", "0.500 ± 0.000", "1.000 ± 0.000", "–"]
    assert math[6] == "1.000 ± 0.000"


def test_what_is_no_answer_is_no_vote() -> None:
    responses = ["\\boxed{}", "\\boxed{}", "####", "####", "\\boxed{7}"]
    found = summarise_set("math", [line(0, i == 4, sample=i, response=text) for i, text in enumerate(responses)])
    assert found.majority is not None and found.majority.value == 1


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lines = [line(0, 1), line(1, 0, response=CHEAP), line(2, 0, set="gsm8k", data_source="openai/gsm8k")]
    lines[2] |= {"response": "#### 1,000", "ground_truth": "1000"}
    results = [summarise_set("math", lines[:2], dropped=3), summarise_set("gsm8k", lines[2:])]
    write_results(tmp_path / "eval", lines, results, {"model": "m", "mode": "fixed"})
    return tmp_path / "eval"


def test_what_is_written(saved: Path) -> None:
    results = json.loads((saved / RESULTS).read_text())
    assert results["model"] == "m" and results["overall"] == 0.25
    assert results["sets"][0]["mean"] == {"value": 0.5, "standard_error": 0.5}
    table = (saved / "results.md").read_text().splitlines()
    assert table[0].startswith("| set | prompts |") and table[2].startswith("| math | 2 | 3 | 0.500 ± 0.500 |")
    assert len((saved / PREDICTIONS).read_text().splitlines()) == 3


@pytest.mark.parametrize(("where", "name"), [(Path, "write_text"), (os, "replace")])
def test_an_interrupted_write_blocks_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    """What marks a folder as finished is written last."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(where, name, stop)
        rescore(str(saved), RewardConfig(timeout_seconds=60.0))
    again = rescore(str(saved), RewardConfig(timeout_seconds=60.0))
    assert [r.mean.value for r in again] == [0.5, 1]
    assert [file.name for file in sorted((saved / "rescored-fixed").iterdir())] == [PREDICTIONS, RESULTS, "results.md"]


def test_rescoring_in_both_modes(saved: Path) -> None:
    fixed = rescore(str(saved), RewardConfig(mode="fixed"))
    paper = rescore(str(saved), RewardConfig(mode="paper"), str(saved.parent / "other"))
    assert [r.mean.value for r in fixed] == [0.5, 1]
    assert [r.mean.value for r in paper] == [1, 1]  # the rule can be hacked, and the set is counted as before
    assert [r.dropped for r in paper] == [3, 0]
    about = json.loads((saved.parent / "other" / RESULTS).read_text())
    assert (about["mode"], about["model"], about["rescored_from"]) == ("paper", "m", str(saved))
    assert about["sampled_in_mode"] == json.loads((saved / "results.json").read_text())["mode"]
    with pytest.raises(ConfigError, match="rescored-fixed holds predictions already"):
        rescore(str(saved), RewardConfig(mode="fixed"))


def test_rescoring_takes_what_scored_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A source that no verifier's begins, which only a name or a function of one's own can score."""
    lines = [line(0, 0, data_source="poetry", response="#### 1,000", ground_truth="1000")]
    write_results(tmp_path / "eval", lines, [summarise_set("math", lines)], {"model": "m", "mode": "fixed"})
    (tmp_path / "mine.py").write_text("def score(response, ground_truth, extra_info):\n    return 0.25\n")
    folder = ["eval", f"--rescore={tmp_path / 'eval'}"]
    assert main(folder) == USAGE_ERROR
    assert "reward.name (to `rljax reward` and `rljax eval --rescore`: --name)" in capsys.readouterr().err
    assert main([*folder, "--workers", "0"]) == USAGE_ERROR

    def scored(name: str, *flags: str) -> dict[str, Any]:
        limits = ["--workers", "1", "--timeout-seconds", "60", "--output", str(tmp_path / name)]
        assert main([*folder, *limits, *flags]) == 0
        return json.loads((tmp_path / name / RESULTS).read_text())

    named, own = scored("named", "--name", "gsm8k"), scored("own", "--file", f"{tmp_path / 'mine.py'}:score")
    assert (named["overall"], own["overall"]) == (1, 0.25)
    used = RewardConfig(name="gsm8k", workers=1, timeout_seconds=60.0)
    assert named["reward"] == json.loads(json.dumps(dataclasses.asdict(used)))
    assert own["reward"]["name"] == "custom" and own["reward"]["file"].endswith("mine.py:score")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("predictions.jsonl", b"", "holds no prediction"),
        ("predictions.jsonl", b"{\n", r"predictions\.jsonl:1: not JSON"),
        ("predictions.jsonl", b"[1]\n", r"predictions\.jsonl:1: a list"),
        ("predictions.jsonl", b'\n{"set": "s\xff"}\n', r"predictions\.jsonl:2: not UTF-8"),
        ("predictions.jsonl", b'{"set": "s"}\n', "no place, data_source"),
        ("results.json", b"{", "cannot be read"),
        ("results.json", b"[]", "holds no sets"),
    ],
)
def test_damaged_files_are_refused(saved: Path, tmp_path: Path, name: str, content: bytes, says: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        rescore(str(folder), RewardConfig())


def test_nothing_to_rescore(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no predictions\.jsonl"):
        rescore(str(tmp_path), RewardConfig())


def test_rescoring_needs_no_jax(saved: Path) -> None:
    code = (
        "import sys; from rljax.cli import main; code = main(sys.argv[1:]); "
        "assert code == 0 and not {'jax', 'transformers'} & set(sys.modules), (code, sorted(sys.modules))"
    )
    command = [sys.executable, "-c", code, "eval", "--rescore", str(saved), "--mode", "paper"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "gsm8k" in done.stdout and "1.000" in done.stdout
