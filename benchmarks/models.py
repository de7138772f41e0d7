"""The weights that benchmarks use: Hugging Face folders under runs/bench, opened alike by rljax and its peers.

python benchmarks/models.py bfloat16 1.5b 7b     # makes them beforehand
"""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import ROOT
from workloads import ARCHS

from rljax import costs
from rljax.config import Architecture
from rljax.models import hf, qwen2

FOLDERS = ROOT / "runs" / "bench"
GATE_VOCABULARY = 4096
"""Entries of a model that is only made to compare greedy tokens."""
LARGE = 2e9
"""Parameters above which two float32 copies are too much for the comparison of greedy tokens."""


@partial(jax.jit, static_argnames=("arch", "dtype"))
def random_params(key: jax.Array, arch: Architecture, dtype: str) -> Any:
    """Weights in the learner layout under which every part of the model decides what comes next.

    The usual initial weights are small: a narrow tied model then repeats its last token whatever it attended to, and
    biases are zero. Here matrices keep the length of what they multiply, and biases and norms are random too.
    """

    def spread(path: Any, leaf: jax.Array, key: jax.Array) -> jax.Array:
        name = path[-1].key
        if name.endswith(("norm", "bias")):
            leaf = leaf + 0.1 * jax.random.normal(key, leaf.shape)
        elif name != "embed":
            leaf = leaf * (1.5 / (qwen2.INIT_STDDEV * arch.hidden_size**0.5))
        return leaf.astype(dtype)

    params = qwen2.init(key, arch)
    count = len(jax.tree.leaves(params))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(jax.random.split(jax.random.fold_in(key, 1), count)))
    return jax.tree_util.tree_map_with_path(spread, params, keys)


def model_folder(model: str, dtype: str) -> Path:
    """The folder of a model of `ARCHS`, made when it is not there: SmolLM2 for 135m, random weights for the others."""
    if model == "135m":
        return _smollm2()
    return _random_folder(ARCHS[model], FOLDERS / f"{model}-{dtype}", dtype)


def _random_folder(arch: Architecture, folder: Path, dtype: str) -> Path:
    if not (folder / "config.json").is_file() or hf.read_architecture(folder) != arch:
        params = random_params(jax.random.key(0), arch, dtype)
        hf.save_folder(params, arch, folder, dtype=dtype)  # type: ignore[arg-type]
    return folder


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct, converted from its package (extra `demo`)."""
    folder = FOLDERS / "smollm2"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "rljax.cli", "convert", "demo:smollm2", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return folder


def gate_arch(model: str, folder: Path) -> tuple[Architecture, Path]:
    """What greedy tokens are compared on: the model itself, or two layers of its shape with a small vocabulary.

    The latter where it is large, and on an accelerator, where a float32 copy of every model would take the time of what
    is measured.
    """
    arch = ARCHS[model]
    if costs.num_params(arch) < LARGE and jax.default_backend() == "cpu":
        return arch, folder
    short = dataclasses.replace(arch, num_layers=2, vocab_size=GATE_VOCABULARY, num_tokens=0)
    return short, _random_folder(short, FOLDERS / f"{model}-2-layers", jnp.dtype("float32").name)


if __name__ == "__main__":
    # In a process of its own, so that the float32 weights do not stay in an accelerator's memory.
    for model in sys.argv[2:]:
        print(model_folder(model, sys.argv[1]), flush=True)
