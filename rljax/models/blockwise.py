"""Exact softmax attention block by block: memory linear in the row length, blocks that nobody sees skipped.

A row of T positions is cut into n blocks of S. What is worked on is a list, made on the device from the layout: for
each query block the key blocks of which one of its queries may see a token. Forward and backward loop over the query
blocks and, inside, over the list; a block of scores is all that exists of the [T, T] matrix.

Letters: B rows, T positions, N query heads, K key/value heads, g = N/K, H head dim, S positions of a block, n = T/S
blocks of a row, R = B n blocks of all rows. Queries of a block are [K, g, S, H], keys [K, S, H].
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from rljax.mesh import platform

if TYPE_CHECKING:
    from rljax.models.attention import AttentionLayout

CPU_BLOCK, BLOCK = 64, 512
"""Positions S of a block on a CPU and elsewhere.

On two cores 64, 128 and 256 compute as fast, and of shared-prompt rows 64 skips most. Matrix units want large
products; 512 is not measured.
"""

LOWEST = -1e30
"""Where the running maximum of a query starts: finite, so that exp(-inf - maximum) is 0 and not NaN."""


class Blocks(NamedTuple):
    """Who is who, and who looks at whom, block by block."""

    group: jax.Array  # [R, S] int32, -1 is padding
    completion: jax.Array  # [R, S] int32
    keys: jax.Array  # [R, n] int32, per query block the blocks of keys to visit, in [0, R), the first `visits` count
    visits: jax.Array  # [R] int32


Kept = tuple[jax.Array, jax.Array, jax.Array, Blocks, jax.Array, jax.Array]
"""q, k, v, blocks, context, log of the denominator: all of a forward pass that its backward pass needs."""


def visible_blocks(group: jax.Array, completion: jax.Array) -> jax.Array:
    """[B, n query block, n key block] bool from group and completion [B, n, S]: False only where nothing is seen.

    A block is known by the lowest and highest (group, completion) in it and the lowest and highest group of which it
    holds prompt tokens. Two blocks meet if those ranges do. In rows packed in order, [prompt | completion 1 | ... |
    next group], that is exact; in any other order it may name a pair too many, never one too few.
    """
    last = jnp.iinfo(jnp.int32).max
    real = group >= 0

    def span(of: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lowest and highest [B, n]; last and -1, which meet nothing, where there is none."""
        return jnp.where(where, of, last).min(-1), jnp.where(where, of, -1).max(-1)

    low, high = span(group, real)
    prompt_low, prompt_high = span(group, real & (completion == 0))
    low_own, _ = span(completion, real & (group == low[..., None]))
    _, high_own = span(completion, real & (group == high[..., None]))

    def not_after(a: jax.Array, a_own: jax.Array, b: jax.Array, b_own: jax.Array) -> jax.Array:
        """(a, a_own) <= (b, b_own), by the group first."""
        return (a < b) | ((a == b) & (a_own <= b_own))

    q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
    own = not_after(low[k], low_own[k], high[q], high_own[q]) & not_after(low[q], low_own[q], high[k], high_own[k])
    prompt = (prompt_low[k] <= high[q]) & (low[q] <= prompt_high[k])
    return (own | prompt) & jnp.tri(group.shape[1], dtype=bool)


def list_blocks(layout: "AttentionLayout", block: int) -> Blocks:
    """Of a layout whose T is a multiple of `block`."""
    rows, length = layout.group.shape
    count = length // block
    group, completion = (x.reshape(rows, count, block) for x in (layout.group, layout.completion))
    visible = visible_blocks(group, completion)
    numbers = jnp.arange(count, dtype=jnp.int32)
    keys = jnp.sort(jnp.where(visible, numbers, count), axis=-1)  # those not to be visited go last
    keys = jnp.minimum(keys, count - 1) + count * jnp.arange(rows, dtype=jnp.int32)[:, None, None]
    return Blocks(
        group.reshape(-1, block),
        completion.reshape(-1, block),
        keys.reshape(-1, count),
        visible.sum(-1, dtype=jnp.int32).reshape(-1),
    )


def _cut_queries(x: jax.Array, kv_heads: int, block: int) -> jax.Array:
    """[B, T, N, H] to [R, K, g, S, H]."""
    return x.reshape(-1, block, kv_heads, x.shape[2] // kv_heads, x.shape[3]).transpose(0, 2, 3, 1, 4)


def _join_queries(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[R, K, H, g, S] to `shape`, [B, T, N, H]."""
    return x.transpose(0, 4, 1, 3, 2).reshape(shape)


def _cut_keys(x: jax.Array, block: int) -> jax.Array:
    """[B, T, K, H] to [R, K, S, H]."""
    return x.reshape(-1, block, *x.shape[2:]).transpose(0, 2, 1, 3)


def _join_keys(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[R, K, S, H] to `shape`, [B, T, K, H]."""
    return x.transpose(0, 2, 1, 3).reshape(shape)


# ------------------------------------------------------------------------------------------------------------ the loops
# Scores lie as [K, S key, g, S query], and keys or values are transposed beforehand where a product would sum over the
# first dim of its left side. XLA:CPU takes twice as long for such a product, and a maximum or sum along the last dim it
# finds number by number, which takes as long as a product.


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 einsum of operands of one dtype, float32 ones exactly."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)


def _add(x: jax.Array, index: jax.Array, more: jax.Array) -> jax.Array:
    """`x` with `more` added to `x[index]`; in place inside a loop."""
    return jax.lax.dynamic_update_index_in_dim(x, _pick(x, index) + more, index, 0)


def _scores(q: jax.Array, k: jax.Array, query: jax.Array, key: jax.Array, blocks: Blocks) -> jax.Array:
    """[K, S, g, S] float32 of queries [K, g, S, H] in block `query` with keys [K, S, H] in block `key`.

    -inf where a query may not see the key.
    """
    _, block, head_dim = k.shape
    place = jnp.arange(block)
    group, completion = _pick(blocks.group, key)[:, None], _pick(blocks.completion, key)[:, None]
    seen = (group == _pick(blocks.group, query)) & (group >= 0)
    seen &= (completion == 0) | (completion == _pick(blocks.completion, query))
    seen &= (key * block + place)[:, None] <= query * block + place  # counted through all rows: both are of one row
    return jnp.where(seen[:, None], _dot("ksh,kgth->ksgt", k, q) * head_dim**-0.5, -jnp.inf)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """Context [B, T, N, H], 0 where nothing is seen, and log of the softmax's denominator [R, K, g, S] float32."""
    block = blocks.group.shape[1]
    q_cut, k_cut = _cut_queries(q, k.shape[2], block), _cut_keys(k, block)
    v_turned = _cut_keys(v, block).swapaxes(2, 3)

    def of_queries(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, q_block, keys, visits = inputs

        def of_keys(visit: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            context, top, total = carry
            key = keys[visit]
            scores = _scores(q_block, _pick(k_cut, key), query, key, blocks)
            higher = jnp.maximum(top, scores.max(1))
            weights = jnp.exp(scores - higher[:, None])
            fade = jnp.exp(top - higher)
            more = _dot("khs,ksgt->khgt", _pick(v_turned, key), weights.astype(v.dtype))
            return context * fade[:, None] + more, higher, total * fade + weights.sum(1)

        per_query = q_block.shape[:3]
        start = jnp.zeros((per_query[0], q.shape[3], *per_query[1:])), jnp.full(per_query, LOWEST), jnp.zeros(per_query)
        context, top, total = jax.lax.fori_loop(0, visits, of_keys, start)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        return (context / total[:, None]).astype(q.dtype), top + jnp.log(total)

    numbers = jnp.arange(len(q_cut), dtype=jnp.int32)
    context, log_total = jax.lax.map(of_queries, (numbers, q_cut, blocks.keys, blocks.visits))
    return _join_queries(context, q.shape), log_total


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks) -> jax.Array:
    """Context [B, T, N, H]; T is a multiple of the block."""
    return _forward(q, k, v, blocks)[0]


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks) -> tuple[jax.Array, Kept]:
    context, log_total = _forward(q, k, v, blocks)
    return context, (q, k, v, blocks, context, log_total)


def _attend_backward(kept: Kept, d_context: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Gradients of q, k and v; the scores are computed again."""
    q, k, v, blocks, context, log_total = kept
    block = blocks.group.shape[1]
    q_cut, d_cut, context_cut = (_cut_queries(x, k.shape[2], block) for x in (q, d_context, context))
    k_cut, v_cut = _cut_keys(k, block), _cut_keys(v, block)
    k_turned = k_cut.swapaxes(2, 3)
    # What the derivative of a softmax subtracts: the mean under the weights of their gradients.
    mean = jnp.sum(context_cut.astype(jnp.float32) * d_cut.astype(jnp.float32), axis=-1)

    def of_queries(
        sums: tuple[jax.Array, ...], inputs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        query, q_block, d_block, log_total, mean, keys, visits = inputs

        def of_keys(visit: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq, dk, dv = carry
            key = keys[visit]
            weights = jnp.exp(_scores(q_block, _pick(k_cut, key), query, key, blocks) - log_total[:, None])
            d_weights = _dot("ksh,kgth->ksgt", _pick(v_cut, key), d_block)
            d_scores = (weights * (d_weights - mean[:, None])).astype(q.dtype)
            dq += _dot("khs,ksgt->khgt", _pick(k_turned, key), d_scores)
            dk = _add(dk, key, _dot("ksgt,kgth->ksh", d_scores, q_block))
            dv = _add(dv, key, _dot("ksgt,kgth->ksh", weights.astype(q.dtype), d_block))
            return dq, dk, dv

        start = jnp.zeros((k.shape[2], q.shape[3], *q_block.shape[1:3]))
        dq, *sums_after = jax.lax.fori_loop(0, visits, of_keys, (start, *sums))
        return tuple(sums_after), dq

    zeros = jnp.zeros(k_cut.shape)
    numbers = jnp.arange(len(q_cut), dtype=jnp.int32)
    inputs = numbers, q_cut, d_cut, log_total, mean, blocks.keys, blocks.visits
    (dk, dv), dq = jax.lax.scan(of_queries, (zeros, zeros), inputs)
    scale = q.shape[-1] ** -0.5
    dq = _join_queries(dq * scale, q.shape).astype(q.dtype)
    return dq, _join_keys(dk * scale, k.shape).astype(k.dtype), _join_keys(dv, v.shape).astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, layout: "AttentionLayout", block: int | None = None
) -> jax.Array:
    """Softmax attention that costs what its visible blocks cost; 0 at padded positions.

    q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]. Scores, softmax and sums in float32.
    """
    block = block or (CPU_BLOCK if platform() == "cpu" else BLOCK)
    length = q.shape[1]
    fill = ((0, 0), (0, -length % block), (0, 0), (0, 0))
    whole = type(layout)(
        jnp.pad(layout.group, fill[:2], constant_values=-1),
        jnp.pad(layout.completion, fill[:2]),
    )
    q, k, v = (jnp.pad(x, fill) for x in (q, k, v))
    return _attend(q, k, v, list_blocks(whole, block))[:, :length]
