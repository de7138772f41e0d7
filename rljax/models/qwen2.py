"""The decoder of the Qwen2.5 / Qwen3 / Llama family: parameter declaration and forward passes.

The parameter tree is the contract; nothing outside this file knows of Flax modules.

  learner layout   {"embed": [V, D], "layers": {name: [L, ...]}, "final_norm": [D], "head": [D, V] if untied}
  sampler layout   the same with "layers" a list of dicts, q|k|v and gate|up fused, their matrices output-major, in the
                   compute dtype

In the learner layout a matrix may have a LoRA adapter beside it (`rljax/models/lora.py`); going over to the sampler's
adds it in.

Letters: B rows, T positions, P prompts, S prompt slots, L layers, D width, N query heads, K key/value heads, H head
dim, F MLP width, V vocabulary.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rljax.config import Architecture
from rljax.mesh import tensor_shards
from rljax.models.attention import NEVER, AttentionLayout, attention
from rljax.models.layers import (
    LINEARS,
    PRODUCT,
    Rope,
    copy_kv_heads,
    decoder_block,
    dot_to_float32,
    join_positions,
    merge_adapters,
    rms_norm,
    rope_tables,
    split_positions,
    whole_positions,
    with_a_kv_head_each,
)

Params = dict[str, Any]

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}
INIT_STDDEV = 0.02
"""Standard deviation of initial weights, as the family's `initializer_range`."""


class Block(nn.Module):
    """Declares one layer's weights and calls `decoder_block`; scanned over the layers."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: jax.Array, rope: Rope, layout: AttentionLayout) -> tuple[jax.Array, None]:
        a = self.arch
        heads, kv = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "attn_norm": ((a.hidden_size,), ("norm",)),
            "q": ((a.hidden_size, a.num_heads, a.head_dim), heads),
            "k": ((a.hidden_size, a.num_kv_heads, a.head_dim), kv),
            "v": ((a.hidden_size, a.num_kv_heads, a.head_dim), kv),
            "o": ((a.num_heads, a.head_dim, a.hidden_size), ("heads", "head_dim", "embed")),
            "mlp_norm": ((a.hidden_size,), ("norm",)),
            "gate": ((a.hidden_size, a.mlp_size), ("embed", "mlp")),
            "up": ((a.hidden_size, a.mlp_size), ("embed", "mlp")),
            "down": ((a.mlp_size, a.hidden_size), ("mlp", "embed")),
        }
        if a.qkv_bias:
            shapes["q_bias"] = ((a.num_heads, a.head_dim), heads[1:])
            shapes["k_bias"] = shapes["v_bias"] = ((a.num_kv_heads, a.head_dim), kv[1:])
        if a.qk_norm:
            shapes["q_norm"] = shapes["k_norm"] = ((a.head_dim,), ("norm",))
        weights: dict[str, Any] = {
            name: self.param(name, _initializer(name, axes), shape) for name, (shape, axes) in shapes.items()
        }
        # Given beside the weights, not declared: their rank is no part of the architecture.
        for name in (f"{matrix}_lora_{side}" for matrix in LINEARS for side in "ab"):
            if self.has_variable("params", name):
                weights[name] = self.get_variable("params", name)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return attention(q, k, v, layout), None

        spread = with_a_kv_head_each(a, tensor_shards())
        return decoder_block(copy_kv_heads(weights, spread), spread, x, rope, attend, split_residual=True)


def _initializer(name: str, axes: tuple[str, ...]):
    if name.endswith("norm"):
        kind = nn.initializers.ones
    elif name.endswith("bias"):
        kind = nn.initializers.zeros
    else:
        kind = nn.initializers.normal(INIT_STDDEV)
    return nn.with_partitioning(kind, axes)


class Decoder(nn.Module):
    """Embedding, the scanned blocks, the final norm; `head` is declared here and used by `logits`."""

    arch: Architecture
    compute_dtype: Any = jnp.float32
    remat: str = "none"
    head_dtype: Any = None
    """Of the final norm and its result, in which `logits` multiplies; None: the compute dtype."""

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, layout: AttentionLayout) -> jax.Array:
        a = self.arch
        vocab = _initializer("embed", ("vocab", "embed"))
        embed: Any = self.param("embed", vocab, (a.vocab_size, a.hidden_size))
        if not a.tied_embeddings:
            self.param("head", _initializer("head", ("embed", "vocab")), (a.hidden_size, a.vocab_size))
        x = split_positions(whole_positions(embed.astype(self.compute_dtype)[tokens]))
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=a.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(a, name="layers")(x, rope_tables(positions, a.head_dim, a.rope_theta), layout)
        x = join_positions(x)
        scale: Any = self.param("final_norm", _initializer("final_norm", ("norm",)), (a.hidden_size,))
        return rms_norm(x.astype(self.head_dtype or self.compute_dtype), scale, a.rms_norm_eps)


def _declare(arch: Architecture, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Decoder(arch).init(key, tokens, tokens, AttentionLayout(tokens, tokens))["params"]


@partial(jax.jit, static_argnames="arch")
def init(key: jax.Array, arch: Architecture) -> Params:
    """Random float32 parameters in the learner layout: normal(0.02) matrices, zero biases, unit norms."""
    return nn.meta.unbox(_declare(arch, key))


def param_shapes(arch: Architecture) -> Params:
    """Tree of `ShapeDtypeStruct` of the learner layout; allocates nothing."""
    return jax.eval_shape(lambda key: nn.meta.unbox(_declare(arch, key)), jax.random.key(0))


def param_axes(arch: Architecture) -> Params:
    """Tree of logical axis names of the learner layout, a tuple per leaf (rules: `rljax/mesh.py`)."""
    boxed = jax.eval_shape(partial(_declare, arch), jax.random.key(0))
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def forward(
    params: Params,
    arch: Architecture,
    tokens: jax.Array,
    positions: jax.Array,
    layout: AttentionLayout,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    head_dtype: Any = None,
) -> jax.Array:
    """Final hidden states [B, T, D] of `tokens` [B, T] at rotary `positions` [B, T], learner layout, in `head_dtype`
    (None: the compute dtype)."""
    decoder = Decoder(arch, compute_dtype, remat, head_dtype)
    return decoder.apply({"params": params}, tokens, positions, layout)  # type: ignore[return-value]


def head_params(params: Params, arch: Architecture) -> Params:
    """What `logits` uses of `params`."""
    return {_head_name(arch): params[_head_name(arch)]}


def _head_name(arch: Architecture) -> str:
    return "embed" if arch.tied_embeddings else "head"


def logits(params: Params, arch: Architecture, hidden: jax.Array) -> jax.Array:
    """float32 [..., V] from hidden [..., D], either layout; vocabulary rows that are no token get `NEVER`.

    Operands have the dtype of `hidden`, sums are float32.
    """
    if arch.tied_embeddings:
        scores = dot_to_float32("...d,vd->...v", hidden, params["embed"])
    else:
        scores = dot_to_float32("...d,dv->...v", hidden, params["head"])
    if 0 < arch.num_tokens < arch.vocab_size:
        scores = jnp.where(jnp.arange(arch.vocab_size) < arch.num_tokens, scores, NEVER)
    return scores


# ----------------------------------------------------------------------------------------------------- sampler layout


def sampler_params(params: Params, arch: Architecture, compute_dtype: Any, head_dtype: Any = None) -> Params:
    """Learner layout to sampler layout: unstack, merge adapters, cast, fuse. All at once; `Sampler.sync` has a program
    for a layer and one for the rest.

    Args:
      arch: the model, or with copies of its key/value heads (`layers.with_a_kv_head_each`).
      head_dtype: of the final norm and the head, and so of `final_states` and their logits; None: the compute dtype.
    """
    layers = [sampler_layer(params["layers"], i, arch, compute_dtype) for i in range(arch.num_layers)]
    return {**sampler_outside(params, arch, compute_dtype, head_dtype), "layers": layers}


def sampler_layer(layers: Params, index: int | jax.Array, arch: Architecture, compute_dtype: Any) -> Params:
    """Layer `index` in the sampler's layout, of the stacked `layers` of the learner's."""
    groups = arch.num_heads // arch.num_kv_heads
    layer = {name: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False) for name, leaf in layers.items()}
    weights = _cast(merge_adapters(layer), compute_dtype)
    weights = copy_kv_heads(weights, arch)
    fused = {name: weights[name] for name in weights if name not in ("q", "k", "v", "gate", "up")}
    q = weights["q"].reshape(arch.hidden_size, arch.num_kv_heads, groups, arch.head_dim)
    qkv = jnp.concatenate([q, weights["k"][:, :, None], weights["v"][:, :, None]], axis=2)
    fused["qkv"] = jnp.moveaxis(qkv, 0, -1)
    if arch.qkv_bias:
        q_bias = fused.pop("q_bias").reshape(arch.num_kv_heads, groups, arch.head_dim)
        k_bias, v_bias = fused.pop("k_bias")[:, None], fused.pop("v_bias")[:, None]
        fused["qkv_bias"] = jnp.concatenate([q_bias, k_bias, v_bias], axis=1)
    fused["o"] = weights["o"].reshape(-1, arch.hidden_size).T
    fused["gate_up"] = jnp.stack([weights["gate"].T, weights["up"].T])
    fused["down"] = weights["down"].T
    return fused


def sampler_outside(params: Params, arch: Architecture, compute_dtype: Any, head_dtype: Any = None) -> Params:
    """What is of no layer in the sampler's layout: cast."""
    outside = {name: params[name] for name in params if name != "layers"}
    at_the_end = {name: outside.pop(name) for name in ("final_norm", _head_name(arch))}
    return {**_cast(outside, compute_dtype), **_cast(at_the_end, head_dtype or compute_dtype)}


def _cast(tree: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def block_dtype(params: Params) -> Any:
    """Of the blocks' arithmetic and caches; `params` in the sampler layout."""
    return params["layers"][0]["o"].dtype


def embedded(params: Params, tokens: jax.Array) -> jax.Array:
    """What the blocks start from, [..., D] of `tokens` [...], sampler layout."""
    return params["embed"][tokens].astype(block_dtype(params))


def final_states(params: Params, arch: Architecture, x: jax.Array) -> jax.Array:
    """What `logits` takes, [..., D] of the last block's `x` [..., D], sampler layout."""
    return rms_norm(x.astype(params["final_norm"].dtype), params["final_norm"], arch.rms_norm_eps)


def sampler_param_axes(arch: Architecture) -> Params:
    """Logical axis names of the sampler layout."""
    axes = param_axes(arch)
    layer = {name: names[1:] for name, names in axes["layers"].items() if name not in ("q", "k", "v", "gate", "up")}
    layer["qkv"] = ("kv_heads", "heads_per_kv", "head_dim", "embed")
    layer["o"] = ("embed", "heads")
    layer["gate_up"] = ("gate_up", "mlp", "embed")
    layer["down"] = ("embed", "mlp")
    if arch.qkv_bias:
        for name in ("q_bias", "k_bias", "v_bias"):
            del layer[name]
        layer["qkv_bias"] = ("kv_heads", "heads_per_kv", "head_dim")
    return {**axes, "layers": [layer] * arch.num_layers}


def prefill(
    params: Params, arch: Architecture, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """Runs right-padded sequences in the sampler layout: tokens [P, S], lengths [P].

    Returns the final hidden states [P, S, D] and, per layer, keys [P, K, H, S] and values [P, K, S, H], as the decode
    step reads them.
    """
    slots = tokens.shape[1]
    layout = AttentionLayout.right_padded(lengths, slots)
    rope = rope_tables(jnp.broadcast_to(jnp.arange(slots), tokens.shape), arch.head_dim, arch.rope_theta)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return attention(q, k, v, layout), (k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3))

    @partial(jax.jit, inline=True)  # the layers are alike: traced once
    def layer(weights: Params, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return decoder_block(weights, arch, x, rope, attend)

    x = embedded(params, tokens)
    keys, values = [], []
    for weights in params["layers"]:
        x, (k, v) = layer(weights, x)
        keys.append(k)
        values.append(v)
    return final_states(params, arch, x), keys, values
