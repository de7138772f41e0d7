"""The arithmetic of a decoder block, as pure functions of arrays. Learner and sampler call the same ones.

Letters: B rows, T positions, D width, N query heads, K key/value heads, H head dim, F MLP width, V vocabulary.
`...` stands for [B, T] in the learner and [rows] in the sampler.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from rljax.config import Architecture
from rljax.mesh import platform, tensor_shards

Weights = Mapping[str, jax.Array]
Rope = tuple[jax.Array, jax.Array]


LINEARS: dict[str, str] = {
    "q": "...d,dnh->...nh",
    "k": "...d,dnh->...nh",
    "v": "...d,dnh->...nh",
    "o": "...nh,nhd->...d",
    "gate": "...d,df->...f",
    "up": "...d,df->...f",
    "down": "...f,fd->...d",
}
"""The matrices of a block in the learner's layout, and how each is applied.

`NAME_lora_a` [*in, r] and `NAME_lora_b` [r, *out] may lie beside one (`rljax/models/lora.py`)."""


PRODUCT = "product"
"""Name of their results, by which a policy of rematerialisation keeps them."""


def dot(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Einsum in the dtype of `x`. float32 means float32 on TPU and GPU too, where the default would round to bf16."""
    return jnp.einsum(spec, x, weight.astype(x.dtype), precision=_precision(x))


def dot_to_float32(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`dot` whose sums are not rounded to the dtype of `x`: float32. Those of its gradient are, as `dot`'s.

    A logit of 20 has an ulp of 0.125 in bfloat16. The rule is written out because the derived one would multiply a
    float32 cotangent with widened weights, on GPU and TPU several times as slow.
    """
    if x.dtype == jnp.float32:
        return dot(spec, x, weight)
    return _wide_dot(spec, x, weight.astype(x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_dot(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, weight, preferred_element_type=jnp.float32)


def _wide_dot_forward(spec: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _wide_dot(spec, x, weight), (x, weight)


def _wide_dot_backward(spec: str, operands: tuple[jax.Array, jax.Array], pull: jax.Array) -> Any:
    return jax.vjp(partial(dot, spec), *operands)[1](pull.astype(operands[0].dtype))


_wide_dot.defvjp(_wide_dot_forward, _wide_dot_backward)


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def dot_output_major(x: jax.Array, weight: jax.Array) -> jax.Array:
    """W x of `x` [..., D] and an output-major weight [*out, D]: [..., *out], in the dtype of `x`."""
    if feeds_columns():
        return _rows_of(_dot_columns(weight, _columns(x)), x)
    return jnp.tensordot(x, weight.astype(x.dtype), axes=(-1, -1), precision=_precision(x))


def feeds_columns() -> bool:
    """Whether the rows of a decode step are multiplied as W X with X [D, rows], on the platform compiled for.

    XLA:CPU rearranges the right operand of a product before it multiplies, and the few rows of a step are less to
    rearrange than a weight. A GPU takes either order, but turning the result back is slow there.
    """
    return platform() == "cpu"


def _columns(x: jax.Array) -> jax.Array:
    """[D, rows] of `x` [..., D]."""
    return _settled(x.reshape(-1, x.shape[-1]).T)


def _dot_columns(weight: jax.Array, x: jax.Array) -> jax.Array:
    """W x of `weight` [*out, D] and `_columns` [D, rows]: [*out, rows]."""
    return jnp.tensordot(weight.astype(x.dtype), x, axes=1, precision=_precision(x))


def _rows_of(columns: jax.Array, like: jax.Array) -> jax.Array:
    """[..., *out] of `columns` [*out, rows], the leading dims those of `like` [..., D]."""
    rows = jnp.moveaxis(_settled(columns), -1, 0)
    return rows.reshape(*like.shape[:-1], *rows.shape[1:])


def _settled(x: jax.Array) -> jax.Array:
    """`x` as an array of its own on a CPU, where XLA would otherwise fold its transpose into the product."""
    return jax.lax.optimization_barrier(x) if platform() == "cpu" else x


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


def matrix_dims(name: str) -> tuple[str, str]:
    """Letters of the input and the output dims of one of `LINEARS`: ("d", "nh") of "q"."""
    inputs, output = LINEARS[name].split("->")
    return inputs.split(",")[0].removeprefix("..."), output.removeprefix("...")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(name: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """x W of the matrix `name`. For the gradient of W the narrower of x and the cotangent is transposed.

    JAX by itself takes the cotangent. XLA:CPU then computes it once more within its transpose, down the columns.
    Being a rule for reverse mode, it leaves the learner's forward pass without a forward-mode derivative (`jax.jvp`).
    """
    return dot(LINEARS[name], x, weight)


def _product_forward(name: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(name, x, weight), (x, weight)


def _product_backward(
    name: str, kept: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    into, out = matrix_dims(name)
    lead = "xyz"[: x.ndim - len(into)]
    by_x = dot(f"...{out},{into}{out}->...{into}", cotangent, weight)
    if x.size <= cotangent.size:
        by_weight = dot(f"{lead}{into},{lead}{out}->{into}{out}", x, cotangent)
    else:  # a transpose that is not held back would be made of x, by an exchange of the two
        turned = _settled(dot(f"{lead}{out},{lead}{into}->{out}{into}", cotangent, x))
        by_weight = jnp.einsum(f"{out}{into}->{into}{out}", turned)
    return by_x, by_weight.astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


def linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """x W of the matrix `name`, and x W + (x A) B where an adapter lies beside it: A B is never formed."""
    y = checkpoint_name(_product(name, x, weights[name]), PRODUCT)
    if f"{name}_lora_a" in weights:
        into, out = matrix_dims(name)
        narrow = dot(f"...{into},{into}r->...r", x, weights[f"{name}_lora_a"])
        y = y + dot(f"...r,r{out}->...{out}", narrow, weights[f"{name}_lora_b"])
    return y


def merge_adapters(weights: Weights) -> dict[str, jax.Array]:
    """`weights` of one layer, or of all stacked, with W + A B for each W that has an adapter, in float32.

    Without adapters they come back as they are.
    """
    merged = dict(weights)
    for name in LINEARS:
        if f"{name}_lora_a" in merged:
            into, out = matrix_dims(name)
            a, b = (merged.pop(f"{name}_lora_{side}").astype(jnp.float32) for side in "ab")
            product = dot(f"...{into}r,...r{out}->...{into}{out}", a, b)
            merged[name] = merged[name].astype(jnp.float32) + product
    return merged


KV_LEAVES = ("k", "v", "k_bias", "v_bias", "k_lora_b", "v_lora_b")
"""Weights [..., K, H]."""


def with_a_kv_head_each(arch: Architecture, tensor: int) -> Architecture:
    """`arch` as `tensor` devices compute it, which split the query heads: none of them without a key/value head.

    Where there are more devices than heads, and a multiple of them, as many devices hold a copy of the same head.
    """
    if tensor <= arch.num_kv_heads or tensor % arch.num_kv_heads or arch.num_heads % tensor:
        return arch
    return dataclasses.replace(arch, num_kv_heads=tensor)


def copy_kv_heads(weights: Weights, arch: Architecture) -> dict[str, jax.Array]:
    """`weights` of a layer, learner layout, with the key/value heads of `arch`, each copied as often as that takes.

    Of the weights and not of what they give, so that a device computes its own head and no other.
    """
    spread = dict(weights)
    for name in KV_LEAVES:
        if name in spread:
            copies = arch.num_kv_heads // spread[name].shape[-2]
            spread[name] = jnp.repeat(_whole_heads(spread[name]), copies, axis=-2) if copies > 1 else spread[name]
    return spread


def _whole_heads(x: jax.Array) -> jax.Array:
    """`x` [..., K, H], its last dims brought together on the mesh entered: they lie split within the heads."""
    if tensor_shards() == 1:
        return x
    anyhow = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*anyhow, None, None))


def project_qkv(weights: Weights, arch: Architecture, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [..., N, H], keys and values [..., K, H] from `x` [..., D].

    Takes the learner's separate matrices or the sampler's fused one, grouped by key head so that a tensor-parallel
    shard holds whole groups: qkv[:, k] = N/K query heads, then the key, then the value.
    """
    if "qkv" in weights:
        fused = dot_output_major(x, weights["qkv"])
        if arch.qkv_bias:
            fused = fused + weights["qkv_bias"].astype(x.dtype)
        q = fused[..., :-2, :].reshape(*x.shape[:-1], arch.num_heads, arch.head_dim)
        return q, fused[..., -2, :], fused[..., -1, :]
    q, k, v = (linear(weights, name, x) for name in "qkv")
    if arch.qkv_bias:
        q, k, v = (y + weights[f"{name}_bias"].astype(x.dtype) for name, y in zip("qkv", (q, k, v), strict=True))
    return q, k, v


def project_out(weights: Weights, context: jax.Array) -> jax.Array:
    """[..., D] from the heads' `context` [..., N, H]; the sampler's matrix has N and H merged."""
    if weights["o"].ndim == 2:
        return dot_output_major(context.reshape(*context.shape[:-2], -1), weights["o"])
    return linear(weights, "o", context)


def swiglu(weights: Weights, x: jax.Array) -> jax.Array:
    """down(silu(gate(x)) * up(x)), `x` [..., D]; gate and up fused in the sampler's layout."""
    if "gate_up" in weights:
        if feeds_columns():  # and so between the two products
            gate, up = _dot_columns(weights["gate_up"], _columns(x))
            return _rows_of(_dot_columns(weights["down"], jax.nn.silu(gate) * up), x)
        both = dot_output_major(x, weights["gate_up"])
        return dot_output_major(jax.nn.silu(both[..., 0, :]) * both[..., 1, :], weights["down"])

    def back(gate: jax.Array, up: jax.Array) -> jax.Array:
        return linear(weights, "down", jax.nn.silu(gate) * up)

    # Of the six arrays [..., F] that the backward pass needs, four are functions of the other two and are not kept.
    return jax.checkpoint(back, prevent_cse=False)(linear(weights, "gate", x), linear(weights, "up", x))


@jax.custom_vjp
def split_positions(x: jax.Array) -> jax.Array:
    """`x` [B, T, D] with its positions split over `tensor` on the mesh entered, if they divide.

    So the learner's residual stream lies between a layer's matrices, where nothing mixes positions: what the backward
    pass keeps of it is split, too, and adding up what the devices have of a product and copying the sum to all of them
    are the two halves of one all-reduce (sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198). The TPU
    compiler leaves some of those sums whole, which costs bytes: collectives in benchmarks/results/aot.jsonl.
    """
    return _laid_out(x, "tensor")


@jax.custom_vjp
def join_positions(x: jax.Array) -> jax.Array:
    """The inverse: all positions of `x` [B, T, D] on each device of `tensor`, once for all matrices that take it."""
    return _laid_out(x, None)


def whole_positions(x: jax.Array) -> jax.Array:
    """`x` [B, T, D] not split over `tensor`, nor its cotangent: of an embedding, whose table is split there."""
    return _laid_out(x, None)


def _laid_out(x: jax.Array, axis: str | None) -> jax.Array:
    shards = tensor_shards()
    if shards == 1 or x.shape[1] % shards:
        return x
    anyhow = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(anyhow, axis, anyhow))


# Each is the other's transpose. A constraint's own would be itself, and the products of the backward pass would each
# gather their cotangent anew.
split_positions.defvjp(lambda x: (split_positions(x), None), lambda _, pull: (join_positions(pull),))
join_positions.defvjp(lambda x: (join_positions(x), None), lambda _, pull: (split_positions(pull),))


def _unchanged(x: jax.Array) -> jax.Array:
    return x


def decoder_block(
    weights: Weights,
    arch: Architecture,
    x: jax.Array,
    rope: Rope,
    attend: Callable[..., tuple[jax.Array, Any]],
    *,
    split_residual: bool = False,
) -> tuple[jax.Array, Any]:
    """One pre-norm layer: `x` [..., D] -> ([..., D], what `attend` keeps).

    `attend(q, k, v)` returns the context [..., N, H] and anything it wants carried on, such as a cache. With
    `split_residual` `x` is [B, T, D] and lies as `split_positions` has it, and so does the result.
    """
    split, join = (split_positions, join_positions) if split_residual else (_unchanged, _unchanged)
    with jax.named_scope("attention"):
        q, k, v = project_qkv(weights, arch, join(rms_norm(x, weights["attn_norm"], arch.rms_norm_eps)))
        if arch.qk_norm:
            q = rms_norm(q, weights["q_norm"], arch.rms_norm_eps)
            k = rms_norm(k, weights["k_norm"], arch.rms_norm_eps)
        context, kept = attend(apply_rope(q, rope), apply_rope(k, rope), v)
        x = x + split(project_out(weights, context))
    with jax.named_scope("mlp"):
        return x + split(swiglu(weights, join(rms_norm(x, weights["mlp_norm"], arch.rms_norm_eps)))), kept
