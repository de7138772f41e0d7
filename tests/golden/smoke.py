"""The run of `configs/smoke.yaml`, warm start and twenty steps; as a command it writes smoke.json.

python -m golden.smoke RUN_DIR          # the numbers were meant to move: drops what other machines recorded
python -m golden.smoke RUN_DIR --add    # a machine of another kind computes the same code
"""

import hashlib
import json
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy

from rljax.cli import main as rljax

GOLDEN = Path(__file__).with_name("smoke.json")
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"
NUMBERS = ("reward/mean", "completion/length_tokens", "policy/objective", "policy/reference_kl", "policy/grad_norm")


class Losses(logging.Handler):
    """The losses that a warm start logs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "loss" in str(record.msg) and isinstance(record.args, tuple):
            self.seen.append(float(str(record.args[2])))


def run(folder: Path) -> dict[str, Any]:
    """What must not move: the warm start's losses, NUMBERS of every step, and a digest of the state after the last."""
    given = ["--run_dir", str(folder), "--model.path"]
    logger, losses = logging.getLogger("rljax.sft"), Losses()
    logger.addHandler(losses)
    logger.setLevel(logging.INFO)  # where a test runner has set up logging, the command's own setting has no effect
    try:
        assert rljax(["sft", str(CONFIG), *given, "", "--sft.output", str(folder / "sft")]) == 0
    finally:
        logger.removeHandler(losses)
    assert rljax(["train", str(CONFIG), *given, str(folder / "sft")]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [[line[name] for name in NUMBERS] for line in lines if "policy/objective" in line]
    saved = json.loads((folder / "checkpoints" / str(len(steps)) / "host" / "data.json").read_text())
    leaves = {path: entry[2] for path, entry in saved["leaves"].items()}
    return {
        "losses": losses.seen,
        "steps": steps,
        "state": hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest(),
    }


def fingerprint() -> dict[str, str]:
    """What the bits may depend on: the versions that compute and the kind of CPU that code is generated for."""
    flags = ""
    if Path("/proc/cpuinfo").is_file():
        flags = next((row for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("flags")), "")
    cpu = hashlib.sha256(" ".join(sorted(flags.split()[2:])).encode()).hexdigest()[:12]
    return {
        "jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": numpy.__version__,
        "machine": platform.machine(), "cpu": cpu, "cores": str(os.cpu_count()),
    }  # fmt: skip


def main() -> None:
    made = run(Path(sys.argv[1])) | {"fingerprint": fingerprint()}
    kept = json.loads(GOLDEN.read_text()) if "--add" in sys.argv else []
    made = [old for old in kept if old["fingerprint"] != made["fingerprint"]] + [made]
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{GOLDEN}: recorded on {len(made)} kinds of machine")


if __name__ == "__main__":
    main()
