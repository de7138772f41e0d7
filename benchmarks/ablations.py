"""What each choice of the engine is worth: the same rollouts with and without it, in turns (`sampling.py --ablations`).

The first variant of an ablation is what the others are set against. Variants that compute the same thing must draw the
same tokens, or the ablation is void. All of it at float32 or the dtype of `--dtype`.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any

import jax
import numpy as np
from common import Contender, Line, append, compared, interleaved, line
from contenders import Rljax, Setup, Void, load_sampler
from models import model_folder
from steps import check_draws, draw_programs, step_programs
from workloads import ARCHS, ROWS, Workload

from rljax.sampling.engine import EngineOptions
from rljax.types import Prompts

_PARTED = 0.01
"""Of the rows. Programs of other shapes differ in the last bits of a logit, and a draw at the edge between two tokens
then takes the other one: once in some hundred thousand tokens. Anything more is another distribution."""


@dataclasses.dataclass
class Variant:
    """One way of computing something."""

    name: str
    run: Callable[[int], float]
    """Seconds of one repeat with this seed."""
    work: float
    """Tokens of a repeat."""
    tokens: Callable[[], np.ndarray] | None
    """Those of the last repeat [rows, ...], to be compared; None: the variants draw other ones."""
    detail: Callable[[], Line] = dict
    """About the last repeat, for the line."""


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Variants to be set against the first of them."""

    case: Line
    variants: Sequence[Variant]


# -------------------------------------------------------------------------------------------------------------- engine


class OneEach(Rljax):
    """Rollouts of the same samples with every prompt repeated instead of shared: groups of one."""

    def __init__(self, sampler: Any, workload: Workload) -> None:
        super().__init__(sampler, dataclasses.replace(workload, prompts=workload.batch, group=1))
        shared, each = workload.make_prompts(), workload.group
        self.lengths = workload.lengths()
        # A sample is seeded with position * group + its place in the group: the same numbers as in groups.
        self.prompts = Prompts(
            np.repeat(shared.tokens, each, axis=0),
            np.repeat(shared.lengths, each),
            np.arange(workload.batch, dtype=np.int64),
            tuple(record for record in shared.records for _ in range(each)),
        )


def _rollout(
    name: str, row: str, dtype: str, options: EngineOptions | None = None, kind: type[Rljax] = Rljax
) -> Variant:
    workload = ROWS[row]
    sampler = load_sampler(model_folder(workload.model, dtype), ARCHS[workload.model], dtype, options)
    ours = kind(sampler, workload)
    ours.warm_up()

    def tokens() -> np.ndarray:
        assert ours.rollouts is not None
        return ours.rollouts.tokens

    def detail() -> Line:
        stats = sampler.stats
        return {
            "row_steps": stats.row_steps,
            "suffix_slots_read": stats.suffix_slots_read,
            "prefix_slots_read": stats.prefix_slots_read,
            "programs": stats.programs,
            "compile_seconds": round(stats.compile_seconds, 2),
        }

    return Variant(name, ours.run, float(ours.lengths.sum()), tokens, detail)


def _engine(row: str, variants: dict[str, Any], dtype: str) -> Ablation:
    made = [_rollout(name, row, dtype, **arguments) for name, arguments in variants.items()]
    return Ablation(ROWS[row].case() | {"dtype": dtype}, made)


def cache(dtype: str) -> Ablation:
    """Full length from the start, growing, growing and compacted."""
    return _engine(
        "tiny-realistic",
        {
            "full": {"options": EngineOptions(growth=1, compact=False)},
            "grow": {"options": EngineOptions(growth=1.5, compact=False)},
            "grow+compact": {"options": EngineOptions()},
        },
        dtype,
    )


def prefix(dtype: str) -> Ablation:
    """Every completion with a prompt of its own, or eight sharing one."""
    return _engine("tiny-b64-prompt512", {"repeated": {"kind": OneEach}, "shared": {}}, dtype)


def refill(dtype: str) -> Ablation:
    """A quarter of the rows fits: four waves, or freed rows take the next."""
    quarter = ROWS["tiny-realistic"].batch // 4
    options = {
        name: {"options": EngineOptions(max_rows=quarter, refill=value)}
        for name, value in (("waves", False), ("refill", True))
    }
    return _engine("tiny-realistic", options, dtype)


def chunk(dtype: str) -> Ablation:
    """Steps between looks of the host."""
    options = {str(steps): {"options": EngineOptions(chunk_tokens=steps)} for steps in (32, 8, 16, 64)}
    return _engine("tiny-realistic", options, dtype)


# --------------------------------------------------------------------------------------------------------------- parts


def layers(model: str, rows: int, dtype: str) -> Ablation:
    """The layers of a decode step as a scan over stacked weights and caches, or one after the other."""
    programs = step_programs(ARCHS[model], rows, dtype)
    case = {"model": model, "batch": rows, "lengths": "fixed", "dtype": dtype}
    return Ablation(case, [Variant(name, p.run, float(p.work), p.result) for name, p in programs.items()])


def drawing(rows: int, vocab: int, dtype: str) -> Ablation:
    """A token from logits: the largest of logits plus noise, or the two-level inverse CDF.

    The two draw other tokens; what must be right is the log-prob of each.
    """
    del dtype  # logits are float32
    programs = draw_programs(rows, vocab)
    for name, program in programs.items():
        error = check_draws(program, rows, vocab)
        if error > 1e-4:
            raise Void(f"{name}: a log-prob is off by {error:.2g}")
    case = {"model": "logits", "batch": rows, "lengths": "fixed", "vocab": vocab, "dtype": "float32"}
    return Ablation(case, [Variant(name, p.run, float(p.work), None) for name, p in programs.items()])


ABLATIONS: dict[str, Callable[[str], Ablation]] = {
    "cache": cache,
    "prefix": prefix,
    "layers-tiny": partial(layers, "tiny", 64),
    "layers-135m": partial(layers, "135m", 8),
    "draw-512": partial(drawing, 64, 512),
    "draw-49152": partial(drawing, 64, 49152),
    "refill": refill,
    "chunk": chunk,
}


# ----------------------------------------------------------------------------------------------------------------- run


def check_equal(name: str, variants: Sequence[Variant]) -> list[int]:
    """Rows in which each variant differs from the first, after a repeat of the same seed.

    Raises:
      Void: more than an edge between two tokens explains.
    """
    if variants[0].tokens is None:
        return [0] * len(variants)
    for variant in variants:
        variant.run(0)
    first = variants[0].tokens()
    parted = []
    for variant in variants:
        assert variant.tokens is not None
        other = variant.tokens()
        if other.shape != first.shape:
            raise Void(f"{name}: {variant.name} gives {other.shape}, {variants[0].name} gives {first.shape}")
        parted.append(int((other != first).reshape(len(first), -1).any(axis=1).sum()))
        if parted[-1] > _PARTED * len(first):
            raise Void(f"{name}: {variant.name} and {variants[0].name} differ in {parted[-1]} of {len(first)} rows")
    return parted


def run_ablation(name: str, setup: Setup) -> list[Line]:
    """Measures one, prints it and returns its lines.

    Raises:
      Void: variants disagree, or too little of it ran undisturbed.
    """
    return measured(name, ABLATIONS[name](setup.dtype), setup)


def measured(name: str, ablation: Ablation, setup: Setup) -> list[Line]:
    """`run_ablation` of one that has been made."""
    parted = check_equal(name, ablation.variants)
    contenders = [Contender(v.name, os.getpid(), v.run) for v in ablation.variants]
    times = interleaved(contenders, setup.repeats, measure=setup.measure)
    enough = min(2, setup.repeats)
    short = [other for other, seconds in times.items() if len(seconds) < enough]
    if short:
        raise Void(f"{name}: other processes disturbed too many repeats of {', '.join(short)}")
    rates = {v.name: [v.work / s for s in times[v.name]] for v in ablation.variants}
    baseline = ablation.variants[0].name
    lines = []
    print(f"{name}:", flush=True)
    for variant, rows in zip(ablation.variants, parted, strict=True):
        case = ablation.case | {"ablation": name, "variant": variant.name}
        made = line(setup.fields, case, "throughput", "tokens/s", rates[variant.name])
        made |= {"baseline": baseline, "ratio": compared(rates[variant.name], rates[baseline])["ratio"]}
        made |= ({"rows_parted": rows} if variant.tokens else {}) | variant.detail()
        print(
            f"  {variant.name:14} {made['median']:12.5g} {made['unit']} ({made['min']:g} .. {made['max']:g})"
            f"   {made['ratio']:.2f} x {baseline}" + (f", {rows} rows parted" if variant.tokens else "")
        )
        lines.append(made)
    return lines


def run_ablations(names: Sequence[str], setup: Setup) -> list[str]:
    """Runs the ablations that fit one of `names`, all if there is none; what went wrong."""
    chosen = [name for name in ABLATIONS if not names or any(fnmatch(name, pattern) for pattern in names)]
    if not chosen:
        raise SystemExit(f"--ablations {' '.join(names)}: no such ablation; there are {', '.join(ABLATIONS)}")
    problems = []
    for name in chosen:
        try:
            append(setup.out, run_ablation(name, setup))
        except Void as void:
            problems.append(str(void))
        jax.clear_caches()
    return problems
