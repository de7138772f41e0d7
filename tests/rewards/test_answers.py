"""What verifiers share."""

import re

import pytest

from rljax.rewards.answers import DECIMAL, Undecidable, marked_answer, refuse_deep_nesting


@pytest.mark.parametrize(
    "response, answer",
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("#### 7\nand more", "7"),
        ("\\boxed{1} #### 2", "1"),
        ("\\boxed{}", ""),
        ("####", ""),
        ("seven", None),
    ],
)
def test_the_marked_answer(response, answer) -> None:
    assert marked_answer(response) == answer


@pytest.mark.parametrize(
    "text, is_one",
    [("12", True), ("1,234.50", True), (".5", True), ("1,2345", False), ("1,23", False), ("5.", False), ("-1", False)],
)
def test_a_decimal(text, is_one) -> None:
    assert bool(re.fullmatch(DECIMAL, text)) == is_one


def test_nesting_is_limited() -> None:
    refuse_deep_nesting("([{" * 10 + "((" + "}" * 40)
    with pytest.raises(Undecidable, match="nested 33 deep; at most 32"):
        refuse_deep_nesting("(" * 33)
