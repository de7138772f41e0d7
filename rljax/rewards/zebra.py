"""Zebra puzzles: a grid of attributes between answer tags, scored by the share of right cells.

`paper_score` is the rule that arXiv 2509.25300 scored with, defects included; `score` is the repaired one. In both a
grid earns something by its first column alone, the positions, which the puzzle gives away: the measure is the paper's.

The ground truth is a JSON object with "header" and "rows".
"""

import ast
import json
import math
import re
import warnings
from typing import Any

from rljax.rewards.answers import Undecidable

_OPEN, _CLOSE = "<answer>", "</answer>"
_MAX_CHARS = 100_000
_LARGE = 10**9  # beyond any position; Python refuses to write the very long ones out
_FENCE = re.compile(r"```\w*")
_UNREADABLE = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)  # the last: the parser's own stack


def score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """Share of the cells that are right, 0 for a grid of another shape or none.

    The grid is in the last `<answer>...</answer>`, which may span lines and hold a fenced block: JSON or a Python
    literal, `rows` a list of rows or a mapping of them, numbered from 0 or 1; a row a list of cells or a mapping, by
    column name or number from 0. Columns in another order are put in order where the answer's own header names them.
    Cells are compared as text: 1 is "1". Rows are compared in their order.

    Raises:
      Undecidable: the answer is too long to be meant.
    """
    header, rows = _grid(ground_truth)
    answer = _read(_last_answer(response))
    if not isinstance(answer, dict):
        return 0.0
    given = _in_order(answer.get("rows"), len(rows), first=(0, 1))
    columns = _columns(answer.get("header"), header)
    if given is None:
        return 0.0
    right = 0
    for given_row, wanted_row in zip(given, rows, strict=True):
        cells = _cells(given_row, header, columns)
        if cells is None:
            return 0.0
        right += sum(_text(a) == _text(b) is not None for a, b in zip(cells, wanted_row, strict=True))
    return right / (len(header) * len(rows))


def paper_score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """Share of the cells that are equal to the ground truth's, as the paper's code found it; 0 for any failure.

    It reads the last pair of answer tags with no line end between them, as a Python literal, else as JSON, and indexes
    what it gets: whatever answers to `["rows"][i][j]` counts, cells of another type never do, and more rows or cells
    than there should be are not noticed.
    """
    header, rows = _grid(ground_truth)
    text = _last_answer_on_a_line(response)
    try:
        answer = None if text is None else _parsed(text.strip())
        if not isinstance(answer, dict):
            return 0.0
        given = answer["rows"]
        right = sum(given[i][j] == rows[i][j] for i in range(len(rows)) for j in range(len(header)))
        return right / (len(header) * len(rows))
    except (*_UNREADABLE, LookupError):
        return 0.0


def _grid(ground_truth: str) -> tuple[list[str], list[list[Any]]]:
    """Header and rows. Raises ValueError when the ground truth is not such a grid, which no response can help."""
    try:
        grid = json.loads(ground_truth)
        header, rows = grid["header"], grid["rows"]
        fits = bool(header and rows) and all(len(row) == len(header) for row in rows)
        fits = fits and all(isinstance(cell, str | int | float) for row in rows for cell in row)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"the ground truth {ground_truth[:80]!r} must be JSON with header and rows: {error}"
        ) from error
    if not fits:
        raise ValueError(f"the ground truth {ground_truth[:80]!r} must have rows, each as long as its header")
    return header, rows


def _last_answer(response: str) -> str:
    end = response.rfind(_CLOSE)
    start = response.rfind(_OPEN, 0, max(end, 0))
    return "" if start < 0 else response[start + len(_OPEN) : end]


def _last_answer_on_a_line(response: str) -> str | None:
    found = None
    for line in response.split("\n"):  # not splitlines: only this one ends a line
        start = line.find(_OPEN)
        while start >= 0:
            start += len(_OPEN)
            end = line.find(_CLOSE, start)
            if end < 0:
                break
            found = line[start:end]
            start = line.find(_OPEN, end)
    return found


def _parsed(text: str) -> Any:
    """A Python literal, else JSON. Raises any of _UNREADABLE."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in a string is the response's business
            warnings.simplefilter("ignore", DeprecationWarning)
            return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return json.loads(text)


def _read(text: str) -> Any:
    """The literal or JSON in the text, fenced or not; None for what is neither."""
    if len(text) > _MAX_CHARS:
        raise Undecidable(f"an answer of {len(text)} characters; at most {_MAX_CHARS} are read")
    fence = _FENCE.search(text)
    if fence:
        text = text[fence.end() :].partition("```")[0]
    try:
        return _parsed(text.strip())
    except _UNREADABLE:
        return None


def _in_order(items: Any, count: int, *, first: tuple[int, ...]) -> list[Any] | None:
    """A list of `count` items, also from a mapping whose keys number them; None when it is anything else."""
    if isinstance(items, dict):
        numbered = {_text(key): value for key, value in items.items()}
        for start in first:
            keys = [str(start + i) for i in range(count)]
            if len(items) == count and set(keys) == set(numbered):
                return [numbered[key] for key in keys]
        return None
    return list(items) if isinstance(items, list | tuple) and len(items) == count else None


def _columns(given: Any, header: list[str]) -> list[int]:
    """Where each column of the ground truth stands in the answer."""
    if isinstance(given, list | tuple):
        names = [_text(name) for name in given]
        if sorted(map(str, names)) == sorted(header):
            return [names.index(name) for name in header]
    return list(range(len(header)))


def _cells(row: Any, header: list[str], columns: list[int]) -> list[Any] | None:
    """The row's cells in the ground truth's order; None when it has too few or too many."""
    if isinstance(row, dict) and set(row) == set(header):
        return [row[name] for name in header]
    cells = _in_order(row, len(header), first=(0,))
    return None if cells is None else [cells[column] for column in columns]


def _text(cell: Any) -> str | None:
    """A cell for comparing: "1" for 1, 1.0 and " 1 "; None for what can be no cell, and equals no other."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, int):
        return str(cell) if not isinstance(cell, bool) and abs(cell) < _LARGE else None
    if isinstance(cell, float):
        return repr(cell) if math.isfinite(cell) else None
    return cell.strip() if isinstance(cell, str) else None
