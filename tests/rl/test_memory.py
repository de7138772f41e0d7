"""The rung of remat follows the free memory, by an estimate that is held against the compiler's own count."""

import logging
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rljax.config import AlgorithmConfig, Architecture, OptimizerConfig
from rljax.costs import kept_bytes_per_token, num_params, update_bytes
from rljax.mesh import free_bytes
from rljax.models import qwen2
from rljax.models.scoring import chunk_tokens
from rljax.rl.memory import LADDER, choose_remat
from rljax.rl.optimizer import init_state
from rljax.rl.packing import RowShape, batch_shapes
from rljax.rl.update import Compute, grpo_update

ARCH = Architecture(
    hidden_size=128, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=32, mlp_size=352, vocab_size=256,
    tied_embeddings=True, qk_norm=True,
)  # fmt: skip
SHAPE = RowShape(num_microbatches=3, rows=2, positions=512)
OPTIMIZER = OptimizerConfig()


def compiled_bytes(rung: str, dtype: str) -> int:
    state = jax.eval_shape(lambda: init_state(qwen2.init(jax.random.key(0), ARCH), OPTIMIZER))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    options: dict[str, Any] = {"arch": ARCH, "algorithm": AlgorithmConfig(), "optimizer": OPTIMIZER}
    lowered = grpo_update.lower(state, batch_shapes(SHAPE), count, **options, compute=Compute(dtype, rung))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def estimate(rung: str) -> int:
    tokens = SHAPE.rows * SHAPE.positions
    logits = chunk_tokens(tokens, ARCH.vocab_size) * ARCH.vocab_size
    return update_bytes(ARCH, "float32", rung, tokens=tokens, scores=0, logits=logits, trained_params=num_params(ARCH))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts of another compiler")
@pytest.mark.parametrize("rung", LADDER)
def test_the_estimate_is_little_more_than_the_compiler_asks_for(rung: str) -> None:
    assert 1.0 <= estimate(rung) / compiled_bytes(rung, "float32") <= 1.25


def test_a_rung_further_keeps_less() -> None:
    for dtype, scores in (("float32", 0), ("bfloat16", 0), ("bfloat16", 512)):
        none, dots, full = (kept_bytes_per_token(ARCH, dtype, rung, scores=scores) for rung in LADDER)
        assert none > 1.5 * dots > 3 * full > 0


def choose(monkeypatch: pytest.MonkeyPatch, mesh: Any, free: int, remat: str = "auto") -> Any:
    monkeypatch.setattr("rljax.rl.memory.free_bytes", lambda mesh: free)
    return choose_remat(remat, ARCH, mesh, SHAPE, "float32", num_params(ARCH))


def test_the_first_rung_that_fits(monkeypatch: pytest.MonkeyPatch, mesh: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    for rung in LADDER:
        enough = int(estimate(rung) / 0.9) + 1
        chosen = choose(monkeypatch, mesh, enough)
        assert (chosen.rung, chosen.needed_bytes, chosen.free_bytes) == (rung, estimate(rung), enough)
    assert choose(monkeypatch, mesh, 2**50).rung == "none"
    assert [record.levelname for record in caplog.records] == ["INFO"] * 4
    assert f"remat none: an update needs about {estimate('none') / 2**30:.2f} of the 1048576.00 GiB" in caplog.text


def test_what_does_not_fit_goes_on_with_the_last_and_says_so(
    monkeypatch: pytest.MonkeyPatch, mesh: Any, caplog: Any
) -> None:
    assert choose(monkeypatch, mesh, 2**24).rung == "full"
    (record,) = caplog.records
    said = record.getMessage()
    needed = estimate("full") / 2**30
    assert record.levelname == "WARNING" and f"needs about {needed:.2f} of the 0.02 GiB" in said
    assert "microbatch_tokens" in said and "model.remat" not in said


def test_a_rung_that_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch, mesh: Any, caplog: Any) -> None:
    assert choose(monkeypatch, mesh, 2**50, "full").rung == "full"
    assert choose(monkeypatch, mesh, 2**24, "none").rung == "none"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "model.remat = full" in record.getMessage()


def test_processes_agree_on_what_the_fullest_has_room_for(monkeypatch: pytest.MonkeyPatch, mesh: Any) -> None:
    little = int(estimate("dots") / 0.9) + 2**20
    told = []

    def least(own: int, mesh: Any) -> int:
        told.append(own)
        return min(own, little >> 20)

    monkeypatch.setattr("rljax.rl.memory.least", least)
    monkeypatch.setattr("rljax.rl.memory.processes_of", lambda mesh: (0, 1))
    assert choose(monkeypatch, mesh, 2**37).rung == "dots"
    assert told == [2**17]


def test_free_memory_is_that_of_the_fullest_device() -> None:
    def mesh_of(*stats: dict[str, int] | None) -> Any:
        return SimpleNamespace(local_devices=[SimpleNamespace(memory_stats=lambda own=own: own) for own in stats])

    some = {"bytes_limit": 100, "bytes_in_use": 30}
    assert free_bytes(mesh_of(some, {"bytes_limit": 100, "bytes_in_use": 60})) == 40
    # Devices that do not say, as simulated ones, share the machine's.
    alone, together = free_bytes(mesh_of(None)), free_bytes(mesh_of(None, None, None, None))
    assert 2**20 < together < alone / 2
