"""The split key/value cache of a wave and the attention of one decode step over it.

One prefix per prompt, filled once; one suffix per sample, written at the same slot by every row. Rows of a prompt are
neighbours: row p * G + g. Both are lists of per-layer arrays, head-major.

Letters: P prompts, G samples per prompt, B = P * G rows, S prompt slots, R completion slots, N query heads, K key/value
heads, g = N/K, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rljax.models.attention import NEVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixCache:
    """Keys and values of the prompts, shared by the samples of each."""

    keys: list[jax.Array]  # per layer [P, K, S, H]
    values: list[jax.Array]  # per layer [P, K, S, H]
    lengths: jax.Array  # [P] int32, slots in use


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SuffixCache:
    """Keys and values of what each sample has decoded. Slot t holds completion token t of every row."""

    keys: list[jax.Array]  # per layer [B, K, R, H]
    values: list[jax.Array]  # per layer [B, K, R, H]


def empty_suffix(like: PrefixCache, rows: int, slots: int) -> SuffixCache:
    """A suffix of `slots` for `rows` rows, in the prefix's shapes and dtype."""
    _, heads, _, head_dim = like.keys[0].shape

    def zeros() -> list[jax.Array]:
        return [jnp.zeros((rows, heads, slots, head_dim), layer.dtype) for layer in like.keys]

    return SuffixCache(zeros(), zeros())


def write_slot(cache: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
    """`cache` [B, K, R, H] with `new` [B, K, H] at `slot` []: one contiguous update, no scatter."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new[:, :, None], slot, axis=2)


def decode_attention(
    q: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    prefix_lengths: jax.Array,
    suffix: tuple[jax.Array, jax.Array],
    slot: jax.Array,
) -> jax.Array:
    """Context [B, N, H] of one query per row over its prompt and its own tokens up to and including `slot`.

    One softmax over both parts, in float32. The prefix part is a matrix product over the G * g queries of a prompt, so
    its keys are read once per prompt and not once per sample.
    """
    (prefix_k, prefix_v), (suffix_k, suffix_v) = prefix, suffix
    prompts, kv_heads, prompt_slots, head_dim = prefix_k.shape
    rows, heads = q.shape[0], q.shape[1]
    samples, per_kv = rows // prompts, heads // kv_heads
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    own = q.reshape(rows, kv_heads, per_kv, head_dim)
    shared = own.reshape(prompts, samples, kv_heads, per_kv, head_dim)
    prefix_scores = jnp.einsum(
        "pckgh,pksh->pckgs", shared, prefix_k, precision=precision, preferred_element_type=jnp.float32
    ).reshape(rows, kv_heads, per_kv, prompt_slots)
    suffix_scores = jnp.einsum(
        "bkgh,bkrh->bkgr", own, suffix_k, precision=precision, preferred_element_type=jnp.float32
    )

    in_prompt = jnp.arange(prompt_slots) < jnp.repeat(prefix_lengths, samples)[:, None]
    written = jnp.arange(suffix_k.shape[2]) <= slot
    scale = head_dim**-0.5
    prefix_scores = jnp.where(in_prompt[:, None, None], prefix_scores * scale, NEVER)
    suffix_scores = jnp.where(written, suffix_scores * scale, NEVER)
    highest = jnp.maximum(prefix_scores.max(axis=-1), suffix_scores.max(axis=-1))[..., None]
    prefix_mass, suffix_mass = jnp.exp(prefix_scores - highest), jnp.exp(suffix_scores - highest)
    total = prefix_mass.sum(axis=-1, keepdims=True) + suffix_mass.sum(axis=-1, keepdims=True)

    prefix_probs = (prefix_mass / total).astype(q.dtype).reshape(prompts, samples, kv_heads, per_kv, prompt_slots)
    context = jnp.einsum("pckgs,pksh->pckgh", prefix_probs, prefix_v, precision=precision).reshape(own.shape)
    suffix_probs = (suffix_mass / total).astype(q.dtype)
    context = context + jnp.einsum("bkgr,bkrh->bkgh", suffix_probs, suffix_v, precision=precision)
    return context.reshape(q.shape)
