"""What devices send each other in a step, counted in the compiled programs: a collective more is a bug of sharding.

Eight devices are forced in a process of its own, since XLA reads the flag once. On a CPU gradients are added up by
all-reduces; the TPU compiler makes reduce-scatters of some.
"""

import json
import os
import subprocess
import sys

import pytest

LAYERS = 3
SCRIPT = """
import json, sys
from rljax.aot import PROGRAMS, Job
from rljax.config import AlgorithmConfig, Architecture, MeshConfig
from rljax.hlo import Module
from rljax.mesh import make_mesh

class OnCpu(Job):
    hbm_bytes = 1 << 40

arch = Architecture(hidden_size=64, num_layers=int(sys.argv[1]), num_heads=8, num_kv_heads=8, head_dim=8, mlp_size=64,
                    vocab_size=64, tied_embeddings=False)
counted = {}
for sizes in ((1, 8, 1), (1, 1, 8), (2, 2, 2)):
    job = OnCpu(arch, make_mesh(MeshConfig(*sizes)), prompts=16, prompt_tokens=16, completion_tokens=32,
                compute_dtype="float32", algorithm=AlgorithmConfig(microbatch_tokens=512))
    for name, lower in PROGRAMS.items():
        found = Module.parse(lower(job).lowered.compile().as_text()).collectives()
        counted[f"{sizes} {name}"] = [(one.kind, one.loops, one.count, one.bytes) for one in found]
print(json.dumps(counted))
"""
FSDP, TENSOR, MIXED = "(1, 8, 1)", "(1, 1, 8)", "(2, 2, 2)"


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[tuple[str, int], tuple[int, int]]]:
    """By mesh and program: (kind, loops) -> (count, bytes)."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(LAYERS)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: {(kind, loops): (count, size) for kind, loops, count, size in each} for name, each in found.items()}


def test_a_token_is_drawn_without_the_weights_crossing(counted: dict) -> None:
    """fsdp: whether any row goes on, one byte. tensor: in each layer the sums behind attention and MLP, and four for
    the embedding and the draw, whose vocabulary is split."""
    assert counted[f"{FSDP} decode"] == {("all-reduce", 1): (1, 1)}
    for mesh, rows_are_split in ((TENSOR, 0), (MIXED, 1)):
        per_step = {kind: each for (kind, loops), each in counted[f"{mesh} decode"].items() if loops}
        assert per_step["all-reduce"][0] == 2 * LAYERS + 4 + rows_are_split, counted
        assert set(per_step) <= {"all-reduce", "all-gather"}


def test_prompts_are_run_like_one_token(counted: dict) -> None:
    assert counted[f"{FSDP} prefill"] == {}
    for mesh in (TENSOR, MIXED):
        assert counted[f"{mesh} prefill"]["all-reduce", 0][0] == 2 * LAYERS + 4


def test_a_sync_gathers_every_matrix_of_a_layer_once(counted: dict) -> None:
    """q|k|v, o, gate|up and down, over fsdp alone: heads and MLP stay where they are."""
    assert counted[f"{TENSOR} sync"] == {}
    size = 4 * 64 * 64 * 4 + 3 * 64 * 64 * 4
    assert counted[f"{FSDP} sync"] == {("all-gather", 0): (4, size)}
    assert counted[f"{MIXED} sync"] == {("all-gather", 0): (4, size // 2)}


def test_an_update_gathers_each_matrix_for_both_passes(counted: dict) -> None:
    """Seven matrices a layer, forward and backward; gradients are added up once a layer."""
    fsdp = counted[f"{FSDP} update"]
    assert fsdp["all-gather", 1][0] == 2 * 7 and fsdp["all-reduce", 1][0] == 1
    # And the residual stream, as on a mesh of tensor alone.
    assert counted[f"{MIXED} update"]["all-gather", 2][0] == 2 * 7 + 4


def test_an_update_joins_the_positions_once_for_all_that_take_them(counted: dict) -> None:
    """In each layer before attention and MLP, and their cotangents; outside, before the loss head and the embedding's
    gradient. No more than the residual stream is gathered: neither a weight nor the table."""
    tensor = counted[f"{TENSOR} update"]
    assert tensor["all-gather", 2][0] == 4 and tensor["all-gather", 1][0] == 2
    stream = tensor["all-gather", 2][1] // 4
    assert tensor["all-gather", 1][1] == 2 * stream
    # Of the loops over layers, forward and backward, and what is inside them: the sums behind attention and MLP, those
    # of their cotangents in two, and of norms and the chunks of the head.
    assert tensor["all-reduce", 2][0] == 6
    assert not any(kind in ("reduce-scatter", "all-to-all", "collective-permute") for kind, _ in tensor)


def test_rows_and_columns_split_at_once_need_no_all_to_all(counted: dict) -> None:
    assert not any(kind in ("all-to-all", "reduce-scatter") for kind, _ in counted[f"{MIXED} update"])
