"""A LoRA adapter as the folder that Hugging Face PEFT, and engines that read its format, open."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from rljax.config import LoraConfig, ModelConfig
from rljax.models.hf import NAMES
from rljax.models.qwen2 import Params
from rljax.models.safetensors import write_file


def save_adapter(adapter: Params, config: LoraConfig, base: ModelConfig, folder: str | Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, float32; the folder appears whole or not at all.

    Args:
      base: the model the adapter belongs to, named in the folder and not copied.
    """
    folder = Path(folder)
    # PEFT's are torch's Linear weights: A [r, in] and B [out, r].
    stored = {
        f"base_model.model.{NAMES[f'layers.{name}'][0].format(layer).removesuffix('.weight')}.{side}.weight": matrix
        for name, factors in jax.device_get(adapter)["layers"].items()
        for layer in range(len(factors["a"]))
        for side, matrix in (
            ("lora_A", factors["a"][layer].reshape(-1, config.rank).T),
            ("lora_B", factors["b"][layer].reshape(config.rank, -1).T),
        )
    }
    alpha = config.scale * config.rank
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path or None,
        "revision": base.revision or None,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": [NAMES[f"layers.{name}"][0].split(".")[-2] for name in adapter["layers"]],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    partial_folder = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    tensors: Iterator[np.ndarray] = iter(stored.values())
    shapes = {name: matrix.shape for name, matrix in stored.items()}
    write_file(partial_folder / "adapter_model.safetensors", shapes, tensors, "float32")
    (partial_folder / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")
    partial_folder.rename(folder)
