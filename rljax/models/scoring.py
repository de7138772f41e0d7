"""Log-probs of given tokens from hidden states, for learner and sampler. The only next-token shift of the project.

Only tokens of the mask get logits: they are lined up first and then worked on chunk by chunk, as many chunks as they
fill.

Letters: B rows, T positions, D width, V vocabulary, C tokens of a chunk, N = B * T rounded up to whole chunks.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from rljax.config import Architecture
from rljax.mesh import AXES, ROWS, platform
from rljax.models.qwen2 import Params, head_params, logits

MAX_LOGITS = 2**24
"""Logits alive at once on a CPU: 64 MB of float32, of which its caches still hold a part."""
MAX_CHUNK = 1024
"""Tokens of a chunk at most: the last one is half empty on average."""


def chunk_tokens(tokens: int, vocab_size: int) -> int:
    """C for `tokens` tokens of which any number may be in the mask, on the platform compiled for.

    On GPU and TPU whole chunks whatever the vocabulary, 0.6 GB of logits for Qwen's 152k: every chunk reads the head
    and adds to its gradient, and that is hidden behind the products only if they have about a thousand rows.
    """
    most = MAX_LOGITS // vocab_size if platform() == "cpu" else MAX_CHUNK
    return max(1, min(tokens, MAX_CHUNK, most))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lined:
    """The tokens of a mask one after the other, and the states that predict them."""

    places: jax.Array  # [N] int32, of the flattened rows; the first `count` are of the mask
    source: jax.Array  # [N] int32, where the state that predicts each lies
    count: jax.Array  # [] int32

    @classmethod
    def of(cls, mask: jax.Array, source: jax.Array, chunk: int) -> "Lined":
        """`mask` and `source` [B, T]: position within the row."""
        rows, length = mask.shape
        total = rows * length
        places = jnp.flatnonzero(mask, size=-(-total // chunk) * chunk, fill_value=0).astype(jnp.int32)
        flat = (source + length * jnp.arange(rows, dtype=jnp.int32)[:, None]).reshape(-1)
        return cls(places, flat[places], mask.sum(dtype=jnp.int32))

    def num_chunks(self, size: int) -> jax.Array:
        """Chunks of `size` that they fill. Devices that hold other rows may have more or less to do; those that share
        rows, a vocabulary split between them, go through the same ones together."""
        return -(-self.count // size)

    def chunk(self, index: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(places, source, whether it is a token of the mask) [C] of chunk `index`."""
        places, source = (jax.lax.dynamic_slice_in_dim(x, index * size, size) for x in (self.places, self.source))
        return places, source, index * size + jnp.arange(size) < self.count


def score_tokens(
    params: Params, arch: Architecture, temperature: jax.Array | float, hidden: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-prob and entropy [C] of `tokens` [C] from hidden states [C, D]: softmax(logits / temperature), float32."""
    scores = logits(params, arch, hidden) / temperature
    # A token's score is summed out and not gathered: a gather would bring a split vocabulary together.
    chosen = jnp.sum(jnp.where(jnp.arange(scores.shape[-1]) == tokens[:, None], scores, 0.0), axis=-1)
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    mass = jnp.exp(scores - highest)
    total = mass.sum(axis=-1)
    log_total = jnp.log(total) + highest[:, 0]
    entropy = log_total - jnp.sum(mass * scores, axis=-1) / total
    return chosen - log_total, entropy


def token_logprobs(
    params: Params,
    arch: Architecture,
    hidden: jax.Array,
    source: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    temperature: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropies) [B, T] float32 of each of `tokens` [B, T] given the hidden state [B, T, D] before it.

    Of softmax(logits / temperature) over the full vocabulary. Values outside `mask` [B, T] are 0. Has no gradient:
    how many chunks there are is data. `rl/head.py` has losses of them.

    Args:
      source: [B, T] int32, position in the row of the hidden state that predicts each token.
    """

    def run(head: Params, hidden: jax.Array, source: jax.Array, tokens: jax.Array, mask: jax.Array) -> Any:
        chunk = chunk_tokens(mask.size, arch.vocab_size)
        lined = Lined.of(mask, source, chunk)
        states, flat = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)

        def score(index: jax.Array, scored: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            places, source, _ = lined.chunk(index, chunk)
            found = score_tokens(head, arch, temperature, states[source], flat[places])
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=index * chunk, axis=0)
            return tuple(write(old, new) for old, new in zip(scored, found, strict=True))

        empty = jnp.zeros(lined.places.shape, jnp.float32)
        scored = jax.lax.fori_loop(0, lined.num_chunks(chunk), score, (empty, empty))
        rank = jnp.cumsum(mask.reshape(-1)).reshape(mask.shape) - 1
        return tuple(jnp.where(mask, values[rank], 0.0) for values in scored)

    rows = (jnp.asarray(x) for x in (hidden, source, tokens, mask))
    return on_own_rows(run, rows=4)(head_params(params, arch), *rows)


def on_own_rows(function: Callable[..., Any], *, rows: int, out_specs: Any = ROWS) -> Callable[..., Any]:
    """`function(replicated, *arrays)` on each device's own rows, where the caller has entered the project's mesh.

    XLA, left to split a flattened [B * T], would send every device all logits. `rows` is the number of arguments with
    leading dim B; the tensor axis stays XLA's. Without a mesh, or where it does not divide the rows, it runs as it is.
    """

    def run(whole: Any, *arrays: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if not set(AXES) <= set(mesh.axis_names) or any(kind != AxisType.Auto for kind in mesh.axis_types):
            return function(whole, *arrays)
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if shards == 1 or jax.tree.leaves(arrays)[0].shape[0] % shards:
            return function(whole, *arrays)
        split = jax.shard_map(
            function,
            in_specs=(PartitionSpec(), *[ROWS] * rows),
            out_specs=out_specs,
            axis_names=set(ROWS[0]),
            check_vma=False,
        )
        return split(whole, *arrays)

    return run


def splits_rows() -> bool:
    """Whether this is traced inside `on_own_rows`'s split."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(
        name in mesh.axis_names and mesh.axis_types[mesh.axis_names.index(name)] == AxisType.Manual for name in ROWS[0]
    )
