"""Supervised warm start: completion-only cross-entropy on the records' `solution`, because a base model has to come
from somewhere. Same records, model, optimizer and clipping as GRPO."""

import dataclasses
import logging
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rljax.config import Architecture, ConfigError, OptimizerConfig, RunConfig
from rljax.data.pipeline import with_system
from rljax.data.records import read_records
from rljax.data.reuse import make_plan
from rljax.hosts import to_devices
from rljax.mesh import microbatch_sharding, num_row_shards
from rljax.metrics import WeightedMean, to_floats
from rljax.models.lora import attach
from rljax.models.qwen2 import Params
from rljax.policy import Policy, open_policy
from rljax.rl.head import Metrics, batch_loss
from rljax.rl.learner import fresh_state, state_shapes
from rljax.rl.memory import choose_remat
from rljax.rl.optimizer import apply_gradients
from rljax.rl.packing import filled_rows, microbatches, pack, row_shape
from rljax.rl.update import Compute, sum_over_microbatches
from rljax.types import PromptRecord, TrainBatch, TrainState

logger = logging.getLogger(__name__)


@partial(jax.jit, static_argnames=("arch", "optimizer", "compute"), donate_argnames="state")
def sft_update(
    state: TrainState,
    batch: TrainBatch,
    num_microbatches: jax.Array,
    base: Params | None = None,
    *,
    arch: Architecture,
    optimizer: OptimizerConfig,
    compute: Compute,
) -> tuple[TrainState, Metrics]:
    """One optimizer update on the weighted negative log-likelihood of the first `num_microbatches` ([] int32) of
    `batch` ([M, b, T] leaves). `base` is as in `grpo_update`."""

    def loss(logprobs: jax.Array, entropies: jax.Array, rows: TrainBatch) -> tuple[jax.Array, Metrics]:
        del entropies
        total = -jnp.sum(logprobs * rows.weights)
        return total, {"sft/loss": WeightedMean(total, jnp.sum(rows.weights))}

    def whole_loss(trained: Params, rows: TrainBatch) -> tuple[jax.Array, Metrics]:
        return batch_loss(
            loss,
            attach(base, trained, compute.lora_scale),
            arch,
            rows,
            by_token=True,
            train_head=base is None,
            temperature=1.0,
            compute_dtype=compute.dtype,
            remat=compute.remat,
            head_dtype=compute.head_dtype,
        )

    def gradient(rows: TrainBatch) -> tuple[Params, Metrics]:
        return jax.grad(whole_loss, has_aux=True)(state.params, rows)

    grads, metrics = sum_over_microbatches(gradient, batch, num_microbatches)
    state, applied = apply_gradients(state, grads, optimizer, batch.loss_mask.sum(dtype=jnp.int32))
    return state, metrics | applied


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its worked answer as ids, the stop token included: or stopping would never be learnt."""

    prompt: np.ndarray  # [p] int32
    completion: np.ndarray  # [c] int32


def encode_examples(records: list[PromptRecord], policy: Policy, max_tokens: int) -> list[Example]:
    """Examples that fit `max_tokens`, in order; what is dropped is counted in the log.

    Raises:
      ConfigError: a record has no solution, or none fits.
    """
    examples = []
    for place, record in enumerate(records):
        if not record.solution:
            raise ConfigError(
                f"record {place} ({record.data_source}) has no solution to learn from; supervised fine-tuning needs "
                'a "solution" (or extra_info.answer) in every record of data.train'
            )
        prompt = policy.tokenizer.encode_chat(record.prompt)
        completion = [*policy.tokenizer.encode(record.solution), policy.tokenizer.stop_ids[0]]
        if len(prompt) + len(completion) <= max_tokens:
            examples.append(Example(np.array(prompt, np.int32), np.array(completion, np.int32)))
    if len(examples) < len(records):
        dropped = len(records) - len(examples)
        logger.warning("dropped %d of %d examples longer than sft.max_tokens = %d", dropped, len(records), max_tokens)
    if not examples:
        raise ConfigError(f"no example has at most sft.max_tokens = {max_tokens} tokens; raise it")
    return examples


def sft_batch(examples: list[Example], row_length: int) -> TrainBatch:
    """Rows [n, row_length] of NumPy arrays with token-mean weights; the fields only GRPO reads are 0."""
    lengths = np.array([[len(e.prompt), len(e.completion)] for e in examples])
    packing = pack(lengths[:, 0], lengths[:, 1:], row_length)
    rows = filled_rows(packing, [e.prompt for e in examples], np.concatenate([e.completion for e in examples]))
    zeros = np.zeros(rows["tokens"].shape, np.float32)
    unused = dict.fromkeys(("advantages", "old_logprobs", "behaviour_logprobs", "reference_logprobs"), zeros)
    weights = rows["loss_mask"] / np.float32(lengths[:, 1].sum())
    return TrainBatch(**rows, **unused, weights=weights)  # type: ignore[arg-type]


def sft(config: RunConfig) -> Path:
    """Fine-tunes the policy of `config` for `sft.steps` steps and writes a Hugging Face folder; returns it."""
    policy = open_policy(config)
    settings = config.sft
    if not config.data.train:
        raise ConfigError("data.train is empty; give a .parquet or .jsonl file, or task:char_count")
    records = read_records(config.data.train, seed=config.data.seed, task_records=config.data.task_records)
    records = with_system(records, config.data.system_prompt)
    examples = encode_examples(records, policy, settings.max_tokens)
    needed = settings.steps * settings.batch_size
    plan = make_plan(len(examples), order="shuffle", seed=config.seed, repeats=max(1, -(-needed // len(examples))))
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
    )
    shapes = state_shapes(policy.trained_shapes, optimizer, policy.mesh)
    base = policy.load_base(config.seed)
    state = fresh_state(policy.fresh_trained(config.seed), shapes, optimizer)
    longest = max(len(example.prompt) + len(example.completion) for example in examples)
    shape = row_shape(
        policy.arch,
        # Examples share nothing; what costs a row is the room at its end that none fits, about half a longest one.
        longest // 2,
        longest - longest // 2,
        group_size=settings.batch_size,
        completions=settings.batch_size,
        row_shards=num_row_shards(policy.mesh),
        microbatch_tokens=config.algorithm.microbatch_tokens,
        platform=policy.mesh.devices.flat[0].platform,
    )
    trained_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    remat = choose_remat(config.model.remat, policy.arch, policy.mesh, shape, policy.compute_dtype, trained_params)
    compute = Compute(policy.compute_dtype, remat.rung, lora_scale=config.lora.scale, head_dtype=policy.head_dtype)
    started = time.perf_counter()
    for step in range(1, settings.steps + 1):
        places = range((step - 1) * settings.batch_size, step * settings.batch_size)
        batch = sft_batch([examples[plan.record_index(place)] for place in places], shape.positions)
        batch, in_use = microbatches(batch, shape)
        batch = to_devices(batch, microbatch_sharding(policy.mesh))
        with jax.set_mesh(policy.mesh):
            state, metrics = sft_update(
                state, batch, np.int32(in_use), base, arch=policy.arch, optimizer=optimizer, compute=compute
            )
        if step % max(1, settings.steps // 10) == 0 or step == settings.steps:
            floats = to_floats(metrics)
            seconds = time.perf_counter() - started
            logger.info("sft step %d/%d  loss %.4f  %.1f s", step, settings.steps, floats["sft/loss"], seconds)
            if int(state.skipped) == int(state.updates):
                raise FloatingPointError(
                    "every update so far had a gradient that is not finite; lower sft.learning_rate"
                )
    folder = Path(settings.output or Path(config.run_dir) / "sft")
    policy.export(attach(base, state.params, compute.lora_scale), folder)
    logger.info("wrote %s", folder)
    return folder
