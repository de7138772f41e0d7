"""How long a whole GRPO iteration takes, against TRL and Tunix in the same run.

    python benchmarks/step.py                                      # rljax alone
    python benchmarks/step.py --peer trl --peer tunix              # and its peers (make bench-peers)
    python benchmarks/step.py --cases 'tiny-*' --reps 3

An iteration is rollouts, rewards, advantages, the reference's log-probs, one update, the weight sync and the metrics on
the host; float32, KL on. Every process takes its steps in turn, on the same weights, prompts and lengths. A row is void
when the log-probs of the same completions differ. Lines go to benchmarks/results/step.jsonl (format: README.md).
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from common import (
    RESULTS,
    ROOT,
    Contender,
    Line,
    append,
    compared,
    describe_cpu,
    interleaved,
    line,
    run_fields,
    versions,
)
from contenders import Setup, Void
from learning import Iteration, Trainer, check_logprobs, draw, load_learner
from models import model_folder
from peer import TRAINERS, PeerError, Worker
from peers.protocol import peak_mib
from roofline import Ceilings, iteration_floor_seconds, iteration_flops, measure_ceilings
from sampling import chosen, print_row, started
from workloads import ARCHS, DEFAULT_TRAINING_ROWS, TRAINING_ROWS, Workload

GATE = Workload("tiny", prompts=2, group=3, prompt=32, cap=24, sigma=0.5)
"""Completions whose log-probs are compared: of several lengths, so that padding has a part."""
CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def first_step(name: str) -> Line:
    """Seconds of the first iteration of this process, and the most memory it has held."""
    workload = TRAINING_ROWS[name]
    iteration = Iteration(model_folder(workload.model, "float32"), workload)
    highest = peak_mib()  # before a run makes it count anew
    begun = time.perf_counter()
    iteration.prepare()
    iteration.run(0)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak_mib": max(highest, iteration.peak_mib)}


def fresh_process(name: str, cache: Path | None) -> Line:
    """`first_step` in a process of its own, and the seconds of that `process`; `cache`: of compiled programs."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}
    if cache is not None:
        environment |= {**CACHE, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--first-step", name]
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - begun
    return json.loads(done.stdout.splitlines()[-1]) | {"process": seconds}


def first_steps(name: str, setup: Setup, fields: Line, case: Line) -> list[Line]:
    """Lines of the first iteration of a process, without compiled programs and with those of an earlier process."""
    told: dict[str, list[Line]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as folder:
        fresh_process(name, Path(folder))  # fills the cache
        last: list[Line] = [{}]

        def contender(kind: str, cache: Path | None) -> Contender:
            def run(seed: int) -> float:
                last[0] = fresh_process(name, cache)
                return last[0]["process"]

            return Contender(kind, os.getpid(), run)

        for _ in range(min(setup.repeats, 3)):
            for kind, cache in (("cold", None), ("warm", Path(folder))):
                if setup.measure(contender(kind, cache), 0) is not None:
                    told[kind].append(last[0])
    lines = []
    for kind, results in told.items():
        if not results:
            print(f"  {name}: other processes disturbed every {kind} start", flush=True)
            continue
        lines += [
            line(fields, case, f"first step {kind}", "seconds", [r["seconds"] for r in results]),
            line(fields, case, f"process {kind}", "seconds", [r["process"] for r in results]),
            line(fields, case, f"process memory {kind}", "GiB", [r["peak_mib"] / 1024 for r in results]),
        ]
    return lines


def run_row(name: str, folder: Path, trainers: list[Trainer], ceilings: Ceilings, setup: Setup) -> list[Line]:
    """Measures one row, prints it and returns its lines.

    Raises:
      Void: too little of it ran undisturbed.
    """
    workload = TRAINING_ROWS[name]
    ours = Iteration(folder, workload)
    ours.warm_up()
    contenders = [Contender("rljax", os.getpid(), ours.run)]
    sides: dict[str, Iteration | Trainer] = {"rljax": ours}
    for trainer in trainers:
        try:
            contenders.append(trainer.contender(workload))
            sides[trainer.worker.name] = trainer
        except PeerError as error:
            print(f"  {error}", flush=True)
    phases: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}

    def measure(contender: Contender, seed: int) -> float | None:
        try:
            seconds = setup.measure(contender, seed)
        except PeerError as error:  # it may have run out of memory beside the others: the rest goes on without it
            print(f"  {error}", flush=True)
            return None
        if seconds is not None:
            phases[contender.name].append(sides[contender.name].phases)
        return seconds

    times = interleaved(contenders, setup.repeats, measure=measure)
    enough = min(2, setup.repeats)
    if len(times["rljax"]) < enough:
        raise Void(f"{name}: other processes disturbed all but {len(times['rljax'])} of {setup.repeats} steps")
    case = workload.case() | {"dtype": "float32"}
    lines = _own_lines(case, ours, times["rljax"], phases["rljax"], ceilings, setup)
    lines += first_steps(name, setup, setup.fields, case)
    for trainer in trainers:
        theirs = times.get(trainer.worker.name, [])
        if len(theirs) < enough:
            print(f"  {name}: too few undisturbed steps of {trainer.worker.name}, not compared", flush=True)
            continue
        lines += _peer_lines(case, ours, trainer, times["rljax"], theirs, phases[trainer.worker.name], setup)
    print_row(name, lines)
    return lines


def _medians(phases: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.median([p[name] for p in phases])), 4) for name in phases[0]}


def _own_lines(
    case: Line,
    ours: Iteration,
    seconds: list[float],
    phases: list[dict[str, float]],
    ceilings: Ceilings,
    setup: Setup,
) -> list[Line]:
    arch, lengths, prompts = ARCHS[ours.workload.model], ours.lengths, ours.prompts.lengths
    flops = iteration_flops(arch, prompts, lengths)
    floor = iteration_floor_seconds(arch, prompts, lengths, ceilings)
    values: list[tuple[str, str, list[float]]] = [
        ("step", "seconds", seconds),
        *((name, "seconds", [p[name] for p in phases]) for name in phases[0]),
        ("throughput", "tokens/s", [int(lengths.sum()) / s for s in seconds]),
        ("mfu", "%", [100 * flops / (s * ceilings.matmul_flops) for s in seconds]),
        ("roofline", "%", [100 * floor / s for s in seconds]),
        ("padding", "%", [100 * ours.metrics["learner/padding_fraction"]]),
        ("peak memory", "GiB", [ours.peak_mib / 1024]),
    ]
    made = [line(setup.fields, case, metric, unit, numbers) for metric, unit, numbers in values]
    return [m | ({"ceilings": ceilings.as_fields()} if m["metric"] in ("mfu", "roofline") else {}) for m in made]


def _peer_lines(
    case: Line,
    ours: Iteration,
    trainer: Trainer,
    seconds: list[float],
    theirs: list[float],
    phases: list[dict[str, float]],
    setup: Setup,
) -> list[Line]:
    name, variant = trainer.worker.name, {"peer_variant": trainer.variant}
    fields = {**setup.fields, "versions": {**setup.fields["versions"], **trainer.versions}}
    speed = compared(seconds, theirs, more_is_better=False) | variant | {"peer_phases": _medians(phases)}
    memory = compared([ours.peak_mib / 1024], [trainer.peak_mib / 1024], more_is_better=False) | variant
    made = [
        line(fields, case, "step", "seconds", seconds, against=(name, speed)),
        line(fields, case, "peak memory", "GiB", [ours.peak_mib / 1024], against=(name, memory)),
    ]
    return made


def run_model(model: str, rows: dict[str, Workload], workers: list[Worker], setup: Setup) -> list[str]:
    """Runs the rows of one model; what went wrong."""
    folder = model_folder(model, "float32")
    gate = dataclasses.replace(GATE, model=model)
    try:
        trainers = [Trainer(worker, folder) for worker in workers]
        check_logprobs(load_learner(folder, ARCHS[model], group=gate.group), draw(folder, gate), workers)
    except Void as void:
        return [f"{model}: {void}"]
    ceilings = measure_ceilings("float32")
    print(f"  ceilings: {ceilings.as_fields()}", flush=True)
    problems = []
    for name in rows:
        try:
            append(setup.out, run_row(name, folder, trainers, ceilings, setup))
        except Void as void:
            problems.append(str(void))
        jax.clear_caches()
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT_TRAINING_ROWS), help="rows by name or pattern")
    parser.add_argument("--peer", action="append", default=[], choices=sorted(TRAINERS), help="repeat for several")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.jsonl")
    parser.add_argument("--busy", action="store_true", help="count every repeat, whatever else runs: a rehearsal")
    parser.add_argument("--first-step", metavar="ROW", help="only the first step of this row, as JSON")
    given = parser.parse_args()
    if given.first_step:
        print(json.dumps(first_step(given.first_step)))
        return 0
    rows = chosen(given.cases, TRAINING_ROWS)
    fields = run_fields("step", describe_cpu(), versions(("rljax", "jax", "jaxlib", "flax", "optax")))
    setup = Setup(fields, "float32", given.reps, given.patience, given.out, not given.busy)
    problems = []
    with started([TRAINERS[peer] for peer in given.peer]) as workers:
        for model in dict.fromkeys(workload.model for workload in rows.values()):
            mine = {name: workload for name, workload in rows.items() if workload.model == model}
            problems += run_model(model, mine, workers, setup)
    for problem in problems:
        print(f"VOID {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
