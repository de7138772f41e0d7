"""How fast rollouts are drawn, against transformers and Tunix in the same run.

    python benchmarks/sampling.py                                  # rljax alone
    python benchmarks/sampling.py --peer hf --peer tunix           # and its peers (make bench-peers)
    python benchmarks/sampling.py --cases 'tiny-*' --reps 5
    python benchmarks/sampling.py --ablations                      # what each choice of the engine is worth

Every process keeps the same weights loaded and draws the same number of tokens after the same prompts, in turns, in the
same dtype, at temperature 1 over the full vocabulary. A row is void when the greedy continuations differ.
Lines go to benchmarks/results/sampling.jsonl (format: README.md).
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import jax
import numpy as np
from ablations import run_ablations
from common import RESULTS, Contender, Line, append, compared, describe_cpu, interleaved, line, run_fields, versions
from contenders import Peer, Rljax, Setup, Void, load_sampler
from models import gate_arch, model_folder
from peer import SAMPLERS, Worker
from roofline import Ceilings, decode_rates, floor_seconds, measure_ceilings
from workloads import ARCHS, DEFAULT_ROWS, ROWS, Workload

from rljax import costs

GATE_PROMPTS, GATE_TOKENS = 4, 64
GATE_DISTINCT = 8
"""Different tokens that a continuation of the gate must hold on average: equal tokens prove little if all are alike."""
SLOWER = 1.25
"""A peer's variant that much slower than its best in the first round is not run again."""


def keep_close(times: dict[str, list[float]]) -> set[str]:
    """rljax, and of each peer the variants within SLOWER of its best."""
    best: dict[str, float] = {}
    for name, seconds in times.items():
        peer = name.split()[0]
        best[peer] = min(best.get(peer, float("inf")), *seconds, float("inf"))
    return {n for n, seconds in times.items() if not seconds or seconds[0] <= SLOWER * best[n.split()[0]]}


def check_gate(model: str, workers: list[Worker], folder: Path) -> None:
    """Greedy continuations in float32 are those of every peer, token for token.

    Raises:
      Void: they are not, or are too uniform to prove anything.
    """
    arch, folder = gate_arch(model, folder)
    prompts = Workload(model, GATE_PROMPTS, group=1, prompt=32).make_prompts(arch.vocab_size)
    sampler = load_sampler(folder, arch, "float32")
    ours = sampler.generate(
        prompts, 1, key=jax.random.key(0), temperature=0.0, max_completion_tokens=GATE_TOKENS
    ).tokens.tolist()
    if sum(len(set(row)) for row in ours) < GATE_DISTINCT * len(ours):
        raise Void(f"{model}: the greedy continuations repeat themselves and tell nothing: {ours}")
    for worker in workers:
        worker.ask("load", folder=str(folder), dtype="float32")
        theirs = worker.ask("greedy", prompts=[row.tolist() for row in prompts.tokens], new_tokens=GATE_TOKENS)[
            "tokens"
        ]
        for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if mine != other:
                at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), len(other))
                raise Void(
                    f"{model}: greedy continuation {row} parts from {worker.name}'s at token {at}: {mine} {other}"
                )
        print(f"  {model}: greedy tokens equal to {worker.name}'s ({GATE_PROMPTS} x {GATE_TOKENS})", flush=True)


# ---------------------------------------------------------------------------------------------------------------- rows


def run_row(name: str, ours: Rljax, peers: list[Peer], ceilings: Ceilings, setup: Setup) -> list[Line]:
    """Measures one row, prints it and returns its lines.

    Raises:
      Void: too little of it ran undisturbed.
    """
    workload = ours.workload
    first = ours.warm_up()
    contenders = [Contender("rljax", os.getpid(), ours.run)]
    for peer in peers:
        contenders += peer.contenders(ours)

    times = interleaved(contenders, setup.repeats, keep=keep_close, measure=setup.measure)
    enough = min(2, setup.repeats)
    if len(times["rljax"]) < enough:
        raise Void(f"{name}: other processes disturbed all but {len(times['rljax'])} of {setup.repeats} repeats")
    tokens = int(ours.lengths.sum())
    rates = {contender: [tokens / s for s in seconds] for contender, seconds in times.items() if len(seconds) >= enough}
    case = workload.case() | {"dtype": setup.dtype}
    lines = list(_own_lines(case, ours, rates["rljax"], first, ceilings, setup))
    for peer in peers:
        mine = {n: values for n, values in rates.items() if n.split()[0] == peer.worker.name}
        if not mine:
            print(f"  {name}: no undisturbed repeat of {peer.worker.name}, not compared", flush=True)
            continue
        lines += _peer_lines(case, ours, peer, rates["rljax"], mine, setup)
    print_row(name, lines)
    return lines


def _own_lines(
    case: Line, ours: Rljax, rates: list[float], first: float, ceilings: Ceilings, setup: Setup
) -> Iterator[Line]:
    stats, workload = ours.sampler.stats, ours.workload
    arch = ARCHS[workload.model]
    floor = floor_seconds(arch, ours.prompts.lengths, ours.lengths, ceilings, setup.dtype)
    best = int(ours.lengths.sum()) / floor
    values: list[tuple[str, str, list[float]]] = [
        ("throughput", "tokens/s", rates),
        ("roofline", "%", [100 * rate / best for rate in rates]),
        ("padding", "%", [100 * (1 - stats.suffix_slots_used / max(1, stats.suffix_slots_read))]),
        # A completion's first token comes from its prompt: no step of a row.
        ("dead rows", "%", [100 * (1 - (int(ours.lengths.sum()) - workload.batch) / max(1, stats.row_steps))]),
        ("compile", "seconds", [stats.compile_seconds]),
        ("first call", "seconds", [first]),
        ("programs", "count", [stats.programs]),
        ("decode programs", "count", [stats.decode_programs]),
        ("peak memory", "GiB", [ours.peak_mib / 1024]),
    ]
    measured = ceilings.as_fields() | decode_rates(arch, workload.batch, setup.dtype)
    for metric, unit, numbers in values:
        made = line(setup.fields, case, metric, unit, numbers)
        yield made | ({"ceilings": measured} if metric == "roofline" else {})


def _peer_lines(
    case: Line, ours: Rljax, peer: Peer, rates: list[float], theirs: dict[str, list[float]], setup: Setup
) -> list[Line]:
    best = max(theirs, key=lambda n: float(np.median(theirs[n])))
    variant = best.split(maxsplit=1)[1]
    fields = {**setup.fields, "versions": {**setup.fields["versions"], **peer.versions}}
    speed = compared(rates, theirs[best]) | {"peer_variant": variant}
    memory = compared([ours.peak_mib], [peer.peak_mib[variant]], more_is_better=False)
    memory = {k: round(v / 1024, 4) if k != "ratio" else v for k, v in memory.items()} | {"peer_variant": variant}
    return [
        line(fields, case, "throughput", "tokens/s", rates, against=(peer.worker.name, speed)),
        line(fields, case, "peak memory", "GiB", [ours.peak_mib / 1024], against=(peer.worker.name, memory)),
    ]


def print_row(name: str, lines: list[Line]) -> None:
    """The lines of one row, for people."""
    print(f"{name}:", flush=True)
    for made in lines:
        versus = f"   {made['ratio']:.2f} x {made['peer']} {made['peer_variant']}" if "peer" in made else ""
        spread = f" ({made['min']:g} .. {made['max']:g}, n {made['n']})" if made["n"] > 1 else ""
        print(f"  {made['metric']:12} {made['median']:10.4g} {made['unit']}{spread}{versus}")


# ---------------------------------------------------------------------------------------------------------------- main


def chosen(patterns: list[str], rows: dict[str, Workload] = ROWS) -> dict[str, Workload]:
    """Rows by name or pattern, in the table's order."""
    names = [name for name in rows if any(fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        raise SystemExit(f"--cases {' '.join(patterns)}: no such row; there are {', '.join(rows)}")
    return {name: rows[name] for name in names}


@contextlib.contextmanager
def started(peers: list[str]) -> Iterator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        device = "cpu" if jax.default_backend() == "cpu" else "gpu"
        workers = [Worker(peer, device=device) for peer in peers]
        for worker in workers:
            stack.callback(worker.close)
        yield workers


def run_model(
    model: str,
    rows: dict[str, Workload],
    workers: list[Worker],
    setup: Setup,
    deadline: float,
    variants: Sequence[str] = (),
) -> list[str]:
    """Runs the rows of one model; what went wrong."""
    folder = model_folder(model, setup.dtype)
    try:
        check_gate(model, workers, folder)
    except Void as void:
        return [str(void)]
    ceilings = measure_ceilings(setup.dtype)
    print(f"  ceilings: {ceilings.as_fields()}", flush=True)
    peers = [Peer(worker, folder, setup.dtype, variants) for worker in workers]
    problems = []
    for name, workload in rows.items():
        if time.perf_counter() > deadline:
            problems.append(f"{name}: not run, the time of --deadline was up")
            continue
        try:
            # A sampler of its own, so that its programs and their seconds are the row's.
            ours = Rljax(load_sampler(folder, ARCHS[model], setup.dtype), workload)
            append(setup.out, run_row(name, ours, peers, ceilings, setup))
        except Void as void:
            problems.append(str(void))
        jax.clear_caches()
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT_ROWS), help="rows by name or pattern")
    parser.add_argument("--peer", action="append", default=[], choices=sorted(SAMPLERS), help="repeat for several")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=sorted(costs.BYTES))
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--out", type=Path, default=RESULTS / "sampling.jsonl")
    parser.add_argument("--busy", action="store_true", help="count every repeat, whatever else runs: a rehearsal")
    parser.add_argument("--variants", nargs="+", default=[], help="of the peers, these only: dynamic static ...")
    parser.add_argument("--ablations", nargs="*", metavar="NAME", help="these, or all, instead of the rows")
    given = parser.parse_args()
    begun = time.perf_counter()
    rows = chosen(given.cases)
    device = describe_cpu() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    packages = ("rljax", "jax", "jaxlib", "flax")
    fields = run_fields("sampling", device, versions(packages))
    alone = jax.default_backend() == "cpu" and not given.busy
    setup = Setup(fields, given.dtype, given.reps, given.patience, given.out, alone)
    problems = []
    if given.ablations is not None:
        problems = run_ablations(given.ablations, setup)
    else:
        with started(given.peer) as workers:
            for model in dict.fromkeys(workload.model for workload in rows.values()):
                mine = {name: workload for name, workload in rows.items() if workload.model == model}
                problems += run_model(model, mine, workers, setup, begun + given.deadline, given.variants)
    for problem in problems:
        print(f"VOID {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
