"""What `rljax data inspect` says of files whose content is known: by hand, and the paper's tables."""

import dataclasses
import json

import pytest

from rljax.cli import main
from rljax.config import ConfigError
from rljax.data.inspect import Duplicate, Lengths, as_json, as_text, inspect
from rljax.data.prepare import BOXED, PREFIX, STEP_BY_STEP
from rljax.data.records import read_records
from rljax.tokenizer import character_tokenizer

BASE = "You are a helpful assistant."
"""The system text of Qwen2.5's base models; the instruct models' template has its own."""


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(text, source="a", rate=None):
    return {"prompt": text, "answer": "1", "data_source": source, "rate": rate}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(training file, evaluation file, tokenizer) small enough to count by hand."""
    folder = tmp_path_factory.mktemp("inspect")
    train = [
        row(f"{PREFIX}What is 1 + 1?{BOXED}", rate=0.5),
        row("abc", "b", 0.5),
        row("what IS\n1+1?", rate=0.25),  # the first one again
        row("d" * 20, "b"),
        row("e" * 600, rate=0.0),
        row("abc", "b", 0.0),
        row("f" * 9),
    ]
    held_out = [row("never seen"), row(f"{PREFIX}A B C{STEP_BY_STEP}")]
    character_tokenizer([chr(code) for code in range(10, 127) if code not in range(11, 32)]).save(folder / "tokenizer")
    return (
        write_jsonl(folder / "train.jsonl", train),
        write_jsonl(folder / "test.jsonl", held_out),
        str(folder / "tokenizer"),
    )


@pytest.fixture(scope="module")
def found(places):
    train, held_out, tokenizer = places
    (found,) = inspect(
        [train],
        tokenizer=tokenizer,
        against=[held_out],
        max_prompt_tokens=21,
        difficulty_field="rate",
        system_prompt="",
    )
    return found


def test_counts_and_difficulties(found):
    assert (found.rows, found.sources) == (7, {"a": 4, "b": 3})
    assert found.difficulty == {"0.5": 2, "0.25": 1, "0": 2, "none": 2}
    assert list(found.difficulty) == ["0.5", "0.25", "0", "none"] and found.easy == 2


def test_lengths_count_the_template(found):
    """One token a character, with <user> before and <assistant> after."""
    first = len(PREFIX) + 14 + len(BOXED) + 2
    assert found.lengths["b"] == Lengths(3, pytest.approx(32 / 3), 5.0, pytest.approx(20.3), 22, 0, 0, 0, 1)
    of_all = sorted([first, 5, 14, 22, 602, 5, 11])
    assert found.lengths["all"].median == of_all[3] == 14 and found.lengths["all"].max == 602
    assert found.lengths["all"].mean == pytest.approx(sum(of_all) / 7)
    assert (found.lengths["all"].over_512, found.lengths["all"].over_1024) == (1, 0)
    assert {name: of.overlong for name, of in found.lengths.items()} == {"all": 3, "a": 2, "b": 1}


def test_duplicates_within_the_file_and_against_the_evaluation_set(found, places):
    assert found.duplicates == [Duplicate(2, 0), Duplicate(5, 1)]
    assert found.against == {places[1]: [Duplicate(1, 1), Duplicate(5, 1)]}


def test_five_prompts_as_the_model_sees_them(found, places):
    assert len(found.texts) == 5 and found.texts[0] == f"<user>{PREFIX}What is 1 + 1?{BOXED}<assistant>"
    assert found.texts[-1] == "<user>fffffffff<assistant>"
    (plain,) = inspect([places[0]], system_prompt="Be brief.", difficulty_field="rate")
    assert plain.texts[-1] == "fffffffff" and not plain.lengths and not plain.against
    (system,) = inspect([places[0]], tokenizer=places[2], system_prompt="Hi", difficulty_field="rate")
    assert system.texts[-1] == "<system>Hi<user>fffffffff<assistant>" and system.lengths["b"].max == 25


def test_many_rates_are_shown_by_tenths_and_none_are_said(tmp_path):
    rows = [row(str(i), rate=i / 100) for i in range(100)]
    (fine,) = inspect([write_jsonl(tmp_path / "fine.jsonl", rows)], difficulty_field="rate")
    assert fine.difficulty == {f"{tenth / 10:g} and more": 10 for tenth in range(9, -1, -1)} and fine.easy == 70
    (none,) = inspect([write_jsonl(tmp_path / "none.jsonl", [row("x")])], difficulty_field="absent")
    assert none.difficulty == {} and "no pass rates" in as_text([none])
    with pytest.raises(ConfigError, match="a pass rate is a number"):
        inspect([write_jsonl(tmp_path / "bad.jsonl", [row("x", rate=2)])], difficulty_field="rate")


def test_text_and_json(found, places, capsys):
    train, held_out, tokenizer = places
    arguments = [
        "data",
        "inspect",
        train,
        "--against",
        held_out,
        "--tokenizer",
        tokenizer,
        "--difficulty-field",
        "rate",
    ]
    arguments += ["--max-prompt-tokens", "21"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [dataclasses.asdict(found)] == json.loads(as_json([found]))
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said == as_text([found]) + "\n"
    lines = [line.split() for line in said.splitlines()]
    assert ["prompt", "tokens", "rows", "mean", "median", "p95", "max", ">512", ">1024", ">2048", "overlong"] in lines
    assert ["b", "3", "11", "5", "20", "22", "0", "0", "0", "1"] in lines
    assert ["0.5", "2", "28.6%", "#" * 30] in lines and "easy (at least 0.3): 2, hard: 5" in said
    assert "duplicates within the file: 2 (row 2 = 0, row 5 = 1)" in said
    assert f"also in {held_out}: 2 (row 1 = 1, row 5 = 1)" in said
    assert "--- prompt 5 of 5\n<user>fffffffff<assistant>" in said
    assert main([*arguments[:3], "--max-prompt-tokens", "-1"]) == 64
    assert "--max-prompt-tokens -1 must be at least 0" in capsys.readouterr().err
    assert main(["data", "inspect", "task:arithmetic", "--difficulty-field", "pass_rate_proxy"]) == 0
    assert "arithmetic    256" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- the paper's tables

LENGTHS = {  # paper 4.3: rows, mean, median, p95, max, > 512, > 1024, > 2048; <= 512 with instruct and base system text
    "math__full_difficulty_ordered_test_500": ((500, 145, 134, 242, 551, 1, 0, 0), 499, 499),
    "online_eval/math__math_500": ((500, 126, 105, 256, 846, 4, 0, 0), 496, 497),
    "online_eval/stem__supergpqa_200": ((200, 320, 264, 667, 1283, 26, 2, 0), 174, 177),
    "online_eval/codegen__humaneval_164": ((164, 237, 218, 390, 505, 0, 0, 0), 164, 164),
    "online_eval/logic__zebra_puzzle_dataset_200": ((200, 1330, 996, 3271, 3839, 141, 96, 52), 59, 60),
}


def test_lengths_are_the_papers_with_both_system_texts(shared_data):
    """The other rows of the table are in test_tokenizer.py; here the base models' text is encoded, too."""
    files = {str(shared_data / "guru_math" / f"{name}.parquet"): name for name in LENGTHS}
    tokenizer = str(shared_data / "qwen2.5_tokenizer")
    instruct, base = (
        inspect(list(files), tokenizer=tokenizer, max_prompt_tokens=512, system_prompt=text) for text in ("", BASE)
    )
    for here, there in zip(instruct, base, strict=True):
        table, instruct_fits, base_fits = LENGTHS[files[here.file]]
        of = here.lengths["all"]
        over = (of.over_512, of.over_1024, of.over_2048)
        assert (of.rows, *(round(x) for x in (of.mean, of.median, of.p95, of.max)), *over) == table
        assert (of.rows - of.overlong, of.rows - there.lengths["all"].overlong) == (instruct_fits, base_fits)
    assert base[-1].lengths["all"].over_2048 == 51  # Zebra
    assert f"<|im_start|>system\n{BASE}<|im_end|>\n<|im_start|>user\n" in base[0].texts[0]


def test_difficulties_and_duplicates_of_the_released_sets(shared_data):
    """Pass rates as in paper 5.1. No prompt comes twice, but problems do, spaced otherwise: 6 of the holdout,
    2 of AMC and, twice, 1 of MATH-500 are among the 12,800 trained on."""
    folder = shared_data / "guru_math"
    holdout = str(folder / "math__full_difficulty_ordered_test_500.parquet")
    evals = [
        holdout,
        *(str(folder / "online_eval" / f"{name}.parquet") for name in ("amc2023", "math__math_500", "aime2024")),
    ]
    sample = str(folder / "math__sampled_1_4_12800.parquet")
    (train,) = inspect([sample], against=evals)
    assert list(train.difficulty.values()) == [5, 10, 486, 541, 557, 616, 673, 798, 949, 1228, 1819, 5118]
    assert train.easy == 2888
    (held,) = inspect([holdout])
    assert list(held.difficulty.values()) == [1, 36, 58, 49, 44, 62, 15, 23, 25, 39, 148]
    assert (len(train.duplicates), len(held.duplicates)) == (102, 0)
    assert [len(train.against[name]) for name in evals] == [6, 2, 2, 0]
    trained, held_out = ([record.prompt[0]["content"] for record in read_records(file)] for file in (sample, holdout))
    assert len(set(trained)) == 12_800 and not set(trained) & set(held_out)
