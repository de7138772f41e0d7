"""Completions of given prompts, as lines of JSON: the training sampler on the command line."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from rljax.config import ConfigError, RunConfig
from rljax.data.pipeline import drop_overlong, encode_prompts, prompt_slots, stack_prompts, with_system
from rljax.data.records import read_records
from rljax.policy import open_policy
from rljax.sampling.stop import StopStrings
from rljax.tokenizer import Tokenizer
from rljax.types import STOP_REASONS, PromptRecord, Rollouts


def sample(config: RunConfig) -> int:
    """Writes the completions `config.sample` asks for, a group as soon as it has ended; returns their number.

    The draws depend on `config.seed` and each prompt's place in the list.

    Raises:
      ConfigError: there are no prompts, or two kinds of them; a prompt is too long; the output exists.
    """
    settings = config.sample
    records = _records(config)
    if settings.output and Path(settings.output).exists():
        raise ConfigError(f"sample.output = {settings.output} exists and is not overwritten; give another file")
    policy = open_policy(config)
    tokenizer = policy.tokenizer
    records = with_system(records, config.data.system_prompt)
    encoded = encode_prompts(records, tokenizer)
    records, encoded, _ = drop_overlong(records, encoded, config.data.max_prompt_tokens, "error")
    sampler = policy.sampler(config.sampling)
    sampler.sync(policy.load_params(config.seed))
    stop = StopStrings(settings.stop_strings, tokenizer.decode) if settings.stop_strings else None
    with open(settings.output, "w", encoding="utf-8") if settings.output else nullcontext(sys.stdout) as out:

        def write(place: int, group: Rollouts) -> None:
            _write(out, place, group, tokenizer, settings.logprobs)

        rollouts = sampler.generate(
            stack_prompts(records, encoded, np.arange(len(records)), prompt_slots(encoded)),
            settings.samples_per_prompt,
            key=jax.random.key(config.seed),
            max_completion_tokens=settings.max_completion_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            min_completion_tokens=settings.min_completion_tokens,
            stop_strings=stop,
            on_group=write,
        )
    return len(rollouts.lengths)


def _records(config: RunConfig) -> list[PromptRecord]:
    settings = config.sample
    if bool(settings.prompts) == bool(settings.data):
        given = "both" if settings.data else "neither"
        raise ConfigError(
            f"sample.prompts and sample.data: {given} given; give texts with --sample.prompts, or a file with "
            "--sample.data"
        )
    if settings.data:
        return list(read_records(settings.data, split="eval", seed=config.data.seed))
    return [PromptRecord(({"role": "user", "content": text},), "sample", "") for text in settings.prompts]


def _write(out: TextIO, place: int, group: Rollouts, tokenizer: Tokenizer, logprobs: bool) -> None:
    for row, length in enumerate(group.lengths):
        tokens, drawn = group.tokens[row, :length].tolist(), group.behaviour_logprobs[row, :length]
        line: dict[str, Any] = {
            "place": place,
            "sample": row,
            "prompt": group.prompts.records[0].prompt[-1]["content"],
            "completion": tokenizer.decode(tokens),
            "stop_reason": STOP_REASONS[int(group.stop_reasons[row])],
            "num_tokens": int(length),
            "logprob": float(drawn.sum(dtype=np.float64)),
        }
        if logprobs:
            line |= {"tokens": tokens, "logprobs": drawn.tolist()}
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
    out.flush()
