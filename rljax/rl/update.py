"""One optimizer update, jitted, with the state donated: gradients of micro-batches summed, clipped, applied.

Letters: M micro-batches, b rows of each, T positions.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rljax.config import AlgorithmConfig, Architecture, OptimizerConfig
from rljax.metrics import Metric, Sum, WeightedMean, merge
from rljax.models.lora import attach
from rljax.models.qwen2 import Params
from rljax.rl.head import Metrics, batch_loss
from rljax.rl.logprobs import batch_logprobs
from rljax.rl.losses import LOSS_METRICS, behaviour_gap, grpo_loss, is_by_token
from rljax.rl.optimizer import apply_gradients
from rljax.types import TrainBatch, TrainState


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a forward pass is carried out; hashable, so a compile-time constant."""

    dtype: str = "float32"
    remat: str = "full"
    temperature: float = 1.0
    lora_scale: float = 1.0
    """Factor of a LoRA adapter's product."""
    head_dtype: str = ""
    """Of the loss head's operands; empty: `dtype`."""


def sum_over_microbatches(
    function: Callable[[Any], tuple[Params, Metrics]], microbatches: Any, num_microbatches: jax.Array
) -> tuple[Params, Metrics]:
    """(gradients added up, metrics merged) of `function` over the first of `microbatches` ([M, ...] leaves).

    Args:
      num_microbatches: [] int32, 1..M. Traced: another number is no other program, and those beyond it cost nothing.
    """
    function = jax.jit(function, inline=True)  # traced once
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(index: jax.Array, so_far: tuple[Params, Metrics]) -> tuple[Params, Metrics]:
        total, merged = so_far
        grads, metrics = function(_at(microbatches, index))
        # The first replaces the zeros, which are not where a maximum starts.
        merged = jax.tree.map(partial(jnp.where, index == 0), metrics, merge(merged, metrics))
        return jax.tree.map(jnp.add, total, grads), merged

    return jax.lax.fori_loop(0, num_microbatches, add, zeros)


def _at(microbatches: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), microbatches)


@partial(jax.jit, static_argnames=("arch", "algorithm", "optimizer", "compute"), donate_argnames="state")
def grpo_update(
    state: TrainState,
    batch: TrainBatch,
    num_microbatches: jax.Array,
    base: Params | None = None,
    num_tokens: jax.Array | None = None,
    *,
    arch: Architecture,
    algorithm: AlgorithmConfig,
    optimizer: OptimizerConfig,
    compute: Compute,
) -> tuple[TrainState, Metrics]:
    """One optimizer update on the first `num_microbatches` ([] int32) of `batch` ([M, b, T] leaves); metrics as sums.

    The metrics' `policy/behaviour_gap_*` compare the sampler with the parameters before this update, so they mean
    something only for the first update after a weight sync.

    Args:
      base: frozen parameters that the adapter in `state` lies beside; None: `state` holds all of them.
      num_tokens: [] int32, tokens of the loss, those included that were left out of `batch` for having no gradient;
        None: those of `batch`. An update of none is skipped.
    """

    def loss(logprobs: jax.Array, entropies: jax.Array, rows: TrainBatch) -> tuple[jax.Array, Metrics]:
        value, metrics = grpo_loss(logprobs, entropies, rows, algorithm)
        return value, metrics | behaviour_gap(logprobs, rows)

    def whole_loss(trained: Params, rows: TrainBatch) -> tuple[jax.Array, Metrics]:
        return batch_loss(
            loss,
            attach(base, trained, compute.lora_scale),
            arch,
            rows,
            by_token=is_by_token(algorithm),
            train_head=base is None,
            temperature=compute.temperature,
            compute_dtype=compute.dtype,
            remat=compute.remat,
            head_dtype=compute.head_dtype,
        )

    def gradient(rows: TrainBatch) -> tuple[Params, Metrics]:
        return jax.grad(whole_loss, has_aux=True)(state.params, rows)

    grads, metrics = sum_over_microbatches(gradient, batch, num_microbatches)
    if num_tokens is None:
        num_tokens = batch.loss_mask.sum(dtype=jnp.int32)
    state, applied = apply_gradients(state, grads, optimizer, num_tokens)
    return state, metrics | {name: _of_one_update(metrics[name]) for name in LOSS_METRICS} | applied


def _of_one_update(total: Metric) -> WeightedMean:
    """A loss summed over micro-batches, such that over several updates it is their mean."""
    assert isinstance(total, Sum)
    return WeightedMean(total.amount, jnp.ones((), jnp.float32))


@partial(jax.jit, static_argnames=("arch", "compute"))
def score(
    params: Params, batch: TrainBatch, num_microbatches: jax.Array, *, arch: Architecture, compute: Compute
) -> jax.Array:
    """Log-probs [M, b, T] of the first `num_microbatches` ([] int32) of `batch` ([M, b, T] leaves); 0 beyond them."""

    def add(index: jax.Array, scored: jax.Array) -> jax.Array:
        logprobs, _ = batch_logprobs(
            params,
            arch,
            _at(batch, index),
            temperature=compute.temperature,
            compute_dtype=compute.dtype,
            head_dtype=compute.head_dtype,
        )
        return jax.lax.dynamic_update_index_in_dim(scored, logprobs, index, 0)

    return jax.lax.fori_loop(0, num_microbatches, add, jnp.zeros(batch.tokens.shape, jnp.float32))
