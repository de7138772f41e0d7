r"""The paper's three mathematical scorers on a table of answers, on hostile ones, and on the paper's own answers."""

import builtins

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_math_cases import AIME, GSM8K, MATH

from rljax.rewards import gsm8k, math_dapo, naive_dapo, plain_expression, whole_text
from rljax.rewards import math as fixed_math
from rljax.rewards.answers import Undecidable
from rljax.rewards.prime_equal import prime_equal
from rljax.rewards.whole_text import agrees

_PAPER = {"math": naive_dapo.paper_score, "aime": math_dapo.paper_score, "gsm8k": gsm8k.paper_score}
_FIXED = {"math": fixed_math.score, "aime": fixed_math.score, "gsm8k": gsm8k.score}
_CASES = [
    pytest.param(source, case, id=f"{source}-{place}")
    for source, cases in (("math", MATH), ("aime", AIME), ("gsm8k", GSM8K))
    for place, case in enumerate(cases)
]


def judge(verifier, response, ground_truth):
    """The score, or None for Undecidable."""
    try:
        return verifier(response, ground_truth, {})
    except Undecidable:
        return None


@pytest.mark.parametrize("source, case", _CASES)
def test_the_table(source, case):
    assert judge(_PAPER[source], case.response, case.ground_truth) == case.paper, case.note
    assert judge(_FIXED[source], case.response, case.ground_truth) == case.fixed, case.note


def test_the_table_shows_both_scores_of_both_modes():
    cases = [*MATH, *AIME, *GSM8K]
    assert len(cases) > 200
    assert {(case.paper, bool(case.fixed)) for case in cases} >= {(0, False), (0, True), (1, False), (1, True)}


_HOSTILE = {
    "a megabyte of words": "word " * 200_000,
    "a megabyte of boxes": "\\boxed{" * 150_000,
    "a megabyte of closed boxes": "\\boxed{7}" * 110_000,
    "a megabyte in the box": "\\boxed{" + "9" * 1_000_000 + "}",
    "many open boxes": "\\boxed{" * 10_000,
    "many closed boxes": "\\[" + "\\boxed{7}" * 5_000,
    "deep braces": "\\boxed{" + "{" * 5_000 + "7" + "}" * 5_000 + "}",
    "deep brackets": "\\boxed{" + "(" * 5_000 + "7" + ")" * 5_000 + "}",
    "deep macros": "\\boxed{" + "\\frac{1}{" * 500 + "7" + "}" * 500 + "}",
    "deep roots": "\\boxed{" + "\\sqrt" * 300 + "7}",
    "a tower in LaTeX": "\\boxed{9^{9^{9^{9}}}}",
    "a tower in Python": "\\boxed{9**9**9**9}",
    "a tower without a box": "9**9**9**9",
    "a tower of letters": "\\boxed{x**9**9**9}",
    "a tower of brackets": "\\boxed{((((((((9^9)^9)^9)^9)^9)^9)^9)^9)^9}",
    "a large exponent": "\\boxed{(x+1)**1000}",
    "a large factorial": "\\boxed{99999!}",
    "a factorial of a factorial": "\\boxed{(9!)!}",
    "a shift": "\\boxed{1<<99999999999}",
    "a call": "\\boxed{id(id)}",
    "a lambda in two letters": "\\boxed{[a for a in a]}",
    "a long list": "\\boxed{" + ",".join(["1"] * 5_000) + "}",
    "a long number": "\\boxed{" + "7" * 5_000 + "}",
    "a long sum": "\\boxed{" + "1+" * 3_000 + "1}",
    "sums without an end": "Answer: " + "1 + " * 4_000 + "x",
    "formulas without an end": "answer \\[ " * 5_000,
    "inline formulas without an end": "\\( " * 20_000,
    "blanks": "\\boxed{6" + " " * 90_000 + "x}",
    "text without an end": "\\boxed{" + "\\text{" * 10_000,
    "commas": ", " * 40_000,
    "NUL bytes": "\\boxed{\x00}\x00",
    "lone surrogates": "\\boxed{\ud800} \udfff",
    "control characters": "".join(map(chr, range(32))) + "\\boxed{\x1b[31m8}",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("source", _PAPER)
@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_responses_are_not_rewarded_and_come_back(source, name):
    assert judge(_PAPER[source], _HOSTILE[name], "5") in (0.0, None)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "truth", ["9^{9^{9^9}}", "9**9**9**9", "(" * 5000, "\\frac{" * 500, "\x00", "\ud800", "7" * 5000]
)
def test_hostile_ground_truths_come_back(truth):
    for verifier in _PAPER.values():
        assert judge(verifier, "\\boxed{5}", truth) in (0.0, None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from([*"0123456789xy+-*/^!().,[]{}|<>=_&~ ", "\\frac", "\\sqrt", "\\pi", "\\text{", "\n"]),
        max_size=8,
    ),
    st.sampled_from(["5", "\\frac{1}{2}", "x+1", "(1, 2)", "\\pi"]),
)
def test_any_answer_is_scored_0_or_1_or_undecidable(pieces, truth):
    for verifier in _PAPER.values():
        assert judge(verifier, f"\\boxed{{{''.join(pieces)}}}", truth) in (0.0, 1.0, None)


@pytest.mark.parametrize(
    "left, right, verdict",
    [
        ("2*sqrt(3)", "2sqrt(3)", True),
        ("2*sqrt(3)", "2sqrt3", False),  # a symbol of that name
        ("x+y", "y+x", True),
        ("3!!", "3", True),
        ("2x!", "2*x!", True),
        ("-(-x)", "+x", True),
        ("7//2", "3", True),
        ("7%4", "3", True),
        ("5|2", "7", True),
        ("6&3", "2", True),
        ("~5", "-6", True),
        ("0.2[1]", "19/90", True),
        ("2j", "2*sqrt(-1)", True),
        ("frac(7/2)", "1/2", True),
        ("1**999999", "1", True),
        ("2**0.5", "sqrt(2)", False),
        ("0.5**99999999", "0", False),
        ("x+1", "x+2", False),
        ("x+y+z", "z+y+x", False),  # three letters
        ("x^(2)", "x^(2)", False),  # would be equal, but is not tried
        ("x^12", "x^12", False),
        ("x^2^3", "x^2^3", False),
        ("(1, 2)", "(1, 2)", False),
        ("[1]", "[1]", False),
        ("{1, 2}", "{2, 1}", False),
        ("x<2", "x<2", False),
        ("1/0", "1/0", False),
        ("5(", "5", False),
        ("x(2)", "x*2", True),
        ("()", "()", False),
        ("2 3", "6", True),
        ("9" * 900, "9" * 900 + ".0", True),
        ("a.b", "b.a", False),
        ("[1](2)", "2", False),
    ],
)
def test_plain_expressions(left, right, verdict):
    assert plain_expression.equal(left, right) is verdict


@pytest.mark.parametrize(
    "text",
    [
        "id(d)",
        "x.n",
        "(1,2)[0]",
        "1<<9",
        "9**9**9",
        "x**101",
        "2001!",
        "1+" * 1500 + "1",
        "(3**99999)**9",
        "'a'*10**12",
        "[a]*10**12",
    ],
)
def test_plain_expressions_that_would_run_code_or_for_ever_are_refused(text):
    with pytest.raises(Undecidable):
        plain_expression.equal(text, "1")


def test_plain_expressions_are_not_evaluated_as_python(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a text was evaluated")

    with monkeypatch.context() as patch:
        for name in ("eval", "exec"):
            patch.setattr(builtins, name, refuse)
        assert plain_expression.equal("2(x+1)", "2x+2")


def test_a_refused_stage_does_not_end_the_others():
    response = "The final answer is $0.5$. I hope it is correct. \\boxed{x**101}"
    assert naive_dapo.paper_score(response, "0.5", {}) == 1.0
    with pytest.raises(Undecidable):
        naive_dapo.paper_score("\\boxed{x**9**9}", "y", {})


@pytest.mark.parametrize(
    "given_answer, truth, verdict",
    [
        ("$5", "5.0", True),
        ("42%", "42.0", True),
        ("42\\%", "43", False),
        ("Point(1)", "(1)", True),
        ("Point(1)", "(2)", False),
    ],
)
def test_prime_equal(given_answer, truth, verdict):
    assert prime_equal(given_answer, truth) is verdict


def test_prime_equal_refuses_what_the_original_evaluates():
    with pytest.raises(Undecidable):
        prime_equal("[[1], [2]]", "\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}")  # a backspace, as in a mangled data set
    with pytest.raises(Undecidable):
        prime_equal("Matrix([1, 2])", "\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}")
    assert not prime_equal("5", "\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}")
    assert not prime_equal("(" * 900 + "1" + ")" * 900, "(" * 900 + "2" + ")" * 900)


@pytest.mark.parametrize(
    "response, truth, verdict",
    [
        ("\\boxed{2^{2^{3}}}", "256", True),
        ("$10^{2^3}$", "100000000", True),
        ("\\boxed{" + "9" * 900 + "}", "5", False),
        ("the answer is " + "9" * 900, "5", False),
        ("\\[ " + "x+" * 1000 + "1 = \\boxed{5} \\]", "5", True),  # what stands before a box is not parsed
    ],
)
def test_what_is_not_too_large_is_compared(response, truth, verdict):
    assert agrees(response, truth) is verdict


@pytest.mark.parametrize(
    "answer", ["9" * 1000, "5" + " " * 1000 + "x", "x+" * 1000 + "1", "(" * 40 + "x" + ")" * 40, "2^{999999}"]
)
def test_what_is_too_large_is_not(answer):
    with pytest.raises(Undecidable):
        agrees(f"\\boxed{{{answer}}}", "5")


def test_what_math_verify_fails_on_is_not_equal(monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("a text that cannot be parsed")

    monkeypatch.setattr(whole_text, "extract_target_from_pred", fail)
    assert not agrees("\\boxed{5}", "5")


def test_the_papers_answers_accept_themselves(shared_data):
    tables = sorted((shared_data / "guru_math").glob("*.parquet"))
    truths = [
        record["ground_truth"]
        for table in tables
        for record in pyarrow.parquet.read_table(table, columns=["reward_model"])["reward_model"].to_pylist()
    ]
    assert len(truths) > 500
    for truth in truths[:: len(truths) // 500]:
        assert naive_dapo.paper_score(f"so it is $\\boxed{{{truth}}}$.", truth, {}) == 1.0, truth
