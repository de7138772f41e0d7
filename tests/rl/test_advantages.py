"""Golden values of every advantage estimator, worked by hand or by an independent implementation."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rljax.config import AlgorithmConfig, RunConfig
from rljax.rl.advantages import ADVANTAGES, group_advantages, groups_to_train_on, has_spread
from rljax.train import _advantages

ONE_OF_FOUR = np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)


def advantages(rewards: np.ndarray, name: str, eps: float = 1e-6, **options: float) -> np.ndarray:
    """With completions of one length."""
    return group_advantages(rewards, np.full(rewards.shape, 7), name, eps, **options)


@pytest.mark.parametrize(
    ("name", "eps", "expected"),
    [
        ("grpo", 1e-6, [1.499997, -0.499999, -0.499999, -0.499999]),  # std 0.5 with ddof 1
        ("grpo", 1e-4, [1.499700, -0.499900, -0.499900, -0.499900]),
        ("dr_grpo", 1e-6, [0.75, -0.25, -0.25, -0.25]),
        ("batch_std", 1e-6, [1.499997, -0.499999, -0.499999, -0.499999]),  # a batch of one group
        ("rloo", 1e-6, [1, -1 / 3, -1 / 3, -1 / 3]),
        ("max_rl", 1e-6, [3, -1, -1, -1]),
        ("reinforce_pp", 1e-6, [1.700836, -0.566945, -0.566945, -0.566945]),  # 28 tokens: std sqrt(7 x 0.75 / 27)
        ("opo", 1e-6, [0.75, -0.25, -0.25, -0.25]),  # equal lengths: the mean
    ],
)
def test_golden(name: str, eps: float, expected: list[float]) -> None:
    np.testing.assert_allclose(advantages(ONE_OF_FOUR, name, eps)[0], expected, atol=5e-7)


@pytest.mark.parametrize(("group", "high", "low"), [(2, 0.7071, -0.7071), (8, 2.47487, -0.35355), (16, 3.74999, -0.25)])
def test_one_success_in_a_group(group: int, high: float, low: float) -> None:
    rewards = np.zeros((1, group), np.float32)
    rewards[0, 0] = 1
    np.testing.assert_allclose(advantages(rewards, "grpo")[0, :2], [high, low], atol=1e-5)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@pytest.mark.parametrize("reward", [0.1, 0.35, 0.7, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_zero(name: str, reward: float) -> None:
    for group in range(2, 65):
        assert not advantages(np.full((3, group), reward, np.float32), name).any()


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_the_order_of_groups_does_not_matter(name: str) -> None:
    rewards = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_array_equal(advantages(rewards[order], name), advantages(rewards, name)[order])


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="group of >= 2"):
        advantages(np.zeros((3, 1), np.float32), "grpo")
    with pytest.raises(ValueError, match="not finite"):
        advantages(np.array([[0.0, np.nan]], np.float32), "grpo")
    with pytest.raises(ValueError, match="at least 0"):
        advantages(np.array([[0.0, -1.0]], np.float32), "max_rl")


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "max_rl", "opo"])
def test_other_groups_have_no_part(name: str) -> None:
    rewards = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    np.testing.assert_array_equal(advantages(rewards, name)[:2], advantages(rewards[:2], name))


def test_opo_weighs_the_baseline_by_length() -> None:
    got = group_advantages(np.array([[1.0, 0.0]]), np.array([[10, 30]]), "opo", 1e-6)
    np.testing.assert_allclose(got, [[0.75, -0.25]])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 0.5, [0.5, -0.25, -0.25, -0.25]),
        (0.1, 0.0, [0.75, -0.1, -0.1, -0.1]),
        (0.2, 0.6, [0.6, -0.2, -0.2, -0.2]),
        (1.0, 1.0, [0.75, -0.25, -0.25, -0.25]),
        (0.0, 0.0, [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_the_two_bounds_of_an_advantage(low: float, high: float, expected: list[float]) -> None:
    np.testing.assert_allclose(advantages(ONE_OF_FOUR, "dr_grpo", clip_low=low, clip_high=high)[0], expected)


def test_the_first_groups_with_a_spread_are_trained_on() -> None:
    flat, mixed = [1.0, 1.0], [0.0, 1.0]
    rewards = np.array([flat, mixed, flat, mixed, mixed, mixed], np.float32)
    assert groups_to_train_on(rewards, 3).tolist() == [1, 3, 4]  # the sixth is surplus
    assert groups_to_train_on(rewards, 5).tolist() == [0, 1, 3, 4, 5]  # filled up with the first flat one
    assert groups_to_train_on(rewards[:1], 1).tolist() == [0]
    assert groups_to_train_on(rewards[[1, 0, 2, 2]], 3).tolist() == [0, 1, 2]
    # As much as float32 tells apart is a spread, and what it does not is none.
    assert groups_to_train_on(np.array([[0.1, 0.1], [0.1, np.nextafter(np.float32(0.1), 1)]], np.float32), 1) == [1]


MISSING = np.array([[1.0, 0.0, np.nan, 0.5], [0.0, 1.0, 1.0, 0.0], [np.nan, 1.0, np.nan, np.nan]])
"""Of the third group, one reward is there."""


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_a_missing_reward_is_in_no_baseline_and_has_no_advantage(name: str) -> None:
    """The others get what they would without it."""
    lengths, there = np.array([[3, 1, 9, 4], [2, 5, 2, 2], [7, 7, 7, 7]]), np.isfinite(MISSING)
    got = group_advantages(MISSING, lengths, name, 1e-6, judged=there)
    assert not got[~there].any()
    if name == "batch_std":  # of the two groups that have more than one
        expected = np.array([0.5, -0.5, 0.0]) / (np.std(MISSING[:2][there[:2]], ddof=1) + 1e-6)
    elif name == "reinforce_pp":
        tokens = np.repeat(MISSING[there], lengths[there])
        expected = (np.array([1.0, 0.0, 0.5]) - tokens.mean()) / (np.std(tokens, ddof=1) + 1e-6)
    else:
        expected = group_advantages(np.array([[1.0, 0.0, 0.5]]), lengths[:1, [0, 1, 3]], name, 1e-6)[0]
    np.testing.assert_allclose(got[0, [0, 1, 3]], expected, rtol=1e-7, atol=1e-12)
    if name != "reinforce_pp":
        assert not got[2].any()  # nothing to compare one with


def test_one_missing_of_four_leaves_the_mean_of_three() -> None:
    judged = np.array([[True, True, True, False]])
    got = group_advantages(np.array([[1.0, 0.0, 0.0, 0.0]]), np.full((1, 4), 7), "dr_grpo", 0.0, judged=judged)
    np.testing.assert_allclose(got, [[2 / 3, -1 / 3, -1 / 3, 0]], rtol=1e-7)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_nothing_judged_teaches_nothing(name: str) -> None:
    none = np.zeros((2, 3), bool)
    assert not group_advantages(np.full((2, 3), np.nan), np.ones((2, 3)), name, 1e-6, judged=none).any()


def test_a_missing_reward_is_no_spread() -> None:
    rewards = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]], np.float32)
    judged = np.array([[True, False, True], [True, True, False]])
    assert has_spread(rewards, judged).tolist() == [False, True]
    assert groups_to_train_on(rewards, 1, judged).tolist() == [1]


def test_a_run_bounds_advantages_as_its_config_says() -> None:
    options = {"advantage": "dr_grpo", "advantage_clip_low": 0.1, "advantage_clip_high": 0.6}
    config = RunConfig(algorithm=AlgorithmConfig(**options))  # type: ignore[arg-type]
    rollouts = SimpleNamespace(lengths=np.full(4, 7), tokens=np.zeros((4, 9)))
    collected: Any = SimpleNamespace(rollouts=rollouts, rewards=ONE_OF_FOUR, judged=np.ones((1, 4), bool))
    run: Any = SimpleNamespace(config=config)
    np.testing.assert_allclose(_advantages(run, collected)[0], [[0.6, -0.1, -0.1, -0.1]])
