"""The host's side of one generate call: which program runs next, and what its tokens belong to. No model in here.

for each chunk:
    read the chunk before the last one          the device never waits for the host
    refill, compact, grow                       decided from what is known by then: one chunk late
    decode a chunk
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from rljax.sampling.schedule import (
    FREE,
    LanePrompts,
    Shape,
    Stats,
    fitting_level,
    grown,
    most_prompts,
    pack_rows,
    row_ladder,
    slot_ladder,
)

_SOON = 0.6
"""Share of the rows still live at which halving them is near."""
_NEAR = 8
"""Growth is near when less than this part of the cache is left: all but 1 % of the tokens/s of later growth (counted by
benchmarks/simulate.py), with one to three programs less."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed before the first token."""

    samples_per_prompt: int
    shards: int
    lanes: int
    """Per shard, at most this many at once."""
    width: int
    """Samples of a lane at first; a divisor of `samples_per_prompt`."""
    prompt_slots: int
    slots: tuple[int, ...]
    """Sizes of the suffix cache."""
    levels: tuple[tuple[int, int], ...]
    """(lanes, width) of each compaction level."""
    chunk: int
    admit_lanes: int
    """Lanes per shard that are refilled at once; 0: the next prompts wait until all rows are done."""

    @classmethod
    def make(
        cls,
        *,
        samples_per_prompt: int,
        num_prompts: int,
        prompt_slots: int,
        max_tokens: int,
        max_rows: int,
        shards: int,
        chunk: int,
        growth: float,
        compact: bool,
        refill: bool,
    ) -> "Plan":
        """`max_rows` is what fits, all shards together."""
        width = samples_per_prompt
        total = -(-num_prompts // shards)
        fitting = max(1, max_rows // (shards * width))
        if total > fitting and refill:
            width = 1  # a lane is free when all its rows are: the fewer the sooner
            total, fitting = -(-num_prompts * samples_per_prompt // shards), max(1, max_rows // shards)
        waves = -(-total // fitting)
        lanes = fitting if refill and waves > 1 else -(-total // waves)
        chunk = min(chunk, max(1, max_tokens - 1))
        return cls(
            samples_per_prompt=samples_per_prompt,
            shards=shards,
            lanes=lanes,
            width=width,
            prompt_slots=prompt_slots,
            slots=slot_ladder(max_tokens, chunk, growth),
            levels=row_ladder(lanes, width) if compact else ((lanes, width),),
            chunk=chunk,
            admit_lanes=max(1, lanes // 8) if refill and waves > 1 else 0,
        )


@dataclasses.dataclass(frozen=True)
class HostDrawn:
    """`decode.Drawn` on the host."""

    tokens: np.ndarray  # [K, B] int32
    logprobs: np.ndarray  # [K, B] float32
    kept_mass: np.ndarray  # [K, B] float32
    lengths: np.ndarray  # [B] int32
    stopped: np.ndarray  # [B] bool


class Device(Protocol):
    """What the loop asks of the device. Each call returns at once; `read` waits for what was drawn.

    Tables are [lanes or rows] of all shards, shard after shard. A sample is prompt * samples_per_prompt + g.
    """

    @property
    def compilers(self) -> int: ...
    def start(self, shape: Shape, prompts: LanePrompts, row_sample: np.ndarray) -> Any: ...
    def admit(self, shape: Shape, lane: np.ndarray, prompts: LanePrompts, row_sample: np.ndarray) -> Any: ...
    def decode(self, shape: Shape) -> Any: ...
    def reshape(self, old: Shape, new: Shape, rows: np.ndarray | None, lanes: np.ndarray | None) -> None: ...
    def cancel(self, shape: Shape, rows: np.ndarray) -> None: ...
    def prepare(self, shape: Shape) -> None: ...
    def read(self, drawn: Any) -> HostDrawn: ...


@dataclasses.dataclass
class Outputs:
    """Completions as they come in, one line per sample."""

    tokens: np.ndarray  # [B, T] int32
    logprobs: np.ndarray  # [B, T] float32
    kept_mass: np.ndarray  # [B, T] float32
    lengths: np.ndarray  # [B] int32
    done: np.ndarray  # [B] bool
    stopped: np.ndarray  # [B] bool, by a stop token

    @classmethod
    def empty(cls, samples: int, max_tokens: int) -> "Outputs":
        """Nothing drawn yet."""
        shape = (samples, max_tokens)
        return cls(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.ones(shape, np.float32),
            np.zeros(samples, np.int32),
            np.zeros(samples, bool),
            np.zeros(samples, bool),
        )


class DecodeLoop:
    """Runs prompts to their ends.

    Args:
      plan: shapes and sizes.
      device: what runs the programs.
      limits: [samples] cap of each completion.
      outputs: filled in.
      on_drawn: called with the samples [n] that have new tokens or have ended; may return samples to be ended at once.
    """

    def __init__(
        self,
        plan: Plan,
        device: Device,
        limits: np.ndarray,
        outputs: Outputs,
        stats: Stats,
        on_drawn: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.plan, self.device, self.limits, self.outputs, self.stats = plan, device, limits, outputs, stats
        self._on_drawn = on_drawn
        samples = np.arange(len(limits)).reshape(-1, plan.width)
        self._queue: deque[np.ndarray] = deque(samples)  # one entry per lane: its samples
        self._pending: deque[tuple[np.ndarray, Any, int, Shape | None]] = deque()
        self._row_sample = np.array([], np.int64)
        self._row_start = np.array([], np.int64)
        self._longest = int(limits.max())
        self._steps = 0  # decoded since the wave began
        self._level = 0
        self._shape = Shape(0, 0, 0)

    def run(self) -> None:
        """Until every sample is done."""
        while self._queue or self._live().any():
            if not self._live().any() and not (self.plan.admit_lanes and self.stats.waves):
                self._start_wave()
                continue
            self._refill()
            self._compact_and_grow()
            if self._unfinished().any():
                self._decode()
            self._read(keep=1 if self._unfinished().any() else 0)
        self._read(keep=0)

    # ------------------------------------------------------------------------------------------------- what is known

    def _live(self) -> np.ndarray:
        """[rows] bool: not known to be done."""
        taken = self._row_sample != FREE
        return taken & ~self.outputs.done[np.where(taken, self._row_sample, 0)]

    def _unfinished(self) -> np.ndarray:
        """[rows] bool: live, and not at the longest cap after the steps already asked for."""
        return self._live() & (1 + self._steps - self._row_start < self._longest)

    # ------------------------------------------------------------------------------------------------------- programs

    def _start_wave(self) -> None:
        plan = self.plan
        self._level, self._steps = 0, 0
        self._shape = Shape(*plan.levels[0], plan.slots[0])
        lanes = plan.lanes * plan.shards
        table = np.full((lanes, plan.width), FREE, np.int64)
        for lane in range(min(lanes, len(self._queue))):
            table[lane] = self._queue.popleft()
        self._row_sample = table.reshape(-1)
        self._row_start = np.zeros(len(self._row_sample), np.int64)
        self.stats.waves += 1
        if self._longest > 1:  # compiled beside what runs the prompts, and where there are cores the sizes that follow
            for slots in plan.slots[: self.device.compilers]:
                self.device.prepare(dataclasses.replace(self._shape, slots=slots))
        drawn = self.device.start(self._shape, self._prompts(table), self._row_sample)
        self._pending.append((self._row_sample.copy(), drawn, 0, None))
        self._read(keep=0 if self._longest == 1 else 1)

    def _prompts(self, table: np.ndarray) -> LanePrompts:
        """Of lanes with the samples of `table` [lanes, width]: those of a prompt lie together, and it is run once."""
        plan, first = self.plan, table[:, 0]
        most = most_prompts(len(table) // plan.shards, plan.samples_per_prompt // plan.width)
        prompts = LanePrompts.of(np.where(first == FREE, FREE, first // plan.samples_per_prompt), plan.shards, most)
        self.stats.prompts_run += len(prompts.prompts)
        return prompts

    def _refill(self) -> None:
        """Freed lanes take the next prompts, `admit_lanes` of each shard at a time."""
        plan, count = self.plan, self.plan.admit_lanes
        while self._queue and count:
            free = np.logical_not(self._live().reshape(plan.shards, plan.lanes, plan.width).any(axis=2))
            wanted = min(count, -(-len(self._queue) // plan.shards))
            if free.sum(axis=1).max() < wanted:
                return
            lane = np.full((plan.shards, count), plan.lanes)  # beyond the last: nobody
            table = np.full((plan.shards, count, plan.width), FREE, np.int64)
            for shard in range(plan.shards):
                for place, freed in enumerate(np.flatnonzero(free[shard])[:count]):
                    if self._queue:
                        lane[shard, place], table[shard, place] = freed, self._queue.popleft()
            table = table.reshape(-1, plan.width)
            drawn = self.device.admit(self._shape, lane.reshape(-1), self._prompts(table), table.reshape(-1))
            self._pending.append((table.reshape(-1), drawn, 0, None))
            rows = self._row_sample.reshape(plan.shards, plan.lanes, plan.width)
            starts = self._row_start.reshape(rows.shape)
            for shard, place in zip(*np.nonzero(lane < plan.lanes), strict=True):
                rows[shard, lane[shard, place]] = table[shard * count + place]
                starts[shard, lane[shard, place]] = self._steps
            self.stats.admissions += 1

    def _compact_and_grow(self) -> None:
        plan, old, live = self.plan, self._shape, self._live()
        oldest = self._steps - self._row_start[live].min(initial=self._steps)
        slots = grown(old.slots, oldest + plan.chunk, plan.slots)
        level, left = self._level, self._steps_left(live)
        refilled = bool(self._queue) and plan.admit_lanes > 0  # others take the places of those that have ended
        if not refilled and left > plan.chunk:  # not for the last steps
            level = fitting_level(self._live_per_prompt(live), plan.levels, level)
        if level != self._level:  # growth that is near goes along: a copy and a program less
            slots = grown(old.slots, oldest + max(plan.chunk, old.slots // _NEAR), plan.slots)
        new = Shape(*plan.levels[level], slots)
        if new != old:
            self._change(new, level, live)
        elif not refilled and left > plan.chunk:
            self._prepare_next(live, plan.chunk + oldest)

    def _live_per_prompt(self, live: np.ndarray) -> list[list[int]]:
        prompts = self._row_sample // self.plan.samples_per_prompt
        return [
            np.unique(p[alive], return_counts=True)[1].tolist()
            for p, alive in zip(np.split(prompts, self.plan.shards), np.split(live, self.plan.shards), strict=True)
        ]

    def _change(self, new: Shape, level: int, live: np.ndarray) -> None:
        plan, old = self.plan, self._shape
        rows = lanes = None
        if level != self._level:
            parts = zip(np.split(self._row_sample, plan.shards), np.split(live, plan.shards), strict=True)
            packed = [pack_rows(samples, alive, plan.samples_per_prompt, new) for samples, alive in parts]
            rows = np.concatenate(packed)
            first = rows.reshape(-1, new.width)[:, 0]
            lanes = np.where(first == FREE, FREE, first // old.width)
            whole = rows + np.repeat(np.arange(plan.shards) * old.rows, new.rows)
            self._row_sample = np.where(rows == FREE, FREE, self._row_sample[whole])
            self._row_start = np.where(rows == FREE, 0, self._row_start[whole])
        self.device.reshape(old, new, rows, lanes)
        self._shape, self._level = new, level
        self.stats.reshapes += 1

    def _steps_left(self, live: np.ndarray) -> int:
        """Steps until the cap ends the last row, if nothing else does."""
        return int((self._longest - 1 - self._steps + self._row_start[live]).max(initial=0))

    def _prepare_next(self, live: np.ndarray, used: int) -> None:
        """Has the program that comes next compiled while this shape still decodes: a larger ring, or fewer rows."""
        plan, old = self.plan, self._shape
        level, slots = self._level, old.slots
        if used + plan.chunk > old.slots:
            slots = grown(old.slots, old.slots + 1, plan.slots)
        elif self._level + 1 < len(plan.levels) and live.sum() < _SOON * len(live):
            level, slots = level + 1, grown(old.slots, used + old.slots // _NEAR, plan.slots)
        new = Shape(*plan.levels[level], slots)
        if new != old:
            self.device.prepare(new)

    def _decode(self) -> None:
        drawn = self.device.decode(self._shape)
        self._pending.append((self._row_sample.copy(), drawn, self.plan.chunk, self._shape))
        self._steps += self.plan.chunk

    # --------------------------------------------------------------------------------------------------------- results

    def _read(self, keep: int) -> None:
        """Takes in what was drawn, but for the newest `keep` programs."""
        while len(self._pending) > keep:
            row_sample, drawn, steps, shape = self._pending.popleft()
            got = self.device.read(drawn)
            before = self.outputs.lengths.copy()
            self._take_in(row_sample, got)
            self.stats.drawn_tokens += int((self.outputs.lengths - before).sum())
            if shape is not None:
                self.stats.count_chunk(shape, self.plan.shards, self.plan.prompt_slots, steps)
                self.stats.count_live(before, self.outputs.lengths)

    def _take_in(self, row_sample: np.ndarray, got: HostDrawn) -> None:
        out = self.outputs
        rows = np.flatnonzero(row_sample != FREE)
        rows = rows[~out.done[row_sample[rows]]]
        samples = row_sample[rows]
        before, after = out.lengths[samples], got.lengths[rows]
        step, column = np.nonzero(np.arange(len(got.tokens))[:, None] < after - before)
        place = samples[column], before[column] + step
        for name in ("tokens", "logprobs", "kept_mass"):
            getattr(out, name)[place] = getattr(got, name)[step, rows[column]]
        out.lengths[samples] = after
        out.stopped[samples] = got.stopped[rows]
        out.done[samples] = got.stopped[rows] | (after >= self.limits[samples])
        if self._on_drawn is not None and len(samples):
            ended = self._on_drawn(samples)
            if len(ended):
                out.done[ended] = True
                self.device.cancel(self._shape, np.flatnonzero(np.isin(self._row_sample, ended)))
