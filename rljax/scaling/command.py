"""`rljax fit` and `rljax advise`: arguments, and tables for people. Imports nothing heavy: --help is instant."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rljax.config import ConfigError

if TYPE_CHECKING:
    from rljax.scaling.curves import Curve
    from rljax.scaling.result import Fit

RESOURCES = ("flops", "samples", "tokens", "step")
FORM_NAMES = (
    "loglinear", "loglinear_kn", "loglinear_kn_e0", "loglinear_kn_floor", "invexp", "powlaw", "powlawmul",
    "postopenai", "decomposition", "sigmoid",
)  # fmt: skip
"""Those of `fit.RESOURCES` and `forms.FORMS`, here without NumPy."""


def fit_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds those of `rljax fit`."""
    parser.description = (
        "Fits a scaling law to curves tables (curves.csv of runs and sweeps, or the paper's schema) by bounded least "
        "squares in the loss itself, bootstraps its intervals, prints them and writes fit.json."
    )
    add = parser.add_argument
    add("curves", nargs="+", metavar="CURVES.csv")
    add("--form", choices=FORM_NAMES, help="default: loglinear_kn, the paper's; loglinear for one size, or not by size")
    add("--compare", action="store_true", help="also fit every other form, and print R² and AICc of each")
    add("--x", choices=RESOURCES, help="samples: prompts consumed; default: the first of these that every curve has")
    add("--by", choices=("num_params", "repeats", "group_size"), default="num_params", help="what tells curves apart")
    add("--where", action="append", default=[], metavar="COLUMN=VALUE", help="rows that count; may be given again")
    add("--weights", choices=("size", "point", "relative", "binomial"), default="size", help="size: the paper's")
    add("--protocol", choices=("all", "intra", "inter"), default="all", help="intra: predict the rest of each run; "
        "inter: predict the largest size from the others")  # fmt: skip
    add(
        "--preset",
        choices=("base", "instruct"),
        help="the paper's clips of intra: last 80 points; from step 4, last 65",
    )
    add("--first-step", type=int, metavar="S", help="fit from this step on")
    add("--last-step", type=int, metavar="S", help="fit up to this step")
    add("--drop-first", type=int, metavar="N", help="points of each curve left out at its start")
    add("--drop-last", type=int, metavar="N", help="points of each curve left out at its end")
    add("--first-points", type=int, default=10, metavar="M", help="inter: what the strict prediction sees (default 10)")
    add("--draws", type=int, default=1000, metavar="N", help="bootstrap draws; 0: no intervals")
    add("--resample", choices=("auto", "steps", "runs"), default="auto", help="auto: runs if 3 or more of every size")
    add("--seed", type=int, default=0, help="of the draws")
    add("--output", default="fit.json", metavar="FILE", help="default: fit.json, overwritten")
    return parser


def run_fit(given: argparse.Namespace) -> None:
    """Fits as asked, prints, writes.

    Raises:
      ConfigError: the tables or the arguments do not allow it.
    """
    from rljax.scaling.curves import read_curves
    from rljax.scaling.result import write_fit

    if not Path(given.output).resolve().parent.is_dir():
        raise ConfigError(f"--output {given.output}: its folder is not there; make it, or give another file")
    curves, notes = read_curves(given.curves, where=_where(given.where), by=given.by)
    form = given.form or ("loglinear_kn" if len(curves) > 1 and given.by == "num_params" else "loglinear")
    if form != given.form and len(curves) == 1:
        notes.append("one curve has no law across curves: form loglinear was fitted")
    given.x = given.x or next(x for x in RESOURCES if all(_has(curve, x) for curve in curves))
    fit = _fit(given, curves, form, notes)
    write_fit(fit, given.output)
    _print_fit(fit)
    if given.compare:
        _print_comparison(given, curves, fit)
    print(f"written: {given.output}")


def _has(curve: "Curve", x: str) -> bool:
    """Whether every point has this X, as `step` always is."""
    return bool((curve.x[x] > 0).all())


def _where(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        column, equals, value = pair.partition("=")
        if not equals or not column:
            raise ConfigError(f"--where {pair}: COLUMN=VALUE is required, as --where source=base")
        found[column.strip()] = value.strip()
    return found


def _fit(given: argparse.Namespace, curves: "Sequence[Curve]", form: str, notes: Sequence[str] = ()) -> "Fit":
    import dataclasses

    from rljax.scaling.fit import collect
    from rljax.scaling.predict import PRESETS, Clip, clipped, split_largest, transfer
    from rljax.scaling.result import fit_curves

    named = {name: getattr(given, name) for name in ("first_step", "last_step", "drop_first", "drop_last")}
    clip = dataclasses.replace(
        PRESETS[given.preset] if given.preset else Clip(), **{k: v for k, v in named.items() if v is not None}
    )
    if min(clip.first_step, clip.drop_first, clip.drop_last) < 0:
        raise ConfigError(f"{clip} has a negative number; steps and counts of points are 0 or more")
    if given.protocol == "intra" and clip.last_step is None and not clip.drop_last:
        raise ConfigError(
            "--protocol intra predicts what follows the points fitted, and no end of them was given; give --preset "
            "base, --preset instruct, --drop-last N or --last-step S"
        )
    target = None
    if given.protocol == "inter":
        curves, target = split_largest(curves)
        target, _ = clipped(target, Clip(clip.first_step, drop_first=clip.drop_first))  # a warm-up is one for all
    parts = [clipped(curve, clip) for curve in curves]
    fit = fit_curves(
        [fitted for fitted, _ in parts],
        form=form,
        x=given.x,
        by=given.by,
        weighting=given.weights,
        later=[later for _, later in parts] if given.protocol == "intra" else None,
        draws=given.draws,
        over=given.resample,
        seed=given.seed,
        notes=notes,
    )
    if target is not None:
        found = transfer(fit.data, fit.solution, fit.draws, collect([target], given.x), given.first_points)
        fit = dataclasses.replace(fit, transfer=found, target=target)
    return fit


# --------------------------------------------------------------------------------------------------------------- print


def _pair(ends: Sequence[float] | None, form: str = ".4g") -> str:
    return "" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


def _print_fit(fit: "Fit") -> None:
    from rich.console import Console
    from rich.table import Table

    from rljax.scaling.result import fit_json

    found, console = fit_json(fit), Console()
    points = sum(entry["n"] for entry in found["per_curve"] if entry["role"] == "fitted")
    console.print(f"{fit.form}: {fit.solution.form.formula}", markup=False, highlight=False)
    console.print(
        f"X = {fit.x}, {points} points, R² {fit.r2:.4f}; a constant per curve {found['r2_baseline']:.4f}; AICc "
        f"{fit.aicc:.1f}",
        highlight=False,
    )
    for name, value in found["params"].items():
        if not isinstance(value, dict):
            ends = found["intervals"].get(name)
            shown = f"   {fit.level:.0%} interval {_pair(ends)}" if ends else ""
            console.print(f"{name} = {value:.5g}{shown}", highlight=False)
    own = [name for name, value in found["params"].items() if isinstance(value, dict)]
    fitted = [entry for entry in found["per_curve"] if entry["role"] == "fitted"]
    held = any(entry["held_out"] for entry in fitted)
    slope = "k" in fitted[0] and "k" not in own
    table = Table()
    columns = [fit.by, "points", *["k(N)"] * slope, *["interval"] * (slope and not held), *own, "R²", "RMSE"]
    for column in columns + ["held-out R²", "RMSE"] * held:  # intervals beside them: wider than 80 columns
        table.add_column(column, justify="right")
    for entry in fitted:
        table.add_row(*_cells(fit, found, entry, own, slope=slope, held=held))
    console.print(table)
    for entry in (one for one in found["per_curve"] if one["role"] == "predicted"):
        for line in _transfer_lines(fit, entry):
            console.print(line, highlight=False)
    for warning in found["warnings"]:
        console.print(f"warning: {warning}", markup=False, highlight=False)


def _cells(
    fit: "Fit", found: dict[str, Any], entry: dict[str, Any], own: Sequence[str], *, slope: bool, held: bool
) -> list[str]:
    from rljax.scaling.fit import size_name

    def number(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    cells = [f"{entry[fit.by]:.4g}", str(entry["n"])]
    if slope:
        cells += [number(entry["k"], ".4f"), *[_pair(entry["k_interval"], ".3g")] * (not held)]
    cells += [number(found["params"][name][size_name(entry[fit.by])], ".4g") for name in own]
    scored = entry["held_out"] or {}
    return [
        *cells,
        number(entry["r2"], ".3f"),
        number(entry["rmse"], ".4f"),
        *[number(scored.get("r2"), ".3f"), number(scored.get("rmse"), ".4f")] * held,
    ]


def _transfer_lines(fit: "Fit", entry: dict[str, Any]) -> list[str]:
    """The prediction of the largest size."""
    words = {
        "slope_only": "slope predicted, E from all its points (the paper's)",
        "strict": "slope predicted, E from its first points alone",
        "law": "all predicted",
    }
    lines = [f"predicted: {fit.by} {entry[fit.by]:.4g}, k = {entry.get('k') or 0:.4g} {_pair(entry.get('k_interval'))}"]
    for name in (name for name in words if name in entry):
        one = entry[name]
        lines.append(f"  {words[name]}: R² {one['r2']:.3f}, RMSE {one['rmse']:.4f} on {one['n']} points")
    ends = entry["final_interval"]
    return [
        *lines,
        f"  loss at its end: {entry['final_loss']:.4f} {f'({_pair(ends)})' if ends else ''}, measured "
        f"{entry['final_measured']:.4f} (mean of the last 10)",
    ]


def _print_comparison(given: argparse.Namespace, curves: "Sequence[Curve]", fit: "Fit") -> None:
    """R² and AICc of every form on the same points."""
    from rich.console import Console
    from rich.table import Table

    without = argparse.Namespace(
        **{**vars(given), "draws": 0, "protocol": "all" if given.protocol == "inter" else given.protocol}
    )
    if given.protocol == "inter":
        curves = curves[:-1]
    table = Table(title="forms on the same points")
    for column in ("form", "parameters", "R²", "AICc"):
        table.add_column(column, justify="left" if column == "form" else "right")
    rows = []
    for name in FORM_NAMES:
        try:
            other = fit if name == fit.form else _fit(without, curves, name)
        except ConfigError as error:
            rows.append((float("inf"), name, "", "", str(error).split(";")[0][:60]))
            continue
        count = other.solution.form.count(len(other.curves))
        rows.append((other.aicc, name, str(count), f"{other.r2:.4f}", f"{other.aicc:.1f}"))
    for _, *cells in sorted(rows):
        table.add_row(*cells)
    Console().print(table)


# -------------------------------------------------------------------------------------------------------------- advise


def advise_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds those of `rljax advise`."""
    parser.description = (
        "Says which of the sizes fitted to train, for how many steps and with how many repeats of the data, given a "
        "budget, and how sure that is."
    )
    add = parser.add_argument
    add("fit", nargs="?", default="fit.json", metavar="FIT.json", help="of `rljax fit`; default: fit.json")
    add("--budget", required=True, metavar="AMOUNT", help="FLOPs of training, as 2e19; or prompts, as 50000prompts")
    add("--unique", required=True, type=int, metavar="N", help="different prompts there are to train on")
    add("--prompts-per-step", type=int, metavar="P", help="default: as in the curves")
    add("--reuse", metavar="FIT.json", help="of `rljax fit --by repeats --x step`: what repeats cost")
    return parser


def run_advise(given: argparse.Namespace) -> None:
    """Prints the advice.

    Raises:
      ConfigError: the fit or the budget does not allow any.
    """
    from rljax.scaling.advise import Budget, advise, reuse_cost
    from rljax.scaling.result import load_fit

    advice = advise(
        load_fit(given.fit), Budget.parse(given.budget), unique=given.unique, prompts_per_step=given.prompts_per_step
    )
    _print_advice(advice)
    best = advice.best
    if given.reuse:
        for line in reuse_cost(load_fit(given.reuse), best.repeats, best.steps):
            print(line)


def _print_advice(advice: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"budget: {advice.budget}; {advice.unique:,} unique prompts")
    for column in ("size", "test loss", f"{advice.level:.0%} interval", "steps", "prompts", "FLOPs", "repeats"):
        table.add_column(column, justify="right")
    for option in advice.options:
        table.add_row(
            ("* " if option is advice.best else "") + f"{option.size:.4g}",
            f"{option.loss:.4f}",
            _pair(option.interval),
            f"{option.steps:,}",
            f"{option.prompts:,.0f}",
            "" if option.flops is None else f"{option.flops:.3g}",
            f"{option.repeats:,}" + (" †" if option.note else ""),
        )
    console.print(table)
    if any(option.note for option in advice.options):
        console.print("† outside the measured range of this size")
    for line in advice.lines():
        console.print(line, markup=False, highlight=False)
