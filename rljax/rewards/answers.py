"""What verifiers share: where in a completion the answer stands, and how to decline to judge one."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

Verifier = Callable[[str, str, dict[str, Any]], float]
"""score(response, ground_truth, extra_info) -> reward in [0, 1]. Pure; runs in a worker process."""


class Undecidable(Exception):
    """There is an answer, but whether it is right cannot be told, or only at a risk that is not taken.

    The pool scores it 0 and counts it as `unparseable`, apart from answers known to be wrong.
    """


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Whether a call of `function`, an object with `async def __call__` among them, has to be awaited."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def checked_score(verifier: str, score: Any) -> float:
    """`score` as a float. Raises ValueError when it is not in [0, 1]; `verifier` is for the message."""
    value = float(score)
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(f"verifier {verifier} returned {value}, which is not in [0, 1]")
    return value


_CHANGES_VALUE = re.compile(
    r"(?<![A-Za-z])(?:hundred|thousand|million|billion|trillion|dozen|negative|minus|not|squared|cubed|half|halve|"
    r"factorial)s?(?![A-Za-z])|(?<![A-Za-z])(?:or\s+(?:less|more|fewer|greater|above|below|higher|lower)|"
    r"at\s+(?:least|most)|(?:less|more|fewer|greater)\s+than)(?![A-Za-z])",
    re.IGNORECASE,
)


def words_of_value(answer: str) -> list[str]:
    """Words beside a number that make it another one, or a range, sorted: 5 million is not 5, nor is 5 or less."""
    return sorted(re.sub(r"\s+", " ", word.lower()) for word in _CHANGES_VALUE.findall(answer))


DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
"""Pattern of a number without a sign, thousands with or without commas."""

_MAX_NESTING = 32


def refuse_deep_nesting(text: str) -> None:
    """Raises Undecidable for brackets in brackets that would stop a computer-algebra system."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > _MAX_NESTING:
        raise Undecidable(f"brackets nested {deepest} deep; at most {_MAX_NESTING} are read")


_BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` whose braces balance, stripped; None when there is none.

    Escaped braces do not count. One pass: a completion of a million open boxes costs no more than any other.
    """
    opened: list[int] = []  # where the content of each open box starts, -1 for other braces
    best = (-1, -1)
    for token in _BOX_TOKENS.finditer(text):
        symbol = token.group()
        if symbol == "}":
            if opened:
                start = opened.pop()
                if start > best[0]:
                    best = (start, token.start())
        elif symbol == "{":
            opened.append(-1)
        elif symbol.endswith("{") and len(symbol) > 2:
            opened.append(token.end())
    return None if best[0] < 0 else text[slice(*best)].strip()


def marked_answer(text: str) -> str | None:
    """The last box, else what follows the last "####" on its line, which may be nothing; None: neither is there."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    _, marker, tail = text.rpartition("####")
    return tail.strip().partition("\n")[0] if marker else None
