"""Names, shapes and bits of Hugging Face folders, both ways. Golden values: tests/parity/make_golden.py."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden.weights import formula_weights
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rljax.config import Architecture, ConfigError
from rljax.models import hf, qwen2
from rljax.models.attention import AttentionLayout
from rljax.tokenizer import character_tokenizer

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "hf.json").read_text())
BASE = Architecture(32, 3, 4, 2, 16, 48, 64, tied_embeddings=True)
FAMILIES = {
    "qwen2": BASE,
    "qwen2 untied": dataclasses.replace(BASE, tied_embeddings=False),
    "qwen3": dataclasses.replace(BASE, qkv_bias=False, qk_norm=True),
    "llama untied": dataclasses.replace(BASE, qkv_bias=False, tied_embeddings=False, rope_theta=1e5, rms_norm_eps=1e-5),
}


def random_params(arch: Architecture) -> qwen2.Params:
    """Every leaf random: biases and norms too, which `init` makes constant."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), qwen2.param_shapes(arch))


def assert_same(a: qwen2.Params, b: qwen2.Params) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def write_golden(case: dict, folder: Path, cast=np.float32) -> dict[str, np.ndarray]:
    """A folder as transformers writes it: its config.json, and a file written by the safetensors package."""
    folder.mkdir(exist_ok=True)
    weights = {name: value.astype(cast) for name, value in formula_weights(case["shapes"]).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(case["config"]))
    return weights


# ------------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("case", GOLDEN)
def test_names_and_shapes_are_those_of_transformers(case, tmp_path):
    write_golden(GOLDEN[case], tmp_path)
    ours = {entry.name: list(entry.shape) for entry in hf.entries(hf.read_architecture(tmp_path))}
    assert ours == GOLDEN[case]["shapes"]


@pytest.mark.parametrize("case", GOLDEN)
def test_logits_are_those_of_transformers(case, tmp_path):
    write_golden(GOLDEN[case], tmp_path)
    arch = hf.read_architecture(tmp_path)
    params = hf.load_params(tmp_path, arch)
    tokens = jnp.asarray([GOLDEN[case]["tokens"]])
    positions = jnp.arange(tokens.shape[1])[None]
    layout = AttentionLayout.right_padded(jnp.asarray([tokens.shape[1]]), tokens.shape[1])
    logits = qwen2.logits(params, arch, qwen2.forward(params, arch, tokens, positions, layout))[0]
    np.testing.assert_allclose(logits[:, :5], GOLDEN[case]["logits_first_5_ids"], atol=1e-4)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), GOLDEN[case]["logsumexp"], atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_config_opens_in_transformers(name, tmp_path):
    from transformers import AutoConfig

    arch = FAMILIES[name]
    hf.save_folder(random_params(arch), arch, tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert type(config).__name__ == name.split()[0].capitalize() + "Config"
    assert config.head_dim == 16 and config.num_key_value_heads == 2 and config.rms_norm_eps == arch.rms_norm_eps
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": arch.rope_theta}
    assert config.tie_word_embeddings == arch.tied_embeddings


# ---------------------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("shard_bytes", [5e9, 20_000])
@pytest.mark.parametrize("name", FAMILIES)
def test_save_then_load_is_bit_identical(name, shard_bytes, tmp_path):
    arch, params = FAMILIES[name], random_params(FAMILIES[name])
    hf.save_folder(params, arch, tmp_path / "m", max_shard_bytes=shard_bytes)
    files = sorted(f.name for f in (tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 5) == (shard_bytes == 20_000)
    assert all(f.stat().st_size < 20_000 + 4096 for f in (tmp_path / "m").glob("model-*"))
    assert hf.read_architecture(tmp_path / "m") == arch
    assert_same(hf.load_params(tmp_path / "m", arch), params)


def test_safetensors_package_reads_what_is_saved(tmp_path):
    params = random_params(BASE)
    hf.save_folder(params, BASE, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses a file without it
    tensors = load_file(file)
    q = np.asarray(params["layers"]["q"][1])  # [D, N, H]
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], q.reshape(32, 64).T)
    o = np.asarray(params["layers"]["o"][2])  # [N, H, D]
    np.testing.assert_array_equal(tensors["model.layers.2.self_attn.o_proj.weight"], o.reshape(64, 32).T)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_load_exactly(stored, tmp_path):
    case = GOLDEN["qwen2-untied"]
    weights = write_golden(case, tmp_path, stored)
    arch = hf.read_architecture(tmp_path)
    head = hf.load_params(tmp_path, arch)["head"]
    assert head.dtype == jnp.float32
    np.testing.assert_array_equal(head, weights["lm_head.weight"].astype(np.float32).T)
    assert hf.load_params(tmp_path, arch, dtype=jnp.bfloat16)["layers"]["gate"].dtype == jnp.bfloat16


def test_bfloat16_export_rounds_once(tmp_path):
    params = random_params(BASE)
    hf.save_folder(params, BASE, tmp_path / "m", dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert_same(hf.load_params(tmp_path / "m", BASE), rounded)


def test_extra_head_of_tied_model_and_inverse_frequencies_are_ignored(tmp_path):
    case = GOLDEN["llama"]
    weights = write_golden(case, tmp_path)
    arch = hf.read_architecture(tmp_path)
    expected = hf.load_params(tmp_path, arch)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    assert_same(hf.load_params(tmp_path, arch), expected)


def test_loads_onto_and_saves_from_a_mesh(tmp_path):
    """In a process of its own: the number of devices is read once."""
    arch = dataclasses.replace(BASE, tied_embeddings=False)
    hf.save_folder(random_params(arch), arch, tmp_path / "one", max_shard_bytes=20_000)
    code = f"""
import jax, numpy as np
from rljax.config import MeshConfig
from rljax import mesh as meshes
from rljax.models import hf, qwen2
folder = {str(tmp_path)!r}
arch = hf.read_architecture(folder + "/one")
mesh = meshes.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
shapes, axes = qwen2.param_shapes(arch), qwen2.param_axes(arch)
plain = hf.load_params(folder + "/one", arch)
for rules in (meshes.LEARNER_RULES, meshes.SAMPLER_RULES):
    shardings = meshes.param_shardings(mesh, shapes, axes, rules)
    params = hf.load_params(folder + "/one", arch, shardings=shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    jax.tree.map(np.testing.assert_array_equal, params, plain)
    q = params["layers"]["q"].addressable_shards
    assert {{shard.data.shape for shard in q}} == {{(3, 16 if rules is meshes.LEARNER_RULES else 32, 2, 16)}}
    hf.save_folder(params, arch, folder + "/many")
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(folder + "/many", arch), plain)
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# ------------------------------------------------------------------------------------------------------------- memory


def test_host_holds_at_most_one_tensor_while_loading(tmp_path):
    arch = Architecture(64, 2, 2, 1, 32, 128, 65536, tied_embeddings=False)  # embed and head: 16 MiB each in float32
    params = jax.tree.map(lambda shape: jnp.ones(shape.shape), qwen2.param_shapes(arch))

    def whole_files():
        return [load_file(file) for file in folder.glob("*.safetensors")]

    def cast_on_host():
        return [stored.file.get_tensor(name).astype(np.float64) for name, stored in hf.list_tensors(folder).items()]

    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        folder = tmp_path / dtype
        hf.save_folder(params, arch, folder, dtype=dtype, max_shard_bytes=2e6)
        assert len(list(folder.glob("*.safetensors"))) > 2
        hf.load_params(folder, arch)  # compiles
        limit = 1.1 * size * arch.vocab_size * arch.hidden_size
        assert peak_bytes(lambda: hf.load_params(folder, arch)) < limit  # noqa: B023, called at once
        # The measure sees what numpy allocates: two careless loaders go over.
        assert peak_bytes(whole_files) > limit
        assert peak_bytes(cast_on_host) > limit


def peak_bytes(work) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        kept = work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        del kept


def test_layers_are_written_in_place():
    buffer = jnp.zeros((3, 4, 5))
    address = buffer.unsafe_buffer_pointer()
    written = hf._write_row(buffer, jnp.ones((5, 4)), 1, (1, 0))
    assert buffer.is_deleted() and written.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(written.sum((1, 2)), [0, 20, 0])


# ------------------------------------------------------------------------------------------------------------- saving


def test_tokenizer_and_stop_ids_go_with_the_weights(tmp_path):
    params, tokenizer = random_params(BASE), character_tokenizer("0123456789+=")
    hf.save_folder(params, BASE, tmp_path / "m", tokenizer=tokenizer)
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [1], "pad_token_id": 0}  # and no temperature, top_p or repetition penalty
    assert (tmp_path / "m" / "tokenizer.json").is_file()
    hf.save_folder(params, BASE, tmp_path / "m", tokenizer=tokenizer, stop_ids=(1, 0))  # replaces a model folder
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [1, 0]


def test_crash_while_saving_leaves_the_old_folder(tmp_path, monkeypatch):
    params = random_params(BASE)
    hf.save_folder(params, BASE, tmp_path / "m")
    real, calls = hf._leaf, []

    def fails(tree, leaf):
        calls.append(leaf)
        if len(calls) > 60:
            raise OSError("disk full")
        return real(tree, leaf)

    monkeypatch.setattr(hf, "_leaf", fails)
    for name in ("m", "new"):
        calls.clear()
        with pytest.raises(OSError, match="disk full"):
            hf.save_folder(jax.tree.map(jnp.zeros_like, params), BASE, tmp_path / name)
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()
    assert_same(hf.load_params(tmp_path / "m", BASE), params)
    hf.save_folder(params, BASE, tmp_path / "new")  # what the crash left does not stand in the way
    assert_same(hf.load_params(tmp_path / "new", BASE), params)


def test_save_refuses_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that are not a model's"):
        hf.save_folder(random_params(BASE), BASE, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def folder(tmp_path) -> Path:
    hf.save_folder(random_params(BASE), BASE, tmp_path / "m", max_shard_bytes=20_000)
    return tmp_path / "m"


def test_missing_and_unexpected_tensors_are_named(folder):
    with pytest.raises(ConfigError, match=r"1 tensors missing \['lm_head.weight'\], 0 unexpected"):
        hf.load_params(folder, dataclasses.replace(BASE, tied_embeddings=False))
    with pytest.raises(
        ConfigError, match=r"0 tensors missing \[\], 9 unexpected \['model.layers.0.self_attn.k_proj.bias'"
    ):
        hf.load_params(folder, dataclasses.replace(BASE, qkv_bias=False))


def test_wrong_shape_is_named(folder):
    with pytest.raises(ConfigError, match=r"embed_tokens.weight has shape \(64, 32\) and \(65, 32\) is required"):
        hf.load_params(folder, dataclasses.replace(BASE, vocab_size=65))


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_file_is_named(folder, keep):
    file = sorted(folder.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=f"{file.name} is damaged or cut short"):
        hf.load_params(folder, BASE)


def test_missing_file_is_named(folder):
    file = sorted(folder.glob("*.safetensors"))[2]
    file.unlink()
    with pytest.raises(ConfigError, match=f"{file.name} is missing, and the index"):
        hf.load_params(folder, BASE)


def test_folder_without_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"neither model.safetensors nor"):
        hf.load_params(tmp_path, BASE)


def test_quantised_tensor_is_named(tmp_path):
    save_file({"model.norm.weight": np.zeros(4, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tensor model.norm.weight has type I8"):
        hf.load_params(tmp_path, BASE)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llama", {"model_type": "gemma2"}, "model_type = 'gemma2' is not supported; qwen2, qwen3 and llama are"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}}, "rope scaling"),
        ("qwen2-tied", {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling"),
        ("qwen2-tied", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window = True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window = True"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_unsupported_config_is_refused(case, change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN[case]["config"] | change))
    with pytest.raises(ConfigError, match=message):
        hf.read_architecture(tmp_path)


def test_config_of_older_transformers_reads_the_same(tmp_path):
    new = GOLDEN["llama"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(new))
    expected = hf.read_architecture(tmp_path)
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "head_dim")}
    old |= {"rope_theta": 1e5, "rope_scaling": None, "use_sliding_window": True, "max_window_layers": 2}  # not in use
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert hf.read_architecture(tmp_path) == dataclasses.replace(expected, head_dim=8)
    assert expected.rope_theta == 1e5


def test_no_family_has_both_biases_and_norms():
    with pytest.raises(ConfigError, match="is no Hugging Face family"):
        hf.describe_architecture(dataclasses.replace(BASE, qk_norm=True))


def test_config_that_is_absent_or_damaged(tmp_path):
    with pytest.raises(ConfigError, match=r"config.json does not exist"):
        hf.read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is not JSON"):
        hf.read_architecture(tmp_path)
