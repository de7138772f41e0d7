"""A peer as a process that lives as long as the benchmark (what it answers: peers/protocol.py)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from common import ROOT

WORKERS = {
    "hf": ("transformers", ".venv-hf", "hf_sampler.py"),
    "tunix": ("tunix", ".venv-tunix", "tunix_sampler.py"),
    "tunix-grpo": ("tunix", ".venv-tunix", "tunix_grpo.py"),
    "torch": ("torch", ".venv-hf", "torch_update.py"),
    "trl": ("trl", ".venv-trl", "trl_grpo.py"),
}
"""(Name in results, environment, script)."""
SAMPLERS = {"hf": "hf", "tunix": "tunix"}
TRAINERS = {"trl": "trl", "tunix": "tunix-grpo"}
"""Name on the command line to key of `WORKERS`."""


class PeerError(RuntimeError):
    """A peer could not do what it was asked."""


def _variable(peer: str) -> str:
    """Named after the environment: BENCH_HF_PYTHON and so on."""
    return f"BENCH_{WORKERS[peer][1].removeprefix('.venv-').upper()}_PYTHON"


def python_of(peer: str) -> Path:
    """The interpreter that has the peer: $BENCH_HF_PYTHON and so on, or the one that `make bench-peers` made."""
    given = os.environ.get(_variable(peer))
    return Path(given) if given else ROOT / WORKERS[peer][1] / "bin" / "python"


def is_installed(peer: str) -> bool:
    """There is an interpreter; whether it holds the peer shows when it is asked to load."""
    return python_of(peer).is_file()


class Worker:
    """One process of a peer; `ask` waits for the answer."""

    def __init__(self, peer: str, *, device: str = "cpu") -> None:
        if not is_installed(peer):
            raise PeerError(
                f"{peer} needs the interpreter {python_of(peer)}, which is not there; run `make bench-peers`, or name "
                f"one that has it in {_variable(peer)}"
            )
        self.name = WORKERS[peer][0]
        # The flag that rljax sets for itself is not the peer's way of running.
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"BENCH_DEVICE": device, "PYTHONWARNINGS": "ignore"}
        script = ROOT / "benchmarks" / "peers" / WORKERS[peer][2]
        self._process = subprocess.Popen(
            [python_of(peer), script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The reply to one request.

        Raises:
          PeerError: the peer failed, or is gone.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise PeerError(f"{self.name} ended with exit code {self._process.wait()} when asked to {do}")
        answer = json.loads(reply)
        if "error" in answer:
            raise PeerError(f"{self.name} failed to {do}:\n{answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process: the worker stops when its input closes."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
