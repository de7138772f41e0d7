"""Prompt records from files: the verl schema, the plain question-and-answer forms, procedural tasks.

What a row may look like, by field (the first that is there is taken):
  prompt        `prompt` (chat messages, or text that becomes one user message), `question` (text)
  ground truth  `reward_model.ground_truth`, `ground_truth`, `answer`, `solution`; of the last two, what follows "####"
                (GSM8K) or the last \\boxed{...} when the text has one
  solution      `solution`, `extra_info.answer`, an `answer` that holds more than the ground truth; may be absent
  data_source   `data_source`; rows without `reward_model` may leave it out and get the name of the file or hub set
  extra_info    `extra_info`, and every column not named above; `index` is the row when the file has none
Rows are checked once, here, so that nothing later meets a half-read record.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rljax.config import ConfigError
from rljax.data.tasks import TASKS, Split
from rljax.jsonl import read_lines
from rljax.types import PromptRecord

Row = tuple[str, dict[str, Any]]
"""Where the row is, for messages ("train.jsonl:17"), and its columns."""

_USED = ("prompt", "question", "reward_model", "ground_truth", "answer", "solution", "data_source", "extra_info")
_NEEDS = (
    'a record needs "prompt" (or "question") and "reward_model.ground_truth" (or "ground_truth", "answer", "solution")'
)
_SPLIT_NAMES = {"train": ("train",), "eval": ("test", "validation", "eval")}


def read_records(
    source: str, *, split: Split = "train", limit: int = 0, seed: int = 0, task_records: int = 256
) -> list[PromptRecord]:
    """Records of a source, in its order.

    Args:
      source: a .parquet or .jsonl file, a folder that `datasets` saved to disk, `hub:OWNER/NAME` or
        `hub:OWNER/NAME:CONFIG` (needs the `datasets` extra), or `task:NAME`.
      split: of a task, of a folder or hub set that has splits ("eval" takes test, validation or eval). A file, and a
        folder without splits, is one split.
      limit: first so many records; 0: all.
      seed: of a task's questions.
      task_records: what "all" means for a task.

    Raises:
      ConfigError: nothing there, nothing in it, or a row that is not a record: its file, row and columns are named.
    """
    kind, _, name = source.partition(":")
    if kind == "task":
        if name not in TASKS:
            raise ConfigError(
                f"{source!r} is no procedural task; choose one of {', '.join(f'task:{t}' for t in TASKS)}"
            )
        return TASKS[name].records(split, limit or task_records, seed)
    default_source = name.partition(":")[0] if kind == "hub" else Path(source).stem
    taken = itertools.islice(read_rows(source, split=split), limit or None)
    records = [_record(where, row, index, default_source) for index, (where, row) in enumerate(taken)]
    if not records:
        raise ConfigError(f"{source} holds no records; give a file with at least one row")
    return records


def read_rows(source: str, *, split: Split = "train") -> Iterator[Row]:
    """Rows of a source as they are, each with where it is. Sources but tasks, splits and errors: as `read_records`."""
    kind, _, name = source.partition(":")
    return _hub_rows(name, split) if kind == "hub" else _path_rows(source, split)


def difficulties(records: list[PromptRecord], field: str) -> list[float | None]:
    """Pass rate of each record: `extra_info[field]`, None where a record has none.

    Raises:
      ConfigError: no record has the field, or a value is not a number in [0, 1].
    """
    values = [record.extra_info.get(field) for record in records]
    if all(value is None for value in values):
        numeric = sorted({k for r in records for k, v in r.extra_info.items() if isinstance(v, float)})
        raise ConfigError(
            f"data.difficulty_field = {field!r} is in no record, and this order or subset needs a pass rate; "
            f"set it to a field of extra_info in [0, 1] (numbers found: {', '.join(numeric) or 'none'})"
        )
    for index, value in enumerate(values):
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise ConfigError(
                f"record {index} has {field} = {value!r}; a pass rate is a number in [0, 1], 1 the easiest: "
                "rescale the column or name another in data.difficulty_field"
            )
    return values


# ------------------------------------------------------------------------------------------------- where rows are


def _path_rows(source: str, split: Split) -> Iterator[Row]:
    path = Path(source)
    if path.is_dir():
        return _folder_rows(path, split)
    if path.suffix not in READERS:
        raise ConfigError(
            f"data source {source!r} is not a kind of file that is read; give {' or '.join(READERS)}, a folder saved "
            "by datasets.save_to_disk, hub:OWNER/NAME, or task:NAME"
        )
    if not path.is_file():
        raise ConfigError(f"data file {source!r} does not exist; give the path of an existing {path.suffix} file")
    return READERS[path.suffix](path)


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            yield from _table_rows(path.name, file.iter_batches(batch_size=1024))
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{path} cannot be read as parquet ({error}); write it again or give another file") from error


def _folder_rows(folder: Path, split: Split) -> Iterator[Row]:
    """Rows of a folder written by `datasets.save_to_disk`, read without that package: Arrow stream files."""
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        folder = folder / _choose_split(names, split, str(folder))
    if not (folder / "state.json").is_file():
        raise ConfigError(
            f"folder {folder} holds neither state.json nor dataset_dict.json; give a folder saved by "
            "datasets.save_to_disk, or a .parquet or .jsonl file in it"
        )
    for part in json.loads((folder / "state.json").read_text())["_data_files"]:
        file = folder / part["filename"]
        try:
            with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
                yield from _table_rows(f"{folder.name}/{file.name}", stream)
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            raise ConfigError(f"{file} cannot be read as an Arrow stream ({error}); save the data set again") from error


def _hub_rows(name: str, split: Split) -> Iterator[Row]:
    repository, _, config = name.partition(":")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"hub:{name} needs the optional package `datasets`; install rljax[datasets], or give a file on disk"
        ) from error
    try:
        names = datasets.get_dataset_split_names(repository, config or None)
        loaded = datasets.load_dataset(repository, config or None, split=_choose_split(names, split, f"hub:{name}"))
    except ConfigError:
        raise
    except Exception as error:  # its own, the hub's, the HTTP library's
        raise ConfigError(
            f"hub:{name} could not be read ({type(error).__name__}: {error}); check the name and the connection, "
            "name a config as hub:OWNER/NAME:CONFIG, or give a file on disk"
        ) from error
    return ((f"hub:{name} row {index}", dict(row)) for index, row in enumerate(loaded))


def _choose_split(names: list[str], split: Split, where: str) -> str:
    for name in _SPLIT_NAMES[split]:
        if name in names:
            return name
    raise ConfigError(
        f"{where} has the splits {', '.join(map(repr, names))}; {split} data must be in "
        f"{' or '.join(map(repr, _SPLIT_NAMES[split]))}: give the file of the split itself"
    )


def _table_rows(name: str, batches: Any) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"{name} row {number}", row
            number += 1


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {".parquet": _parquet_rows, ".jsonl": read_lines}
"""File readers by extension."""

# ---------------------------------------------------------------------------------------------------- row -> record


def _record(where: str, row: dict[str, Any], index: int, default_source: str) -> PromptRecord:
    extra = row.get("extra_info") or {}
    if not isinstance(extra, dict):
        raise ConfigError(f'{where}: "extra_info" is a {type(extra).__name__}; it must be an object')
    # pandas writes its row labels as a column of this name.
    others = {k: v for k, v in row.items() if k not in _USED and not k.startswith("__index_level_")}
    ground_truth, solution = _answers(where, row)
    if not ground_truth.strip():
        raise ConfigError(
            f"{where}: the ground truth is empty, so no completion could be scored; fill it or drop the row"
        )
    if not solution and isinstance(extra.get("answer"), str):
        solution = extra["answer"]
    return PromptRecord(
        prompt=_messages(where, row),
        data_source=_data_source(where, row, default_source),
        ground_truth=ground_truth,
        solution=solution,
        extra_info=_plain({"index": index, **others, **extra}),
    )


def _missing(where: str, what: str, row: dict[str, Any]) -> ConfigError:
    found = ", ".join(f'"{name}"' for name in row) or "nothing"
    null = [name for name in row if row[name] is None]
    empty = f" (null: {', '.join(null)})" if null else ""
    return ConfigError(f"{where}: missing {what}; found {found}{empty}; {_NEEDS}: rename or add the column")


def _messages(where: str, row: dict[str, Any]) -> tuple[dict[str, str], ...]:
    prompt = row.get("prompt")
    if prompt is None:
        prompt = row.get("question")
    if prompt is None:
        raise _missing(where, '"prompt"', row)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise ConfigError(f'{where}: "prompt" is {prompt!r}; it must be text or a non-empty list of chat messages')
    for message in prompt:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ConfigError(
                f'{where}: "prompt" holds the message {str(message)[:80]!r}; each needs a text "role" and "content"'
            )
    return tuple({"role": m["role"], "content": m["content"]} for m in prompt)


def _data_source(where: str, row: dict[str, Any], default: str) -> str:
    found = row.get("data_source")
    if found is None and row.get("reward_model") is not None:
        raise _missing(where, '"data_source", which names the verifier of a row with "reward_model",', row)
    return default if found is None else str(found)


def _answers(where: str, row: dict[str, Any]) -> tuple[str, str]:
    """(ground truth, solution or "")."""
    worked = row.get("solution")
    reward_model = row.get("reward_model")
    if reward_model is not None:
        if not isinstance(reward_model, dict):
            raise ConfigError(f'{where}: "reward_model" is a {type(reward_model).__name__}; it must be an object')
        if reward_model.get("ground_truth") is None:
            raise _missing(where, '"reward_model.ground_truth"', row)
        return _text(reward_model["ground_truth"]), _text(worked)
    if row.get("ground_truth") is not None:
        return _text(row["ground_truth"]), _text(worked)
    for name in ("answer", "solution"):
        if row.get(name) is not None:
            text = _text(row[name])
            final = _final_answer(text)
            return final, _text(worked) or (text if final != text else "")
    raise _missing(where, "the ground truth", row)


def _final_answer(text: str) -> str:
    """What follows the last "####" (GSM8K), else the inside of the last \\boxed{...}, else the text."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return text if boxed is None else boxed


def last_boxed(text: str) -> str | None:
    """The inside of the last \\boxed{...}, braces balanced; None where there is none or it does not end."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for end, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if box and depth == 0:
            return rest[:end]
    return None


def _text(value: Any) -> str:
    """Text as it is, nothing as "", and a structure (a Zebra puzzle's grid) as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN (no pass rate, in files pandas wrote) is None, what JSON lacks is text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
