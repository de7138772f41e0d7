"""mean@k, pass@k and maj@k against what they estimate, and their errors against many repetitions."""

import itertools
from math import comb

import numpy as np
import pytest

from rljax.config import ConfigError
from rljax.evaluate.estimators import Estimate, majority_at_k, mean_at_k, pass_at_k, powers_up_to


@pytest.mark.parametrize("n, c, k", [(4, 0, 2), (4, 1, 2), (4, 3, 2), (4, 4, 4), (6, 2, 5), (5, 1, 1), (1, 1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n: int, c: int, k: int) -> None:
    scores = [1.0] * c + [0.0] * (n - c)
    share = np.mean([max(subset) for subset in itertools.combinations(scores, k)])
    assert pass_at_k(np.array([scores]), k).value == pytest.approx(share, abs=1e-12)
    assert pass_at_k(np.array([scores]), k).value == pytest.approx(1 - comb(n - c, k) / comb(n, k), abs=1e-12)


def test_pass_at_1_is_the_mean_and_a_part_of_a_score_does_not_pass() -> None:
    scores = np.array([[1, 0, 0, 1], [0, 0, 0, 1]])
    assert pass_at_k(scores, 1) == mean_at_k(scores)
    assert pass_at_k(np.array([[0.5, 0.9]]), 2).value == 0
    assert mean_at_k(np.array([[0.5, 0.9]])).value == pytest.approx(0.7)


def test_pass_at_k_has_no_bias_and_honest_errors() -> None:
    """400 evaluations of prompts with known chances: the mean is the truth, the spread what each said of itself."""
    rng = np.random.default_rng(0)
    chances = rng.beta(0.5, 1.5, 60)
    truth = np.mean(1 - (1 - chances) ** 3)
    estimates = [pass_at_k((rng.random((60, 8)) < chances[:, None]).astype(float), 3) for _ in range(400)]
    values = np.array([e.value for e in estimates])
    assert values.mean() == pytest.approx(truth, abs=4 * values.std() / 20)
    # The errors are those of other prompts as well, so they are no smaller than the spread over draws.
    assert np.mean([e.standard_error for e in estimates]) > values.std()


def test_errors_are_clustered_by_prompt() -> None:
    """Copies of a completion tell nothing new."""
    once = np.array([[1.0], [0.0], [0.0], [1.0], [1.0]])
    assert mean_at_k(np.repeat(once, 16, axis=1)) == mean_at_k(once)
    assert mean_at_k(once).standard_error == pytest.approx(np.sqrt(0.3 / 5))
    assert mean_at_k(np.ones((1, 4))) == Estimate(1.0, 0.0)


@pytest.mark.parametrize(
    "answers, scores, value",
    [
        (["4", "4", "5"], [1, 1, 0], 1),
        (["4", "5", "5"], [1, 0, 0], 0),
        (["1 2", "12", "5"], [1, 1, 0], 1),
        ([None, None, "5"], [0, 0, 1], 1),
        ([None, None, None], [0, 0, 0], 0),
        (["4", "5"], [0, 1], 0),
        (["5", "4"], [1, 0], 1),
    ],
)
def test_majority(answers, scores, value) -> None:
    assert majority_at_k(np.array([scores]), [answers]).value == value


@pytest.mark.parametrize("k", [0, 5])
def test_k_is_at_most_the_completions(k: int) -> None:
    with pytest.raises(ConfigError, match=f"pass@{k} of 4 completions per prompt"):
        pass_at_k(np.zeros((2, 4)), k)


def test_the_k_that_are_reported() -> None:
    assert [powers_up_to(n) for n in (1, 2, 3, 4, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]
