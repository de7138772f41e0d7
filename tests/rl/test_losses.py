"""The objective against hand-worked values; gradients that must be exactly zero; numbers that must not be NaN."""

import dataclasses

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


def test_gauges_of_the_gap_between_sampler_and_learner() -> None:
    """All of them against NumPy in float64; masked tokens hold what would show."""
    draw = np.random.default_rng(0)
    mask = draw.random((3, 40)) < 0.7
    mu = -draw.exponential(1.0, (3, 40)).astype(np.float32)
    pi = mu + draw.normal(0, 0.2, (3, 40)).astype(np.float32)
    wild = np.where(draw.random((3, 40)) < 0.5, 30.0, -np.inf)
    batch = dataclasses.replace(batch_of(mask.tolist(), np.zeros((3, 40)).tolist()), behaviour_logprobs=mu)
    gauges = behaviour_gap(jnp.array(np.where(mask, pi, wild), jnp.float32), batch)
    a, b = pi[mask].astype(np.float64), mu[mask].astype(np.float64)
    rho, apart = np.exp(a - b), abs(np.exp(a) - np.exp(b))
    expected = {
        "kl": np.mean(1 / np.exp(b - a) - 1 - (a - b)),
        "kl_k1": np.mean(b - a),
        "gap_max": abs(a - b).max(),
        "gap_mean": abs(a - b).mean(),
        "probability_gap_max": apart.max(),
        "probability_gap_mean": apart.mean(),
        "probability_gap_std": apart.std(ddof=1),
        "correlation": np.corrcoef(np.exp(a), np.exp(b))[0, 1],
        "error_factor": np.exp(abs(a - b)).mean(),
        "ratio_mean": rho.mean(),
        "ratio_min": rho.min(),
        "ratio_max": rho.max(),
        "chi2": np.mean(rho**2) - 1,
        "effective_fraction": rho.sum() ** 2 / len(rho) / (rho**2).sum(),
        "outside_fraction": np.mean(abs(rho - 1) > 0.1),
    }
    found = {name.removeprefix("policy/behaviour_"): metric.value() for name, metric in gauges.items()}
    assert found == pytest.approx(expected, rel=2e-5)
    assert 0.3 < expected["outside_fraction"] < 0.9


def test_gauges_of_a_sure_policy_keep_their_digits() -> None:
    """Probabilities within 1e-6 of 1, differences a tenth of that: float32 has no such numbers near 1."""
    draw = np.random.default_rng(0)
    mu = (-1e-6 * draw.random((1, 500))).astype(np.float32)
    pi = (mu * (1 + 0.1 * draw.normal(size=(1, 500)))).astype(np.float32)
    batch = dataclasses.replace(batch_of([[1] * 500], [[0] * 500]), behaviour_logprobs=mu)
    gauges = behaviour_gap(jnp.array(pi), batch)
    apart = abs(np.expm1(pi[0].astype(np.float64)) - np.expm1(mu[0].astype(np.float64)))
    for name, value in (("mean", apart.mean()), ("max", apart.max()), ("std", apart.std(ddof=1))):
        assert gauges[f"policy/behaviour_probability_gap_{name}"].value() == pytest.approx(value, rel=1e-4)


def test_a_policy_that_is_the_sampler_has_no_gap() -> None:
    logprobs = np.log(np.array([[0.2, 0.5, 0.9]], np.float32))
    batch = dataclasses.replace(batch_of([[1, 1, 1]], [[0, 0, 0]]), behaviour_logprobs=logprobs)
    gauges = {name[17:]: metric.value() for name, metric in behaviour_gap(jnp.array(logprobs), batch).items()}
    ones = {name: gauges.pop(name) for name in ("error_factor", "ratio_mean", "ratio_min", "ratio_max")}
    assert set(ones.values()) == {1.0} and gauges.pop("effective_fraction") == pytest.approx(1)
    assert gauges.pop("correlation") == pytest.approx(1, abs=1e-6)
    assert set(gauges.values()) == {0.0}


def test_shares_of_what_the_bounds_decide() -> None:
    """Seven tokens: both clips, the dual clip twice, three that are left alone."""
    ratio, advantages = [1.5, 0.5, 4.0, 3.5, 1.0, 0.5, 2.0], [1.0, -1.0, -1.0, -2.0, 1.0, 1.0, -1.0]
    logprobs, batch = jnp.log(jnp.array([ratio])), batch_of([[1] * 7], [advantages])
    metrics = grpo_loss(logprobs, logprobs * 0, batch, AlgorithmConfig(kl_coefficient=0, dual_clip=3.0))[1]
    assert metrics["policy/dual_clip_fraction"].value() == pytest.approx(2 / 7)
    assert metrics["policy/clip_fraction"].value() == pytest.approx(4 / 7)
    assert metrics["policy/ratio_min"].value() == pytest.approx(0.5)
    assert metrics["policy/ratio_max"].value() == pytest.approx(4.0)
    off = grpo_loss(logprobs, logprobs * 0, batch, AlgorithmConfig(kl_coefficient=0, dual_clip=0.0))[1]
    assert off["policy/dual_clip_fraction"].value() == 0


@pytest.mark.parametrize(
    ("name", "weights"),
    [("token_truncate", [0.25, 1.0, 1.5, 1.5]), ("token_mask", [0.0, 1.0, 0.0, 1.5])],
)
def test_metrics_of_a_correction(name: str, weights: list[float]) -> None:
    """Ratios 0.25, 1, 4 and 1.5 of learner to sampler within bounds of 0.5 and 1.5."""
    ratio = np.log(np.array([[0.25, 1.0, 4.0, 1.5, 9.0]], np.float32))
    batch = dataclasses.replace(batch_of([[1, 1, 1, 1, 0]], [[1] * 5]), behaviour_logprobs=-ratio)
    algorithm = AlgorithmConfig(correction=name, correction_low=0.5, correction_high=1.5000001)  # type: ignore[arg-type]
    metrics = grpo_loss(jnp.zeros((1, 5)), jnp.zeros((1, 5)), batch, algorithm)[1]
    found = {key[18:]: metric.value() for key, metric in metrics.items() if key.startswith("policy/correction_")}
    w = np.array(weights)
    assert found == pytest.approx(
        {
            "mean": w.mean(), "min": w.min(), "max": w.max(), "dropped_fraction": np.mean(w == 0),
            "effective_fraction": w.mean() ** 2 / np.mean(w**2),
        },
        rel=1e-6,
    )  # fmt: skip
