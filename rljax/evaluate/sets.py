"""`rljax eval`: a policy on named sets, with standard errors, evaluated counts and its predictions saved."""

import dataclasses
import logging
import zlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rljax.config import ConfigError, RunConfig, field_value
from rljax.config_file import config_differences, read_yaml
from rljax.data.pipeline import drop_overlong, encode_prompts, prompt_slots, stack_prompts, with_system
from rljax.data.records import READERS, read_records
from rljax.evaluate.held_out import repaired_prompt, sample
from rljax.evaluate.predictions import PREDICTIONS, SetResult, reward_settings, summarise_set, write_results
from rljax.evaluate.shared import Scored
from rljax.models.lora import attach
from rljax.policy import Policy, load_run, open_policy
from rljax.rewards.offline import scored_fields
from rljax.rewards.scorer import RewardFunction, Scorer, open_scorer
from rljax.sampling.engine import Sampler
from rljax.types import STOP_REASONS, PromptRecord

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """Records of one set under the name of its file."""

    name: str
    records: list[PromptRecord]


def evaluate(config: RunConfig, *, reward: RewardFunction | None = None) -> list[SetResult]:
    """Samples and scores every set of `config.eval`, writes predictions and tables, and returns the results.

    A completion is a function of the parameters, `config.seed`, the set's name, the prompt's place in it and its own
    number. Weights come from `eval.run`, the folder of a run, with its tokenizer and stop tokens, else from
    `model.path`; mesh and compute dtype are those of `config` either way.

    Args:
      reward: scores in the place of the verifiers, as in `train`.

    Raises:
      ConfigError: no data, no weights, settings of another model than the run's, a set without a verifier, or an output
        that exists.
    """
    settings = config.eval
    _refuse_unused(config)
    output = Path(settings.output or Path(settings.run or config.run_dir) / "eval")
    if (output / PREDICTIONS).exists():
        raise ConfigError(f"{output} holds predictions already and is not overwritten; give another eval.output")
    sets = read_sets(settings.data, limit=settings.max_prompts, seed=config.data.seed)
    if config.reward.mode == "fixed":
        sets = [EvalSet(one.name, [repaired_prompt(record) for record in one.records]) for one in sets]
    policy, params, step = _weights(config)
    with open_scorer(config.reward, reward) as scorer:
        scorer.check({record.data_source for one in sets for record in one.records})
        sampler = policy.sampler(config.sampling)
        sampler.sync(params)
        results, lines = [], []
        for one in sets:
            found, dropped = _run_set(config, policy, sampler, scorer, one)
            results.append(summarise_set(one.name, found, dropped))
            lines += found
            logger.info("%s: %s %.3f", one.name, "mean", results[-1].mean.value)
    write_results(output, lines, results, _about(config, step, scorer))
    logger.info("wrote %s", output)
    return results


def read_sets(sources: Sequence[str], *, limit: int = 0, seed: int = 0) -> list[EvalSet]:
    """The sets of files, tasks and hub names, and of every file in a folder that is no saved data set.

    Raises:
      ConfigError: there are none, two have one name, or one cannot be read.
    """
    if not sources:
        raise ConfigError(
            "eval.data is empty; give files in the verl schema, a folder of them, or task:NAME with --eval.data"
        )
    files: list[str] = []
    for source in sources:
        folder = Path(source)
        is_saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
        if folder.is_dir() and not is_saved:
            inside = sorted(str(file) for file in folder.iterdir() if file.suffix in READERS)
            if not inside:
                raise ConfigError(f"folder {source} holds no {' or '.join(READERS)} file; give one that does")
            files += inside
        else:
            files.append(source)
    names = [Path(file).stem if Path(file).suffix in READERS else file for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"eval.data names more than one set {', '.join(twice)}; rename a file: sets go by their names"
        )
    return [
        EvalSet(name, read_records(file, split="eval", limit=limit, seed=seed))
        for name, file in zip(names, files, strict=True)
    ]


_OF_THE_RUN = (
    *("model.path", "model.architecture", "model.tokenizer", "model.revision", "sampling.stop_token_ids"),
    *("lora.rank", "lora.alpha", "lora.targets"),
)
"""Settings that `eval.run` answers by itself."""


def _refuse_unused(config: RunConfig) -> None:
    """Raises ConfigError for a setting of the weights that would have no effect and is not what the run has."""
    run, saved = config.eval.run, Path(config.eval.run) / "config.yaml"
    if config.eval.step and not run:
        raise ConfigError(
            f"eval.step = {config.eval.step} is a step of a run, and eval.run is empty; give the run's folder with "
            "--eval.run, or leave eval.step out"
        )
    if not run or not saved.is_file():
        return
    given = [name for name in _OF_THE_RUN if field_value(config, name) != field_value(RunConfig(), name)]
    lines = config_differences(read_yaml(saved), dataclasses.asdict(config))
    unused = [line for line in lines if line.partition(":")[0] in given]
    if unused:
        raise ConfigError(
            f"eval.run = {run} brings its own model (the run's -> given): {'; '.join(unused)}. Leave these out, or "
            "measure other weights with --model.path and without --eval.run"
        )


def _weights(config: RunConfig) -> tuple[Policy, Any, int | None]:
    """(policy, parameters, step of the run they are of; None: they are of a folder)."""
    if config.eval.run:
        run = load_run(
            Path(config.eval.run),
            step=config.eval.step or None,
            mesh=config.mesh,
            compute_dtype=config.model.compute_dtype,
        )
        return run.policy, attach(run.base, run.trained, run.lora_scale), run.step
    policy = open_policy(config)
    return policy, policy.load_params(config.seed), None


def _run_set(
    config: RunConfig, policy: Policy, sampler: Sampler, scorer: Scorer, one: EvalSet
) -> tuple[list[dict[str, Any]], int]:
    """(lines of the predictions, prompts dropped)."""
    settings, data = config.eval, config.data
    records = with_system(one.records, data.system_prompt)
    encoded = encode_prompts(records, policy.tokenizer)
    places = {id(record): place for place, record in enumerate(records)}
    records, encoded, dropped = drop_overlong(records, encoded, data.max_prompt_tokens, data.overlong)
    kept = np.array([places[id(record)] for record in records])
    scored = sample(
        sampler,
        stack_prompts(records, encoded, kept, prompt_slots(encoded)),
        settings.samples_per_prompt,
        policy.tokenizer,
        scorer,
        key=jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(one.name.encode())),
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_completion_tokens=settings.max_completion_tokens or config.sampling.max_completion_tokens,
    ).wait()
    return _lines(one.name, scored), dropped.total()


def _lines(name: str, scored: Scored) -> list[dict[str, Any]]:
    rollouts, lines = scored.rollouts, []
    for row, (text, verdict) in enumerate(zip(scored.texts, scored.verdicts, strict=True)):
        place, draw = divmod(row, rollouts.group_size)
        record = rollouts.prompts.records[place]
        lines.append(
            {
                "set": name,
                "place": int(rollouts.prompts.positions[place]),
                "sample": draw,
                "data_source": record.data_source,
                "response": text,
                "ground_truth": record.ground_truth,
                "extra_info": record.extra_info,
                "stop_reason": STOP_REASONS[int(rollouts.stop_reasons[row])],
                "num_tokens": int(rollouts.lengths[row]),
                **scored_fields(verdict),
            }
        )
    return lines


def _about(config: RunConfig, step: int | None, scorer: Scorer) -> dict[str, Any]:
    """What the numbers are of."""
    return {
        "model": config.eval.run or config.model.path or config.model.architecture,
        "step": step,
        **reward_settings(config.reward, scorer),
        "seed": config.seed,
        "settings": dataclasses.asdict(config.eval),
        "max_prompt_tokens": config.data.max_prompt_tokens,
        "versions": {name: metadata.version(name) for name in ("rljax", "jax", "math-verify", "transformers")},
    }
