"""The host's decisions of a decode, as pure functions of integers: shapes, growth, compaction, refill. No JAX.

A lane is one prompt and room for `width` of its samples: their keys of the prompt are read once. Rows of a lane are
neighbours. Everything is per shard: lanes never leave the device they were started on, so every shard holds the same
number of lanes and the fullest decides.

Letters: G samples per prompt, R suffix slots.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

FREE = -1
"""In a row or lane table: nobody is there."""

_FEWEST_SLOTS = 64
"""Growing a smaller cache costs more programs than its slots cost time."""
_FIRST_SHARE = 12
"""The cache starts at this part of the longest completion or more: at most 7 sizes a factor of 1.5 apart."""
_FEWEST_ROWS = 16
"""Fewer rows cost about as much as this many: the weights are read all the same."""
_WIDTH_STEP = 4
"""Lanes get narrower by this at each level, so that survivors of different prompts fill them; but there are never more
than twice as many lanes, each with a copy of its prompt, as at first."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of a decode program, per shard."""

    lanes: int
    width: int
    slots: int

    @property
    def rows(self) -> int:
        """Rows decoded per step."""
        return self.lanes * self.width


def slot_ladder(max_tokens: int, chunk: int, growth: float) -> tuple[int, ...]:
    """Sizes of the suffix cache, multiples of `chunk`; the last holds every token but a completion's last.

    `growth` 1 gives the full size only.
    """

    def whole_chunks(slots: float) -> int:
        return max(1, -(-int(slots) // chunk)) * chunk

    full = whole_chunks(max_tokens - 1)
    if growth <= 1:
        return (full,)
    sizes, size = [], float(full)  # from the top, or the last two may be nearly the same
    while size >= max(_FEWEST_SLOTS, full / _FIRST_SHARE):
        sizes.append(whole_chunks(size))
        size /= growth
    return tuple(sorted({full, *sizes}))


def row_ladder(lanes: int, width: int) -> tuple[tuple[int, int], ...]:
    """(lanes, width) of each compaction level of a shard: rows halve, lanes get narrower."""
    levels = [(lanes, width)]
    rows = lanes * width
    while (rows := -(-rows // 2)) >= _FEWEST_ROWS:
        narrow = max(-(-levels[-1][1] // _WIDTH_STEP), -(-rows // (2 * lanes)))
        levels.append((-(-rows // narrow), narrow))
        rows = levels[-1][0] * narrow
    return tuple(levels)


def fitting_level(live_per_prompt: Sequence[Sequence[int]], levels: Sequence[tuple[int, int]], level: int) -> int:
    """The deepest level that holds every live row, at least `level`; live rows per prompt, shard by shard."""
    for deeper in range(len(levels) - 1, level, -1):
        lanes, width = levels[deeper]
        if all(sum(-(-live // width) for live in shard) <= lanes for shard in live_per_prompt):
            return deeper
    return level


def grown(slots: int, needed: int, ladder: Sequence[int]) -> int:
    """The smallest size of `ladder` that is at least `needed` and not below `slots`."""
    return next((size for size in ladder if size >= max(needed, slots)), ladder[-1])


def pack_rows(row_sample: np.ndarray, live: np.ndarray, samples_per_prompt: int, shape: Shape) -> np.ndarray:
    """Which old row each new row continues, FREE for none: [lanes * width] of one shard.

    Args:
      row_sample: [rows] number of the sample a row draws (prompt * samples_per_prompt + g); FREE for none.
      live: [rows] bool.
      shape: the new shape.
    """
    sources = np.full((shape.lanes, shape.width), FREE)
    rows = np.flatnonzero(live)
    prompts = row_sample[rows] // samples_per_prompt
    lane = 0
    for prompt in dict.fromkeys(prompts.tolist()):
        mine = rows[prompts == prompt]
        for start in range(0, len(mine), shape.width):
            part = mine[start : start + shape.width]
            sources[lane, : len(part)] = part
            lane += 1
    return sources.reshape(-1)


@dataclasses.dataclass(frozen=True)
class LanePrompts:
    """Which prompts are to be run for some lanes of all shards, shard after shard: each once per shard."""

    prompts: np.ndarray  # [U] int64, FREE for none
    place: np.ndarray | None  # [lanes], a lane's prompt among those of its shard; None: one of each lane, in order

    @classmethod
    def of(cls, lane_prompt: np.ndarray, shards: int, most: int) -> "LanePrompts":
        """Of `lane_prompt` [lanes], FREE for none; `most` different ones per shard at most, as many are run."""
        lanes = len(lane_prompt) // shards
        if most == lanes:
            return cls(lane_prompt, None)
        prompts, place = np.full((shards, most), FREE), np.zeros((shards, lanes), np.int64)
        for shard, mine in enumerate(lane_prompt.reshape(shards, lanes)):
            different = list(dict.fromkeys(mine[mine != FREE].tolist()))
            prompts[shard, : len(different)] = different
            place[shard] = [different.index(prompt) if prompt != FREE else 0 for prompt in mine.tolist()]
        return cls(prompts.reshape(-1), place.reshape(-1))


def most_prompts(lanes: int, lanes_per_prompt: int) -> int:
    """Most prompts that successive lanes can be of."""
    return (lanes - 2) // lanes_per_prompt + 2


@dataclasses.dataclass
class Stats:
    """What a decode did, counted; all shards together."""

    row_steps: int = 0
    """Rows times steps computed."""
    live_row_steps: int = 0
    """Of those, the ones that drew a token of a completion."""
    suffix_slots_read: int = 0
    """Suffix cache entries (a key and a value per layer and head) attended."""
    suffix_slots_used: int = 0
    """Of those, the ones that held a token a live row attended to."""
    prefix_slots_read: int = 0
    """Prefix cache entries attended, once per lane and step."""
    prompts_run: int = 0
    """Prompts put through the model, those of nobody included."""
    drawn_tokens: int = 0
    """Tokens of completions, first tokens included."""
    waves: int = 0
    """Starts from an empty cache."""
    admissions: int = 0
    """Times that freed lanes took new prompts."""
    reshapes: int = 0
    """Growths and compactions."""
    shapes: list[Shape] = dataclasses.field(default_factory=list)
    """Shapes decoded in, in order."""
    programs: int = 0
    """Programs this sampler has compiled by now, of all kinds."""
    decode_programs: int = 0
    """Of those, the ones that decode: one per shape."""
    compile_seconds: float = 0.0
    """Spent by this sampler on compiling by now, in the background included."""

    def count_chunk(self, shape: Shape, shards: int, prefix_slots: int, steps: int) -> None:
        """A chunk of `steps` was computed in `shape`."""
        self.row_steps += steps * shape.rows * shards
        self.suffix_slots_read += steps * shape.rows * shape.slots * shards
        self.prefix_slots_read += steps * shape.lanes * prefix_slots * shards
        if not self.shapes or self.shapes[-1] != shape:
            self.shapes.append(shape)

    def count_live(self, before: np.ndarray, after: np.ndarray) -> None:
        """Lengths of completions before and after a chunk."""
        fed = (after - before).astype(np.int64)
        self.live_row_steps += int(fed.sum())
        # Drawing token n (counted from 0) attends to the n tokens before it.
        self.suffix_slots_used += int((fed * (before + after - 1)).sum()) // 2
