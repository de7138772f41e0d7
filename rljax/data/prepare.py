"""The paper's data from its sources: raw rows in, parquet files in the verl schema out (`rljax data prepare`).

What a row of the output holds: `data_source`, `prompt` (one user message in the paper's wrapper), `ability`,
`reward_model` (`ground_truth`, `style`), `extra_info` (index, split, and what else the set has).
Source: `src/data/prepare_math_by_difficulty_full.py`, `pre_verl.py` and `sample_dataset_by_difficulty_full.py`
of arXiv 2509.25300's repository. They draw with pandas, which is not needed here: `reuse.paper_sample`.
"""

import collections
import dataclasses
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rljax.config import ConfigError
from rljax.data.records import READERS, Row, difficulties, last_boxed, read_records, read_rows
from rljax.data.reuse import PAPER_EASY, PAPER_POOL, PAPER_SEEDS, PAPER_TAUS, make_plan, paper_sample
from rljax.types import PromptRecord

PREFIX = "You are a knowledgeable math assistant. Answer the following questions and think step by step. "
"""Begins every mathematical prompt of the paper."""
BOXED = " Please output the final answer within \\boxed{}."
"""Ends the prompts of training, holdout, MATH-500 and AMC."""
STEP_BY_STEP = " Please solve step by step and put your final answer within \\boxed{}."
"""Ends the prompts of GSM8K and AIME."""

PASS_RATE = "qwen2.5_7b_pass_rate"
"""The column that orders the guru problems: share of 16 samples that Qwen2.5-7B-Instruct got right."""
HOLDOUT = 500
"""Problems of the paper's holdout, half of them easy."""

_WRAPPERS = (
    BOXED,
    STEP_BY_STEP,
    " Let's think step by step and output the final answer within \\boxed{}.",  # verl's MATH
    ' Let\'s think step by step and output the final answer after "####".',  # verl's GSM8K
)
_SAVED = ("state.json", "dataset_dict.json")  # in a folder of datasets.save_to_disk


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Output files before they are written."""

    files: dict[str, list[dict[str, Any]]]
    """Rows by file name."""
    extra: dict[str, pa.DataType]
    """Fields of `extra_info`."""
    notes: list[str]
    """Lines for people: what was counted, what was dropped."""


def prepare(
    kind: str,
    source: str,
    output_dir: str,
    *,
    holdout: int = HOLDOUT,
    holdout_file: str = "",
    reuse_sets: bool = False,
) -> str:
    """Writes the files of a set to `output_dir`; returns lines that say what was read, dropped and written.

    Args:
      kind: a name in `KINDS`. guru-math: training and holdout files from the guru mathematics rows. gsm8k, math: one
        file per split from the raw question and answer, or problem and solution.
      source: as `data.train`, or a folder of .parquet and .jsonl files.
      holdout: guru-math: problems held out, half of them easy.
      holdout_file: guru-math: hold out the problems of this file instead. With the released holdout, training and
        evaluation split as in the paper; drawn anew, it has other problems of the same pass rates (`easy_to_hard`).
      reuse_sets: guru-math: also the paper's subsets of 51,200 / tau problems. A run needs none of them: it takes
        `data.subset = paper` and `data.unique` with the training file.

    Raises:
      ConfigError: the source cannot be read, has not the columns, or has too few rows; an output exists.
    """
    assert kind in KINDS, kind
    if kind == "guru-math":
        prepared = _guru_math(source, holdout, holdout_file, reuse_sets)
    else:
        prepared = _raw_set(source, RAW_SETS[kind])
    folder = Path(output_dir)
    paths = {folder / name: rows for name, rows in prepared.files.items()}
    present = [str(path) for path in paths if path.exists()]
    if present or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            f"{', '.join(present) or f'{folder} is a file and'} exists and is not overwritten; give another folder, or "
            "remove what is there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows in paths.items():
        partial = path.with_suffix(".partial")  # a file is there whole or not at all
        pq.write_table(pa.Table.from_pylist(rows, _schema(prepared.extra)), partial)
        partial.replace(path)
    return "\n".join([*prepared.notes, *(f"{path}: {len(rows):,} rows" for path, rows in paths.items())])


def wrap(problem: str, suffix: str, *, unless: str = "") -> str:
    """The paper's user message; prefix and suffix that are there already are not added again.

    Args:
      unless: no suffix where the text holds this; empty: where it ends with the suffix.
    """
    text = problem if problem.startswith(PREFIX) else PREFIX + problem
    has_suffix = unless in text if unless else text.endswith(suffix)
    return text if has_suffix else text + suffix


def problem_key(record: PromptRecord) -> str:
    """The problem of a record without the known wrappers, case, spaces and widths: equal for two copies of one."""
    text = record.prompt[-1]["content"].removeprefix(PREFIX)
    for wrapper in _WRAPPERS:
        text = text.removesuffix(wrapper)
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _schema(extra: dict[str, pa.DataType]) -> pa.Schema:
    message = pa.struct([("content", pa.string()), ("role", pa.string())])
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(message)),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
            ("extra_info", pa.struct(sorted(extra.items()))),
        ]
    )


def _verl_row(data_source: str, prompt: Sequence[dict[str, str]], truth: str, extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "data_source": data_source,
        "prompt": list(prompt),
        "ability": "math",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": extra,
    }


# ---------------------------------------------------------------------------------------------------------- guru-math


def easy_to_hard(rates: Sequence[float | None]) -> np.ndarray:
    """[rows] int64: rows by falling pass rate, None as 0, equal rates as read.

    The paper's own sort is pandas' default, which is not stable: its released files have equal rates in another order,
    and so other problems at the places that `holdout_rows` and the reuse sets draw.
    """
    return np.argsort([-(rate or 0.0) for rate in rates], kind="stable")


def holdout_rows(rates: Sequence[float | None], size: int = HOLDOUT) -> np.ndarray:
    """[size] int64, ascending: the rows the paper holds out of rows sorted from easy to hard, half of them easy.

    Raises:
      ConfigError: `size` is not positive; fewer easy or hard rows than half of it.
    """
    if size < 1:
        raise ConfigError(f"--holdout {size} must be at least 1; the paper's is {HOLDOUT}")
    is_easy = np.array([rate or 0.0 for rate in rates]) >= PAPER_EASY
    classes, counts = (np.flatnonzero(is_easy), np.flatnonzero(~is_easy)), (size // 2, size - size // 2)
    if any(len(rows) < count for rows, count in zip(classes, counts, strict=True)):
        raise ConfigError(
            f"--holdout {size} takes {counts[0]} easy and {counts[1]} hard problems (pass rate at least {PAPER_EASY}, "
            f"or below), and the source has {len(classes[0])} and {len(classes[1])}; hold out fewer, or give all of it"
        )
    drawn = [
        rows[paper_sample(len(rows), count, seed)]
        for rows, count, seed in zip(classes, counts, PAPER_SEEDS, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def _guru_math(source: str, holdout: int, holdout_file: str, reuse_sets: bool) -> Prepared:
    everything = read_records(_guru_file(source))
    records = [record for record in everything if record.data_source.startswith("math")]
    if not any(record.extra_info.get(PASS_RATE) is not None for record in records):
        raise ConfigError(
            f"{source} has no mathematical row with a pass rate in {PASS_RATE!r}, by which problems are ordered; give "
            "the guru mathematics file (math__combined_54.4k.parquet of LLM360/guru-RL-92k)"
        )
    records = [records[row] for row in easy_to_hard(difficulties(records, PASS_RATE))]
    rates = [record.extra_info.get(PASS_RATE) for record in records]
    drawn = _rows_of(records, holdout_file) if holdout_file else holdout_rows(rates, holdout)
    held = set(drawn.tolist())
    rows = [_guru_row(record, index, "test" if index in held else "train") for index, record in enumerate(records)]
    test, train = ([row for row in rows if row["extra_info"]["split"] == split] for split in ("test", "train"))
    if not train:
        raise ConfigError(f"the holdout leaves no row of {source} to train on; hold out fewer")
    files = {
        f"math__full_difficulty_ordered_train_{len(train)}.parquet": train,
        f"math__full_difficulty_ordered_test_{len(test)}.parquet": test,
    }
    if reuse_sets:
        files |= _reuse_sets(train)
    others = collections.Counter(record.data_source for record in everything if record.data_source[:4] != "math")
    notes = [f"left out, not mathematics: {count:,} rows of {name}" for name, count in sorted(others.items())]
    notes.append(f"{_classes(rows)}, {sum(rate is None for rate in rates):,} of them without a pass rate")
    origin = f"the problems of {holdout_file}" if holdout_file else f"seeds {PAPER_SEEDS[0]} and {PAPER_SEEDS[1]}"
    notes += [f"holdout: {_classes(test)}, {origin}", f"train: {_classes(train)}"]
    extra = {"index": pa.int64(), "split": pa.string(), **dict.fromkeys(_RATES, pa.float64())}
    return Prepared(files, extra, notes)


_RATES = (PASS_RATE, "qwen3_30b_pass_rate")


def _rows_of(records: Sequence[PromptRecord], file: str) -> np.ndarray:
    """[rows] int64, ascending: the rows whose prompts are in another file, to the letter: a copy in other words or with
    other spaces stays in training, as in the paper (`rljax data inspect --against` finds some of them)."""
    wanted = {_message(record)["content"] for record in read_records(file, split="eval")}
    texts = [_message(record)["content"] for record in records]
    missing = len(wanted - set(texts))
    if missing:
        raise ConfigError(
            f"--holdout-file {file} has {missing} of its {len(wanted)} prompts not in the source; give a holdout that "
            "was taken from it"
        )
    return np.flatnonzero([text in wanted for text in texts])


def _guru_file(source: str) -> str:
    """The file of mathematics in a folder that is a copy of the data set; any other source as it is."""
    folder = Path(source)
    if not folder.is_dir() or any((folder / name).is_file() for name in _SAVED):
        return source
    found = sorted(folder.rglob("math__combined*.parquet")) or _data_files(folder)
    if len(found) != 1:
        raise ConfigError(
            f"folder {source} holds {len(found)} files that may be meant ({', '.join(p.name for p in found[:5])}), "
            "none or several named math__combined*.parquet; give the file itself"
        )
    return str(found[0])


def _message(record: PromptRecord) -> dict[str, str]:
    """The last message in the paper's wrapper. A text with a box of any kind gets no second instruction: its rule."""
    last = record.prompt[-1]
    return {"role": last["role"], "content": wrap(last["content"], BOXED, unless="\\boxed{")}


def _guru_row(record: PromptRecord, index: int, split: str) -> dict[str, Any]:
    rates = {name: record.extra_info.get(name) for name in _RATES}
    return _verl_row(
        record.data_source,
        [*record.prompt[:-1], _message(record)],
        record.ground_truth,
        {"index": index, "split": split, **rates},
    )


def _reuse_sets(train: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    rates = [row["extra_info"][PASS_RATE] for row in train]
    sets = {}
    for tau in PAPER_TAUS:
        unique = min(len(train), PAPER_POOL) // tau
        if unique:
            chosen = make_plan(len(train), unique=unique, subset="paper", difficulties=rates).chosen
            sets[f"math__sampled_1_{tau}_{unique}.parquet"] = [train[row] for row in chosen]
    return sets


def _classes(rows: list[dict[str, Any]]) -> str:
    easy = sum((row["extra_info"][PASS_RATE] or 0.0) >= PAPER_EASY for row in rows)
    return f"{len(rows):,} problems: {easy:,} easy (pass rate at least {PAPER_EASY}), {len(rows) - easy:,} hard"


# -------------------------------------------------------------------------------------------------------- gsm8k, math


@dataclasses.dataclass(frozen=True)
class RawSet:
    """How a set looks on the hub, and what the paper makes of it."""

    problem: str
    """Column with the text of the problem."""
    worked: str
    """Column with the worked answer."""
    others: tuple[str, ...]
    """Columns that are kept in `extra_info` where they are there."""
    data_source: str
    suffix: str
    answer: Callable[[str], str | None]
    """The ground truth in a worked answer; None where it has none."""
    lacking: str
    """What a row without a ground truth lacks, for people."""


def _after_hashes(worked: str) -> str | None:
    return worked.rpartition("####")[2].strip() or None if "####" in worked else None


def _in_box(worked: str) -> str | None:
    """The inside of the last box; a few solutions of MATH write it as \\fbox{2} or \\boxed 2."""
    boxed = last_boxed(worked.replace("\\fbox{", "\\boxed{"))
    if boxed is None and "\\boxed " in worked:
        boxed = worked.rpartition("\\boxed ")[2].partition("$")[0]
    return (boxed or "").strip() or None


RAW_SETS: dict[str, RawSet] = {
    "gsm8k": RawSet("question", "answer", (), "openai/gsm8k", STEP_BY_STEP, _after_hashes, 'an answer after "####"'),
    "math": RawSet("problem", "solution", ("level", "type"), "math__math", BOXED, _in_box, "a boxed answer"),
}
"""Raw sets by kind. `data_source` is that of the paper's evaluation sets GSM8K and MATH-500."""

KINDS = ("guru-math", *RAW_SETS)
"""What `prepare` knows."""


def _raw_set(source: str, raw: RawSet) -> Prepared:
    files, notes = {}, []
    for split, parts in _splits(source).items():
        rows, dropped, total = [], [], 0
        for where, row in (pair for part in parts for pair in part):
            total += 1
            made = _raw_row(where, row, raw, split, index=total - 1)
            if made is None:
                dropped.append(where)
            else:
                rows.append(made)
        if not rows:
            raise ConfigError(f"{source} ({split}) has {total} rows and none with {raw.lacking}; give the raw data set")
        if dropped:
            notes.append(
                f"{split}: DROPPED {len(dropped):,} of {total:,} rows without {raw.lacking}: {', '.join(dropped[:5])}"
                + (", ..." if len(dropped) > 5 else "")
            )
        files[f"{split}.parquet"] = rows
    text = dict.fromkeys(("split", "question", "answer", *raw.others), pa.string())
    return Prepared(files, {"index": pa.int64(), **text}, notes)


def _raw_row(where: str, row: dict[str, Any], raw: RawSet, split: str, index: int) -> dict[str, Any] | None:
    """`index` counts all rows of the split, those dropped too. None: the row has no ground truth."""
    for name in (raw.problem, raw.worked):
        if not isinstance(row.get(name), str):
            found = ", ".join(f'"{column}"' for column in row) or "nothing"
            raise ConfigError(
                f'{where}: missing text in "{name}"; found {found}; rows of the raw set have "{raw.problem}" and '
                f'"{raw.worked}": give it as the hub has it (files in the verl schema need no preparing)'
            )
    problem, worked = row[raw.problem], row[raw.worked]
    truth = raw.answer(worked)
    if truth is None:
        return None
    others = {name: None if row.get(name) is None else str(row[name]) for name in raw.others}
    extra = {"index": index, "split": split, "question": problem, "answer": worked, **others}
    message = {"role": "user", "content": wrap(problem, raw.suffix)}
    return _verl_row(raw.data_source, [message], truth, extra)


def _splits(source: str) -> dict[str, list[Iterator[Row]]]:
    """Rows by split. Of a hub set, or a folder with splits: train and test. Files are of the split that the beginning
    of their names says: `test-00000-of-00001.parquet` is of "test"."""
    path = Path(source)
    if source.startswith("hub:") or (path / "dataset_dict.json").is_file():
        return {"train": [read_rows(source, split="train")], "test": [read_rows(source, split="eval")]}
    is_plain_folder = path.is_dir() and not (path / "state.json").is_file()
    files: Iterable[Path] = _data_files(path, "**/") if is_plain_folder else [path]
    splits = collections.defaultdict(list)
    for file in files:
        splits[file.stem.partition("-")[0]].append(read_rows(str(file)))
    if not splits:
        raise ConfigError(
            f"folder {source} holds no {' or '.join(READERS)} file and was not written by datasets.save_to_disk; give "
            "a folder with the data set's files, a file, or hub:OWNER/NAME"
        )
    return dict(splits)


def _data_files(folder: Path, depth: str = "") -> list[Path]:
    return sorted(file for suffix in READERS for file in folder.glob(f"{depth}*{suffix}"))
