"""`rljax reward`: lines in, the same lines with their scores out."""

import json
from pathlib import Path
from typing import Any

import pytest

from rljax.cli import USAGE_ERROR, main

LINES: list[dict[str, Any]] = [
    {"data_source": "openai/gsm8k", "response": "#### 72", "ground_truth": "72", "id": 7},
    {"data_source": "math__math", "response": "\\boxed{2}", "ground_truth": "2\\sqrt{3}", "extra_info": {"index": 1}},
    {"data_source": "exact", "response": "\ud800 \x00", "ground_truth": "x", "extra_info": None},
    {"data_source": "math__math", "response": "\\boxed{9^{9^{9^9}}}", "ground_truth": "1"},
]


def write(folder: Path, lines: list[Any]) -> str:
    file = folder / "in.jsonl"
    file.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    return str(file)


def scored(folder: Path, *flags: str) -> list[dict[str, Any]]:
    out = folder / "out.jsonl"
    assert main(["reward", write(folder, LINES), "--output", str(out), "--timeout-seconds", "60", *flags]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("mode, scores", [("fixed", [1, 0, 0, 0]), ("paper", [1, 1, 0, 0])])
def test_both_modes(tmp_path: Path, mode, scores) -> None:
    found = scored(tmp_path, "--mode", mode)
    assert [line["score"] for line in found] == scores
    for before, after in zip(LINES, found, strict=True):
        assert {name: after[name] for name in before} == before
        assert set(after) - set(before) == {"score", "error", "seconds"}
        assert after["seconds"] > 0
    assert [found[i]["error"] for i in (0, 1, 2)] == ["", "", ""]


def test_what_cannot_be_judged_says_so(tmp_path: Path) -> None:
    assert scored(tmp_path)[3]["error"].startswith("unparseable: ")


def test_to_the_terminal(tmp_path: Path, capsys) -> None:
    assert main(["reward", write(tmp_path, LINES[:1])]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == 1


def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(response, ground_truth, extra_info):\n    return 0.25\n")
    found = scored(tmp_path, "--file", f"{tmp_path / 'mine.py'}:score")
    assert [line["score"] for line in found] == [0.25] * 4


@pytest.mark.parametrize(
    "lines, says",
    [
        (["{"], "in.jsonl:1: not JSON"),
        ([LINES[0], "[1]"], "in.jsonl:2: a list"),
        (
            [LINES[0], {"response": "x", "ground_truth": "1"}],
            "in.jsonl:2: no data_source; found response, ground_truth",
        ),
        ([LINES[0], LINES[0] | {"response": 3}], "in.jsonl:2: response is a int"),
        ([LINES[0] | {"extra_info": [1]}], "in.jsonl:1: extra_info is a list"),
        ([LINES[0] | {"data_source": "poetry"}], "data_source = 'poetry' has no verifier"),
    ],
)
def test_bad_lines_are_refused_before_anything_is_scored(tmp_path: Path, capsys, lines, says) -> None:
    out = tmp_path / "out.jsonl"
    assert main(["reward", write(tmp_path, lines), "--output", str(out)]) == USAGE_ERROR
    assert says in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ([], "required: FILE.jsonl"),
        (["FILE", "--mode", "kind"], "--mode: invalid choice: 'kind'"),
        (["FILE", "--workers", "0"], "--workers 0 must be at least 1"),
        (["FILE", "--output", "FILE"], "exists and is not overwritten"),
        (["FILE", "--name", "astrology"], "reward.name = 'astrology' is not known"),
        (["FILE", "--name", "custom"], "reward.name = 'custom' is what a reward of your own is called"),
        (["FILE", "--output", "no/folder/out.jsonl"], "its folder is not there"),
    ],
)
def test_bad_flags(tmp_path: Path, capsys, flags, says) -> None:
    file = write(tmp_path, LINES[:1])
    assert main(["reward", *(file if flag == "FILE" else flag for flag in flags)]) == USAGE_ERROR
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, says",
    [(b"", "in.jsonl holds no line"), (b"\n\n", "holds no line"), (b"\xff\xfe{", "in.jsonl:1: not UTF-8")],
)
def test_files_that_are_not_lines(tmp_path: Path, capsys, content, says) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert main(["reward", str(tmp_path / "in.jsonl")]) == USAGE_ERROR
    assert says in capsys.readouterr().err
