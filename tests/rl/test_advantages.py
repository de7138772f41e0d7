"""Golden values of every advantage estimator, worked by hand or by an independent implementation."""

import numpy as np
import pytest

from rljax.rl.advantages import ADVANTAGES, group_advantages

ONE_OF_FOUR = np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("name", "eps", "expected"),
    [
        ("grpo", 1e-6, [1.499997, -0.499999, -0.499999, -0.499999]),  # std 0.5 with ddof 1
        ("grpo", 1e-4, [1.499700, -0.499900, -0.499900, -0.499900]),
        ("dr_grpo", 1e-6, [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_golden(name: str, eps: float, expected: list[float]) -> None:
    np.testing.assert_allclose(group_advantages(ONE_OF_FOUR, name, eps)[0], expected, atol=5e-7)


@pytest.mark.parametrize(("group", "high", "low"), [(2, 0.7071, -0.7071), (8, 2.47487, -0.35355), (16, 3.74999, -0.25)])
def test_one_success_in_a_group(group: int, high: float, low: float) -> None:
    rewards = np.zeros((1, group), np.float32)
    rewards[0, 0] = 1
    advantages = group_advantages(rewards, "grpo", 1e-6)[0]
    np.testing.assert_allclose(advantages[:2], [high, low], atol=1e-5)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@pytest.mark.parametrize("reward", [0.1, 0.35, 0.7, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_zero(name: str, reward: float) -> None:
    for group in range(2, 65):
        assert not group_advantages(np.full((3, group), reward, np.float32), name, 1e-6).any()


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_groups_do_not_mix(name: str) -> None:
    rewards = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_array_equal(
        group_advantages(rewards[order], name, 1e-6), group_advantages(rewards, name, 1e-6)[order]
    )


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="group of >= 2"):
        group_advantages(np.zeros((3, 1), np.float32), "grpo", 1e-6)
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(np.array([[0.0, np.nan]], np.float32), "grpo", 1e-6)
