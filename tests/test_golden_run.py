"""Twenty steps of `configs/smoke.yaml`: bit-stable from process to process, and the numbers that were recorded."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from golden import smoke

WARM_UP = 5
"""Steps after which every shape that lengths lead to has been seen."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The run in this process, with the step during which each program was compiled; beside it the same in another."""
    root = tmp_path_factory.mktemp("smoke")
    code = "import json, sys; from pathlib import Path; from golden import smoke; "
    code += "Path(sys.argv[2]).write_text(json.dumps(smoke.run(Path(sys.argv[1]))))"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(root / "other"), str(root / "other.json")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, compiled = root / "here" / "metrics.jsonl", []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and log.is_file():
            compiled.append(len(log.read_text().splitlines()) + 1)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        made = smoke.run(root / "here")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        _, said = other.communicate()
    assert other.returncode == 0, said
    yield made | {"compiled": compiled, "other": json.loads((root / "other.json").read_text())}


def test_two_processes_compute_the_same_bits(here: dict[str, Any]) -> None:
    assert here["steps"] == here["other"]["steps"]
    assert here["state"] == here["other"]["state"]


def test_the_run_is_one_in_which_something_happens(here: dict[str, Any]) -> None:
    """Or equal numbers would prove little."""
    rewards, lengths, objectives, _, norms = zip(*here["steps"], strict=True)
    assert len(rewards) == 20
    assert len(set(rewards)) > 5 and len(set(lengths)) > 5 and len(set(objectives)) == 20
    assert all(norm > 0 for norm in norms)


def test_nothing_is_compiled_after_warm_up(here: dict[str, Any]) -> None:
    assert here["compiled"], "not one program was seen to be compiled: the listener hears nothing"
    assert max(here["compiled"]) <= WARM_UP


ELSEWHERE = 0.1
"""Relative difference, on a kind of machine that recorded nothing, of what is computed from the warm-started weights:
many updates amplify a rounding. On two kinds of CPU it was up to 4 %, with the same rewards and lengths."""


def test_the_numbers_are_those_recorded(here: dict[str, Any]) -> None:
    recorded = json.loads(smoke.GOLDEN.read_text())
    for one in recorded:
        if one["fingerprint"] == smoke.fingerprint():
            assert here["steps"] == one["steps"]
            assert here["state"] == one["state"]
            return
    # Elsewhere a rounding may draw another token, and everything after it differs: the first step is what can be held.
    first, expected = here["steps"][0], recorded[0]["steps"][0]
    assert first[:2] == pytest.approx(expected[:2], rel=1e-3)
    assert first[2:] == pytest.approx(expected[2:], rel=ELSEWHERE)
    pytest.skip(f"nothing was recorded on {smoke.fingerprint()}: only the first step was compared")
