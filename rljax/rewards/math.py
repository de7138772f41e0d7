r"""Mathematical answers: the last `\boxed{}` against the ground truth, by string, by rational value, by Math-Verify.

This is the repaired rule, not the paper's `naive_dapo` cascade (`verl/utils/reward_score/` of arXiv 2509.25300): only a
box answers; both sides are parsed whole, with delimiters, so that `\boxed{2}` is not `2\sqrt{3}`; integers are exact;
50 is not 0.5; sets and unions have no order; an answer that hands the verifier the question, such as `\gcd(48, 18)`, is
none; 5 million is not 5, and values are those of the unknowns in their order. What is still taken: arithmetic left
undone, `2^{10}` or `\binom{9}{2}`, for its value; of two units, `5 \text{ m}` and `5 \text{ cm}`, neither is read;
`50\%` for 50 or 0.5; six decimals for an irrational number; a letter of the other case.

Called in a worker of `pool.RewardPool`, which holds the wall-clock limit: Math-Verify's own is a SIGALRM handler, which
does not run while an extension or a large power is being computed. The checks before parsing refuse what is known to be
expensive, so that a hostile answer mostly costs microseconds instead of the limit.
"""

import re
from fractions import Fraction
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.parser import normalize_latex

from rljax.rewards.answers import DECIMAL, Undecidable, last_boxed, refuse_deep_nesting, words_of_value

_MAX_CHARS = 256
_MAX_EXPONENT_DIGITS = 5
_MAX_FACTORIAL_DIGITS = 4
_MAX_COMMAS = 100

# Nothing but the box: unanchored patterns would pick one number out of what does not parse as a whole.
_WHOLE = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)

_RATIONAL = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<decimal>{DECIMAL})|\\[dt]?frac\s*\{{(?P<top>\d+)\}}\s*\{{(?P<bottom>\d+)\}}"
    r"|(?P<over>\d+)\s*/\s*(?P<under>\d+))"
)
_NUMERAL = r"-?\d[0-9A-Za-z.]*"
_BASED = re.compile(rf"(?P<digits>{_NUMERAL})_\{{?(?P<base>\d+)\}}?")
_POWER_OF_UNIT = re.compile(r"(\\(?:text|mbox|mathrm)\s*\{[^{}\d]*\})\s*\^\s*\{?[23]\}?$")
# What stands here is the question, not its answer: equal only where the ground truth has it, too.
_WORK = re.compile(
    r"\\(?:operatorname\*?\s*\{\s*)?(?:gcd|lcm|min|max|inf|sup|lim|limsup|liminf|det|[bp]?mod|lfloor|lceil)(?![A-Za-z])"
    r"|\\[dt]?frac\s*\{\s*(?:d|\\partial|\\mathrm\s*\{d\})[^{}]*\}\s*\{\s*(?:d|\\partial|\\mathrm\s*\{d\})\s*[a-z]"
)
_NAME_PARTS = re.compile(r"\\[A-Za-z]+\s*(?:\{[^{}]*\})?|\([^()]*\)|_\{[^{}]*\}")
_FRACTION = re.compile(r"\\[dtc]?(?:frac|binom)\s*\d\s*\d")
_SIDE_BY_SIDE = re.compile(r"\d(?:\s|~|\\[,;: ]|\\q?quad(?![A-Za-z])|\]\s*\[)+\d")
_CONNECTIVE = re.compile(r"(?:\\(?:lor|vee|land|wedge|q?quad)(?![A-Za-z])|\\&|\n)(?!\s*&?\s*=)")  # no = goes on with it
_SIDES = re.compile(r"=|\\(?:approx|equiv|simeq|sim|cong)(?![A-Za-z])|[≈≡]")


def score(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    """1 if the response's last balanced box holds the ground truth's value; 0 if another, or there is no box.

    Raises:
      Undecidable: either side does not parse as a whole, or would be too expensive to compare.
    """
    boxed = last_boxed(response)
    if not boxed:
        return 0.0
    if boxed == ground_truth.strip():
        return 1.0
    longest = max(len(boxed), len(ground_truth))
    if longest > _MAX_CHARS:
        raise Undecidable(f"an answer of {longest} characters; at most {_MAX_CHARS} are read")
    given, wanted = _tidy(boxed), _tidy(ground_truth)
    if given == wanted:
        return 1.0
    decided = _compare_rationals(given, wanted)
    if decided is None:
        decided = _compare_bases(given, wanted)
    if decided is None:
        decided = _compare_expressions(given, wanted)
    return float(decided)


def _tidy(answer: str) -> str:
    """Without outer delimiters, final dot, thousands spacing, and the doubled backslashes of some data sets."""
    answer = answer.replace("\N{MINUS SIGN}", "-").replace("\\emptyset", "\\varnothing").strip()
    answer = re.sub(r"\\(?:displaystyle|textstyle)(?![A-Za-z])\s*", "", answer)
    if "\\\\" in answer and not re.search(r"(?<!\\)\\begin", answer):  # there, a doubled backslash ends a row
        answer = answer.replace("\\\\", "\\")
    for left, right in (("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"), ("$", "$")):
        inner = answer[len(left) : -len(right)]
        if answer == left + inner + right and left not in inner:
            answer = inner.strip()
    answer = re.sub(r"(?<=\d)(?:,\\!|\{,\})\s*(?=\d{3}(?!\d))", "", answer)
    if re.fullmatch(r"[-+]?\d{1,3}(?:\\[,;: ]\s*\d{3})+", answer):
        answer = re.sub(r"[^-+\d]", "", answer)
    answer = re.sub(r"^\\?\$\s*(?=[-\d.])", "", answer)
    answer = answer.removesuffix(".").strip()
    return _POWER_OF_UNIT.sub(r"\1", answer)


def _compare_rationals(given: str, wanted: str) -> bool | None:
    """Exact comparison of plain integers, decimals and fractions; None when it is for another stage to say."""
    left, right = _rational(given), _rational(wanted)
    if left is None or right is None:
        return None
    if left != right and "." in given + wanted and right.denominator != 1:
        return None  # 0.333333 for 1/3 is a matter of rounding; an integer is not
    return left == right


def _rational(answer: str) -> Fraction | None:
    match = _RATIONAL.fullmatch(answer)
    if match is None:
        return None
    if match["decimal"]:
        value = Fraction(match["decimal"].replace(",", ""))
    else:
        bottom = int(match["bottom"] or match["under"])
        if bottom == 0:
            return None
        value = Fraction(int(match["top"] or match["over"]), bottom)
    return -value if match["sign"] == "-" else value


def _compare_bases(given: str, wanted: str) -> bool | None:
    """Numerals with a base, which Math-Verify drops: 52_8 is 52_{8}, may be written 52, and is not 52_9."""
    left, right = _BASED.fullmatch(given), _BASED.fullmatch(wanted)
    if right is None:  # an index that is a word, 44_{\text{eight}}, is left to Math-Verify
        return False if left is not None and left["base"] != "10" and "_" not in wanted else None
    if left is None:
        if not re.fullmatch(_NUMERAL, given):
            raise Undecidable(f"{given!r} for {wanted!r}, a numeral with a base")
        return given == right["digits"]
    return left["digits"] == right["digits"] and left["base"] == right["base"]


def _compare_expressions(given: str, wanted: str) -> bool:
    if _WORK.search(given) and not _WORK.search(wanted):
        raise Undecidable(f"{given!r} leaves the work to the verifier")
    if "=" not in wanted and _states_more_than_one(given):
        return False
    if words_of_value(given) != words_of_value(wanted) and re.search(r"\d", given + wanted):
        return False
    if "=" not in given and (values := _values_by_name(wanted)):
        return _compare_expressions(f"({_without_brackets(given)})", f"({','.join(values)})")
    gold, answer = _expression(wanted), _expression(given)
    if isinstance(gold, sympy.Eq) and not gold.free_symbols:  # about numbers: 0 = 0 is as true as 89 + 19 = 108
        return given.replace(" ", "") == wanted.replace(" ", "")
    try:
        if _differ_as_numbers(gold, answer) or _is_a_side_only(answer, gold, wanted):
            return False
        return verify([gold], [answer], timeout_seconds=0, raise_on_error=True)
    except MemoryError:
        raise
    except Exception as error:  # sympy raises whatever it likes on what it cannot compare
        raise Undecidable(f"comparison failed: {type(error).__name__}: {error}") from error


def _values_by_name(wanted: str) -> list[str]:
    """Of x=2, y=1 the values in their order, which Math-Verify would take for a set; empty for anything else."""
    sides = [part.split("=") for part in re.split(r",|\\text\s*\{\s*and\s*\}", wanted)]
    if len(sides) < 2 or any(len(side) != 2 for side in sides):
        return []
    names = {name.strip() for name, _ in sides}
    if len(names) < len(sides) or not all(re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?", name) for name in names):
        return []
    return [value.strip() for _, value in sides]


def _without_brackets(answer: str) -> str:
    inner = re.fullmatch(r"(?:\\left)?\(([^()]*)\)", answer.replace("\\right)", ")"))
    return inner[1] if inner else answer


def _states_more_than_one(given: str) -> bool:
    r"""Whether it holds several numbers, one of which Math-Verify would pick.

    That is the last of 1 = 2 = 3 and of x = 5 \lor x = 6, and of 5 6 the sum.
    """
    if _SIDE_BY_SIDE.search(_FRACTION.sub("", given)):
        return True
    sides = _SIDES.split(given)
    if len(sides) > 2 and _CONNECTIVE.search(given):
        return True
    numbers = [number for number in map(_rational, map(_tidy, sides)) if number is not None]
    return bool(numbers) and max(numbers) - min(numbers) > abs(numbers[-1]) / 100  # 10/3 = 3.33 is one


def _is_a_side_only(answer: Any, gold: Any, wanted: str) -> bool:
    """Whether the answer is but what stands behind the gold's "=", which Math-Verify takes.

    Rightly so for a name, x or f(x) or AB; but 1 is not x + y = 1.
    """
    if not isinstance(gold, sympy.Eq) or isinstance(answer, sympy.Rel | sympy.And | sympy.FiniteSet):
        return False
    left = _NAME_PARTS.sub(" ", wanted.partition("=")[0])
    return re.search(r"[-+]|[a-z]\s*[a-z]", left) is not None


def _expression(answer: str) -> Any:
    """The answer as a sympy object. Raises Undecidable when it is not one as a whole."""
    _refuse_expensive(answer)
    parsed = parse(
        f"\\boxed{{{answer}}}", [_WHOLE], fallback_mode="no_fallback", parsing_timeout=0, raise_on_error=True
    )
    if not parsed:
        raise Undecidable(f"{answer!r} does not parse")
    kept = normalize_latex(answer, config=_WHOLE.normalization_config)  # makes a fraction of 0.5, and of it alone
    if answer not in ("0.5", ".5") and _digits(kept) != _digits(answer):
        raise Undecidable(f"{answer!r} parses only in part")  # "2 \\text{ hours and } 13 \\text{ minutes}" becomes 2
    return parsed[0]


def _digits(answer: str) -> str:
    """All digits in order, without a zero that only stands before a decimal point."""
    return re.sub(r"(?<!\d)0(?=\.\d)|\D", "", answer)


def _differ_as_numbers(gold: Any, answer: Any) -> bool:
    r"""True for two numbers whose 15 leading digits already tell them apart.

    Saves Math-Verify from what it does badly: it rounds differences, so that 10^{-20} is 10^{-30}, and its simplifier
    turns 987654321 - \log_5 15 into the logarithm of a number with 690 million digits. Percentages stay with it.
    """
    if not all(isinstance(side, sympy.Expr) and side.is_number for side in (gold, answer)):
        return False
    if gold.has(sympy.UnevaluatedExpr) or answer.has(sympy.UnevaluatedExpr):
        return False
    left, right = sympy.N(gold), sympy.N(answer)
    gap, larger = abs(left - right), sympy.Max(abs(left), abs(right))
    if not (isinstance(gap, sympy.Float) and isinstance(larger, sympy.Float)):
        return False
    # 0.333333 is 1/3 (six decimals); beyond that, the last of the 15 digits; and for small numbers three of them.
    return bool(gap > 2e-6 + 1e-12 * larger or gap > 1e-3 * larger)


def _refuse_expensive(answer: str) -> None:
    """Raises Undecidable for what makes a computer-algebra system hang, and for what it reads as something else."""
    refuse_deep_nesting(answer)
    if _braces_cross(answer):
        raise Undecidable(f"{answer!r} has unbalanced braces")
    if answer.count(",") > _MAX_COMMAS:
        raise Undecidable(f"a list of more than {_MAX_COMMAS} elements")
    if re.search(r"\\[lc]?dots|\.\.\.|…|\\(?:sum|prod|int|o?iint)(?![A-Za-z])", answer):
        raise Undecidable(f"{answer!r} has an ellipsis, sum, product or integral, which are compared as strings only")
    if re.search(rf"\d{{{_MAX_FACTORIAL_DIGITS + 1},}}[\s)}}\]]*!|![\s)}}\]]*!|\\d?t?binom[^A-Za-z]*\d{{5}}", answer):
        raise Undecidable(f"{answer!r} has a large factorial or binomial")
    for exponent in _exponents(answer.replace("**", "^")):
        is_tower = "^" in exponent and not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", exponent))
        if is_tower or re.search(rf"\d{{{_MAX_EXPONENT_DIGITS + 1}}}", exponent):
            raise Undecidable(f"{answer!r} has a large power")


def _braces_cross(answer: str) -> bool:
    depth = 0
    for brace in re.findall(r"\\.|[{}]", answer):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return True
    return depth != 0


def _exponents(answer: str) -> list[str]:
    """What stands above each "^": the bracketed group that follows, else a run of characters and its own powers."""
    return [_leading_group(answer[caret.end() :]) for caret in re.finditer(r"\^\s*", answer)]


def _leading_group(text: str) -> str:
    if text[:1] not in ("{", "("):
        return re.findall(r"^[-+]?[\w.]*(?:\s*\^\s*[{(]?[-+]?[\w.]*)*", text)[0]
    depth = 0
    for place, character in enumerate(text, start=1):
        depth += (character in "({") - (character in ")}")
        if depth == 0:
            return text[:place]
    return text
