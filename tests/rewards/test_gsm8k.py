"""The grade-school verifier on answers judged by hand."""

import pytest

from rljax.rewards.answers import Undecidable
from rljax.rewards.gsm8k import score


@pytest.mark.parametrize(
    "response, ground_truth",
    [
        ("so #### 42", "42"),
        ("so #### 42.", "42"),
        ("#### 41\nno\n#### 42\n", "42"),
        ("#### 1,234", "1234"),
        ("#### 1234", "1,234"),
        ("#### $42", "42"),
        ("#### 42.00", "42"),
        ("#### 42.5", "42.50"),
        ("#### 50%", "50"),
        ("#### \N{MINUS SIGN}5", "-5"),
        ("#### 1/2", "0.5"),
        ("#### .5", "0.5"),
        ("#### 42 apples", "42"),
        ("#### 42\n\nand 7 more lines", "42"),
        ("\\boxed{42}", "42"),
        ("\\boxed{\\$1,234.00}", "1234"),
        ("\\boxed{42 \\text{ dollars}}", "42"),
        ("\\boxed{x = 42}", "42"),
        ("\\boxed{12{,}345}", "12345"),
        ("\\boxed{41} #### 40 \\boxed{42} #### 41", "42"),  # a box goes before ####
        ("5 of 12 remain, so 42 in all.", "42"),
        ("The total is $1,234.", "1234"),
        ("50-8=42", "42"),
        ("it costs 8-42", "42"),  # a range or a difference, not -42
        ("it is -42", "-42"),
    ],
)
def test_right(response, ground_truth):
    assert score(response, ground_truth, {}) == 1.0


@pytest.mark.parametrize(
    "response, ground_truth",
    [
        ("", "42"),
        ("forty-two", "42"),
        ("\\boxed{}", "42"),
        ("####", "42"),
        ("42, or 43", "42"),
        ("#### 41 or 42", "42"),
        ("\\boxed{42, 43}", "42"),
        ("\\boxed{41}, that is 42", "42"),
        ("#### 41\n42", "42"),
        ("#### 42", "-42"),
        ("#### 420", "42"),
        ("#### 4.2", "42"),
        ("#### 0.5", "50"),
        ("#### 1,23", "123"),
        ("#### 42", ""),
    ],
)
def test_wrong(response, ground_truth):
    assert score(response, ground_truth, {}) == 0.0


def test_a_number_of_a_megabyte_is_not_read():
    with pytest.raises(Undecidable):
        score("#### " + "7" * (1 << 20), "7", {})


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_worked_solutions_of_the_data_set_are_right(shared_data, split):
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(shared_data / "gsm8k" / f"{split}.parquet").to_pylist()
    scores = [score(row["extra_info"]["answer"], row["reward_model"]["ground_truth"], {}) for row in rows]
    assert len(scores) > 1000
    assert sum(scores) == len(scores)
    # and the solution of the next problem is right only where the two answers are the same number
    truths = [row["reward_model"]["ground_truth"] for row in rows]
    for row, truth, other in zip(rows, truths[1:], truths, strict=False):
        same = float(truth.replace(",", "")) == float(other.replace(",", ""))
        assert score(row["extra_info"]["answer"], truth, {}) == float(same)
