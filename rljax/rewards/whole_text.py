r"""Math-Verify on a whole response: the last resort of the paper's three mathematical scorers.

As they call it: the ground truth is parsed without delimiters, so that only a piece of it may be read (2 out of
`2\sqrt{3}`, 288 out of `288 \pi`), and any number or formula of the response that it takes for the answer counts.
"""

import re
from collections.abc import Iterator
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, verify
from math_verify.parser import extract_target_from_pred, get_extraction_regexes

from rljax.rewards.answers import Undecidable, refuse_deep_nesting

_MAX_CHARS = 100_000
_MAX_SCANNED = 200_000_000
_MAX_FORMULA = 2000
_MAX_BITS = 1_000_000
_ARITHMETIC = re.compile(r"[\d.\s+\-*×/^()÷]{100,}")
_LONG_RUN = re.compile(r"\d{1000}|\s{1000}")  # the time of Math-Verify's patterns and parser grows with its square
_BOX = re.compile(r"\\(?:boxed|fbox)")
_POWERS = re.compile(r"\d+(?:[\s)}\]]*(?:\^|\*\*)[\s({\[]*[-+]?\d+)+")
_EXPENSIVE = re.compile(  # exponents of six digits, factorials of five digits, factorials of factorials
    r"(?:\^|\*\*)[\s({]*[-+]?\d{6}|\d{5}[\s)}]*!|\d[\s)}\]]*![\s)}\]]*!|binom[^A-Za-z]*\d{5}"
)

_CONFIGS = (LatexExtractionConfig(), ExprExtractionConfig())


def agrees(response: str, ground_truth: str) -> bool:
    """True if Math-Verify, with its default settings, finds the ground truth's value in the response.

    Raises:
      Undecidable: finding or comparing it would take longer than the paper's scorers wait.
    """
    _refuse_bait(response)
    gold, answer = _parsed(ground_truth), _parsed(response)
    # The paper's scorers leave Math-Verify's own limits, a SIGALRM after 5 s for each text and each comparison, after
    # which nothing is equal. Here the pool's limit, which ends the item with 0, stands for them.
    return verify(gold, answer, timeout_seconds=None)


def _parsed(text: str) -> list[Any]:
    """`math_verify.parse(text)`, which is empty for what it cannot parse, but with guarded patterns."""
    patterns: Any = [
        ([(_Guarded(pattern), priority) for pattern, priority in regexes], config)
        for regexes, config in get_extraction_regexes(_CONFIGS)
    ]
    try:
        return extract_target_from_pred(text, patterns, fallback_mode="first_match")
    except (Undecidable, MemoryError):
        raise
    except Exception:
        return []


class _Guarded:
    """A pattern whose matches are checked when, and only if, they are about to be parsed."""

    def __init__(self, pattern: re.Pattern[str]):
        self._pattern = pattern

    def finditer(self, text: str) -> Iterator["_GuardedMatch"]:
        return map(_GuardedMatch, self._pattern.finditer(text))


class _GuardedMatch:
    def __init__(self, match: re.Match[str]):
        self._match = match
        self.start, self.end = match.start, match.end

    def groupdict(self) -> dict[str, str | None]:
        groups = self._match.groupdict()
        for text in groups.values():
            if text:
                _refuse_expensive(text)
        return groups


def _refuse_expensive(text: str) -> None:
    """Raises Undecidable for what makes a computer-algebra system hang."""
    if _LONG_RUN.search(text):
        raise Undecidable("a thousand digits or blanks in a row")
    boxes = list(_BOX.finditer(text))
    if boxes:
        text = text[boxes[-1].start() :]  # what stands before is not parsed
    if len(text) > _MAX_FORMULA:
        raise Undecidable(f"a formula of {len(text)} characters; at most {_MAX_FORMULA} are parsed")
    refuse_deep_nesting(text)
    if _EXPENSIVE.search(text) or any(_is_huge(powers[0]) for powers in _POWERS.finditer(text)):
        raise Undecidable(f"a large power or factorial in {text[:80]!r}")


def _is_huge(powers: str) -> bool:
    """Whether a tower such as 9^{9^9} has too many digits to be computed; (9^9)^9 is taken for one."""
    base, *exponents = (int(digits[:20]) for digits in re.findall(r"\d+", powers))
    exponent = 1
    for number in reversed(exponents):
        if number > 1 and number.bit_length() * exponent > 64:
            return True
        exponent = number**exponent
    return base > 1 and base.bit_length() * exponent > _MAX_BITS


def _refuse_bait(text: str) -> None:
    """Raises Undecidable for what makes Math-Verify's regular expressions try every end for every beginning."""
    if len(text) > _MAX_CHARS:
        raise Undecidable(f"a response of {len(text)} characters; at most {_MAX_CHARS} are searched for an answer")
    scanned = text.count("\\boxed{") * text.count("}") * len(text) // 100
    for opening, closing in (("\\[", "\\]"), ("\\(", "\\)"), ("\\boxed{", "}")):
        unfinished = text[text.rfind(closing) + 1 :]
        scanned += unfinished.count(opening) * len(unfinished)
    for run in _ARITHMETIC.findall(text):
        beginnings, operators = len(re.findall(r"[\s=]", run)), len(re.findall(r"[+\-*×/^()÷]", run))
        scanned += beginnings * operators * len(run)
    if scanned > _MAX_SCANNED:
        raise Undecidable("a response made of unfinished formulas")
