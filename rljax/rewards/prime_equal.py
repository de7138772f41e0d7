"""PRIME's `math_equal`, as it acts in the paper's scorer: by string, by number, and element by element.

Its symbolic comparison never acts there: the time limit around it, a decorator, is used as a context manager, and the
error that this raises is swallowed. Nor do the limits of 10 s, or of 1 s that `timeout=True` means, ever apply.
"""

import math
import re
from typing import Any

from rljax.rewards.answers import Undecidable

_TOLERANCE = 1e-4
_MAX_CHARS = 1000
_DOLLARS = re.compile(r"\$\d+(\.\d+)?")
_PERCENT = re.compile(r"\d+(\.\d+)?\\?%$")
_INTERVALS = (
    (re.compile(r"^Interval\((.*)\)$"), "[]"),
    (re.compile(r"^Interval\.Ropen\((.*)\)$"), "[)"),
    (re.compile(r"^Interval\.Lopen\((.*)\)$"), "(]"),
    (re.compile(r"^Interval\.open\((.*)\)$"), "()"),
)
_MATRIX = "\begin{pmatrix}"  # that is a backspace, then egin{pmatrix}: the original's slip


def prime_equal(given: str, truth: str) -> bool:
    r"""True if the two are the same string, the same number, or lists of such; neither contains `\pi`.

    Numbers are the same within a ten-thousandth, and also when one is a hundred times the other.

    Raises:
      Undecidable: the original would evaluate the answer as Python.
    """
    try:
        return _equal(given, truth)
    except (
        ValueError,
        OverflowError,
        IndexError,
        RecursionError,
    ):  # ends the whole comparison, not that of one element
        return False


def _equal(given: str, truth: str) -> bool:
    left, right = _normal(given), _normal(truth)
    if isinstance(left, str):
        left = left[:_MAX_CHARS]
    if isinstance(left, str) and isinstance(right, str) and _same_text(left, right):
        return True
    left_number, right_number = _number(left), _number(right)
    if left_number is not None and right_number is not None:
        return any(
            math.isclose(number, left_number, rel_tol=_TOLERANCE)
            for number in (right_number / 100, right_number, right_number * 100)
        )
    if left == "":
        return False
    return _equal_by_parts(_interval(str(left).strip()), str(right).strip())


def _same_text(left: str, right: str) -> bool:
    return left.strip().lower() == right.strip().lower() or left.replace(" ", "") == right.replace(" ", "")


def _normal(answer: str) -> str | int:
    """Without a leading dollar or a trailing percent sign; of a numeral with a base, only the digits, as a number."""
    if _DOLLARS.match(answer):
        return answer[1:]
    if _PERCENT.match(answer):
        return answer.replace("\\%", "").replace("%", "")
    if "_" in answer:
        return int(float(answer.partition("_")[0]))
    return answer


def _number(answer: Any) -> float | None:
    text = str(answer)
    try:
        return float(text.replace("{,}", "") if "{,}" in text else text.replace(",", ""))
    except ValueError:
        return None


def _interval(answer: str) -> str:
    """sympy's notation of an interval as a mathematician's."""
    for pattern, (opening, closing) in _INTERVALS:
        match = pattern.match(answer)
        if match:
            return opening + match[1] + closing
    return answer


def _equal_by_parts(given: str, truth: str) -> bool:
    """Brackets do not count; lists are compared element by element, all of them even when one already differs."""
    if _bare(given, given, truth) == _bare(truth, given, truth):
        return True
    in_brackets = given[:1] in ("(", "[") and given[-1:] in (")", "]")
    same_brackets = in_brackets and (given[0], given[-1]) == (truth[:1], truth[-1:])
    if same_brackets and _equal_lists(given[1:-1].split(","), truth[1:-1].split(",")):
        return True
    if "," in given and "," in truth:
        left, right = given.split(","), truth.split(",")
        if len(left) == len(right):
            return _equal_lists([part.strip() for part in left], [part.strip() for part in right])
    is_point = given.startswith("Point") and truth[0] == "(" and truth[-1] == ")"
    if is_point and _equal_lists(given[given.find("(") + 1 : -1].split(","), truth[1:-1].split(",")):
        return True
    if _MATRIX in truth and (given.startswith("Matrix") or (given[:1] == "[" and given[-1:] == "]")):
        raise Undecidable("a matrix, which the paper's scorer would evaluate as Python")
    return False


def _bare(text: str, given: str, truth: str) -> str:
    square = given[:1] == "[" and given[-1:] == "]" and not truth.startswith("(")
    round_ = given[:1] == "(" and given[-1:] == ")" and not truth.startswith("[")
    if square or round_:
        text = text.strip("[]()")
    return re.sub(r"[{}()]", "", text)


def _equal_lists(given: list[str], truth: list[str]) -> bool:
    if len(given) != len(truth):
        return False
    return all([_equal(left, right) for left, right in zip(given, truth, strict=True)])
