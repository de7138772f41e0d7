"""From rollouts to the rows the learner trains on: one prompt and one completion per row, right-padded.

Letters: B completions, T positions, M micro-batches, b rows of each.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from rljax.types import Rollouts, TrainBatch


def _token_mean(mask: np.ndarray) -> np.ndarray:
    return mask / max(mask.sum(), 1)


def _seq_mean_token_mean(mask: np.ndarray) -> np.ndarray:
    lengths = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return mask / lengths / max(mask.any(axis=1).sum(), 1)


AGGREGATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "token_mean": _token_mean,
    "seq_mean_token_mean": _seq_mean_token_mean,
}
"""Loss mask [B, T] of a whole update -> weight of each token. The weights of an update sum to 1, and the loss is
the weighted sum: the divisor is global, whatever the micro-batches, row order or devices."""


def token_weights(loss_mask: np.ndarray, aggregation: str) -> np.ndarray:
    """[B, T] float32; all of one update's rows must be in `loss_mask`."""
    return AGGREGATIONS[aggregation](loss_mask.astype(np.float64)).astype(np.float32)


def padded_length(longest: int) -> int:
    """Positions of a row: the next of 32, 48, 64, 96, 128, 192, ... so that few shapes, and programs, occur."""
    size = 32
    while size < longest:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return size


def rows_of_sequences(prompts: list[np.ndarray], completions: list[np.ndarray]) -> dict[str, np.ndarray]:
    """tokens, positions, group, completion, loss_mask [B, T] of prompt-completion pairs, one pair per row."""
    lengths = np.array([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    starts = np.array([len(p) for p in prompts])[:, None]
    place = np.arange(padded_length(int(lengths.max())))[None]
    tokens = np.zeros((len(prompts), place.shape[1]), np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens[row, : lengths[row]] = np.concatenate([prompt, completion])
    used = place < lengths[:, None]
    return {
        "tokens": tokens,
        "positions": np.where(used, place, 0).astype(np.int32),
        "group": np.where(used, 0, -1).astype(np.int32),
        "completion": (used & (place >= starts)).astype(np.int32),
        "loss_mask": used & (place >= starts),
    }


def train_batch(rollouts: Rollouts, advantages: np.ndarray) -> TrainBatch:
    """All completions of a step as rows [B, T] of NumPy arrays; advantages [P, G].

    Loss weights are set per update by `update_batch`; old log-probs are the sampler's, reference log-probs 0, until the
    learner scores the rows.
    """
    prompts = [rollouts.prompts.tokens[p, :n] for p, n in enumerate(rollouts.prompts.lengths)]
    repeated = [prompt for prompt in prompts for _ in range(rollouts.group_size)]
    completions = [row[:n] for row, n in zip(rollouts.tokens, rollouts.lengths, strict=True)]
    rows = rows_of_sequences(repeated, completions)
    behaviour = np.zeros(rows["tokens"].shape, np.float32)
    behaviour[rows["loss_mask"]] = np.concatenate(
        [row[:n] for row, n in zip(rollouts.behaviour_logprobs, rollouts.lengths, strict=True)]
    )
    return TrainBatch(
        **rows,  # type: ignore[arg-type]
        advantages=np.where(rows["loss_mask"], advantages.reshape(-1, 1), 0).astype(np.float32),  # type: ignore[arg-type]
        weights=np.zeros_like(behaviour),  # type: ignore[arg-type]
        old_logprobs=behaviour,  # type: ignore[arg-type]
        behaviour_logprobs=behaviour,  # type: ignore[arg-type]
        reference_logprobs=np.zeros_like(behaviour),  # type: ignore[arg-type]
    )


def select_rows(batch: TrainBatch, rows: slice, aggregation: str) -> TrainBatch:
    """The rows of one update, with that update's token weights."""
    part = jax.tree.map(lambda leaf: leaf[rows], batch)
    return dataclasses.replace(part, weights=token_weights(np.asarray(part.loss_mask), aggregation))


def rows_per_microbatch(positions: int, microbatch_tokens: int, row_shards: int) -> int:
    """Rows b of a micro-batch: what the token budget of each shard allows, at least one per shard."""
    return row_shards * max(1, microbatch_tokens // positions)


def microbatches(batch: TrainBatch, rows_each: int, row_shards: int) -> TrainBatch:
    """Every leaf [B, T] as [M, b, T] with b <= `rows_each`, filled up with rows of padding (group -1, weight 0).

    Rows are spread evenly over as few micro-batches as the bound allows; b is a multiple of `row_shards`.
    """
    total = batch.tokens.shape[0]
    count = -(-total // rows_each)
    rows = -(-total // (count * row_shards)) * row_shards

    def split(name: str) -> np.ndarray:
        leaf = np.asarray(getattr(batch, name))
        fill = np.full((count * rows - total, *leaf.shape[1:]), -1 if name == "group" else 0, leaf.dtype)
        return np.concatenate([leaf, fill]).reshape(count, rows, *leaf.shape[1:])

    return dataclasses.replace(batch, **{f.name: split(f.name) for f in dataclasses.fields(batch)})
