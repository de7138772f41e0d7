"""The stream of prompts a run consumes: positions -> records -> tokens -> `Prompts`, resumable at any step.

Every process iterates the same global batches and keeps its own rows, so the state is one small dict that is the same
everywhere and restores onto any number of processes.
"""

import collections
import csv
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import grain
import numpy as np

from rljax.config import ConfigError, DataConfig
from rljax.data.records import difficulties
from rljax.data.reuse import ReusePlan, make_plan, needs_difficulties
from rljax.types import PromptRecord, Prompts

log = logging.getLogger(__name__)

SLOT_MULTIPLE = 16
"""Prompt slots are a multiple of this, so that data sets of about the same length share compiled programs."""


class ChatEncoder(Protocol):
    """The part of `rljax.tokenizer.Tokenizer` that prompts need."""

    def encode_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> list[int]: ...


# --------------------------------------------------------------------------------------------- records to tokens


def with_system(records: Sequence[PromptRecord], system_prompt: str) -> list[PromptRecord]:
    """Records whose prompts start with a system message; one that a record brings itself stays. Empty: unchanged."""
    message = {"role": "system", "content": system_prompt}
    return [
        dataclasses.replace(record, prompt=(message, *record.prompt))
        if system_prompt and record.prompt[0]["role"] != "system"
        else record
        for record in records
    ]


def encode_prompts(records: Sequence[PromptRecord], tokenizer: ChatEncoder) -> list[np.ndarray]:
    """Token ids [length] int32 of each record's prompt: the chat template with the generation prompt."""
    encoded = [np.asarray(tokenizer.encode_chat(record.prompt), np.int32) for record in records]
    for index, ids in enumerate(encoded):
        if not len(ids):
            raise ConfigError(f"record {index} has a prompt of no tokens; give it text or a template that adds some")
    return encoded


def drop_overlong(
    records: Sequence[PromptRecord], encoded: Sequence[np.ndarray], max_prompt_tokens: int, overlong: str = "drop"
) -> tuple[list[PromptRecord], list[np.ndarray], collections.Counter[str]]:
    """(records kept, their tokens, number dropped of each `data_source`), kept being those of at most
    `max_prompt_tokens`, template included.

    Done before the reuse plan is made, so that steps are counted on what is left. What is dropped is logged.

    Raises:
      ConfigError: `overlong` is "error" and a prompt is too long, or none is short enough.
    """
    assert overlong in ("drop", "error"), overlong
    long = [index for index, ids in enumerate(encoded) if len(ids) > max_prompt_tokens]
    none_left = len(long) == len(records)
    of_all = collections.Counter(record.data_source for record in records)
    dropped = collections.Counter(records[index].data_source for index in long)
    by_source = ", ".join(f"{count} of {of_all[name]} {name}" for name, count in sorted(dropped.items()))
    if long and (overlong == "error" or none_left):
        worst = max(long, key=lambda index: len(encoded[index]))
        drop = "" if none_left else ", or set data.overlong = drop to leave them out"
        raise ConfigError(
            f"{len(long)} of {len(records)} prompts are longer than data.max_prompt_tokens = {max_prompt_tokens} "
            f"({by_source}): record {long[0]} has {len(encoded[long[0]])} tokens, the longest, record {worst}, "
            f"{len(encoded[worst])}; raise data.max_prompt_tokens{drop}"
        )
    if long:
        log.warning(
            "dropped %d of %d prompts longer than max_prompt_tokens = %d: %s",
            len(long),
            len(records),
            max_prompt_tokens,
            by_source,
        )
    kept = sorted(set(range(len(records))) - set(long))
    return [records[i] for i in kept], [encoded[i] for i in kept], dropped


def prompt_slots(encoded: Sequence[np.ndarray]) -> int:
    """S: the longest prompt, rounded up to `SLOT_MULTIPLE`."""
    return -(-max(map(len, encoded)) // SLOT_MULTIPLE) * SLOT_MULTIPLE


def stack_prompts(
    records: Sequence[PromptRecord], encoded: Sequence[np.ndarray], positions: np.ndarray, slots: int
) -> Prompts:
    """`Prompts` with `slots` slots of records whose tokens and stream positions are given."""
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    assert lengths.max() <= slots, f"a prompt of {lengths.max()} tokens does not fit {slots} slots"
    tokens = np.zeros((len(records), slots), np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids
    return Prompts(tokens, lengths, positions, tuple(records))


# --------------------------------------------------------------------------------------------------- the pipeline


class PromptPipeline:
    """Iterator over the `Prompts` of each step, this process's rows of them.

    Attributes:
      plan: which record each position uses.
      slots: S of every batch: the longest prompt of all records, so one shape serves the run.
      dropped: prompts of each data source left out as overlong before the plan was made.
    """

    def __init__(
        self,
        records: Sequence[PromptRecord],
        encoded: Sequence[np.ndarray],
        plan: ReusePlan,
        *,
        prompts_per_step: int,
        process_slice: tuple[int, int] = (0, 1),
        dropped: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """
        Args:
          encoded: tokens of each record's prompt (`encode_prompts`).
          prompts_per_step: P of the global batch; a last part of a batch is never served.
          process_slice: (index, count): this process keeps the index-th of count equal blocks of rows.
        """
        assert len(records) == len(encoded) == plan.num_records, "plan, records and tokens are of one set"
        process, num_processes = process_slice
        if prompts_per_step % num_processes:
            raise ConfigError(
                f"data.prompts_per_step = {prompts_per_step} cannot be split evenly over {num_processes} processes; "
                f"make it a multiple of {num_processes}"
            )
        self.plan, self.dropped = plan, dict(dropped)
        self.slots = prompt_slots(encoded)
        self._records, self._encoded = records, encoded
        block = prompts_per_step // num_processes
        self._rows, self._prompts_per_step = slice(process * block, (process + 1) * block), prompts_per_step
        self._fingerprint = _fingerprint(records, encoded, plan, prompts_per_step)
        dataset = grain.MapDataset.range(plan.total).batch(
            prompts_per_step, drop_remainder=True, batch_fn=self._make_batch
        )
        # Rows are tokenized already; padding them costs well under a millisecond a step and needs no threads.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._batches, self._served = plan.total // prompts_per_step, 0

    def _make_batch(self, positions: Sequence[Any]) -> Prompts:
        mine = np.array(positions[self._rows], np.int64)
        indices = [self.plan.record_index(int(position)) for position in mine]
        return stack_prompts([self._records[i] for i in indices], [self._encoded[i] for i in indices], mine, self.slots)

    def __iter__(self) -> Iterator[Prompts]:
        return self

    def __next__(self) -> Prompts:
        prompts = next(self._iterator)
        self._served += 1
        return prompts

    @property
    def data_sources(self) -> set[str]:
        """What its records name as their verifier's."""
        return {record.data_source for record in self._records}

    @property
    def is_exhausted(self) -> bool:
        """Whether all whole batches of the plan have been served."""
        return self._served >= self._batches

    def exposures(self) -> np.ndarray:
        """[unique] int64: how often each unique prompt has been served, in the order of `plan.chosen`."""
        return self.plan.exposures(self._served * self._prompts_per_step)

    def write_exposures(self, file: Path) -> None:
        """Writes `exposures` as a table: the record's place among those kept, its own index, its source, its uses."""
        partial = file.with_suffix(".partial")  # a killed run leaves the old table or the new one
        with partial.open("w", newline="", encoding="utf-8") as lines:
            table = csv.writer(lines, lineterminator="\n")
            table.writerow(("record", "index", "data_source", "uses"))
            for place, uses in zip(self.plan.chosen, self.exposures().tolist(), strict=True):
                record = self._records[place]
                table.writerow((place, record.extra_info.get("index"), record.data_source, uses))
        partial.replace(file)

    def get_state(self) -> dict[str, Any]:
        """Where the stream is, and of what it is a stream: JSON-able, equal on every process."""
        return {
            "iterator": self._iterator.get_state(),
            "served": self._served,
            "fingerprint": dict(self._fingerprint),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batches served when the state was taken.

        Raises:
          ConfigError: the state is of other data, another plan or another batch size: what differs is named.
            (grain itself would accept it, and serve other prompts.)
        """
        saved, here = state["fingerprint"], self._fingerprint
        differs = [
            f"{name} was {saved.get(name)!r} and is {here.get(name)!r}"
            for name in dict.fromkeys([*here, *saved])
            if saved.get(name) != here.get(name)
        ]
        if differs:
            raise ConfigError(
                f"the saved data position does not belong to this run's data: {'; '.join(differs)}; use the data and "
                "data options of the saved run, or start in another run_dir"
            )
        self._iterator.set_state(state["iterator"])
        self._served = state["served"]

    def close(self) -> None:
        self._iterator.close()


def _fingerprint(
    records: Sequence[PromptRecord], encoded: Sequence[np.ndarray], plan: ReusePlan, prompts_per_step: int
) -> dict[str, Any]:
    def digest(parts: Iterator[bytes]) -> str:
        total = hashlib.sha256()
        for part in parts:
            total.update(len(part).to_bytes(8, "little") + part)
        return total.hexdigest()[:16]

    texts = (json.dumps([r.prompt, r.data_source, r.ground_truth]).encode() for r in records)
    return {
        "records": len(records),
        "texts": digest(texts),
        "tokens": digest(ids.tobytes() for ids in encoded),  # tokenizer and chat template
        "unique": plan.unique,
        "repeats": plan.repeats,
        "order": plan.order,
        "subset": plan.subset,
        "seed": plan.seed,
        "chosen": digest(iter([np.array(plan.chosen, np.int64).tobytes()])),  # pass rates, too
        "prompts_per_step": prompts_per_step,
    }


def open_pipeline(
    records: Sequence[PromptRecord],
    tokenizer: ChatEncoder,
    data: DataConfig,
    *,
    process_slice: tuple[int, int] = (0, 1),
) -> PromptPipeline:
    """The pipeline of a run: system message, tokens, overlong prompts out, plan, batches.

    Raises:
      ConfigError: the records do not allow what `data` asks for.
    """
    records = with_system(records, data.system_prompt)
    encoded = encode_prompts(records, tokenizer)
    records, encoded, dropped = drop_overlong(records, encoded, data.max_prompt_tokens, data.overlong)
    needs_rates = needs_difficulties(data.order, data.subset)
    plan = make_plan(
        len(records),
        unique=data.unique,
        repeats=data.repeats,
        order=data.order,
        subset=data.subset,
        seed=data.seed,
        difficulties=difficulties(records, data.difficulty_field) if needs_rates else None,
    )
    return PromptPipeline(
        records,
        encoded,
        plan,
        prompts_per_step=data.prompts_per_step,
        process_slice=process_slice,
        dropped=dropped,
    )
