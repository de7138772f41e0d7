"""How token losses become one number: the weight of each completion's tokens in an update's loss.

The divisors are of the whole update and known before its first micro-batch, so neither micro-batches, packing, row
order nor devices can change the loss. Lengths are of what counts: 0 for a completion that was filtered out, which then
is in no divisor either.

Letters: P prompts of the update, G completions of each, l lengths [P, G], N completions that count.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class UpdateLengths:
    """Lengths in tokens of everything in an update."""

    completions: np.ndarray  # [P, G] int; 0: has no part in the loss
    prompts: np.ndarray  # [P] int
    cap: int
    """Longest completion allowed."""
    microbatch_tokens: int
    """Token budget of the micro-batches that `micro_batch_token_mean` imitates."""


def _counting(lengths: np.ndarray) -> int:
    return max(int((lengths > 0).sum()), 1)


def token_mean(update: UpdateLengths) -> np.ndarray:
    """1 / sum(l): every token the same (verl's `token-mean` with a global divisor, TRL's `dapo`)."""
    return np.full(update.completions.shape, 1 / max(update.completions.sum(), 1))


def seq_mean_token_mean(update: UpdateLengths) -> np.ndarray:
    """1 / (N l): every completion the same (the formula as GRPO prints it, arXiv:2402.03300; TRL's `grpo`)."""
    lengths = update.completions
    return 1 / np.maximum(lengths, 1) / _counting(lengths)


def seq_mean_token_sum(update: UpdateLengths) -> np.ndarray:
    """1 / N: a completion counts by its length (verl's `seq-mean-token-sum`)."""
    return np.full(update.completions.shape, 1 / _counting(update.completions))


def constant(update: UpdateLengths) -> np.ndarray:
    """1 / (N cap): a divisor that no length enters (Dr.GRPO, arXiv:2503.20783; TRL's `dr_grpo`)."""
    return np.full(update.completions.shape, 1 / (_counting(update.completions) * update.cap))


def prompt_mean(update: UpdateLengths) -> np.ndarray:
    """Token mean within a prompt, then the mean over prompts (DAPO's printed formula, arXiv:2503.14476; ScaleRL)."""
    tokens = update.completions.sum(axis=1, keepdims=True)
    prompts = max(int((tokens > 0).sum()), 1)
    return np.broadcast_to(1 / np.maximum(tokens, 1) / prompts, update.completions.shape)


def micro_batch_token_mean(update: UpdateLengths) -> np.ndarray:
    """Token mean within a micro-batch, then their mean weighted by completions: what the paper's code computed.

    The divisor depends on which completions happen to share a micro-batch. Here as there, the fewest micro-batches of
    the token budget (prompts counted with every completion) share the completions out evenly: longest first, each to
    the shortest micro-batch (verl balances by Karmarkar-Karp differencing; the sizes differ by a few tokens).
    """
    lengths = update.completions.reshape(-1)
    tokens = lengths + np.repeat(update.prompts, update.completions.shape[1])
    counts = np.flatnonzero(lengths > 0)
    parts = -(-int(tokens[counts].sum()) // update.microbatch_tokens)
    filled, members = np.zeros(max(parts, 1)), np.zeros(len(lengths), int)
    for row in counts[np.argsort(-tokens[counts], kind="stable")]:
        members[row] = int(filled.argmin())
        filled[members[row]] += tokens[row]
    weights = np.zeros(len(lengths))
    for part in range(len(filled)):
        mine = counts[members[counts] == part]
        weights[mine] = len(mine) / _counting(lengths) / max(lengths[mine].sum(), 1)
    return weights.reshape(update.completions.shape)


AGGREGATIONS: dict[str, Callable[[UpdateLengths], np.ndarray]] = {
    "token_mean": token_mean,
    "seq_mean_token_mean": seq_mean_token_mean,
    "seq_mean_token_sum": seq_mean_token_sum,
    "constant": constant,
    "prompt_mean": prompt_mean,
    "micro_batch_token_mean": micro_batch_token_mean,
}


def token_weights(update: UpdateLengths, aggregation: str) -> np.ndarray:
    """[P, G] float32: weight of each token of a completion; 0 for one that has no part."""
    return np.where(update.completions > 0, AGGREGATIONS[aggregation](update), 0).astype(np.float32)
