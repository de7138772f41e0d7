r"""Grade-school answers: one number, after `####`, in a box, or last in the text.

`score` is the repaired rule; `paper_score` that of arXiv 2509.25300 (`verl/utils/reward_score/gsm8k.py` of its
repository), faults included.
"""

import re
from fractions import Fraction
from typing import Any

from rljax.rewards.answers import DECIMAL, Undecidable, marked_answer, words_of_value
from rljax.rewards.math_dapo import last_box
from rljax.rewards.whole_text import agrees

_NUMBER = re.compile(rf"(?<![\d.)])-?(?:{DECIMAL})(?:\s*/\s*[1-9]\d*)?|(?<=[)])\d+")
_MAX_NUMBER_CHARS = 100
_BETWEEN_NUMBERS = re.compile(r"(?<=\d)(?:\\[!,;: ](?!\d{3}(?!\d))|\\?[$%])(?=\d)")

_BESIDE = re.compile(
    r"\\(?:text|textbf|mathrm|mbox|mathbf|boxed)(?![A-Za-z])|\\[()\[\]]|[^\W\d_]-(?=[^\W\d_])|[^\W\d_]|\*\*|/(?=[a-z]{2})|"
    r"[\s.,:;=(){}\[\]'\"`$€£%#&°≈~]"
)
"""What may stand beside the number: words, a unit, currency, brackets; no sign, operator, root or comparison."""
_FACTOR = re.compile(r"\s*[KkMBxyzn](?![A-Za-z])")

_PAPER_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_PAPER_NUMBER = re.compile(r"-?[0-9.,]+")
_PAPER_UNITS = (
    "dollars", "dollar", "cents", "cent", "percent", "percentage", "points", "point", "units", "unit", "degrees",
    "degree", "feet", "foot", "inches", "inch", "meters", "meter", "miles", "mile", "cm", "mm", "kg", "pounds", "pound",
    "hours", "hour", "minutes", "minute", "seconds", "second", "days", "day",
)  # fmt: skip
_PAPER_UNIT_PATTERNS = tuple((len(unit) + 1, re.compile(rf"{unit}s?\Z", re.IGNORECASE)) for unit in _PAPER_UNITS)


def score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    r"""1 if the response's answer is the ground truth, as a string or as a number; else 0.

    The answer is the last `\boxed{}`, else what follows the last `####` on its line, else the last number. Commas, $,
    %, a final dot and integral decimals are normalised; a unit may stand beside the number, another number may not.

    Raises:
      Undecidable: the number is too long to be meant.
    """
    candidate = _candidate(response)
    if candidate is None:
        return 0.0
    given, wanted = _normalise(candidate), _normalise(ground_truth)
    if given == wanted:
        return float(given != "")
    value = _value(given)
    return float(value is not None and value == _value(wanted))


def _candidate(response: str) -> str | None:
    marked = marked_answer(response)
    if marked is not None:
        return marked
    numbers = _NUMBER.findall(response.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1] if numbers else None


def _normalise(answer: str) -> str:
    answer = answer.replace("\N{MINUS SIGN}", "-")
    answer = _BETWEEN_NUMBERS.sub(" ", answer)  # 5\%6 is two numbers, not 56
    answer = re.sub(r"\\[!,;: ]|\\?[$%]", "", answer)
    answer = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", answer).strip().rstrip(".").strip()
    return re.sub(r"(?<=\d)\.0+$", "", answer)


def _value(answer: str) -> Fraction | None:
    """The one number in a normalised answer; None when there is no number, or more than one."""
    numbers = _NUMBER.findall(answer)
    if len(numbers) != 1 or any(character.isnumeric() for character in _NUMBER.sub("", answer)):
        return None  # the second kind is 5.6.7, of which only 5.6 is a number, or 5½
    before, _, after = answer.partition(numbers[0])
    if not _is_plain(before.strip(), after) or words_of_value(answer):
        return None
    if len(numbers[0]) > _MAX_NUMBER_CHARS:
        raise Undecidable(f"a number of {len(numbers[0])} characters; at most {_MAX_NUMBER_CHARS} are read")
    return Fraction(re.sub(r"[\s,]", "", numbers[0]))


def _is_plain(before: str, after: str) -> bool:
    """Whether what stands before and after a number leaves it that number: not 5K, -(5), 5! or 2x."""
    rest = f"{before.removesuffix('+')} {after.removeprefix('-')}"
    return not _FACTOR.match(after) and not _BESIDE.sub("", rest)


def paper_score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    r"""1 if the answer, or anything that Math-Verify finds in the response, is the ground truth; else 0.

    The answer is the last `\boxed{}`, else what follows the first `#### `, else the last number. It must be the ground
    truth as a string, after dollars, percent signs, commas, `\text` and a trailing unit are dropped.

    Raises:
      Undecidable: Math-Verify would take longer than the original waits.
    """
    answer = _paper_answer(response)
    if answer is None:
        return 0.0
    return float(answer == _paper_normalise(ground_truth) or agrees(response, ground_truth))


def _paper_answer(response: str) -> str | None:
    boxed = last_box(response)
    if boxed is not None:
        return _paper_normalise(boxed)
    marked = _PAPER_MARKED.search(response)
    if marked:
        return _paper_normalise(marked[1])
    for number in reversed(_PAPER_NUMBER.findall(response)):
        answer = _paper_integer(number.replace(",", ""))
        if answer not in ("", ".", "0."):
            return answer
    return None


def _paper_normalise(answer: str) -> str:
    answer = answer.strip()
    for command in ("\\text{", "\\textbf{"):
        answer = _without_command(answer, command)
    answer = re.sub(r"\\?[$%]|,", "", answer)
    for length, pattern in _PAPER_UNIT_PATTERNS:  # each at most once, in this order, so that "cents" leaves no "s"
        trimmed = answer.rstrip()
        match = pattern.search(trimmed, max(0, len(trimmed) - length))
        if match:
            answer = trimmed[: match.start()].rstrip()
    return _paper_integer(answer.strip())


def _without_command(text: str, command: str) -> str:
    """`text` with each `command`...} replaced by what it holds up to the first closing brace."""
    parts, place = [], 0
    while (start := text.find(command, place)) >= 0 and (end := text.find("}", start)) >= 0:
        parts += [text[place:start], text[start + len(command) : end]]
        place = end + 1
    return "".join([*parts, text[place:]])


def _paper_integer(answer: str) -> str:
    """A decimal without a fractional part as an integer; 42 itself is not touched, nor is 1e2."""
    if "." not in answer:
        return answer
    try:
        value = float(answer)
    except ValueError:
        return answer
    return str(int(value)) if value.is_integer() else answer
