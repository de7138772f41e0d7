"""The arithmetic of a decoder block, as pure functions of arrays. Learner and sampler call the same ones.

Letters: B rows, T positions, D width, N query heads, K key/value heads, H head dim, F MLP width, V vocabulary.
`...` stands for [B, T] in the learner and [rows] in the sampler.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rljax.config import Architecture

Weights = Mapping[str, jax.Array]
Rope = tuple[jax.Array, jax.Array]


def dot(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Einsum in the dtype of `x`. float32 means float32 on TPU and GPU too, where the default would round to bf16."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, weight.astype(x.dtype), precision=precision)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; the mean in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> Rope:
    """(cos, sin) [..., 1, H/2] float32 of rotary angles; float32 because bfloat16 rounds position 257 to 256."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates the halves of `x` [..., heads, H] against each other: x1 cos - x2 sin, x2 cos + x1 sin.

    Written without a concatenation, which XLA:CPU does element by element.
    """
    cos, sin = rope
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    signs = jnp.array([[-1.0], [1.0]], jnp.float32)
    rotated = halves * cos[..., None, :] + halves[..., ::-1, :] * (signs * sin[..., None, :])
    return rotated.reshape(x.shape).astype(x.dtype)


def project_qkv(weights: Weights, arch: Architecture, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [..., N, H], keys and values [..., K, H] from `x` [..., D].

    Takes the learner's separate matrices or the sampler's fused one, grouped by key head so that a tensor-parallel
    shard holds whole groups: qkv[:, k] = N/K query heads, then the key, then the value.
    """
    if "qkv" in weights:
        fused = dot("...d,dkjh->...kjh", x, weights["qkv"])
        if arch.qkv_bias:
            fused = fused + weights["qkv_bias"].astype(x.dtype)
        q = fused[..., :-2, :].reshape(*x.shape[:-1], arch.num_heads, arch.head_dim)
        return q, fused[..., -2, :], fused[..., -1, :]
    q, k, v = (dot("...d,dnh->...nh", x, weights[name]) for name in "qkv")
    if arch.qkv_bias:
        q, k, v = (y + weights[f"{name}_bias"].astype(x.dtype) for name, y in zip("qkv", (q, k, v), strict=True))
    return q, k, v


def project_out(weights: Weights, context: jax.Array) -> jax.Array:
    """[..., D] from the heads' `context` [..., N, H]; the sampler's matrix has N and H merged."""
    if weights["o"].ndim == 2:
        return dot("...e,ed->...d", context.reshape(*context.shape[:-2], -1), weights["o"])
    return dot("...nh,nhd->...d", context, weights["o"])


def swiglu(weights: Weights, x: jax.Array) -> jax.Array:
    """down(silu(gate(x)) * up(x)), `x` [..., D]; gate and up fused in the sampler's layout."""
    if "gate_up" in weights:
        fused = dot("...d,dcf->...cf", x, weights["gate_up"])
        gate, up = fused[..., 0, :], fused[..., 1, :]
    else:
        gate, up = dot("...d,df->...f", x, weights["gate"]), dot("...d,df->...f", x, weights["up"])
    return dot("...f,fd->...d", jax.nn.silu(gate) * up, weights["down"])


def decoder_block(
    weights: Weights, arch: Architecture, x: jax.Array, rope: Rope, attend: Callable[..., tuple[jax.Array, Any]]
) -> tuple[jax.Array, Any]:
    """One pre-norm layer: `x` [..., D] -> ([..., D], what `attend` keeps).

    `attend(q, k, v)` returns the context [..., N, H] and anything it wants carried on, such as a cache.
    """
    with jax.named_scope("attention"):
        q, k, v = project_qkv(weights, arch, rms_norm(x, weights["attn_norm"], arch.rms_norm_eps))
        if arch.qk_norm:
            q = rms_norm(q, weights["q_norm"], arch.rms_norm_eps)
            k = rms_norm(k, weights["k_norm"], arch.rms_norm_eps)
        context, kept = attend(apply_rope(q, rope), apply_rope(k, rope), v)
        x = x + project_out(weights, context)
    with jax.named_scope("mlp"):
        return x + swiglu(weights, rms_norm(x, weights["mlp_norm"], arch.rms_norm_eps)), kept
