"""An adapter scores, learns and samples as the matrices it stands for would, and the model beside it stays as it is."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from test_update import (
    ALGORITHM,
    OPTIMIZER,
    gradient_of,
    logprobs_of,
    make_batch,
    make_rollouts,
    packed,
    some_advantages,
)

from rljax.config import LoraConfig, OptimizerConfig
from rljax.mesh import microbatch_sharding
from rljax.models.layers import LINEARS, matrix_dims
from rljax.models.lora import attach, init_adapter, merge
from rljax.rl.learner import Learner, fresh_state, state_shapes
from rljax.rl.optimizer import init_state
from rljax.rl.packing import RowShape, microbatches
from rljax.rl.update import Compute, grpo_update
from rljax.sampling.engine import Sampler

LORA = LoraConfig(rank=3, alpha=4.5)
COMPUTE = Compute(remat="none", lora_scale=LORA.scale)


@pytest.fixture(scope="module")
def fresh(tiny):
    return init_adapter(jax.random.key(3), tiny, LORA)


@pytest.fixture(scope="module")
def learnt(fresh):
    """With B off 0, as after some updates."""
    keys = {name: jax.random.fold_in(jax.random.key(4), index) for index, name in enumerate(LINEARS)}
    return {
        "layers": {
            name: {"a": factors["a"], "b": 0.1 * jax.random.normal(keys[name], factors["b"].shape)}
            for name, factors in fresh["layers"].items()
        }
    }


@pytest.fixture(scope="module")
def batch(tiny, tiny_params):
    return make_batch(tiny_params, tiny, packed(make_rollouts(), 64))


def lora_learner(params, arch, mesh, adapter) -> Learner:
    """One update a step, with the base as the KL's reference."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), adapter)
    state = fresh_state(adapter, state_shapes(shapes, OPTIMIZER, mesh), OPTIMIZER)
    algorithm = dataclasses.replace(ALGORITHM, updates_per_step=1, group_size=4)
    return Learner(state, params, arch, mesh, algorithm, OPTIMIZER, COMPUTE, base=params)


def test_a_fresh_adapter_starts_as_pefts_and_changes_nothing(tiny, tiny_params, fresh, batch) -> None:
    assert LORA.scale == 1.5 and set(fresh["layers"]) == set(LINEARS)
    for name, width in {"q": 32, "o": 32, "gate": 32, "down": 64}.items():
        a, b = fresh["layers"][name]["a"], fresh["layers"][name]["b"]
        assert a.size == 2 * width * 3 and not b.any()
        assert 0.9 * width**-0.5 < np.abs(a).max() <= width**-0.5
    alone = init_adapter(jax.random.key(3), tiny, dataclasses.replace(LORA, targets=("down",)))
    assert list(alone["layers"]) == ["down"]
    np.testing.assert_array_equal(alone["layers"]["down"]["a"], fresh["layers"]["down"]["a"])
    for base, adapted in zip(
        logprobs_of(tiny_params, tiny, batch),
        logprobs_of(attach(tiny_params, fresh, LORA.scale), tiny, batch),
        strict=True,
    ):
        np.testing.assert_array_equal(base, adapted)


def test_scores_are_those_of_the_merged_matrices(tiny, tiny_params, learnt, batch) -> None:
    params = attach(tiny_params, learnt, LORA.scale)
    merged = merge(params)
    a, b = (np.asarray(learnt["layers"]["o"][side], np.float64)[1] for side in "ab")
    product = 1.5 * a.reshape(32, 3) @ b
    np.testing.assert_allclose(
        merged["layers"]["o"][1].reshape(32, 32), tiny_params["layers"]["o"][1].reshape(32, 32) + product, atol=1e-6
    )
    assert jax.tree.structure(merged) == jax.tree.structure(tiny_params)
    assert merge(tiny_params)["layers"]["o"] is tiny_params["layers"]["o"]
    adapted, whole = (np.asarray(logprobs_of(p, tiny, batch)[0]) for p in (params, merged))
    np.testing.assert_allclose(adapted, whole, atol=1e-5)
    assert np.abs(adapted - logprobs_of(tiny_params, tiny, batch)[0]).max() > 0.1


def test_the_gradient_is_that_of_the_merged_matrices_by_the_chain_rule(tiny, tiny_params, mesh, learnt, batch) -> None:
    """W = W0 + s A B: the gradients are s G B^T and s A^T G, G that of W."""
    optimizer = OptimizerConfig(max_grad_norm=0.0)
    split, in_use = microbatches(batch, RowShape(3, 1, batch.tokens.shape[1]))
    split = jax.device_put(split, microbatch_sharding(mesh))

    def gradient(trained, base, compute: Compute):
        state, _ = grpo_update(
            init_state(trained, optimizer),
            split,
            np.int32(in_use),
            base,
            arch=tiny,
            algorithm=ALGORITHM,
            optimizer=optimizer,
            compute=compute,
        )
        return gradient_of(state)["layers"]

    whole = gradient(merge(attach(tiny_params, learnt, LORA.scale)), None, Compute(remat="none"))
    factored = gradient(learnt, tiny_params, COMPUTE)
    for name, factors in learnt["layers"].items():
        a = np.asarray(factors["a"], np.float64).reshape(2, -1, 3)
        b = np.asarray(factors["b"], np.float64).reshape(2, 3, -1)
        g = whole[name].reshape(2, a.shape[1], b.shape[2])
        for side, expected in (("a", 1.5 * g @ b.transpose(0, 2, 1)), ("b", 1.5 * a.transpose(0, 2, 1) @ g)):
            difference = factored[name][side].reshape(expected.shape) - expected
            assert np.linalg.norm(expected) > 1e-4
            assert np.linalg.norm(difference) < 1e-5 * np.linalg.norm(expected), (name, side)


def test_a_step_changes_the_adapter_alone_and_the_sampler_follows(tiny, tiny_params, mesh, fresh) -> None:
    learner = lora_learner(tiny_params, tiny, mesh, fresh)
    before = jax.tree.map(np.array, tiny_params)
    sizes = {leaf.shape for leaf in jax.tree.leaves(fresh)}
    assert {leaf.shape for leaf in jax.tree.leaves(learner.state.opt_state)} == sizes | {()}  # no moment of a matrix
    first = learner.step(make_rollouts(), some_advantages())
    assert first["policy/reference_kl"].value() == pytest.approx(0, abs=1e-9)  # the reference is the adapter off
    assert learner.step(make_rollouts(), some_advantages())["policy/reference_kl"].value() > 1e-5
    for name, factors in learner.state.params["layers"].items():
        for side in "ab":
            assert float(optax.tree.norm(factors[side] - fresh["layers"][name][side])) > 1e-3, (name, side)
    for old, now in zip(jax.tree.leaves(before), jax.tree.leaves(learner.base), strict=True):
        assert old.tobytes() == np.asarray(now).tobytes()

    rollouts = make_rollouts()
    completions = [tokens[:length] for tokens, length in zip(rollouts.tokens, rollouts.lengths, strict=True)]
    sampled = Sampler(learner.params, tiny, mesh, stop_ids=(1,)).score(rollouts.prompts, completions)
    scored = learner.score(learner.params, rollouts)
    np.testing.assert_allclose(sampled, scored, atol=1e-5)
    assert np.abs(learner.score(tiny_params, rollouts) - scored).max() > 0.05


def test_every_matrix_of_a_block_is_named(tiny_params) -> None:
    """Or a new one would have no adapter: what a layer holds beside `LINEARS` are norms and biases."""
    rest = set(tiny_params["layers"]) - set(LINEARS)
    assert rest and all(name.endswith(("norm", "bias")) for name in rest)
    assert tuple(LINEARS) == LoraConfig().targets
    for name in LINEARS:
        into, out = matrix_dims(name)
        assert len(into + out) + 1 == tiny_params["layers"][name].ndim
