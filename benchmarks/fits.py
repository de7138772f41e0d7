"""Are the intervals of the scaling fits right, and how long do fits take?

    python benchmarks/fits.py                        # everything; each case can be run alone
    python benchmarks/fits.py --cases coverage --noise white --trials 500

`coverage`: curves of the paper's ladder, steps and noise from a known law (k_max .14, N0 13e9), fitted, bootstrapped;
how often do 95 % intervals hold the truth for k_max, N0 and the law's loss at four times the measured range? `--noise
white`: independent steps; `red`: autocorrelated, .5 from step to step, of the same size; `runs`: three runs of each
size, each with an offset of its own of half the noise, drawn as runs. `time`: seconds of the paper's law on 735 points,
of 1,000 draws, and of the command `rljax report` on tables of curves, that of the ladder trained here and, where it is
there, the paper's. `forecast`: on the paper's own curves, from the first part of each, how often does the 95 % interval
hold the evaluations of its end? Lines go to benchmarks/results/fits.jsonl (format: README.md).
"""

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from common import RESULTS, ROOT, Line, append, describe_cpu, line, run_fields, versions

from rljax.scaling.curves import Curve, read_curves
from rljax.scaling.fit import collect, solve
from rljax.scaling.forecast import forecast
from rljax.scaling.forms import FORMS
from rljax.scaling.intervals import bootstrap, interval

sys.path.insert(0, str(ROOT / "tests" / "scaling"))
from laws import NOISE, SIZES, curve, paper_law  # the ladder the tests use

KN = FORMS["loglinear_kn"]
STEPS = np.arange(1, 106)
FAR = np.array([np.log10(4 * STEPS[-1] * 512.0)])
TRUTH = {"k_max": 0.14, "n0": float(np.log10(13e9)), "extrapolated_loss": float(paper_law(72e9, 10 ** FAR[0]))}
CURVES = ROOT.parent / "shared" / "data" / "paper_curves"
LADDER = RESULTS / "scaling" / "curves.csv"


# ------------------------------------------------------------------------------------------------------------ coverage


def noisy(rng: np.random.Generator, kind: str) -> list[Curve]:
    """The paper's ladder with noise of a kind."""
    found = []
    for size, sigma in zip(SIZES, NOISE, strict=True):
        law = paper_law(size, STEPS * 512.0)
        if kind == "runs":
            shape = (3, len(STEPS))
            each = law + sigma * np.sqrt(3) * rng.standard_normal(shape)
            each = each + 0.5 * sigma * np.sqrt(3) * rng.standard_normal((3, 1))
            mean = curve(size, STEPS, each.mean(axis=0))
            found.append(Curve(size, STEPS, mean.x, mean.loss, each))
            continue
        noise = rng.standard_normal(len(STEPS))
        if kind == "red":
            for i in range(1, len(noise)):
                noise[i] = 0.5 * noise[i - 1] + np.sqrt(0.75) * noise[i]
        found.append(curve(size, STEPS, law + sigma * noise))
    return found


def coverage(kind: str, trials: int, draws: int, first: int) -> Iterable[tuple[Line, str, str, list[float]]]:
    """(case, metric, unit, values) of the share of intervals that hold the truth."""
    hits: dict[str, list[bool]] = {name: [] for name in TRUTH}
    for trial in range(first, first + trials):
        data = collect(noisy(np.random.default_rng(trial), kind), "samples")
        solution = solve(data, KN)
        drawn = bootstrap(data, solution, draws=draws, seed=trial, over="runs" if kind == "runs" else "steps")
        values = (drawn.theta[:, 0], drawn.theta[:, 1], drawn.predict(FAR, np.array([len(SIZES) - 1]))[:, 0])
        for (name, truth), of_draws in zip(TRUTH.items(), values, strict=True):
            low, high = interval(of_draws)
            hits[name].append(bool(low <= truth <= high))
    case = {"part": "coverage", "noise": kind, "trials": trials, "draws": draws, "first_seed": first}
    for name, found in hits.items():
        yield {**case, "quantity": name}, "coverage", "%", [100 * float(np.mean(found))]


# ---------------------------------------------------------------------------------------------------------------- time


def times(repeats: int) -> Iterable[tuple[Line, str, str, list[float]]]:
    """Seconds of a fit of 735 points and of 1,000 draws, SciPy loaded; and of reports, whole commands."""
    data = collect(noisy(np.random.default_rng(0), "white"), "samples")
    assert len(data.loss) == 735
    solve(data, KN)

    def seconds(work) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    case = {"part": "time", "points": 735, "form": "loglinear_kn"}
    yield case, "fit", "s", [seconds(lambda: solve(data, KN)) for _ in range(repeats)]
    solution = solve(data, KN)
    yield (
        {**case, "draws": 1000},
        "bootstrap",
        "s",
        [seconds(lambda: bootstrap(data, solution, draws=1000)) for _ in range(3)],
    )
    for name, table in (("ladder", LADDER), ("paper", CURVES / "holdout.csv")):
        if table.is_file():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "rljax.cli", "report", str(table), "--output", folder]
                run = functools.partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
                took = [seconds(run) for _ in range(3)]
                figures = len(list(Path(folder, "figures").glob("*.png")))
            rows = len(table.read_text().splitlines()) - 1
            yield {"part": "time", "curves": name, "rows": rows, "figures": figures}, "report", "s", took


# ------------------------------------------------------------------------------------------------------------ forecast

ENDS = slice(-15, -5)
"""The evaluations forecast. Not the last five: there some of a size's runs have stopped, and a mean of fewer is noisier
than anything before."""


def real_curves() -> dict[str, list[Curve]]:
    """The paper's curves by table."""
    found: dict[str, list[Curve]] = {"evals": [], "reuse": [], "group_size": []}
    found["holdout"] = read_curves(CURVES / "holdout.csv")[0]  # among the evals too
    for source in ("base", "instruct"):
        sets = ["aime2024", "amc2023", "gsm8k", "humaneval", "math500", "supergpqa", "zebra"]
        for name in sets + ["holdout"] * (source == "base"):
            found["evals"] += read_curves(CURVES / "evals.csv", where={"source": source, "eval": name})[0]
        found["group_size"] += read_curves(CURVES / "rollout_n.csv", where={"source": source}, by="group_size")[0]
    found["reuse"] += read_curves(CURVES / "data_reuse.csv", by="repeats")[0]
    return found


def forecasts() -> Iterable[tuple[Line, str, str, list[float]]]:
    """Share of evaluations held, and widths, by how much of the curve was seen."""
    tables = real_curves()
    for share in (0.1, 0.25, 0.5, 0.75):
        whole = [one for name in ("evals", "reuse", "group_size") for one in tables[name]]
        for name, curves in [*tables.items(), ("all", whole)]:
            held, width, error = [], [], []
            for one in curves:
                seen = max(int(share * len(one)), 5)
                for step, loss in zip(one.step[ENDS], one.loss[ENDS], strict=True):
                    made = forecast(one.step[:seen], one.loss[:seen], float(step))
                    held.append(made.low <= loss <= made.high)
                    width.append(made.high - made.low)
                    error.append(abs(made.loss - loss))
            case = {"part": "forecast", "curves": name, "seen": share, "num_curves": len(curves), "targets": len(held)}
            yield case, "coverage", "%", [100 * float(np.mean(held))]
            yield case, "width", "test loss", width
            yield case, "error", "test loss", error


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", choices=("coverage", "time", "forecast"), default=["coverage", "time", "forecast"]
    )
    parser.add_argument("--noise", nargs="+", choices=("white", "red", "runs"), default=["white", "red", "runs"])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--draws", type=int, default=199)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "fits.jsonl")
    given = parser.parse_args()
    fields = run_fields("fits", describe_cpu(), versions(("rljax", "numpy", "scipy")))
    parts = []
    if "time" in given.cases:
        parts.append(times(given.repeats))
    if "forecast" in given.cases:
        parts.append(forecasts())
    if "coverage" in given.cases:
        parts += [coverage(kind, given.trials, given.draws, given.first_seed) for kind in given.noise]
    for part in parts:
        for case, metric, unit, values in part:
            made = line(fields, case, metric, unit, values)
            print({**case, metric: made["median"], "unit": unit, "n": made["n"]}, flush=True)
            append(given.out, [made])


if __name__ == "__main__":
    main()
