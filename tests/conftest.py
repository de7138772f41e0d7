"""Fixtures every test may use."""

import atexit
import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Every worker and every command that tests start compiles much the same programs: once per test run is enough.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="rljax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest

from rljax.config import Architecture, MeshConfig
from rljax.mesh import make_mesh
from rljax.models import qwen2
from rljax.types import PromptRecord, Prompts

TINY = Architecture(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=64, vocab_size=40,
    tied_embeddings=True, num_tokens=37,
)  # fmt: skip
"""Grouped heads, biases, and three vocabulary rows that are no token."""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the public data sets beside the project; the test is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the public data sets in {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny() -> Architecture:
    return TINY


@pytest.fixture(scope="session")
def tiny_params() -> Any:
    """Random weights, five times the usual spread: a policy far from uniform, biases included."""
    params = qwen2.init(jax.random.key(0), TINY)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # One program for all leaves instead of one each, a second of compiling: draw i of a key is the same at any size.
    noise = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (max(x.size for x in leaves),)))(keys))
    return tree.unflatten([x + 0.1 * n[: x.size].reshape(x.shape) for x, n in zip(leaves, noise, strict=True)])


@pytest.fixture(scope="session")
def mesh() -> Any:
    """One device, whatever the process was given."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def make_prompts(lengths: list[int], *, seed: int = 0, slots: int = 0, first_position: int = 0) -> Prompts:
    """Random prompts of the tiny vocabulary; prompt i depends on (seed, i, its length) only."""
    slots = slots or max(lengths)
    tokens = np.zeros((len(lengths), slots), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = np.random.default_rng([seed, row]).integers(2, 37, length)
    record = PromptRecord(({"role": "user", "content": "?"},), "exact", "")
    return Prompts(
        tokens,
        np.array(lengths, np.int32),
        first_position + np.arange(len(lengths), dtype=np.int64),
        tuple(dataclasses.replace(record, extra_info={"index": i}) for i in range(len(lengths))),
    )
