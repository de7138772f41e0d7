"""Every form of row becomes the same record; what is not a record is refused by file, row and column."""

import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rljax.config import ConfigError
from rljax.data.records import difficulties, read_records
from rljax.data.tasks import TASKS
from rljax.types import PromptRecord

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "2+2?"}],
    "ability": "math",
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "extra_info": {"index": 12, "answer": "2+2=4\n#### 4", "rate": 0.5},
}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_one(tmp_path, row):
    (record,) = read_records(write_jsonl(tmp_path / "rows.jsonl", [row]))
    return record


def test_verl_row(tmp_path):
    """In full, the one example of what a record is."""
    expected = PromptRecord(
        prompt=({"role": "user", "content": "2+2?"},),
        data_source="openai/gsm8k",
        ground_truth="4",
        solution="2+2=4\n#### 4",
        extra_info={"index": 12, "ability": "math", "answer": "2+2=4\n#### 4", "rate": 0.5},
    )
    assert read_one(tmp_path, VERL) == expected


def test_jsonl_parquet_and_saved_folder_give_the_same_records(tmp_path):
    rows = [VERL | {"extra_info": VERL["extra_info"] | {"index": i}} for i in range(5)]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    folder = tmp_path / "saved"
    save_to_disk(table, folder / "train")
    save_to_disk(table.slice(3), folder / "test")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    records = read_records(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [r.extra_info["index"] for r in records] == [0, 1, 2, 3, 4]
    assert read_records(str(tmp_path / "rows.parquet")) == records
    assert read_records(str(folder)) == records
    assert read_records(str(folder), split="eval") == records[3:]
    assert read_records(str(folder / "train"), split="eval") == records  # without splits: one split
    for source in ("rows.jsonl", "rows.parquet", "saved"):
        assert read_records(str(tmp_path / source), limit=2) == records[:2]


def save_to_disk(table, folder):
    """What `datasets.Dataset.save_to_disk` writes, in two files."""
    folder.mkdir(parents=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 1), table.slice(1)), strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize(
    ("row", "truth", "solution"),
    [
        ({"question": "q", "answer": "4"}, "4", ""),
        ({"question": "q", "answer": 4}, "4", ""),
        ({"question": "q", "answer": "so\n#### 1,234 "}, "1,234", "so\n#### 1,234 "),
        ({"question": "q", "answer": "#### 3 no\n#### 4"}, "4", "#### 3 no\n#### 4"),
        ({"prompt": "q", "solution": "thus \\boxed{\\frac{1}{2}}."}, "\\frac{1}{2}", "thus \\boxed{\\frac{1}{2}}."),
        ({"prompt": "q", "solution": "\\boxed{1} or \\boxed{2}"}, "2", "\\boxed{1} or \\boxed{2}"),
        ({"prompt": "q", "solution": "\\boxed{1"}, "\\boxed{1", "\\boxed{1"),
        ({"prompt": "q", "solution": "$x$"}, "$x$", "$x$"),
        ({"prompt": "q", "solution": "1+1=2", "answer": "2"}, "2", "1+1=2"),
        ({"prompt": "q", "ground_truth": "#### is kept"}, "#### is kept", ""),
        ({"prompt": "q", "ground_truth": {"rows": [["a", 1]]}}, '{"rows": [["a", 1]]}', ""),
        ({"prompt": [{"role": "user", "content": "q"}], "answer": "4", "question": None}, "4", ""),
    ],
)
def test_plain_forms(tmp_path, row, truth, solution):
    record = read_one(tmp_path, row)
    assert record.prompt == ({"role": "user", "content": "q"},)
    assert (record.ground_truth, record.data_source) == (truth, "rows")
    assert record.solution == solution


def test_other_columns_join_extra_info_and_it_is_json(tmp_path):
    table = pa.table(
        {
            "question": ["q"],
            "answer": ["4"],
            "level": ["Level 5"],
            "rate": [float("nan")],
            "when": pa.array([0], pa.timestamp("s")),
            "__index_level_0__": [3],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    (record,) = read_records(str(tmp_path / "rows.parquet"))
    assert record.extra_info == {"index": 0, "level": "Level 5", "rate": None, "when": "1970-01-01 00:00:00"}
    assert json.loads(json.dumps(record.extra_info, allow_nan=False)) == record.extra_info


GOOD = json.dumps({"question": "q", "answer": "4"})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question2": "q", "solution": "4"}', 'missing "prompt"; found "question2", "solution"; a record needs'),
        ('{"question": "q", "reply": "4"}', 'missing the ground truth; found "question", "reply"'),
        ('{"question": null, "answer": "4"}', 'missing "prompt".*null: question'),
        ('{"question": "q", "answer": " "}', "ground truth is empty"),
        ('{"prompt": "q", "reward_model": {"ground_truth": "4"}}', 'missing "data_source"'),
        ('{"prompt": "q", "reward_model": {"truth": "4"}, "data_source": "x"}', 'missing "reward_model.ground_truth"'),
        ('{"prompt": "q", "reward_model": "4", "data_source": "x"}', '"reward_model" is a str'),
        ('{"prompt": [], "answer": "4"}', "non-empty list"),
        ('{"prompt": 3, "answer": "4"}', '"prompt" is 3'),
        ('{"prompt": [{"role": "user"}], "answer": "4"}', 'text "role" and "content"'),
        ('{"prompt": [{"role": "user", "content": [1]}], "answer": "4"}', 'text "role" and "content"'),
        ('{"question": "q", "answer": "4", "extra_info": 3}', '"extra_info" is a int'),
        ('{"question": "q"', "not JSON"),
        ("[1]", "a list; each line"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, says):
    file = tmp_path / "train.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(ConfigError, match=rf"^train.jsonl:3: .*{says}"):
        read_records(str(file))


def test_a_bad_parquet_row_is_named(tmp_path):
    pq.write_table(pa.table({"question": ["q", None], "answer": ["4", "5"]}), tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match=r'^train.parquet row 1: missing "prompt"; found "question", "answer"'):
        read_records(str(tmp_path / "train.parquet"))


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "folder").mkdir()
    save_to_disk(pa.table({"question": ["q"], "answer": ["4"]}), tmp_path / "dict" / "train")
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for source, says in {
        "absent.jsonl": "does not exist",
        "empty.jsonl": "holds no records",
        "rows.csv": r"give \.parquet or \.jsonl",
        "broken.parquet": "cannot be read as parquet",
        "folder": "neither state.json nor dataset_dict.json",
    }.items():
        with pytest.raises(ConfigError, match=says):
            read_records(str(tmp_path / source))
    with pytest.raises(ConfigError, match=r"splits 'train'; eval data must be in 'test' or"):
        read_records(str(tmp_path / "dict"), split="eval")
    with pytest.raises(ConfigError, match="task:char_count"):
        read_records("task:chess")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"rljax\[datasets\]"):
        read_records("hub:openai/gsm8k:main")


def test_hub_rows_through_the_optional_package(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return [{"question": "q", "answer": "so\n#### 4"}]

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    fake.get_dataset_split_names = lambda name, config: ["train", "test"]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (record,) = read_records("hub:openai/gsm8k:main", split="eval")
    assert asked == [("openai/gsm8k", "main", "test")]
    assert (record.data_source, record.ground_truth) == ("openai/gsm8k", "4")

    def unreachable(name, config):
        raise OSError("no route")

    fake.get_dataset_split_names = unreachable
    with pytest.raises(ConfigError, match=r"hub:a/b could not be read .OSError: no route"):
        read_records("hub:a/b")


def test_tasks_are_sources():
    task = TASKS["arithmetic"]
    assert read_records("task:arithmetic", seed=4, task_records=9) == task.records("train", 9, 4)
    assert read_records("task:arithmetic", split="eval", limit=5, seed=4) == task.records("eval", 5, 4)


def test_difficulties(tmp_path):
    rows = [{"question": "q", "answer": "4", "rate": rate, "level": 3.0} for rate in (0.5, None, 1)]
    records = read_records(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert difficulties(records, "rate") == [0.5, None, 1]
    with pytest.raises(ConfigError, match=r"'absent' is in no record.*level, rate"):
        difficulties(records, "absent")
    with pytest.raises(ConfigError, match=r"record 0 has level = 3\.0"):
        difficulties(records, "level")


def test_public_files(shared_data):
    gsm8k = read_records(str(shared_data / "gsm8k" / "train.parquet"))
    assert len(gsm8k) == 7473
    assert all(r.solution.rpartition("#### ")[2].replace(",", "") == r.ground_truth for r in gsm8k)
    holdout = read_records(str(shared_data / "guru_math" / "math__full_difficulty_ordered_test_500.parquet"))
    rates = difficulties(holdout, "qwen2.5_7b_pass_rate")
    assert len(rates) == 500 and sum(rate >= 0.3 for rate in rates) == 250
    assert sum(rates) / 500 == pytest.approx(0.2416, abs=5e-5)
    evals = {p.stem: read_records(str(p)) for p in (shared_data / "guru_math" / "online_eval").glob("*.parquet")}
    assert {name: len(records) for name, records in evals.items()} == {
        "aime2024": 30,
        "amc2023": 40,
        "codegen__humaneval_164": 164,
        "gsm8k": 1319,
        "logic__zebra_puzzle_dataset_200": 200,
        "math__math_500": 500,
        "stem__supergpqa_200": 200,
    }
    zebra = json.loads(evals["logic__zebra_puzzle_dataset_200"][0].ground_truth)
    assert set(zebra) == {"header", "rows"} and len(zebra["rows"][0]) == len(zebra["header"])
    for records in evals.values():
        json.dumps([r.extra_info for r in records], allow_nan=False)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match=r"x\.jsonl:1: not UTF-8"):
        read_records(str(tmp_path / "x.jsonl"), split="train")
