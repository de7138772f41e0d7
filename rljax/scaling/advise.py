"""Which size, how many steps, how many repeats: a budget put into a fit.

Only sizes that were fitted are offered: the law says nothing of the intercept of another.
"""

import dataclasses
import math

import numpy as np

from rljax.config import ConfigError
from rljax.scaling.fit import size_name
from rljax.scaling.intervals import interval
from rljax.scaling.result import Saved

HARMLESS_REPEATS = 25
"""Up to here the paper saw no loss from repeating prompts, at one size (7B) and one run each (arXiv 2509.25300, data
reuse); at 100 it did."""
OUTSIDE = "outside the measured range"


@dataclasses.dataclass(frozen=True)
class Budget:
    """An amount of training."""

    amount: float
    unit: str
    """"flops" or "prompts"."""

    def __str__(self) -> str:
        return f"{self.amount:,.0f} prompts" if self.unit == "prompts" else f"{self.amount:.4g} FLOPs"

    @staticmethod
    def parse(text: str) -> "Budget":
        """ "2e19" and "2e19flops" are FLOPs, "50000prompts" are prompts.

        Raises:
          ConfigError: it is none of these, or not above 0.
        """
        plain = text.strip().lower().replace(",", "").replace("_", "")
        unit = "prompts" if plain.endswith("prompts") else "flops"
        try:
            amount = float(plain.removesuffix(unit).strip())
        except ValueError:
            amount = math.nan
        if not 0 < amount < math.inf:
            raise ConfigError(f"--budget {text} is no amount above 0; give FLOPs, as 2e19, or prompts, as 50000prompts")
        return Budget(amount, unit)


@dataclasses.dataclass(frozen=True)
class Option:
    """A size, trained as far as the budget goes."""

    size: float
    loss: float
    interval: tuple[float, float] | None
    steps: int
    prompts: float
    flops: float | None
    repeats: int
    note: str


@dataclasses.dataclass(frozen=True)
class Advice:
    """Options by size, and the one to take."""

    budget: Budget
    unique: int
    options: list[Option]
    best: Option
    sure: float | None
    """Share of the draws in which `best` is best; None without draws."""
    level: float

    def lines(self) -> list[str]:
        """The advice in words."""
        best = self.best
        ends = "" if best.interval is None else f" ({best.interval[0]:.4f} to {best.interval[1]:.4f})"
        lines = [
            f"advice: size {best.size:.4g}, {best.steps:,} steps, each prompt used {best.repeats:,} time(s): test loss "
            f"{best.loss:.4f}{ends}"
        ]
        if self.sure is not None and len(self.options) > 1:
            lines.append(f"it is the best size in {self.sure:.0%} of the draws")
        if best.note:
            lines.append(f"this is {best.note}")
        if best.repeats > HARMLESS_REPEATS:
            lines.append(
                f"repeats: the paper saw no cost up to {HARMLESS_REPEATS} and some at 100, at one size; "
                f"{best.repeats:,} is {'between' if best.repeats < 100 else 'beyond'}: find "
                f"{math.ceil(best.prompts / HARMLESS_REPEATS):,} unique prompts or more"
            )
        return lines


def advise(fit: Saved, budget: Budget, *, unique: int, prompts_per_step: int | None = None) -> Advice:
    """The test loss of every fitted size at the end of the budget, and the size with the least.

    Args:
      unique: different prompts there are.
      prompts_per_step: for the number of steps; None: as the curves were trained.

    Raises:
      ConfigError: the fit is not by size, or says nothing of FLOPs or prompts where the budget needs it.
    """
    if fit.by != "num_params" or fit.x not in ("flops", "samples"):
        raise ConfigError(
            f"{fit.path} is a fit of {fit.x} by {fit.by}; advice takes one by num_params on flops or samples: "
            "`rljax fit CURVES.csv`, with --x samples for prompts"
        )
    if unique < 1 or (prompts_per_step is not None and prompts_per_step < 1):
        raise ConfigError(
            f"--unique {unique} and --prompts-per-step {prompts_per_step} must be at least 1; give what there is"
        )
    options, drawn = [], []
    for i, entry in enumerate(fit.curves):
        option, draws = _option(fit, i, entry, budget, unique, prompts_per_step)
        options.append(option)
        drawn.append(draws)
    best = min(options, key=lambda option: option.loss)
    sure = None
    if fit.draws is not None:
        winners = np.argmin(np.stack([draws for draws in drawn if draws is not None]), axis=0)
        sure = float(np.mean(winners == options.index(best)))
    return Advice(budget, unique, options, best, sure, fit.level)


def _option(
    fit: Saved, curve: int, entry: dict, budget: Budget, unique: int, prompts_per_step: int | None
) -> tuple[Option, np.ndarray | None]:
    cost, per_step = entry["flops_per_sample"], prompts_per_step or entry["samples_per_step"]
    if cost is None and (budget.unit == "flops" or fit.x == "flops"):
        raise ConfigError(
            f"the curves of {fit.path} do not say what a prompt costs at size {size_name(entry[fit.by])}: flops and "
            "samples are both required; give a table with both, or a fit on samples and a budget in prompts"
        )
    if per_step is None:
        raise ConfigError(f"the curves of {fit.path} do not say how many prompts a step has; give --prompts-per-step")
    prompts = budget.amount if budget.unit == "prompts" or cost is None else budget.amount / cost
    flops = None if cost is None else prompts * cost
    x = prompts if fit.x == "samples" or flops is None else flops
    where = np.array([math.log10(x)]), np.array([curve])
    loss = float(fit.solution.predict(*where)[0])
    draws = ends = None
    if fit.draws is not None:
        draws = fit.draws.predict(*where)[:, 0]
        low, high = interval(draws, fit.level)
        ends = (float(low), float(high))
    note = ""
    if not entry["x_min"] <= x <= entry["x_max"] * (1 + 1e-9):
        note = f"{OUTSIDE}: {fit.x} {entry['x_min']:.3g} to {entry['x_max']:.3g}"
    steps = max(int(prompts // per_step), 1)
    return Option(
        entry[fit.by], loss, ends, steps, prompts, flops, math.ceil(max(prompts, 1) / unique - 1e-9), note
    ), draws


def reuse_cost(fit: Saved, repeats: int, steps: int) -> list[str]:
    """What repeating costs, by a fit of curves told apart by repeats: the loss at `steps` against the fewest repeats.

    Raises:
      ConfigError: the fit is not by repeats on steps.
    """
    if fit.by != "repeats" or fit.x != "step":
        raise ConfigError(
            f"{fit.path} is a fit of {fit.x} by {fit.by}; the cost of repeats takes `rljax fit CURVES.csv --by repeats "
            "--x step --form loglinear`"
        )
    known = fit.solution.size
    nearest = int(np.argmin(np.abs(np.log(known) - math.log(repeats))))
    log_x = np.full(len(known), math.log10(steps))
    curve = np.arange(len(known))
    loss = fit.solution.predict(log_x, curve)
    change = float(loss[nearest] - loss[0])
    ends = ""
    if fit.draws is not None:
        drawn = fit.draws.predict(log_x, curve)
        low, high = interval(drawn[:, nearest] - drawn[:, 0], fit.level)
        ends = f" ({low:+.4f} to {high:+.4f})"
    lines = [
        f"repeats: {known[nearest]:g}, the nearest of {', '.join(f'{one:g}' for one in known)} measured, against "
        f"{known[0]:g}: test loss {change:+.4f}{ends} after {steps:,} steps"
    ]
    first, last = min(entry["x_min"] for entry in fit.curves), max(entry["x_max"] for entry in fit.curves)
    if not (known[0] <= repeats <= known[-1] and first <= steps <= last):
        lines.append(f"this is {OUTSIDE}: repeats {known[0]:g} to {known[-1]:g}, steps {first:g} to {last:g}")
    return lines
