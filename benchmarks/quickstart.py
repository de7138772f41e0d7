"""Does the quickstart learn, how fast, in how much memory: warm start and GRPO for several seeds, as a user runs them.

    python benchmarks/quickstart.py --seeds 0 1 2

Each command runs in a process of its own; wall seconds and peak memory are the operating system's. One line per seed
and metric goes to benchmarks/results/quickstart.jsonl, and the curve of each seed to the line of its pass@1.
"""

import argparse
import csv
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, Line, append, describe_cpu, line, run_fields, versions

CONFIG = "configs/quickstart.yaml"


def timed(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rljax.cli", *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def run_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Seconds, peak memory and curve of one quickstart."""
    base, run = str(folder / "sft"), folder / "run"
    warm = timed(["sft", CONFIG, "--model.path", "", "--sft.output", base, "--seed", str(seed)])
    grpo = timed(["train", CONFIG, "--model.path", base, "--run_dir", str(run), "--seed", str(seed)])
    with (run / "curves.csv").open(newline="") as lines:
        curve = [[int(row["step"]), 1 - float(row["test_loss"])] for row in csv.DictReader(lines)]
    return {"sft_seconds": warm, "train_seconds": grpo, "curve": curve}


def lines_of(fields: Line, seed: int, result: dict[str, Any], peak_gib: float) -> list[Line]:
    """Lines of one seed: pass@1 before and after and their difference, seconds, memory."""
    first, last = result["curve"][0][1], result["curve"][-1][1]
    case = {"model": "tiny", "batch": 256, "lengths": "realistic", "seed": seed}
    return [
        line(fields, case | {"curve": result["curve"]}, "pass@1 change", "fraction", [last - first]),
        line(fields, case, "pass@1 before", "fraction", [first]),
        line(fields, case, "pass@1 after", "fraction", [last]),
        line(fields, case, "warm start", "seconds", [result["sft_seconds"]]),
        line(fields, case, "training", "seconds", [result["train_seconds"]]),
        line(fields, case, "peak memory", "GiB", [peak_gib]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    fields = run_fields("quickstart", describe_cpu(), versions(("rljax", "jax", "jaxlib", "flax", "optax")))
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            result = run_seed(seed, Path(folder))
        # The largest of the commands so far and their workers.
        peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        lines = lines_of(fields, seed, result, peak_gib)
        append(RESULTS / "quickstart.jsonl", lines)
        for made in lines:
            print(seed, made["metric"], made["median"], made["unit"])


if __name__ == "__main__":
    main()
