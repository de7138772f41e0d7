"""What benchmarks/scaling.py makes of curves whose laws are known."""

import csv
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import scaling

SIZES = (2e4, 6e4, 2e5, 6e5, 1.3e6, 2.8e6)
MIDDLE = 6e5
STEPS = range(0, 155, 5)
COLUMNS = ("run", "source", "num_params", "step", "samples", "flops", "tokens", "test_loss", "unique", "repeats")
COLUMNS += ("group_size", "eval", "seed", "order")

Law = Callable[[float, float], float]
"""Loss of (size, prompts)."""


def saturating(size: float, samples: float) -> float:
    return 0.9 * (1 + samples / 160) ** (-0.4 / (1 + 1e5 / size))


def still_rising(size: float, samples: float) -> float:
    return 0.9 * (1 + samples / 160) ** (-size / 8e6)


def write_table(
    file: Path, law: Law, *, noise: float = 0.004, worn: float = 1.0, group: float = 0.0, curriculum: float = 1.0
) -> Path:
    """A sweep as the ladder's: losses of 100 repeats are `worn` times the others', those of G completions
    (8 / G)^`group` times, in order of difficulty `curriculum` times."""
    rng = np.random.default_rng(0)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()

        def run(name: str, size: float, *, tau: int = 1, g: int = 8, seed: int = 0, order: str = "shuffle") -> None:
            times = (worn if tau == 100 else 1.0) * (8 / g) ** group * (curriculum if order == "curriculum" else 1.0)
            for step in STEPS:
                samples = 32 * step
                loss = min(0.99, law(size, samples) * times * (1 + noise * rng.standard_normal()))
                flops = 6 * size * samples * g * 20
                values = (name, "rljax", size, step, samples, flops, 20 * g * samples, loss, 4800 // tau, tau)
                writer.writerow(dict(zip(COLUMNS, (*values, g, "task:sorting", seed, order), strict=True)))

        for size in SIZES:
            for seed in range(3):
                run(f"{size}-{seed}", size, seed=seed)
        for tau in (2, 5, 20, 25, 50, 100):
            run(f"tau{tau}", MIDDLE, tau=tau)
        for g in (4, 16, 32):
            run(f"g{g}", MIDDLE, g=g)
        run("curriculum", MIDDLE, order="curriculum")
    return file


def verdicts(table: Path) -> dict[str, str]:
    _, findings = scaling.examine(table, draws=100)
    return {finding.claim: finding.verdict for finding in findings}


def test_what_holds_is_found_to_hold(tmp_path: Path) -> None:
    found = verdicts(write_table(tmp_path / "curves.csv", saturating, worn=1.2, group=0.2, curriculum=0.9))
    assert len(found) == 13
    for claim, verdict in found.items():
        if "By compute" not in claim:  # depends on the law, see below
            assert verdict == "holds" or (verdict == "in part" and "larger k" in claim), (claim, verdict)
    assert found["k(N) saturates within the sizes measured, on data"] == "holds"


def test_what_does_not_hold_is_found_not_to(tmp_path: Path) -> None:
    found = verdicts(write_table(tmp_path / "curves.csv", still_rising, worn=0.8, group=-0.2, curriculum=1.2))
    assert found["k(N) saturates within the sizes measured, on data"] == "does not hold"
    assert found["Repeating it 100 times overfits"] == "does not hold"
    assert found["More completions per prompt are better at equal data"] == "does not hold"
    assert found["Easy to hard is better than shuffled"] == "does not hold"


def test_what_noise_hides_is_undecided(tmp_path: Path) -> None:
    found = verdicts(write_table(tmp_path / "curves.csv", saturating, noise=0.02))
    assert found["Repeating it 100 times overfits"] == "undecided"
    assert found["Repeating a set up to 25 times costs little"] == "holds"
    assert found["More completions per prompt are better at equal data"] == "undecided"
    assert found["Easy to hard is better than shuffled"] == "undecided"


def test_flat_curves_do_not_get_steeper(tmp_path: Path) -> None:
    found = verdicts(write_table(tmp_path / "curves.csv", lambda size, samples: saturating(3e5, samples)))
    assert found["Larger models have larger k, on data"] != "holds"


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        ends = [np.asarray(0.3 + 0.02 * rng.standard_normal(3)) for _ in range(4)]
        spread = scaling.Spread.of([_ending(each) for each in ends])
        _, low, high = spread.difference(np.asarray([0.3 + 0.02 * rng.standard_normal()]), ends[0])
        held += low <= 0 <= high
    assert 930 <= held <= 970


def _ending(ends: np.ndarray) -> scaling.Curve:
    steps = np.arange(1, 13)
    runs = np.repeat(ends[:, None], len(steps), axis=1)
    return scaling.Curve(1.0, steps, {}, runs.mean(axis=0), runs)


def test_a_single_run_of_everything_is_refused() -> None:
    with pytest.raises(SystemExit, match="no two runs differ in seeds alone"):
        scaling.Spread.of([_ending(np.array([0.3]))])


def test_best_group_by_compute() -> None:
    """4 completions learn as much of a prompt as 8 until 0.5, where they stay."""
    steps = np.arange(1, 61)
    curves = []
    for group, lowest in ((4, 0.5), (8, 0.1)):
        loss = np.maximum(lowest, 0.9 - 0.01 * steps)
        x = {"flops": steps * group * 1e9, "samples": steps * 1.0}
        curves.append(scaling.Curve(group, steps, x, loss, loss[None]))
    (first, early, loss), (second, late, _) = scaling.best_by_compute(curves)
    assert first == pytest.approx(240e9) and second == pytest.approx(480e9)
    assert early == 4 and loss == pytest.approx(0.5, abs=0.03)
    assert late == 8


def test_everything_is_written_and_says_the_same(tmp_path: Path) -> None:
    table = write_table(tmp_path / "curves.csv", saturating)
    output = tmp_path / "results"
    findings = scaling.write_results(table, output, 20, "28 runs.")
    assert (output / "curves.csv").read_bytes() == table.read_bytes()
    saved = json.loads((output / "findings.json").read_text())
    assert saved["findings"] == [dataclasses.asdict(finding) for finding in findings]
    page = (output / "README.md").read_text()
    assert all(f"| {finding.claim} | {finding.verdict} | {finding.numbers} |" in page for finding in findings)
    figures = {file.name for file in (output / "figures").iterdir()}
    assert {"law_samples-rljax.svg", "slopes_samples-rljax.svg", "repeats_samples-rljax.svg"} <= figures
    assert all(f"](figures/{name})" in page for name in figures)
    assert {file.stem for file in (output / "fits").iterdir()} == {
        f"{fit}_{x}" for fit in ("each", "law", "inter", "intra") for x in ("flops", "samples")
    }
    assert len(scaling.write_results(output / "curves.csv", output, 20, "28 runs.")) == len(findings)  # again, in place


def test_the_readme_says_what_was_found() -> None:
    """The rows between its marker and the next heading are those of findings.json, and the curves are all there."""
    results = scaling.RESULTS / "scaling"
    findings = json.loads((results / "findings.json").read_text())["findings"]
    text = (scaling.ROOT / "README.md").read_text().partition("<!-- scaling-result -->")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [f"| {finding['claim']} | {finding['verdict']} |" for finding in findings]
    with (results / "curves.csv").open(newline="") as file:
        runs = {row["run"] for row in csv.DictReader(file)}
    sweep = scaling.read_sweep(scaling.ROOT / "configs" / "scaling" / "ladder.yaml")
    assert runs == {run.name for run in sweep.runs}
