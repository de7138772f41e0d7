"""Our decoder against transformers on torch CPU, float32: tiny random models of every family and flag."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden.weights import formula_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from rljax.models import hf, qwen2
from rljax.models.attention import AttentionLayout
from rljax.tokenizer import character_tokenizer, load_tokenizer

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
VOCAB, TOLERANCE = 97, 1e-4

CASES = [  # family, query heads, key/value heads, head dim, tied, rope_theta
    ("qwen2", 4, 4, 64, True, 1e6),
    ("qwen2", 4, 2, 128, False, 1e6),
    ("qwen2", 14, 2, 64, True, 1e6),
    ("qwen2", 8, 1, 64, False, 1e4),
    ("qwen3", 4, 2, 128, True, 1e6),
    ("qwen3", 8, 1, 64, False, 1e6),
    ("llama", 4, 4, 64, False, 1e4),
    ("llama", 14, 2, 64, True, 1e5),
    ("llama", 8, 1, 128, True, 1e5),
]


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{c[1]}of{c[2]}-dim{c[3]}-{'tied' if c[4] else 'untied'}")
def model(request, tmp_path):
    """A transformers model with every tensor random, and the folder it saved."""
    family, heads, kv_heads, head_dim, tied, theta = request.param
    config = CONFIGS[family](
        hidden_size=112,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=160,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        rms_norm_eps=1e-5 if family == "llama" else 1e-6,
        bos_token_id=None,
        eos_token_id=1,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = formula_weights({name: tuple(value.shape) for name, value in made.state_dict().items()})
    made.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    made.tie_weights()
    made.save_pretrained(tmp_path / "theirs")
    return made, tmp_path / "theirs"


def ours(folder, tokens, positions, layout) -> np.ndarray:
    arch = hf.read_architecture(folder)
    params = hf.load_params(folder, arch)
    return np.asarray(qwen2.logits(params, arch, qwen2.forward(params, arch, tokens, positions, layout)))


def theirs(model, tokens, mask=None) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens), attention_mask=mask).logits.numpy()


def test_right_padded_rows(model):
    lengths, slots = np.array([17, 9, 1]), 17
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, slots))
    real = np.arange(slots) < lengths[:, None]
    expected = theirs(model[0], tokens, torch.from_numpy(real.astype(np.int64)))
    positions = jnp.broadcast_to(jnp.arange(slots), (3, slots))
    found = ours(model[1], jnp.asarray(tokens), positions, AttentionLayout.right_padded(jnp.asarray(lengths), slots))
    assert np.abs(expected[real]).max() > 1
    np.testing.assert_allclose(found[real], expected[real], atol=TOLERANCE)


def test_two_sequences_packed_in_a_row(model):
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, VOCAB, 7), rng.integers(0, VOCAB, 12)
    expected = np.concatenate([theirs(model[0], first[None])[0], theirs(model[0], second[None])[0]])
    tokens = jnp.asarray(np.concatenate([first, second, [0, 0]]))[None]
    positions = jnp.asarray([*range(7), *range(12), 0, 0])[None]
    layout = AttentionLayout(jnp.asarray([[0] * 7 + [1] * 12 + [-1] * 2]), jnp.zeros((1, 21), jnp.int32))
    np.testing.assert_allclose(ours(model[1], tokens, positions, layout)[0, :19], expected, atol=TOLERANCE)


@pytest.mark.parametrize("shard_bytes", [5e9, 100_000])
def test_exported_folder_opens_in_transformers(model, shard_bytes, tmp_path):
    made, folder = model
    arch = hf.read_architecture(folder)
    tokenizer = character_tokenizer("0123456789")
    params = hf.load_params(folder, arch)
    hf.save_folder(params, arch, tmp_path / "out", tokenizer=tokenizer, max_shard_bytes=shard_bytes)
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(again) is type(made)
    assert (again.generation_config.eos_token_id, again.generation_config.pad_token_id) == ([1], 0)
    assert again.generation_config.repetition_penalty in (None, 1.0)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (2, 11))
    np.testing.assert_array_equal(theirs(again.eval(), tokens), theirs(made, tokens))
    # transformers picks a tokenizer class by model type: the saved files must keep it from doing so.
    messages = [{"role": "user", "content": "1234"}]
    opened = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(messages, add_generation_prompt=True)
    assert list(opened["input_ids"]) == tokenizer.encode_chat(messages)


def test_exported_qwen_tokenizer_opens_in_transformers(shared_data, tmp_path):
    source = shared_data / "qwen2.5_tokenizer"
    load_tokenizer(source).save(tmp_path)
    original, saved = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path)
    text = "∫ x² dx = 12,345.67 \n\n\t naïve 东京 e\u0301 <|im_end|><tool_call> don't"
    assert saved(text)["input_ids"] == original(text)["input_ids"] == load_tokenizer(source).encode(text)
    assert saved.chat_template == original.chat_template and saved.eos_token == original.eos_token
