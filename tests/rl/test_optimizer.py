"""The optimizer does what torch's AdamW and Muon's paper do, at the rate it says, and keeps what it says it keeps."""

import dataclasses
from functools import partial
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from rljax.checkpoint import CheckpointStore
from rljax.config import ARCHITECTURES, OptimizerConfig
from rljax.mesh import LEARNER_RULES, param_shardings, replicated
from rljax.models import qwen2
from rljax.rl.learner import fresh_state, state_shapes
from rljax.rl.optimizer import (
    MUON_MATRICES,
    MUON_RMS,
    OPTIMIZERS,
    SCHEDULES,
    apply_gradients,
    init_state,
    learning_rate_schedule,
    round_randomly,
)
from rljax.types import TrainState

PLAIN = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, max_grad_norm=0.0)
"""No decay and no clip: the change of a parameter is the rule's alone."""

KINDS = [
    OptimizerConfig(learning_rate=1e-2, warmup_updates=10, name=name, moments_dtype=dtype)
    for name in ("adamw", "muon")
    for dtype in ("float32", "bfloat16")
]
"""With decay, clip and warm-up. The same four everywhere: each is compiled once."""

every_kind = pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.name}-{c.moments_dtype}")

step = partial(jax.jit, static_argnames="config")(partial(apply_gradients, num_tokens=jnp.int32(1)))
rounded_at = partial(jax.jit, static_argnames="stream")(round_randomly)


def small_params(seed: int = 0) -> dict[str, Any]:
    """Three layers with a parameter of every kind, in the learner layout: D 8, N 2, H 3, F 12, V 20."""
    shapes = {
        "embed": (20, 8),
        "layers": {
            "q": (3, 8, 2, 3), "o": (3, 2, 3, 8), "q_bias": (3, 2, 3), "attn_norm": (3, 8), "up": (3, 8, 12),
            "down": (3, 12, 8),
        },
        "head": (8, 20),
        "final_norm": (8,),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape).astype(np.float32)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradient(params: Any, update: int) -> Any:
    rng = np.random.default_rng([1, update])
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)


def run(params: Any, config: OptimizerConfig, updates: int) -> TrainState:
    state = init_state(params, config)
    for update in range(updates):
        state, _ = step(state, gradient(params, update), config)
    return state


def moments(state: TrainState) -> list[jax.Array]:
    return [leaf for name in ("mu", "nu") for _, tree in optax.tree.get_all_with_path(state.opt_state, name)
            for leaf in jax.tree.leaves(tree)]  # fmt: skip


def assert_bits_equal(a: Any, b: Any) -> None:
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_the_names_of_the_config_are_those_of_the_tables() -> None:
    hints = get_type_hints(OptimizerConfig)
    assert set(get_args(hints["name"])) == set(OPTIMIZERS)
    assert set(get_args(hints["schedule"])) == set(SCHEDULES)


# -------------------------------------------------------------------------------------------------------------- adamw


def test_twenty_steps_of_clipped_adamw_by_hand() -> None:
    """Against torch's documented algorithms in float64: AdamW's decoupled decay first, then the bias-corrected step;
    clip_grad_norm_ over all parameters together, with its 1e-6."""
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1.0)
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=5), rng.normal(size=(2, 3))]
    state = init_state([jnp.asarray(w, jnp.float32) for w in weights], config)
    m, v = [0.0, 0.0], [0.0, 0.0]
    for t in range(1, 21):
        grads = [rng.normal(size=w.shape) * (3.0 if t % 2 else 0.1) for w in weights]
        state, metrics = step(state, [jnp.asarray(g, jnp.float32) for g in grads], config)
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        assert metrics["policy/grad_norm"].value() == pytest.approx(norm, rel=1e-5)
        for i in range(2):
            grad = grads[i] * min(1, 1.0 / (norm + 1e-6))
            m[i], v[i] = 0.9 * m[i] + 0.1 * grad, 0.999 * v[i] + 0.001 * grad**2
            weights[i] = weights[i] * (1 - 1e-2 * 0.1)
            weights[i] = weights[i] - 1e-2 / (1 - 0.9**t) * m[i] / (np.sqrt(v[i]) / np.sqrt(1 - 0.999**t) + 1e-8)
    for ours, theirs in zip(state.params, weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)
    assert int(state.updates) == 20 and int(state.skipped) == 0


def test_masters_move_where_bfloat16_would_not() -> None:
    state, _ = step(init_state({"w": jnp.ones(1)}, OptimizerConfig()), {"w": jnp.ones(1)}, OptimizerConfig())
    assert 0 < 1 - float(state.params["w"][0]) < 2e-6


# ------------------------------------------------------------------------------------------------------ learning rate


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, [0.5] * 8),
        ({"warmup_updates": 1}, [0.5] * 8),
        ({"warmup_updates": 4}, [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"schedule": "linear", "decay_updates": 5}, [0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0]),
        (
            {"schedule": "linear", "warmup_updates": 2, "decay_updates": 6, "final_learning_rate_fraction": 0.2},
            [0.25, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1],
        ),
        (
            {"schedule": "cosine", "warmup_updates": 2, "decay_updates": 6},
            [0.25, 0.5, 0.5, 0.25 + 0.25 * 0.5**0.5, 0.25, 0.25 - 0.25 * 0.5**0.5, 0, 0],
        ),
        (
            {"schedule": "cosine", "decay_updates": 4, "final_learning_rate_fraction": 0.1},
            [0.5, 0.275 + 0.225 * 0.5**0.5, 0.275, 0.275 - 0.225 * 0.5**0.5, 0.05, 0.05, 0.05, 0.05],
        ),
    ],
    ids=["constant", "warm-up 1", "warm-up 4", "linear", "linear with both", "cosine with warm-up", "cosine"],
)
def test_learning_rate_by_update(options: dict[str, Any], rates: list[float]) -> None:
    """With a constant gradient Adam moves by the learning rate: the steps are the schedule, and the metric says so."""
    config = dataclasses.replace(PLAIN, learning_rate=0.5, eps=0.0, **options)
    assert [float(learning_rate_schedule(config)(n)) for n in range(8)] == pytest.approx(rates, abs=1e-6)
    state, moves, metric = init_state({"w": jnp.zeros(1)}, config), [], []
    for _ in range(8):
        after, metrics = step(state, {"w": jnp.ones(1)}, config)
        moves.append(float(state.params["w"][0] - after.params["w"][0]))
        metric.append(metrics["policy/learning_rate"].value())
        state = after
    assert moves == pytest.approx(rates, abs=1e-5)
    assert metric == pytest.approx(rates, abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- muon

MUON = dataclasses.replace(PLAIN, name="muon")


def as_matrices(name: str, leaf: jax.Array) -> np.ndarray:
    """[L, in, out]."""
    layers, inputs = leaf.shape[0], {"o": leaf.shape[1] * leaf.shape[2]}.get(name, leaf.shape[1])
    return np.asarray(leaf, np.float64).reshape(layers, inputs, -1)


def only_layer(params: Any, layer: int) -> Any:
    return {**params, "layers": jax.tree.map(lambda leaf: leaf[layer : layer + 1], params["layers"])}


def test_muon_moves_each_layers_matrix_along_an_orthogonal_one() -> None:
    """Newton-Schulz takes every singular value near 1, and leaves the singular vectors those of the gradient."""
    params, grads = small_params(0), small_params(1)
    state, _ = step(init_state(params, MUON), grads, MUON)
    for name in ("q", "o", "up", "down"):
        moved = as_matrices(name, params["layers"][name] - state.params["layers"][name])
        for move, grad in zip(moved, as_matrices(name, grads["layers"][name]), strict=True):
            direction = move / (MUON.learning_rate * MUON_RMS * np.sqrt(max(grad.shape)))
            values = np.linalg.svd(direction, compute_uv=False)
            assert values.min() > 0.6 and values.max() < 1.3, (name, values)
            small = direction.T @ grad if grad.shape[0] >= grad.shape[1] else direction @ grad.T
            assert np.abs(small - small.T).max() < 2e-3 * np.abs(small).max()
            assert np.linalg.eigvalsh(small).min() > 0
            rms = np.sqrt((move**2).mean()) / MUON.learning_rate
            assert 0.15 < rms < 0.25


def test_muon_treats_each_layer_as_if_it_were_alone() -> None:
    params = small_params()
    together = run(params, MUON, 3)
    for layer in range(3):
        alone = init_state(only_layer(params, layer), MUON)
        for update in range(3):
            alone, _ = step(alone, only_layer(gradient(params, update), layer), MUON)
        for name in ("q", "o", "up", "down"):
            expected = together.params["layers"][name][layer]
            np.testing.assert_allclose(alone.params["layers"][name][0], expected, rtol=1e-5, atol=1e-6)


def test_muon_sees_heads_as_one_matrix() -> None:
    """q is D by N H, o is N H by D: the same update as of an MLP matrix with those numbers."""
    params, grads = ({name: small_params(seed)["layers"][name] for name in ("q", "o")} for seed in (0, 1))
    flat, flat_grads = (
        {to: jnp.asarray(as_matrices(name, tree[name]), jnp.float32) for name, to in (("q", "up"), ("o", "down"))}
        for tree in (params, grads)
    )
    heads, _ = step(init_state({"layers": params}, MUON), {"layers": grads}, MUON)
    plain, _ = step(init_state({"layers": flat}, MUON), {"layers": flat_grads}, MUON)
    for name, to in (("q", "up"), ("o", "down")):
        moved = as_matrices(name, heads.params["layers"][name])
        np.testing.assert_allclose(moved, plain.params["layers"][to], rtol=1e-5, atol=1e-6)


def test_muon_leaves_all_else_to_adamw() -> None:
    params = small_params()
    adamw, muon = (run(params, config, 3).params for config in KINDS if config.moments_dtype == "float32")
    for path, leaf in jax.tree.leaves_with_path(adamw):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        other = dict(jax.tree.leaves_with_path(muon))[path]
        if name in MUON_MATRICES:
            assert float(jnp.abs(leaf - other).max()) > 1e-3
        else:
            np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-7b", "qwen3-0.6b", "smollm2-135m"])
def test_muon_knows_every_matrix_of_the_layers(name: str) -> None:
    """What it does not know it leaves to AdamW without a word: a renamed matrix must not get there."""
    arch = ARCHITECTURES[name]
    layers = qwen2.param_shapes(arch)["layers"]
    named = {f"layers.{leaf}" for leaf in layers if not leaf.endswith(("norm", "bias"))}
    assert named == set(MUON_MATRICES)
    for leaf, (inputs, outputs) in MUON_MATRICES.items():
        shape = layers[leaf.removeprefix("layers.")].shape
        assert [0, *inputs, *outputs] == list(range(len(shape)))


@every_kind
def test_decay_is_the_same_for_every_parameter(config: OptimizerConfig) -> None:
    """A gradient of 0 leaves the decay: the factor 1 - learning rate x weight decay."""
    params = small_params()
    state, _ = step(init_state(params, config), jax.tree.map(jnp.zeros_like, params), config)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(after, before * (1 - 1e-3 * 0.1), rtol=2e-7)


# ------------------------------------------------------------------------------------------------------------ moments


def test_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=500) * 10.0 ** rng.uniform(-20, 5, 500)).astype(np.float32)
    updates = 4096
    rounded = jax.jit(jax.vmap(lambda update: round_randomly(jnp.asarray(values), update, 3)))(jnp.arange(updates))
    rounded = np.asarray(rounded.astype(jnp.float32), np.float64)
    low = (values.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)  # towards 0
    high = ((values.view(np.uint32) & 0xFFFF0000) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    assert ((rounded == low) | (rounded == high)).all()
    share = (values - low) / (high - low)
    deviations = ((rounded - low) / (high - low) - share).mean(axis=0) / np.sqrt(share * (1 - share) / updates)
    assert np.abs(deviations).max() < 4.5  # of 500 normal ones the largest is above this in 3 of 1000
    assert 0.9 < deviations.std() < 1.1 and abs(deviations.mean()) < 0.15


def test_rounding_noise_differs_by_place_update_and_stream() -> None:
    """A third of a step up: a third of the places go up, and which do is unrelated between updates and streams."""
    third = jnp.full((64, 1024), 1 + 2.0**-7 / 3, jnp.float32)
    up = [np.asarray(rounded_at(third, u, stream=s) > 1) for u, s in ((0, 0), (1, 0), (0, 1), (1, 1))]
    sigma = np.sqrt(2 / 9 / third.size)
    for one in up:
        assert abs(one.mean() - 1 / 3) < 4 * sigma
        for shifted in (one[:, 1:] & one[:, :-1], one[1:] & one[:-1]):
            assert abs(shifted.mean() - 1 / 9) < 4 * sigma
    for i in range(4):
        for j in range(i):
            assert abs((up[i] & up[j]).mean() - 1 / 9) < 4 * sigma


def test_no_two_moments_share_their_noise() -> None:
    config = dataclasses.replace(PLAIN, moments_dtype="bfloat16")
    values = jnp.array(np.random.default_rng(0).uniform(0.1, 1.0, 1000), jnp.float32)
    both = {"a": values, "b": values}
    state, _ = step(init_state(both, config), both, config)
    for name in ("mu", "nu"):
        a, b = optax.tree.get(state.opt_state, name).values()
        assert 233 < int((a != b).sum()) < 433  # what rounds up with probability p differs with 2 p (1 - p): a third


def test_rounding_keeps_what_bfloat16_holds() -> None:
    held = jnp.array([0.0, -0.0, 1.0, -2.5, 3e38, 1e-30, np.inf, -np.inf], jnp.bfloat16)
    for update in range(20):
        assert_bits_equal(rounded_at(held.astype(jnp.float32), update, stream=0), held)


def test_a_second_moment_shrinks_where_the_nearest_bfloat16_would_not() -> None:
    """b2 = 0.999: an update takes at most 0.1 % away, the next bfloat16 below is 0.4 % away."""
    config = dataclasses.replace(PLAIN, moments_dtype="bfloat16", learning_rate=0.0)

    def shrink(state: TrainState, _: None) -> tuple[TrainState, None]:
        return apply_gradients(state, {"w": jnp.full(1000, 0.5)}, config, jnp.int32(1))[0], None

    state, _ = step(init_state({"w": jnp.zeros(1000)}, config), {"w": jnp.ones(1000)}, config)
    inner = optax.tree.set(state.opt_state, nu={"w": jnp.ones(1000, jnp.bfloat16)})
    state, _ = jax.jit(lambda s: jax.lax.scan(shrink, s, None, length=400))(dataclasses.replace(state, opt_state=inner))
    left = np.asarray(optax.tree.get(state.opt_state, "nu")["w"], np.float64)
    assert left.mean() == pytest.approx(0.25 + 0.75 * 0.999**400, rel=0.005)
    nearest = jnp.bfloat16(1)
    assert (0.999 * nearest.astype(jnp.float32) + 0.001 * 0.25).astype(jnp.bfloat16) == nearest


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bfloat16_moments_halve_their_bytes_and_stay_on_the_path(name: str) -> None:
    params = small_params()
    exact, rounded = (run(params, config, 30) for config in KINDS if config.name == name)
    masters, size, half = (
        sum(leaf.nbytes for leaf in leaves)
        for leaves in (jax.tree.leaves(rounded.params), moments(exact), moments(rounded))
    )
    assert half * 2 == size
    assert size == masters * 2 if name == "adamw" else masters < size < masters * 2  # Muon has one moment, not two
    walked = optax.tree.norm(optax.tree.sub(exact.params, params))
    apart = optax.tree.norm(optax.tree.sub(exact.params, rounded.params))
    assert 0 < apart / walked < 0.02


# --------------------------------------------------------------------------------------------------------------- step


@every_kind
def test_a_gradient_of_no_token_changes_nothing_and_is_counted(config: OptimizerConfig) -> None:
    """Decay and the momentum of the update before would move the parameters."""
    state, _ = step(init_state(small_params(), config), small_params(1), config)
    nothing = jax.tree.map(jnp.zeros_like, small_params())
    after, metrics = step(state, nothing, config, num_tokens=jnp.int32(0))
    assert int(after.updates) == 2 and int(after.skipped) == 1 and metrics["policy/skipped_updates"].value() == 1
    assert metrics["policy/grad_norm"].value() == 0
    assert_bits_equal((state.params, state.opt_state), (after.params, after.opt_state))
    moved, _ = step(state, nothing, config)
    assert not np.array_equal(moved.params["layers"]["up"], state.params["layers"]["up"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_kind
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(config: OptimizerConfig, bad: float) -> None:
    state, _ = step(init_state(small_params(), config), small_params(1), config)
    broken = small_params(2)
    broken["layers"]["up"] = broken["layers"]["up"].at[0, 0, 0].set(bad)
    after = state
    for times in (1, 2, 3):  # a third one in a row is refused as the first is
        after, metrics = step(after, broken, config)
        assert int(after.skipped) == times and metrics["policy/skipped_updates"].value() == 1
        assert metrics["policy/grad_norm"].weight == 0
        assert metrics["policy/learning_rate"].value() == pytest.approx(2e-3)  # the schedule waits
    assert_bits_equal((state.params, state.opt_state), (after.params, after.opt_state))
    assert int(after.updates) == 4
    # And the next good one does what it would have done.
    assert_bits_equal(step(after, small_params(3), config)[0].params, step(state, small_params(3), config)[0].params)


# ---------------------------------------------------------------------------------------------------- state and places


@every_kind
def test_moments_lie_where_their_parameters_do(config: OptimizerConfig, tiny, mesh) -> None:
    like = qwen2.param_shapes(tiny)
    placed = param_shardings(mesh, like, qwen2.param_axes(tiny), LEARNER_RULES)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, placed)
    template = state_shapes(shapes, config, mesh)
    by_name = {path[-1]: leaf for path, leaf in jax.tree.leaves_with_path(template.params)}
    assert len({leaf.sharding.spec for leaf in by_name.values()}) > 4
    found = 0
    for name in ("mu", "nu"):
        for _, tree in optax.tree.get_all_with_path(template.opt_state, name):
            for path, leaf in jax.tree.leaves_with_path(tree):
                assert (leaf.shape, leaf.sharding) == (by_name[path[-1]].shape, by_name[path[-1]].sharding), path
                assert leaf.dtype == config.moments_dtype
                found += 1
    assert found == len(by_name) * 2 - len(MUON_MATRICES) * (config.name == "muon")  # Muon has one moment
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(template))


@every_kind
def test_a_state_is_made_as_its_shapes_say_and_restored(config: OptimizerConfig, mesh, tmp_path) -> None:
    params = jax.device_put(small_params(), replicated(mesh))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    template = state_shapes(shapes, config, mesh)
    state = fresh_state(params, template, config)
    assert jax.tree.structure(state) == jax.tree.structure(template)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)
    stepped = run(small_params(), config, 1)  # nothing in it is 0
    state = jax.device_put(stepped, jax.tree.map(lambda shape: shape.sharding, template))
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, state, {})
    restored, _, _ = store.restore(template)
    store.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_bits_equal(state, restored)
