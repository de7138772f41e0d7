"""What a file of prompts holds: counts, difficulties, lengths, texts, duplicates (`rljax data inspect`)."""

import collections
import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from rljax.config import ConfigError
from rljax.data.pipeline import encode_prompts, with_system
from rljax.data.prepare import PASS_RATE, problem_key
from rljax.data.records import difficulties, read_records
from rljax.data.reuse import PAPER_EASY
from rljax.tokenizer import Tokenizer, load_tokenizer
from rljax.types import PromptRecord

_MANY_LEVELS = 20
_NUM_TEXTS = 5


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Prompt lengths of a set in tokens, chat template and generation prompt included."""

    rows: int
    mean: float
    median: float
    p95: float
    max: int
    over_512: int
    """Prompts longer than this; so the next two."""
    over_1024: int
    over_2048: int
    overlong: int | None
    """Prompts longer than the cap that was asked about."""


@dataclasses.dataclass(frozen=True)
class Duplicate:
    """A row whose problem another row has already."""

    row: int
    of: int
    """The first such row, of the same file or of the evaluation set."""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What one file holds."""

    file: str
    rows: int
    sources: dict[str, int]
    """Rows by `data_source`."""
    difficulty: dict[str, int]
    """Rows by pass rate, easiest first, or by tenths where there are many rates; empty: the file has none."""
    easy: int
    """Rows with a pass rate of at least 0.3."""
    lengths: dict[str, Lengths]
    """By `data_source`, and "all"; empty without a tokenizer."""
    texts: list[str]
    """Prompts as the model sees them (without a tokenizer: the last message), evenly spaced through the file."""
    duplicates: list[Duplicate]
    against: dict[str, list[Duplicate]]
    """By evaluation set."""


def inspect(
    files: Sequence[str],
    *,
    tokenizer: str = "",
    against: Sequence[str] = (),
    max_prompt_tokens: int = 0,
    difficulty_field: str = PASS_RATE,
    system_prompt: str = "",
) -> list[Inspection]:
    """Reads `files` (each as `data.train`) and says what they hold.

    Args:
      tokenizer: folder or hub name; empty: nothing is said about lengths.
      against: evaluation sets (each as `evaluation.data`) whose problems should not be in `files`.
      max_prompt_tokens: cap on which overlong prompts are counted; 0: none.
      difficulty_field: as `data.difficulty_field`; a file may be without.
      system_prompt: as `data.system_prompt`.

    Raises:
      ConfigError: a file or the tokenizer cannot be read; a pass rate is not in [0, 1].
    """
    if max_prompt_tokens < 0:
        raise ConfigError(
            f"--max-prompt-tokens {max_prompt_tokens} must be at least 0, which counts nothing; give "
            "the data.max_prompt_tokens of a run"
        )
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    held_out = {name: _first_rows(read_records(name, split="eval")) for name in against}
    return [
        _inspection(
            name, with_system(read_records(name), system_prompt), loaded, held_out, max_prompt_tokens, difficulty_field
        )
        for name in files
    ]


def prompt_lengths(lengths: np.ndarray, cap: int = 0) -> Lengths:
    """Of `lengths` [rows] in tokens; `cap` 0: overlong prompts are not asked about."""
    over = [int((lengths > bound).sum()) for bound in (512, 1024, 2048)]
    middle, high = (float(x) for x in np.percentile(lengths, (50, 95)))
    return Lengths(
        len(lengths),
        float(lengths.mean()),
        middle,
        high,
        int(lengths.max()),
        *over,
        overlong=int((lengths > cap).sum()) if cap else None,
    )


def _inspection(
    name: str,
    records: list[PromptRecord],
    tokenizer: Tokenizer | None,
    held_out: dict[str, dict[str, int]],
    cap: int,
    field: str,
) -> Inspection:
    sources = collections.Counter(record.data_source for record in records)
    has_rates = any(record.extra_info.get(field) is not None for record in records)
    rates = difficulties(records, field) if has_rates else []
    keys, first = [problem_key(record) for record in records], _first_rows(records)
    by_source: dict[str, Lengths] = {}
    if tokenizer is not None:
        lengths = np.array([len(ids) for ids in encode_prompts(records, tokenizer)])
        by_source["all"] = prompt_lengths(lengths, cap)
        for source in sorted(sources) if len(sources) > 1 else ():
            by_source[source] = prompt_lengths(lengths[[r.data_source == source for r in records]], cap)
    shown = np.linspace(0, len(records) - 1, min(_NUM_TEXTS, len(records))).round().astype(int)
    return Inspection(
        file=name,
        rows=len(records),
        sources=dict(sources.most_common()),
        difficulty=_histogram(rates),
        easy=sum((rate or 0) >= PAPER_EASY for rate in rates),
        lengths=by_source,
        texts=[_text(records[row], tokenizer) for row in shown],
        duplicates=[Duplicate(row, first[key]) for row, key in enumerate(keys) if first[key] < row],
        against={
            other: [Duplicate(row, there[key]) for row, key in enumerate(keys) if key in there]
            for other, there in held_out.items()
        },
    )


def _first_rows(records: Sequence[PromptRecord]) -> dict[str, int]:
    """First row of each problem."""
    first: dict[str, int] = {}
    for row, record in enumerate(records):
        first.setdefault(problem_key(record), row)
    return first


def _histogram(rates: Sequence[float | None]) -> dict[str, int]:
    known = [float(rate) for rate in rates if rate is not None]
    many = len(set(known)) > _MANY_LEVELS
    levels = collections.Counter(np.floor(10 * np.array(known)) / 10 if many else known)
    counts = {f"{level:g}{' and more' * many}": count for level, count in sorted(levels.items(), reverse=True)}
    missing = len(rates) - len(known)
    return counts | ({"none": missing} if missing else {})


def _text(record: PromptRecord, tokenizer: Tokenizer | None) -> str:
    return record.prompt[-1]["content"] if tokenizer is None else tokenizer.render_chat(record.prompt)


# ------------------------------------------------------------------------------------------------------ for the reader


def as_json(inspections: Sequence[Inspection]) -> str:
    """The inspections as one JSON array."""
    return json.dumps([dataclasses.asdict(inspection) for inspection in inspections], ensure_ascii=False, indent=1)


def as_text(inspections: Sequence[Inspection]) -> str:
    """The inspections as plain tables."""
    return "\n\n".join("\n".join(_lines(inspection)) for inspection in inspections)


def _lines(found: Inspection) -> list[str]:
    lines = [f"{found.file}: {found.rows:,} rows", ""]
    lines += _table([("data_source", "rows"), *((name, f"{count:,}") for name, count in found.sources.items())])
    if found.difficulty:
        widest = max(found.difficulty.values())
        rows = [
            (level, f"{n:,}", f"{n / found.rows:.1%}", "#" * round(30 * n / widest))
            for level, n in found.difficulty.items()
        ]
        lines += ["", *_table([("pass rate", "rows", "share", ""), *rows])]
        lines.append(f"easy (at least {PAPER_EASY}): {found.easy:,}, hard: {found.rows - found.easy:,}")
    else:
        lines += ["", "no pass rates"]
    if found.lengths:
        lines += ["", *_table(_length_rows(found.lengths))]
    lines += ["", *_duplicate_lines("duplicates within the file", found.duplicates)]
    for name, duplicates in found.against.items():
        lines += _duplicate_lines(f"also in {name}", duplicates)
    for number, text in enumerate(found.texts, 1):
        lines += ["", f"--- prompt {number} of {len(found.texts)}", text]
    return lines


def _length_rows(lengths: dict[str, Lengths]) -> list[tuple[str, ...]]:
    header = ["prompt tokens", "rows", "mean", "median", "p95", "max", ">512", ">1024", ">2048"]
    with_cap = any(of.overlong is not None for of in lengths.values())
    rows = [tuple([*header, "overlong"] if with_cap else header)]
    for name, of in lengths.items():
        middle = (f"{round(value):,}" for value in (of.mean, of.median, of.p95, of.max))
        over = (f"{count:,}" for count in (of.over_512, of.over_1024, of.over_2048, of.overlong) if count is not None)
        rows.append((name, f"{of.rows:,}", *middle, *over))
    return rows


def _duplicate_lines(what: str, duplicates: list[Duplicate]) -> list[str]:
    examples = ", ".join(f"row {found.row} = {found.of}" for found in duplicates[:5])
    more = ", ..." if len(duplicates) > 5 else ""
    return [f"{what}: {len(duplicates):,}" + (f" ({examples}{more})" if duplicates else "")]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns aligned: the first and a last without a title to the left, the others to the right."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    bars = len(rows[0]) > 1 and not rows[0][-1]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place == 0 or (bars and place == len(row) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, wide, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
