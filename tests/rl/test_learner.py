"""What of a step's rollouts counts, and the KL that is taken off rewards."""

import dataclasses

import numpy as np
import pytest
from test_update import make_learner, make_rollouts, some_advantages

from rljax.rl.losses import KL_ESTIMATORS
from rljax.types import LENGTH, STOP

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
    """`make_rollouts` has all of its completions cut."""
    metrics = make_learner(tiny_params, tiny, mesh, overlong="mask").step(make_rollouts(), some_advantages())
    assert metrics["policy/loss"].value() == 0 and metrics["policy/grad_norm"].value() == 0
    assert metrics["policy/skipped_updates"].value() == 0


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
