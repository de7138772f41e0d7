"""One optimizer update, jitted, with the state donated: gradients of micro-batches summed, clipped, applied.

Letters: M micro-batches, b rows of each, T positions.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rljax.config import AlgorithmConfig, Architecture, OptimizerConfig
from rljax.metrics import Metric, Sum, WeightedMean, merge_stacked
from rljax.models.qwen2 import Params
from rljax.rl.logprobs import batch_logprobs
from rljax.rl.losses import behaviour_gap, grpo_loss
from rljax.types import TrainBatch, TrainState

Metrics = dict[str, Metric]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a forward pass is carried out; hashable, so a compile-time constant."""

    dtype: str = "float32"
    remat: str = "full"
    temperature: float = 1.0


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with decoupled decay on every parameter and bias correction, as torch; clipping is in `apply_gradients`."""
    rate: Any = config.learning_rate
    warmup, decay = config.warmup_updates, config.decay_updates
    if decay:
        rate = optax.linear_schedule(config.learning_rate, 0.0, max(decay - warmup, 1))
    if warmup:
        after = rate if decay else optax.constant_schedule(config.learning_rate)
        rate = optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), after], [warmup])
    return optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)


@partial(jax.jit, static_argnames="config")
def init_state(params: Params, config: OptimizerConfig) -> TrainState:
    """Fresh moments around a copy of `params`."""
    copy = jax.tree.map(jnp.copy, params)
    # Two counters, two buffers: the state is donated, and a buffer can be given away once.
    return TrainState(copy, make_optimizer(config).init(copy), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def apply_gradients(state: TrainState, grads: Params, config: OptimizerConfig) -> tuple[TrainState, Metrics]:
    """Clips by global norm and steps. A gradient that is not finite changes nothing but the counters.

    The finite check comes before clipping, which would turn one infinity into zeros everywhere else. Torch's clip:
    scale = min(1, max_norm / (norm + 1e-6)).
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    if config.max_grad_norm > 0:
        scale = jnp.minimum(1.0, config.max_grad_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * scale, grads)
    changes, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    stepped = (optax.apply_updates(state.params, changes), opt_state)
    params, opt_state = jax.tree.map(partial(jnp.where, finite), stepped, (state.params, state.opt_state))
    skipped = (~finite).astype(jnp.int32)
    metrics: Metrics = {
        "policy/grad_norm": WeightedMean(jnp.where(finite, norm, 0.0), finite.astype(jnp.float32)),
        "policy/skipped_updates": Sum(skipped.astype(jnp.float32)),
    }
    return TrainState(params, opt_state, state.updates + 1, state.skipped + skipped), metrics


def sum_over_microbatches(
    function: Callable[[Any], tuple[Params, Metrics]], microbatches: Any
) -> tuple[Params, Metrics]:
    """(gradients added up, metrics merged) of `function` over the leading axis of `microbatches` ([M, ...] leaves)."""
    like, _ = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def add(total: Params, microbatch: Any) -> tuple[Params, Metrics]:
        grads, metrics = function(microbatch)
        return jax.tree.map(jnp.add, total, grads), metrics

    total, stacked = jax.lax.scan(add, zeros, microbatches)
    return total, merge_stacked(stacked)


@partial(jax.jit, static_argnames=("arch", "algorithm", "optimizer", "compute"), donate_argnames="state")
def grpo_update(
    state: TrainState,
    batch: TrainBatch,
    *,
    arch: Architecture,
    algorithm: AlgorithmConfig,
    optimizer: OptimizerConfig,
    compute: Compute,
) -> tuple[TrainState, Metrics]:
    """One optimizer update on `batch` ([M, b, T] leaves); metrics as sums.

    The metrics' `policy/behaviour_gap_*` compare the sampler with the parameters before this update, so they mean
    something only for the first update after a weight sync.
    """

    def loss(params: Params, rows: TrainBatch) -> tuple[jax.Array, Metrics]:
        logprobs, entropies = batch_logprobs(
            params, arch, rows, temperature=compute.temperature, compute_dtype=compute.dtype, remat=compute.remat
        )
        value, metrics = grpo_loss(logprobs, entropies, rows, algorithm)
        return value, metrics | behaviour_gap(jax.lax.stop_gradient(logprobs), rows)

    def gradient(rows: TrainBatch) -> tuple[Params, Metrics]:
        return jax.grad(loss, has_aux=True)(state.params, rows)

    grads, metrics = sum_over_microbatches(gradient, batch)
    state, applied = apply_gradients(state, grads, optimizer)
    return state, metrics | applied


@partial(jax.jit, static_argnames=("arch", "compute"))
def score(params: Params, batch: TrainBatch, *, arch: Architecture, compute: Compute) -> jax.Array:
    """Log-probs [M, b, T] of `batch` ([M, b, T] leaves) under `params`, without gradient."""

    def one(rows: TrainBatch) -> jax.Array:
        return batch_logprobs(
            params, arch, rows, temperature=compute.temperature, compute_dtype=compute.dtype, remat="none"
        )[0]

    return jax.lax.map(one, batch)
