"""From rollouts to the rows the learner trains on: [prompt | completion 1 | ... | completion k | next group | ...].

The completions of a group share one copy of their prompt. Rows are of one length T; a group that does not fit into what
is left of a row is split, and its prompt repeated. Where a completion lies does not depend on what it was rewarded.

Letters: P prompts, G group size, B = P*G completions, n rows, T positions of a row, K copies of prompts, M
micro-batches, b rows of each.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

from rljax.config import Architecture
from rljax.costs import matmul_params
from rljax.types import Rollouts, TrainBatch

# ------------------------------------------------------------------------------------------------------ sizes of a run


@dataclasses.dataclass(frozen=True)
class RowShape:
    """`[M, b, T]` of the arrays of every update of a run: from caps, not lengths, so that one program serves all."""

    num_microbatches: int
    """M: enough whatever the lengths turn out to be; how many are in use varies."""
    rows: int
    """b, all shards together."""
    positions: int
    """T."""


MICROBATCHES_PER_UPDATE = 128
"""Micro-batches of an update whose completions all reach the cap, if the token budget allows so many; of one with
lengths of a quarter of that, 32. The last of them is half empty on average: 2 % of the slots."""
LEAST_TOKENS = {"cpu": 2304, "gpu": 8192, "tpu": 8192}
"""Below so many per shard a micro-batch is not made smaller: its fixed costs would show. Adding the gradients of all
parameters takes 12 bytes of each, a token 8 FLOPs: on a chip of 200 FLOPs per byte 300 tokens' worth of time. A
CPU's fixed costs are those of two rows of 1,088."""
ROW_TOKENS = 2048
"""Length of a row where blocks of attention that nobody sees are skipped, if the longest prompt and completion allow:
what follows a prompt then costs no more in a long row, and the fewer rows the fewer copies of prompts."""


def row_shape(
    arch: Architecture,
    prompt_slots: int,
    completion_slots: int,
    group_size: int,
    *,
    completions: int,
    row_shards: int,
    microbatch_tokens: int,
    platform: str,
) -> RowShape:
    """For updates of `completions` completions of at most `completion_slots` tokens, prompts of at most `prompt_slots`.

    A row is a longest prompt and j longest completions, 1 <= j <= `group_size`. On CPU and TPU they are as many as
    `ROW_TOKENS` holds. On a GPU a token of it costs 1 + T / a, where a is the T at which attention, there of the whole
    square, costs as much as a layer's matmuls; what a row is for are the T - S beside the prompt.
    T (1 + T / a) / (T - S) is smallest at T = S + sqrt(S^2 + a S), and j comes close to that, as far as a micro-batch
    goes.
    """
    longest = prompt_slots + completion_slots
    share = completions * longest // (MICROBATCHES_PER_UPDATE * row_shards)
    tokens = min(microbatch_tokens, max(share, LEAST_TOKENS[platform]))
    if platform != "gpu":
        fitting = (min(microbatch_tokens, ROW_TOKENS) - prompt_slots) // completion_slots
    else:
        equal = matmul_params(arch) / (2 * arch.num_layers * arch.num_heads * arch.head_dim)
        best = math.sqrt(prompt_slots**2 + equal * prompt_slots)
        fitting = min(round(best / completion_slots), (tokens - prompt_slots) // completion_slots)
    each = min(fitting, group_size)
    positions = prompt_slots + max(each, 1) * completion_slots
    positions += -positions % min(128, max(16, 1 << positions.bit_length() - 5))  # a multiple that kernels like
    rows = row_shards * max(1, tokens // positions)
    # `pack` closes a row, but for the last, only when it has no room for another pair: it holds at least this many.
    most = -(-completions // (positions // longest))
    return RowShape(-(-most // rows), rows, positions)


# -------------------------------------------------------------------------------------------------------------- places


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where P prompts and their B completions lie in n rows of T positions; completion c is one of prompt c // G."""

    row_length: int
    num_rows: int
    prompt_lengths: np.ndarray  # [P] int64
    completion_lengths: np.ndarray  # [B] int64
    copy_prompt: np.ndarray  # [K] int64, the prompt this is a copy of
    copy_row: np.ndarray  # [K] int64
    copy_start: np.ndarray  # [K] int64, first position
    copy_group: np.ndarray  # [K] int64, 0, 1, ... within the row
    completion_copy: np.ndarray  # [B] int64, the copy of its prompt that it follows
    completion_start: np.ndarray  # [B] int64, first position, in the row of that copy
    completion_number: np.ndarray  # [B] int64, 1, 2, ... after that copy

    @property
    def used(self) -> int:
        """Slots that hold a token."""
        return int(self.prompt_lengths[self.copy_prompt].sum() + self.completion_lengths.sum())

    def completion_slots(self) -> np.ndarray:
        """Index into the n * T slots of every completion token, completion by completion."""
        copy, start = (np.repeat(x, self.completion_lengths) for x in (self.completion_copy, self.completion_start))
        return self.copy_row[copy] * self.row_length + start + _counted(self.completion_lengths)

    def by_completion(self, rows: np.ndarray, slots: int) -> np.ndarray:
        """The way back: [B, slots] of values [>= n, T] of the rows; 0 after the end of a completion."""
        out = np.zeros((len(self.completion_lengths), slots), rows.dtype)
        inside = np.arange(slots) < self.completion_lengths[:, None]
        out[inside] = rows.reshape(-1)[self.completion_slots()]
        return out


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0 ... l - 1 for each l, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


@dataclasses.dataclass
class _Group:
    """What of a group has no place yet."""

    prompt: int
    prompt_tokens: int
    members: list[tuple[int, int]]  # (length, g), longest first

    @property
    def size(self) -> int:
        return self.prompt_tokens + sum(length for length, _ in self.members)


SPLIT_CANDIDATES = 8
"""Groups, the largest first, of which one is split to fill a row: with so many, next to nothing stays free."""


def pack(prompt_lengths: np.ndarray, completion_lengths: np.ndarray, row_length: int) -> Packing:
    """Places for prompts of lengths [P] and completions of lengths [P, G] in few rows of `row_length` positions.

    Row after row: the largest group that fits, and the next, until none does; then as many completions of one that does
    not as fill what is left, with a copy of their prompt. A row is closed when no completion fits any more. A function
    of the lengths alone; a completion of length 0 lies nowhere.
    """
    left = []
    for prompt, (tokens, lengths) in enumerate(zip(prompt_lengths.tolist(), completion_lengths.tolist(), strict=True)):
        members = sorted(((length, g) for g, length in enumerate(lengths) if length), key=lambda member: -member[0])
        if members:
            longest = tokens + members[0][0]
            assert longest <= row_length, f"a prompt and completion of {longest} tokens do not fit rows of {row_length}"
            left.append(_Group(prompt, tokens, members))
    rows: list[list[_Group]] = []
    while left:
        rows.append([])
        free = row_length
        while part := _take(left, free):
            rows[-1].append(part)
            free -= part.size
    return _laid_out(rows, prompt_lengths, completion_lengths, row_length)


def _take(left: list[_Group], free: int) -> _Group | None:
    """What goes next into a row with `free` positions, taken out of `left`; None if nothing of it fits."""
    left.sort(key=lambda group: -group.size)
    for place, group in enumerate(left):
        if group.size <= free:
            return left.pop(place)
    fitting = [group for group in left if group.prompt_tokens + group.members[-1][0] <= free]
    splits = [(group, _fullest(group.members, free - group.prompt_tokens)) for group in fitting[:SPLIT_CANDIDATES]]
    if not splits:
        return None
    group, chosen = max(splits, key=lambda split: split[0].prompt_tokens + sum(length for length, _ in split[1]))
    group.members = [member for member in group.members if member not in chosen]
    return _Group(group.prompt, group.prompt_tokens, chosen)


def _fullest(members: list[tuple[int, int]], room: int) -> list[tuple[int, int]]:
    """Those of the (length, g) whose lengths add up to the most within `room`."""
    sums, before = 1, []  # bit n: some of the members so far add up to n
    for length, _ in members:
        before.append(sums)
        sums |= (sums << length) & ((1 << room + 1) - 1)
    total, chosen = sums.bit_length() - 1, []
    for member, without in zip(reversed(members), reversed(before), strict=True):
        if not without >> total & 1:
            chosen.append(member)
            total -= member[0]
    return chosen[::-1]


def _laid_out(
    rows: list[list[_Group]], prompt_lengths: np.ndarray, completion_lengths: np.ndarray, row_length: int
) -> Packing:
    copies: list[tuple[int, int, int, int]] = []
    of_completion = np.zeros((3, *completion_lengths.shape), np.int64)  # copy, start, number
    for row, parts in enumerate(rows):
        start = 0
        for group, part in enumerate(parts):
            copies.append((part.prompt, row, start, group))
            start += part.prompt_tokens
            for number, (length, g) in enumerate(part.members, start=1):
                of_completion[:, part.prompt, g] = len(copies) - 1, start, number
                start += length
    return Packing(
        row_length,
        len(rows),
        prompt_lengths.astype(np.int64),
        completion_lengths.reshape(-1).astype(np.int64),
        *np.array(copies, np.int64).reshape(-1, 4).T,
        *of_completion.reshape(3, -1),
    )


# ---------------------------------------------------------------------------------------------------------------- rows


def filled_rows(packing: Packing, prompts: Sequence[np.ndarray], completions: np.ndarray) -> dict[str, np.ndarray]:
    """tokens, positions, source, group, completion, loss_mask [n, T] of P prompts and their completions' tokens.

    Args:
      completions: tokens of all completions, one after the other.
    """
    p = packing
    shape = (p.num_rows, p.row_length)
    rows = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "source", "completion")}
    rows["group"], rows["loss_mask"] = np.full(shape, -1, np.int32), np.zeros(shape, bool)
    flat = {name: leaf.reshape(-1) for name, leaf in rows.items()}

    lengths = p.prompt_lengths[p.copy_prompt]
    place = _counted(lengths)
    slots = np.repeat(p.copy_row * p.row_length + p.copy_start, lengths) + place
    flat["tokens"][slots] = np.concatenate([prompts[prompt] for prompt in p.copy_prompt] or [place])
    flat["positions"][slots] = place
    flat["group"][slots] = np.repeat(p.copy_group, lengths)

    place, slots = _counted(p.completion_lengths), p.completion_slots()
    copy = np.repeat(p.completion_copy, p.completion_lengths)
    before = p.prompt_lengths[p.copy_prompt[copy]]
    flat["tokens"][slots] = completions
    flat["positions"][slots] = before + place
    flat["group"][slots] = p.copy_group[copy]
    flat["completion"][slots] = np.repeat(p.completion_number, p.completion_lengths)
    flat["loss_mask"][slots] = True
    # The first token of every completion is predicted by the end of the prompt, which may be many slots before it.
    flat["source"][slots] = np.where(place == 0, p.copy_start[copy] + before - 1, slots % p.row_length - 1)
    return rows


def train_batch(rollouts: Rollouts, advantages: np.ndarray, weights: np.ndarray, packing: Packing) -> TrainBatch:
    """Rows [n, T] of NumPy arrays of the rollouts that `packing` places; advantages and token weights [P, G].

    Old log-probs are the sampler's and reference log-probs 0, until the learner scores the rows.
    """
    inside = np.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    prompts = [rollouts.prompts.tokens[p, :n] for p, n in enumerate(rollouts.prompts.lengths)]
    rows = filled_rows(packing, prompts, rollouts.tokens[inside])
    slots = packing.completion_slots()

    def by_token(values: np.ndarray) -> np.ndarray:
        out = np.zeros(packing.num_rows * packing.row_length, np.float32)
        out[slots] = values
        return out.reshape(packing.num_rows, packing.row_length)

    behaviour = by_token(rollouts.behaviour_logprobs[inside])
    return TrainBatch(
        **rows,  # type: ignore[arg-type]
        advantages=by_token(np.repeat(advantages.reshape(-1), rollouts.lengths)),  # type: ignore[arg-type]
        weights=by_token(np.repeat(weights.reshape(-1), rollouts.lengths)),  # type: ignore[arg-type]
        old_logprobs=behaviour,  # type: ignore[arg-type]
        behaviour_logprobs=behaviour,  # type: ignore[arg-type]
        reference_logprobs=np.zeros_like(behaviour),  # type: ignore[arg-type]
    )


def batch_shapes(shape: RowShape, sharding: jax.sharding.Sharding | None = None) -> TrainBatch:
    """What `microbatches` gives, as `ShapeDtypeStruct`."""
    integers = ("tokens", "positions", "group", "completion", "source")
    kinds = dict.fromkeys(integers, np.int32) | {"loss_mask": np.bool_}
    sizes = shape.num_microbatches, shape.rows, shape.positions
    return TrainBatch(
        **{
            field.name: jax.ShapeDtypeStruct(sizes, kinds.get(field.name, np.float32), sharding=sharding)
            for field in dataclasses.fields(TrainBatch)
        }  # type: ignore[arg-type]
    )


def microbatches(batch: TrainBatch, shape: RowShape) -> tuple[TrainBatch, int]:
    """(`batch` [n, T] as [M, b, T], micro-batches in use): its rows in order, then padding (group -1, weight 0).

    At least one is in use, so that an update without a row still is one.
    """
    total = batch.tokens.shape[0]
    in_use = max(1, -(-total // shape.rows))
    count = max(in_use, shape.num_microbatches)

    def split(name: str) -> np.ndarray:
        leaf = np.asarray(getattr(batch, name))
        out = np.full((count * shape.rows, shape.positions), -1 if name == "group" else 0, leaf.dtype)
        out[:total] = leaf
        return out.reshape(count, shape.rows, shape.positions)

    return dataclasses.replace(batch, **{f.name: split(f.name) for f in dataclasses.fields(batch)}), in_use
