"""A table of curves, that of a sweep or any other, as figures and one HTML page that needs nothing else.

write_sweep_report("runs/ladder")             # figures/ and report.html in that folder
write_sweep_report("curves.csv", "out", beside="paper.csv")
"""

import base64
import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rljax.config import ConfigError
from rljax.scaling.curves import AXES
from rljax.scaling.figures import LAW, Table, open_table, read_varied, write_figures
from rljax.scaling.page import document, escape, section, table
from rljax.scaling.plot import LABELS, style_of
from rljax.scaling.report import completions, read_run
from rljax.scaling.result import fit_curves, fit_json

DRAWS = 200
"""Bootstrap draws of the page's intervals: enough for two digits; `rljax fit` takes 1,000."""
TITLES = {
    "law": "The law, fitted on all points",
    "intervals": "Last step, mean and 95 % interval over runs",
    "inter": "The largest size, its slope predicted from the others, its intercept fitted",
    "intra": "The later part of each run, predicted from the first",
    "slopes": "Slope K(N)",
    "models": "Sizes after as many prompts, and other models",
    "repeats": "Data reuse",
    "group_size": "Completions per prompt",
    "lengths": "Response length, tokens",
    "evals_ends": "Evaluation sets, the first ten evaluations and the last ten",
    "evals": "Evaluation sets",
}
"""By the beginning of a figure's name, the longer before the shorter."""
RUN_COLUMNS = ("run", "size", "num_params", "repeats", "group_size", "order", "seed", "eval")
COST_COLUMNS = ("step", "samples", "tokens", "flops", "accelerator_seconds", "test_loss")


def write_sweep_report(
    source: str | Path,
    output: str | Path | None = None,
    *,
    beside: str | Path | None = None,
    models: str | Path | None = None,
) -> Path:
    """Writes `output`/figures/ and `output`/report.html, overwriting those that are there; returns the page's path.

    Args:
      source: the folder of a sweep, or a table that `curves.read_curves` reads.
      output: a folder; None: that of the sweep, or for a table its name without ".csv" and with "-report".
      beside: another table, whose figures stand at the right of ours.
      models: a table of other models (`figures.read_models`).

    Raises:
      ConfigError: there is no table, or none that allows a figure.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "curves.csv"
        if not path.is_file():
            raise ConfigError(f"{source} holds no curves.csv; give the folder of a sweep that has begun, or a table")
    if output is None:
        output = path.parent if Path(source).is_dir() else path.with_name(f"{path.stem}-report")
    folder = Path(output)
    figures = write_figures(path, folder / "figures", beside=beside, models=models)
    title = Path(source).resolve().name
    body = "".join([
        section("Laws", "".join(_laws(open_table(path)))),
        section("Figures", "".join(_image(file) for file in figures if file.suffix == ".svg"), "figures"),
        section("Runs, at their last evaluation", _runs(path)),
        *_completions(Path(source)),
    ])  # fmt: skip
    page = folder / "report.html"
    page.write_text(document(title, body), encoding="utf-8", errors="replace")
    return page


def _laws(held: Table) -> Iterable[str]:
    """Of each source, the law over compute and over data on its first evaluation set, with intervals and warnings."""
    rows, warnings = [], []
    fits = "num_params" in held.varied and "test_loss" in held.measures
    for source in dict.fromkeys(source for source, _ in held.kinds) if fits else ():
        evaluation = next(name for s, name in held.kinds if s == source)
        curves, _ = read_varied(held, source, evaluation, "num_params")
        for x in ("flops", "samples"):
            if len(curves) < 3 or not all((curve.x[x] > 0).all() for curve in curves):
                continue
            found = fit_json(fit_curves(curves, form=LAW, x=x, draws=DRAWS))
            name = " ".join(filter(None, (source, evaluation, x)))
            sizes = style_of("num_params", [curve.key for curve in curves])
            params, intervals = found["params"], found["intervals"]
            rows.append((
                name,
                _with_interval(params["k_max"], intervals["k_max"]),
                _with_interval(params["n0"], intervals["n0"], sizes.unit, sizes.suffix),
                f"{found['r2']:.4f}",
                f"{found['r2_baseline']:.4f}",
            ))  # fmt: skip
            warnings += [f"{name}: {warning}" for warning in found["warnings"]]
    if rows:
        yield table(("", "K_max", "N0", "R²", "R² of a constant per size"), rows)
        yield "".join(f"<p>{escape(warning)}</p>" for warning in warnings)


def _with_interval(value: float, ends: Sequence[float], unit: float = 1.0, suffix: str = "") -> str:
    return f"{value / unit:.4g}{suffix} ({ends[0] / unit:.4g} to {ends[1] / unit:.4g})"


def _image(file: Path) -> str:
    name, _, source = file.stem.partition("-")
    kind = next(kind for kind in TITLES if name.startswith(kind))
    what = name[len(kind) + 1 :]
    caption = ", ".join(filter(None, (TITLES[kind], LABELS.get(what, "").lower(), source)))
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return (
        f"<figure><figcaption><span>{escape(caption)}</span></figcaption>"
        f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


def _runs(path: Path) -> str:
    """One row a run: what it was, what it cost, where it ended."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, skipinitialspace=True))
    last: dict[tuple[str, ...], Mapping[str, str]] = {}
    names = [name for name in RUN_COLUMNS if name in rows[0]]
    if "run" not in names:
        return ""  # a table of means
    for row in rows:
        last[tuple(row[name] for name in names)] = row
    differ = [name for name in names if name in ("run", *AXES) or len({row[name] for row in rows}) > 1]
    columns = [*differ, *(name for name in COST_COLUMNS if name in rows[0])]
    return table(columns, [[_cell(name, row[name] or "") for name in columns] for row in last.values()])


def _cell(column: str, text: str) -> str:
    """A number in few digits; what is a name stays as it is, though it may look like a number."""
    if column not in (*AXES, *COST_COLUMNS):
        return text
    try:
        value = float(text)
    except ValueError:
        return text
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e7 else f"{value:.4g}"


def _completions(sweep: Path) -> Iterable[str]:
    """Of the sweep's last run that kept any: its first step's completions and its last step's."""
    kept = sorted(sweep.glob("**/rollouts"), key=lambda folder: folder.stat().st_mtime) if sweep.is_dir() else []
    if not kept:
        return
    run = read_run(kept[-1].parent)
    for name, rows in run.rollouts:
        yield section(f"Completions of {run.name}, step {int(name.removeprefix('step_'))}", completions(rows[:4]))
