"""What is timed: rollouts of rljax in this process, and those of a peer in its own.

Letters: B completions.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from common import Contender, Line, undisturbed
from peer import PeerError, Worker
from peers.protocol import peak_mib, reset_peak_memory
from workloads import Workload

from rljax.config import Architecture, MeshConfig
from rljax.mesh import make_mesh
from rljax.models import hf
from rljax.sampling.engine import EngineOptions, Sampler
from rljax.types import Rollouts


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the rows of one run have alike."""

    fields: Line
    dtype: str
    repeats: int
    patience: float
    out: Path
    alone: bool = True
    """Repeats during which others used the CPU do not count; not asked for on an accelerator, or in a rehearsal."""

    def measure(self, contender: Contender, seed: int) -> float | None:
        """Seconds of one repeat; None where it does not count."""
        if not self.alone:
            return contender.run(seed)
        return undisturbed(contender, seed, patience=self.patience)


def begin_peak() -> None:
    """Lets `read_peak_mib` count from now; that of an accelerator counts from the start of the process."""
    if jax.default_backend() == "cpu":
        reset_peak_memory()


def read_peak_mib() -> float:
    """Most memory held: of the process on a CPU, else of the device, the loading of the weights included."""
    if jax.default_backend() == "cpu":
        return peak_mib()
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20


class Void(RuntimeError):
    """A row that may not be reported."""


# --------------------------------------------------------------------------------------------------------------- rljax


def load_sampler(folder: Path, arch: Architecture, dtype: str, options: EngineOptions | None = None) -> Sampler:
    """A sampler of the weights in `folder`; nothing stops a completion but its length."""
    params = hf.load_params(folder, arch, dtype=dtype)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Sampler(params, arch, mesh, stop_ids=(), compute_dtype=dtype, options=options or EngineOptions())


class Rljax:
    """Our side of one row.

    Lengths are given as caps: on the device a row ends at its cap exactly as at a stop token, and the host hears of it
    the same way, a chunk later. What it does know beforehand is the longest row, which every peer is told as well; that
    saves the chunk that would find out that no row is left.
    """

    def __init__(self, sampler: Sampler, workload: Workload) -> None:
        self.sampler, self.workload = sampler, workload
        self.prompts, self.lengths = workload.make_prompts(), workload.lengths()
        self.peak_mib = 0.0
        self.rollouts: Rollouts | None = None
        """Of the last run."""

    def run(self, seed: int) -> float:
        """Seconds of one rollout, everything on the host at the end."""
        begin_peak()
        started = time.perf_counter()
        rollouts = self.sampler.generate(
            self.prompts,
            self.workload.group,
            key=jax.random.key(seed),
            temperature=1.0,
            max_completion_tokens=self.lengths,
        )
        seconds = time.perf_counter() - started
        if not np.array_equal(rollouts.lengths, self.lengths):
            raise Void(f"lengths drawn {rollouts.lengths[:8]}... are not those asked for {self.lengths[:8]}...")
        self.rollouts = rollouts
        self.peak_mib = max(self.peak_mib, read_peak_mib())
        return seconds

    def warm_up(self) -> float:
        """Runs until nothing more is compiled; seconds of the first run."""
        first, programs = self.run(0), -1
        for _ in range(3):
            if programs == self.sampler.stats.programs:
                break
            programs = self.sampler.stats.programs
            self.run(0)
        self.peak_mib = 0.0
        return first


# --------------------------------------------------------------------------------------------------------------- peers


class Peer:
    """A peer's side of the rows of one model."""

    def __init__(self, worker: Worker, folder: Path, dtype: str, variants: Sequence[str] = ()) -> None:
        self.worker = worker
        told = worker.ask("load", folder=str(folder), dtype=dtype)
        self.versions = told["versions"]
        self.variants = [name for name in told["variants"] if not variants or name in variants]
        self.peak_mib: dict[str, float] = {}

    def contenders(self, ours: Rljax) -> list[Contender]:
        """One per variant, warmed up; a variant that fails is left out, and that is said."""
        prompts = [row.tolist() for row in np.repeat(ours.prompts.tokens, ours.workload.group, axis=0)]
        lengths = ours.lengths.tolist()
        self.peak_mib = {}
        made = []
        for variant in self._variants(ours.workload):

            def run(seed: int, variant: str = variant, lengths: list[int] = lengths) -> float:
                told = self.worker.ask("sample", prompts=prompts, lengths=lengths, variant=variant, seed=seed)
                self.peak_mib[variant] = max(self.peak_mib.get(variant, 0.0), told["peak_mib"])
                return told["seconds"]

            try:
                # Only what compiles for a shape needs all of it once; on a GPU transformers compiles `static` unasked.
                compiles = "compiled" in variant or self.worker.name == "tunix"
                compiles |= variant.startswith("static") and jax.default_backend() != "cpu"
                run(0, lengths=lengths if compiles else [4] * len(lengths))
            except PeerError as error:
                print(f"  {self.worker.name} {variant} left out: {str(error).strip().splitlines()[-1]}", flush=True)
                continue
            self.peak_mib = {}
            made.append(Contender(f"{self.worker.name} {variant}", self.worker.pid, run))
        return made

    def _variants(self, workload: Workload) -> list[str]:
        """Where rows end one by one, a batch may also be cut into smaller ones or batched continuously."""
        if not workload.sigma:
            return [name for name in self.variants if name != "continuous"]
        cut = [f"{name}/64" for name in self.variants if name == "dynamic" and workload.batch > 64]
        return self.variants + cut
