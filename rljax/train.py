"""A GRPO run: the loop, and what it needs around it.

One step: prompts -> rollouts -> rewards -> advantages -> rows -> updates -> weight sync -> metrics -> checkpoint. It is
a function of (state, prompts, seed, step), so a run stopped anywhere and started again goes on to the same bits.
"""

import dataclasses
import logging
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.checkpoint import CheckpointStore, require_same_config
from rljax.config import ARCHITECTURES, ConfigError, RunConfig
from rljax.config_file import dump_config
from rljax.costs import paper_flops, scaling_params
from rljax.data.pipeline import PromptPipeline, open_pipeline
from rljax.data.records import read_records
from rljax.data.reuse import steps_for
from rljax.evaluate import Evaluation, EvaluationResult, rollout_rows, sample
from rljax.mesh import num_row_shards
from rljax.metrics import CurveRow, Metric, MetricSink, PhaseTimer, Progress, to_floats
from rljax.policy import Policy, memory_gib, open_policy
from rljax.rewards.overlong import soft_overlong
from rljax.rewards.pool import RewardPool, summarise
from rljax.rl.advantages import group_advantages
from rljax.rl.learner import Learner, fresh_state, group_metrics, state_shapes
from rljax.rl.update import Compute
from rljax.sampling.engine import Sampler
from rljax.types import LENGTH, Rollouts

logger = logging.getLogger(__name__)

_TRAIN_DRAWS, _EVALUATION_DRAWS = 1, 2
"""Folded into the run's key, so that training and evaluation never share a draw."""


@dataclasses.dataclass
class Counters:
    """What a run has consumed; saved with every checkpoint."""

    samples: int = 0
    """Prompts."""
    tokens: int = 0
    """Prompt and completion tokens trained on."""
    flops: float = 0.0
    """6 N tokens, the paper's measure."""


@dataclasses.dataclass
class Run:
    """Everything open during a run."""

    config: RunConfig
    policy: Policy
    num_steps: int
    pipeline: PromptPipeline
    learner: Learner
    sampler: Sampler
    pool: RewardPool
    evaluation: Evaluation | None
    store: CheckpointStore | None
    sink: MetricSink
    counters: Counters
    first_step: int
    """0, or the step of the checkpoint the run resumes from."""
    key: jax.Array


def train(config: RunConfig) -> dict[str, float]:
    """Runs or resumes `config`; returns `{"first": pass@1 at step 0, "last": ..., "steps": ...}` where measured.

    Raises:
      ConfigError: the config, the data, the weights or an existing run folder do not allow it.
    """
    started = time.perf_counter()
    policy = open_policy(config)
    pipeline = _open_data(config, policy)
    num_steps = steps_for(pipeline.plan, config.data.prompts_per_step, config.steps)
    evaluation = Evaluation(config, policy.tokenizer) if config.evaluation.data else None
    logger.info("data: %s", pipeline.plan.describe(config.data.prompts_per_step, num_steps))
    logger.info("batch: %s", describe_batch(config, policy))
    with RewardPool(config.reward.workers, config.reward.timeout_seconds) as pool:
        run = _open_run(config, policy, pipeline, num_steps, evaluation, pool)
        try:
            if run.first_step == 0 and evaluation is not None:
                result = _evaluate(run, 0)
                run.sink.log(0, result.metrics)
                logger.info("step 0/%d  pass@1 %.3f before training", num_steps, result.pass_at_1)
            with Progress(num_steps, first_step=run.first_step) as progress:
                for step in range(run.first_step + 1, num_steps + 1):
                    floats = _step(run, step)
                    run.sink.log(step, floats)
                    progress.step(step, floats)
        finally:
            pipeline.close()
            run.sink.close()
            if run.store is not None:
                run.store.close()
    logger.info("%d steps in %.0f s", num_steps - run.first_step, time.perf_counter() - started)
    return run_summary(config.run_dir, num_steps)


def describe_batch(config: RunConfig, policy: Policy) -> str:
    """Every derived batch number in one line, in completions."""
    prompts, group, updates = (
        config.data.prompts_per_step,
        config.algorithm.group_size,
        config.algorithm.updates_per_step,
    )
    shards = num_row_shards(policy.mesh)
    return (
        f"{prompts} prompts x {group} = {prompts * group} completions per step, {updates} updates of "
        f"{prompts * group // updates}; {shards} row shard{'s' * (shards > 1)}, at most "
        f"{config.algorithm.microbatch_tokens} tokens each per micro-batch; {policy.compute_dtype} compute"
    )


def run_summary(run_dir: str | Path, num_steps: int) -> dict[str, float]:
    """First and last pass@1 of a run folder's curves.csv."""
    import csv

    summary: dict[str, float] = {"steps": num_steps}
    curves = Path(run_dir) / "curves.csv"
    if curves.is_file():
        with curves.open(newline="") as lines:
            losses = [float(row["test_loss"]) for row in csv.DictReader(lines)]
        if losses:
            summary |= {"first": 1 - losses[0], "last": 1 - losses[-1]}
    return summary


# --------------------------------------------------------------------------------------------------------------- open


def _open_data(config: RunConfig, policy: Policy) -> PromptPipeline:
    if not config.data.train:
        raise ConfigError("data.train is empty; give a .parquet or .jsonl file, a dataset folder, or task:char_count")
    records = read_records(config.data.train, seed=config.data.seed, task_records=config.data.task_records)
    return open_pipeline(records, policy.tokenizer, config.data)


def _open_run(
    config: RunConfig,
    policy: Policy,
    pipeline: PromptPipeline,
    num_steps: int,
    evaluation: Evaluation | None,
    pool: RewardPool,
) -> Run:
    shapes = state_shapes(policy.shapes, config.optimizer, policy.mesh)
    folder = Path(config.run_dir)
    store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep) if config.checkpoint.every else None
    counters, first_step = Counters(), 0
    if store is not None and store.latest_step() is not None:
        state, host, first_step = store.restore(shapes)
        require_same_config(host["config"], dataclasses.asdict(config))
        pipeline.set_state(host["data"])
        counters = Counters(**host["counters"])
        logger.info("resuming %s after step %d", config.run_dir, first_step)
        params = policy.load_params(config.seed) if config.algorithm.kl_coefficient > 0 else None
    else:
        params = policy.load_params(config.seed)
        state = fresh_state(params, shapes, config.optimizer)
    reference = None
    if config.algorithm.kl_coefficient > 0:
        reference = jax.jit(lambda p: jax.tree.map(lambda x: x.astype(policy.compute_dtype), p))(params)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    sampler = policy.sampler(config.sampling)
    sampler.sync(state.params)
    return Run(
        config=config,
        policy=policy,
        num_steps=num_steps,
        pipeline=pipeline,
        learner=Learner(
            state,
            reference,
            policy.arch,
            policy.mesh,
            config.algorithm,
            config.optimizer,
            Compute(policy.compute_dtype, config.model.remat, config.sampling.temperature),
        ),
        sampler=sampler,
        pool=pool,
        evaluation=evaluation,
        store=store,
        sink=MetricSink(
            folder,
            tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb,
            resume_step=first_step if first_step else None,
        ),
        counters=counters,
        first_step=first_step,
        key=jax.random.key(config.seed),
    )


# --------------------------------------------------------------------------------------------------------------- step


def _step(run: Run, step: int) -> dict[str, float]:
    """One step; returns its metrics as floats."""
    config, timer = run.config, PhaseTimer()
    with timer("step"):
        with timer("data"):
            prompts = next(run.pipeline)
        with timer("sample"):
            sampling = sample(
                run.sampler,
                prompts,
                config.algorithm.group_size,
                run.policy.tokenizer,
                run.pool,
                config.reward.name,
                key=jax.random.fold_in(run.key, _TRAIN_DRAWS),
                temperature=config.sampling.temperature,
                max_completion_tokens=config.sampling.max_completion_tokens,
            )
        with timer("reward"):  # what is left of it: groups are scored while others are being decoded
            scored = sampling.wait()
        rollouts, rewards, sampled = scored.rollouts, scored.rewards, run.sampler.stats
        with timer("update"):
            advantages, penalty = _advantages(run, rollouts, rewards)
            metrics = to_floats(run.learner.step(rollouts, advantages) | penalty | group_metrics(rewards))
        with timer("sync"):
            run.sampler.sync(run.learner.state.params)
            run.sampler.block_until_ready()
        completion_tokens = int(rollouts.lengths.sum())
        _count(run, completion_tokens + int(prompts.lengths.sum()) * config.algorithm.group_size)
        if run.evaluation is not None and _is_due(step, config.evaluation.every, run.num_steps):
            with timer("evaluate"):
                metrics |= _evaluate(run, step).metrics
        if run.store is not None and _is_due(step, config.checkpoint.every, run.num_steps):
            with timer("checkpoint"):
                run.store.save(step, run.learner.state, _host_state(run))
    if config.logging.rollouts:
        run.sink.write_rollouts(step, rollout_rows(scored, config.logging.rollouts))
    seconds = timer.take()
    return {
        **metrics,
        **summarise(scored.verdicts),
        "completion/length_tokens": completion_tokens / len(rollouts.lengths),
        "completion/length_max_tokens": float(rollouts.lengths.max()),
        "completion/truncated_fraction": float(np.mean(rollouts.stop_reasons == LENGTH)),
        "throughput/sampled_tokens_per_second": completion_tokens / seconds["time/sample_seconds"],
        "sampler/live_row_fraction": sampled.live_row_steps / max(sampled.row_steps, 1),
        "sampler/used_slot_fraction": sampled.suffix_slots_used / max(sampled.suffix_slots_read, 1),
        "throughput/sampler_programs": float(sampled.programs),
        "progress/prompts_seen": run.counters.samples,
        "progress/tokens": run.counters.tokens,
        "progress/compute_flops": run.counters.flops,
        **memory_gib(),
        **seconds,
    }


def _advantages(run: Run, rollouts: Rollouts, rewards: np.ndarray) -> tuple[np.ndarray, dict[str, Metric]]:
    """Advantages [P, G] of verified `rewards` [P, G] once length and KL have been taken off them."""
    config, algorithm = run.config.reward, run.config.algorithm
    lengths, metrics = rollouts.lengths.reshape(rewards.shape), {}
    if config.overlong_buffer_tokens:
        cap = rollouts.tokens.shape[1]
        rewards = rewards + soft_overlong(lengths, cap, config.overlong_buffer_tokens, config.overlong_penalty)
    if algorithm.kl_in == "reward" and algorithm.kl_coefficient > 0:
        penalty, metrics = run.learner.kl_penalty(rollouts)
        rewards = rewards - penalty
    return group_advantages(
        rewards, lengths, algorithm.advantage, algorithm.advantage_eps, clip=algorithm.advantage_clip
    ), metrics


def _is_due(step: int, every: int, num_steps: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)


def _count(run: Run, tokens: int) -> None:
    run.counters.samples += run.config.data.prompts_per_step
    run.counters.tokens += tokens
    run.counters.flops += paper_flops(_size(run), tokens)


def _size(run: Run) -> float:
    """N of the scaling fits: the size label where the shape is one of the paper's, else the number of parameters."""
    shape = dataclasses.replace(run.policy.arch, num_tokens=0)
    return scaling_params(shape, next((name for name, known in ARCHITECTURES.items() if known == shape), ""))


def _evaluate(run: Run, step: int) -> EvaluationResult:
    assert run.evaluation is not None
    key = jax.random.fold_in(jax.random.fold_in(run.key, _EVALUATION_DRAWS), jnp.uint32(step))
    result = run.evaluation.run(run.sampler, run.pool, key)
    config = run.config
    run.sink.write_curve(
        CurveRow(
            run=Path(config.run_dir).name,
            source="rljax",
            num_params=_size(run),
            step=step,
            samples=run.counters.samples,
            flops=run.counters.flops,
            tokens=run.counters.tokens,
            test_loss=result.metrics["eval/test_loss"],
            unique=run.pipeline.plan.unique,
            repeats=config.data.repeats,
            group_size=config.algorithm.group_size,
            eval=config.evaluation.data,
            seed=config.seed,
        )
    )
    return result


def _host_state(run: Run) -> dict[str, Any]:
    """What a checkpoint holds beside the arrays. Keys are derived from the seed and the step, so none is saved."""
    packages = ("rljax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "config": dataclasses.asdict(run.config),
        "data": run.pipeline.get_state(),
        "counters": dataclasses.asdict(run.counters),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }
