"""A whole update against float64: model, packing, loss head and objective, loss and gradient, by named objective.

What it is held against knows no rows, masks, chunks or micro-batches: NumPy, one sequence at a time, and difference
quotients along directions in the space of all parameters.
"""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_update import make_rollouts, one_per_row, packed

from rljax.config import AlgorithmConfig, Architecture
from rljax.config_file import parse_config
from rljax.metrics import Metric
from rljax.models import qwen2
from rljax.rl.aggregation import UpdateLengths, token_weights
from rljax.rl.head import batch_loss
from rljax.rl.losses import grpo_loss, is_by_token
from rljax.rl.packing import Packing, RowShape, microbatches, train_batch
from rljax.types import TrainBatch

ARCH = Architecture(
    hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=24, vocab_size=40,
    tied_embeddings=True, num_tokens=37,
)  # fmt: skip
TEMPERATURE, CAP = 0.7, 14
ADVANTAGES = np.array([[1.2, -0.8, 0.5, -1.4], [-0.6, 0.9, -1.1, 0.7]], np.float32)
RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"


def of_recipe(name: str, **other: Any) -> AlgorithmConfig:
    flags = "--data.prompts_per_step", "512"
    return dataclasses.replace(parse_config([str(RECIPES / f"{name}.yaml"), *flags]).algorithm, **other)


AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant", "prompt_mean")
CASES = {
    **{f"recipe {file.stem}": of_recipe(file.stem) for file in sorted(RECIPES.glob("*.yaml")) if file.stem != "lora"},
    **{f"dapo, {name}": of_recipe("dapo", aggregation=name) for name in AGGREGATIONS},
    "paper, k1": of_recipe("paper", kl_coefficient=0.2, kl_estimator="k1"),
    "paper, k2, and the entropy": of_recipe(
        "paper", kl_coefficient=0.2, kl_estimator="k2", entropy_coefficient=0.1, clip_high=0.28
    ),
    "dppo mask": of_recipe("cispo", loss="dppo_mask", dppo_mask=0.02, dppo_penalty=0.1),
    "off-policy mask, k3 times the ratio": of_recipe(
        "paper", off_policy_mask=0.05, kl_coefficient=0.2, kl_importance_weight=True
    ),
    "TRL's sequence mask": of_recipe("paper", correction="sequence_mask", correction_low=0.0, correction_high=3.0),
}
OF_SEQUENCES = [name for name, algorithm in CASES.items() if not is_by_token(algorithm)]


@pytest.fixture(scope="module")
def params() -> Any:
    """Far from uniform, biases included; norms near 1, for scores of 50 would make rounding errors of 1e-5."""
    draw = np.random.default_rng(0)

    def drawn(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(mean + 0.2 * draw.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(drawn, qwen2.param_shapes(ARCH))


# ----------------------------------------------------------------------------------------------------------- in float64

Tree = dict[str, Any]


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + ARCH.rms_norm_eps) * scale


def rotated(x: np.ndarray) -> np.ndarray:
    """`x` [t, heads, H], the place of each token its position."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * ARCH.rope_theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def sequence_logprobs(params: Tree, tokens: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """(log-probs of `tokens[start:]`, entropies there) of one sequence, by the formulas of the model."""
    layer = {name: leaf[0] for name, leaf in params["layers"].items()}
    x = params["embed"][tokens]
    h = norm(x, layer["attn_norm"])
    q, k, v = (np.einsum("td,dnh->tnh", h, layer[name]) + layer[f"{name}_bias"] for name in "qkv")
    q, k, shared = rotated(q), rotated(k), ARCH.num_heads // ARCH.num_kv_heads
    seen = np.tril(np.ones((len(tokens), len(tokens)), bool))
    for head in range(ARCH.num_heads):
        scores = np.where(seen, q[:, head] @ k[:, head // shared].T / np.sqrt(ARCH.head_dim), -np.inf)
        attended = np.exp(scores - scores.max(axis=1, keepdims=True))
        context = attended / attended.sum(axis=1, keepdims=True) @ v[:, head // shared]
        x = x + context @ layer["o"][head]
    h = norm(x, layer["mlp_norm"])
    gate = h @ layer["gate"]
    x = norm(x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"], params["final_norm"])
    logits = x[start - 1 : -1] @ params["embed"][: ARCH.num_tokens].T / TEMPERATURE
    logprobs = logits - logits.max(axis=1, keepdims=True)
    logprobs = logprobs - np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
    return logprobs[np.arange(len(logprobs)), tokens[start:]], -(np.exp(logprobs) * logprobs).sum(axis=1)


def all_logprobs(params: Tree) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every completion of `make_rollouts`."""
    rollouts, found = make_rollouts(), []
    for row, length in enumerate(rollouts.lengths):
        prompt = row // rollouts.group_size
        start = int(rollouts.prompts.lengths[prompt])
        tokens = np.concatenate([rollouts.prompts.tokens[prompt, :start], rollouts.tokens[row, :length]])
        found.append(sequence_logprobs(params, tokens, start))
    return found


def wide(params: Any) -> Tree:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


@dataclasses.dataclass(frozen=True)
class Given:
    """Log-probs that an update is given, a list over completions each."""

    old: list[np.ndarray]
    behaviour: list[np.ndarray]
    reference: list[np.ndarray]


def given(exact: list[np.ndarray]) -> Given:
    """A little off the policy's, float32. One token in ten far below, so that its ratio is beyond any dual clip; two
    completions with A < 0 that the sampler found likelier, so that they are off-policy."""
    draw = np.random.default_rng(2)
    far = [2.6 * (draw.random(len(x)) < 0.1) for x in exact]

    def off(spread: float) -> list[np.ndarray]:
        return [(x - f + draw.normal(0, spread, len(x))).astype(np.float32) for x, f in zip(exact, far, strict=True)]

    behaviour = [mu + np.float32(n in (3, 6)) for n, mu in enumerate(off(0.3))]
    return Given(off(0.25), behaviour, off(0.4))


def objective(params: Tree, frozen: list[np.ndarray], of: Given, o: AlgorithmConfig) -> float:
    """The update's loss from the formulas; `frozen` stands for every stop_gradient."""
    lengths = make_rollouts().lengths.reshape(ADVANTAGES.shape).tolist()
    weights = [w for group in oracle.weights(o.aggregation, lengths, CAP) for w in group]
    total = 0.0
    for row, (lp, entropy) in enumerate(all_logprobs(params)):
        fixed, advantage = frozen[row], float(ADVANTAGES.reshape(-1)[row])
        old, mu, reference = (x[row].astype(np.float64) for x in (of.old, of.behaviour, of.reference))
        old = {"recompute": old, "behaviour": mu, "current": fixed}[o.old_logprobs]
        losses = oracle.policy_loss(lp, fixed, old, mu, advantage, o)
        kept = oracle.correction(old, mu, o)
        if oracle.is_off_policy(fixed, mu, advantage, o):
            kept = [0.0] * len(lp)
        for t in range(len(lp)):
            penalty = o.kl_coefficient * oracle.kl(lp[t], fixed[t], reference[t], o.kl_estimator)
            penalty *= np.exp(lp[t] - old[t]) if o.kl_importance_weight else 1.0
            penalty *= o.kl_in == "loss"
            total += weights[row] * (losses[t] * kept[t] + penalty - o.entropy_coefficient * entropy[t])
    return float(total)


# ---------------------------------------------------------------------------------------------------------- an update


def rows_of(packing: Packing, of: Given, aggregation: str) -> TrainBatch:
    rollouts = make_rollouts()
    update = UpdateLengths(rollouts.lengths.reshape(ADVANTAGES.shape), rollouts.prompts.lengths, CAP, 1)
    batch = train_batch(rollouts, ADVANTAGES, token_weights(update, aggregation), packing)

    def by_token(values: list[np.ndarray]) -> np.ndarray:
        rows = np.zeros(batch.tokens.shape, np.float32)
        rows.reshape(-1)[packing.completion_slots()] = np.concatenate(values)
        return rows

    return dataclasses.replace(
        batch, old_logprobs=by_token(of.old), behaviour_logprobs=by_token(of.behaviour),
        reference_logprobs=by_token(of.reference),
    )  # fmt: skip


def program(algorithm: AlgorithmConfig) -> AlgorithmConfig:
    """Without what is no part of the compiled loss: those that differ in nothing else share one."""
    if algorithm.kl_in == "reward":
        algorithm = dataclasses.replace(algorithm, kl_in="loss", kl_coefficient=0.0)
    return dataclasses.replace(
        algorithm, aggregation="token_mean", group_size=8, advantage="grpo", advantage_eps=1e-6, updates_per_step=1,
        zero_variance_groups="keep", dynamic_sampling_rounds=0,
    )  # fmt: skip


@cache
def compiled(algorithm: AlgorithmConfig) -> Any:
    """Loss and gradient of some rows."""

    def of_rows(params: Any, rows: TrainBatch) -> jax.Array:
        def loss(logprobs: jax.Array, entropies: jax.Array, batch: TrainBatch) -> tuple[jax.Array, dict[str, Metric]]:
            return grpo_loss(logprobs, entropies, batch, algorithm)

        return batch_loss(loss, params, ARCH, rows, by_token=is_by_token(algorithm), temperature=TEMPERATURE)[0]

    return jax.jit(jax.value_and_grad(of_rows))


def update(params: Any, batch: TrainBatch, rows_each: int, algorithm: AlgorithmConfig) -> tuple[float, Tree]:
    """(loss, gradient) of a batch [n, T], added up over micro-batches of so many rows."""
    rows = dataclasses.replace(batch, old_logprobs=batch.behaviour_logprobs)  # as the learner hands it over
    rows = batch if algorithm.old_logprobs == "recompute" else rows
    split, in_use = microbatches(rows, RowShape(1, rows_each, batch.tokens.shape[1]))
    parts = [jax.tree.map(lambda leaf, n=n: jnp.asarray(leaf[n]), split) for n in range(in_use)]
    losses, gradients = zip(*(compiled(program(algorithm))(params, part) for part in parts), strict=True)
    return float(sum(losses)), jax.tree.map(lambda *leaves: sum(np.asarray(x, np.float64) for x in leaves), *gradients)


def dot(a: Tree, b: Tree) -> float:
    return sum(float(np.sum(x * y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_an_update_are_those_of_the_formulas(name: str, params: Any, monkeypatch: Any) -> None:
    """Along the gradient itself and two random directions, within 1e-5 of its length."""
    monkeypatch.setattr("rljax.models.scoring.MAX_CHUNK", 16)  # less than a row has tokens
    algorithm, theta = CASES[name], wide(params)
    frozen = [logprobs for logprobs, _ in all_logprobs(theta)]
    of = given(frozen)
    loss, gradient = update(params, rows_of(packed(make_rollouts(), 40), of, algorithm.aggregation), 1, algorithm)
    assert loss == pytest.approx(objective(theta, frozen, of, algorithm), rel=1e-5, abs=1e-6)
    length, draw = dot(gradient, gradient) ** 0.5, np.random.default_rng(4)
    assert length > 1e-3
    along = jax.tree.map(lambda g: g / length, gradient)
    for direction in (along, *(jax.tree.map(lambda g: draw.normal(size=g.shape), gradient) for _ in range(2))):
        step = 1e-6 / dot(direction, direction) ** 0.5
        ends = [jax.tree.map(lambda x, d, s=sign: x + s * step * d, theta, direction) for sign in (1, -1)]  # noqa: B023
        slope = (objective(ends[0], frozen, of, algorithm) - objective(ends[1], frozen, of, algorithm)) / (2 * step)
        assert abs(dot(gradient, direction) - slope) < 1e-5 * length


def test_the_cases_have_what_could_differ(params: Any) -> None:
    """Ratios beyond every bound and between them, weights of sequences on both sides of theirs."""
    exact = [logprobs for logprobs, _ in all_logprobs(wide(params))]
    of, signs = given(exact), np.sign(ADVANTAGES).reshape(-1)
    moved = [(s * (x - old)) for s, x, old in zip(signs, exact, of.old, strict=True)]
    ratio = np.exp(np.concatenate([x - old for x, old in zip(exact, of.old, strict=True)]))
    assert ratio.max() > 10 and ratio.min() < 0.8 and ((ratio > 0.8) & (ratio < 1.2)).any()
    assert any(m.mean() > 4e-4 for m in moved) and any(m.mean() < 3e-4 for m in moved)
    products = [np.exp((old.astype(float) - mu).sum()) for old, mu in zip(of.old, of.behaviour, strict=True)]
    assert min(products) < 1 and any(1 / 3 < p < 3 for p in products)
    behind = [(mu - x).mean() for s, x, mu in zip(signs, exact, of.behaviour, strict=True) if s < 0]
    assert min(behind) < 0.05 < max(behind)
    assert set(OF_SEQUENCES) == {"recipe gspo", "off-policy mask, k3 times the ratio", "TRL's sequence mask"}


@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_how_completions_lie_does_not_matter_to_what_is_by_completion(name: str, params: Any, monkeypatch: Any) -> None:
    """Packed, or one in a row, in another order, micro-batches of three and smaller chunks of logits."""
    algorithm = CASES[name]
    of = given([logprobs for logprobs, _ in all_logprobs(wide(params))])
    loss, whole = update(params, rows_of(packed(make_rollouts(), 40), of, algorithm.aggregation), 1, algorithm)
    alone = rows_of(one_per_row(make_rollouts(), 24), of, algorithm.aggregation)
    order = np.array([5, 0, 7, 2, 1, 6, 3, 4])
    monkeypatch.setattr("rljax.models.scoring.MAX_CHUNK", 7)
    other_loss, other = update(params, jax.tree.map(lambda x: x[order], alone), 3, algorithm)
    apart = jax.tree.map(np.subtract, other, whole)
    assert other_loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert dot(apart, apart) < (1e-5) ** 2 * dot(whole, whole)
