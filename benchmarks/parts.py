"""Parts of an update alone, each in two ways: the loss head in chunks or with whole logits, attention by blocks or
dense. `update.py --ablations head attention` measures them."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ablations import Ablation, Variant, measured
from common import Line, line
from contenders import Setup, Void
from steps import Program

from rljax.config import ARCHITECTURES
from rljax.models.attention import AttentionLayout, attention
from rljax.models.qwen2 import head_params, logits, param_shapes
from rljax.rl.head import Head
from rljax.types import TrainBatch

HEAD_TOKENS, HEAD_TIMED_TOKENS = 4096, 512
"""Of the loss head whose memory is counted, and of the one that is timed."""
ATTENTION_ROWS, ATTENTION_HEADS, ATTENTION_HEAD_DIM = 4, 4, 64
ATTENTION_LENGTHS = (512, 1024, 2048)
ATTENTION_ERROR = 1e-4
"""Largest difference between backends of the sum of context and gradients, whose entries are of size 1."""
EQUAL = 1e-3
"""Largest relative difference between the two ways of the loss head."""


def attention_ablation(length: int) -> Ablation:
    """Forward and backward of the learner's attention: whole score matrices or block by block, on causal rows.

    Raises:
      Void: the two differ.
    """
    shape = (ATTENTION_ROWS, length, ATTENTION_HEADS, ATTENTION_HEAD_DIM)
    layout = AttentionLayout.right_padded(jnp.full(ATTENTION_ROWS, length), length)

    def both_ways(key: jax.Array, layout: AttentionLayout, *, backend: str) -> jax.Array:
        q, k, v, d = (jax.random.normal(each, shape) for each in jax.random.split(key, 4))
        context, pull = jax.vjp(partial(attention, layout=layout, backend=backend), q, k, v)
        return sum(pull(d), context)

    work = ATTENTION_ROWS * length
    programs = {name: Program(partial(both_ways, backend=name), work, layout) for name in ("dense", "blockwise")}
    first, *others = (program.result() for program in programs.values())
    if any(np.abs(other - first).max() > ATTENTION_ERROR for other in others):
        raise Void(f"attention of {length} positions: backends differ by more than {ATTENTION_ERROR}")
    case = {"model": "attention", "batch": ATTENTION_ROWS, "lengths": "fixed", "positions": length, "dtype": "float32"}
    return Ablation(case, [Variant(name, p.run, float(p.work), None) for name, p in programs.items()])


def attention_lines(length: int, setup: Setup) -> list[Line]:
    """Measures `attention_ablation`."""
    return measured("attention", attention_ablation(length), setup)


class HeadPrograms:
    """The loss head's gradient at V = 151,936, in chunks and with all logits at once."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.arch = tokens, ARCHITECTURES["qwen2.5-0.5b"]

    @property
    def case(self) -> Line:
        """The `case` of a line of results."""
        return {"model": "0.5b", "batch": 1, "lengths": "fixed", "tokens": self.tokens, "vocab": self.arch.vocab_size}

    def arguments(self) -> tuple[Any, jax.ShapeDtypeStruct, TrainBatch]:
        """Shapes of (weights, hidden states, batch)."""
        shape = (1, self.tokens)
        params = head_params(param_shapes(self.arch), self.arch)
        hidden = jax.ShapeDtypeStruct((*shape, self.arch.hidden_size), jnp.float32)
        kinds = {"int32": jnp.int32, "bool": jnp.bool_, "float32": jnp.float32}
        ids = dict.fromkeys(("tokens", "positions", "group", "completion", "source"), "int32") | {"loss_mask": "bool"}
        fields_of = {field.name: kinds[ids.get(field.name, "float32")] for field in dataclasses.fields(TrainBatch)}
        batch = TrainBatch(**{name: jax.ShapeDtypeStruct(shape, kind) for name, kind in fields_of.items()})  # type: ignore
        return params, hidden, batch

    def filled(self) -> tuple[Any, jax.Array, TrainBatch]:
        """`arguments` as arrays: random, every token in the loss, each predicted by its own hidden state."""
        params, hidden, batch = self.arguments()
        keys = iter(jax.random.split(jax.random.key(0), 3))

        def random(like: jax.ShapeDtypeStruct) -> jax.Array:
            return 0.02 * jax.random.normal(next(keys), like.shape)

        filled = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), batch)
        places = jnp.arange(self.tokens, dtype=jnp.int32)[None]
        filled = dataclasses.replace(
            filled, tokens=places, source=places, positions=places, loss_mask=jnp.ones_like(places, bool)
        )
        return jax.tree.map(random, params), random(hidden), filled

    def whole(self, params: Any, hidden: jax.Array, batch: TrainBatch) -> tuple[jax.Array, Any, jax.Array]:
        """(sum of log-probs, gradient of the weights, of the hidden states) through all logits."""

        def loss(params: Any, hidden: jax.Array) -> jax.Array:
            predicting = jnp.take_along_axis(hidden, batch.source[..., None], axis=1)
            scored = jax.nn.log_softmax(logits(params, self.arch, predicting), axis=-1)
            chosen = jnp.take_along_axis(scored, batch.tokens[..., None], axis=-1)[..., 0]
            return jnp.sum(jnp.where(batch.loss_mask, chosen, 0.0))

        total, (d_params, d_hidden) = jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)
        return total, d_params, d_hidden

    def chunked(self, params: Any, hidden: jax.Array, batch: TrainBatch) -> tuple[jax.Array, Any, jax.Array]:
        """The same, as the learner does it."""

        def total(logprobs: jax.Array, entropies: jax.Array, rows: TrainBatch) -> tuple[jax.Array, dict[str, Any]]:
            del entropies, rows
            return logprobs.sum(), {}

        head = Head(total, self.arch, 1.0, by_token=True, train_head=True)
        loss, _, d_params, d_hidden = head.value_and_gradients(params, hidden, batch)
        return loss, d_params, d_hidden


def head_memory(tokens: int, fields: Line) -> list[Line]:
    """Temporary memory of the loss head's gradient.

    What the compiler says of its buffers, parameters and their gradients not among them; nothing is run.
    """
    programs, made = HeadPrograms(tokens), dict[str, float]()
    for name in ("whole", "chunked"):
        memory = jax.jit(getattr(programs, name)).lower(*programs.arguments()).compile().memory_analysis()
        assert memory is not None, "the backend does not say what memory a program needs"
        made[name] = memory.temp_size_in_bytes / 2**30
    lines = []
    for name, size in made.items():
        own = line(fields, programs.case | {"ablation": "head", "variant": name}, "temporary memory", "GiB", [size])
        lines.append(own | {"baseline": "whole", "ratio": round(made["whole"] / size, 3)})
        print(f"  loss head, {tokens} tokens, {name}: {size:.3f} GiB", flush=True)
    return lines


def head_ablation(tokens: int) -> Ablation:
    """How long the loss head's gradient takes.

    Raises:
      Void: the two differ.
    """
    programs = HeadPrograms(tokens)
    filled = programs.filled()

    def summed(key: jax.Array, *arguments: Any, name: str) -> jax.Array:
        del key
        loss, d_params, d_hidden = getattr(programs, name)(*arguments)
        return jnp.stack([loss, *(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves((d_params, d_hidden)))])

    timed = {name: Program(partial(summed, name=name), tokens, *filled) for name in ("whole", "chunked")}
    first, second = (program.result() for program in timed.values())
    if not np.allclose(first, second, rtol=EQUAL):
        raise Void(f"loss head of {tokens} tokens: value and squared norms differ: {first} and {second}")
    variants = [Variant(name, program.run, float(tokens), None) for name, program in timed.items()]
    return Ablation(programs.case | {"dtype": "float32"}, variants)


def head_lines(tokens: int, setup: Setup) -> list[Line]:
    """Measures `head_ablation`."""
    return measured("head", head_ablation(tokens), setup)
