"""Does the quickstart learn, how fast, in how much memory: warm start and GRPO for several seeds, as a user runs them.

    python benchmarks/quickstart.py --seeds 0 1 2

Each command runs in a process of its own; wall seconds and peak memory are the operating system's. One line per seed
and metric goes to benchmarks/results/quickstart.jsonl, and the curve of each seed to the line of its pass@1.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quickstart.jsonl"
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


def lines_of(seed: int, result: dict[str, Any], peak_gib: float) -> list[dict[str, Any]]:
    """Benchmark lines (format: benchmarks/README.md)."""
    packages = ("rljax", "jax", "jaxlib", "flax", "optax")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    common = {
        "bench": "quickstart",
        "device": f"{os.cpu_count()} x {platform.processor() or platform.machine()} CPU",
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }
    first, last = result["curve"][0][1], result["curve"][-1][1]
    values = (
        ("pass@1 change", "fraction", last - first),
        ("pass@1 before", "fraction", first),
        ("pass@1 after", "fraction", last),
        ("warm start", "seconds", result["sft_seconds"]),
        ("training", "seconds", result["train_seconds"]),
        ("peak memory", "GiB", peak_gib),
    )
    lines = []
    for metric, unit, value in values:
        case: dict[str, Any] = {"model": "tiny", "batch": 256, "lengths": "realistic", "seed": seed}
        if metric == "pass@1 change":
            case["curve"] = result["curve"]
        value = round(value, 4)
        lines.append(
            {
                **common,
                "case": case,
                "metric": metric,
                "unit": unit,
                "median": value,
                "min": value,
                "max": value,
                "n": 1,
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as folder:
            result = run_seed(seed, Path(folder))
        # The largest of the commands so far and their workers.
        peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as out:
            for line in lines_of(seed, result, peak_gib):
                out.write(json.dumps(line) + "\n")
                print(line["case"]["seed"], line["metric"], line["median"], line["unit"])


if __name__ == "__main__":
    main()
