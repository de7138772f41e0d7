"""Held-out measurement with the training sampler and the training rewards: test_loss = 1 - pass@1."""

import ast
import dataclasses
from typing import Any

import jax
import numpy as np

from rljax.config import EvaluationConfig, RunConfig
from rljax.data.pipeline import drop_overlong, encode_prompts, prompt_slots, stack_prompts, with_system
from rljax.data.records import read_records
from rljax.evaluate.estimators import mean_at_k
from rljax.evaluate.shared import Scored, shared
from rljax.hosts import block_of, wait_for_all
from rljax.rewards.pool import summarise
from rljax.rewards.scorer import Scorer, Scoring
from rljax.sampling.engine import Sampler
from rljax.tokenizer import Tokenizer
from rljax.types import LENGTH, STOP_REASONS, PromptRecord, Prompts, Rollouts, prompts_at, select_prompts


def repaired_prompt(record: PromptRecord) -> PromptRecord:
    """The messages that a prompt is the Python text of, as the paper's HumanEval file has them; others unchanged."""
    content = record.prompt[-1]["content"]
    if len(record.prompt) != 1 or not content.startswith("[{") or not record.data_source.startswith("codegen"):
        return record
    try:
        messages = ast.literal_eval(content)
        prompt = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in messages)
    except (ValueError, SyntaxError, KeyError, TypeError):
        return record
    return dataclasses.replace(record, prompt=prompt)


@dataclasses.dataclass(frozen=True)
class BeingScored:
    """Rollouts whose rewards are on their way."""

    prompts: Prompts
    """Of all processes."""
    rollouts: Rollouts | None
    """Of this one's; None: there were fewer prompts than processes."""
    groups: list[tuple[list[str], Scoring]]  # by prompt

    def wait(self) -> Scored:
        """Waits for the last verdict, of all processes; most came in while completions were still being decoded."""
        return shared(self._own(), self.prompts)

    def _own(self) -> Scored | None:
        if self.rollouts is None:
            return None
        texts = [text for group, _ in self.groups for text in group]
        verdicts = [verdict for _, scoring in self.groups for verdict in scoring.result()]
        others = [verdict for _, scoring in self.groups for verdict in scoring.other()]
        rewards = np.array([verdict.score for verdict in verdicts], np.float32).reshape(-1, self.rollouts.group_size)
        judged = np.array([not verdict.is_failure for verdict in verdicts]).reshape(rewards.shape)
        return Scored(self.rollouts, rewards, judged, texts, verdicts, others)


def sample(
    sampler: Sampler,
    prompts: Prompts,
    group_size: int,
    tokenizer: Tokenizer,
    scorer: Scorer,
    *,
    both_modes: bool = False,
    **draw: Any,
) -> BeingScored:
    """Completions of `prompts`; a group goes to the verifiers as soon as it is whole.

    Of several processes, which all call it, each scores those of its block, and draws them, or those of all that decode
    in lockstep with it.

    Args:
      both_modes: for the hack meter: score them in the verifier's other mode too.
      draw: passed on to `Sampler.generate`.
    """
    groups: dict[int, tuple[list[str], Scoring]] = {}
    blocks = {process: np.arange(len(prompts))[block_of(process, len(prompts))] for process in sampler.processes}
    drawn = np.concatenate(list(blocks.values()))
    own = np.flatnonzero(np.isin(drawn, blocks[jax.process_index()]))

    def submit(place: int, group: Rollouts) -> None:
        if place not in own:
            return
        record = group.prompts.records[0]
        texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(group.tokens, group.lengths, strict=True)]
        scoring = scorer.submit(
            record.data_source, record.ground_truth, record.extra_info, texts, both_modes=both_modes
        )
        groups[place] = texts, scoring

    rollouts = None
    if len(drawn):
        rollouts = sampler.generate(prompts_at(prompts, drawn), group_size, on_group=submit, **draw)
    wait_for_all("sampled")  # so that the seconds of this phase are those of the slowest
    if rollouts is not None and len(own) < len(drawn):
        rollouts = select_prompts(rollouts, own) if len(own) else None
    return BeingScored(prompts, rollouts, [groups[place] for place in own.tolist()])


def rollout_rows(scored: Scored, count: int) -> list[dict[str, Any]]:
    """The first `count` completions as JSON-able rows for people to read."""
    rows, rollouts = [], scored.rollouts
    for row in range(min(count, len(scored.texts))):
        record = rollouts.prompts.records[row // rollouts.group_size]
        rows.append(
            {
                "prompt": record.prompt[-1]["content"],
                "completion": scored.texts[row],
                "ground_truth": record.ground_truth,
                "reward": float(scored.rewards.reshape(-1)[row]),
                "status": scored.verdicts[row].status,
                "stop_reason": STOP_REASONS[int(rollouts.stop_reasons[row])],
                "tokens": int(rollouts.lengths[row]),
            }
        )
    return rows


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Scores [prompts, samples] of a held-out set."""

    scores: np.ndarray
    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    """A few completions to read."""

    @property
    def pass_at_1(self) -> float:
        """Mean score of one sample."""
        return self.metrics["eval/pass@1"]


class Evaluation:
    """A held-out set, read and encoded once, and measured as often as asked."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        """Raises ConfigError when the set cannot be read or no prompt fits `data.max_prompt_tokens`."""
        self._config: EvaluationConfig = config.evaluation
        self._cap = config.evaluation.max_completion_tokens or config.sampling.max_completion_tokens
        records = read_records(self._config.data, split="eval", limit=self._config.max_prompts, seed=config.data.seed)
        if config.reward.mode == "fixed":
            records = [repaired_prompt(record) for record in records]
        records = with_system(records, config.data.system_prompt)
        encoded = encode_prompts(records, tokenizer)
        self._records, self._encoded, self.dropped = drop_overlong(
            records, encoded, config.data.max_prompt_tokens, config.data.overlong
        )
        places = np.arange(len(self._records))
        self._prompts = stack_prompts(self._records, self._encoded, places, prompt_slots(self._encoded))
        self._tokenizer = tokenizer

    @property
    def data_sources(self) -> set[str]:
        """What its records name as their verifier's."""
        return {record.data_source for record in self._records}

    def run(self, sampler: Sampler, scorer: Scorer, key: jax.Array, *, keep_rows: int = 4) -> EvaluationResult:
        """Samples and scores every prompt. A draw depends on `key` and the prompt's place only."""
        scored = sample(
            sampler,
            self._prompts,
            self._config.samples_per_prompt,
            self._tokenizer,
            scorer,
            key=key,
            temperature=self._config.temperature,
            max_completion_tokens=self._cap,
        ).wait()
        rollouts, verdicts, passed = scored.rollouts, scored.verdicts, mean_at_k(scored.rewards)
        metrics = {
            "eval/pass@1": passed.value,
            "eval/test_loss": 1.0 - passed.value,
            "eval/standard_error": passed.standard_error,
            "eval/num_prompts": float(len(self._prompts)),
            "eval/completion_length_tokens": float(rollouts.lengths.mean()),
            "eval/truncated_fraction": float(np.mean(rollouts.stop_reasons == LENGTH)),
            **{name.replace("reward/", "eval/"): share for name, share in summarise(verdicts).items()},
        }
        return EvaluationResult(scored.rewards, metrics, rollout_rows(scored, keep_rows))
