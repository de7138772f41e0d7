"""The paper's questions at toy scale, from the runs to the page, as one command that resumes where it was ended.

    python benchmarks/scaling.py                       # the runs of configs/scaling/ladder.yaml, about two hours
    python benchmarks/scaling.py --sweep configs/scaling/rehearsal.yaml --output runs/rehearsal/results

Runs the sweep, fits its curves, draws its figures, asks which of the findings of arXiv 2509.25300 they show, and writes
all of it to benchmarks/results/scaling/: curves.csv, fits/*.json, figures/*.svg, findings.json, README.md.

Letters: R runs of a curve, that differ in seeds alone; L a test loss; k the slope of its law; G completions per prompt.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, ROOT, describe_cpu, run_fields, versions
from scipy import stats

from rljax.scaling.curves import Curve, read_held
from rljax.scaling.figures import write_figures
from rljax.scaling.fit import collect
from rljax.scaling.grid import read_sweep
from rljax.scaling.plot import positive, smooth
from rljax.scaling.predict import Clip, clipped, split_largest, transfer
from rljax.scaling.result import Fit, fit_curves, fit_json, per_curve, write_fit

TAIL = 10
"""Evaluations at the end of a run whose mean is its end."""
FIRST_POINTS = 10
"""Of the largest size, what its strict prediction sees."""
FITTED_SHARE = 1 / 3
"""Of a run, what its own prediction sees."""
PACKAGES = ("rljax", "jax", "jaxlib", "flax", "optax", "scipy")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One of the paper's claims and what these runs say of it."""

    claim: str
    verdict: str
    """holds, does not hold, in part, or undecided: by a rule on intervals, not by eye."""
    numbers: str


# --------------------------------------------------------------------------------------------------------------- noise


def ends_of(curve: Curve) -> np.ndarray:
    """[R] mean loss of the last `TAIL` evaluations of each run."""
    return np.nanmean(curve.runs[:, -TAIL:], axis=1)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How far ends of equal runs are apart, in units of sqrt(L (1 - L)), the noise of a share."""

    units: float
    degrees: int

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> "Spread":
        """Pooled over curves with several runs: three say little about their own spread."""
        ends = [ends_of(curve) for curve in curves]
        ends = [each for each in ends if len(each) > 1]
        degrees = sum(len(each) - 1 for each in ends)
        if not degrees:
            raise SystemExit("no two runs differ in seeds alone, so nothing says how far equal runs are apart")
        total = sum(float(np.sum((each - each.mean()) ** 2)) / _variance(each.mean()) for each in ends)
        return cls(float(np.sqrt(total / degrees)), degrees)

    def difference(self, a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
        """mean(a) - mean(b) of ends of runs, and the ends of its 95 % interval by Student's t."""
        middle = float(a.mean() - b.mean())
        half = float(stats.t.ppf(0.975, self.degrees)) * self.units
        half *= float(np.sqrt(_variance(a.mean()) / len(a) + _variance(b.mean()) / len(b)))
        return middle, middle - half, middle + half


def _variance(loss: float) -> float:
    return max(float(loss * (1 - loss)), 1e-6)


# ------------------------------------------------------------------------------------------------------------ findings


def steeper_with_size(fit: Fit) -> Finding:
    """`fit`: a law of each size alone."""
    entries = per_curve(fit)
    ends = [entry["k_interval"] for entry in entries]
    apart = sum(low[1] < high[0] for low, high in itertools.pairwise(ends))
    verdict = "holds" if apart == len(ends) - 1 else "in part" if apart else "does not hold"
    slopes = "; ".join(
        f"{_size(entry['num_params'])}: {entry['k']:.3f} ({entry['k_interval'][0]:.3f} to {entry['k_interval'][1]:.3f})"
        for entry in entries
    )
    return Finding(
        f"Larger models have larger k, on {_resource(fit.x)}",
        verdict,
        f"k by size {slopes}; {apart} of {len(ends) - 1} neighbours have intervals that do not meet",
    )


def saturates(fit: Fit) -> Finding:
    """`fit`: the paper's law of all sizes."""
    found = fit_json(fit)
    n0, k_max = found["params"]["n0"], found["params"]["k_max"]
    low, high = found["intervals"]["n0"]
    k_low, k_high = found["intervals"]["k_max"]
    largest = max(curve.key for curve in fit.curves)
    claim = f"k(N) saturates within the sizes measured, on {_resource(fit.x)}"
    told = (n0, k_max, low, high, k_low, k_high, found["r2"], found["r2_baseline"])
    if None in told:  # as of runs that learnt nothing
        return Finding(claim, "undecided", "k_max or N0 is not determined by these curves")
    verdict = "holds" if high < largest else "does not hold" if low > largest else "undecided"
    return Finding(
        claim,
        verdict,
        f"k_max {k_max:.3f} ({k_low:.3f} to {k_high:.3f}), N0 {_size(n0)} ({_size(low)} to {_size(high)}), largest "
        f"size {_size(largest)}; R² {found['r2']:.4f}, of a constant per size {found['r2_baseline']:.4f}",
    )


def predicts_largest(fit: Fit) -> Finding:
    """`fit`: the law of the smaller sizes, with the `transfer` to the largest."""
    found = fit.transfer
    assert found is not None and found.final_interval is not None
    low, high = found.final_interval
    verdict = "holds" if low <= found.measured <= high else "does not hold"
    return Finding(
        f"The smaller sizes predict the largest, on {_resource(fit.x)}",
        verdict,
        f"its end from their slope and its first {FIRST_POINTS} points {found.final_loss:.3f} ({low:.3f} to "
        f"{high:.3f}), measured {found.measured:.3f}; R² {found.scores['slope_only'].r2:.3f}, E from all its points",
    )


def predicts_rest(fit: Fit) -> Finding:
    """`fit`: the law of the first part of each run, with the later part held out; against a loss that stays put."""
    better, lines = 0, []
    for curve, later, entry in zip(fit.curves, fit.later, per_curve(fit), strict=True):
        assert later is not None
        stays = float(np.sqrt(np.mean((later.loss - curve.loss[-3:].mean()) ** 2)))
        law = entry["held_out"]["rmse"]
        better += law < stays
        lines.append(f"{_size(curve.key)}: {law:.3f} against {stays:.3f}")
    verdict = "holds" if better == len(lines) else "in part" if better > len(lines) / 2 else "does not hold"
    return Finding(
        f"The first {FITTED_SHARE:.0%} of a run predicts the rest, on {_resource(fit.x)}",
        verdict,
        f"RMSE of the law against that of the loss staying where it was, {'; '.join(lines)}; better at {better} of "
        f"{len(lines)} sizes",
    )


def reuse(curves: Sequence[Curve], spread: Spread) -> list[Finding]:
    """Of curves by repeats, the first without: up to 25 little is lost, at 100 much."""
    base = ends_of(curves[0])
    differences = {int(curve.key): spread.difference(ends_of(curve), base) for curve in curves[1:]}
    text = "; ".join(f"{tau}: {_signed(*ends)}" for tau, ends in differences.items())
    few = [ends for tau, ends in differences.items() if tau <= 25]
    most = differences.get(100)
    holds = all(low <= 0 for _, low, _ in few)
    found = [
        Finding(
            "Repeating a set up to 25 times costs little",
            "holds" if holds else "does not hold" if all(low > 0 for _, low, _ in few) else "in part",
            f"end without repeats {base.mean():.3f}; difference by repeats {text}",
        )
    ]
    if most is not None:
        verdict = "holds" if most[1] > 0 else "does not hold" if most[2] < 0 else "undecided"
        found.append(Finding("Repeating it 100 times overfits", verdict, f"difference {_signed(*most)}"))
    return found


def groups(curves: Sequence[Curve], spread: Spread) -> list[Finding]:
    """Of curves by completions per prompt: the larger the better by data; by compute the best grows with the budget."""
    ends = {int(curve.key): ends_of(curve) for curve in curves}
    least, most = min(ends), max(ends)
    found = spread.difference(ends[most], ends[least])
    by_data = "; ".join(f"{group}: {each.mean():.3f}" for group, each in ends.items())
    verdict = "holds" if found[2] < 0 else "does not hold" if found[1] > 0 else "undecided"
    best = best_by_compute(curves)
    order = [group for _, group, _ in best]
    grows = all(a <= b for a, b in itertools.pairwise(order)) and order[0] < order[-1]
    return [
        Finding(
            "More completions per prompt are better at equal data",
            verdict,
            f"end by G {by_data}; {most} against {least} {_signed(*found)}",
        ),
        Finding(
            "By compute the best G grows with the budget",
            "holds" if grows else "does not hold",
            "; ".join(f"{flops:.2g} FLOPs: {group} ({loss:.3f})" for flops, group, loss in best)
            + "; one run of each G but 8, no interval",
        ),
    ]


def best_by_compute(curves: Sequence[Curve]) -> list[tuple[float, int, float]]:
    """(FLOPs, best G, its smoothed loss) at the end of each curve's budget, among the curves that reach so far."""
    lines = {}
    for curve in curves:
        x, loss = positive(curve, "flops")
        lines[int(curve.key)] = (np.log(x), smooth(x, loss))
    found = []
    for end in sorted(x[-1] for x, _ in lines.values()):
        there = {g: float(np.interp(end, x, y)) for g, (x, y) in lines.items() if x[0] <= end <= x[-1] + 1e-9}
        best = min(there, key=lambda group: there[group])
        found.append((float(np.exp(end)), best, there[best]))
    return found


def orders(shuffled: Curve, curriculum: Curve, spread: Spread) -> Finding:
    """Not a claim with a number in the paper, which trains on a curriculum throughout."""
    found = spread.difference(ends_of(curriculum), ends_of(shuffled))
    verdict = "holds" if found[2] < 0 else "does not hold" if found[1] > 0 else "undecided"
    return Finding("Easy to hard is better than shuffled", verdict, f"difference {_signed(*found)}")


# ---------------------------------------------------------------------------------------------------------------- fits


def fits_of(curves: Sequence[Curve], x: str, draws: int) -> dict[str, Fit]:
    """By name: each size alone, the law, of the smaller sizes with the largest predicted, of the first parts."""
    smaller, largest = split_largest(curves)
    inter = fit_curves(smaller, x=x, draws=draws)
    seen = min(FIRST_POINTS, len(largest) - 1)
    found = transfer(inter.data, inter.solution, inter.draws, collect([largest], x), seen)
    parts = [clipped(curve, Clip(drop_last=len(curve) - max(2, int(len(curve) * FITTED_SHARE)))) for curve in curves]
    first, later = [a for a, _ in parts], [b for _, b in parts]
    return {
        "each": fit_curves(curves, form="loglinear", x=x, draws=draws),
        "law": fit_curves(curves, x=x, draws=draws),
        "inter": dataclasses.replace(inter, transfer=found, target=largest),
        "intra": fit_curves(first, x=x, draws=draws, later=later),
    }


def examine(table: Path, draws: int) -> tuple[dict[str, Fit], list[Finding]]:
    """All fits and findings of a sweep's table."""
    sizes, _ = read_held(table, where={}, by="num_params")
    fits: dict[str, Fit] = {}
    findings: list[Finding] = []
    for x in ("flops", "samples"):
        found = fits_of(sizes, x, draws)
        fits |= {f"{name}_{x}": fit for name, fit in found.items()}
        findings += [
            steeper_with_size(found["each"]),
            predicts_largest(found["inter"]),
            predicts_rest(found["intra"]),
            saturates(found["law"]),
        ]
    spread = Spread.of(sizes)
    findings += reuse(read_held(table, where={}, by="repeats")[0], spread)
    findings += groups(read_held(table, where={}, by="group_size")[0], spread)
    (curriculum,), _ = read_held(table, where={"order": "curriculum"}, by="num_params")
    shuffled = next(curve for curve in sizes if curve.key == curriculum.key)
    findings.append(orders(shuffled, curriculum, spread))
    return fits, findings


# ---------------------------------------------------------------------------------------------------------------- page


def _size(params: float) -> str:
    unit, name = (1e6, "M") if params >= 1e6 else (1e3, "k")
    return f"{params / unit:.3g}{name}"


def _resource(x: str) -> str:
    return {"flops": "compute", "samples": "data"}[x]


def _signed(middle: float, low: float, high: float) -> str:
    return f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"


def page(findings: Sequence[Finding], figures: Iterable[str], fields: Mapping[str, Any], runs: str) -> str:
    """The Markdown page."""
    lines = [
        "# The paper's questions at toy scale",
        "",
        "Written by `python benchmarks/scaling.py` from `curves.csv`; do not edit. " + runs,
        "",
        f"{fields['device']}, commit {fields['commit']}, {fields['date']}. Intervals are of 95 %.",
        "",
        "| finding of the paper | here | numbers |",
        "|---|---|---|",
        *(f"| {f.claim} | {f.verdict} | {f.numbers} |" for f in findings),
        "",
        "*holds*, *does not hold*: the interval decides it; *undecided*: it does not; *in part*: for some sizes or "
        "values only. Not asked here: other evaluation sets (the task has one) and response lengths (the task fixes "
        "them). What is true of sorting digits with models of a few million parameters need not be of mathematics.",
        "",
        *(f"![{Path(name).stem}](figures/{name})" for name in figures),
        "",
    ]
    return "\n".join(lines)


def write_results(table: Path, output: Path, draws: int, runs: str) -> list[Finding]:
    """Everything but the runs."""
    fits, findings = examine(table, draws)
    for folder in (output / "fits", output / "figures"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if table.resolve() != (output / "curves.csv").resolve():
        shutil.copyfile(table, output / "curves.csv")
    for name, fit in fits.items():
        write_fit(fit, output / "fits" / f"{name}.json")
    with tempfile.TemporaryDirectory() as drawn:
        figures = sorted(file for file in write_figures(table, Path(drawn)) if file.suffix == ".svg")
        for file in figures:
            shutil.copyfile(file, output / "figures" / file.name)
    fields = run_fields("scaling", describe_cpu(), versions(PACKAGES))
    saved = fields | {"findings": [dataclasses.asdict(finding) for finding in findings]}
    (output / "findings.json").write_text(json.dumps(saved, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = page(findings, [file.name for file in figures], fields, runs)
    (output / "README.md").write_text(text, encoding="utf-8")
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, default=ROOT / "configs" / "scaling" / "ladder.yaml")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    given = parser.parse_args()
    sweep = read_sweep(given.sweep)
    code = subprocess.call([sys.executable, "-m", "rljax.cli", "sweep", str(given.sweep)])
    if code:
        raise SystemExit(code)
    runs = f"{len(sweep.runs)} runs of `{given.sweep.resolve().relative_to(ROOT)}`, each from its size's warm start."
    for finding in write_results(sweep.folder / "curves.csv", given.output, given.draws, runs):
        print(f"{finding.verdict:>14}  {finding.claim}")


if __name__ == "__main__":
    main()
