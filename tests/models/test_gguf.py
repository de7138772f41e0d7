"""GGUF files written here by the gguf package, and the real one of the demo extra against values from transformers."""

import dataclasses
import json
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as parquet
import pytest
from golden.weights import formula_weights
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Rust
from tokenizers import pre_tokenizers

from rljax.config import ARCHITECTURES, Architecture, ConfigError
from rljax.models import hf, qwen2
from rljax.models.attention import AttentionLayout
from rljax.models.gguf import NAMES, convert_gguf, demo_gguf
from rljax.tokenizer import load_tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
BASE = Architecture(64, 2, 4, 2, 16, 96, 300, tied_embeddings=True, rms_norm_eps=1e-5)
FAMILIES = {
    "qwen2": dataclasses.replace(BASE, tied_embeddings=False),
    "qwen3": dataclasses.replace(BASE, qkv_bias=False, qk_norm=True),
    "llama": dataclasses.replace(BASE, qkv_bias=False, rope_theta=1e5),
}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = dict(
    tokens=[
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        *BYTES,
        "th",
        "the",
        "Ġt",
        "Ġthe",
        "1Ġ",
        "Ġ1",
        "ĠĠ",
    ],
    types=[3, 3, 3, 4] + [1] * (len(BYTES) + 7),
    merges=["t h", "th e", "Ġ t", "Ġ the", "Ġ 1", "Ġ Ġ"],
    pre="smollm",
    eos=2,
)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of llama models."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path, family: str, arch: Architecture, *, kind=None, vocabulary=VOCABULARY, extra=(), skip=()
) -> dict[str, np.ndarray]:
    """A GGUF file of `formula_weights`, matrices quantised as `kind`; returns them under Hugging Face names."""
    writer = gguf.GGUFWriter(file, family)
    writer.add_block_count(arch.num_layers)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_feed_forward_length(arch.mlp_size)
    writer.add_head_count(arch.num_heads)
    writer.add_head_count_kv(arch.num_kv_heads)
    writer.add_rope_freq_base(arch.rope_theta)
    writer.add_layer_norm_rms_eps(arch.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_eos_token_id(vocabulary["eos"])
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}")
    for name, value in extra:
        writer.add_string(name, value)
    table = hf.entries(arch)
    weights = formula_weights({entry.name: entry.shape for entry in table})
    for entry in table:
        name, value = NAMES[entry.leaf].format(entry.layer), weights[entry.name]
        if family == "llama" and entry.leaf in ("layers.q", "layers.k"):
            value = permute(value, arch.num_heads if entry.leaf == "layers.q" else arch.num_kv_heads)
        if name in skip:
            continue
        if kind is not None and value.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_out_as_they_were(family, tmp_path):
    weights = write_gguf(tmp_path / "a.gguf", family, FAMILIES[family])
    convert_gguf(tmp_path / "a.gguf", tmp_path / "m")
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert hf.read_architecture(tmp_path / "m") == FAMILIES[family]  # rope_theta and eps to the digit


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_quantised_weights_are_dequantised(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    weights = write_gguf(tmp_path / "a.gguf", "llama", FAMILIES["llama"], kind=kind)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "m")
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights[name], kind), kind)  # rows are quantised one by one
    np.testing.assert_array_equal(load_file(tmp_path / "m" / "model.safetensors")[name], expected)
    assert 0 < np.abs(expected - weights[name]).max() < 0.05


def test_tokenizer_is_rebuilt(tmp_path):
    write_gguf(tmp_path / "a.gguf", "llama", FAMILIES["llama"])
    convert_gguf(tmp_path / "a.gguf", tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    ids = {token: i for i, token in enumerate(VOCABULARY["tokens"])}
    assert tokenizer.stop_ids == (2,)
    assert tokenizer.encode(" the") == [ids["Ġthe"]]
    # Digits stand alone before anything merges, as the model was trained: "Ġ1" is never used, two spaces are one token.
    assert tokenizer.encode("11  1") == [ids["1"], ids["1"], ids["ĠĠ"], ids["1"]]
    assert tokenizer.encode("<think>a<|im_end|>") == [3, ids["a"], 2]
    assert tokenizer.decode([3, ids["a"], 2]) == "<think>a"  # control tokens are special, user-defined ones are text
    text = "naïve 东京 1.5"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}])[0] == 1


def test_qwen2_tokenizer_is_the_hugging_face_one(shared_data, tmp_path):
    """The first 20,000 entries of the real vocabulary, and unused rows after it, as converters write them."""
    size, source = 20_000, json.loads((shared_data / "qwen2.5_tokenizer" / "tokenizer.json").read_text())
    model = source["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < size}
    model["merges"] = [
        m for m in model["merges"] if "".join(m.split(" ") if isinstance(m, str) else m) in model["vocab"]
    ]
    for i, added in enumerate(source["added_tokens"]):
        added["id"] = size + i
    expected = Rust.from_str(json.dumps(source))
    added = source["added_tokens"]
    vocabulary = dict(
        tokens=[*model["vocab"], *(token["content"] for token in added), "[PAD0]", "[PAD1]"],
        types=[1] * size + [3 if token["special"] else 4 for token in added] + [5, 5],
        merges=[m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        pre="qwen2",
        eos=size,
    )
    arch = dataclasses.replace(FAMILIES["qwen2"], vocab_size=len(vocabulary["tokens"]))
    write_gguf(tmp_path / "a.gguf", "qwen2", arch, vocabulary=vocabulary)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    assert tokenizer.vocab_size == arch.vocab_size - 2
    rows = parquet.read_table(shared_data / "math" / "test.parquet").column("prompt").slice(0, 300).to_pylist()
    texts = [row[0]["content"] for row in rows] + [
        "<|im_start|>user\n<tool_call> e\u0301 DON'T 1234\r\n\n  x<|im_end|>"
    ]
    for text in texts:
        assert tokenizer.encode(text) == expected.encode(text, add_special_tokens=False).ids


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gemma", {}, "has architecture 'gemma'; llama, qwen2 and qwen3 are read"),
        ("llama", {"vocabulary": VOCABULARY | {"pre": "tekken"}}, "pre-tokenizer 'tekken'; 'gpt2' with one of smollm"),
        ("llama", {"extra": [("llama.rope.scaling.type", "yarn")]}, "scales rotary embeddings"),
        ("llama", {"skip": ["blk.1.attn_q.weight"]}, r"1 tensors missing \['blk.1.attn_q.weight'\]"),
    ],
)
def test_what_is_not_read_is_refused(family, options, message, tmp_path):
    write_gguf(tmp_path / "a.gguf", family, FAMILIES["llama"], **options)
    with pytest.raises(ConfigError, match=message):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_absent_damaged_and_truncated_files(tmp_path):
    file = tmp_path / "a.gguf"
    with pytest.raises(ConfigError, match="does not exist"):
        convert_gguf(file, tmp_path / "m")
    write_gguf(file, "llama", FAMILIES["llama"])
    whole = file.read_bytes()
    for content in (b"", b"not a model", whole[:100], whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="is not a GGUF file, or is cut short"):
            convert_gguf(file, tmp_path / "m")


def test_demo_says_what_to_install(monkeypatch):
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(ConfigError, match=r"pip install 'rljax\[demo\]'"):
        demo_gguf()


# ---------------------------------------------------------------------------------------------------------- real file


def test_real_model_answers_as_in_transformers(tmp_path):
    try:
        source = demo_gguf()
    except ConfigError as error:
        pytest.skip(str(error))
    golden = json.loads((GOLDEN / "smollm2.json").read_text())
    convert_gguf(source, tmp_path / "m")
    arch = hf.read_architecture(tmp_path / "m")
    assert arch == ARCHITECTURES["smollm2-135m"]
    tokenizer = load_tokenizer(tmp_path / "m")
    ids = tokenizer.encode_chat(golden["messages"])
    assert ids == golden["prompt"]
    tokens = jnp.asarray([ids + golden["greedy"]])
    layout = AttentionLayout.right_padded(jnp.asarray([tokens.shape[1]]), tokens.shape[1])
    params = hf.load_params(tmp_path / "m", arch)
    hidden = qwen2.forward(params, arch, tokens, jnp.arange(tokens.shape[1])[None], layout)
    logits = qwen2.logits(params, arch, hidden)[0, len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == golden["greedy"]
    np.testing.assert_allclose(logits.max(-1), golden["greedy_logits"], atol=1e-3)
