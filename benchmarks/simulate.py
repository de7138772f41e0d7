"""How much of what the engine computes is needed: its own decisions, run over lengths, without a model.

    python benchmarks/simulate.py

The host code of the engine (`rljax.sampling.loop`) decodes rollouts of given lengths on a device that only counts. What
it asked for is set against the least there could be: live rows only, exact lengths, a prompt read once for its live
rows. Cost is seconds at an H200's measured rates (FLOPs for the tiny model) by the formulas of `roofline.py`. Counts,
not times: the same everywhere, at every run. Lines go to benchmarks/results/simulate.jsonl (format: README.md).
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Line, append, line, run_fields, versions
from roofline import Ceilings, decode_floor_seconds, prefill_seconds, step_seconds
from workloads import ARCHS, REALISTIC, Workload

from rljax import costs
from rljax.config import Architecture
from rljax.sampling.engine import EngineOptions, bucket
from rljax.sampling.loop import DecodeLoop, HostDrawn, Outputs, Plan
from rljax.sampling.schedule import FREE, LanePrompts, Shape, Stats

H200 = Ceilings(matmul_flops=788e12, read_bytes=4.3e12, copy_bytes=4.3e12)
"""Measured: a bf16 matrix product of 8192, and a copy."""
FLOPS_ONLY = Ceilings(matmul_flops=1.0, read_bytes=math.inf, copy_bytes=math.inf)
"""Costs are FLOPs, what a small model pays on a CPU."""


def _mix(model: str, mean: int, cap: int) -> Workload:
    """1,024 log-normal completions, 8 for each of 128 prompts of 256 tokens."""
    return Workload(model, prompts=128, prompt=256, cap=cap, sigma=1.0, share=mean / cap)


MIXES: dict[str, Workload] = {
    "0.5b-288-of-1024": _mix("0.5b", 288, 1024),
    "1.5b-424-of-2048": _mix("1.5b", 424, 2048),
    "1.5b-780-of-4096": _mix("1.5b", 780, 4096),
    "1.5b-1346-of-8192": _mix("1.5b", 1346, 8192),
    "7b-325-of-1024": _mix("7b", 325, 1024),
    "7b-456-of-2048": _mix("7b", 456, 2048),
    "tiny-128-of-512": REALISTIC,
}

MODES: dict[str, EngineOptions] = {
    "static": EngineOptions(growth=1, compact=False),
    "grow": EngineOptions(compact=False),
    "grow+compact": EngineOptions(),
    "waves": EngineOptions(refill=False),
    "slots": EngineOptions(),
}
"""The first three decode all rows at once; for `waves` and `slots` a quarter of them fits."""
QUARTER = ("waves", "slots")


# -------------------------------------------------------------------------------------------------------------- device


class CountingDevice:
    """`rljax.sampling.loop.Device` for rows that stop after given numbers of tokens; one shard. Adds up what it costs.

    Args:
      lengths: [samples] tokens of each completion.
      plan: of the loop that uses it.
    """

    def __init__(self, lengths: np.ndarray, plan: Plan, arch: Architecture, ceilings: Ceilings, dtype: str) -> None:
        self._lengths, self._plan = lengths, plan
        self._arch, self._ceilings, self._dtype = arch, ceilings, dtype
        self._sample = np.array([], np.int64)
        self._drawn = np.array([], np.int64)
        self.prefill_seconds = self.step_seconds = self.reshape_seconds = 0.0

    def start(self, shape: Shape, prompts: LanePrompts, row_sample: np.ndarray) -> HostDrawn:
        assert len(row_sample) == shape.rows
        self._sample, self._drawn = row_sample.copy(), (row_sample != FREE).astype(np.int64)
        self._run_prompts(len(prompts.prompts))
        return self._tell(1, self._sample, self._drawn)

    def admit(self, shape: Shape, lane: np.ndarray, prompts: LanePrompts, row_sample: np.ndarray) -> HostDrawn:
        drawn = (row_sample != FREE).astype(np.int64)
        for place, samples in zip(lane, row_sample.reshape(len(lane), -1), strict=True):
            if place < shape.lanes:
                rows = slice(place * shape.width, (place + 1) * shape.width)
                self._sample[rows], self._drawn[rows] = samples, samples != FREE
        self._run_prompts(len(prompts.prompts))
        return self._tell(1, row_sample, drawn)

    def decode(self, shape: Shape) -> HostDrawn:
        assert len(self._sample) == shape.rows
        steps, prompt = self._plan.chunk, self._plan.prompt_slots
        ends = np.where(self._sample == FREE, 0, self._lengths[self._sample])
        self._drawn = np.minimum(self._drawn + steps, ends)
        self.step_seconds += steps * step_seconds(
            self._arch,
            self._ceilings,
            self._dtype,
            rows=shape.rows,
            own=shape.rows * shape.slots,
            read=shape.lanes * prompt,
            attended=shape.rows * prompt,
        )
        return self._tell(steps, self._sample, self._drawn)

    def reshape(self, old: Shape, new: Shape, rows: np.ndarray | None, lanes: np.ndarray | None) -> None:
        slots = old.rows * old.slots + new.rows * new.slots
        if rows is not None:
            slots += (old.lanes + new.lanes) * self._plan.prompt_slots
            self._drawn = np.where(rows == FREE, 0, self._drawn[rows])
            self._sample = np.where(rows == FREE, FREE, self._sample[rows])
        self.reshape_seconds += slots * costs.kv_bytes_per_token(self._arch, self._dtype) / self._ceilings.copy_bytes

    def cancel(self, shape: Shape, rows: np.ndarray) -> None:
        raise AssertionError("nothing here ends a row early")

    compilers = 1

    def prepare(self, shape: Shape) -> None:
        """Nothing is compiled."""

    def read(self, drawn: Any) -> HostDrawn:
        return drawn

    def _run_prompts(self, count: int) -> None:
        """Those of nobody are computed all the same."""
        lengths = np.full(count, self._plan.prompt_slots)
        self.prefill_seconds += prefill_seconds(self._arch, lengths, self._ceilings, self._dtype)

    def _tell(self, steps: int, samples: np.ndarray, drawn: np.ndarray) -> HostDrawn:
        shape = steps, len(samples)
        stopped = (samples != FREE) & (drawn >= self._lengths[samples])
        return HostDrawn(
            np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.ones(shape, np.float32), drawn, stopped
        )


# --------------------------------------------------------------------------------------------------------------- shares


@dataclasses.dataclass(frozen=True)
class Counted:
    """What one mode asked for on one mix, and the least there could be."""

    stats: Stats
    least: dict[str, float]
    spent: dict[str, float]

    def shares(self) -> dict[str, float]:
        """The least as a percentage of what was asked for."""
        return {name: 100 * least / self.spent[name] for name, least in self.least.items()}


def simulate(workload: Workload, options: EngineOptions, *, max_rows: int = 0) -> Counted:
    """Runs `workload` with `options`, at most `max_rows` at once (0: all)."""
    arch = ARCHS[workload.model]
    ceilings, dtype = (FLOPS_ONLY, "float32") if workload.model == "tiny" else (H200, "bfloat16")
    lengths, prompts = workload.lengths(), np.full(workload.prompts, workload.prompt)
    plan = Plan.make(
        samples_per_prompt=workload.group,
        num_prompts=workload.prompts,
        prompt_slots=bucket(workload.prompt),
        max_tokens=workload.cap,
        max_rows=max_rows or workload.batch,
        shards=1,
        chunk=options.chunk_tokens,
        growth=options.growth,
        compact=options.compact,
        refill=options.refill,
    )
    device, stats = CountingDevice(lengths, plan, arch, ceilings, dtype), Stats()
    outputs = Outputs.empty(workload.batch, workload.cap)
    # The host knows the cap only; the device ends the rows.
    DecodeLoop(plan, device, np.full(workload.batch, workload.cap), outputs, stats).run()
    assert np.array_equal(outputs.lengths, lengths), "the engine drew other lengths than it was given"
    fed = lengths.astype(np.int64) - 1
    group_steps = int(fed.reshape(workload.prompts, -1).max(axis=1).sum())
    steps, prefill = decode_floor_seconds(arch, prompts, lengths, ceilings, dtype), device.prefill_seconds
    decode = device.step_seconds + device.reshape_seconds
    least = {
        "row-steps": int(fed.sum()),
        "suffix slots": costs.causal_context_sum(fed),
        "prefix slots": group_steps * workload.prompt,
        "decode cost": steps,
        "cost": steps + prefill_seconds(arch, prompts, ceilings, dtype),
    }
    spent = {
        "row-steps": stats.row_steps,
        "suffix slots": stats.suffix_slots_read,
        "prefix slots": stats.prefix_slots_read,
        "decode cost": decode,
        "cost": decode + prefill,
    }
    return Counted(stats, least, spent)


def lines_of(name: str, mode: str, fields: Line) -> list[Line]:
    """The shares of one mix in one mode."""
    workload = MIXES[name]
    counted = simulate(workload, MODES[mode], max_rows=workload.batch // 4 if mode in QUARTER else 0)
    case = workload.case() | {"mean": round(workload.share * workload.cap), "mode": mode}
    programs = len(set(counted.stats.shapes))
    return [
        *(line(fields, case, metric, "%", [share]) for metric, share in counted.shares().items()),
        line(fields, case, "decode programs", "count", [programs]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "simulate.jsonl")
    given = parser.parse_args()
    fields = run_fields("simulate", "none (counted)", versions(("rljax",)))
    for name in MIXES:
        print(f"{name}: % of the least")
        for mode in MODES:
            lines = lines_of(name, mode, fields)
            print(f"  {mode:13}" + "  ".join(f"{made['metric']} {made['median']:.4g}" for made in lines), flush=True)
            append(given.out, lines)


if __name__ == "__main__":
    main()
