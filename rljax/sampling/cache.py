"""The split key/value cache of a decode and the attention of one step over it.

One prefix per lane (a prompt), filled once; one suffix per row (a sample), a ring that every row writes at the same
slot. The newest token lies in that slot, the one before it in the slot before, and so on around the ring, so a row sees
as many slots backwards as it has tokens: rows may have begun at different steps.

Keys lie slots innermost and values head dim innermost, as the two products of a step read them: on a CPU the keys the
other way round cost up to seven times as much, on a TPU a head dim of 64 would fill half of a tile.

Letters: L lanes, W samples per lane, B = L * W rows, S prompt slots, R completion slots, N query heads, K key/value
heads, g = N/K, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rljax.models.attention import NEVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """Keys and values of the prompts, shared by the samples of a lane."""

    keys: list[jax.Array]  # per layer [L, K, H, S]
    values: list[jax.Array]  # per layer [L, K, S, H]
    lengths: jax.Array  # [L] int32, slots in use, at least 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SuffixCache:
    """Keys and values of what each sample has decoded."""

    keys: list[jax.Array]  # per layer [B, K, H, R]
    values: list[jax.Array]  # per layer [B, K, R, H]


def empty_suffix(like: PrefixCache, rows: int, slots: int) -> SuffixCache:
    """A suffix of `slots` for `rows` rows, in the prefix's shapes and dtype."""
    _, heads, head_dim, _ = like.keys[0].shape
    keys = [jnp.zeros((rows, heads, head_dim, slots), layer.dtype) for layer in like.keys]
    return SuffixCache(keys, [jnp.zeros((rows, heads, slots, head_dim), layer.dtype) for layer in like.values])


def write_key(keys: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
    """`keys` [B, K, H, R] with `new` [B, K, H] at `slot` []: one update in place, no scatter."""
    return jax.lax.dynamic_update_slice_in_dim(keys, new[..., None], slot, axis=3)


def write_value(values: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
    """`values` [B, K, R, H] with `new` [B, K, H] at `slot` []: one update in place, no scatter."""
    return jax.lax.dynamic_update_slice_in_dim(values, new[:, :, None], slot, axis=2)


def visible_slots(lengths: jax.Array, slot: jax.Array, slots: int) -> jax.Array:
    """[B, R] bool: the last `lengths` [B] slots of the ring, counted back from `slot` []."""
    age = (slot - jnp.arange(slots)) % slots
    return age < lengths[:, None]


def decode_attention(
    q: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    in_prompt: jax.Array,
    suffix: tuple[jax.Array, jax.Array],
    visible: jax.Array,
) -> jax.Array:
    """Context [B, N, H] of one query per row, q [B, N, H], over its prompt and its own tokens.

    One softmax over both parts, in float32. The prefix part is a matrix product over the W * g queries of a lane, so
    its keys are read once per lane and not once per sample. Slots outside `in_prompt` [L, S] and `visible` [B, R]
    get no mass; their values must be finite (`without_hidden`), since 0 * NaN is NaN.
    """
    (prefix_k, prefix_v), (suffix_k, suffix_v) = prefix, suffix
    lanes, kv_heads, head_dim, _ = prefix_k.shape
    rows, per_kv = q.shape[0], q.shape[1] // kv_heads
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scale, f32 = head_dim**-0.5, jnp.float32

    own = q.reshape(rows, kv_heads, per_kv, head_dim)
    shared = by_lane(own, lanes)
    prefix_scores = jnp.einsum("lkmh,lkhs->lkms", shared, prefix_k, precision=precision, preferred_element_type=f32)
    prefix_scores = jnp.where(in_prompt[:, None, None], prefix_scores * scale, NEVER)
    suffix_scores = jnp.einsum("bkgh,bkhr->bkgr", own, suffix_k, precision=precision, preferred_element_type=f32)
    suffix_scores = jnp.where(visible[:, None, None], suffix_scores * scale, NEVER)
    highest = jnp.maximum(by_row(prefix_scores.max(axis=-1), rows), suffix_scores.max(axis=-1))
    prefix_mass = jnp.exp(prefix_scores - by_lane(highest, lanes)[..., None])
    suffix_mass = jnp.exp(suffix_scores - highest[..., None])
    total = by_row(prefix_mass.sum(axis=-1), rows) + suffix_mass.sum(axis=-1)

    prefix_mass, suffix_mass = prefix_mass.astype(q.dtype), suffix_mass.astype(q.dtype)
    shared = jnp.einsum("lkms,lksh->lkmh", prefix_mass, prefix_v, precision=precision, preferred_element_type=f32)
    own = jnp.einsum("bkgr,bkrh->bkgh", suffix_mass, suffix_v, precision=precision, preferred_element_type=f32)
    return ((by_row(shared, rows) + own) / total[..., None]).astype(q.dtype).reshape(q.shape)


def by_lane(x: jax.Array, lanes: int) -> jax.Array:
    """[B, K, g, ...] as [L, K, W * g, ...]: the queries of a lane side by side."""
    rows, kv_heads, per_kv, *rest = x.shape
    split = x.reshape(lanes, rows // lanes, kv_heads, per_kv, *rest).swapaxes(1, 2)
    return split.reshape(lanes, kv_heads, -1, *rest)


def by_row(x: jax.Array, rows: int) -> jax.Array:
    """[L, K, W * g, ...] as [B, K, g, ...]: undoes `by_lane`."""
    lanes, kv_heads, queries, *rest = x.shape
    samples = rows // lanes
    split = x.reshape(lanes, kv_heads, samples, queries // samples, *rest).swapaxes(1, 2)
    return split.reshape(rows, kv_heads, -1, *rest)


def without_hidden(values: jax.Array, visible: jax.Array) -> jax.Array:
    """`values` [rows, K, slots, H] with 0 in the slots that `visible` [rows, slots] hides."""
    return jnp.where(visible[:, None, :, None], values, 0)
