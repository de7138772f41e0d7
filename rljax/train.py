"""A GRPO run: the loop, and what it needs around it.

One step: prompts -> rollouts -> rewards -> advantages -> rows -> updates -> weight sync -> metrics -> checkpoint. It is
a function of (state, prompts, seed, step), so a run stopped anywhere and started again goes on to the same bits.
"""

import dataclasses
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from rljax.checkpoint import CheckpointStore
from rljax.config import ARCHITECTURES, FINISHED, ConfigError, NonFiniteError, RunConfig
from rljax.config_file import dotted, dump_config, require_same_config
from rljax.costs import (
    FlopCount,
    flops_utilisation,
    generation_count,
    num_non_embedding_params,
    num_params,
    paper_flops,
    scaling_params,
)
from rljax.data.pipeline import PromptPipeline, open_pipeline
from rljax.data.records import read_records
from rljax.data.reuse import steps_for
from rljax.evaluate.held_out import Evaluation, EvaluationResult, rollout_rows, sample
from rljax.evaluate.shared import Scored, join_scored
from rljax.hosts import Preempted, Preemption, exchange
from rljax.mesh import num_row_shards
from rljax.metrics import Metric, PhaseTimer, merge, to_floats
from rljax.models.lora import attach
from rljax.policy import Policy, memory_gib, open_policy
from rljax.rewards.overlong import soft_overlong
from rljax.rewards.pool import summarise
from rljax.rewards.scorer import RewardFunction, Scorer, hack_metrics, open_scorer
from rljax.rl.advantages import group_advantages, groups_to_train_on, has_spread
from rljax.rl.learner import (
    Learner,
    checkpoint_shapes,
    flop_metrics,
    fresh_state,
    group_metrics,
    reference_copy,
    reference_dtype,
    state_shapes,
    update_shape,
)
from rljax.rl.memory import choose_remat
from rljax.rl.update import Compute
from rljax.run_log import ALIASES, CurveRow, MetricSink, Progress
from rljax.sampling.engine import Sampler
from rljax.sampling.schedule import Stats
from rljax.types import LENGTH, Rollouts, TrainState, select_prompts
from rljax.watchdog import Watchdog

logger = logging.getLogger(__name__)

Forecaster = Callable[[str, int], Mapping[str, float]]
"""(run folder, steps of the whole run) -> metrics."""

_TRAIN_DRAWS, _EVALUATION_DRAWS = 1, 2
"""Folded into the run's key, so that training and evaluation never share a draw."""


@dataclasses.dataclass
class Counters:
    """What a run has consumed; saved with every checkpoint."""

    samples: int = 0
    """Prompts taken from the stream, with those that dynamic sampling does not train on."""
    tokens: int = 0
    """Prompt tokens, once per completion, and completion tokens trained on."""
    sampled_tokens: int = 0
    """The same of everything sampled."""
    flops: float = 0.0
    """6 N tokens trained on, the paper's measure."""
    full_flops: float = 0.0
    """What sampling, rescoring and updates computed, attention and head included."""
    full_flops_non_embedding: float = 0.0
    """The same without the head."""


@dataclasses.dataclass
class Run:
    """Everything open during a run."""

    config: RunConfig
    policy: Policy
    num_steps: int
    pipeline: PromptPipeline
    learner: Learner
    sampler: Sampler
    scorer: Scorer
    evaluation: Evaluation | None
    store: CheckpointStore | None
    sink: MetricSink
    counters: Counters
    accelerator_seconds: float
    """Devices x seconds of all steps so far. Not among the counters: those come out the same again."""
    first_step: int
    """0, or the step of the checkpoint the run resumes from."""
    key: jax.Array
    saved_step: int = 0
    """Of the last checkpoint that this start of the run began to write; 0: none."""
    nonfinite_steps: int = 0
    """Steps since one with an update whose gradient was finite."""

    def check_finite(self, step: int, floats: Mapping[str, float]) -> None:
        """Counts such steps.

        Raises:
          NonFiniteError: too many in a row. Nothing was learnt in them, so what was saved since is as good as before.
        """
        everything = floats["policy/nonfinite_updates"] >= self.config.algorithm.updates_per_step
        self.nonfinite_steps = self.nonfinite_steps + 1 if everything else 0
        limit = self.config.optimizer.max_nonfinite_steps
        if 0 < limit <= self.nonfinite_steps:
            raise NonFiniteError(
                f"no update of steps {step - limit + 1} to {step} had a finite gradient: nothing is learnt any more; "
                f"their completions are in {self.config.run_dir}/rollouts. A smaller optimizer.learning_rate may help, "
                "or algorithm.kl_coefficient; optimizer.max_nonfinite_steps = 0 lets a run go on"
            )


def train(
    config: RunConfig, *, reward: RewardFunction | None = None, forecast: Forecaster | None = None
) -> dict[str, float]:
    """Runs or resumes `config`; returns `{"first": pass@1 at step 0, "last": ..., "steps": ...}` where measured.

    Args:
      reward: fn(response, ground_truth, extra_info) -> reward in [0, 1], or a coroutine function, in the place of the
        verifiers, in training and evaluation. It runs in this process: `reward.file` is the safer way.
      forecast: called after each evaluation; what it returns is logged with the step, as
        `rljax.scaling.forecast.forecast_metrics` does.

    Raises:
      ConfigError: the config, the data, the weights or an existing run folder do not allow it.
      Preempted: a SIGTERM came, to this or to another process of the run, and the step was saved. A `SystemExit`.
      NonFiniteError: no update of the last `optimizer.max_nonfinite_steps` steps had a finite gradient.
    """
    started = time.perf_counter()
    policy = open_policy(config)
    pipeline = _open_data(config, policy)
    _require_agreement(config, pipeline)
    num_steps = steps_for(pipeline.plan, config.data.prompts_per_step, config.steps)
    evaluation = Evaluation(config, policy.tokenizer) if config.evaluation.data else None
    logger.info("data: %s", pipeline.plan.describe(config.data.prompts_per_step, num_steps))
    if config.algorithm.dynamic_sampling_rounds:
        logger.info("data: dynamic sampling takes prompts from later steps, and the run ends when they are used up")
    for line in batch_table(config, policy, pipeline.slots):
        logger.info(line)
    if config.lora.rank:
        logger.info("lora: %s", describe_adapter(policy))
    with open_scorer(config.reward, reward) as scorer:
        scorer.check(pipeline.data_sources | (evaluation.data_sources if evaluation is not None else set()))
        run = _open_run(config, policy, pipeline, num_steps, evaluation, scorer)
        last_step = run.first_step
        try:
            if run.first_step == 0 and evaluation is not None:
                result = _evaluate(run, 0)
                run.sink.log(0, result.metrics)
                logger.info("step 0/%d  pass@1 %.3f before training", num_steps, result.pass_at_1)
            with (
                Progress(num_steps, first_step=run.first_step) as progress,
                Preemption() as preemption,
                Watchdog(config.watchdog_seconds if jax.process_count() > 1 else 0) as watchdog,
            ):
                for step in range(run.first_step + 1, num_steps + 1):
                    if run.pipeline.is_exhausted:  # dynamic sampling took what later steps would have had
                        logger.info("the prompts are used up: the run ends after step %d of %d", last_step, num_steps)
                        break
                    floats = _step(run, step, PhaseTimer(watchdog.enter))
                    if forecast is not None and jax.process_index() == 0 and "eval/test_loss" in floats:
                        floats |= forecast(config.run_dir, num_steps)
                    run.sink.log(step, floats)
                    progress.step(step, floats)
                    last_step = step
                    run.check_finite(step, floats)
                    if preemption.reached(step) and step < num_steps and not run.pipeline.is_exhausted:
                        watchdog.enter("last checkpoint")
                        _stop(run, step)
        finally:
            pipeline.close()
            run.sink.close()
            if run.store is not None:
                run.store.close()
    if jax.process_index() == 0:
        (Path(config.run_dir) / FINISHED).write_text(json.dumps({"step": last_step}) + "\n")
    logger.info("%d steps in %.0f s", last_step - run.first_step, time.perf_counter() - started)
    return run_summary(config.run_dir, last_step)


def batch_table(config: RunConfig, policy: Policy, prompt_slots: int) -> list[str]:
    """Lines of a table with every derived batch number, counted in completions, prompts and tokens.

    Args:
      prompt_slots: tokens of the longest prompt, as the pipeline rounds them.
    """
    algorithm, prompts, cap = config.algorithm, config.data.prompts_per_step, config.sampling.max_completion_tokens
    group, updates, shards = algorithm.group_size, algorithm.updates_per_step, num_row_shards(policy.mesh)
    part = prompts // updates
    shape = update_shape(policy.arch, policy.mesh, algorithm, part, prompt_slots, cap)
    in_row, group_tokens = (shape.positions - prompt_slots) // cap, prompt_slots + group * cap

    def line(name: str, count: int, note: str) -> tuple[str, str, str, str, str]:
        return name, f"{count * group:,}", f"{count:,}", f"{count * group_tokens:,}", note

    def rows(name: str, count: int, note: str) -> tuple[str, str, str, str, str]:
        return name, f"{count * in_row:,}", "", f"{count * shape.positions:,}", note

    rounds = 1 + algorithm.dynamic_sampling_rounds
    table = [
        ("batch", "completions", "prompts", "tokens", f"each of the longest; {policy.compute_dtype} compute"),
        line("group", 1, ""),
        *([line("sampled in a step", prompts * rounds, f"at most, in {rounds} rounds")] if rounds > 1 else []),
        line("step", prompts, f"{updates} update{'s' * (updates > 1)}"),
        line("update", part, f"at most {shape.num_microbatches:,} micro-batches"),
        rows("micro-batch", shape.rows, f"{shape.rows:,} rows x {shape.positions:,} positions"),
        rows("row shard", shape.rows // shards, f"{shards} in all, {shape.rows // shards:,} rows each"),
    ]
    wide = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [cells[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(cells[1:4], wide[1:4], strict=True)), cells[4]]
        ).rstrip()
        for cells in table
    ]


def describe_adapter(policy: Policy) -> str:
    """How much of the model an adapter trains, in one line."""
    trained, whole = (sum(s.size for s in jax.tree.leaves(tree)) for tree in (policy.trained_shapes, policy.shapes))
    lora = policy.lora
    return f"rank {lora.rank}, scale {lora.scale:g}, on {', '.join(lora.targets)}: {trained:,} of {whole:,} parameters"


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


def _require_agreement(config: RunConfig, pipeline: PromptPipeline) -> None:
    """Raises ConfigError where a process of the run was given other settings, or reads other data, than process 0."""
    mine = {"config": dataclasses.asdict(config), "data": pipeline.get_state()["fingerprint"]}
    first, *others = (dotted(json.loads(each)) for each in exchange(json.dumps(mine).encode()))
    for process, other in enumerate(others, 1):
        lines = [f"{name}: {first[name]} -> {other.get(name)}" for name in first if first[name] != other.get(name)]
        if lines:
            raise ConfigError(
                f"process {process} is not doing the run of process 0 (0 -> {process}): {'; '.join(lines)}; give every "
                "process the same settings and files"
            )


def _open_run(
    config: RunConfig,
    policy: Policy,
    pipeline: PromptPipeline,
    num_steps: int,
    evaluation: Evaluation | None,
    scorer: Scorer,
) -> Run:
    shapes = state_shapes(policy.trained_shapes, config.optimizer, policy.mesh)
    folder = Path(config.run_dir)
    store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep) if config.checkpoint.every else None
    counters, seconds, first_step, reference = Counters(), 0.0, 0, None
    algorithm = config.algorithm
    base, with_kl = policy.load_base(config.seed), algorithm.kl_coefficient > 0
    if store is not None and store.latest_step() is not None:
        saved, host, first_step = store.restore(checkpoint_shapes(shapes, config.algorithm, policy.head_dtype))
        require_same_config(host["config"], dataclasses.asdict(config))
        pipeline.set_state(host["data"])
        counters, seconds = Counters(**host["counters"]), host["accelerator_seconds"]
        logger.info("resuming %s after step %d", config.run_dir, first_step)
        reference = saved.pop("reference", None)
        state = TrainState(**saved)
        params = policy.load_params(config.seed) if with_kl and base is None and reference is None else None
        if config.model.remat == "auto":  # another rung would round otherwise
            config = _with_remat(config, host["config"]["model"]["remat"])
    else:
        params = policy.fresh_trained(config.seed)
        state = fresh_state(params, shapes, config.optimizer)
    if with_kl and base is not None:
        reference = base
    elif with_kl and params is not None:
        reference = reference_copy(params, reference_dtype(config.algorithm, policy.head_dtype))
    del params  # state and reference have copies, and what is free from here on is a rollout's or an update's
    jax.block_until_ready((state, reference))
    prompts, cap = config.data.prompts_per_step // algorithm.updates_per_step, config.sampling.max_completion_tokens
    remat = choose_remat(
        config.model.remat,
        policy.arch,
        policy.mesh,
        update_shape(policy.arch, policy.mesh, algorithm, prompts, pipeline.slots, cap),
        policy.compute_dtype,
        sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    ).rung
    config = _with_remat(config, remat)
    sampler = policy.sampler(config.sampling)  # its weights are not there while an update runs
    sampler.sync(attach(base, state.params, config.lora.scale))
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FINISHED).unlink(missing_ok=True)  # first: it would speak of what the next line replaces
        (folder / "config.yaml").write_text(dump_config(config))
    compute = Compute(
        policy.compute_dtype, remat, config.sampling.temperature, config.lora.scale, head_dtype=policy.head_dtype
    )
    learner = Learner(
        state, reference, policy.arch, policy.mesh, config.algorithm, config.optimizer, compute, base=base
    )
    learner.prepare(config.data.prompts_per_step, pipeline.slots, cap)
    return Run(
        config=config,
        policy=policy,
        num_steps=num_steps,
        pipeline=pipeline,
        learner=learner,
        sampler=sampler,
        scorer=scorer,
        evaluation=evaluation,
        store=store,
        sink=MetricSink(
            folder,
            tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb,
            aliases=ALIASES[config.logging.aliases],
            resume_step=first_step if first_step else None,
        ),
        counters=counters,
        accelerator_seconds=seconds,
        first_step=first_step,
        key=jax.random.key(config.seed),
    )


def _with_remat(config: RunConfig, remat: Any) -> RunConfig:
    """`config` with a rung in the place of "auto": what config.yaml and the checkpoints say."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


# --------------------------------------------------------------------------------------------------------------- step


@dataclasses.dataclass(frozen=True)
class Collected:
    """What a step sampled, and what of it is trained on: all of it, unless dynamic sampling is on."""

    sampled: Scored
    rollouts: Rollouts
    """Of `data.prompts_per_step` prompts, to train on."""
    rewards: np.ndarray  # [P, G] float32, of `rollouts`
    judged: np.ndarray  # [P, G] bool, of `rollouts`: the others have no reward
    stats: list[Stats]
    """Of each round, of each process."""
    metrics: dict[str, float]


def _collect(run: Run, timer: PhaseTimer) -> Collected:
    """A round of prompts; with dynamic sampling, further ones until enough groups have a spread or none may follow.

    The spread is that of the verifiers' rewards, before length and KL are taken off them.
    """
    config, algorithm = run.config, run.config.algorithm
    wanted, most = config.data.prompts_per_step, 1 + algorithm.dynamic_sampling_rounds
    parts: list[Scored] = []
    stats: list[Stats] = []
    found = 0
    while len(parts) < most and found < wanted and not run.pipeline.is_exhausted:
        with timer("data"):
            prompts = next(run.pipeline)
        with timer("sample"):
            sampling = sample(
                run.sampler,
                prompts,
                algorithm.group_size,
                run.policy.tokenizer,
                run.scorer,
                both_modes=config.reward.hack_meter,
                key=jax.random.fold_in(run.key, _TRAIN_DRAWS),
                temperature=config.sampling.temperature,
                max_completion_tokens=config.sampling.max_completion_tokens,
            )
        with timer("reward"):  # what is left of it: groups are scored while others are being decoded
            parts.append(sampling.wait())
        stats.extend(_stats_of_all(run.sampler))
        found += int(has_spread(parts[-1].rewards, _judged(run, parts[-1])).sum())
    sampled = parts[0] if len(parts) == 1 else join_scored(parts)
    judged = _judged(run, sampled)
    if most == 1:
        return Collected(sampled, sampled.rollouts, sampled.rewards, judged, stats, {})
    places = groups_to_train_on(sampled.rewards, wanted, judged)
    metrics = {
        "dynamic_sampling/rounds": float(len(parts)),
        "dynamic_sampling/prompts": float(len(sampled.rewards)),
        "dynamic_sampling/kept_group_fraction": min(found, wanted) / len(sampled.rewards),
        "dynamic_sampling/missing_groups": float(max(wanted - found, 0)),  # others, without a spread, fill up
    }
    rollouts = select_prompts(sampled.rollouts, places)
    return Collected(sampled, rollouts, sampled.rewards[places], judged[places], stats, metrics)


def _stats_of_all(sampler: Sampler) -> list[Stats]:
    """Those of every process, the shapes decoded in left out; of processes in lockstep the first one's."""
    counts = {name: count for name, count in vars(sampler.stats).items() if name != "shapes"}
    tells = jax.process_index() == sampler.processes[0]
    return [Stats(**json.loads(each)) for each in exchange(json.dumps(counts).encode() if tells else b"") if each]


def _judged(run: Run, scored: Scored) -> np.ndarray:
    """[P, G] bool: which rewards count. In mode paper all do: its code gave 0 for whatever went wrong."""
    return scored.judged | (run.config.reward.mode == "paper")


def _step(run: Run, step: int, timer: PhaseTimer) -> dict[str, float]:
    """One step; returns its metrics as floats: of rewards and completions, those of everything sampled."""
    config, started = run.config, time.perf_counter()
    with timer("step"):
        collected = _collect(run, timer)
        sampled, rollouts = collected.sampled, collected.rollouts
        with timer("update"):
            advantages, penalty = _advantages(run, collected)
            generation = flop_metrics(generation=_generation(run, sampled.rollouts))
            run.sampler.release()
            metrics = to_floats(merge(merge(run.learner.step(rollouts, advantages), penalty), generation))
            run.learner.move_reference(step)
        with timer("sync"):
            run.sampler.sync(run.learner.params)
            run.sampler.block_until_ready()
        _count(run, sampled.rollouts, rollouts, metrics)
        run.accelerator_seconds += (time.perf_counter() - started) * run.policy.mesh.size
        is_last = step == run.num_steps or run.pipeline.is_exhausted
        if run.evaluation is not None and (is_last or _is_due(step, config.evaluation.every)):
            with timer("evaluate"):
                metrics |= _evaluate(run, step).metrics
        if is_last or _is_due(step, config.checkpoint.every):
            with timer("checkpoint"):
                _save(run, step)
    shown = sampled.rewards.size if metrics["policy/nonfinite_updates"] else config.logging.rollouts
    if shown:
        run.sink.write_rollouts(step, rollout_rows(sampled, shown))
    seconds = timer.take()
    return {
        **metrics,
        **group_metrics(sampled.rewards, _judged(run, sampled)),
        **summarise(sampled.verdicts),
        **hack_metrics(sampled.verdicts, sampled.others, run.scorer.mode),
        **collected.metrics,
        **_length_metrics(sampled.rollouts),
        **_throughput(run, collected, metrics["learner/model_flops"], seconds),
        **_sampler_metrics(collected.stats),
        "progress/prompts_seen": run.counters.samples,
        "progress/tokens": run.counters.tokens,
        "progress/sampled_tokens": run.counters.sampled_tokens,
        "progress/compute_flops": run.counters.flops,
        "progress/full_flops": run.counters.full_flops,
        "progress/full_flops_non_embedding": run.counters.full_flops_non_embedding,
        "progress/accelerator_seconds": run.accelerator_seconds,
        **memory_gib(),
        **seconds,
    }


def _length_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Of prompts, completions, and those completions that were not cut at the cap (0 where all were)."""
    prompts, stopped = rollouts.prompts.lengths, rollouts.lengths[rollouts.stop_reasons != LENGTH]
    stopped = stopped if stopped.size else np.zeros(1, int)
    return {
        "prompt/length_tokens": float(prompts.mean()),
        "prompt/length_min_tokens": float(prompts.min()),
        "prompt/length_max_tokens": float(prompts.max()),
        "completion/length_tokens": float(rollouts.lengths.mean()),
        "completion/length_min_tokens": float(rollouts.lengths.min()),
        "completion/length_max_tokens": float(rollouts.lengths.max()),
        "completion/stopped_length_tokens": float(stopped.mean()),
        "completion/stopped_length_min_tokens": float(stopped.min()),
        "completion/stopped_length_max_tokens": float(stopped.max()),
        "completion/truncated_fraction": float(np.mean(rollouts.stop_reasons == LENGTH)),
    }


def _throughput(run: Run, collected: Collected, flops: float, seconds: dict[str, float]) -> dict[str, float]:
    """Completion tokens over the phases' seconds, and the step's tokens trained on, prompts included, over the whole.

    Args:
      flops: model FLOPs of the phase `update`, rescoring included.
    """
    mesh, update_seconds = run.policy.mesh, seconds["time/update_seconds"]
    sampled, trained = collected.sampled.rollouts, collected.rollouts
    speeds = {
        "throughput/sampled_tokens_per_second": int(sampled.lengths.sum()) / seconds["time/sample_seconds"],
        "throughput/trained_tokens_per_second": int(trained.lengths.sum()) / update_seconds,
        "throughput/tokens_per_second_per_device": _tokens(trained) / seconds["time/step_seconds"] / mesh.size,
    }
    kind = mesh.devices.flat[0].device_kind
    share = flops_utilisation(flops, update_seconds, kind, mesh.size, run.policy.compute_dtype)
    return speeds if share is None else speeds | {"throughput/update_mfu": share}


def _sampler_metrics(stats: list[Stats]) -> dict[str, float]:
    """Of one step's rounds, of all processes."""
    rows, slots = sum(s.row_steps for s in stats), sum(s.suffix_slots_read for s in stats)
    return {
        "sampler/live_row_fraction": sum(s.live_row_steps for s in stats) / max(rows, 1),
        "sampler/used_slot_fraction": sum(s.suffix_slots_used for s in stats) / max(slots, 1),
        "throughput/sampler_programs": float(max(s.programs for s in stats)),
    }


def _advantages(run: Run, collected: Collected) -> tuple[np.ndarray, dict[str, Metric]]:
    """Advantages [P, G] of the verified rewards once length and KL have been taken off them."""
    config, algorithm = run.config.reward, run.config.algorithm
    rollouts, rewards = collected.rollouts, collected.rewards
    lengths, metrics = rollouts.lengths.reshape(rewards.shape), {}
    if config.overlong_buffer_tokens:
        cap = rollouts.tokens.shape[1]
        rewards = rewards + soft_overlong(lengths, cap, config.overlong_buffer_tokens, config.overlong_penalty)
    if algorithm.kl_in == "reward" and algorithm.kl_coefficient > 0:
        penalty, metrics = run.learner.kl_penalty(rollouts)
        rewards = rewards - penalty
    advantages = group_advantages(
        rewards,
        lengths,
        algorithm.advantage,
        algorithm.advantage_eps,
        clip_low=algorithm.advantage_clip_low,
        clip_high=algorithm.advantage_clip_high,
        judged=collected.judged,
    )
    return advantages, metrics


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _generation(run: Run, sampled: Rollouts) -> FlopCount:
    lengths = sampled.lengths.reshape(len(sampled.prompts), sampled.group_size)
    return generation_count(run.policy.arch, sampled.prompts.lengths, lengths)


def _count(run: Run, sampled: Rollouts, trained: Rollouts, metrics: dict[str, float]) -> None:
    """Adds a step to the counters; `metrics` are of its learner and sampler, as floats."""
    full = metrics["compute/generation_flops"] + metrics["learner/model_flops"]
    run.counters.full_flops += full
    run.counters.full_flops_non_embedding += full - metrics["compute/head_flops"]
    run.counters.samples += len(sampled.prompts)
    run.counters.tokens += _tokens(trained)
    run.counters.sampled_tokens += _tokens(sampled)
    run.counters.flops += paper_flops(_size(run), _tokens(trained))


def _tokens(rollouts: Rollouts) -> int:
    """Prompt tokens, once per completion, and completion tokens."""
    return int(rollouts.lengths.sum()) + int(rollouts.prompts.lengths.sum()) * rollouts.group_size


def _size(run: Run) -> float:
    """N of the scaling fits: the size label where the shape is one of the paper's, else the number of parameters."""
    shape = dataclasses.replace(run.policy.arch, num_tokens=0)
    return scaling_params(shape, next((name for name, known in ARCHITECTURES.items() if known == shape), ""))


def _evaluate(run: Run, step: int) -> EvaluationResult:
    assert run.evaluation is not None
    key = jax.random.fold_in(jax.random.fold_in(run.key, _EVALUATION_DRAWS), jnp.uint32(step))
    result = run.evaluation.run(run.sampler, run.scorer, key)
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
            order=config.data.order,
            num_non_embedding_params=num_non_embedding_params(run.policy.arch),
            num_total_params=num_params(run.policy.arch),
            full_flops=run.counters.full_flops,
            full_flops_non_embedding=run.counters.full_flops_non_embedding,
            accelerator_seconds=run.accelerator_seconds,
        )
    )
    return result


def _save(run: Run, step: int) -> None:
    """How often each prompt was used, and a checkpoint where the run keeps any."""
    if jax.process_index() == 0:
        run.pipeline.write_exposures(Path(run.config.run_dir) / "exposures.csv")
    if run.store is not None:
        run.store.save(step, run.learner.checkpoint_state(), _host_state(run))
        run.saved_step = step


def _stop(run: Run, step: int) -> NoReturn:
    """Saves, and ends the run before its time."""
    if run.saved_step != step:
        _save(run, step)
    if run.store is not None:
        run.store.wait()
        logger.info("SIGTERM: step %d is saved, and the run stops; the same command resumes it", step)
    else:
        logger.warning("SIGTERM: the run stops after step %d; nothing is saved, for checkpoint.every is 0", step)
    raise Preempted


def _host_state(run: Run) -> dict[str, Any]:
    """What a checkpoint holds beside the arrays. Keys are derived from the seed and the step, so none is saved."""
    packages = ("rljax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "config": dataclasses.asdict(run.config),
        "data": run.pipeline.get_state(),
        "exposures": run.pipeline.exposures().tolist(),  # follows from "data"; there to be read
        "counters": dataclasses.asdict(run.counters),
        "accelerator_seconds": run.accelerator_seconds,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }
