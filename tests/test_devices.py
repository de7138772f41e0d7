"""Two, four and eight devices give what one gives: the same tokens, and one GRPO step within float32 rounding.

Devices are forced in a process of its own, since XLA reads the flag once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_SECONDS = 1500
"""Of all programs, whose compiling alone takes minutes on two slow cores."""

pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS + 60)

SCRIPT = r"""
import dataclasses, json, math, re, sys
import jax, numpy as np, optax
sys.path.insert(0, sys.argv[1])
from conftest import TINY, make_prompts
from rljax.config import AlgorithmConfig, LoraConfig, MeshConfig, OptimizerConfig
from rljax.mesh import LEARNER_RULES, make_mesh, param_shardings
from rljax.models import qwen2
from rljax.models.lora import adapter_axes, init_adapter
from rljax.rl.learner import Learner, fresh_state, reference_copy, state_shapes
from rljax.rl.update import Compute
from rljax.sampling.engine import EngineOptions, Sampler
from rljax.types import select_prompts

PROGRAMS = ("decode", "rows", "lanes", "take")  # what runs between the first token and the last

def far_from_uniform():
    '''Matrices five times the usual spread. Norms stay 1: attention scores of 50 would make rounding errors of 1e-5.'''
    wide = lambda path, x: x if "norm" in jax.tree_util.keystr(path) else x * 5
    return jax.tree_util.tree_map_with_path(wide, qwen2.init(jax.random.key(0), TINY))

def few(rollouts):
    return select_prompts(rollouts, range(6))

def run(mesh):
    shapes = qwen2.param_shapes(TINY)
    shardings = param_shardings(mesh, shapes, qwen2.param_axes(TINY), LEARNER_RULES)
    shapes = jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)
    params = jax.device_put(far_from_uniform(), shardings)
    sampler = Sampler(None, TINY, mesh, stop_ids=(1,), options=EngineOptions(chunk_tokens=8))
    sampler.sync(params)
    long = None
    if mesh.shape["tensor"] == 1:
        long = sampler.generate(make_prompts([3 + 5 * i % 14 for i in range(96)]), 8, key=jax.random.key(7),
                                max_completion_tokens=160)
        assert sampler.stats.reshapes >= 4, sampler.stats
    rollouts = sampler.generate(make_prompts(([5, 9, 3, 7, 12, 4] * 8), slots=16), 8, key=jax.random.key(1),
                                temperature=1.0, max_completion_tokens=24)
    text = "".join(f.result().as_text() for key, f in sampler._programs._compiled.items() if key[0] in PROGRAMS)
    assert text
    gathered = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text)]
    # Where a gradient is nearly 0, AdamW with its usual eps makes a whole step of what is rounding.
    optimizer = OptimizerConfig(learning_rate=1e-3, eps=1e-4)
    learner = Learner(fresh_state(params, state_shapes(shapes, optimizer, mesh), optimizer), params, TINY, mesh,
                      AlgorithmConfig(updates_per_step=2, microbatch_tokens=256, reference_update="ema",
                                      reference_ema_decay=0.25), optimizer, Compute())
    learner.reference = reference_copy(params, "float32")
    advantages = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    metrics = learner.step(few(rollouts), advantages)
    learner.move_reference(1)
    moved = jax.tree.map(lambda to, leaf: to.is_equivalent_to(leaf.sharding, leaf.ndim), shardings, learner.reference)
    assert all(jax.tree.leaves(moved)), moved
    floats = {k: v.value() for k, v in jax.device_get(metrics).items()}
    state, reference = jax.device_get((learner.state, learner.reference))
    return rollouts, state, floats, max(gathered, default=0), long, reference

def gradient(mesh, rollouts, loss):
    '''First moment of an update's optimizer, (1 - b1) times its gradient; KL on, old log-probs those of the sampler.'''
    shardings = param_shardings(mesh, qwen2.param_shapes(TINY), qwen2.param_axes(TINY), LEARNER_RULES)
    params = jax.device_put(far_from_uniform(), shardings)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    optimizer = OptimizerConfig(max_grad_norm=0.0)
    algorithm = AlgorithmConfig(updates_per_step=1, microbatch_tokens=256, loss=loss, old_logprobs="behaviour",
                                kl_coefficient=0.1, aggregation="seq_mean_token_mean")
    learner = Learner(fresh_state(params, state_shapes(shapes, optimizer, mesh), optimizer), params, TINY, mesh,
                      algorithm, optimizer, Compute())
    learner.step(few(rollouts), np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32))
    return jax.device_get(optax.tree_utils.tree_get(learner.state.opt_state, "mu"))

def adapted(mesh, rollouts):
    '''An adapter's update and the sync after it: (adapter, sampler's parameters, norm of the gradient).'''
    lora = LoraConfig(rank=3)
    base = far_from_uniform()
    base = jax.device_put(base, param_shardings(mesh, base, qwen2.param_axes(TINY), LEARNER_RULES))
    adapter = jax.tree.map(lambda x: x + 0.05, init_adapter(jax.random.key(2), TINY, lora))
    adapter = jax.device_put(adapter, param_shardings(mesh, adapter, adapter_axes(TINY, lora), LEARNER_RULES))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), adapter)
    split = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(adapter)}
    assert len(split) > 4, split
    optimizer = OptimizerConfig(learning_rate=1e-3)
    algorithm = AlgorithmConfig(updates_per_step=1, kl_coefficient=0, old_logprobs="behaviour", microbatch_tokens=256)
    learner = Learner(fresh_state(adapter, state_shapes(shapes, optimizer, mesh), optimizer), None, TINY, mesh,
                      algorithm, optimizer, Compute(lora_scale=lora.scale), base=base)
    metrics = learner.step(few(rollouts), np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32))
    sampler = Sampler(learner.params, TINY, mesh, stop_ids=(1,))
    return jax.device_get((learner.state.params, sampler._params)), metrics["policy/grad_norm"].value()

alone = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
one = run(alone)
gradients = {loss: gradient(alone, one[0], loss) for loss in ("clip", "gspo")}
result = {}
for name in json.loads(sys.argv[2]):
    config = MeshConfig(**{"fsdp": 1} | {axis: int(size) for axis, size in re.findall(r"(\w+) (\d)", name)})
    devices = jax.devices()[: config.data * config.fsdp * config.tensor]
    many = run(make_mesh(config, devices))
    result[name] = {
        "tokens": int(one[0].lengths.sum()),
        "different_tokens": int((one[0].tokens != many[0].tokens).sum()),
        "logprob": float(np.abs(one[0].behaviour_logprobs - many[0].behaviour_logprobs).max()),
        "params": max(
            float(np.abs(a - b).max())
            for a, b in zip(jax.tree.leaves(one[1].params), jax.tree.leaves(many[1].params), strict=True)
        ),
        "reference": max(
            float(np.abs(a - b).max()) for a, b in zip(*(jax.tree.leaves(side[5]) for side in (one, many)), strict=True)
        ),
        "reference_moved": max(
            float(np.abs(a - b).max())
            for a, b in zip(jax.tree.leaves(one[5]), jax.tree.leaves(far_from_uniform()), strict=True)
        ),
        "grad_norm": abs(one[2]["policy/grad_norm"] - many[2]["policy/grad_norm"]) / one[2]["policy/grad_norm"],
    }
    result[name]["biggest_gather"] = many[3]
    for loss, whole in gradients.items():
        apart = jax.tree.map(np.subtract, gradient(make_mesh(config, devices), one[0], loss), whole)
        result[name]["gradient of " + loss] = float(optax.tree.norm(apart) / optax.tree.norm(whole))
    if many[4] is not None:
        result[name] |= {
            "long_tokens": int(one[4].lengths.sum()),
            "long_different": int((one[4].tokens != many[4].tokens).sum()),
            "long_logprob": float(np.abs(one[4].behaviour_logprobs - many[4].behaviour_logprobs).max()),
        }
(trees, norm), (other_trees, other_norm) = adapted(alone, one[0]), adapted(
    make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]), one[0])
result["adapter"] = {
    "params": max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (trees, other_trees)), strict=True)),
    "grad_norm": abs(norm - other_norm) / norm,
}
(copied, _), copied_norm = adapted(make_mesh(MeshConfig(fsdp=1, tensor=4), jax.devices()[:4]), one[0])
result["adapter of copied heads"] = {
    "params": max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (trees[0], copied)), strict=True)),
    "grad_norm": abs(norm - copied_norm) / norm,
}
print(json.dumps(result))
"""


MESHES = ("tensor 2", "fsdp 4", "tensor 4", "fsdp 8", "data 2 x fsdp 2 x tensor 2")


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # programs run a few times here, and take long to optimise
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), json.dumps(MESHES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", MESHES)
def test_many_devices_equal_one(differences: dict[str, dict[str, float]], mesh: str) -> None:
    """On "tensor 4" two devices share each of the two key/value heads."""
    difference = differences[mesh]
    assert difference["tokens"] > 5000
    assert difference["different_tokens"] == 0
    if "tensor" not in mesh:  # whole rows on every device
        assert difference["long_tokens"] > 20_000 and difference["long_different"] == 0
        assert difference["long_logprob"] < 2e-6
    # Neither a cache, nor logits [rows, 40], nor activations [rows, 32] cross devices whole.
    rows = 384 // (4 if "fsdp" in mesh else 1)
    assert difference["biggest_gather"] < (rows * 32 if "tensor" in mesh else 1)
    assert difference["logprob"] < 2e-6
    assert difference["grad_norm"] < 2e-6
    assert difference["gradient of clip"] < 1e-6 and difference["gradient of gspo"] < 1e-6
    assert difference["params"] < 1e-6
    assert difference["reference"] < 1e-6 and difference["reference_moved"] > 1e-4


def test_an_adapter_learns_and_is_synced_on_many_devices_as_on_one(differences: dict[str, dict[str, float]]) -> None:
    """Matrices, and so the factors beside them, split by width over fsdp and by heads over tensor."""
    for case in ("adapter", "adapter of copied heads"):
        assert differences[case]["grad_norm"] < 2e-6
        assert differences[case]["params"] < 2e-6
