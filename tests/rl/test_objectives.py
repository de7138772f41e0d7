"""Every named part of the objective against the oracle: value and gradient, in rows that hold several completions."""

import dataclasses
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from rljax.config import AlgorithmConfig
from rljax.rl.advantages import ADVANTAGES, group_advantages
from rljax.rl.aggregation import AGGREGATIONS, UpdateLengths, token_weights
from rljax.rl.correction import CORRECTIONS, SEQUENCE_CORRECTIONS, normalised_advantages
from rljax.rl.losses import KL_ESTIMATORS, LOSSES, grpo_loss
from rljax.rl.sequences import sequence_ids, sequence_mean, sequence_sum
from rljax.types import TrainBatch

PROMPTS, CAP = [2, 1, 3], 6
LENGTHS = np.array([[1, 4], [6, 2], [3, 3]])
"""Of the completions: two prompts share the first row, the third has a row of its own."""
ADVANTAGE = np.array([[1.3, -0.7], [0.4, -2.0], [-1.1, 0.9]])
ROWS = [[0, 1], [2]]


def allowed(field: str) -> tuple[str, ...]:
    return get_args(get_type_hints(AlgorithmConfig)[field])


def make_batch(algorithm: AlgorithmConfig) -> tuple[TrainBatch, list[tuple[int, slice, int, int]], np.ndarray]:
    """(rows, where each completion lies: (row, places, prompt, g), log-probs of the policy [B, T])."""
    draw = np.random.default_rng(0)
    width = 24
    shape = (len(ROWS), width)
    leaves: dict[str, Any] = {
        name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "completion", "source")
    }
    leaves |= {"group": np.full(shape, -1, np.int32), "loss_mask": np.zeros(shape, bool)}
    # Whatever lies outside the mask must not matter: it is wild.
    floats = {name: np.full(shape, 1e9) for name in ("logprobs", "old", "behaviour", "reference", "advantages")}
    weights, places = np.zeros(shape), []
    update = UpdateLengths(LENGTHS, np.array(PROMPTS), CAP, 8)
    by_completion = token_weights(update, algorithm.aggregation)
    for row, members in enumerate(ROWS):
        start = 0
        for group, prompt in enumerate(members):
            leaves["group"][row, start : start + PROMPTS[prompt]] = group
            start += PROMPTS[prompt]
            for g, length in enumerate(LENGTHS[prompt]):
                where = slice(start, start + length)
                leaves["group"][row, where], leaves["completion"][row, where] = group, g + 1
                leaves["loss_mask"][row, where] = True
                for name, spread in (("logprobs", 0.0), ("old", 0.3), ("behaviour", 0.5), ("reference", 0.4)):
                    base = -2.0 if name == "logprobs" else floats["logprobs"][row, where]
                    floats[name][row, where] = base + (spread or 0.6) * draw.normal(size=length)
                floats["advantages"][row, where] = ADVANTAGE[prompt, g]
                weights[row, where] = by_completion[prompt, g]
                places.append((row, where, prompt, g))
                start += length
    floats = {name: value.astype(np.float32) for name, value in floats.items()}
    batch = TrainBatch(
        **{name: leaf for name, leaf in leaves.items() if name in TrainBatch.__dataclass_fields__},
        advantages=floats["advantages"],
        weights=weights.astype(np.float32),
        old_logprobs=floats["old"],
        behaviour_logprobs=floats["behaviour"],
        reference_logprobs=floats["reference"],
    )
    return batch, places, floats["logprobs"]


def expected_loss(
    logprobs: np.ndarray, frozen: np.ndarray, entropies: np.ndarray, batch: TrainBatch, places, o: AlgorithmConfig
) -> float:
    """The oracle's objective, float64."""
    total = 0.0
    for row, where, prompt, g in places:
        lp, fixed, mu, reference, entropy = (
            np.asarray(x[row, where], np.float64)
            for x in (logprobs, frozen, batch.behaviour_logprobs, batch.reference_logprobs, entropies)
        )
        old = fixed if o.old_logprobs == "current" else np.asarray(batch.old_logprobs[row, where], np.float64)
        losses = oracle.policy_loss(lp, fixed, old, mu, ADVANTAGE[prompt, g], o)
        corrections = oracle.correction(old, mu, o)
        if oracle.is_off_policy(fixed, mu, ADVANTAGE[prompt, g], o):
            corrections = [0.0] * len(corrections)
        weight = np.asarray(batch.weights[row, where], np.float64)
        for t in range(len(lp)):
            penalty = o.kl_coefficient * oracle.kl(lp[t], fixed[t], reference[t], o.kl_estimator)
            if o.kl_importance_weight:
                penalty *= np.exp(lp[t] - old[t])
            bonus = o.entropy_coefficient * entropy[t]
            total += weight[t] * (losses[t] * corrections[t] + (penalty if o.kl_in == "loss" else 0) - bonus)
    return total


CASES = {
    **{f"loss {name}": {"loss": name} for name in allowed("loss")},
    **{
        f"clip higher, {name}": {"loss": name, "clip_high": 0.28, "clip_low": 0.1} for name in ("clip", "cispo", "gspo")
    },
    "no dual clip": {"dual_clip": 0.0, "clip_high": 0.05},
    "cispo with a cap alone": {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.1},
    "current": {"old_logprobs": "current"},
    **{f"KL {name}": {"kl_coefficient": 0.3, "kl_estimator": name} for name in allowed("kl_estimator")},
    "KL times the ratio": {"kl_coefficient": 0.3, "kl_importance_weight": True},
    "KL times a ratio of 1": {"kl_coefficient": 0.3, "kl_importance_weight": True, "old_logprobs": "current"},
    "KL in the reward": {"kl_coefficient": 0.3, "kl_in": "reward"},
    **{f"correction {name}": {"correction": name, "correction_high": 1.4} for name in allowed("correction")},
    "geometric mask": {"correction": "geometric_mask", "correction_low": 0.75, "correction_high": 1.4},
    "TRL's sequence mask": {"correction": "sequence_mask", "correction_low": 0.0, "correction_high": 3.0},
    "decoupled PPO": {"correction": "token_truncate", "correction_high": 5.0, "clip_high": 0.4},
    **{
        f"off-policy mask, {name}": {"loss": name, "off_policy_mask": 0.05, "kl_coefficient": 0.3}
        for name in allowed("loss")
    },
    "off-policy mask against the policy of now": {"off_policy_mask": 0.05, "old_logprobs": "current"},
    "off-policy mask and a correction": {"off_policy_mask": 0.05, "correction": "token_truncate"},
    "entropy": {"entropy_coefficient": 0.2},
    **{f"aggregation {name}": {"aggregation": name} for name in allowed("aggregation")},
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_oracles(name: str) -> None:
    """The gradient by central differences in float64, everything stopped held at its value."""
    algorithm = AlgorithmConfig(**({"kl_coefficient": 0.0} | CASES[name]))
    batch, places, logprobs = make_batch(algorithm)
    mask = np.asarray(batch.loss_mask)
    entropies = np.where(mask, np.abs(np.random.default_rng(1).normal(size=mask.shape)), 1e9).astype(np.float32)

    def loss(x: jax.Array, h: jax.Array) -> jax.Array:
        return grpo_loss(x, h, batch, algorithm)[0]

    value, (slope, entropy_slope) = jax.value_and_grad(loss, argnums=(0, 1))(jnp.array(logprobs), jnp.array(entropies))
    assert float(value) == pytest.approx(
        expected_loss(logprobs, logprobs, entropies, batch, places, algorithm), rel=1e-5, abs=1e-7
    )
    expected, step = np.zeros(mask.shape), 1e-6
    wide = logprobs.astype(np.float64)
    for at in zip(*np.nonzero(mask), strict=True):
        moved = []
        for sign in (1, -1):
            x = wide.copy()
            x[at] += sign * step
            moved.append(expected_loss(x, wide, entropies, batch, places, algorithm))
        expected[at] = (moved[0] - moved[1]) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(entropy_slope, -algorithm.entropy_coefficient * np.asarray(batch.weights), rtol=1e-6)
    assert np.abs(expected).max() > 1e-3 or algorithm.aggregation == "constant"


@pytest.mark.parametrize(("threshold", "dropped"), [(0.01, [1, 3]), (0.1, [1]), (0.5, [])])
def test_completions_far_from_the_sampler_are_dropped_and_counted(threshold: float, dropped: list[int]) -> None:
    """Only those with A < 0 that the sampler found likelier than the policy does, by more than the threshold."""
    algorithm = AlgorithmConfig(off_policy_mask=threshold, kl_coefficient=0.0, loss="cispo")
    batch, places, logprobs = make_batch(algorithm)
    behaviour = np.array(batch.behaviour_logprobs)
    for (row, where, *_), above in zip(places, [0.3, 0.3, 0.3, 0.02, -0.3, 0.3], strict=True):
        behaviour[row, where] = logprobs[row, where] + above
    batch = dataclasses.replace(batch, behaviour_logprobs=behaviour)
    slope, metrics = jax.grad(lambda x: grpo_loss(x, 0 * x, batch, algorithm), has_aux=True)(jnp.array(logprobs))
    gone = [n for n, (row, where, *_) in enumerate(places) if not np.asarray(slope)[row, where].any()]
    assert gone == dropped
    share = metrics["policy/off_policy_dropped_fraction"]
    assert (float(share.total), float(share.weight)) == pytest.approx((len(dropped), 6), abs=1e-5)
    off = dataclasses.replace(algorithm, off_policy_mask=0.0)
    assert "policy/off_policy_dropped_fraction" not in grpo_loss(jnp.array(logprobs), 0 * logprobs, batch, off)[1]


def test_every_choice_of_the_config_exists_and_is_tested() -> None:
    assert set(allowed("loss")) == set(LOSSES)
    assert set(allowed("advantage")) == set(ADVANTAGES)
    assert set(allowed("aggregation")) == set(AGGREGATIONS)
    assert set(allowed("correction")) == {"off", *CORRECTIONS}
    assert set(allowed("kl_estimator")) == set(KL_ESTIMATORS)


# ----------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("name", allowed("advantage"))
def test_advantages_are_the_oracles(name: str) -> None:
    draw = np.random.default_rng(3)
    rewards = draw.integers(0, 4, (6, 5)) / 4
    lengths = draw.integers(1, 30, (6, 5))
    ours = group_advantages(rewards, lengths, name, 1e-6)
    np.testing.assert_allclose(ours, oracle.advantages(name, rewards, lengths, 1e-6), rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------- aggregation


@pytest.mark.parametrize("name", [name for name in allowed("aggregation") if name != "micro_batch_token_mean"])
@pytest.mark.parametrize("lengths", [[[1, 3]], [[5, 0], [2, 9], [0, 0]], [[1, 1], [1, 1]]])
def test_weights_are_the_oracles(name: str, lengths: list[list[int]]) -> None:
    """A length of 0 is a completion that was filtered out: it is in no divisor."""
    update = UpdateLengths(np.array(lengths), np.full(len(lengths), 7), 12, 4096)
    np.testing.assert_allclose(token_weights(update, name), oracle.weights(name, lengths, 12), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_mean", 0.25),
        ("seq_mean_token_mean", 0.5),
        ("seq_mean_token_sum", 0.5),
        ("constant", 0.125),
        ("prompt_mean", 0.25),
        ("micro_batch_token_mean", 0.5),
    ],
)
def test_the_same_losses_under_every_aggregation(name: str, expected: float) -> None:
    """Lengths 1 and 3, token losses [1] and [0, 0, 0], a cap of 4; one completion per micro-batch in the last."""
    update = UpdateLengths(np.array([[1, 3]]), np.array([1]), cap=4, microbatch_tokens=4)
    assert token_weights(update, name)[0, 0] == pytest.approx(expected)


def test_one_micro_batch_is_the_token_mean() -> None:
    update = UpdateLengths(LENGTHS, np.array(PROMPTS), CAP, 4096)
    np.testing.assert_allclose(
        token_weights(update, "micro_batch_token_mean"), token_weights(update, "token_mean"), rtol=1e-6
    )


def test_micro_batches_of_the_paper_share_completions_evenly() -> None:
    draw = np.random.default_rng(0)
    update = UpdateLengths(draw.integers(1, 400, (16, 8)), draw.integers(20, 80, 16), 400, 6144)
    weights = token_weights(update, "micro_batch_token_mean")
    assert (weights * update.completions).sum() == pytest.approx(1, abs=1e-5)
    tokens = (update.completions + update.prompts[:, None]).sum()
    assert len(np.unique(weights)) == -(-tokens // 6144)
    assert 1 < weights.max() / weights.min() < 1.2


@pytest.mark.parametrize("name", allowed("aggregation"))
def test_nothing_left_gives_zero(name: str) -> None:
    assert not token_weights(UpdateLengths(np.zeros((2, 2), int), np.array([3, 3]), 4, 64), name).any()


# ------------------------------------------------------------------------------------------------------- golden values


def one_token(**given: float) -> dict[str, float]:
    """Loss, slope and clip share of a single token with ratio `ratio` and advantage `advantage`."""
    ratio, advantage = given.pop("ratio"), given.pop("advantage")
    algorithm = AlgorithmConfig(**({"kl_coefficient": 0.0} | given))  # type: ignore[arg-type]
    one = np.ones((1, 1), np.float32)
    batch = TrainBatch(
        **{name: np.zeros((1, 1), np.int32) for name in ("tokens", "positions", "source", "group", "completion")
           if name in TrainBatch.__dataclass_fields__},
        loss_mask=one > 0, advantages=advantage * one, weights=one, old_logprobs=-one, behaviour_logprobs=-one,
        reference_logprobs=-one,
    )  # fmt: skip
    x = jnp.array(-one + np.float32(np.log(ratio)))
    (value, metrics), slope = jax.value_and_grad(lambda x: grpo_loss(x, 0 * x, batch, algorithm), has_aux=True)(x)
    return {
        "loss": float(value), "slope": float(slope[0, 0]), "clipped": metrics["policy/clip_fraction"].value(),
    }  # fmt: skip


@pytest.mark.parametrize(("ratio", "bounded"), [(1.0, 1.0), (1.14, 1.14), (1.56, 1.28), (0.4, 0.8)])
def test_cispo_bounds_the_weight_and_keeps_the_gradient(ratio: float, bounded: float) -> None:
    got = one_token(ratio=ratio, advantage=2.0, loss="cispo", clip_low=0.2, clip_high=0.28)  # type: ignore[arg-type]
    assert got["slope"] == pytest.approx(-2 * bounded, rel=1e-5)
    assert got["clipped"] == (ratio != bounded)


@pytest.mark.parametrize(("ratio", "bounded"), [(1.0, 1.0), (3.0, 3.0), (9.0, 5.0), (0.4, 0.4)])
def test_cispo_with_a_cap_alone(ratio: float, bounded: float) -> None:
    got = one_token(ratio=ratio, advantage=1.0, loss="cispo", clip_low=1.0, clip_high=4.0)  # type: ignore[arg-type]
    assert got["slope"] == pytest.approx(-bounded, rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dropped"), [(1.6, 1.0, True), (1.4, 1.0, False), (0.4, -1.0, True), (1.6, -1.0, False)]
)
def test_dppo_drops_what_has_moved_far_with_its_advantage(ratio: float, advantage: float, dropped: bool) -> None:
    """The sampler's probability is exp(-1) = 0.368: ratio 1.6 is +0.22, ratio 0.4 is -0.22."""
    got = one_token(ratio=ratio, advantage=advantage, loss="dppo_mask", dppo_penalty=0.0)  # type: ignore[arg-type]
    assert got["clipped"] == dropped
    assert got["loss"] == pytest.approx(0 if dropped else -advantage * ratio, rel=1e-5)


def test_current_gives_a_ratio_of_exactly_one() -> None:
    got = one_token(ratio=7.0, advantage=1.5, old_logprobs="current")  # type: ignore[arg-type]
    assert got == {"loss": -1.5, "slope": -1.5, "clipped": 0.0}


def test_truncated_importance_weights() -> None:
    gap = jnp.array([[-1.0, 0.5, 1.5]])
    weight = CORRECTIONS["token_truncate"](gap, jnp.ones((1, 3), bool), jnp.zeros((1, 3), jnp.int32), (0.0, 2.0))
    np.testing.assert_allclose(weight, [[0.367879, 1.648721, 2.0]], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "bounds", "expected"),
    [
        ("sequence_mask", (0.0, 3.0), [0.25, 0.25, 0.0, 0.0]),  # TRL's default: products 0.25 and 4
        ("sequence_mask", (0.5, 2.0), [0.0, 0.0, 0.0, 0.0]),
        ("geometric_mask", (0.5, 1.5), [1.0, 1.0, 0.0, 0.0]),  # geometric means 0.5 and 2
        ("error_mask", (0.0, 2.1), [1.0, 1.0, 0.0, 0.0]),  # (2 + 2) / 2 and (8 + 2) / 2
        ("error_mask", (9.0, 5.1), [1.0, 1.0, 1.0, 1.0]),  # the low bound has no part
    ],
)
def test_masks_of_two_completions(name: str, bounds: tuple[float, float], expected: list[float]) -> None:
    """Ratios 1/2, 1/2 of the first and 8, 1/2 of the second, in one row."""
    gap, ids = jnp.log(jnp.array([[0.5, 0.5, 8.0, 0.5]])), jnp.array([[0, 0, 1, 1]])
    np.testing.assert_allclose(CORRECTIONS[name](gap, jnp.ones((1, 4), bool), ids, bounds), [expected], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in allowed("correction") if name != "off"])
def test_weights_of_mean_one(name: str) -> None:
    """Advantages over the update's mean weight: the loss of weights w / mean(w), split into micro-batches or not."""
    algorithm = AlgorithmConfig(correction=name, correction_high=1.4, kl_coefficient=0.3)  # type: ignore[arg-type]
    batch, places, logprobs = make_batch(algorithm)
    weights = []
    for row, where, *_ in places:
        old, mu = (np.asarray(x[row, where], np.float64) for x in (batch.old_logprobs, batch.behaviour_logprobs))
        mine = oracle.correction(old, mu, algorithm)
        weights += mine[:1] if name in SEQUENCE_CORRECTIONS else mine
    for split in (1, 2):
        rows = jax.tree.map(lambda x: jnp.asarray(x).reshape(split, 2 // split, -1), batch)  # noqa: B023
        scaled = normalised_advantages(rows, algorithm).reshape(batch.advantages.shape)
        inside = np.asarray(batch.loss_mask)
        np.testing.assert_allclose(
            np.asarray(scaled)[inside], np.asarray(batch.advantages)[inside] / np.mean(weights), rtol=1e-5
        )
        plain, metrics = grpo_loss(jnp.array(logprobs), jnp.zeros(logprobs.shape), batch, algorithm)
        normal, of_normal = grpo_loss(
            jnp.array(logprobs), jnp.zeros(logprobs.shape), dataclasses.replace(batch, advantages=scaled), algorithm
        )
        policy, of_policy = metrics["policy/loss"].value(), of_normal["policy/loss"].value()
        assert of_policy == pytest.approx(policy / np.mean(weights), rel=1e-5)
        assert float(normal) - of_policy == pytest.approx(float(plain) - policy, rel=1e-5)  # the KL is as it was


def test_weights_that_are_all_zero_stay_so() -> None:
    algorithm = AlgorithmConfig(correction="error_mask", correction_low=0.0, correction_high=0.5)
    batch = make_batch(algorithm)[0]
    rows = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    np.testing.assert_array_equal(normalised_advantages(rows, algorithm)[0], batch.advantages)


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "k1+", "k3+"])
def test_which_kl_has_the_gradient_of_the_kl(name: str) -> None:
    """All of a five-token vocabulary enumerated: k2 and the + kinds give the reverse KL's gradient, k1 none."""
    logits, reference = jnp.array([0.3, -1.0, 0.8, 0.0, 1.2]), jax.nn.log_softmax(jnp.array([1.0, 0.2, -0.5, 0.4, 0.1]))

    def expected(x: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(x)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * KL_ESTIMATORS[name](logp - reference))

    def exact(x: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(x)
        return jnp.sum(jnp.exp(logp) * (logp - reference))

    measured, true = jax.grad(expected)(logits), jax.grad(exact)(logits)
    if name == "k1":
        np.testing.assert_allclose(measured, 0, atol=1e-7)
    elif name == "k3":
        assert np.abs(measured - true).max() > 0.03
    else:
        np.testing.assert_allclose(measured, true, atol=1e-6)


def test_gspo_moves_a_sequence_as_a_whole() -> None:
    """The gradient of a completion's mean surrogate is that of s = exp(mean log rho), by differences."""
    algorithm = AlgorithmConfig(loss="gspo", kl_coefficient=0, aggregation="seq_mean_token_mean", dual_clip=0)
    batch, places, logprobs = make_batch(algorithm)
    slope = jax.grad(lambda x: grpo_loss(x, 0 * x, batch, algorithm)[0])(jnp.array(logprobs))
    for row, where, prompt, g in places:
        old = np.asarray(batch.old_logprobs[row, where], np.float64)
        lp = logprobs[row, where].astype(np.float64)

        def whole(x: np.ndarray, old: np.ndarray = old, a: float = ADVANTAGE[prompt, g]) -> float:
            return oracle.surrogate(float(np.exp(np.mean(x - old))), a, algorithm) / LENGTHS.size

        for t in range(len(lp)):
            step = np.eye(len(lp))[t] * 1e-6
            by_difference = (whole(lp + step) - whole(lp - step)) / 2e-6
            assert float(slope[row, where][t]) == pytest.approx(by_difference, rel=1e-4, abs=1e-7)


# ------------------------------------------------------------------------------------------------------------ sequences


def test_sequences_of_a_packed_row() -> None:
    group = jnp.array([[0, 0, 0, 0, 0, 1, 1, 1, -1]])
    completion = jnp.array([[0, 0, 1, 1, 2, 0, 1, 1, 0]])
    ids = sequence_ids(group, completion)
    assert ids.tolist() == [[0, 0, 1, 1, 2, 3, 4, 4, 5]]
    values = jnp.arange(9.0)[None]
    assert sequence_sum(values, ids).tolist() == [[1, 1, 5, 5, 4, 5, 13, 13, 8]]
    mask = (completion > 0) & (values != 3)
    assert sequence_mean(values, mask, ids).tolist() == [[0, 0, 2, 2, 4, 0, 6.5, 6.5, 0]]
