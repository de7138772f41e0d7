"""Hugging Face folders (safetensors) to parameter trees and back, one tensor at a time, from one table of names."""

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from rljax.config import Architecture, ConfigError
from rljax.models.qwen2 import Params, param_shapes
from rljax.models.safetensors import Stored, list_tensors, read_json, write_tensors
from rljax.tokenizer import Tokenizer, find_folder

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")
"""What is fetched from a hub, and what a folder may hold for `save_folder` to replace it. No pickles, no code."""

# ------------------------------------------------------------------------------------------------------------- names

NAMES: dict[str, tuple[str, str, str]] = {
    "embed": ("model.embed_tokens.weight", "V D", "V D"),
    "layers.attn_norm": ("model.layers.{}.input_layernorm.weight", "D", "D"),
    "layers.q": ("model.layers.{}.self_attn.q_proj.weight", "NH D", "D N H"),
    "layers.k": ("model.layers.{}.self_attn.k_proj.weight", "KH D", "D K H"),
    "layers.v": ("model.layers.{}.self_attn.v_proj.weight", "KH D", "D K H"),
    "layers.q_bias": ("model.layers.{}.self_attn.q_proj.bias", "NH", "N H"),
    "layers.k_bias": ("model.layers.{}.self_attn.k_proj.bias", "KH", "K H"),
    "layers.v_bias": ("model.layers.{}.self_attn.v_proj.bias", "KH", "K H"),
    "layers.q_norm": ("model.layers.{}.self_attn.q_norm.weight", "H", "H"),
    "layers.k_norm": ("model.layers.{}.self_attn.k_norm.weight", "H", "H"),
    "layers.o": ("model.layers.{}.self_attn.o_proj.weight", "D NH", "N H D"),
    "layers.mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "D", "D"),
    "layers.gate": ("model.layers.{}.mlp.gate_proj.weight", "F D", "D F"),
    "layers.up": ("model.layers.{}.mlp.up_proj.weight", "F D", "D F"),
    "layers.down": ("model.layers.{}.mlp.down_proj.weight", "D F", "F D"),
    "final_norm": ("model.norm.weight", "D", "D"),
    "head": ("lm_head.weight", "V D", "D V"),
}
"""Leaf: (name in the file, axes in the file, axes in the leaf). `NH` is N and H merged; the leading L is left out."""


class Entry(NamedTuple):
    """One tensor of a file and its place in the tree."""

    leaf: str
    layer: int | None
    """None: the leaf is not stacked."""
    name: str
    shape: tuple[int, ...]
    """As stored."""
    axes: tuple[tuple[int, ...], ...]
    """Per stored axis, the leaf's axes (leading L left out) merged into it."""


def entries(arch: Architecture) -> list[Entry]:
    """Every tensor of an architecture, in file order (layer by layer)."""
    shapes = param_shapes(arch)

    def entry(leaf: str, layer: int | None) -> Entry:
        name, stored, held = NAMES[leaf]
        letters = held.split()
        axes = tuple(tuple(letters.index(letter) for letter in merged) for merged in stored.split())
        sizes = _leaf(shapes, leaf).shape[-len(letters) :]
        shape = tuple(math.prod(sizes[axis] for axis in merged) for merged in axes)
        return Entry(leaf, layer, name.format(layer), shape, axes)

    layers = [(f"layers.{name}", layer) for layer in range(arch.num_layers) for name in shapes["layers"]]
    ends = [(leaf, None) for leaf in ("final_norm", "head") if leaf in shapes]
    return [entry(leaf, layer) for leaf, layer in [("embed", None), *layers, *ends]]


def _leaf(tree: Params, leaf: str) -> Any:
    for key in leaf.split("."):
        tree = tree[key]
    return tree


# ------------------------------------------------------------------------------------------------------ architecture


def resolve(path: str | Path, revision: str = "") -> Path:
    """The local folder `path`, or the hub's snapshot of that name: safetensors, JSON and templates only.

    Raises:
      ConfigError: neither.
    """
    return find_folder(path, revision, MODEL_FILES)


def read_architecture(folder: str | Path) -> Architecture:
    """Shape of the model in `folder`, from its config.json.

    Raises:
      ConfigError: there is no config.json, or it asks for something this decoder does not do.
    """
    file = Path(folder) / "config.json"
    config = read_json(file)
    family = config.get("model_type")

    def refuse(key: str, value: Any, required: str) -> None:
        raise ConfigError(f"{file}: {key} = {value!r} is not supported; {required}; use another model")

    if family not in ("qwen2", "qwen3", "llama"):
        refuse("model_type", family, "qwen2, qwen3 and llama are")
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [key for key in required if not isinstance(config.get(key), int)]
    if missing:
        raise ConfigError(f"{file} lacks {', '.join(missing)}; it must be the config.json of a {family} model")
    if config.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", config["hidden_act"], "the MLP must be gated by silu")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) and not (family == "qwen2" and key == "attention_bias"):
            refuse(key, True, f"a {family} model must have none")
    if config.get("quantization_config"):
        refuse("quantization_config", config["quantization_config"], "weights must be float32, float16 or bfloat16")
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    windowed = config.get("use_sliding_window") and config.get("max_window_layers", 28) < layers
    if windowed or "sliding_attention" in (config.get("layer_types") or ()):
        refuse("use_sliding_window", True, "every layer must attend to the whole sequence")

    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    rope = {"rope_theta": config.get("rope_theta", 1e4)}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("rope scaling", rope, "rotary embeddings must be the plain kind, over the whole head")
    return Architecture(
        hidden_size=config["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else config["hidden_size"] // heads),
        mlp_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=float(rope["rope_theta"]),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
    )


def describe_architecture(arch: Architecture) -> dict[str, Any]:
    """The config.json of an architecture: what `read_architecture` and transformers (4 and 5) read.

    Raises:
      ConfigError: no family has this combination of biases and norms.
    """
    families = {(True, False): "Qwen2", (False, True): "Qwen3", (False, False): "Llama"}
    if (arch.qkv_bias, arch.qk_norm) not in families:
        raise ConfigError(
            f"qkv_bias = {arch.qkv_bias} with qk_norm = {arch.qk_norm} is no Hugging Face family; an architecture to "
            "save must have at most one of them"
        )
    family = families[arch.qkv_bias, arch.qk_norm]
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.mlp_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "tie_word_embeddings": arch.tied_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_theta": arch.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta},
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
    } | ({} if family == "Qwen2" else {"attention_bias": False})


# -------------------------------------------------------------------------------------------------------------- load


def load_params(
    folder: str | Path, arch: Architecture, *, shardings: Params | None = None, dtype: Any = jnp.float32
) -> Params:
    """Parameters in the learner layout, each slice read from disk straight onto the device that holds it.

    At no time does the host hold more than one slice of one tensor, nor a device more than its shards and one slice.

    Args:
      shardings: a `jax.sharding.Sharding` per leaf; None: everything on the default device.
      dtype: of the parameters, whatever the files hold.

    Raises:
      ConfigError: files or tensors are missing, unexpected, damaged or of another shape.
    """
    stored = list_tensors(folder)
    table = entries(arch)
    ignored = {"lm_head.weight"} if arch.tied_embeddings else set()
    ignored |= {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    found = {name: tensor.shape for name, tensor in stored.items() if name not in ignored}
    check_names(folder, found, {entry.name: entry.shape for entry in table}, arch)
    shapes = param_shapes(arch)
    by_leaf: dict[str, list[Entry]] = {}
    for entry in table:
        by_leaf.setdefault(entry.leaf, []).append(entry)
    default = SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))
    params: Params = {"layers": {}}
    for leaf, group in by_leaf.items():
        sharding = default if shardings is None else _leaf(shardings, leaf)
        value = _load_leaf(group, stored, _leaf(shapes, leaf).shape, sharding, jnp.dtype(dtype))
        (params["layers"] if leaf.startswith("layers.") else params)[leaf.removeprefix("layers.")] = value
    return params


def check_names(
    source: str | Path, found: dict[str, tuple[int, ...]], required: dict[str, tuple[int, ...]], arch: Architecture
) -> None:
    """`ConfigError` unless `found` (name: shape) is what `arch` requires; names five of each kind."""
    source = f"{source} does not match its architecture ({arch})"
    missing, extra = [n for n in required if n not in found], [n for n in found if n not in required]
    if missing or extra:
        raise ConfigError(
            f"{source}: {len(missing)} tensors missing {missing[:5]}, {len(extra)} unexpected {extra[:5]}; "
            "check that its configuration and its tensors are of one model"
        )
    for name, shape in required.items():
        if found[name] != shape:
            raise ConfigError(
                f"{source}: {name} has shape {found[name]} and {shape} is required; check that its configuration and "
                "its tensors are of one model"
            )


def _load_leaf(
    group: list[Entry], stored: dict[str, Stored], shape: tuple[int, ...], sharding: jax.sharding.Sharding, dtype: Any
) -> jax.Array:
    """One leaf as a global array: per shard a buffer, filled layer by layer."""
    places: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or [slice(None)] * len(shape), shape, strict=True))
        places.setdefault(bounds, []).append(device)  # replicas are read once
    buffers: dict[Any, jax.Array] = {}
    for bounds, devices in places.items():
        stacked = group[0].layer is not None
        first, last = bounds[0] if stacked else (0, 1)
        inner, full = (bounds[1:], shape[1:]) if stacked else (bounds, shape)
        merged = [axis for _, *rest in group[0].axes for axis in rest]
        assert all(inner[axis] == (0, full[axis]) for axis in merged), f"{group[0].leaf}: head_dim may not be split"
        if stacked:
            held = tuple(stop - start for start, stop in bounds)
            buffers |= {device: jnp.zeros(held, dtype, device=device) for device in devices}
        for i in range(first, last):
            _place(group[i], stored[group[i].name], inner, devices, buffers, i - first if stacked else None, dtype)
    return jax.make_array_from_single_device_arrays(shape, sharding, list(buffers.values()))


def _place(
    entry: Entry,
    tensor: Stored,
    inner: tuple[tuple[int, int], ...],
    devices: list[Any],
    buffers: dict[Any, jax.Array],
    row: int | None,
    dtype: Any,
) -> None:
    """Reads the slice `inner` (leaf axes) of one tensor and writes it on each of `devices`."""
    bounds, split = [], []
    for lead, *rest in entry.axes:
        (start, stop), widths = inner[lead], [inner[axis][1] for axis in rest]
        bounds.append(slice(start * math.prod(widths), stop * math.prod(widths)))
        split += [stop - start, *widths]
    # The one host copy, in the file's type and order; the device transposes and casts.
    piece = tensor.file.get_slice(tensor.name)[tuple(bounds)].reshape(split)
    order = tuple(np.argsort([axis for merged in entry.axes for axis in merged]).tolist())
    for device in devices:
        sent = jax.device_put(piece, device, may_alias=False)  # or the CPU backend keeps the host copy
        if row is None:
            buffers[device] = _arrange(sent, order, dtype)
        else:
            buffers[device] = _write_row(buffers[device], sent, row, order)
    jax.block_until_ready([buffers[device] for device in devices])  # or slices pile up on the host


@partial(jax.jit, static_argnums=(1, 2))
def _arrange(piece: jax.Array, order: tuple[int, ...], dtype: Any) -> jax.Array:
    return piece.transpose(order).astype(dtype)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write_row(buffer: jax.Array, piece: jax.Array, row: int, order: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(buffer, _arrange(piece, order, buffer.dtype), row, 0)


# -------------------------------------------------------------------------------------------------------------- save


def save_folder(
    params: Params,
    arch: Architecture,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_bytes: float = 5e9,
    stop_ids: Sequence[int] = (),
) -> None:
    """Writes parameters (learner layout, any sharding) as a folder that transformers and `load_params` open.

    Every process of a multi-host run must call it; the first one writes, one tensor at a time. The folder appears
    whole or not at all.

    Args:
      tokenizer: saved beside the weights.
      stop_ids: `eos_token_id` of generation_config.json; empty: those of the tokenizer.

    Raises:
      ConfigError: the folder exists and holds something that is not a model.
    """
    leaf = jax.tree.leaves(params)[0]
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    fetch = jax.jit(_stored_form, static_argnums=(2, 3, 4), out_shardings=everywhere)
    table = entries(arch)

    def tensors():
        for entry in table:
            value = fetch(_leaf(params, entry.leaf), entry.layer, entry.axes, entry.shape, jnp.dtype(dtype))
            yield np.asarray(value.addressable_data(0))

    if jax.process_index():
        for _ in tensors():  # takes part in gathering the shards
            pass
        return
    write_folder(
        folder,
        {entry.name: entry.shape for entry in table},
        tensors(),
        arch,
        tokenizer=tokenizer,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        stop_ids=stop_ids,
    )


def _stored_form(
    leaf: jax.Array, layer: int | None, axes: tuple[tuple[int, ...], ...], shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    value = leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
    return value.transpose([axis for merged in axes for axis in merged]).reshape(shape).astype(dtype)


def write_folder(
    folder: str | Path,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterable[np.ndarray],
    arch: Architecture,
    *,
    tokenizer: Tokenizer | None,
    dtype: Literal["float32", "bfloat16"],
    max_shard_bytes: float = 5e9,
    stop_ids: Sequence[int] = (),
) -> None:
    """Writes a model folder from `tensors`, taken one at a time in the order of `shapes` (name: shape).

    Everything goes to a sibling that takes the folder's name at the end: a crash leaves nothing half done.
    """
    folder = Path(folder)
    config = describe_architecture(arch)
    if folder.exists() and (not folder.is_dir() or any(not _is_model_file(file) for file in folder.iterdir())):
        raise ConfigError(
            f"{folder} exists and holds files that are not a model's; give another folder, or remove it first"
        )
    partial_folder = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    write_tensors(partial_folder, shapes, iter(tensors), dtype, max_shard_bytes)
    stop_ids = list(stop_ids) or (list(tokenizer.stop_ids) if tokenizer else [])
    generation: dict[str, Any] = {"eos_token_id": stop_ids} if stop_ids else {}
    if tokenizer:
        tokenizer.save(partial_folder)
        generation["pad_token_id"] = tokenizer.pad_id
    # No temperature, top_p or repetition penalty: an engine that obeyed them would not sample the policy.
    for name, content in (
        ("config.json", config | generation | {"dtype": dtype}),
        ("generation_config.json", generation),
    ):
        (partial_folder / name).write_text(json.dumps(content, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial_folder.rename(folder)


def _is_model_file(file: Path) -> bool:
    return file.is_file() and any(fnmatch(file.name, pattern) for pattern in MODEL_FILES)
