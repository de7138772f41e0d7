"""The objective against hand-worked values; gradients that must be exactly zero; numbers that must not be NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.config import AlgorithmConfig
from rljax.rl.aggregation import UpdateLengths, token_weights
from rljax.rl.losses import KL_ESTIMATORS, behaviour_gap, clipped_surrogate, grpo_loss
from rljax.types import TrainBatch


def batch_of(
    mask: list[list[int]], advantages: list[list[float]], *, old=0.0, reference=0.0, aggregation="token_mean"
) -> TrainBatch:
    mask_array = np.array(mask, bool)
    zeros = np.zeros(mask_array.shape, np.float32)
    none = zeros.astype(np.int32)
    update = UpdateLengths(mask_array.sum(axis=1)[None], np.array([1]), cap=4, microbatch_tokens=64)
    return TrainBatch(
        tokens=none, positions=none, source=none, group=none, completion=mask_array.astype(np.int32),
        loss_mask=mask_array, advantages=np.array(advantages, np.float32),
        weights=mask_array * token_weights(update, aggregation).reshape(-1, 1),
        old_logprobs=zeros + np.float32(old), behaviour_logprobs=zeros + np.float32(old),
        reference_logprobs=zeros + np.float32(reference),
    )  # fmt: skip


def ratio_loss(ratio: float, advantage: float, **options: float) -> tuple[float, float]:
    """(loss, its gradient with respect to the log-prob) of one token."""
    algorithm = AlgorithmConfig(**options)

    def loss(logprob: jax.Array) -> jax.Array:
        return clipped_surrogate(jnp.exp(logprob), jnp.float32(advantage), algorithm)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.log(jnp.float32(ratio)))
    return float(value), float(gradient)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [
        (1.5, 1.0, -1.28, 0.0),
        (0.5, -1.0, 0.8, 0.0),
        (4.0, -1.0, 3.0, 0.0),  # dual clip
        (2.0, -1.0, 2.0, 2.0),  # A < 0 and a high ratio below the dual bound: pushed down
        (0.5, 1.0, -0.5, -0.5),  # A > 0 and a low ratio: pushed up
        (1.0, 1.0, -1.0, -1.0),
    ],
)
def test_clip_higher_and_dual_clip(ratio: float, advantage: float, expected: float, gradient: float) -> None:
    value, slope = ratio_loss(ratio, advantage, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    assert value == pytest.approx(expected, abs=1e-6)
    assert slope == pytest.approx(gradient, abs=1e-6)


def test_dual_clip_off() -> None:
    assert ratio_loss(4.0, -1.0, dual_clip=0.0)[0] == pytest.approx(4.0, abs=1e-5)


def test_token_mean_of_three_ratios() -> None:
    logprobs = jnp.log(jnp.array([[0.5, 1.0, 1.5]]))
    batch = batch_of([[1, 1, 1]], [[1, -1, 2]])
    loss, metrics = grpo_loss(logprobs, logprobs * 0, batch, AlgorithmConfig(kl_coefficient=0))
    assert float(loss) == pytest.approx(-0.633333, abs=1e-6)
    assert metrics["policy/clip_fraction"].value() == pytest.approx(1 / 3)
    assert metrics["policy/ratio_max"].value() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("name", "log_ratio", "expected"),
    [
        ("k1", 0.5, 0.5), ("k1", -0.5, -0.5), ("k2", 0.5, 0.125), ("k2", -0.1, 0.005),
        ("k3", 0.5, 0.10653066), ("k3", -0.5, 0.14872127), ("k3", 0.1, 0.0048374180), ("k3", -0.1, 0.0051709181),
    ],
)  # fmt: skip
def test_kl_estimators(name: str, log_ratio: float, expected: float) -> None:
    assert float(KL_ESTIMATORS[name](jnp.float32(log_ratio))) == pytest.approx(expected, abs=2e-7)


def test_k3_is_clamped_and_weighted_by_its_coefficient() -> None:
    batch = batch_of([[0, 1]], [[0, 0]], reference=20.0)
    loss, metrics = grpo_loss(jnp.zeros((1, 2)), jnp.zeros((1, 2)), batch, AlgorithmConfig(kl_coefficient=0.5))
    assert float(loss) == pytest.approx(5.0)
    assert metrics["policy/reference_kl"].value() == pytest.approx(10.0)


@pytest.mark.parametrize("wild", [1e4, -1e4, np.inf, -np.inf, np.nan])
def test_what_is_masked_has_no_part_in_value_or_gradient(wild: float) -> None:
    """A masked token may hold anything, even where the gradient of exp is infinite."""
    batch = batch_of([[0, 1, 1]], [[0, 1, -1]])
    algorithm = AlgorithmConfig(kl_coefficient=0.1)

    def loss(logprobs: jax.Array) -> jax.Array:
        return grpo_loss(logprobs, jnp.zeros((1, 3)), batch, algorithm)[0]

    clean = jax.value_and_grad(loss)(jnp.array([[0.0, -0.3, 0.2]]))
    dirty = jax.value_and_grad(loss)(jnp.array([[wild, -0.3, 0.2]]))
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    assert np.isfinite(clean[1]).all() and clean[1][0, 0] == 0


@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
def test_an_overflowing_ratio_stays_finite(log_ratio: float) -> None:
    batch = batch_of([[0, 1]], [[0, -1]])
    value, gradient = jax.value_and_grad(
        lambda x: grpo_loss(x, jnp.zeros((1, 2)), batch, AlgorithmConfig(kl_coefficient=0.1))[0]
    )(jnp.array([[0.0, log_ratio]]))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_no_valid_token_gives_zero_and_no_nan() -> None:
    batch = batch_of([[0, 0]], [[1, 1]])
    loss, metrics = grpo_loss(jnp.ones((1, 2)), jnp.ones((1, 2)), batch, AlgorithmConfig())
    assert float(loss) == 0
    assert all(np.isfinite(metric.value()) for metric in metrics.values())


def test_behaviour_gap() -> None:
    batch = batch_of([[0, 1, 1]], [[0, 0, 0]], old=-1.0)
    gap = behaviour_gap(jnp.array([[5.0, -1.25, -1.0]]), batch)
    assert gap["policy/behaviour_gap_max"].value() == 0.25
    assert gap["policy/behaviour_gap_mean"].value() == 0.125
