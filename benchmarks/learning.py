"""What is timed of learning: whole GRPO iterations and updates alone, of rljax here and of peers in their processes.

Letters: P prompts, G completions of each, B = P*G completions, R slots of a completion.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from common import Contender
from contenders import Void, begin_peak, load_sampler, read_peak_mib
from peer import PeerError, Worker
from workloads import ARCHS, Workload

from rljax.config import AlgorithmConfig, Architecture, LoraConfig, MeshConfig, OptimizerConfig
from rljax.mesh import make_mesh
from rljax.metrics import to_floats
from rljax.policy import Policy
from rljax.rl.advantages import group_advantages
from rljax.rl.learner import Learner, fresh_state, reference_copy, reference_dtype, state_shapes
from rljax.rl.update import Compute
from rljax.tokenizer import character_tokenizer
from rljax.types import Prompts, Rollouts

KL_COEFFICIENT = 0.001
OPTIMIZER = OptimizerConfig()
SETTINGS = {
    "kl_coefficient": KL_COEFFICIENT,
    "learning_rate": OPTIMIZER.learning_rate,
    "weight_decay": OPTIMIZER.weight_decay,
    "max_grad_norm": OPTIMIZER.max_grad_norm,
}
"""What trainers are told."""
TRAINER_TOKENS = (16384, 32768)
"""Padded tokens of a forward and backward pass of a trainer that cannot take the batch at once; both are tried."""
TRAINER_TOKENS_ON_GPU = (8192,)
"""As many as a micro-batch of ours has there."""
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}
"""By dtype: of the largest difference in float32, of the mean one in bfloat16, whose logits have three digits."""
ROUNDING_TOLERANCE = 1.25
"""In bfloat16: of the learner's mean difference from a peer in float32, in units of that of the peer in bfloat16."""
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02}
"""Of the norm of the first gradient, relative."""


def load_learner(
    folder: Path,
    arch: Architecture,
    *,
    group: int,
    kl_coefficient: float = KL_COEFFICIENT,
    remat: str = "none",
    dtype: str = "float32",
    old_logprobs: Literal["recompute", "current"] = "current",
    optimizer: OptimizerConfig = OPTIMIZER,
) -> Learner:
    """A learner of the weights in `folder` that makes one update per step, with them as the reference too.

    With one update per step the ratio is 1 and no old log-probs are needed; peers save that pass too.
    """
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    policy = Policy(arch, character_tokenizer("0"), mesh, dtype, dtype, folder, LoraConfig())  # no text is read
    params = policy.load_params(0)
    state = fresh_state(params, state_shapes(policy.shapes, optimizer, mesh), optimizer)
    algorithm = AlgorithmConfig(
        group_size=group, updates_per_step=1, kl_coefficient=kl_coefficient, old_logprobs=old_logprobs
    )
    reference = None
    if kl_coefficient:
        reference = params if dtype == "float32" else reference_copy(params, reference_dtype(algorithm, dtype))
    return Learner(state, reference, arch, mesh, algorithm, optimizer, Compute(dtype, remat, 1.0))


def even_share(rollouts: Rollouts) -> np.ndarray:
    """Rewards [P, G]: the share of even ids in a completion, which is as cheap as it is uneven."""
    inside = np.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    even = (rollouts.tokens % 2 == 0) & inside
    return (even.sum(axis=1) / rollouts.lengths).reshape(-1, rollouts.group_size)


def advantages_of(rollouts: Rollouts, learner: Learner) -> np.ndarray:
    """[P, G], as the learner's algorithm has them."""
    algorithm = learner.algorithm
    lengths = rollouts.lengths.reshape(-1, rollouts.group_size)
    return group_advantages(even_share(rollouts), lengths, algorithm.advantage, algorithm.advantage_eps)


# --------------------------------------------------------------------------------------------------------------- rljax


class Iteration:
    """Our side of a whole step: rollouts, rewards, advantages, reference pass, update, weight sync, metrics fetched."""

    def __init__(self, folder: Path, workload: Workload) -> None:
        arch = ARCHS[workload.model]
        self.workload = workload
        self.prompts, self.lengths = workload.make_prompts(), workload.lengths()
        self.learner = load_learner(folder, arch, group=workload.group)
        self.sampler = load_sampler(folder, arch, "float32")
        self.phases: dict[str, float] = {}
        """Seconds of each phase of the last run."""
        self.metrics: dict[str, float] = {}
        self.peak_mib = 0.0

    def prepare(self) -> None:
        """What a run does before its first rollouts: compiling the update begins."""
        self.learner.prepare(len(self.prompts), self.prompts.tokens.shape[1], int(self.lengths.max()))

    def run(self, seed: int) -> float:
        """Seconds of one iteration."""
        begin_peak()
        marks = [time.perf_counter()]
        rollouts = self.sampler.generate(
            self.prompts, self.workload.group, key=jax.random.key(seed), max_completion_tokens=self.lengths
        )
        marks.append(time.perf_counter())
        advantages = advantages_of(rollouts, self.learner)
        marks.append(time.perf_counter())
        self.sampler.release()
        self.metrics = to_floats(self.learner.step(rollouts, advantages))
        jax.block_until_ready(self.learner.state.params)
        marks.append(time.perf_counter())
        self.sampler.sync(self.learner.state.params)
        self.sampler.block_until_ready()
        marks.append(time.perf_counter())
        if not np.array_equal(rollouts.lengths, self.lengths):
            raise Void(f"lengths drawn {rollouts.lengths[:8]}... are not those asked for {self.lengths[:8]}...")
        names = ("rollout", "reward", "update", "sync")
        self.phases = {name: marks[i + 1] - marks[i] for i, name in enumerate(names)}
        self.peak_mib = max(self.peak_mib, read_peak_mib())
        return marks[-1] - marks[0]

    def warm_up(self) -> None:
        """Runs until nothing more is compiled."""
        programs = -1
        while programs != self.sampler.stats.programs:
            programs = self.sampler.stats.programs
            self.run(0)
        self.peak_mib = 0.0


class Update:
    """Our side of an update alone: `Learner.step` on rollouts that stay the same, reference pass included."""

    def __init__(self, learner: Learner, rollouts: Rollouts, advantages: np.ndarray) -> None:
        self.learner, self.rollouts, self.advantages = learner, rollouts, advantages
        self.metrics: dict[str, float] = {}
        self.peak_mib = 0.0

    def run(self, seed: int = 0) -> float:
        """Seconds of one update; nothing of it is random."""
        begin_peak()
        started = time.perf_counter()
        self.metrics = to_floats(self.learner.step(self.rollouts, self.advantages))
        jax.block_until_ready(self.learner.state.params)
        seconds = time.perf_counter() - started
        self.peak_mib = max(self.peak_mib, read_peak_mib())
        return seconds

    def warm_up(self) -> dict[str, float]:
        """Metrics of the first update, on the weights as they were loaded."""
        self.run()
        first = self.metrics
        self.run()
        self.peak_mib = 0.0
        return first


def draw(folder: Path, workload: Workload, dtype: str = "float32") -> Rollouts:
    """Rollouts of the workload's prompts and lengths."""
    sampler = load_sampler(folder, ARCHS[workload.model], dtype)
    return sampler.generate(
        workload.make_prompts(), workload.group, key=jax.random.key(0), max_completion_tokens=workload.lengths()
    )


def ungrouped(rollouts: Rollouts) -> Rollouts:
    """The same completions, each with a copy of its prompt: groups of one."""
    each, prompts = rollouts.group_size, rollouts.prompts
    alone = Prompts(
        np.repeat(prompts.tokens, each, axis=0),
        np.repeat(prompts.lengths, each),
        np.arange(len(rollouts.lengths), dtype=np.int64),
        tuple(record for record in prompts.records for _ in range(each)),
    )
    return dataclasses.replace(rollouts, prompts=alone, group_size=1)


def as_ids(rollouts: Rollouts) -> dict[str, list[list[int]]]:
    """Prompts [P] and completions [B] as a worker takes them."""
    prompts, drawn = rollouts.prompts, zip(rollouts.tokens, rollouts.lengths, strict=True)
    return {
        "prompts": [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths, strict=True)],
        "completions": [row[:n].tolist() for row, n in drawn],
    }


def check_logprobs(learner: Learner, rollouts: Rollouts, workers: Sequence[Worker]) -> None:
    """Log-probs of the same completions under the learner's weights are those of our sampler and of every worker.

    Two that round differently differ by more than either is wrong. So in bfloat16 a worker says what they are in
    float32, and the learner may be about as far from that as the worker's model is when held in bfloat16: with all
    of its activations, then, where autocast keeps the residual stream in float32.

    Raises:
      Void: they are not.
    """
    dtype = str(learner.compute.dtype)
    worst, name_of_gap = (np.max, "") if dtype == "float32" else (np.mean, "on average ")
    ours = learner.score(learner.state.params, rollouts)

    def gap(theirs: Sequence[Sequence[float]], name: str, mine: Sequence[Sequence[float]]) -> float:
        if [len(row) for row in theirs] != rollouts.lengths.tolist():
            raise Void(f"log-probs of {name} are not of the completions they were asked for")
        pairs = zip(mine, theirs, strict=True)
        return float(worst(np.concatenate([np.abs(np.asarray(a)[: len(b)] - np.asarray(b)) for a, b in pairs])))

    def check(name: str, found: float, allowed: float) -> None:
        if not found <= allowed:  # so that NaN does not pass
            raise Void(
                f"log-probs of the learner and {name} differ {name_of_gap}by {found:.2g} ({allowed:.2g} allowed)"
            )
        print(f"  log-probs {name_of_gap}within {found:.1e} of those of {name} ({len(ours)} completions)", flush=True)

    sampled = [row[:n] for row, n in zip(rollouts.behaviour_logprobs, rollouts.lengths, strict=True)]
    check("the sampler", gap(sampled, "the sampler", ours), LOGPROB_TOLERANCE[dtype])
    for worker in workers:
        if dtype == "float32":
            theirs = worker.ask("logprobs", **as_ids(rollouts))["logprobs"]
            check(worker.name, gap(theirs, worker.name, ours), LOGPROB_TOLERANCE[dtype])
            continue
        exact, held = (worker.ask("logprobs", kind=kind, **as_ids(rollouts))["logprobs"] for kind in ("exact", "held"))
        rounding = gap(exact, worker.name, held)
        check(f"{worker.name} in float32", gap(exact, worker.name, ours), ROUNDING_TOLERANCE * rounding)
        print(f"  those of {worker.name} held in {dtype} within {rounding:.1e}", flush=True)


# ------------------------------------------------------------------------------------------------------------- trainers


def batch_variants(kinds: Sequence[str], workload: Workload) -> list[str]:
    """`KIND/ROWS`: the whole batch at once where it has few enough tokens, else whole groups of it."""
    longest = workload.prompt + int(workload.lengths().max())
    rows = []
    for tokens in TRAINER_TOKENS if jax.default_backend() == "cpu" else TRAINER_TOKENS_ON_GPU:
        groups = min(workload.prompts, max(1, tokens // (longest * workload.group)))
        while workload.prompts % groups:
            groups -= 1
        rows.append(groups * workload.group)
    return [f"{kind}/{count}" for count in dict.fromkeys(rows) for kind in kinds]


class Trainer:
    """A peer's side of the rows of one model: whole GRPO steps, driven by its own loop."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker = worker
        told = worker.ask("load", folder=str(folder), dtype="float32")
        self.versions, self._kinds = told["versions"], told["variants"]
        self.variant = ""
        self.phases: dict[str, float] = {}
        self.peak_mib = 0.0

    def _start(self, workload: Workload, variant: str) -> None:
        prompts = [row.tolist() for row in workload.make_prompts().tokens]
        self.worker.ask(
            "start", prompts=prompts, lengths=workload.lengths().tolist(), variant=variant, settings=SETTINGS
        )

    def run(self, seed: int = 0) -> float:
        """Seconds of one step; the trainer draws from random numbers of its own."""
        told = self.worker.ask("step")
        self.peak_mib = max(self.peak_mib, told.pop("peak_mib"))
        seconds = told.pop("seconds")
        self.phases = told
        return seconds

    def contender(self, workload: Workload) -> Contender:
        """The fastest of its variants, warmed up; two micro-batches of the largest size say which it is.

        Raises:
          PeerError: none of them ran.
        """
        seconds: dict[str, float] = {}
        variants = batch_variants(self._kinds, workload)
        most = max(int(variant.split("/")[1]) for variant in variants)
        part = dataclasses.replace(workload, prompts=min(workload.prompts, 2 * most // workload.group))
        for variant in variants:
            try:
                self._start(part, variant)
                first = self.run()  # compiles, where it does
                seconds[variant] = self.run()
            except PeerError as error:
                print(f"  {self.worker.name} {variant} left out: {str(error).strip().splitlines()[-1]}", flush=True)
                continue
            print(f"  {self.worker.name} {variant}: {seconds[variant]:.2f} s, first {first:.2f} s", flush=True)
        if not seconds:
            raise PeerError(f"{self.worker.name} runs none of its variants of {workload.case()}")
        best = min(seconds, key=lambda name: seconds[name])
        if best != list(seconds)[-1] or part != workload:
            self._start(workload, best)
            self.run()
        self.variant, self.peak_mib = best, 0.0
        return Contender(self.worker.name, self.worker.pid, self.run)


class TorchUpdate:
    """The same update in torch, on the padded batch."""

    def __init__(self, worker: Worker, folder: Path, dtype: str = "float32") -> None:
        self.worker, self._folder, self._dtype = worker, folder, dtype
        self.versions: dict[str, str] = {}
        self.variant = ""
        self.peak_mib = 0.0

    def contender(self, workload: Workload, update: Update, first: dict[str, float]) -> Contender:
        """The fastest size of micro-batch, warmed up.

        Args:
          first: metrics of our first update.

        Raises:
          Void: its first gradient is not ours.
        """
        sent = as_ids(update.rollouts) | {"advantages": update.advantages.reshape(-1).tolist(), "settings": SETTINGS}
        seconds: dict[str, float] = {}
        norm = 0.0

        def run(seed: int = 0) -> float:
            nonlocal norm
            told = self.worker.ask("update", **sent, variant=self.variant)
            self.peak_mib, norm = max(self.peak_mib, told["peak_mib"]), told["grad_norm"]
            return told["seconds"]

        ours = first["policy/grad_norm"]
        kinds = ["eager"] if jax.default_backend() == "cpu" else ["compiled"]
        for self.variant in batch_variants(kinds, workload):
            self.versions = self.worker.ask("load", folder=str(self._folder), dtype=self._dtype)["versions"]
            run()
            if not abs(norm - ours) <= GRADIENT_TOLERANCE[self._dtype] * ours:
                raise Void(f"the norm of the first gradient is {ours:.6g}, in torch {norm:.6g}")
            print(f"  norm of the first gradient {ours:.6g}, in torch {norm:.6g}", flush=True)
            seconds[self.variant] = run()
        self.variant, self.peak_mib = min(seconds, key=lambda name: seconds[name]), 0.0
        return Contender(self.worker.name, self.worker.pid, run)
