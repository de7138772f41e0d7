"""The learner of a run: what it holds, and a step of it on a batch of rollouts."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from rljax.config import AlgorithmConfig, Architecture, OptimizerConfig
from rljax.costs import FlopCount, forward_count, group_tokens
from rljax.hosts import to_devices, to_host
from rljax.mesh import microbatch_sharding, num_row_shards, replicated
from rljax.metrics import Max, Metric, Min, Sum, WeightedMean, merge
from rljax.models.lora import attach
from rljax.models.qwen2 import Params
from rljax.rl.advantages import has_spread
from rljax.rl.aggregation import UpdateLengths, token_weights
from rljax.rl.correction import normalised_advantages
from rljax.rl.losses import behaviour_gap, kl_of
from rljax.rl.optimizer import init_state, make_optimizer
from rljax.rl.packing import Packing, RowShape, batch_shapes, microbatches, pack, row_shape, train_batch
from rljax.rl.update import Compute, grpo_update, score
from rljax.types import LENGTH, Rollouts, TrainBatch, TrainState, select_prompts


def state_shapes(param_shapes: Params, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """`TrainState` of `ShapeDtypeStruct` with shardings: moments lie where their parameters do."""
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer), param_shapes)
    placed = jax.tree.map(lambda s: s.sharding, param_shapes)
    whole = replicated(mesh)

    def on(shape: Any, sharding: Any) -> Any:
        if isinstance(shape, optax.MaskedNode):  # Muon: this parameter has its moments with the other rule
            return shape
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    opt_state = optax.tree_map_params(
        make_optimizer(optimizer),
        on,
        shapes.opt_state,
        placed,
        transform_non_params=lambda shape: on(shape, whole),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return TrainState(
        jax.tree.map(on, shapes.params, placed), opt_state, on(shapes.updates, whole), on(shapes.skipped, whole)
    )


def fresh_state(params: Params, shapes: TrainState, optimizer: OptimizerConfig) -> TrainState:
    """State around a copy of `params`, placed as `shapes` say."""
    make = jax.jit(lambda p: init_state(p, optimizer), out_shardings=jax.tree.map(lambda s: s.sharding, shapes))
    return make(params)


@partial(jax.jit, static_argnames="dtype")
def reference_copy(params: Params, dtype: str) -> Params:
    """`params` as a reference model in `dtype`, in buffers of its own: an update donates those of the state."""
    return jax.tree.map(lambda leaf: jnp.copy(leaf).astype(dtype), params)


@partial(jax.jit, donate_argnames="reference")
def _moved(reference: Params, params: Params, share: jax.Array | float) -> Params:
    """`reference`, nearer to `params` by `share` of the way."""
    return jax.tree.map(lambda old, new: old + share * (new - old), reference, params)


def reference_dtype(algorithm: AlgorithmConfig, head_dtype: str) -> str:
    """The head's, the widest it is read in. A running mean moves by less than bfloat16 resolves."""
    return "float32" if algorithm.reference_update == "ema" else head_dtype


def checkpoint_shapes(shapes: TrainState, algorithm: AlgorithmConfig, head_dtype: str) -> dict[str, Any]:
    """What `Learner.checkpoint_state` gives for a state of `shapes`, as `ShapeDtypeStruct` with shardings."""
    saved = dict(vars(shapes))
    if algorithm.reference_update != "fixed":
        dtype = reference_dtype(algorithm, head_dtype)
        saved["reference"] = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), shapes.params
        )
    return saved


def update_shape(
    arch: Architecture, mesh: Mesh, algorithm: AlgorithmConfig, prompts: int, prompt_slots: int, completion_slots: int
) -> RowShape:
    """Shape of the arrays of an update on `prompts` prompts of at most `prompt_slots` tokens."""
    return row_shape(
        arch,
        prompt_slots,
        completion_slots,
        algorithm.group_size,
        completions=prompts * algorithm.group_size,
        row_shards=num_row_shards(mesh),
        microbatch_tokens=algorithm.microbatch_tokens,
        platform=mesh.devices.flat[0].platform,
    )


def _shapes(tree: Any) -> Any:
    """`tree` of arrays as `ShapeDtypeStruct` that jit takes for the same: keeps no buffer alive."""

    def shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None)

    return jax.tree.map(shape, tree)


@dataclasses.dataclass(frozen=True)
class UpdateRows:
    """What one update learns from."""

    batch: TrainBatch  # [M, b, T] leaves
    num_microbatches: np.ndarray  # [] int32, those in use
    num_tokens: np.ndarray  # [] int32 of the loss, groups left out for having no gradient included
    packing: Packing
    forward: FlopCount  # of scoring it once
    metrics: dict[str, Metric]


@dataclasses.dataclass
class Learner:
    """Owns the state, which every update donates, and the reference."""

    state: TrainState
    reference: Params | None
    """Parameters of the KL's other side, with LoRA the base itself; None when `algorithm.kl_coefficient` is 0.

    With `ema` and `periodic` it moves, and its buffers are the learner's own (`reference_copy`).
    """
    arch: Architecture
    mesh: Mesh
    algorithm: AlgorithmConfig
    optimizer: OptimizerConfig
    compute: Compute
    base: Params | None = None
    """Frozen parameters that the LoRA adapter in `state` lies beside; None: `state` holds all parameters."""
    _preparing: "Future[None] | None" = None

    @property
    def params(self) -> Params:
        """The policy's, for scores and the weight sync; an adapter lies beside its matrices."""
        return attach(self.base, self.state.params, self.compute.lora_scale)

    def prepare(self, prompts: int, prompt_slots: int, completion_slots: int) -> None:
        """Has the programs of `step` compiled in the background while the first rollouts are drawn; `step` waits.

        Args:
          prompts: of a step.
          prompt_slots: S of the rollouts to come.
          completion_slots: R.
        """
        algorithm, scored = self.algorithm, []
        shape = update_shape(
            self.arch, self.mesh, algorithm, prompts // algorithm.updates_per_step, prompt_slots, completion_slots
        )
        if self.reference is not None:
            scored.append(_shapes(self.reference))
        if algorithm.old_logprobs == "recompute":
            scored.append(_shapes(self.params))
        state, base = _shapes(self.state), _shapes(self.base)
        batch, count = batch_shapes(shape, microbatch_sharding(self.mesh)), jax.ShapeDtypeStruct((), jnp.int32)

        def compile_all() -> None:
            # Nothing is kept of it: a jitted function finds what was lowered and compiled for its arguments' shapes.
            with jax.set_mesh(self.mesh):
                for params in scored:
                    score.lower(params, batch, count, arch=self.arch, compute=self.compute).compile()
                grpo_update.lower(state, batch, count, base, count, **self._constants).compile()

        background = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._preparing = background.submit(compile_all)
        background.shutdown(wait=False)

    @property
    def _constants(self) -> dict[str, Any]:
        """What is compiled into `grpo_update`."""
        return {
            "arch": self.arch,
            "algorithm": self.algorithm,
            "optimizer": self.optimizer,
            "compute": self.compute,
        }

    def _wait_for_programs(self) -> None:
        """A program that is being compiled would be compiled twice."""
        if self._preparing is not None:
            self._preparing.result()
            self._preparing = None

    def step(self, rollouts: Rollouts, advantages: np.ndarray) -> dict[str, Metric]:
        """`updates_per_step` optimizer updates, each on as many prompts, in order.

        Args:
          rollouts: a completion of length 0 has no part in anything.
          advantages: [P, G].
        """
        rollouts = that_count(rollouts, advantages, self.algorithm)
        self._wait_for_programs()
        with jax.set_mesh(self.mesh):
            updates = [self._rows(part, a) for part, a in self._parts(rollouts, advantages)]
            updates, gaps = self._rescored(updates)
            if self.algorithm.correction_normalise:
                updates = [self._normalised(rows) for rows in updates]
            applied: list[Mapping[str, Metric]] = []
            for rows in updates:
                self.state, metrics = grpo_update(
                    self.state,
                    self._on_device(rows.batch),
                    rows.num_microbatches,
                    self.base,
                    rows.num_tokens,
                    **self._constants,
                )
                applied.append(metrics)
        # On the host, and after all of it: a sum of two scalars would be a program on every device of the run.
        gaps, applied = jax.device_get((gaps, applied))
        merged: dict[str, Metric] = {}
        for rows, metrics in zip(updates, applied, strict=True):
            merged = merge(merged, merge(metrics, rows.metrics))
        # Later updates no longer hold the parameters that sampled.
        gaps = gaps or [{name: applied[0][name] for name in applied[0] if name.startswith("policy/behaviour_")}]
        gap = reduce(merge, gaps)
        lengths = rollouts.lengths.reshape(advantages.shape)
        return merged | gap | advantage_metrics(advantages, lengths)

    def move_reference(self, step: int) -> None:
        """After `step` (1, 2, ...): lets the reference follow the policy as `algorithm.reference_update` says."""
        algorithm = self.algorithm
        if algorithm.reference_update == "ema":
            assert self.reference is not None, "there is no reference model; algorithm.kl_coefficient is 0"
            self.reference = _moved(self.reference, self.state.params, 1 - algorithm.reference_ema_decay)
        elif algorithm.reference_update == "periodic" and step % algorithm.reference_every_steps == 0:
            dtype = reference_dtype(algorithm, self.compute.head_dtype or self.compute.dtype)
            self.reference = reference_copy(self.state.params, dtype)

    def checkpoint_state(self) -> dict[str, Any]:
        """What cannot be had again: the fields of the state, and the reference where it moves."""
        moving = {"reference": self.reference} if self.algorithm.reference_update != "fixed" else {}
        return vars(self.state) | moving

    def score(self, params: Params, rollouts: Rollouts) -> np.ndarray:
        """Log-probs [B, R] of the completions under `params` (learner layout); 0 after their ends."""
        anything = np.ones((len(rollouts.prompts), rollouts.group_size), np.float32)
        self._wait_for_programs()
        with jax.set_mesh(self.mesh):
            updates = [self._rows(part, a) for part, a in self._parts(rollouts, anything)]
            scored = [to_host(self._score(params, rows)) for rows in updates]
        slots = rollouts.tokens.shape[1]
        return np.concatenate([u.packing.by_completion(s, slots) for u, s in zip(updates, scored, strict=True)])

    def kl_penalty(self, rollouts: Rollouts) -> tuple[np.ndarray, dict[str, Metric]]:
        """[P, G] float64, what `kl_in: reward` takes off the rewards: kl_coefficient x the summed KL to the reference.

        Of the old log-probs, or the sampler's where old ones are not recomputed.
        """
        assert self.reference is not None, "there is no reference model; algorithm.kl_coefficient is 0"
        old = rollouts.behaviour_logprobs
        if self.algorithm.old_logprobs == "recompute":
            old = self.score(self.params, rollouts)
        gap = jnp.asarray(old - self.score(self.reference, rollouts))
        kl = np.asarray(kl_of(gap, self.algorithm.kl_estimator), np.float64)
        total = kl.sum(axis=1).reshape(-1, rollouts.group_size)  # both are 0 after the end, and so is an estimate of 0
        passes = 2 if self.algorithm.old_logprobs == "recompute" else 1
        once = forward_count(self.arch, *group_tokens(rollouts.prompts.lengths, rollouts.lengths.reshape(total.shape)))
        metrics: dict[str, Metric] = {"policy/reference_kl": WeightedMean(total.sum(), rollouts.lengths.sum())}
        metrics |= _learner_flops(reference=once, old_logprobs=once * (passes - 1))
        return self.algorithm.kl_coefficient * total, metrics

    def _parts(self, rollouts: Rollouts, advantages: np.ndarray) -> list[tuple[Rollouts, np.ndarray]]:
        places = np.split(np.arange(len(rollouts.prompts)), self.algorithm.updates_per_step)
        return [(select_prompts(rollouts, part), advantages[part]) for part in places]

    def _rows(self, rollouts: Rollouts, advantages: np.ndarray) -> UpdateRows:
        """Of one update. Groups that cannot change the parameters are left out, but for the loss's divisor."""
        lengths, algorithm = rollouts.lengths.reshape(advantages.shape), self.algorithm
        prompt_slots, completion_slots = rollouts.prompts.tokens.shape[1], rollouts.tokens.shape[1]
        update = UpdateLengths(lengths, rollouts.prompts.lengths, completion_slots, algorithm.microbatch_tokens)
        weights = token_weights(update, algorithm.aggregation)
        kept = np.ones(len(lengths), bool)
        if zero_advantages_are_idle(algorithm):
            kept = (advantages != 0).any(axis=1)
        shape = update_shape(self.arch, self.mesh, algorithm, len(lengths), prompt_slots, completion_slots)
        left = select_prompts(rollouts, np.flatnonzero(kept))
        packing = pack(left.prompts.lengths, lengths[kept], shape.positions)
        batch, in_use = microbatches(train_batch(left, advantages[kept], weights[kept], packing), shape)
        slots = in_use * shape.rows * shape.positions
        forward = forward_count(self.arch, *group_tokens(left.prompts.lengths, lengths[kept]))
        return UpdateRows(
            batch,
            np.int32(in_use),  # type: ignore[arg-type]
            np.int32(lengths.sum()),  # type: ignore[arg-type]
            packing,
            forward,
            {
                "learner/padding_fraction": WeightedMean(slots - packing.used, slots),
                "learner/dropped_group_fraction": WeightedMean(int((~kept).sum()), len(kept)),
                **_learner_flops(update=forward * 3),
            },
        )

    def _rescored(self, updates: list[UpdateRows]) -> tuple[list[UpdateRows], list[Mapping[str, Metric]]]:
        """`updates` with reference and, if asked for, recomputed old log-probs, under the parameters as they are; how
        far those are from the sampler's."""
        scored, gaps = [], []
        for rows in updates:
            batch, passes = rows.batch, {}
            if self.reference is not None and self.algorithm.kl_in == "loss":
                batch = dataclasses.replace(batch, reference_logprobs=self._score(self.reference, rows))
                passes["reference"] = rows.forward
            if self.algorithm.old_logprobs == "recompute":
                old = self._score(self.params, rows)
                gaps.append(behaviour_gap(old, batch))
                batch = dataclasses.replace(batch, old_logprobs=old)
                passes["old_logprobs"] = rows.forward
            metrics = merge(rows.metrics, _learner_flops(**passes))
            scored.append(dataclasses.replace(rows, batch=batch, metrics=metrics))
        return scored, gaps

    def _normalised(self, rows: UpdateRows) -> UpdateRows:
        """`rows` whose importance weights have a mean of 1 over the update."""
        advantages = normalised_advantages(self._on_device(rows.batch), self.algorithm)
        return dataclasses.replace(rows, batch=dataclasses.replace(rows.batch, advantages=advantages))

    def _score(self, params: Params, rows: UpdateRows) -> jax.Array:
        return score(params, self._on_device(rows.batch), rows.num_microbatches, arch=self.arch, compute=self.compute)

    def _on_device(self, batch: TrainBatch) -> TrainBatch:
        return to_devices(batch, microbatch_sharding(self.mesh))


def flop_metrics(**phases: FlopCount) -> dict[str, Metric]:
    """`compute/PHASE_flops` of each phase, heads and attention included, and how much of all of them these two are.

    Model FLOPs: what is computed again in a backward pass (remat) is not counted.
    """
    spent = sum(phases.values(), FlopCount())
    return {
        **{f"compute/{phase}_flops": Sum(float(count.total)) for phase, count in phases.items()},
        "compute/attention_flops": Sum(float(spent.attention)),
        "compute/head_flops": Sum(float(spent.head)),
    }


def _learner_flops(**phases: FlopCount) -> dict[str, Metric]:
    """`flop_metrics`, and their sum as that of the learner."""
    total = sum(count.total for count in phases.values())
    return flop_metrics(**phases) | {"learner/model_flops": Sum(float(total))}


def that_count(rollouts: Rollouts, advantages: np.ndarray, algorithm: AlgorithmConfig) -> Rollouts:
    """`rollouts`, those completions with length 0 that `overlong` and `zero_variance_groups` keep out of the loss."""
    lengths = rollouts.lengths
    if algorithm.overlong == "mask":
        lengths = np.where(rollouts.stop_reasons == LENGTH, 0, lengths)
    if algorithm.zero_variance_groups == "drop":
        lengths = np.where(np.repeat((advantages == 0).all(axis=1), rollouts.group_size), 0, lengths)
    return dataclasses.replace(rollouts, lengths=lengths)


def zero_advantages_are_idle(algorithm: AlgorithmConfig) -> bool:
    """Whether a token of advantage 0 has no gradient: nothing but the advantage pulls at it."""
    with_kl = algorithm.kl_coefficient > 0 and algorithm.kl_in == "loss"
    with_penalty = algorithm.loss == "dppo_mask" and algorithm.dppo_penalty > 0
    return not with_kl and not with_penalty and algorithm.entropy_coefficient == 0


def group_metrics(rewards: np.ndarray, judged: np.ndarray | None = None) -> dict[str, float]:
    """Of rewards [P, G]: what they are, how far they differ, and the share of groups from which nothing can be learnt.

    `reward/std` is of all rewards, `reward/group_std` the mean over groups of their own, ddof 1 as in the advantages.
    Groups are all 0, all 1, or mixed (prime-rl's `solved_none`, `solved_all`, `solved_some`).
    `reward/missing_fraction` is the share that is not `judged` ([P, G] bool; None: all are), which no other counts.
    """
    there = np.ones(rewards.shape, bool) if judged is None else judged
    given = rewards[there] if there.any() else np.zeros(1)
    whole = there.sum(axis=1) >= min(rewards.shape[1], 2)
    within = rewards[whole].std(
        axis=1,
        ddof=min(rewards.shape[1] - 1, 1),  # of a single reward: 0
        dtype=np.float64,
        where=there[whole],
    )
    known = there.any(axis=1)
    all_zero = known & (rewards.max(axis=1, where=there, initial=-np.inf) <= 0)
    all_one = known & (rewards.min(axis=1, where=there, initial=np.inf) >= 1)
    return {
        "reward/mean": float(given.mean(dtype=np.float64)),
        "reward/std": float(given.std(ddof=1, dtype=np.float64)) if given.size > 1 else 0.0,
        "reward/min": float(given.min()),
        "reward/max": float(given.max()),
        "reward/group_std": float(within.mean()) if within.size else 0.0,
        "reward/zero_spread_group_fraction": float(np.mean(~has_spread(rewards, there))),
        "reward/all_zero_group_fraction": float(all_zero.mean()),
        "reward/all_one_group_fraction": float(all_one.mean()),
        "reward/mixed_group_fraction": float(np.mean(known & ~all_zero & ~all_one)),
        "reward/missing_fraction": float(np.mean(~there)),
    }


def advantage_metrics(advantages: np.ndarray, lengths: np.ndarray) -> dict[str, Metric]:
    """Of advantages [P, G] of completions of `lengths` [P, G] that count: the mean is over their tokens, as verl's."""
    counted = advantages[lengths > 0]
    return {
        "advantage/mean": WeightedMean(float((advantages * lengths).sum(dtype=np.float64)), int(lengths.sum())),
        "advantage/min": Min(float(counted.min(initial=np.inf))),
        "advantage/max": Max(float(counted.max(initial=-np.inf)) if counted.size else 0.0),
    }
