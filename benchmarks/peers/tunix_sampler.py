"""Tunix's `Sampler` as a worker (operations: protocol.py). Runs in the environment `make bench-peers` makes.

Its one variant, `static`, runs a batch to its longest row: a compiled loop over a cache of the full length.
"""

import json
import os
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
from protocol import peak_mib, reset_peak_memory, serve
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.models.qwen2 import model as qwen
from tunix.models.qwen2 import params as qwen_params

NO_TOKEN = -1
"""Padding and end of sequence: no token is drawn that means either."""

_apply_llama_rope = llama.apply_rope

mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
loaded: dict[str, Any] = {}


class IdText:
    """Tokenizer of texts that are ids with blanks between: Tunix takes prompts as text."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # Tunix puts none in front when it is 0

    def eos_id(self) -> int:
        return NO_TOKEN

    def pad_id(self) -> int:
        return NO_TOKEN


def read_model(folder: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The model in a folder, and its shape."""
    config = json.loads((Path(folder) / "config.json").read_text())
    shape = {
        "num_layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "embed_dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "rope_theta": config["rope_theta"],
        "norm_eps": config["rms_norm_eps"],
    }
    tied = config["tie_word_embeddings"]
    if config["model_type"] == "qwen2":
        made, create = qwen.ModelConfig(use_tied_embedding=tied, **shape), qwen_params.create_model_from_safe_tensors
    else:
        # Its attention does not pass the rotary base on: without this every Llama model gets 1,000,000.
        llama.apply_rope = partial(_apply_llama_rope, rope_theta=config["rope_theta"])
        made, create = llama.ModelConfig(weight_tying=tied, **shape), llama_params.create_model_from_safe_tensors
    with mesh:
        return create(folder, made, mesh, dtype=jnp.dtype(dtype)), shape


def versions() -> dict[str, str]:
    return {"google-tunix": metadata.version("google-tunix"), "tunix's jax": jax.__version__}


def load(folder: str, dtype: str) -> dict[str, Any]:
    loaded.clear()
    loaded["model"], loaded["shape"] = read_model(folder, dtype)
    loaded["samplers"] = {}
    return {"versions": versions(), "device": str(jax.devices()[0]), "variants": ["static"]}


def _draw(prompts: list[list[int]], new_tokens: int, **options: Any) -> list[list[int]]:
    slots = len(prompts[0]) + new_tokens
    if slots not in loaded["samplers"]:
        names = ("num_layers", "num_kv_heads", "head_dim")
        cache = CacheConfig(cache_size=slots, **{name: loaded["shape"][name] for name in names})
        loaded["samplers"] = {slots: Sampler(loaded["model"], IdText(), cache)}  # one at a time, or programs pile up
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    with mesh:
        out = loaded["samplers"][slots](
            texts, max_generation_steps=new_tokens, max_prompt_length=len(prompts[0]), eos_tokens=[NO_TOKEN], **options
        )
    return out.tokens


def greedy(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    return {"tokens": [_draw([prompt], new_tokens)[0].tolist() for prompt in prompts]}


def sample(prompts: list[list[int]], lengths: list[int], variant: str, seed: int) -> dict[str, Any]:
    """Draws `max(lengths)` tokens after each prompt; prompts are of one length."""
    assert variant == "static", variant
    reset_peak_memory()
    started = time.perf_counter()
    tokens = _draw(prompts, max(lengths), temperature=1.0, top_p=1.0, seed=seed)
    seconds = time.perf_counter() - started
    assert all(len(row) == max(lengths) for row in tokens), "a row ended early"
    return {"seconds": seconds, "drawn": sum(map(len, tokens)), "peak_mib": peak_mib()}


if __name__ == "__main__":
    serve({"load": load, "greedy": greedy, "sample": sample})
