"""The paper's files from raw rows: its holdout and evaluation prompts come out, and what is dropped is said."""

import collections
import json
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rljax.cli import USAGE_ERROR, data_parser, main
from rljax.config import ConfigError
from rljax.data.prepare import (
    BOXED,
    KINDS,
    PASS_RATE,
    PREFIX,
    RAW_SETS,
    STEP_BY_STEP,
    easy_to_hard,
    holdout_rows,
    prepare,
    wrap,
)
from rljax.data.records import read_records

RATES = [None, *(i / 16 for i in range(17))]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def guru(index, rate, source="math__deepscaler_preview", text="What is it?"):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"{text} {index}"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(index), "style": "rule"},
        PASS_RATE: rate,
        "qwen3_30b_pass_rate": 1.0,
        "extra_info": {"index": 100 + index, "split": "train"},
    }


def contents(path):
    return [row["prompt"][0]["content"] for row in pq.read_table(path).to_pylist()]


# ---------------------------------------------------------------------------------------------------------- guru-math


def test_the_holdout_is_the_released_one(shared_data):
    """54,404 rows from easy to hard, 11,804 of them easy: the rows drawn are those that the released file names."""
    rates = [0.5] * 11_804 + [0.0] * 42_600
    table = pq.read_table(shared_data / "guru_math" / "math__full_difficulty_ordered_test_500.parquet")
    assert holdout_rows(rates).tolist() == sorted(info["index"] for info in table["extra_info"].to_pylist())


def test_the_order_is_a_stable_sort_with_none_as_the_hardest():
    random = np.random.RandomState(0)
    rates = [RATES[i] for i in random.randint(0, len(RATES), 500)]
    order = easy_to_hard(rates).tolist()
    assert order == sorted(range(500), key=lambda i: (-(rates[i] or 0), i))


def test_guru_rows_become_the_papers_files(tmp_path):
    """Ten rows, a holdout of two, in full."""
    rates = [0.0, 0.5, None, 0.3, 0.25, 1.0, 0.2999, 0.5, 0.0625, 0.3125]
    rows = [guru(i, rate) for i, rate in enumerate(rates)]
    rows[1]["prompt"][0]["content"] = "Say \\boxed{1}."
    rows.append(guru(10, 0.9, source="logic__zebra"))
    said = prepare("guru-math", write_jsonl(tmp_path / "raw.jsonl", rows), str(tmp_path / "out"), holdout=2)
    train, test = (
        pq.read_table(tmp_path / "out" / f"math__full_difficulty_ordered_{name}.parquet").to_pylist()
        for name in ("train_8", "test_2")
    )
    easiest_first = [5, 1, 7, 9, 3, 6, 4, 8, 0, 2]
    numbers = {int(row["reward_model"]["ground_truth"]): row for row in [*train, *test]}
    assert [easiest_first[row["extra_info"]["index"]] for row in train] == [
        int(row["reward_model"]["ground_truth"]) for row in train
    ]
    assert [row["extra_info"]["index"] for row in train] == sorted(row["extra_info"]["index"] for row in train)
    # pandas: easy rows are 0..4 and hard ones 5..9 of the sorted ten; one of each is drawn.
    held = [np.random.RandomState(42).choice(5, 1, False)[0], 5 + np.random.RandomState(43).choice(5, 1, False)[0]]
    assert [row["extra_info"]["index"] for row in test] == held
    assert numbers[2] == {
        "data_source": "math__deepscaler_preview",
        "prompt": [{"content": f"{PREFIX}What is it? 2{BOXED}", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {
            "index": 9, "split": "test" if 9 in held else "train", PASS_RATE: None, "qwen3_30b_pass_rate": 1.0,
        },
    }  # fmt: skip
    assert numbers[1]["prompt"][0]["content"] == f"{PREFIX}Say \\boxed{{1}}."
    assert {row["extra_info"]["split"] for row in train} == {"train"}
    for line in (
        "left out, not mathematics: 1 rows of logic__zebra",
        "10 problems: 5 easy (pass rate at least 0.3), 5 hard, 1 of them without a pass rate",
        "holdout: 2 problems: 1 easy (pass rate at least 0.3), 1 hard, seeds 42 and 43",
        "train: 8 problems: 4 easy",
        "train_8.parquet: 8 rows",
    ):
        assert line in said
    records = read_records(str(tmp_path / "out" / "math__full_difficulty_ordered_train_8.parquet"))
    assert [record.extra_info["index"] for record in records] == [row["extra_info"]["index"] for row in train]


def test_released_problems_prepared_again_keep_their_prompts(shared_data, tmp_path):
    """The quarter sample, taken back to the raw form: prompts, answers and rates are those of the released file."""
    table = pq.read_table(shared_data / "guru_math" / "math__sampled_1_4_12800.parquet")
    released = {row["prompt"][0]["content"]: row for row in table.to_pylist()}
    raw = []
    for place, row in enumerate(table.to_pylist()):
        text = row["prompt"][0]["content"]
        assert text.startswith(PREFIX)
        text = text.removeprefix(PREFIX)
        text = text.removesuffix(BOXED) if place % 2 and text.count("\\boxed{") == 1 else text  # there, or to be added
        rates = {name: row["extra_info"][name] for name in (PASS_RATE, "qwen3_30b_pass_rate")}
        raw.append({**row, "prompt": [{"role": "user", "content": text}], **rates, "extra_info": None})
    folder = tmp_path / "guru" / "train"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(raw[::-1]), folder / "math__combined_12.8k.parquet")
    (folder / "other.parquet").write_text("of another domain")
    prepare("guru-math", str(tmp_path / "guru"), str(tmp_path / "out"), reuse_sets=True)
    train, test = (
        pq.read_table(tmp_path / "out" / f"math__full_difficulty_ordered_{name}.parquet").to_pylist()
        for name in ("train_12300", "test_500")
    )
    for row in [*train, *test]:
        of = released[row["prompt"][0]["content"]]
        assert row["reward_model"]["ground_truth"] == of["reward_model"]["ground_truth"]
        assert row["data_source"] == of["data_source"] and row["extra_info"][PASS_RATE] == of["extra_info"][PASS_RATE]
    texts = [row["prompt"][0]["content"] for row in [*train, *test]]
    assert collections.Counter(texts) == collections.Counter(row["prompt"][0]["content"] for row in table.to_pylist())
    for rows in (train, test):
        rates = [row["extra_info"][PASS_RATE] or 0 for row in rows]
        assert rates == sorted(rates, reverse=True)
    assert sum((row["extra_info"][PASS_RATE] or 0) >= 0.3 for row in test) == 250
    sizes = {2: 6150, 4: 3075, 5: 2460, 10: 1230, 20: 615, 25: 492, 50: 246, 100: 123}
    subsets = {tau: contents(tmp_path / "out" / f"math__sampled_1_{tau}_{n}.parquet") for tau, n in sizes.items()}
    assert {tau: len(texts) for tau, texts in subsets.items()} == sizes
    assert set(subsets[100]) <= set(subsets[50]) <= set(subsets[2]) <= set(texts)
    written = pq.read_schema(tmp_path / "out" / "math__full_difficulty_ordered_train_12300.parquet")
    assert written.remove_metadata().names == table.schema.names[:5]
    assert [written.field(name).type for name in written.names] == [table.schema.field(n).type for n in written.names]


def test_a_holdout_that_is_given_is_held_out(tmp_path):
    rows = [guru(i, i / 16) for i in range(16)]
    held = [{"question": f"{PREFIX}What is it? {i}{BOXED}", "answer": "0"} for i in (3, 12)]
    source, held_file = write_jsonl(tmp_path / "raw.jsonl", rows), write_jsonl(tmp_path / "held.jsonl", held)
    said = prepare("guru-math", source, str(tmp_path / "out"), holdout_file=held_file)
    test = pq.read_table(tmp_path / "out" / "math__full_difficulty_ordered_test_2.parquet").to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in test] == ["12", "3"]
    train = contents(tmp_path / "out" / "math__full_difficulty_ordered_train_14.parquet")
    assert len(train) == 14 and f"1 hard, the problems of {held_file}" in said
    strange = write_jsonl(tmp_path / "strange.jsonl", [*held, {"question": "What?", "answer": "0"}])
    with pytest.raises(ConfigError, match=r"strange.jsonl has 1 of its 3 prompts not in the source"):
        prepare("guru-math", source, str(tmp_path / "other"), holdout_file=strange)


def test_the_wrapper_is_not_put_on_twice(shared_data):
    for name in ("math__full_difficulty_ordered_test_500", "online_eval/math__math_500", "online_eval/amc2023"):
        texts = contents(shared_data / "guru_math" / f"{name}.parquet")
        assert texts == [wrap(text, BOXED, unless="\\boxed{") for text in texts]
        assert all(text.startswith(PREFIX) for text in texts)
    for name in ("gsm8k", "aime2024"):
        texts = contents(shared_data / "guru_math" / "online_eval" / f"{name}.parquet")
        assert texts == [wrap(text, STEP_BY_STEP) for text in texts]
        assert texts == [wrap(text.removeprefix(PREFIX).removesuffix(STEP_BY_STEP), STEP_BY_STEP) for text in texts]


# -------------------------------------------------------------------------------------------------------- gsm8k, math


def test_gsm8k_from_its_raw_rows_is_the_papers_evaluation_set(shared_data, tmp_path):
    infos = pq.read_table(shared_data / "gsm8k" / "test.parquet")["extra_info"].to_pylist()
    raw = [{"question": info["question"], "answer": info["answer"]} for info in infos]
    prepare("gsm8k", write_jsonl(tmp_path / "test.jsonl", raw), str(tmp_path / "out"))
    made = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    paper = pq.read_table(shared_data / "guru_math" / "online_eval" / "gsm8k.parquet").to_pylist()
    assert len(made) == len(paper) == 1319
    for name in ("data_source", "prompt", "reward_model"):
        assert [row[name] for row in made] == [row[name] for row in paper]
    records = read_records(str(tmp_path / "out" / "test.parquet"))
    assert [record.solution for record in records] == [row["answer"] for row in raw]  # for `rljax sft`


def test_math_from_its_raw_rows_holds_the_papers_math_500(shared_data, tmp_path):
    rows = pq.read_table(shared_data / "math" / "test.parquet").to_pylist()
    verl = " Let's think step by step and output the final answer within \\boxed{}."
    raw = [
        {
            "problem": row["prompt"][0]["content"].removesuffix(verl),
            "solution": f"First \\boxed{{0}}, but then $\\boxed{{{row['reward_model']['ground_truth']}}}$.",
            "level": "Level 1",
            "type": "Algebra",
        }
        for row in rows
    ]
    said = prepare("math", write_jsonl(tmp_path / "test.jsonl", raw), str(tmp_path / "out"))
    made = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    assert len(made) == 5000 and "DROPPED" not in said
    truths = {row["prompt"][0]["content"]: row["reward_model"]["ground_truth"] for row in made}
    paper = pq.read_table(shared_data / "guru_math" / "online_eval" / "math__math_500.parquet").to_pylist()
    assert {row["data_source"] for row in made} == {row["data_source"] for row in paper} == {"math__math"}
    shared = [row for row in paper if row["prompt"][0]["content"] in truths]
    assert len(shared) == 500
    assert [truths[row["prompt"][0]["content"]] for row in shared] == [
        row["reward_model"]["ground_truth"] for row in shared
    ]


@pytest.mark.parametrize(
    ("kind", "worked", "truth"),
    [
        ("gsm8k", "16 - 3 = <<16-3=13>>13\n#### 1,300 ", "1,300"),
        ("gsm8k", "#### 1\n#### 2", "2"),
        ("gsm8k", "13", None),
        ("gsm8k", "13 ####  ", None),
        ("math", "\\boxed{1} and $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("math", "so \\fbox{3}", "3"),
        ("math", "so $\\boxed 2$ apples", "2"),
        ("math", "so 3", None),
        ("math", "so \\boxed{3", None),
        ("math", "so \\boxed{ }", None),
    ],
)
def test_ground_truths(kind, worked, truth):
    assert RAW_SETS[kind].answer(worked) == truth


def test_rows_without_an_answer_are_dropped_and_said(tmp_path):
    rows = [{"question": f"q{i}", "answer": "none" if i in (1, 4) else f"#### {i}"} for i in range(6)]
    said = prepare("gsm8k", write_jsonl(tmp_path / "train.jsonl", rows), str(tmp_path / "out"))
    assert 'train: DROPPED 2 of 6 rows without an answer after "####": train.jsonl:2, train.jsonl:5' in said
    made = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert [row["extra_info"]["index"] for row in made] == [0, 2, 3, 5]  # rows of the source
    assert made[1]["prompt"] == [{"content": f"{PREFIX}q2{STEP_BY_STEP}", "role": "user"}]


def test_splits_of_files_folders_and_the_hub(tmp_path, monkeypatch):
    rows = [{"problem": f"p{i}", "solution": f"\\boxed{{{i}}}", "level": f"Level {i}"} for i in range(3)]
    folder = tmp_path / "MATH"
    for subject, part in (("algebra", rows[:2]), ("geometry", rows[2:])):
        write_jsonl(folder / subject / "train-00000-of-00001.jsonl", part)
    write_jsonl(folder / "algebra" / "test-00000-of-00001.jsonl", rows[:1])
    prepare("math", str(folder), str(tmp_path / "out"))
    train, test = (pq.read_table(tmp_path / "out" / f"{name}.parquet").to_pylist() for name in ("train", "test"))
    assert [row["reward_model"]["ground_truth"] for row in train] == ["0", "1", "2"]
    assert [row["extra_info"]["index"] for row in train] == [0, 1, 2] and len(test) == 1
    assert train[2]["extra_info"] == {
        "answer": "\\boxed{2}", "index": 2, "level": "Level 2", "question": "p2", "split": "train", "type": None,
    }  # fmt: skip

    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, config, *, split: rows[: 2 if split == "train" else 1]
    fake.get_dataset_split_names = lambda name, config: ["train", "test"]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    prepare("math", "hub:some/math", str(tmp_path / "from_hub"))
    assert len(contents(tmp_path / "from_hub" / "train.parquet")) == 2
    assert len(contents(tmp_path / "from_hub" / "test.parquet")) == 1


# ----------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_prepared_is_refused(tmp_path):
    good = write_jsonl(tmp_path / "train.jsonl", [{"question": "q", "answer": "#### 1"}])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for kind, source, says in (
        ("gsm8k", write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q"}]), 'a.jsonl:1: missing text in "question"; found'),
        ("math", good, 'missing text in "problem".*"question", "answer".*need no preparing'),
        (
            "gsm8k",
            write_jsonl(tmp_path / "b.jsonl", [{"question": "q", "answer": "1"}]),
            "1 rows and none with an answer",
        ),
        ("gsm8k", str(tmp_path / "empty"), "holds no .parquet or .jsonl file"),
        ("gsm8k", str(tmp_path / "absent.jsonl"), "does not exist"),
        ("guru-math", write_jsonl(tmp_path / "c.jsonl", [guru(0, None)]), f"no mathematical row with .*{PASS_RATE}"),
        ("guru-math", write_jsonl(tmp_path / "d.jsonl", [guru(0, 7.0)]), "a pass rate is a number"),
        ("guru-math", write_jsonl(tmp_path / "e.jsonl", [guru(0, 0.5)]), "--holdout 500 takes 250 easy and 250 hard"),
        ("guru-math", str(tmp_path / "empty"), "holds 0 files that may be meant"),
        ("guru-math", str(tmp_path), r"holds \d+ files that may be meant .*give the file itself"),
    ):
        with pytest.raises(ConfigError, match=says):
            prepare(kind, source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    prepare("gsm8k", good, str(tmp_path / "out"))
    before = (tmp_path / "out" / "train.parquet").read_bytes()
    with pytest.raises(ConfigError, match=r"out/train\.parquet exists and is not overwritten"):
        prepare("gsm8k", good, str(tmp_path / "out"))
    assert (tmp_path / "out" / "train.parquet").read_bytes() == before
    with pytest.raises(ConfigError, match="file is a file and exists"):
        prepare("gsm8k", good, str(tmp_path / "file"))


def test_the_command(tmp_path, capsys):
    good = write_jsonl(tmp_path / "train.jsonl", [{"question": "q", "answer": "#### 1"}])
    problems = write_jsonl(tmp_path / "guru.jsonl", [guru(0, 0.5), guru(1, 0.0)])
    assert main(["data", "prepare", "gsm8k", good, str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("train.parquet: 1 rows\n")
    assert [data_parser().parse_args(["prepare", kind, "a", "b"]).kind for kind in KINDS] == list(KINDS)
    for arguments, says in (
        ([], "rljax data: the following arguments are required"),
        (["prepare", "gsm8k", good], "arguments are required: OUTPUT_DIR"),
        (["prepare", "chess", good, "x"], "invalid choice: 'chess'"),
        (["prepare", "gsm8k", good, "x", "--holdout", "5"], "was given --holdout, which is of guru-math only"),
        (["prepare", "guru-math", good, "x", "--holdout", "5", "--holdout-file", good], "give one of the two"),
        (["prepare", "gsm8k", good, "x", "--reuse-sets"], "was given --reuse-sets"),
        (["prepare", "guru-math", problems, "x", "--holdout", "0"], "--holdout 0 must be at least 1"),
        (["inspect", good, "--tokeniser", "x"], "unrecognized arguments: --tokeniser"),
    ):
        assert main(["data", *arguments]) == USAGE_ERROR
        said = capsys.readouterr().err
        assert says in said and said.startswith("error: ") and said.count("\n") == 1
    for arguments in (["--help"], ["prepare", "--help"], ["inspect", "--help"]):
        assert main(["data", *arguments]) == 0
        assert capsys.readouterr().out.startswith("usage: rljax data ")
