"""Which Qwen2.5 fits which TPU slice: the programs of a run compiled for slices that are not here.

python benchmarks/aot.py                                # what results/aot.jsonl does not hold yet
python benchmarks/aot.py --cases '72b-*' --programs update decode
python benchmarks/aot.py --scaling                      # updates on up to 256 chips, for weak_scaling.py

Needs libtpu (extra `tpu`), in an environment of its own. Each program is compiled at the full size of its model and the
lengths of the paper; nothing is run. It fails, after writing its line, where a donated array is not reused or a step of
a decode copies a cache.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported: a TPU that is here is left alone

from common import RESULTS, Line, append, line, run_fields, versions

from rljax.aot import PROGRAMS, SLICES, Compiled, Job, compile_program, tpu_devices
from rljax.config import ARCHITECTURES, AlgorithmConfig, MeshConfig, OptimizerConfig
from rljax.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table."""

    model: str
    slice: str
    fsdp: int
    tensor: int = 1
    data: int = 1
    completion_tokens: int = 4096
    moments: str = "float32"
    microbatch_tokens: int = AlgorithmConfig.microbatch_tokens
    """Most on each device."""

    @property
    def name(self) -> str:
        return f"{self.model}-{self.slice}"

    def job(self) -> Job:
        mesh = make_mesh(MeshConfig(self.data, self.fsdp, self.tensor), tpu_devices(self.slice))
        optimizer = OptimizerConfig(moments_dtype=self.moments)  # type: ignore[arg-type]
        arch = ARCHITECTURES[f"qwen2.5-{self.model}"]
        algorithm = AlgorithmConfig(microbatch_tokens=self.microbatch_tokens)
        return Job(arch, mesh, completion_tokens=self.completion_tokens, algorithm=algorithm, optimizer=optimizer)

    def fields(self, program: str) -> Line:
        """What identifies a line."""
        return {
            "model": self.model,
            "program": program,
            "slice": self.slice,
            "chips": SLICES[self.slice].chips,
            "mesh": f"data {self.data} x " * (self.data > 1) + f"fsdp {self.fsdp} x tensor {self.tensor}",
            "lengths": f"2048 + {self.completion_tokens}",
            "moments": self.moments,
            "microbatch_tokens": self.microbatch_tokens,
        }


CASES = [
    Case("0.5b", "v5e-8", fsdp=8),
    Case("72b", "v5p-128", fsdp=16, tensor=4, completion_tokens=2048),
    Case("72b", "v6e-64", fsdp=4, tensor=16, completion_tokens=2048, moments="bfloat16", microbatch_tokens=4096),
    Case("7b", "v6e-8", fsdp=2, tensor=4),
    Case("7b", "v5e-16", fsdp=4, tensor=4, moments="bfloat16"),
    Case("32b", "v5p-32", fsdp=4, tensor=4),
    Case("14b", "v6e-16", fsdp=2, tensor=8),
    Case("3b", "v5e-8", fsdp=4, tensor=2),
    Case("1.5b", "v5e-8", fsdp=8),
    Case("0.5b", "v5e-1", fsdp=1),
]
"""At the paper's lengths; those of 72B are its script's. Where a model has fewer key/value heads than the tensor axis
devices, they are copied."""

SCALING = [
    *(Case("0.5b", "v5e-" + str(n), fsdp=min(n, 128), data=max(n // 128, 1)) for n in (8, 64, 256)),
    *(Case("1.5b", "v5e-" + str(n), fsdp=n) for n in (8, 64, 256)),
    *(Case("3b", "v5e-" + str(n), fsdp=n // 2, tensor=2) for n in (8, 64, 256)),
    *(Case("7b", "v6e-" + str(n), fsdp=n // 4, tensor=4) for n in (8, 64, 256)),
    *(Case("14b", "v6e-" + str(n), fsdp=n // 8, tensor=8) for n in (16, 64, 256)),
    *(Case("32b", "v5p-" + str(2 * n), fsdp=n // 4, tensor=4) for n in (16, 64, 256)),
    *(Case("72b", "v5p-" + str(2 * n), fsdp=n // 4, tensor=4, completion_tokens=2048) for n in (64, 128, 256)),
]
"""Updates on more and more chips, the parameters split further with each (`weak_scaling.py`)."""


def done(file: Path) -> set[str]:
    """What of the table `file` holds: identities as JSON."""
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []
    known = [made["case"] for made in lines if "traffic" in made]  # older lines counted collectives more than once
    return {json.dumps({k: v for k, v in case.items() if k not in ("batch", "fits")}) for case in known}


def gib(count: int) -> float:
    return round(count / 2**30, 3)


def result(fields: Line, case: Line, found: Compiled) -> Line:
    """The line of one program."""
    made = line(
        fields, {**case, "batch": found.batch, "fits": found.fits}, "memory", "GiB", [found.needed_bytes / 2**30]
    )
    parts = ("hbm", "resident", "donated", "argument", "output", "temporary", "alias")
    return made | {
        **{f"{part}_gib": gib(getattr(found, f"{part}_bytes")) for part in parts},
        "compile_seconds": round(found.compile_seconds, 1),
        "donation_aliases": found.donation_aliases,
        "cache_copies": found.cache_copies,
        "cache_moves": found.cache_moves,
        "traffic": {
            str(loops): {"collectives": sent.count, "mib": round(sent.bytes / 2**20, 3)}
            for loops, sent in found.traffic.items()
        },
        "collectives": [dataclasses.asdict(collective) for collective in found.collectives],
        **({"refusal": found.refusal} if found.refusal else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], help="patterns of MODEL-SLICE, such as 72b-*")
    parser.add_argument("--scaling", action="store_true", help="the updates of weak_scaling.py, not the table")
    parser.add_argument("--programs", nargs="+", choices=tuple(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--out", type=Path, help="default: results/aot.jsonl or results/weak_scaling.jsonl")
    given = parser.parse_args()
    out = given.out or RESULTS / ("weak_scaling.jsonl" if given.scaling else "aot.jsonl")
    there, wrong = done(out), []
    for case in SCALING if given.scaling else CASES:
        if not any(fnmatch.fnmatch(case.name, pattern) for pattern in given.cases):
            continue
        job = None
        for program in ("update",) if given.scaling else given.programs:
            described = case.fields(program)
            if json.dumps(described) in there:
                continue
            job = job or case.job()
            found = compile_program(job, program)
            device = f"{job.mesh.devices.flat[0].device_kind} (compiled for)"
            fields = run_fields("aot", device, versions(("rljax", "jax", "jaxlib", "libtpu", "flax", "optax")))
            append(out, [result(fields, described, found)])
            print(
                f"{case.name} {program}: {'fits' if found.fits else 'DOES NOT FIT'}, {gib(found.needed_bytes)} of "
                f"{gib(found.hbm_bytes)} GiB, compiled in {found.compile_seconds:.0f} s",
                flush=True,
            )
            if not found.refusal and not (found.donation_aliases and found.cache_copies == 0):
                wrong.append(f"{case.name} {program}: {found.cache_copies} copies, aliases: {found.donation_aliases}")
    if wrong:
        raise SystemExit("donated arrays not reused, or caches copied:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
