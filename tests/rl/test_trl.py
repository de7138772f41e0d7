"""An update of ours is TRL's: of frozen rollouts, by each of its losses, from rewards to the step of the optimizer."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from golden.weights import formula_weights
from safetensors.numpy import save_file

from rljax.config import AlgorithmConfig, Architecture, OptimizerConfig
from rljax.mesh import LEARNER_RULES, param_shardings
from rljax.models import hf, qwen2
from rljax.rl.advantages import group_advantages
from rljax.rl.learner import Learner, fresh_state, state_shapes
from rljax.rl.update import Compute
from rljax.types import LENGTH, STOP, PromptRecord, Prompts, Rollouts

GOLDEN = np.load(Path(__file__).resolve().parents[1] / "golden" / "trl_grpo.npz")
ABOUT = json.loads(str(GOLDEN["about"]))
CASES: dict[str, dict[str, Any]] = ABOUT["cases"]
AGGREGATION = {
    "grpo": "seq_mean_token_mean", "bnpo": "token_mean", "dr_grpo": "constant", "dapo": "token_mean",
    "cispo": "token_mean",
}  # fmt: skip
ADVANTAGE = {"group": "grpo", "none": "dr_grpo", "batch": "batch_std"}


def algorithm_of(case: dict[str, Any]) -> AlgorithmConfig:
    """The settings by which ours is TRL's: no dual clip, 1e-4 beside the standard deviation, a cap alone for cispo."""
    low, high = case["epsilon"], case["epsilon_high"] or case["epsilon"]
    if case["loss_type"] == "cispo":
        low, high = 1.0, high - 1
    return AlgorithmConfig(
        group_size=ABOUT["group"],
        updates_per_step=1,
        advantage=ADVANTAGE[case["scale_rewards"]],  # type: ignore[arg-type]
        advantage_eps=1e-4,
        loss="cispo" if case["loss_type"] == "cispo" else "clip",
        clip_low=low,
        clip_high=high,
        dual_clip=0.0,
        aggregation=AGGREGATION[case["loss_type"]],  # type: ignore[arg-type]
        kl_coefficient=case["beta"],
        kl_importance_weight=case["use_bias_correction_kl"],
        old_logprobs="behaviour" if case["num_iterations"] > 1 else "current",
        overlong="mask" if case["mask_truncated_completions"] else "keep",
        microbatch_tokens=64,
    )


def rollouts_of(name: str) -> Rollouts:
    completions, cap = ABOUT["completions"], ABOUT["cap"]
    lengths = np.array([len(row) for row in completions], np.int32)
    tokens = np.array([row + [0] * (cap - len(row)) for row in completions], np.int32)
    slots = max(map(len, ABOUT["prompts"]))
    prompts = Prompts(
        np.array([row + [0] * (slots - len(row)) for row in ABOUT["prompts"]], np.int32),
        np.array([len(row) for row in ABOUT["prompts"]], np.int32),
        np.arange(len(ABOUT["prompts"])),
        tuple(PromptRecord(({"role": "user", "content": "?"},), "exact", "") for _ in ABOUT["prompts"]),
    )
    old = np.zeros(tokens.shape, np.float32)
    if f"{name}/old_logprobs" in GOLDEN:
        old = np.where(np.arange(cap) < lengths[:, None], GOLDEN[f"{name}/old_logprobs"], 0)
    ended = np.array([STOP if row[-1] == ABOUT["end"] else LENGTH for row in completions], np.int8)
    return Rollouts(prompts, ABOUT["group"], tokens, lengths, old.astype(np.float32), ended)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("trl")
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(ABOUT["config"] | config))
    return hf.read_architecture(folder)


def params_of(arch: Architecture, folder: Path, tensors: dict[str, np.ndarray]) -> qwen2.Params:
    folder.mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")
    return hf.load_params(folder, arch)


def weights(arch: Architecture, moved: float) -> dict[str, np.ndarray]:
    shapes = {entry.name: tuple(entry.shape) for entry in hf.entries(arch)}
    start, other = formula_weights(shapes), formula_weights({f"other.{name}": s for name, s in shapes.items()})
    return {name: start[name] + np.float32(moved) * other[f"other.{name}"] for name in shapes}


def golden_tensors(name: str, kind: str) -> dict[str, np.ndarray]:
    prefix = f"{name}/{kind}/"
    return {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix)}


@pytest.mark.parametrize("name", CASES)
def test_advantages(name: str) -> None:
    algorithm, rewards = algorithm_of(CASES[name]), np.array(ABOUT["rewards"]).reshape(-1, ABOUT["group"])
    lengths = rollouts_of(name).lengths.reshape(rewards.shape)
    ours = group_advantages(rewards, lengths, algorithm.advantage, algorithm.advantage_eps)
    np.testing.assert_allclose(ours.reshape(-1), GOLDEN[f"{name}/advantages"], atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_step(name: str, architecture: Architecture, mesh: Any, tmp_path: Path) -> None:
    """Gradients within 1e-5 of the largest entry of their tensor; AdamW's step where they are more than noise."""
    case, rollouts = CASES[name], rollouts_of(name)
    start = params_of(architecture, tmp_path / "start", weights(architecture, 0.0))
    moved = ABOUT["moved"] if case["num_iterations"] > 1 else 0.0
    policy = params_of(architecture, tmp_path / "policy", weights(architecture, moved))
    optimizer = OptimizerConfig(
        learning_rate=case["learning_rate"], weight_decay=case["weight_decay"], max_grad_norm=case["max_grad_norm"],
        b2=case["adam_beta2"],
    )  # fmt: skip
    shapes = qwen2.param_shapes(architecture)
    shardings = param_shardings(mesh, shapes, qwen2.param_axes(architecture), LEARNER_RULES)
    shapes = jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)
    state = fresh_state(policy, state_shapes(shapes, optimizer, mesh), optimizer)
    reference = start if case["beta"] else None
    learner = Learner(state, reference, architecture, mesh, algorithm_of(case), optimizer, Compute())
    advantages = GOLDEN[f"{name}/advantages"].reshape(-1, ABOUT["group"])
    metrics = {key: metric.value() for key, metric in learner.step(rollouts, advantages).items()}

    np.testing.assert_allclose(metrics["policy/objective"], GOLDEN[f"{name}/loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["policy/grad_norm"], GOLDEN[f"{name}/grad_norm"], rtol=1e-5)
    gradient = params_of(architecture, tmp_path / "gradient", golden_tensors(name, "gradient"))
    change = params_of(architecture, tmp_path / "change", golden_tensors(name, "change"))
    # After one update AdamW's first moment is the (clipped) gradient times 1 - b1.
    first = next(leaf.mu for leaf in jax.tree.leaves(learner.state.opt_state, is_leaf=_has_mu) if _has_mu(leaf))
    for ours, theirs, after, before, step in zip(
        *map(jax.tree.leaves, (first, gradient, learner.state.params, policy, change)), strict=True
    ):
        theirs, largest = np.asarray(theirs), np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours) / (1 - optimizer.b1), theirs, atol=1e-5 * largest)
        clear = np.abs(theirs) > 1e-3 * largest
        np.testing.assert_allclose((np.asarray(after) - before)[clear], np.asarray(step)[clear], atol=1e-6)


def _has_mu(node: Any) -> bool:
    return hasattr(node, "mu")


def test_the_cases_have_what_could_differ() -> None:
    """Ratios on both sides of the clip, a group without a spread, completions that were cut."""
    assert {case["loss_type"] for case in CASES.values()} == set(AGGREGATION)
    assert (GOLDEN["grpo/advantages"].reshape(-1, ABOUT["group"]) == 0).all(axis=1).any()
    ended = rollouts_of("grpo").stop_reasons
    assert (ended == LENGTH).any() and (ended == STOP).any()
