"""The learner of a run: what it holds, and a step of it on a batch of rollouts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rljax.config import AlgorithmConfig, Architecture, OptimizerConfig
from rljax.mesh import microbatch_sharding, num_row_shards, replicated
from rljax.metrics import Metric, WeightedMean, merge
from rljax.models.qwen2 import Params
from rljax.rl.losses import behaviour_gap
from rljax.rl.packing import microbatches, rows_per_microbatch, select_rows
from rljax.rl.update import Compute, grpo_update, init_state, make_optimizer, score
from rljax.types import TrainBatch, TrainState


def state_shapes(param_shapes: Params, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """`TrainState` of `ShapeDtypeStruct` with shardings: moments lie where their parameters do."""
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer), param_shapes)
    placed = jax.tree.map(lambda s: s.sharding, param_shapes)
    whole = replicated(mesh)

    def on(shape: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    opt_state = optax.tree_map_params(
        make_optimizer(optimizer),
        on,
        shapes.opt_state,
        placed,
        transform_non_params=lambda shape: on(shape, whole),
    )
    return TrainState(
        jax.tree.map(on, shapes.params, placed), opt_state, on(shapes.updates, whole), on(shapes.skipped, whole)
    )


def fresh_state(params: Params, shapes: TrainState, optimizer: OptimizerConfig) -> TrainState:
    """State around a copy of `params`, placed as `shapes` say."""
    make = jax.jit(lambda p: init_state(p, optimizer), out_shardings=jax.tree.map(lambda s: s.sharding, shapes))
    return make(params)


@dataclasses.dataclass
class Learner:
    """Owns the state, which every update donates, and the frozen reference."""

    state: TrainState
    reference: Params | None
    """Parameters of the KL's other side; None when `algorithm.kl_coefficient` is 0."""
    arch: Architecture
    mesh: Mesh
    algorithm: AlgorithmConfig
    optimizer: OptimizerConfig
    compute: Compute

    def score(self, params: Params, batch: TrainBatch) -> np.ndarray:
        """Log-probs [B, T] of `batch` ([B, T] leaves) under `params`; 0 outside the loss mask."""
        rows = batch.tokens.shape[0]
        scored = score(params, self._split(batch), arch=self.arch, compute=self.compute)
        return np.asarray(scored).reshape(-1, batch.tokens.shape[1])[:rows]

    def rescore(self, batch: TrainBatch) -> tuple[TrainBatch, dict[str, Metric]]:
        """`batch` with reference and, if asked for, recomputed old log-probs."""
        metrics: dict[str, Metric] = {}
        if self.reference is not None:
            batch = dataclasses.replace(batch, reference_logprobs=self.score(self.reference, batch))
        if self.algorithm.old_logprobs == "recompute":
            old = self.score(self.state.params, batch)
            metrics = behaviour_gap(jnp.asarray(old), batch)
            batch = dataclasses.replace(batch, old_logprobs=old)
        return batch, metrics

    def step(self, batch: TrainBatch) -> dict[str, Metric]:
        """`updates_per_step` optimizer updates on the rows of `batch` ([B, T] NumPy leaves, whole groups in order)."""
        batch, gap = self.rescore(batch)
        rows = batch.tokens.shape[0] // self.algorithm.updates_per_step
        merged: dict[str, Metric] = {}
        for index in range(self.algorithm.updates_per_step):
            part = select_rows(batch, slice(index * rows, (index + 1) * rows), self.algorithm.aggregation)
            self.state, metrics = grpo_update(
                self.state,
                self._split(part),
                arch=self.arch,
                algorithm=self.algorithm,
                optimizer=self.optimizer,
                compute=self.compute,
            )
            if index == 0:
                # Later updates no longer hold the parameters that sampled.
                gap = gap or {name: metrics[name] for name in metrics if name.startswith("policy/behaviour_gap")}
            merged = merge(merged, metrics)
        return merged | gap

    def _split(self, batch: TrainBatch) -> TrainBatch:
        shards = num_row_shards(self.mesh)
        each = rows_per_microbatch(batch.tokens.shape[1], self.algorithm.microbatch_tokens, shards)
        return jax.device_put(microbatches(batch, each, shards), microbatch_sharding(self.mesh))


def group_metrics(rewards: np.ndarray) -> dict[str, Metric]:
    """Of rewards [P, G]: their mean and the share of groups from which nothing can be learnt."""
    flat = rewards.max(axis=1) == rewards.min(axis=1)
    return {
        "reward/mean": WeightedMean(float(rewards.sum()), rewards.size),
        "reward/zero_spread_group_fraction": WeightedMean(float(flat.sum()), len(flat)),
    }
