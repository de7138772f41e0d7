"""Where the time of a decode step goes: the products by name, attention, and the rest, each beside its floor.

    python benchmarks/breakdown.py --cases 135m-b64

A rollout is traced by JAX's profiler, and the time of every operation of the decode programs is attributed to the
expression it was compiled from. Where several run at once each gets its share, so parts add up to the time in which
something ran; the steps' wall time is a line of its own. A CPU's trace only: an accelerator's names other things.
Lines go to benchmarks/results/breakdown.jsonl (format: README.md).
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax
from common import RESULTS, Line, append, describe_cpu, line, run_fields, versions
from contenders import Rljax, load_sampler
from jax.profiler import ProfileData
from models import model_folder
from roofline import Ceilings, measure_ceilings
from sampling import chosen
from workloads import ARCHS, Workload

from rljax.config import Architecture
from rljax.costs import head_params

PRODUCTS = {
    "kjhd,dm->kjhm": "qkv",
    "de,em->dm": "o",
    "cfd,dm->cfm": "gate and up",
    "df,fm->dm": "down",
    "...d,vd->...v": "head",
    "lkmh,lkhs->lkms": "attention",
    "lkms,lksh->lkmh": "attention",
    "bkgh,bkhr->bkgr": "attention",
    "bkgr,bkrh->bkgh": "attention",
}
"""Einsums of a decode step; what else runs is `rest`: norms, rotary embeddings, softmax, transposes, cache, draw."""
MODULE = "jit_decode_chunk"


def part_of_each_operation(programs: list[str]) -> dict[str, str]:
    """Name of an operation to its part, from the text of compiled programs; of a name that means several, `rest`."""
    parts: dict[str, str] = {}
    for text in programs:
        for name, opcode, source in re.findall(r"%?([\w.\-]+) = \S+ ([\w\-]+)\(.*?op_name=\"([^\"]*)\"", text):
            is_product = source.endswith("dot_general") and opcode in ("fusion", "dot", "custom-call")
            part = next((p for spec, p in PRODUCTS.items() if is_product and f"/{spec}/" in source), "rest")
            if parts.setdefault(name, part) != part:
                parts[name] = "rest"
    return parts


def traced(ours: Rljax, seed: int) -> list[tuple[float, float, str]]:
    """(start, end, name) in nanoseconds of the operations of the decode programs during one rollout."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            ours.run(seed)
        (file,) = Path(folder).rglob("*.xplane.pb")
        events = []
        for plane in ProfileData.from_file(str(file)).planes:
            for row in plane.lines:
                for event in row.events:
                    stats = dict(event.stats)
                    if stats.get("hlo_module") == MODULE:
                        events.append((event.start_ns, event.end_ns, str(stats["hlo_op"])))
    return events


def shared_out(events: list[tuple[float, float, str]], parts: dict[str, str]) -> tuple[Counter[str], float]:
    """Milliseconds of each part and those in which anything ran. Loops and calls are what lies in them."""
    marks = []
    for start, end, name in events:
        if not name.startswith(("while", "call", "conditional")):
            part = parts.get(name, "rest")
            marks += [(start, 1, part), (end, -1, part)]
    marks.sort()
    running: Counter[str] = Counter()
    total: Counter[str] = Counter()
    last = marks[0][0]
    for at, change, part in marks:
        count = sum(running.values())
        for other, n in running.items():
            total[other] += (at - last) * n / max(count, 1)
        last = at
        running[part] += change
    return Counter({part: ns / 1e6 for part, ns in total.items()}), sum(total.values()) / 1e6


def floors(arch: Architecture, workload: Workload, ceilings: Ceilings) -> dict[str, float]:
    """Least milliseconds of each product in a step of all rows, by the measured rate of a large one."""
    heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    layers, width = arch.num_layers, arch.hidden_size
    keys = workload.prompt + workload.cap / 2
    counts = {
        "qkv": layers * width * (heads + 2 * kv),
        "o": layers * width * heads,
        "gate and up": 2 * layers * width * arch.mlp_size,
        "down": layers * width * arch.mlp_size,
        "head": head_params(arch),
        "attention": 2 * layers * heads * keys,
    }
    return {part: 2e3 * workload.batch * n / ceilings.matmul_flops for part, n in counts.items()}


def run_row(name: str, workload: Workload, ceilings: Ceilings, reps: int, fields: Line) -> list[Line]:
    """Traces one row, prints it and returns its lines."""
    arch = ARCHS[workload.model]
    ours = Rljax(load_sampler(model_folder(workload.model, "float32"), arch, "float32"), workload)
    ours.warm_up()
    texts = [made.result().as_text() for key, made in ours.sampler._programs._compiled.items() if key[0] == "decode"]
    parts = part_of_each_operation(texts)
    steps = workload.cap - 1
    found = [shared_out(traced(ours, seed), parts) for seed in range(reps)]
    least = floors(arch, workload, ceilings)
    case = workload.case() | {"dtype": "float32"}
    lines = [line(fields, case | {"part": "all"}, "decode step", "ms", [busy / steps for _, busy in found])]
    for part in (*dict.fromkeys(PRODUCTS.values()), "rest"):
        made = line(fields, case | {"part": part}, "decode step", "ms", [by[part] / steps for by, _ in found])
        lines.append(made | ({"floor_ms": round(least[part], 3)} if part in least else {}))
    lines[0] |= {"floor_ms": round(sum(least.values()), 3), "ceilings": ceilings.as_fields()}
    print(f"{name}, milliseconds a step (floor):")
    for made in lines:
        floor = f" ({made['floor_ms']:.1f})" if "floor_ms" in made else ""
        print(f"  {made['case']['part']:12} {made['median']:8.1f}{floor}", flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["135m-b64"], help="rows by name or pattern, of fixed lengths")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "breakdown.jsonl")
    given = parser.parse_args()
    rows = chosen(given.cases)
    if jax.default_backend() != "cpu" or any(workload.sigma for workload in rows.values()):
        raise SystemExit("breakdown.py traces rows of fixed lengths on a CPU (JAX_PLATFORMS=cpu, --cases 135m-b64)")
    fields = run_fields("breakdown", describe_cpu(), versions(("rljax", "jax", "jaxlib", "flax")))
    ceilings = measure_ceilings("float32")
    for name, workload in rows.items():
        append(given.out, run_row(name, workload, ceilings, given.reps, fields))
    return 0


if __name__ == "__main__":
    sys.exit(main())
