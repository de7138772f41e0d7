"""How fast this machine could be, measured, and what that allows a rollout to take, by arithmetic.

Letters: P prompts, G completions of each, B rows, D width, F MLP width.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax import costs
from rljax.config import Architecture


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Best rates seen in this process."""

    matmul_flops: float
    """FLOP/s of a large matrix product in the compute dtype."""
    read_bytes: float
    """Bytes/s of memory that is only read, as decoding does."""
    copy_bytes: float
    """Bytes/s of a copy, read and written ones together."""

    def as_fields(self) -> dict[str, float]:
        """For a line of results: GFLOP/s and GB/s."""
        return {
            "matmul_gflops": round(self.matmul_flops / 1e9, 1),
            "read_gbs": round(self.read_bytes / 1e9, 2),
            "copy_gbs": round(self.copy_bytes / 1e9, 2),
        }


def _best_seconds(run: Callable[[], Any], budget: float) -> float:
    """The shortest of at least 3 runs after a first, as many as `budget` seconds allow."""
    jax.block_until_ready(run())
    best, count, until = float("inf"), 0, time.perf_counter() + budget
    while count < 3 or (time.perf_counter() < until and count < 50):
        started = time.perf_counter()
        jax.block_until_ready(run())
        best, count = min(best, time.perf_counter() - started), count + 1
    return best


@partial(jax.jit, static_argnames="times")
def _chain(x: jax.Array, up: jax.Array, down: jax.Array, times: int) -> jax.Array:
    """`times` times x [B, D] through up [D, F] and down [F, D], each depending on the one before."""
    scale = jnp.asarray((x.shape[1] * up.shape[1]) ** -0.5, x.dtype)  # or the numbers leave the range
    return jax.lax.fori_loop(0, times, lambda _, x: ((x @ up) @ down) * scale, x)


def matmul_rate(rows: int, width: int, columns: int, dtype: str, *, budget: float = 1.0) -> float:
    """FLOP/s of [rows, width] @ [width, columns] and back, again and again without the host between."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, width), (width, columns), (columns, width))
    x, up, down = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True))
    flops = 4 * rows * width * columns
    times = max(1, round(2e9 / flops)) if jax.default_backend() == "cpu" else 20
    return flops * times / _best_seconds(partial(_chain, x, up, down, times), budget)


def measure_ceilings(dtype: str, *, budget: float = 1.0) -> Ceilings:
    """A few seconds; nothing else may run."""
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    megabytes = 512 if on_cpu else 4096
    # Where one way of reading is compiled badly, another is not: the ceiling is the best.
    block = jnp.ones((megabytes * 2**20 // 4 // 4096, 4096), jnp.float32)
    vector = jnp.ones(4096, jnp.float32)
    reads = [jax.jit(jnp.sum), jax.jit(lambda x: x @ vector), jax.jit(lambda x: jnp.max(x, axis=0))]
    seconds = [_best_seconds(partial(read, block), budget) for read in reads]
    if on_cpu:
        host = np.ones(megabytes * 2**20 // 4, np.float32)
        seconds.append(_best_seconds(lambda: np.dot(host, host), budget))
    rate = matmul_rate(size, size, size, dtype, budget=budget)
    if on_cpu and dtype == "float32":
        square = np.ones((size, size), np.float32)
        rate = max(rate, 2 * size**3 / _best_seconds(lambda: square @ square, budget))
    size_bytes = block.nbytes
    copy = _copy_seconds(block, budget)
    # Half of a copy is reading: what was read that fast can be read that fast.
    return Ceilings(rate, size_bytes / min(*seconds, copy), 2 * size_bytes / copy)


def _copy_seconds(block: jax.Array, budget: float) -> float:
    """One pass that reads and writes all of `block`, which is given away: fresh pages would be timed otherwise."""
    held = [block]
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)

    def once() -> jax.Array:
        held[0] = add(held[0])
        return held[0]

    return _best_seconds(once, budget)


def decode_rates(arch: Architecture, rows: int, dtype: str) -> dict[str, float]:
    """GFLOP/s of products as large as those of a decode step at this many rows, to set beside the ceiling."""
    wide = matmul_rate(rows, arch.hidden_size, 2 * arch.mlp_size, dtype, budget=0.3)
    head = matmul_rate(rows, arch.hidden_size, arch.vocab_size, dtype, budget=0.3)
    return {"mlp_gflops": round(wide / 1e9, 1), "head_gflops": round(head / 1e9, 1)}


def prefill_seconds(arch: Architecture, prompt_lengths: np.ndarray, ceilings: Ceilings, dtype: str) -> float:
    """Least seconds to run prompts of these lengths [P] once, with the logits of their last tokens."""
    prompts = np.asarray(prompt_lengths, np.int64)
    flops = costs.forward_flops(arch, int(prompts.sum()), costs.causal_context_sum(prompts), len(prompts))
    return max(_weight_seconds(arch, ceilings, dtype), flops / ceilings.matmul_flops)


def step_seconds(
    arch: Architecture, ceilings: Ceilings, dtype: str, *, rows: int, own: int, read: int, attended: int
) -> float:
    """Least seconds of one decode step: weights, attention and logits one after the other.

    Each is limited by memory or by arithmetic; the float32 logits pass three times.

    Args:
      rows: tokens fed.
      own: slots of the rows' own keys and values, all rows together.
      read: slots of prompts that are read, once for the rows that share them.
      attended: slots of prompts that are attended to, all rows together.
    """
    products = costs.forward_flops(arch, rows, 0, rows) / ceilings.matmul_flops
    memory = (own + read) * costs.kv_bytes_per_token(arch, dtype) / ceilings.read_bytes
    attention = costs.forward_flops(arch, 0, own + attended, 0) / ceilings.matmul_flops
    logits = 3 * 4 * rows * arch.vocab_size / ceilings.read_bytes
    return max(_weight_seconds(arch, ceilings, dtype), products) + max(memory, attention) + logits


def _weight_seconds(arch: Architecture, ceilings: Ceilings, dtype: str) -> float:
    return (costs.matmul_params(arch) + costs.head_params(arch)) * costs.BYTES[dtype] / ceilings.read_bytes


def decode_floor_seconds(
    arch: Architecture, prompt_lengths: np.ndarray, lengths: np.ndarray, ceilings: Ceilings, dtype: str
) -> float:
    """The least seconds the steps of a rollout can take, were every row to cost only what it draws.

    A step reads every weight, the keys and values of the live rows, and those of a prompt once for its live rows.
    Padding and finished rows cost nothing here.

    Args:
      prompt_lengths: [P].
      lengths: [P * G] grouped by prompt, at least 1 each; the first token comes from the prompt, the others are steps.
    """
    prompts = np.asarray(prompt_lengths, np.int64)
    drawn = np.asarray(lengths, np.int64).reshape(len(prompts), -1)
    total = 0.0
    for fed in range(1, int(drawn.max())):
        # Step `fed` feeds token `fed` of the rows that have one more to draw; it attends to itself and those before.
        live = (drawn > fed).sum(axis=1)
        rows, read, attended = int(live.sum()), int(prompts[live > 0].sum()), int((live * prompts).sum())
        total += step_seconds(arch, ceilings, dtype, rows=rows, own=rows * fed, read=read, attended=attended)
    return total


def floor_seconds(
    arch: Architecture, prompt_lengths: np.ndarray, lengths: np.ndarray, ceilings: Ceilings, dtype: str
) -> float:
    """The least seconds a rollout can take at these ceilings: each prompt is run once, then `decode_floor_seconds`."""
    steps = decode_floor_seconds(arch, prompt_lengths, lengths, ceilings, dtype)
    return prefill_seconds(arch, prompt_lengths, ceilings, dtype) + steps


# ------------------------------------------------------------------------------------------------------------- learning

OPTIMIZER_BYTES_PER_PARAM = 28
"""Of AdamW in float32: parameter and both moments read and written, the gradient read."""
SYNC_BYTES_PER_PARAM = 8
"""Read from the learner's layout and written in the sampler's, float32."""


def learning_counts(prompt_lengths: np.ndarray, lengths: np.ndarray) -> tuple[int, int, int]:
    """(tokens, keys attended, tokens with logits) of a pass over the completions, each prompt once.

    Args:
      prompt_lengths: [P].
      lengths: [P * G] grouped by prompt.
    """
    prompts = np.asarray(prompt_lengths, np.int64)
    drawn = np.asarray(lengths, np.int64).reshape(len(prompts), -1)
    context = (
        costs.causal_context_sum(prompts) + costs.causal_context_sum(drawn) + int((drawn * prompts[:, None]).sum())
    )
    return int(prompts.sum() + drawn.sum()), context, int(drawn.sum())


def learning_flops(arch: Architecture, prompt_lengths: np.ndarray, lengths: np.ndarray) -> int:
    """Model FLOPs of the reference's log-probs and of an update's forward and backward, each prompt once."""
    counts = learning_counts(prompt_lengths, lengths)
    return costs.forward_flops(arch, *counts) + costs.update_flops(arch, *counts)


def iteration_flops(arch: Architecture, prompt_lengths: np.ndarray, lengths: np.ndarray) -> int:
    """Model FLOPs of a whole GRPO iteration: rollouts and `learning_flops`."""
    return costs.generation_flops(arch, prompt_lengths, lengths) + learning_flops(arch, prompt_lengths, lengths)


def update_floor_seconds(
    arch: Architecture, prompt_lengths: np.ndarray, lengths: np.ndarray, ceilings: Ceilings
) -> float:
    """The least seconds of an update with its reference pass: `learning_flops` and the optimizer's bytes."""
    moved = OPTIMIZER_BYTES_PER_PARAM * costs.num_params(arch)
    return learning_flops(arch, prompt_lengths, lengths) / ceilings.matmul_flops + moved / ceilings.copy_bytes


def iteration_floor_seconds(
    arch: Architecture, prompt_lengths: np.ndarray, lengths: np.ndarray, ceilings: Ceilings
) -> float:
    """The least seconds of a whole GRPO iteration in float32: rollout, update, and the bytes of the weight sync."""
    sync = SYNC_BYTES_PER_PARAM * costs.num_params(arch) / ceilings.copy_bytes
    rollout = floor_seconds(arch, prompt_lengths, lengths, ceilings, "float32")
    return rollout + update_floor_seconds(arch, prompt_lengths, lengths, ceilings) + sync
