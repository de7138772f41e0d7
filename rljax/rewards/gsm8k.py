r"""Grade-school answers: one number, after `####`, in a box, or last in the text."""

import re
from fractions import Fraction
from typing import Any

from rljax.rewards.answers import Undecidable, last_boxed

_NUMBER = re.compile(
    r"(?<![\d.)])-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s*/\s*[1-9]\d*)?|(?<=[)])\d+"
)
_MAX_NUMBER_CHARS = 100


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
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed
    _, marker, tail = response.rpartition("####")
    if marker:
        return tail.strip().partition("\n")[0]
    numbers = _NUMBER.findall(response.replace("\N{MINUS SIGN}", "-"))
    return numbers[-1] if numbers else None


def _normalise(answer: str) -> str:
    answer = answer.replace("\N{MINUS SIGN}", "-")
    answer = re.sub(r"\\[!,;: ]|\\?[$%]", "", answer)
    answer = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", "", answer).strip().rstrip(".").strip()
    return re.sub(r"(?<=\d)\.0+$", "", answer)


def _value(answer: str) -> Fraction | None:
    """The one number in a normalised answer; None when there is no number, or more than one."""
    numbers = _NUMBER.findall(answer)
    if len(numbers) != 1:
        return None
    if len(numbers[0]) > _MAX_NUMBER_CHARS:
        raise Undecidable(f"a number of {len(numbers[0])} characters; at most {_MAX_NUMBER_CHARS} are read")
    return Fraction(re.sub(r"[\s,]", "", numbers[0]))
