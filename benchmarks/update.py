"""How long one GRPO update takes, reference pass included, against torch in the same run.

    python benchmarks/update.py                                    # rljax alone
    python benchmarks/update.py --peer torch                       # and torch (make bench-peers)
    python benchmarks/update.py --ablations                        # what each choice of the learner is worth

Both learn from the same completions with the same advantages, KL on. A row is void when log-probs or the norm of the
first gradient differ. Lines go to benchmarks/results/update.jsonl (format: README.md).
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ablations import Ablation, Variant, measured
from common import RESULTS, Contender, Line, append, compared, describe_cpu, interleaved, line, run_fields, versions
from contenders import Setup, Void
from learning import (
    LOGPROB_TOLERANCE,
    OPTIMIZER,
    TorchUpdate,
    Update,
    advantages_of,
    check_logprobs,
    draw,
    load_learner,
    ungrouped,
)
from models import model_folder
from parts import ATTENTION_LENGTHS, HEAD_TIMED_TOKENS, HEAD_TOKENS, attention_lines, head_lines, head_memory
from peer import Worker
from roofline import Ceilings, learning_flops, measure_ceilings, update_floor_seconds
from sampling import chosen, print_row, started
from workloads import ARCHS, DEFAULT_TRAINING_ROWS, TRAINING_ROWS

FAINT = 1e-30
"""An advantage that moves nothing."""
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "prompts": {"repeated": {"alone": True}, "shared": {}},
    "reference": {"on": {}, "off": {"kl_coefficient": 0.0}},
    "remat": {"none": {}, "dots": {"remat": "dots"}, "full": {"remat": "full"}},
    "old": {"recomputed": {"old_logprobs": "recompute"}, "not needed": {}},
    "alike": {"kept": {"kl_coefficient": 0.0, "alike": FAINT}, "dropped": {"kl_coefficient": 0.0, "alike": 0.0}},
    "moments": {
        "float32": {},
        "bfloat16": {"optimizer": dataclasses.replace(OPTIMIZER, moments_dtype="bfloat16")},
    },
}
"""Variants by ablation; the first is what the others are set against. `alone`: prompts repeated; `alike`: the
advantages of every other group, with which it can be dropped if they are 0."""
EQUAL = 1e-3
"""Largest relative difference of the first gradient's norm between variants."""
PARTS = ("head", "attention")
"""Ablations of a part alone, which no row chooses."""


def run_ablation(name: str, row: str, setup: Setup) -> list[Line]:
    """Measures one ablation on one row.

    Raises:
      Void: variants disagree, or too little of it ran undisturbed.
    """
    workload = TRAINING_ROWS[row]
    folder = model_folder(workload.model, "float32")
    rollouts = draw(folder, workload)
    norms: dict[str, float] = {}
    variants = []
    for kind, options in ABLATIONS[name].items():
        options = dict(options)
        learned = ungrouped(rollouts) if options.pop("alone", False) else rollouts
        alike = options.pop("alike", None)
        learner = load_learner(folder, ARCHS[workload.model], group=workload.group, **options)
        advantages = advantages_of(rollouts, learner).reshape(len(learned.prompts), learned.group_size)
        if alike is not None:
            advantages[::2] = alike
        update = Update(learner, learned, advantages)
        norms[kind] = update.warm_up()["policy/grad_norm"]

        def detail(update: Update = update) -> Line:
            padding = 100 * update.metrics["learner/padding_fraction"]
            return {"peak_gib": round(update.peak_mib / 1024, 4), "padding": round(padding, 2)}

        variants.append(Variant(kind, update.run, float(rollouts.lengths.sum()), None, detail))
    # At the first update the KL and its gradient are 0, so that this holds without it too.
    first = next(iter(norms.values()))
    if not all(abs(norm - first) <= EQUAL * first for norm in norms.values()):
        raise Void(f"{name} of {row}: the first gradients differ: {norms}")
    return measured(name, Ablation(workload.case() | {"dtype": "float32"}, variants), setup)


def run_row(row: str, ceilings: Ceilings, workers: list[Worker], setup: Setup) -> list[Line]:
    """Measures one row, prints it and returns its lines.

    Raises:
      Void: log-probs or gradients differ, or too little of it ran undisturbed.
    """
    workload = TRAINING_ROWS[row]
    arch, folder = ARCHS[workload.model], model_folder(workload.model, setup.dtype)
    rollouts = draw(folder, workload, setup.dtype)
    learner = load_learner(folder, arch, group=workload.group, dtype=setup.dtype)
    peers = [TorchUpdate(worker, folder, setup.dtype) for worker in workers]
    for worker in workers:
        worker.ask("load", folder=str(folder), dtype=setup.dtype)
    check_logprobs(learner, rollouts, workers)
    ours = Update(learner, rollouts, advantages_of(rollouts, learner))
    first = ours.warm_up()
    contenders = [Contender("rljax", os.getpid(), ours.run)]
    contenders += [peer.contender(workload, ours, first) for peer in peers]
    times = interleaved(contenders, setup.repeats, measure=setup.measure)
    enough = min(2, setup.repeats)
    if short := [name for name, seconds in times.items() if len(seconds) < enough]:
        raise Void(f"{row}: other processes disturbed too many updates of {', '.join(short)}")
    case, seconds = workload.case() | {"dtype": setup.dtype}, times["rljax"]
    prompts, lengths = rollouts.prompts.lengths, rollouts.lengths
    flops = learning_flops(arch, prompts, lengths)
    floor = update_floor_seconds(arch, prompts, lengths, ceilings)
    values: list[tuple[str, str, list[float]]] = [
        ("update", "seconds", seconds),
        ("throughput", "tokens/s", [int(lengths.sum()) / s for s in seconds]),
        ("mfu", "%", [100 * flops / (s * ceilings.matmul_flops) for s in seconds]),
        ("roofline", "%", [100 * floor / s for s in seconds]),
        ("padding", "%", [100 * ours.metrics["learner/padding_fraction"]]),
        ("peak memory", "GiB", [ours.peak_mib / 1024]),
    ]
    lines = [line(setup.fields, case, metric, unit, numbers) for metric, unit, numbers in values]
    lines = [m | ({"ceilings": ceilings.as_fields()} if m["metric"] in ("mfu", "roofline") else {}) for m in lines]
    for peer in peers:
        name, variant = peer.worker.name, {"peer_variant": peer.variant}
        fields = {**setup.fields, "versions": {**setup.fields["versions"], **peer.versions}}
        speed = compared(seconds, times[name], more_is_better=False) | variant
        memory = compared([ours.peak_mib / 1024], [peer.peak_mib / 1024], more_is_better=False) | variant
        lines.append(line(fields, case, "update", "seconds", seconds, against=(name, speed)))
        lines.append(line(fields, case, "peak memory", "GiB", [ours.peak_mib / 1024], against=(name, memory)))
    print_row(row, lines)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT_TRAINING_ROWS), help="rows by name or pattern")
    parser.add_argument("--peer", action="append", default=[], choices=["torch"])
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=sorted(LOGPROB_TOLERANCE))
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--out", type=Path, default=RESULTS / "update.jsonl")
    parser.add_argument("--busy", action="store_true", help="count every repeat, whatever else runs: a rehearsal")
    parser.add_argument("--ablations", nargs="*", metavar="NAME", choices=[*ABLATIONS, *PARTS], help="these, or all")
    given = parser.parse_args()
    if given.ablations is not None and given.dtype != "float32":
        parser.error(f"--ablations are measured in float32; leave --dtype {given.dtype} out")
    rows = chosen(given.cases, TRAINING_ROWS)
    on_cpu = jax.default_backend() == "cpu"
    device = describe_cpu() if on_cpu else jax.devices()[0].device_kind
    fields = run_fields("update", device, versions(("rljax", "jax", "jaxlib", "flax", "optax")))
    setup = Setup(fields, given.dtype, given.reps, given.patience, given.out, on_cpu and not given.busy)
    problems = []
    if given.ablations is not None:
        names = given.ablations or [*ABLATIONS, *PARTS]
        if "head" in names:
            append(setup.out, head_memory(HEAD_TOKENS, fields))
        made: list[Callable[[], list[Line]]] = [
            partial(run_ablation, name, row, setup) for name in names if name in ABLATIONS for row in rows
        ]
        if "head" in names:
            made.append(partial(head_lines, HEAD_TIMED_TOKENS, setup))
        if "attention" in names:
            made += [partial(attention_lines, length, setup) for length in ATTENTION_LENGTHS]
        for run in made:
            try:
                append(setup.out, run())
            except Void as void:
                problems.append(str(void))
            jax.clear_caches()
    else:
        ceilings = measure_ceilings(given.dtype)
        print(f"  ceilings: {ceilings.as_fields()}", flush=True)
        with started(given.peer) as workers:
            for row in rows:
                try:
                    append(setup.out, run_row(row, ceilings, workers, setup))
                except Void as void:
                    problems.append(f"{row}: {void}")
                jax.clear_caches()
    for problem in problems:
        print(f"VOID {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
