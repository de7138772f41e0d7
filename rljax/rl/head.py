"""The learner's loss head: from hidden states to a loss and its gradients, without a [B, T, V] array.

A loss that is a sum over tokens is known chunk by chunk, its gradients with it: three products with the head. One that
looks at whole sequences needs all log-probs first and the logits of every chunk twice: four.

Letters: B rows, T positions, D width, V vocabulary, C tokens of a chunk.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rljax.config import Architecture
from rljax.mesh import ROWS, platform
from rljax.metrics import Max, Metric, Min, merge, nothing_counted
from rljax.models.qwen2 import Params, head_params
from rljax.models.scoring import (
    Lined,
    chunk_tokens,
    on_own_rows,
    score_tokens,
    splits_rows,
    token_logprobs,
)
from rljax.rl.logprobs import batch_states
from rljax.types import TrainBatch

Metrics = dict[str, Metric]
TokenLoss = Callable[[jax.Array, jax.Array, TrainBatch], tuple[jax.Array, Metrics]]
"""(log-probs, entropies, batch) -> (loss, metrics), sums over the tokens of the batch's loss mask; arrays [b, t]."""


def batch_loss(
    loss: TokenLoss,
    params: Params,
    arch: Architecture,
    batch: TrainBatch,
    *,
    by_token: bool = False,
    train_head: bool = True,
    temperature: float = 1.0,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    head_dtype: Any = None,
) -> tuple[jax.Array, Metrics]:
    """`loss` of the log-probs of `batch` under `params`, and its metrics; has a gradient by `params`.

    Args:
      loss: where `by_token`, called with pieces [1, C] of the tokens in the loss mask and added up; else once, with the
        whole batch [B, T].
      train_head: whether the head's own weights have a gradient; otherwise that is 0, and a product less.
    """
    hidden = batch_states(params, arch, batch, compute_dtype=compute_dtype, remat=remat, head_dtype=head_dtype)
    head = Head(loss, arch, temperature, by_token, train_head)
    return _through_head(head, head_params(params, arch), hidden, jax.tree.map(jnp.asarray, batch))


@dataclasses.dataclass(frozen=True)
class Head:
    """What of a loss head is compiled in."""

    loss: TokenLoss
    arch: Architecture
    temperature: float
    by_token: bool
    train_head: bool

    def value_and_gradients(
        self, weights: Params, hidden: jax.Array, batch: TrainBatch
    ) -> tuple[jax.Array, Metrics, Params, jax.Array]:
        """(loss, metrics, gradient of the head's weights, gradient of the hidden states [B, T, D]).

        On a mesh each device works on its own rows and what concerns all is added up at the end.
        """
        out = (PartitionSpec(), PartitionSpec(), PartitionSpec(), ROWS)
        run = self._in_one_pass if self.by_token else self._in_two_passes
        return on_own_rows(run, rows=2, out_specs=out)(weights, hidden, batch)

    def _in_one_pass(self, weights: Params, hidden: jax.Array, batch: TrainBatch) -> tuple[Any, ...]:
        chunk = chunk_tokens(batch.tokens.size, self.arch.vocab_size)
        lined = Lined.of(batch.loss_mask, batch.source, chunk)
        states = hidden.reshape(-1, hidden.shape[-1])
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1), batch)
        cast = jax.tree.map(lambda leaf: leaf.astype(hidden.dtype), weights)

        def of_piece(weights: Params, states: jax.Array, piece: TrainBatch) -> tuple[jax.Array, Metrics]:
            logprobs, entropies = score_tokens(weights, self.arch, self.temperature, states, piece.tokens[0])
            logprobs, entropies = (jnp.where(piece.loss_mask, x, 0.0) for x in (logprobs, entropies))
            return self.loss(logprobs, entropies, piece)

        @partial(jax.jit, inline=True)  # traced once for shapes and loop
        def gradients(index: jax.Array) -> tuple[tuple[jax.Array, Metrics], tuple[Params, jax.Array], jax.Array]:
            places, source, inside = lined.chunk(index, chunk)
            piece = jax.tree.map(lambda leaf: leaf[places][None], flat)
            piece = dataclasses.replace(piece, loss_mask=inside[None], weights=jnp.where(inside, piece.weights, 0.0))
            trained, frozen = (cast, {}) if self.train_head else ({}, cast)

            def of_trained(trained: Params, states: jax.Array) -> tuple[jax.Array, Metrics]:
                return of_piece({**frozen, **trained}, states, piece)

            found = jax.value_and_grad(of_trained, argnums=(0, 1), has_aux=True)(trained, states[source])
            return *found, source

        def add(index: jax.Array, so_far: tuple[Any, ...]) -> tuple[Any, ...]:
            total, merged, d_weights, d_states = so_far
            (loss, metrics), (more, d_chunk), source = gradients(index)
            merged = jax.tree.map(partial(jnp.where, index == 0), metrics, merge(merged, metrics))
            d_weights = jax.tree.map(lambda sums, d: sums + d.astype(sums.dtype), d_weights, more)
            # The end of a prompt predicts the first token of each of its completions.
            return total + loss, merged, d_weights, d_states.at[source].add(d_chunk)

        _, metrics = jax.eval_shape(lambda: gradients(jnp.int32(0))[0])
        start = (
            jnp.float32(0),
            nothing_counted(metrics),
            self._no_gradient(weights),
            jnp.zeros_like(states),
        )
        loss, metrics, d_weights, d_states = jax.lax.fori_loop(0, lined.num_chunks(chunk), add, start)
        return _over_rows(loss, metrics, d_weights, d_states.reshape(hidden.shape))

    def _in_two_passes(self, weights: Params, hidden: jax.Array, batch: TrainBatch) -> tuple[Any, ...]:
        chunk = chunk_tokens(batch.tokens.size, self.arch.vocab_size)
        lined = Lined.of(batch.loss_mask, batch.source, chunk)
        states, tokens = hidden.reshape(-1, hidden.shape[-1]), batch.tokens.reshape(-1)
        cast = jax.tree.map(lambda leaf: leaf.astype(hidden.dtype), weights)
        scored = token_logprobs(cast, self.arch, hidden, batch.source, batch.tokens, batch.loss_mask, self.temperature)
        (loss, metrics), pulls = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)(*scored, batch)
        pulls = [pull.reshape(-1) for pull in pulls]

        def add(index: jax.Array, so_far: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
            d_weights, d_states = so_far
            places, source, inside = lined.chunk(index, chunk)
            score = partial(score_tokens, arch=self.arch, temperature=self.temperature, tokens=tokens[places])
            trained, frozen = (cast, {}) if self.train_head else ({}, cast)
            _, back = jax.vjp(lambda w, h: score({**frozen, **w}, hidden=h), trained, states[source])
            more, d_chunk = back(tuple(jnp.where(inside, pull[places], 0.0) for pull in pulls))
            d_weights = jax.tree.map(lambda sums, d: sums + d.astype(sums.dtype), d_weights, more)
            return d_weights, d_states.at[source].add(d_chunk)

        start = self._no_gradient(weights), jnp.zeros_like(states)
        d_weights, d_states = jax.lax.fori_loop(0, lined.num_chunks(chunk), add, start)
        return _over_rows(loss, metrics, d_weights, d_states.reshape(hidden.shape))

    def _no_gradient(self, weights: Params) -> Params:
        """Zeros to add the gradient of the head's weights to; nothing where they are not trained."""
        return jax.tree.map(jnp.zeros_like, weights) if self.train_head else {}


def _over_rows(
    loss: jax.Array, metrics: Metrics, d_weights: Params, d_hidden: jax.Array
) -> tuple[jax.Array, Metrics, Params, jax.Array]:
    """The first three added up over the devices that hold rows; metrics by their types."""
    if not splits_rows():
        return loss, metrics, d_weights, d_hidden
    extremes = {name: m for name, m in metrics.items() if isinstance(m, (Max, Min))}
    added: dict[str, Any] = {name: m for name, m in metrics.items() if name not in extremes}
    flat, unflatten = jax.flatten_util.ravel_pytree((loss, added))
    highest = [m.amount if isinstance(m, Max) else -m.amount for m in extremes.values()]
    highest = jnp.stack(highest) if highest else jnp.zeros(0)
    # Simulated devices wait for one another in the threads of few cores: one collective after the other, and none
    # beside those of the backward pass that comes next.
    in_order = jax.lax.optimization_barrier if platform() == "cpu" else lambda arrays: arrays
    flat, highest = in_order((jax.lax.psum(flat, ROWS[0]), highest))
    highest, d_weights = in_order((jax.lax.pmax(highest, ROWS[0]), d_weights))
    d_weights, d_hidden = in_order((jax.lax.psum(d_weights, ROWS[0]), d_hidden))
    loss, added = unflatten(flat)
    for (name, metric), value in zip(extremes.items(), highest, strict=True):
        added[name] = Max(value) if isinstance(metric, Max) else Min(-value)
    return loss, added, d_weights, d_hidden


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through_head(head: Head, weights: Params, hidden: jax.Array, batch: TrainBatch) -> tuple[jax.Array, Metrics]:
    loss, metrics, *_ = head.value_and_gradients(weights, hidden, batch)
    return loss, metrics


def _forward(head: Head, weights: Params, hidden: jax.Array, batch: TrainBatch) -> tuple[Any, Any]:
    loss, metrics, *gradients = head.value_and_gradients(weights, hidden, batch)
    return (loss, metrics), tuple(gradients)


def _backward(head: Head, gradients: tuple[Params, jax.Array], pulls: Any) -> tuple[Params | None, jax.Array, None]:
    del head
    d_weights, d_hidden = jax.tree.map(lambda leaf: (leaf * pulls[0]).astype(leaf.dtype), gradients)
    return d_weights or None, d_hidden, None


_through_head.defvjp(_forward, _backward)
