"""Held-out measurement with the training sampler and the training rewards: test_loss = 1 - pass@1."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rljax.config import EvaluationConfig, RunConfig
from rljax.data.pipeline import drop_overlong, encode_prompts, prompt_slots, stack_prompts, with_system
from rljax.data.records import read_records
from rljax.rewards.dispatch import verifier_for
from rljax.rewards.pool import RewardItem, RewardPool, Verdict, summarise
from rljax.sampling.engine import Sampler
from rljax.tokenizer import Tokenizer
from rljax.types import LENGTH, Rollouts

STOP_REASONS = {0: "stop", LENGTH: "length"}


def score_rollouts(
    rollouts: Rollouts, tokenizer: Tokenizer, pool: RewardPool, verifier: str
) -> tuple[np.ndarray, list[str], list[Verdict]]:
    """(rewards [P, G] float32, completions as text, verdicts), the latter two row by row."""
    texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(rollouts.tokens, rollouts.lengths, strict=True)]
    records = [record for record in rollouts.prompts.records for _ in range(rollouts.group_size)]
    items = [
        RewardItem(verifier_for(record.data_source, verifier), text, record.ground_truth, record.extra_info)
        for record, text in zip(records, texts, strict=True)
    ]
    verdicts = pool.score(items)
    rewards = np.array([verdict.score for verdict in verdicts], np.float32).reshape(-1, rollouts.group_size)
    return rewards, texts, verdicts


def rollout_rows(
    rollouts: Rollouts, rewards: np.ndarray, texts: Sequence[str], verdicts: Sequence[Verdict], count: int
) -> list[dict[str, Any]]:
    """The first `count` completions as JSON-able rows for people to read."""
    rows = []
    for row in range(min(count, len(texts))):
        record = rollouts.prompts.records[row // rollouts.group_size]
        rows.append(
            {
                "prompt": record.prompt[-1]["content"],
                "completion": texts[row],
                "ground_truth": record.ground_truth,
                "reward": float(rewards.reshape(-1)[row]),
                "status": verdicts[row].status,
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
        """Mean score of one sample: over prompts of the mean over samples."""
        return float(self.scores.mean(dtype=np.float64))


class Evaluation:
    """A held-out set, read and encoded once, and measured as often as asked."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer) -> None:
        """Raises ConfigError when the set cannot be read or no prompt fits `data.max_prompt_tokens`."""
        self._config: EvaluationConfig = config.evaluation
        self._verifier = config.reward.name
        self._cap = config.evaluation.max_completion_tokens or config.sampling.max_completion_tokens
        records = read_records(self._config.data, split="eval", limit=self._config.max_prompts, seed=config.data.seed)
        records = with_system(records, config.data.system_prompt)
        encoded = encode_prompts(records, tokenizer)
        self._records, self._encoded, self.dropped = drop_overlong(
            records, encoded, config.data.max_prompt_tokens, config.data.overlong
        )
        self._slots = prompt_slots(self._encoded)
        self._tokenizer = tokenizer
        rows = config.data.prompts_per_step * config.algorithm.group_size
        by_default = max(1, rows // self._config.samples_per_prompt)
        self._batch = min(len(self._records), self._config.batch_prompts or by_default)

    def run(self, sampler: Sampler, pool: RewardPool, key: jax.Array, *, keep_rows: int = 4) -> EvaluationResult:
        """Samples and scores every prompt. The draws depend on `key` and each prompt's place, not on the batches."""
        count = len(self._records)
        scores, rows, verdicts = [], [], []
        tokens = truncated = 0
        for start in range(0, count, self._batch):
            # The last batch is filled up with prompts already measured, so that one program serves all.
            places = np.arange(start, start + self._batch) % count
            records, encoded = [self._records[i] for i in places], [self._encoded[i] for i in places]
            rollouts = sampler.generate(
                stack_prompts(records, encoded, places, self._slots),
                self._config.samples_per_prompt,
                key=key,
                temperature=self._config.temperature,
                max_completion_tokens=self._cap,
            )
            rollouts = first_prompts(rollouts, min(self._batch, count - start))
            rewards, texts, judged = score_rollouts(rollouts, self._tokenizer, pool, self._verifier)
            scores.append(rewards)
            verdicts += judged
            tokens += int(rollouts.lengths.sum())
            truncated += int((rollouts.stop_reasons == LENGTH).sum())
            rows += rollout_rows(rollouts, rewards, texts, judged, keep_rows - len(rows))
        all_scores = np.concatenate(scores)
        per_prompt = all_scores.mean(axis=1, dtype=np.float64)
        passed = float(per_prompt.mean())
        metrics = {
            "eval/pass@1": passed,
            "eval/test_loss": 1.0 - passed,
            # Prompts are the independent draws, samples of one prompt are not: clustered by prompt.
            "eval/standard_error": float(per_prompt.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0,
            "eval/num_prompts": float(count),
            "eval/completion_length_tokens": tokens / len(verdicts),
            "eval/truncated_fraction": truncated / len(verdicts),
            **{name.replace("reward/", "eval/"): share for name, share in summarise(verdicts).items()},
        }
        return EvaluationResult(all_scores, metrics, rows)


def first_prompts(rollouts: Rollouts, count: int) -> Rollouts:
    """The rollouts of the first `count` prompts."""
    prompts, rows = rollouts.prompts, count * rollouts.group_size
    kept = dataclasses.replace(
        prompts,
        tokens=prompts.tokens[:count],
        lengths=prompts.lengths[:count],
        positions=prompts.positions[:count],
        records=prompts.records[:count],
    )
    return dataclasses.replace(
        rollouts,
        prompts=kept,
        tokens=rollouts.tokens[:rows],
        lengths=rollouts.lengths[:rows],
        behaviour_logprobs=rollouts.behaviour_logprobs[:rows],
        stop_reasons=rollouts.stop_reasons[:rows],
    )
