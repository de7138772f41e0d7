"""What of a step's rollouts counts, and the KL that is taken off rewards."""

import dataclasses

import jax
import numpy as np
import pytest
from test_update import make_learner, make_rollouts, some_advantages

from rljax.costs import forward_flops, update_flops
from rljax.rl.learner import checkpoint_shapes, group_metrics, reference_copy, reference_dtype
from rljax.rl.losses import KL_ESTIMATORS
from rljax.types import LENGTH, STOP, join_rollouts, select_prompts

CUT = np.array([False, True, False, False, True, False, False, False])


def cut_rollouts():
    """The second and fifth completion reached the cap, the others stopped."""
    return dataclasses.replace(make_rollouts(), stop_reasons=np.where(CUT, LENGTH, STOP).astype(np.int8))


def test_completions_cut_at_the_cap_are_masked_on_demand(tiny, tiny_params, mesh) -> None:
    metrics = make_learner(tiny_params, tiny, mesh, overlong="mask").step(cut_rollouts(), some_advantages())
    assert metrics["policy/entropy"].weight == 52 - 14 - 2
    kept = dataclasses.replace(cut_rollouts(), lengths=np.where(CUT, 0, make_rollouts().lengths).astype(np.int32))
    alone = make_learner(tiny_params, tiny, mesh).step(kept, some_advantages())
    assert metrics["policy/loss"].value() == alone["policy/loss"].value()
    assert metrics["policy/grad_norm"].value() == alone["policy/grad_norm"].value()


def test_all_cut_leaves_nothing_to_learn(tiny, tiny_params, mesh) -> None:
    """`make_rollouts` has all of its completions cut. A step before leaves momentum behind."""
    learner = make_learner(tiny_params, tiny, mesh, overlong="mask")
    whole = dataclasses.replace(make_rollouts(), stop_reasons=np.full(8, STOP, np.int8))
    learner.step(whole, some_advantages())
    before = jax.tree.map(np.asarray, (learner.state.params, learner.state.opt_state))
    metrics = learner.step(make_rollouts(), some_advantages())
    assert metrics["policy/loss"].value() == 0 and metrics["policy/grad_norm"].value() == 0
    assert metrics["policy/skipped_updates"].value() == int(learner.state.skipped) == 2
    jax.tree.map(np.testing.assert_array_equal, before, (learner.state.params, learner.state.opt_state))


@pytest.mark.parametrize("aggregation", ["token_mean", "prompt_mean"])
def test_groups_of_equal_rewards_leave_the_divisor_on_demand(tiny, tiny_params, mesh, aggregation) -> None:
    """With `drop` another such group changes nothing; with `keep` it makes every other token count less."""
    advantages = some_advantages()
    advantages[0] = 0
    options = {"updates_per_step": 1, "kl_coefficient": 0.0, "aggregation": aggregation}

    def norm(groups: str, keep_first: bool) -> float:
        rollouts = make_rollouts()
        if not keep_first:
            rollouts = dataclasses.replace(
                rollouts, lengths=np.where(np.arange(8) < 4, 0, rollouts.lengths).astype(np.int32)
            )
        learner = make_learner(tiny_params, tiny, mesh, zero_variance_groups=groups, **options)
        return learner.step(rollouts, advantages)["policy/grad_norm"].value()

    assert norm("drop", True) == norm("drop", False)
    assert norm("keep", True) < 0.7 * norm("keep", False)


def test_the_kl_taken_off_a_reward_is_that_of_its_tokens(tiny, tiny_params, mesh) -> None:
    rollouts = make_rollouts()
    learner = make_learner(tiny_params, tiny, mesh, kl_in="reward", kl_estimator="k3", old_logprobs="behaviour")
    penalty, metrics = learner.kl_penalty(rollouts)
    reference = learner.score(tiny_params, rollouts)
    for completion, length in enumerate(rollouts.lengths):
        gap = rollouts.behaviour_logprobs[completion, :length] - reference[completion, :length]
        expected = 0.05 * float(np.asarray(KL_ESTIMATORS["k3"](np.clip(gap, -20, 20))).sum())
        assert penalty.reshape(-1)[completion] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert metrics["policy/reference_kl"].value() == pytest.approx(penalty.sum() / 0.05 / 52, rel=1e-5)
    # Old log-probs of the policy itself: no distance from a reference that is the policy.
    own = dataclasses.replace(learner.algorithm, old_logprobs="recompute")
    assert not dataclasses.replace(learner, algorithm=own).kl_penalty(rollouts)[0].any()
    assert "policy/reference_kl" not in learner.step(rollouts, some_advantages())  # it is not in the loss


def test_parts_joined_are_the_whole() -> None:
    whole = make_rollouts()
    whole = dataclasses.replace(whole, kept_mass=np.random.default_rng(0).random((8, 14), np.float32))
    joined = join_rollouts([select_prompts(whole, [0]), select_prompts(whole, [1])])
    for part in (whole, whole.prompts):
        same = joined if part is whole else joined.prompts
        for name, value in vars(part).items():
            if name != "prompts":
                np.testing.assert_array_equal(getattr(same, name), value)
    assert select_prompts(joined, [1]).prompts.records == select_prompts(whole, [1]).prompts.records


def test_importance_weights_of_mean_one(tiny, tiny_params, mesh) -> None:
    """At a first update every ratio is 1: the policy loss is that of plain weights over their mean, the KL the same."""
    options = {"updates_per_step": 1, "correction": "token_truncate", "correction_high": 3.0}
    plain = make_learner(tiny_params, tiny, mesh, **options).step(make_rollouts(), some_advantages())
    learner = make_learner(tiny_params, tiny, mesh, **options, correction_normalise=True)
    normal = learner.step(make_rollouts(), some_advantages())
    gap = learner.score(tiny_params, make_rollouts()) - make_rollouts().behaviour_logprobs
    inside = np.arange(14) < make_rollouts().lengths[:, None]
    mean = np.exp(gap[inside].astype(np.float64)).clip(max=3.0).mean()
    assert plain["policy/correction_mean"].value() == pytest.approx(mean, rel=1e-4) and abs(mean - 1) > 0.1
    assert normal["policy/loss"].value() == pytest.approx(plain["policy/loss"].value() / mean, rel=1e-4)
    assert normal["policy/grad_norm"].value() == pytest.approx(plain["policy/grad_norm"].value() / mean, rel=1e-4)
    assert normal["policy/correction_mean"].value() == plain["policy/correction_mean"].value()


# ----------------------------------------------------------------------------------------------------- moving reference


def moving_learner(params, arch, mesh, **options):
    """A learner whose reference is a copy, as `train` makes it."""
    learner = make_learner(params, arch, mesh, **options)
    dtype = reference_dtype(learner.algorithm, learner.compute.dtype)
    return dataclasses.replace(learner, reference=reference_copy(params, dtype))


def numbers(tree) -> list[np.ndarray]:
    return [np.array(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def test_a_running_mean_follows_the_policy_after_each_step(tiny, tiny_params, mesh) -> None:
    learner = moving_learner(tiny_params, tiny, mesh, reference_update="ema", reference_ema_decay=0.9)
    expected = numbers(tiny_params)
    for step in (1, 2):
        learner.step(make_rollouts(step), some_advantages())
        before = numbers(learner.reference)
        learner.move_reference(step)
        expected = [0.9 * old + 0.1 * new for old, new in zip(expected, numbers(learner.state.params), strict=True)]
        assert all((a != b).any() for a, b in zip(before, numbers(learner.reference), strict=True))
        for now, wanted in zip(numbers(learner.reference), expected, strict=True):
            np.testing.assert_allclose(now, wanted, rtol=1e-6, atol=1e-7)


def test_a_periodic_reference_is_the_policy_of_that_step(tiny, tiny_params, mesh) -> None:
    learner = moving_learner(tiny_params, tiny, mesh, reference_update="periodic", reference_every_steps=2)
    kl = []
    for step in (1, 2, 3):
        kl.append(learner.step(make_rollouts(step), some_advantages())["policy/reference_kl"].value())
        learner.move_reference(step)
        at_start = not learner.kl_penalty(make_rollouts())[0].any()
        assert at_start == (step == 2)  # the policy has no distance from itself, right after the copy only
        if step == 1:
            jax.tree.map(np.testing.assert_array_equal, learner.reference, tiny_params)
    assert min(kl) > 0
    # The third step donated the policy's buffers, and the copy outlived them.
    assert all((a != b).any() for a, b in zip(numbers(learner.reference), numbers(learner.state.params), strict=True))


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        ({"reference_update": "ema", "reference_ema_decay": 0.9}, {"float32"}),
        ({"reference_update": "periodic", "reference_every_steps": 2}, {"bfloat16"}),
        ({}, set()),
    ],
)
def test_a_checkpoint_holds_a_reference_that_moves(tiny, tiny_params, mesh, options, dtypes) -> None:
    """A running mean in float32, whatever the arithmetic; a fixed reference is not saved."""
    learner = make_learner(tiny_params, tiny, mesh, **options)
    learner = dataclasses.replace(learner, compute=dataclasses.replace(learner.compute, dtype="bfloat16"))
    copy = reference_copy(tiny_params, reference_dtype(learner.algorithm, "bfloat16"))
    saved = dataclasses.replace(learner, reference=copy).checkpoint_state()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), learner.state)
    template = checkpoint_shapes(shapes, learner.algorithm, "bfloat16")
    assert jax.tree.structure(saved) == jax.tree.structure(template)
    for leaf, shape in zip(jax.tree.leaves(saved), jax.tree.leaves(template), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(saved.get("reference"))} == dtypes


# -------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_of_rewards() -> None:
    metrics = group_metrics(np.array([[0, 1], [1, 1], [0, 0]], np.float32))
    assert metrics == pytest.approx(
        {
            "reward/mean": 0.5,
            "reward/std": np.sqrt(1.5 / 5),
            "reward/min": 0,
            "reward/max": 1,
            "reward/group_std": np.sqrt(0.5) / 3,
            "reward/zero_spread_group_fraction": 2 / 3,
            "reward/all_zero_group_fraction": 1 / 3,
            "reward/all_one_group_fraction": 1 / 3,
            "reward/mixed_group_fraction": 1 / 3,
            "reward/missing_fraction": 0,
        }
    )
    partial = group_metrics(np.array([[0.5, 0.5], [0, 0.5], [0, 0], [0, 0]], np.float32))
    assert partial["reward/all_zero_group_fraction"] == partial["reward/mixed_group_fraction"] == 0.5
    assert partial["reward/all_one_group_fraction"] == 0
    assert group_metrics(np.ones((1, 1), np.float32))["reward/std"] == 0


def test_metrics_of_rewards_some_of_which_are_missing() -> None:
    rewards = np.array([[0, 1, 9], [1, 1, 9], [9, 9, 0]], np.float32)
    judged = np.array([[True, True, False], [True, True, False], [False, False, True]])
    assert group_metrics(rewards, judged) == pytest.approx(
        {
            "reward/mean": 0.6,
            "reward/std": np.sqrt(1.2 / 4),
            "reward/min": 0,
            "reward/max": 1,
            "reward/group_std": np.sqrt(0.5) / 2,  # of the groups that have two
            "reward/zero_spread_group_fraction": 2 / 3,
            "reward/all_zero_group_fraction": 1 / 3,
            "reward/all_one_group_fraction": 1 / 3,
            "reward/mixed_group_fraction": 1 / 3,
            "reward/missing_fraction": 4 / 9,
        }
    )
    none = group_metrics(np.zeros((2, 2), np.float32), np.zeros((2, 2), bool))
    assert none == dict.fromkeys(none, 0) | {"reward/zero_spread_group_fraction": 1, "reward/missing_fraction": 1}


def test_metrics_of_advantages(tiny, tiny_params, mesh) -> None:
    """The mean is over tokens that count: here not those of the cut completions, the second and the fifth."""
    advantages = some_advantages()
    metrics = make_learner(tiny_params, tiny, mesh, overlong="mask").step(cut_rollouts(), advantages)
    kept, lengths = ~CUT, make_rollouts().lengths
    flat = advantages.reshape(-1)[kept]
    assert metrics["advantage/mean"].value() == pytest.approx(np.average(flat, weights=lengths[kept]), rel=1e-6)
    assert metrics["advantage/min"].value() == flat.min() and metrics["advantage/max"].value() == flat.max()
    none = make_learner(tiny_params, tiny, mesh, overlong="mask").step(make_rollouts(), advantages)
    assert [none[f"advantage/{name}"].value() for name in ("mean", "min", "max")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"kl_coefficient": 0.0, "old_logprobs": "behaviour", "updates_per_step": 1}, 0),
        ({"old_logprobs": "recompute"}, 2),
    ],
)
def test_flops_of_a_step_are_those_of_each_token_once(tiny, tiny_params, mesh, options, passes) -> None:
    """An update and as many rescoring passes; a prompt counts once for its four completions."""
    learner = make_learner(tiny_params, tiny, mesh, **options)
    metrics = learner.step(make_rollouts(), some_advantages())
    expected = 0
    for prompt, lengths in ((5, (1, 14, 3, 7)), (9, (2, 11, 5, 9))):
        context = prompt * (prompt + 1) // 2 + sum(prompt * n + n * (n + 1) // 2 for n in lengths)
        counts = prompt + sum(lengths), context, sum(lengths)
        expected += update_flops(tiny, *counts) + passes * forward_flops(tiny, *counts)
    assert metrics["learner/model_flops"].value() == expected
    if passes:  # policy and reference, as a KL in the reward has them scored
        assert learner.kl_penalty(make_rollouts())[1]["learner/model_flops"].value() == expected * passes / (3 + passes)


@pytest.mark.parametrize("options", [{}, {"kl_coefficient": 0.0, "old_logprobs": "behaviour", "updates_per_step": 1}])
def test_the_kl_to_the_sampler_is_that_before_the_first_update(tiny, tiny_params, mesh, options) -> None:
    rollouts = make_rollouts()
    learner = make_learner(tiny_params, tiny, mesh, **options)
    gap = rollouts.behaviour_logprobs - learner.score(tiny_params, rollouts)  # 0 after the ends
    expected = (np.exp(-gap) - 1 + gap).clip(max=10).sum() / 52
    assert learner.step(rollouts, some_advantages())["policy/behaviour_kl"].value() == pytest.approx(expected, rel=1e-4)
