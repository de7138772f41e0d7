r"""The mathematical reward of arXiv 2509.25300, with its faults: the paper's `naive_dapo` cascade.

From `verl/utils/reward_score/naive_dapo.py` of the paper's repository, itself PRM800K's, PRIME's and guru's scorers one
after the other. The first of five stages that accepts decides; all must fail for a 0:

  a  the answer and the ground truth are the same after PRM800K's normalisation
  b  ... after PRIME's normalisation, which also drops units and turns LaTeX into text
  c  ... element by element, for sympy (`plain_expression`); strict about fractions and integers
  d  ... for PRIME's `math_equal` (`prime_equal`), which is not: 50 is 0.5, 10001 is 10000; never for answers with \pi
  e  Math-Verify finds the ground truth, or a piece of it, in the whole response (`whole_text`)

The answer is the last box, or without one the whole response; there is no term for format, length or language. The
repaired rule is `math.score`. What the original limits to 10 s in all, and to 10 s in stage c (which lifts the first
limit), the pool limits here.
"""

import re
from typing import Any

from rljax.rewards import plain_expression
from rljax.rewards.answers import Undecidable
from rljax.rewards.latex_text import Unconvertible, latex_to_text
from rljax.rewards.prime_equal import prime_equal
from rljax.rewards.whole_text import agrees

_MAX_CHARS = 100_000

_TEXT = re.compile(r"^\\text\{(.+?)\}$")
_UNITS = (
    "degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour", "day", "week", "month", "year", "foot",
    "feet", "inch", "yard", "liter",
)  # fmt: skip
_UNIT_PATTERNS = tuple(re.compile(rf"{unit}(es)?(s)? *(\^[0-9]+)?") for unit in _UNITS)
_RATIO = re.compile(r"^(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)\Z")
_THOUSANDS = re.compile(r"(\d),(\d\d\d)(?=$|\D)")
_FRACTION = re.compile(r"^-?[0-9]+.?/0*[1-9][0-9]*.?$")
_BRACKETS = "()[]"


def paper_score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """1 if any of the five stages accepts the response, else 0.

    Raises:
      Undecidable: the original would not return in its 10 s, or would run code that the answer contains.
    """
    if len(response) > _MAX_CHARS:
        raise Undecidable(f"a response of {len(response)} characters; at most {_MAX_CHARS} are read")
    answer = _answer(response)
    if _prm800k(ground_truth) == _prm800k(answer):
        return 1.0
    refusal = None
    try:
        if _equal_for_prime(answer, ground_truth):
            return 1.0
    except Undecidable as error:  # as in the original, whose time limit only ends this stage
        refusal = error
    # With \pi in sight the original passes stage d a misspelt keyword; the TypeError means "not equal".
    if "\\pi" not in answer and "\\pi" not in ground_truth and prime_equal(answer, ground_truth):
        return 1.0
    if agrees(response, ground_truth):
        return 1.0
    if refusal is not None:
        raise refusal
    return 0.0


def _answer(response: str) -> str:
    """What the box holds, after the last `</think>`; everything there if there is no box or it is empty or open."""
    response = response.rpartition("</think>")[2]
    start = response.rfind("\\boxed")
    if start < 0:
        start = response.rfind("\\fbox")
    return (_braced(response[start:]) if start >= 0 else "") or response


def _braced(text: str) -> str:
    """Content of the first braces, up to where the text's braces balance for the first time; escaped ones count too."""
    first, depth = text.find("{"), 0
    for brace in re.finditer("[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0 and brace[0] == "}":
            return text[first + 1 : brace.start()].strip()
    return ""


def _prm800k(answer: str) -> str:
    """Stage a: `normalize_answer` of PRM800K, after Hendrycks' MATH; what it cannot normalise stays as it is."""
    answer = answer.strip()
    match = _TEXT.search(answer)
    if match:
        answer = match[1].strip()
    text = answer.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        return answer
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    if text.endswith("\\sqrt") or "\\sqrt\\sqrt" in text:
        return answer
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = _braced_fractions(text)
    if text is None:
        return answer
    if text == "0.5":
        return "\\frac{1}{2}"
    return _RATIO.sub(r"\\frac{\1}{\2}", text)


def _braced_fractions(text: str) -> str | None:
    r"""`\frac12` and `\frac1{2}` as `\frac{1}{2}`; None if one has nothing, all unchanged if one has half of it."""
    head, *tails = text.split("\\frac")
    for tail in tails:
        if not tail:
            return None
        if tail.startswith("{"):
            head += "\\frac" + tail
        elif len(tail) < 2:
            return text
        elif tail[1] == "{":
            head += f"\\frac{{{tail[0]}}}{tail[1:]}"
        else:
            head += f"\\frac{{{tail[0]}}}{{{tail[1]}}}{tail[2:]}"
    return head


def _equal_for_prime(answer: str, ground_truth: str) -> bool:
    """Stages b and c."""
    given, truth = _prime(answer), _prime(ground_truth)
    if given == truth:
        return True
    if not given:
        return False
    wanted, found = _elements(truth), _elements(given)
    if len(wanted) > 1 and (truth[0], truth[-1]) != (given[0], given[-1]):
        return False
    return len(wanted) == len(found) and all(map(_equal_elements, wanted, found))


def _equal_elements(wanted: str, found: str) -> bool:
    if _FRACTION.search(wanted) and _FRACTION.search(found):
        return wanted == found  # as a string, so that 2/4 is not 1/2
    if _is_integer(wanted) != _is_integer(found):
        return False
    return plain_expression.equal(wanted, found)


def _prime(answer: str) -> str:
    """PRIME's normalisation: without units, dollars and percent signs, in plain text, in lower case."""
    match = _TEXT.search(answer)
    if match:
        answer = match[1]
    answer = answer.replace("\\%", "%").replace("\\$", "$").replace("$", "").replace("%", "")
    answer = answer.replace(" or ", " , ").replace(" and ", " , ")
    answer = answer.replace("million", "*10^6").replace("billion", "*10^9").replace("trillion", "*10^12")
    for pattern in _UNIT_PATTERNS:
        answer = pattern.sub("", answer)
    answer = re.sub(r"\^ *\\circ", "", answer)
    if answer.startswith("{") and answer.endswith("}"):
        answer = answer[1:-1]
    answer = re.sub(r",\\! *", "", answer)
    if _is_whole(_float(answer)):
        answer = str(round(float(answer)))
    if "\\" in answer:
        answer = _plain(answer)
    answer = re.sub("- *", "-", answer)
    answer = re.sub("([0-9]) +([0-9])", r"\1+\2", answer).lower()  # 7 3/4 is a sum; so is 1 000
    return str(int(float(answer.replace(",", "")))) if _is_integer(answer) else answer


def _plain(answer: str) -> str:
    latex = answer.replace("\\tfrac", "\\frac").replace("\\dfrac", "\\frac").replace("\\frac", " \\frac")
    try:
        text = latex_to_text(latex)
    except Unconvertible:
        return answer
    text = text.replace("√", "sqrt").replace("π", "pi").replace("∞", "inf").replace("∪", "U")
    return text.replace("·", "*").replace("×", "*").strip()


def _elements(answer: str) -> list[str]:
    """The elements of a tuple or interval, without its brackets; one element, the whole, for anything else."""
    answer = _without_commas(answer)
    if len(answer) > 2 and answer[0] in _BRACKETS and answer[-1] in _BRACKETS:
        inner = answer[1:-1]
        if not any(bracket in inner for bracket in _BRACKETS):
            return [element.strip() for element in inner.split(",")]
    return [answer] if answer else []


def _without_commas(answer: str) -> str:
    """Without the commas between thousands, where the pattern sees them."""
    while True:
        shorter = _THOUSANDS.sub(r"\1\2", answer)
        if shorter == answer:
            return answer
        answer = shorter


def _is_integer(answer: str) -> bool:
    return _is_whole(_float(_without_commas(answer)))


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_whole(number: float | None) -> bool:
    return number is not None and abs(number) < float("inf") and abs(number - round(number)) <= 1e-7
