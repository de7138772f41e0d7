r"""Multiple choice with up to ten options (SuperGPQA): one capital letter from A to J.

`paper_score` is the rule that arXiv 2509.25300 scored with, defects included; `score` is the repaired one. Both are
linear in the length of the response, whatever it repeats.
"""

import hashlib
import re
from typing import Any

from rljax.rewards.answers import last_boxed

_LETTERS = "ABCDEFGHIJ"
_STOPS = ("</s>", "<|im_end|>", "<|endoftext|>")
_ASSISTANT = "<|im_start|>assistant"

_BRACES = re.compile(r"\\boxed\{|[{}]")
_MAX_INNER_BRACES = 2
_LINE_EVENTS = re.compile(r"\n|<[^<]|<")

_EXAMPLE = re.compile(r"\be\.g\.,?\s*\\boxed\s*\{[A-J]\}")
_MARKER = re.compile(
    r"\bfinal answer(?: is)?\b|\bthe (?:correct )?answer is\b|^[*_#> \t]*answer:", re.IGNORECASE | re.MULTILINE
)
_DRESSING = re.compile(r"\\(?:text|math|operatorname)(?:bf|it|rm|sf|tt)?(?![A-Za-z])|\\[()\[\],;:! ]|[${}*_`~'\"]")
_LEAD_IN = re.compile(r"(?:the )?(?:correct |final )?(?:answer|option|choice)\b(?: is)?:?\s*", re.IGNORECASE)
_ALONE = re.compile(r"(?:\(([A-J])\)|\[([A-J])\]|([A-J]))\s*[.):]?")
_LABELLED = re.compile(r"(?:\(([A-J])\)\s*[.:]?|([A-J])\s*[.):])(?![A-Za-z])(?P<rest>.*)", re.DOTALL)
_SECOND = re.compile(r"\([A-J]\)|\b[A-J]\s*[.):](?!\w)|^\W*(?:or|and)\b|^\W*[A-J]\W*$")


def score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    r"""1 if the response's option is the ground truth; else 0, also for no option.

    The option is what the last `\boxed{}` holds, else (no box, or an empty one) what follows the last "Final answer:"
    or "The answer is" on its line. It must be one letter standing for itself, as in `A`, `(A)`, `\text{A}.`, or the
    label of an option, as in `A: 0.36 g`. "ABC", "Bernoulli", "A or B" are no option. The instruction's own "e.g.
    \boxed{A}" is not an answer when it is repeated.
    """
    return float(_option(response) == ground_truth.strip())


def paper_score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    r"""1 if the letter the paper's code reads is the ground truth; else 0.

    It reads the last `\boxed{` with at most two levels of braces inside, else the last "Final Answer:", else the last
    "The answer is:", up to a line end that must be there; then takes the first of A, B, ..., J to be found anywhere
    in that. Where nothing is found the paper drew one of the ten letters at random; here it is the one that the
    SHA-256 of the response picks: uniform over responses, and the same each time.
    """
    text = _assistant_part(response)
    found = _shallow_box(text) or _paper_line(text, "Final Answer:")
    if found is None:
        found = _paper_line(text, "The answer is:")
    read = next((letter for letter in _LETTERS if letter in (found or "")), None)
    return float((read or _drawn_letter(response)) == ground_truth)


def _option(response: str) -> str | None:
    for stop in _STOPS:
        response = response.partition(stop)[0]
    text = _EXAMPLE.sub("", response)
    return _letter(last_boxed(text) or _last_line(text))


def _last_line(text: str) -> str:
    """What follows the last marker on its line, or on the next one where that is empty."""
    start = max((marker.end() for marker in _MARKER.finditer(text)), default=None)
    return "" if start is None else text[start:].lstrip(":*_` \t\r\n").partition("\n")[0]


def _letter(answer: str) -> str | None:
    answer = _DRESSING.sub("", answer).strip()
    answer = answer[len(match[0]) :] if (match := _LEAD_IN.match(answer)) else answer
    match = _ALONE.fullmatch(answer)
    if match is None:
        match = _LABELLED.fullmatch(answer)
        if match is None or _SECOND.search(match["rest"]):
            return None
    return next(letter for letter in match.groups() if letter)


def _drawn_letter(response: str) -> str:
    digest = hashlib.sha256(response.encode("utf-8", "surrogatepass")).digest()
    return _LETTERS[int.from_bytes(digest[:8], "big") % len(_LETTERS)]


def _assistant_part(response: str) -> str:
    """Without a prompt in front and without what follows a stop string."""
    if "<|im_start|>user" in response:
        _, marker, tail = response.partition(_ASSISTANT)
        text = tail if marker else response
    elif "Assistant:" in response:
        text = response.rpartition("Assistant:")[2].strip()
    else:
        text = response
    for stop in _STOPS:
        if stop in text:
            text = text.partition(stop)[0].strip()
    return text


def _shallow_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` with at most two levels of braces inside that lies in no earlier such box."""
    starts: list[int] = []  # of the content of each open brace, -1 where it is not a box's
    levels: list[int] = []  # of braces seen inside it
    boxes: list[tuple[int, int]] = []
    for token in _BRACES.finditer(text):
        symbol = token.group()
        if symbol != "}":
            starts.append(-1 if symbol == "{" else token.end())
            levels.append(0)
        elif starts:
            start, inside = starts.pop(), levels.pop()
            if levels:
                levels[-1] = max(levels[-1], inside + 1)
            if start >= 0 and inside <= _MAX_INNER_BRACES:
                while boxes and boxes[-1][0] > start:
                    boxes.pop()  # inside this one
                boxes.append((start, token.start()))
    return text[slice(*boxes[-1])] if boxes else None


def _paper_line(text: str, marker: str) -> str | None:
    """What follows the last marker up to the line end, for the paper's pattern `((?:[^<]|<[^<])*?)` and a line end.

    So a line end right after "<" does not count, and "<<" in between ends the attempt. Where one attempt fails, those
    at the markers it passed over would fail at the same place: the search goes on behind it.
    """
    found, start = None, text.find(marker)
    while start >= 0:
        start += len(marker)
        end = len(text)
        for event in _LINE_EVENTS.finditer(text, start):
            if event.group() == "\n":
                end = event.start()
                found = text[start:end]
                break
            if event.group() == "<":
                end = event.start()
                break
        start = text.find(marker, end)
    return found
