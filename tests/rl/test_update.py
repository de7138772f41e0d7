"""An update does not depend on how it is cut up, and does what torch's AdamW and clipping do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_prompts

from rljax.config import AlgorithmConfig, OptimizerConfig
from rljax.mesh import microbatch_sharding
from rljax.models.attention import AttentionLayout
from rljax.models.qwen2 import forward, logits
from rljax.rl.learner import Learner, fresh_state, state_shapes
from rljax.rl.logprobs import batch_logprobs
from rljax.rl.packing import microbatches, padded_length, rows_of_sequences, select_rows, token_weights, train_batch
from rljax.rl.update import Compute, apply_gradients, grpo_update, init_state
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


@pytest.fixture(scope="module")
def batch(tiny, tiny_params) -> TrainBatch:
    """Old log-probs a little off the policy's, so that ratios differ from 1 and some are clipped."""
    made = train_batch(make_rollouts(), np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32))
    exact, _ = batch_logprobs(tiny_params, tiny, made, temperature=1.0, compute_dtype="float32", remat="none")
    noise = np.random.default_rng(2).normal(0, 0.2, exact.shape)
    old = np.where(made.loss_mask, exact + noise, 0).astype(np.float32)
    reference = np.where(made.loss_mask, exact - noise, 0).astype(np.float32)
    made = dataclasses.replace(made, old_logprobs=old, reference_logprobs=reference)
    return select_rows(made, slice(None), "token_mean")


def updated(params, tiny, mesh, batch: TrainBatch, rows_each: int, compute: Compute = Compute()):  # noqa: B008
    state = init_state(params, OPTIMIZER)
    split = jax.device_put(microbatches(batch, rows_each, 1), microbatch_sharding(mesh))
    return grpo_update(state, split, arch=tiny, algorithm=ALGORITHM, optimizer=OPTIMIZER, compute=compute)


def gradient_of(state: TrainState):
    """First moment of the first update: (1 - b1) times the clipped gradient."""
    return jax.tree.map(np.asarray, optax.tree_utils.tree_get(state.opt_state, "mu"))


def assert_same_gradient(a: TrainState, b: TrainState) -> None:
    norm = float(optax.tree.norm(gradient_of(a)))
    difference = optax.tree.norm(jax.tree.map(np.subtract, gradient_of(a), gradient_of(b)))
    assert norm > 1e-3
    assert float(difference) / norm < 1e-6


@pytest.mark.parametrize("rows_each", [1, 2, 3, 4])
def test_microbatch_split_does_not_matter(tiny, tiny_params, mesh, batch, rows_each) -> None:
    whole, whole_metrics = updated(tiny_params, tiny, mesh, batch, 8)
    parts, part_metrics = updated(tiny_params, tiny, mesh, batch, rows_each)
    assert_same_gradient(whole, parts)
    for name, metric in whole_metrics.items():
        assert metric.value() == pytest.approx(part_metrics[name].value(), rel=2e-5, abs=1e-7), name
    assert 0 < whole_metrics["policy/clip_fraction"].value() < 1


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
    made = select_rows(train_batch(make_rollouts(), only), slice(None), "token_mean")
    before, _ = batch_logprobs(tiny_params, tiny, made, temperature=1.0, compute_dtype="float32", remat="none")
    made = dataclasses.replace(made, old_logprobs=before, reference_logprobs=before)
    state, metrics = updated(tiny_params, tiny, mesh, made, 8)
    after, _ = batch_logprobs(state.params, tiny, made, temperature=1.0, compute_dtype="float32", remat="none")
    assert float(after[5].sum()) > float(before[5].sum())
    assert metrics["policy/ratio_max"].value() == pytest.approx(1.0, abs=1e-6)
    assert metrics["policy/reference_kl"].value() == pytest.approx(0.0, abs=1e-6)


def test_the_stop_token_is_trained_even_where_it_is_the_pad_token(tiny, tiny_params) -> None:
    """Masks come from lengths: a completion whose tokens all equal the padding id 0 is still a completion."""
    rows = rows_of_sequences([np.array([4, 5], np.int32)], [np.array([7, 0], np.int32)])
    assert rows["loss_mask"][0, :5].tolist() == [False, False, True, True, False]
    assert rows["completion"][0, :5].tolist() == [0, 0, 1, 1, 0]


def test_uniform_logits_score_minus_log_vocabulary(tiny, tiny_params) -> None:
    flat = jax.tree.map(jnp.zeros_like, tiny_params)
    made = train_batch(make_rollouts(), np.zeros((2, 4)))
    logprobs, entropy = batch_logprobs(flat, tiny, made, temperature=0.5, compute_dtype="float32", remat="none")
    mask = np.asarray(made.loss_mask)
    np.testing.assert_allclose(np.asarray(logprobs)[mask], -np.log(37), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(entropy)[mask], np.log(37), rtol=1e-6)
    assert not np.asarray(logprobs)[~mask].any()


def test_chunks_of_logits_do_not_matter(tiny, tiny_params, batch, monkeypatch) -> None:
    whole, _ = batch_logprobs(tiny_params, tiny, batch, temperature=1.0, compute_dtype="float32", remat="none")
    monkeypatch.setattr("rljax.models.scoring.MAX_LOGITS", 7 * tiny.vocab_size)
    chunked, _ = batch_logprobs(tiny_params, tiny, batch, temperature=1.0, compute_dtype="float32", remat="none")
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


# ---------------------------------------------------------------------------------------------------------- optimizer


def test_twenty_steps_of_clipped_adamw_by_hand() -> None:
    """Against the textbook update in float64: torch's decoupled decay, bias correction, clip with 1e-6."""
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=5)
    state = init_state({"w": jnp.asarray(weights, jnp.float32)}, config)
    m = v = np.zeros(5)
    for step in range(1, 21):
        grad = rng.normal(size=5) * (3.0 if step % 2 else 0.1)
        state, metrics = apply_gradients(state, {"w": jnp.asarray(grad, jnp.float32)}, config)
        norm = np.linalg.norm(grad)
        assert metrics["policy/grad_norm"].value() == pytest.approx(norm, rel=1e-5)
        grad = grad * min(1, 1.0 / (norm + 1e-6))
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        weights = weights * (1 - 1e-2 * 0.1)
        weights = weights - 1e-2 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(state.params["w"], weights, rtol=2e-5)
    assert int(state.updates) == 20 and int(state.skipped) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad: float) -> None:
    config = OptimizerConfig(learning_rate=1e-2)
    state = init_state({"w": jnp.ones(3)}, config)
    state, _ = apply_gradients(state, {"w": jnp.array([0.1, 0.2, 0.3])}, config)
    after = state
    for times in (1, 2, 3):  # a third one in a row is refused as the first is
        after, metrics = apply_gradients(after, {"w": jnp.array([0.1, bad, 0.3])}, config)
        assert int(after.skipped) == times and metrics["policy/skipped_updates"].value() == 1
    for before, now in zip(
        jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves((after.params, after.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(before, now)


def test_learning_rate_by_update() -> None:
    """With a constant gradient Adam moves by the learning rate: the steps are the schedule."""

    def rates(**options: int) -> list[float]:
        config = OptimizerConfig(learning_rate=0.5, weight_decay=0.0, max_grad_norm=0.0, eps=0.0, **options)
        state, moves = init_state({"w": jnp.zeros(1)}, config), []
        for _ in range(6):
            after, _ = apply_gradients(state, {"w": jnp.ones(1)}, config)
            moves.append(float(state.params["w"][0] - after.params["w"][0]))
            state = after
        return moves

    assert rates() == pytest.approx([0.5] * 6, abs=1e-5)
    assert rates(warmup_updates=2) == pytest.approx([0, 0.25, 0.5, 0.5, 0.5, 0.5], abs=1e-5)
    assert rates(decay_updates=5) == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0], abs=1e-5)
    assert rates(warmup_updates=2, decay_updates=6) == pytest.approx([0, 0.25, 0.5, 0.375, 0.25, 0.125], abs=1e-5)


def test_masters_move_where_bfloat16_would_not() -> None:
    state, _ = apply_gradients(init_state({"w": jnp.ones(1)}, OptimizerConfig()), {"w": jnp.ones(1)}, OptimizerConfig())
    assert 0 < 1 - float(state.params["w"][0]) < 2e-6


# ------------------------------------------------------------------------------------------------------------ learner


def test_learner_step_uses_each_row_once_and_leaves_the_reference(tiny, tiny_params, mesh) -> None:
    shapes = state_shapes(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tiny_params),
        OPTIMIZER,
        mesh,
    )
    algorithm = dataclasses.replace(ALGORITHM, updates_per_step=2, group_size=4)
    learner = Learner(
        fresh_state(tiny_params, shapes, OPTIMIZER), tiny_params, tiny, mesh, algorithm, OPTIMIZER, Compute()
    )
    before = jax.tree.map(np.array, tiny_params)
    metrics = learner.step(train_batch(make_rollouts(), np.random.default_rng(1).normal(size=(2, 4))))
    assert int(learner.state.updates) == 2
    assert metrics["policy/entropy"].weight == 52  # completion tokens of both updates
    assert metrics["policy/behaviour_gap_mean"].weight == 52  # all of them: rescored before the first update
    assert metrics["policy/reference_kl"].value() > 0
    for old, now in zip(jax.tree.leaves(before), jax.tree.leaves(tiny_params), strict=True):
        np.testing.assert_array_equal(old, now)


def test_no_program_is_compiled_twice(tiny, tiny_params, mesh, batch) -> None:
    updated(tiny_params, tiny, mesh, batch, 4)
    before = grpo_update._cache_size()
    for seed in range(3):
        other = select_rows(train_batch(make_rollouts(seed), np.ones((2, 4))), slice(None), "token_mean")
        updated(tiny_params, tiny, mesh, other, 4)
    assert grpo_update._cache_size() == before


# ------------------------------------------------------------------------------------------------------------ packing


def test_weights_sum_to_one_and_lengths_are_bucketed() -> None:
    mask = np.array([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(token_weights(mask, "token_mean")[mask], 0.25)
    np.testing.assert_allclose(token_weights(mask, "seq_mean_token_mean")[mask], [1 / 6] * 3 + [0.5])
    assert not token_weights(np.zeros((2, 2), bool), "token_mean").any()
    assert [padded_length(n) for n in (1, 32, 33, 48, 49, 64, 65, 97)] == [32, 32, 48, 48, 64, 64, 96, 128]


@pytest.mark.parametrize(
    ("rows_each", "shards", "shape"), [(8, 1, (1, 8)), (3, 1, (3, 3)), (4, 4, (2, 4)), (6, 2, (2, 4))]
)
def test_microbatches_keep_every_row_once(batch, rows_each, shards, shape) -> None:
    split = microbatches(batch, rows_each, shards)
    assert split.tokens.shape[:2] == shape
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), split)
    np.testing.assert_array_equal(flat.tokens[:8], batch.tokens)
    assert (flat.group[8:] == -1).all() and not flat.weights[8:].any() and not flat.loss_mask[8:].any()
