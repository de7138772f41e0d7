r"""The mathematical verifier on answers judged by hand."""

import re

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax.rewards.answers import Undecidable, last_boxed
from rljax.rewards.math import score


def judge(answer: str, ground_truth: str) -> float:
    return score(f"Thus the answer is $\\boxed{{{answer}}}$.", ground_truth, {})


@pytest.mark.parametrize(
    "text, content",
    [
        ("\\boxed{5}", "5"),
        ("\\boxed {A}", "A"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}} end", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{5} and then \\boxed{6", "5"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("{ \\boxed{ 5 }", "5"),
        ("} \\boxed{5}", "5"),
        ("\\boxed{}", ""),
        ("no box, 5", None),
        ("\\boxed 5", None),
        ("\\boxed{5", None),
        ("\\\\boxed{5}", None),  # an escaped backslash, then the word
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_last_boxed_of_a_megabyte_is_one_pass():
    assert last_boxed("\\boxed{" * 150_000) is None
    assert last_boxed("\\boxed{" * 70_000 + "5" + "}" * 70_000) == "5"


_OLD_BOX = re.compile(r"\\boxed\s*\{")


def boxed_by_definition(text):
    """Of the boxes that close, the one that opens last: every box is tried, and read to its end, at quadratic cost."""
    for start in reversed([box for box in _OLD_BOX.finditer(text) if not escaped(text, box.start())]):
        depth, place = 1, start.end()
        while place < len(text) and depth:
            if text[place] == "\\":
                box = _OLD_BOX.match(text, place)
                place = box.end() if box else place + 2
                depth += box is not None
                continue
            depth += (text[place] == "{") - (text[place] == "}")
            place += 1
        if not depth:
            return text[start.end() : place - 1].strip()
    return None


def escaped(text, place):
    before = text[:place]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["\\boxed{", "\\boxed {", "\\boxed", "{", "}", "\\{", "\\}", "\\", "\\\\", "5", "x", " "]))
)
def test_last_boxed_is_what_its_definition_says(pieces):
    text = "".join(pieces)
    assert last_boxed(text) == boxed_by_definition(text)


@pytest.mark.parametrize("piece", ["{", "{}", "}", "\\{", "\\boxed", "\\boxed ", "\\boxed{", "\\boxed{}", "\\", " "])
def test_last_boxed_of_a_megabyte_of_anything(piece):
    text = piece * ((1 << 20) // len(piece))
    assert last_boxed(text) == ("" if piece == "\\boxed{}" else None)


@pytest.mark.parametrize(
    "answer, ground_truth",
    [
        ("\\frac12", "\\frac{1}{2}"),
        ("\\dfrac{2}{4}", "\\frac{1}{2}"),
        ("0.5", "\\frac{1}{2}"),
        ("1/2", "0.5"),
        ("1\\frac{1}{2}", "1.5"),
        ("0.333333", "\\frac{1}{3}"),
        ("1,234", "1234"),
        ("1{,}234", "1,\\!234"),
        ("\\$42", "42"),
        ("42.", "42"),
        ("42.0", "42"),
        ("\N{MINUS SIGN}5", "-5"),
        ("50\\%", "50\\%"),
        ("50\\%", "50"),
        ("50\\%", "0.5"),
        (".5x", "0.5x"),
        ("90^\\circ", "90"),
        ("x = 7", "7"),
        ("15 \\text{ cm}^2", "15"),
        ("15", "15\\mbox{ cm}^2"),
        ("8n^{2}+4n+1", "8n^2 + 4n + 1"),
        ("(x+1)^2 - 2x", "x^2 + 1"),
        ("+\\infty", "\\infty"),
        ("\\frac{2}{3}", "2:3"),
        ("(1, 2)", "(1,2)"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"),
        ("\\{3, 1, 2\\}", "\\{1,2,3\\}"),
        ("3, 1, 2", "1,2,3"),
        ("4 \\text{ or } 3", "3, 4"),
        ("(2,3) \\cup (-\\infty,1)", "(-\\infty,1) \\cup (2,3)"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("\\frac{2}{5}", "\\\\frac{2}{5}"),  # doubled backslashes, as 1,465 of the paper's training answers have
        ("2\\pi", "$2\\\\pi$"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("195", "\\[ 195 \\]"),
        ("\\text{B}", "B"),
        ("52_{8}", "52_8"),
        ("52", "52_8"),
        ("10^{-20}", "\\frac{1}{10^{20}}"),
        ("y \\ge x", "x \\leq y"),
        ("2 + 3i", "3i + 2"),
        ("10^{20}\\sqrt{8}", "2 \\cdot 10^{20} \\sqrt{2}"),
        ("\\frac{\\ln 15}{\\ln 5}", "\\log_5 15"),
        ("12.34", "12.34000"),
        ("a b c \\ldots", "a b c \\ldots"),  # equal strings need no parsing
        ("9^{9^{9^9}}", "9^{9^{9^9}}"),
        ("1 = x + y", "x + y = 1"),
        ("y = 1 - x", "x + y = 1"),
        ("7", "x = 7"),
        ("2x", "f(x) = 2x"),
        ("3\\sqrt{7}", "AE = 3\\sqrt{7}"),
        ("89 + 19 = 108", "89+19=108"),
        ("\\frac{10}{3} \\approx 3.33", "\\frac{10}{3}"),
        ("17 \\cdot 3 = 51", "51"),
        ("S = 17 \\cdot 3\n= 51", "51"),
        ("a = 2b = 6", "6"),
        ("\\frac{1}{2} = 0.5", "0.5"),
        ("\\lfloor \\frac{n}{2} \\rfloor", "\\left\\lfloor \\frac{n}{2} \\right\\rfloor"),
    ],
)
def test_right(answer, ground_truth):
    assert judge(answer, ground_truth) == 1.0


@pytest.mark.parametrize(
    "answer, ground_truth",
    [
        ("", "5"),
        ("2", "2\\sqrt{3}"),  # the paper's scorer reads 2 out of this ground truth
        ("288", "288 \\pi"),
        ("10001", "10000"),  # and allows 1e-4
        ("10000.0000001", "10000"),
        ("0.5", "50"),  # and a factor of 100
        ("50", "0.5"),
        ("5000", "500000"),
        ("52_9", "52_8"),
        ("42", "52_8"),
        ("42_5", "42"),
        ("0.33", "\\frac{1}{3}"),
        ("5, 6", "5"),
        ("5 \\text{ or } 6", "5"),
        ("1,2,3,4,5,6,7,8,9", "7"),
        ("\\{1,2\\}", "\\{1,2,3\\}"),
        ("(2,1)", "(1,2)"),
        ("(5,2)", "(3,1)"),
        ("[1,2]", "(1,2)"),
        ("(3,2,1)", "(1,2,3)"),
        ("y=5", "x=5"),
        ("10^{-30}", "10^{-20}"),  # differences that small are rounded away
        ("0.0000002", "\\frac{1}{10^7}"),
        ("\\frac{1}{2^{61}}", "\\frac{1}{2^{60}}"),
        ("2^{100}+1", "2^{100}"),
        ("5!", "5"),
        ("x^2 + 2", "x^2 + 1"),
        ("\\frac{1}{0}", "5"),
        ("\\text{Bob}", "\\text{Alice}"),
        ("-987654321", "\\log_5 15"),  # simplified, a number of 690 million digits
        ("987654321", "\\frac{1}{\\ln 2}"),
        ("2 + 3i", "3 + 2i"),
        ("1", "x + y = 1"),  # what stands behind the "=" is no equation
        ("1", "xy = 1"),
        ("0", "x + y + z = 0"),
        ("0 = 0", "x + y = 1"),
        ("0 = 0", "89+19=108"),
        ("108", "89+19=108"),
        ("1 = 2 = 3 = 4 = 5", "5"),  # Math-Verify takes the last
        ("x = 1 = 2 = 5", "5"),
        ("x = 5 \\lor x = 6", "6"),
        ("x = 5 \\quad x = 6", "6"),
        ("5 \\approx 6", "5"),  # and here the first
        ("5 6", "11"),  # and here their sum
        ("5 \\equiv 6", "6"),
        ("5_6", "5 \\text{ cm}"),
        ("5_{6}", "x = 5"),
    ],
)
def test_wrong(answer, ground_truth):
    assert judge(answer, ground_truth) == 0.0


@pytest.mark.parametrize(
    "answer, ground_truth",
    [
        ("9^{9^9}", "5x"),
        ("5x", "3^{2^{2018}}-1"),
        ("20194038", "20192019\\ldots2019"),
        ("2", "2 \\text{ hours and } 13 \\text{ minutes}"),
        ("x", "p \\equiv 1 \\pmod{4}"),
        ("\\frac{2}", "2"),
        ("(" * 40 + "1" + ")" * 40, "2"),
        ("1" * 300, "2"),
        ("\\frac{1}{0}", "1/0"),
        ("\\gcd(10, 15)", "5"),  # the question
        ("\\operatorname{lcm}(4, 6)", "12"),
        ("\\max(5, 4)", "5"),
        ("\\min\\{5, 6\\}", "5"),
        ("2^{10} \\bmod 7", "2"),
        ("\\lim_{x \\to 0} 5", "5"),
        ("\\lfloor 5.5 \\rfloor", "5"),
        ("\\det\\begin{pmatrix} 5 \\end{pmatrix}", "5"),
        ("\\frac{d}{dx} 5x", "5"),
    ],
)
def test_undecidable(answer, ground_truth):
    with pytest.raises(Undecidable):
        judge(answer, ground_truth)


@pytest.mark.parametrize("response", ["", "5", "The answer is 5.", "\\boxed{5", "$5$", "\\fbox{5}", "#### 5"])
def test_only_a_box_answers(response):
    assert score(response, "5", {}) == 0.0


def test_the_last_box_counts_and_length_does_not():
    assert score("\\boxed{5} no, \\boxed{6}", "6", {}) == 1.0
    assert score("\\boxed{6} no, \\boxed{5}", "6", {}) == 0.0
    assert score("6 " * 300_000 + "\\boxed{6}" + " done." * 100_000, "6", {}) == 1.0


@pytest.mark.parametrize("name", ["math__sampled_1_50_1024", "math__full_difficulty_ordered_test_500"])
def test_the_papers_answers_equal_themselves_and_no_other_number(shared_data, name):
    table = pyarrow.parquet.read_table(shared_data / "guru_math" / f"{name}.parquet")
    truths = {row["ground_truth"] for row in table["reward_model"].to_pylist()}
    undecidable = 0
    for truth in truths:
        assert judge(truth, truth) == 1.0, truth
        try:
            assert judge("-987654321", truth) == 0.0, truth
        except Undecidable:
            undecidable += 1
    assert undecidable < 0.03 * len(truths)


@pytest.mark.parametrize(
    ("given", "truth", "says"),
    [
        ("x+1", "}{x", "unbalanced braces"),
        ("x+1", "{x", "unbalanced braces"),
        (",".join("1" * 102), "1,2", "more than 100 elements"),
    ],
)
def test_what_is_not_read_says_why(given: str, truth: str, says: str) -> None:
    with pytest.raises(Undecidable, match=says):
        score(f"\\boxed{{{given}}}", truth, {})


def test_a_bracket_that_an_exponent_leaves_open_reaches_to_the_end() -> None:
    with pytest.raises(Undecidable, match="large power"):
        score("\\boxed{2^(3^4}", "x", {})


def test_no_memory_is_not_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that ran out of it is replaced: `worker.py`."""

    def out_of_memory(*_: object, **__: object) -> bool:
        raise MemoryError

    monkeypatch.setattr("rljax.rewards.math.verify", out_of_memory)
    with pytest.raises(MemoryError):
        score("\\boxed{x+1}", "x+2", {})
