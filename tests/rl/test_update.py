"""An update does not depend on how it is packed and cut up, and a step uses each completion once."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_prompts

from rljax.config import AlgorithmConfig, OptimizerConfig
from rljax.mesh import microbatch_sharding, replicated
from rljax.models.attention import AttentionLayout
from rljax.models.qwen2 import forward, logits
from rljax.rl.aggregation import UpdateLengths, token_weights
from rljax.rl.learner import Learner, fresh_state, state_shapes, zero_advantages_are_idle
from rljax.rl.logprobs import batch_logprobs
from rljax.rl.optimizer import init_state
from rljax.rl.packing import Packing, RowShape, microbatches, pack, train_batch
from rljax.rl.update import Compute, grpo_update, score
from rljax.types import LENGTH, Rollouts, TrainBatch, TrainState

ALGORITHM = AlgorithmConfig(kl_coefficient=0.05)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


def make_rollouts(seed: int = 0) -> Rollouts:
    """Two prompts, four completions each, lengths 1 to 14; behaviour log-probs made up."""
    rng = np.random.default_rng(seed)
    prompts = make_prompts([5, 9], seed=seed)
    lengths = np.array([1, 14, 3, 7, 2, 11, 5, 9], np.int32)
    inside = np.arange(14) < lengths[:, None]
    tokens = np.where(inside, rng.integers(2, 37, (8, 14)), 0).astype(np.int32)
    logprobs = np.where(inside, -rng.random((8, 14)) * 4, 0).astype(np.float32)
    return Rollouts(prompts, 4, tokens, lengths, logprobs, np.full(8, LENGTH, np.int8))


def one_per_row(rollouts: Rollouts, row_length: int = 32) -> Packing:
    """A prompt and a completion in each row: what packing is held against."""
    number, zeros = len(rollouts.lengths), np.zeros(len(rollouts.lengths), int)
    prompt = np.arange(number) // rollouts.group_size
    return Packing(
        row_length, number, rollouts.prompts.lengths, rollouts.lengths, copy_prompt=prompt, copy_row=np.arange(number),
        copy_start=zeros, copy_group=zeros, completion_copy=np.arange(number),
        completion_start=rollouts.prompts.lengths[prompt], completion_number=zeros + 1,
    )  # fmt: skip


def packed(rollouts: Rollouts, row_length: int) -> Packing:
    return pack(rollouts.prompts.lengths, rollouts.lengths.reshape(-1, rollouts.group_size), row_length)


def weights_of(rollouts: Rollouts, aggregation: str = "token_mean") -> np.ndarray:
    lengths = rollouts.lengths.reshape(-1, rollouts.group_size)
    return token_weights(UpdateLengths(lengths, rollouts.prompts.lengths, 14, 1), aggregation)


def logprobs_of(params, arch, batch: TrainBatch):
    return batch_logprobs(params, arch, batch, temperature=1.0, compute_dtype="float32")


def make_batch(params, arch, packing: Packing) -> TrainBatch:
    """Old log-probs a little off the policy's, so that ratios differ from 1 and some are clipped."""
    rollouts = make_rollouts()
    advantages = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    dense = one_per_row(rollouts)
    exact, _ = logprobs_of(params, arch, train_batch(rollouts, advantages, weights_of(rollouts), dense))
    exact = dense.by_completion(np.asarray(exact), 14)
    noise = np.random.default_rng(2).normal(0, 0.2, exact.shape)
    batch = train_batch(rollouts, advantages, weights_of(rollouts), packing)

    def by_token(values: np.ndarray) -> np.ndarray:
        rows = np.zeros(batch.tokens.shape, np.float32)
        rows.reshape(-1)[packing.completion_slots()] = values[np.arange(14) < rollouts.lengths[:, None]]
        return rows

    return dataclasses.replace(batch, old_logprobs=by_token(exact + noise), reference_logprobs=by_token(exact - noise))


@pytest.fixture(scope="module")
def batch(tiny, tiny_params) -> TrainBatch:
    """Eight rows, one completion in each."""
    return make_batch(tiny_params, tiny, one_per_row(make_rollouts()))


def updated(params, tiny, mesh, batch: TrainBatch, rows_each: int, compute: Compute = Compute()):  # noqa: B008
    state = init_state(params, OPTIMIZER)
    split, in_use = microbatches(batch, RowShape(9, rows_each, batch.tokens.shape[1]))
    split = jax.device_put(split, microbatch_sharding(mesh))
    return grpo_update(
        state, split, np.int32(in_use), arch=tiny, algorithm=ALGORITHM, optimizer=OPTIMIZER, compute=compute
    )


def gradient_of(state: TrainState):
    """First moment of the first update: (1 - b1) times the clipped gradient."""
    return jax.tree.map(np.asarray, optax.tree_utils.tree_get(state.opt_state, "mu"))


def assert_same_gradient(a: TrainState, b: TrainState, tolerance: float = 1e-6) -> None:
    norm = float(optax.tree.norm(gradient_of(a)))
    difference = optax.tree.norm(jax.tree.map(np.subtract, gradient_of(a), gradient_of(b)))
    assert norm > 1e-3
    assert float(difference) / norm < tolerance


@pytest.mark.parametrize("rows_each", [1, 3, 4])
def test_microbatch_split_does_not_matter(tiny, tiny_params, mesh, batch, rows_each) -> None:
    whole, whole_metrics = updated(tiny_params, tiny, mesh, batch, 8)
    parts, part_metrics = updated(tiny_params, tiny, mesh, batch, rows_each)
    assert_same_gradient(whole, parts)
    for name, metric in whole_metrics.items():
        assert metric.value() == pytest.approx(part_metrics[name].value(), rel=2e-5, abs=1e-7), name
    assert 0 < whole_metrics["policy/clip_fraction"].value() < 1


@pytest.mark.parametrize(
    ("row_length", "num_rows", "copies", "rows_each"),
    # Groups side by side, and a row of padding; one split, its part beside the other; both split.
    [(128, 1, 2, 2), (64, 2, 3, 1), (23, 4, 4, 1), (23, 4, 4, 2)],
)
def test_packed_rows_give_the_gradient_of_one_completion_per_row(
    tiny, tiny_params, mesh, batch, row_length, num_rows, copies, rows_each
) -> None:
    dense, dense_metrics = updated(tiny_params, tiny, mesh, batch, 8)
    packing = packed(make_rollouts(), row_length)
    assert (packing.num_rows, len(packing.copy_prompt)) == (num_rows, copies)
    rows = make_batch(tiny_params, tiny, packing)
    shared, metrics = updated(tiny_params, tiny, mesh, rows, rows_each)
    assert_same_gradient(dense, shared, 1e-5)
    for name, metric in dense_metrics.items():
        assert metric.value() == pytest.approx(metrics[name].value(), rel=5e-5, abs=1e-6), name
    backwards = jax.tree.map(lambda x: x[::-1], rows)
    assert_same_gradient(dense, updated(tiny_params, tiny, mesh, backwards, rows_each)[0], 1e-5)


def test_row_order_padding_and_remat_do_not_matter(tiny, tiny_params, mesh, batch) -> None:
    whole, _ = updated(tiny_params, tiny, mesh, batch, 4)
    order = np.array([5, 0, 7, 2, 1, 6, 3, 4])
    assert_same_gradient(whole, updated(tiny_params, tiny, mesh, jax.tree.map(lambda x: x[order], batch), 4)[0])
    wider = dataclasses.replace(
        batch,
        **{
            f.name: np.pad(getattr(batch, f.name), ((0, 0), (0, 16)), constant_values=-1 if f.name == "group" else 0)
            for f in dataclasses.fields(batch)
        },
    )
    assert_same_gradient(whole, updated(tiny_params, tiny, mesh, wider, 4)[0])
    for remat in ("none", "dots"):
        assert_same_gradient(whole, updated(tiny_params, tiny, mesh, batch, 4, Compute(remat=remat))[0])


def test_padding_may_hold_any_token(tiny, tiny_params, mesh, batch) -> None:
    whole, _ = updated(tiny_params, tiny, mesh, batch, 4)
    padding = np.asarray(batch.group) < 0
    other = dataclasses.replace(batch, tokens=np.where(padding, 1, batch.tokens).astype(np.int32))
    assert_same_gradient(whole, updated(tiny_params, tiny, mesh, other, 4)[0])


def test_a_rewarded_completion_becomes_likelier(tiny, tiny_params, mesh, batch) -> None:
    only = np.zeros((2, 4), np.float32)
    only[1, 1] = 1.0
    rollouts = make_rollouts()
    packing = packed(rollouts, 64)
    made = train_batch(rollouts, only, weights_of(rollouts), packing)
    before, _ = logprobs_of(tiny_params, tiny, made)
    made = dataclasses.replace(made, old_logprobs=before, reference_logprobs=before)
    state, metrics = updated(tiny_params, tiny, mesh, made, 1)
    after, _ = logprobs_of(state.params, tiny, made)
    change = packing.by_completion(np.asarray(after) - np.asarray(before), 14).sum(axis=1)
    assert change.argmax() == 5 and change[5] > 0
    assert metrics["policy/ratio_max"].value() == pytest.approx(1.0, abs=1e-6)
    assert metrics["policy/reference_kl"].value() == pytest.approx(0.0, abs=1e-6)


def test_the_stop_token_is_trained_even_where_it_is_the_pad_token() -> None:
    """Masks come from lengths: a completion whose tokens all equal the padding id 0 is still a completion."""
    rollouts = dataclasses.replace(make_rollouts(), tokens=np.zeros((8, 14), np.int32))
    batch = train_batch(rollouts, np.ones((2, 4)), weights_of(rollouts), packed(rollouts, 64))
    assert np.asarray(batch.loss_mask).sum() == rollouts.lengths.sum()


def test_uniform_logits_score_minus_log_vocabulary(tiny, tiny_params) -> None:
    flat = jax.tree.map(jnp.zeros_like, tiny_params)
    rollouts = make_rollouts()
    made = train_batch(rollouts, np.zeros((2, 4)), weights_of(rollouts), packed(rollouts, 64))
    logprobs, entropy = batch_logprobs(flat, tiny, made, temperature=0.5, compute_dtype="float32")
    mask = np.asarray(made.loss_mask)
    np.testing.assert_allclose(np.asarray(logprobs)[mask], -np.log(37), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(entropy)[mask], np.log(37), rtol=1e-6)
    assert not np.asarray(logprobs)[~mask].any()


def test_chunks_of_logits_do_not_matter(tiny, tiny_params, batch, monkeypatch) -> None:
    whole, _ = logprobs_of(tiny_params, tiny, batch)
    monkeypatch.setattr("rljax.models.scoring.MAX_LOGITS", 7 * tiny.vocab_size)
    chunked, _ = logprobs_of(tiny_params, tiny, batch)
    np.testing.assert_allclose(whole, chunked, atol=1e-6)


def test_packed_and_shared_prompt_rows_equal_one_sequence_per_row(tiny, tiny_params) -> None:
    """[prompt | a | b] in one row, and two sequences in one row, give the hidden states of separate rows."""
    rng = np.random.default_rng(0)
    prompt, a, b = (rng.integers(2, 37, n) for n in (5, 4, 6))

    def hidden(tokens, positions, group, completion):
        arrays = [jnp.asarray(x, jnp.int32)[None] for x in (tokens, positions, group, completion)]
        out = forward(tiny_params, tiny, arrays[0], arrays[1], AttentionLayout(arrays[2], arrays[3]))
        return np.asarray(logits(tiny_params, tiny, out))[0]

    alone = [hidden([*prompt, *c], np.arange(5 + len(c)), np.zeros(5 + len(c)), [0] * 5 + [1] * len(c)) for c in (a, b)]
    shared = hidden(
        [*prompt, *a, *b, 9, 9], [*range(5), *range(5, 9), *range(5, 11), 0, 0],
        [0] * 15 + [-1] * 2, [0] * 5 + [1] * 4 + [2] * 6 + [0] * 2,
    )  # fmt: skip
    np.testing.assert_allclose(shared[:9], alone[0], atol=1e-5)
    np.testing.assert_allclose(shared[9:15], alone[1][5:], atol=1e-5)
    packed = hidden([*prompt, *a, *prompt, *b], [*range(9), *range(11)], [0] * 9 + [1] * 11, [0] * 20)
    np.testing.assert_allclose(packed[:9], alone[0], atol=1e-5)
    np.testing.assert_allclose(packed[9:], alone[1], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ learner


def make_learner(params, arch, mesh, **options) -> Learner:
    """With a reference where there is a KL; options of the algorithm."""
    shapes = state_shapes(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params), OPTIMIZER, mesh
    )
    algorithm = dataclasses.replace(ALGORITHM, **({"updates_per_step": 2, "group_size": 4} | options))
    reference = params if algorithm.kl_coefficient > 0 else None
    return Learner(fresh_state(params, shapes, OPTIMIZER), reference, arch, mesh, algorithm, OPTIMIZER, Compute())


def some_advantages(prompts: int = 2) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(prompts, 4)).astype(np.float32)


def test_learner_step_uses_each_completion_once_and_leaves_the_reference(tiny, tiny_params, mesh) -> None:
    learner = make_learner(tiny_params, tiny, mesh)
    before = jax.tree.map(np.array, tiny_params)
    metrics = learner.step(make_rollouts(), some_advantages())
    assert int(learner.state.updates) == 2
    assert metrics["policy/entropy"].weight == 52  # completion tokens of both updates
    assert metrics["policy/behaviour_gap_mean"].weight == 52  # all of them: rescored before the first update
    assert metrics["policy/reference_kl"].value() > 0
    assert metrics["learner/dropped_group_fraction"].value() == 0
    padding = metrics["learner/padding_fraction"]
    assert padding.weight - padding.total == 52 + 5 + 9  # each prompt once
    for old, now in zip(jax.tree.leaves(before), jax.tree.leaves(tiny_params), strict=True):
        np.testing.assert_array_equal(old, now)


def test_a_step_is_what_it_was_with_one_completion_per_row(tiny, tiny_params, mesh) -> None:
    """Numbers of commit c62282f, which padded every prompt and completion to a row of its own."""
    learner = make_learner(tiny_params, tiny, mesh)
    metrics = learner.step(make_rollouts(), some_advantages())
    expected = {
        "policy/loss": -0.237390368,
        "policy/grad_norm": 2.385627747,
        "policy/reference_kl": 0.024059204,
        "policy/clip_fraction": 0.153846154,
        "policy/old_kl": 0.011720341,
        "policy/ratio_max": 1.547476053,
        "policy/entropy": 3.442236093,
        "policy/behaviour_gap_mean": 1.714837441,
        "policy/behaviour_gap_max": 4.174209118,
    }
    assert {name: metrics[name].value() for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6)
    moved = jax.tree.map(jnp.subtract, learner.state.params, tiny_params)
    assert float(optax.tree.norm(moved)) == pytest.approx(2.15372992, rel=1e-5)
    corner = [0.10423602, -0.03030065, 0.13713311, -0.07592639]
    np.testing.assert_allclose(learner.state.params["embed"][3, :4], corner, atol=2e-6)


def test_scores_come_back_in_the_order_of_the_rollouts(tiny, tiny_params, mesh) -> None:
    rollouts = make_rollouts()
    dense = one_per_row(rollouts)
    exact, _ = logprobs_of(tiny_params, tiny, train_batch(rollouts, some_advantages(), weights_of(rollouts), dense))
    scored = make_learner(tiny_params, tiny, mesh).score(tiny_params, rollouts)
    assert scored.shape == (8, 14)
    np.testing.assert_allclose(scored, dense.by_completion(np.asarray(exact), 14), atol=1e-5)
    # The metric that compares with the sampler is taken of the same numbers.
    gap = np.abs(scored - rollouts.behaviour_logprobs)
    metrics = make_learner(tiny_params, tiny, mesh).step(rollouts, some_advantages())
    assert metrics["policy/behaviour_gap_max"].value() == pytest.approx(gap.max(), abs=1e-5)
    assert metrics["policy/behaviour_gap_mean"].value() == pytest.approx(gap.sum() / 52, abs=1e-5)


def random_rollouts(seed: int) -> Rollouts:
    """Six prompts of up to 16 tokens, four completions each, short at one seed and long at the next, cap 40."""
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.geometric(1 / (3 + seed % 7 * 6), 24), 40).astype(np.int32)
    inside = np.arange(40) < lengths[:, None]
    prompts = make_prompts(rng.integers(1, 17, 6).tolist(), seed=seed, slots=16)
    tokens = np.where(inside, rng.integers(2, 37, (24, 40)), 0).astype(np.int32)
    logprobs = np.where(inside, -rng.random((24, 40)) * 4, 0).astype(np.float32)
    return Rollouts(prompts, 4, tokens, lengths, logprobs, np.full(24, LENGTH, np.int8))


def test_twenty_steps_of_any_lengths_are_one_program(tiny, tiny_params, mesh) -> None:
    learner = make_learner(tiny_params, tiny, mesh, microbatch_tokens=96)
    learner.step(random_rollouts(0), some_advantages(6))
    programs, slots = (grpo_update._cache_size(), score._cache_size()), set()
    for seed in range(1, 21):
        slots.add(learner.step(random_rollouts(seed), some_advantages(6))["learner/padding_fraction"].weight)
    assert (grpo_update._cache_size(), score._cache_size()) == programs
    assert len(slots) > 5  # numbers of micro-batches in use


def test_what_was_prepared_is_not_compiled_again(tiny, tiny_params, mesh, caplog) -> None:
    """The programs of a step begin to compile before its rollouts exist."""
    placed = jax.device_put(tiny_params, replicated(mesh))
    learner = make_learner(placed, tiny, mesh, microbatch_tokens=104)
    jax.clear_caches()

    def compiled() -> set[str]:
        found = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
        caplog.clear()
        return {"grpo_update", "score"} & set(found)

    caplog.set_level("DEBUG", logger="jax._src.dispatch")
    learner.prepare(6, 16, 40)
    learner._wait_for_programs()
    assert compiled() == {"grpo_update", "score"}
    for seed in (3, 4):
        learner.step(random_rollouts(seed), some_advantages(6))
    assert not compiled()


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_groups_without_advantage_are_dropped_but_counted(tiny, tiny_params, mesh, monkeypatch, aggregation) -> None:
    advantages = some_advantages()
    advantages[0] = 0
    options = {"updates_per_step": 1, "kl_coefficient": 0.0, "aggregation": aggregation, "old_logprobs": "behaviour"}

    def step() -> tuple[TrainState, dict]:
        learner = make_learner(tiny_params, tiny, mesh, **options)
        metrics = learner.step(make_rollouts(), advantages)
        return learner.state, metrics

    state, metrics = step()
    assert metrics["learner/dropped_group_fraction"].value() == 0.5
    assert metrics["policy/entropy"].weight == 27
    monkeypatch.setattr("rljax.rl.learner.zero_advantages_are_idle", lambda algorithm: False)
    whole, whole_metrics = step()
    assert whole_metrics["learner/dropped_group_fraction"].value() == 0
    assert_same_gradient(whole, state)
    assert metrics["policy/loss"].value() == pytest.approx(whole_metrics["policy/loss"].value(), rel=1e-5)
    assert metrics["policy/grad_norm"].value() == pytest.approx(whole_metrics["policy/grad_norm"].value(), rel=1e-5)


def test_an_update_without_any_advantage_is_one_of_gradient_zero(tiny, tiny_params, mesh) -> None:
    """Its groups are left out, yet it has tokens, so it is not skipped: as if they had been kept."""
    learner = make_learner(tiny_params, tiny, mesh, kl_coefficient=0.0)
    metrics = learner.step(make_rollouts(), np.zeros((2, 4), np.float32))
    assert metrics["learner/dropped_group_fraction"].value() == 1
    assert int(learner.state.updates) == 2 and int(learner.state.skipped) == 0
    assert metrics["policy/grad_norm"].value() == 0
    assert all(np.isfinite(metric.value()) for metric in metrics.values())


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"kl_coefficient": 0.1}, False),
        ({"kl_coefficient": 0.1, "kl_in": "reward"}, True),
        ({"entropy_coefficient": 0.1}, False),
        ({"loss": "dppo_mask", "dppo_penalty": 0.1}, False),
        ({"loss": "dppo_mask", "dppo_penalty": 0.0}, True),
    ],
)
def test_where_zero_advantages_are_idle(options, idle) -> None:
    assert zero_advantages_are_idle(AlgorithmConfig(**({"kl_coefficient": 0.0} | options))) == idle


def test_nothing_is_dropped_where_something_else_pulls(tiny, tiny_params, mesh) -> None:
    learner = make_learner(tiny_params, tiny, mesh, kl_coefficient=0.0, entropy_coefficient=0.1)
    metrics = learner.step(make_rollouts(), np.zeros((2, 4), np.float32))
    assert metrics["learner/dropped_group_fraction"].value() == 0
    assert metrics["policy/grad_norm"].value() > 0


def test_a_completion_of_length_zero_has_no_part(tiny, tiny_params, mesh) -> None:
    rollouts = make_rollouts()
    without = dataclasses.replace(rollouts, lengths=np.where(np.arange(8) == 1, 0, rollouts.lengths).astype(np.int32))
    metrics = make_learner(tiny_params, tiny, mesh).step(without, some_advantages())
    assert metrics["policy/entropy"].weight == 52 - 14
    # With an advantage of 1 everywhere and a ratio of 1 the loss is minus the sum of the weights.
    on_policy = make_learner(tiny_params, tiny, mesh, old_logprobs="current", kl_coefficient=0.0)
    loss = on_policy.step(without, np.ones((2, 4), np.float32))["policy/loss"]
    assert loss.value() == pytest.approx(-1) and loss.weight == 2  # the mean of two updates
