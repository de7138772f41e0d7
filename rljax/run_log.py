"""Where the numbers of a run go: its files, other libraries under their names, the terminal.

`metrics.jsonl`, `curves.csv` and `rollouts/` are always written, by process 0; TensorBoard and W&B are extras that can
fail without stopping the run.
"""

import csv
import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
from rich import progress as rich_progress
from rich.console import Console

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------ other libraries

ALIASES: dict[str, dict[str, str]] = {
    "none": {},
    "verl": {
        "critic/score/mean": "reward/mean",
        "critic/score/min": "reward/min",
        "critic/score/max": "reward/max",
        "critic/advantages/mean": "advantage/mean",
        "critic/advantages/min": "advantage/min",
        "critic/advantages/max": "advantage/max",
        "critic/returns/mean": "advantage/mean",
        "critic/returns/min": "advantage/min",
        "critic/returns/max": "advantage/max",
        "prompt_length/mean": "prompt/length_tokens",
        "prompt_length/min": "prompt/length_min_tokens",
        "prompt_length/max": "prompt/length_max_tokens",
        "response_length/mean": "completion/length_tokens",
        "response_length/min": "completion/length_min_tokens",
        "response_length/max": "completion/length_max_tokens",
        "response_length/clip_ratio": "completion/truncated_fraction",
        "actor/pg_loss": "policy/loss",
        "actor/entropy": "policy/entropy",
        "actor/kl_loss": "policy/reference_kl",
        "actor/ppo_kl": "policy/old_kl",
        "actor/pg_clipfrac": "policy/clip_fraction",
        "actor/pg_clipfrac_lower": "policy/dual_clip_fraction",
        "actor/grad_norm": "policy/grad_norm",
        "actor/lr": "policy/learning_rate",
        "training/rollout_probs_diff_mean": "policy/behaviour_probability_gap_mean",
        "training/rollout_probs_diff_max": "policy/behaviour_probability_gap_max",
        "training/rollout_probs_diff_std": "policy/behaviour_probability_gap_std",
        "training/rollout_actor_probs_pearson_corr": "policy/behaviour_correlation",
        "rollout_corr/kl": "policy/behaviour_kl_k1",
        "rollout_corr/k3_kl": "policy/behaviour_kl",
        "rollout_corr/chi2_token": "policy/behaviour_chi2",
        "rollout_corr/rollout_is_mean": "policy/behaviour_ratio_mean",
        "rollout_corr/rollout_is_min": "policy/behaviour_ratio_min",
        "rollout_corr/rollout_is_max": "policy/behaviour_ratio_max",
        "rollout_corr/rollout_is_eff_sample_size": "policy/behaviour_effective_fraction",
        "rollout_corr/rollout_rs_masked_fraction": "policy/correction_dropped_fraction",
        "perf/throughput": "throughput/tokens_per_second_per_device",
        "perf/mfu/actor": "throughput/update_mfu",
        "perf/max_memory_allocated_gb": "memory/device_peak_gib",
        "perf/time_per_step": "time/step_seconds",
        "timing_s/step": "time/step_seconds",
        "timing_s/gen": "time/sample_seconds",
        "timing_s/reward": "time/reward_seconds",
        "timing_s/update_actor": "time/update_seconds",
        "timing_s/update_weights": "time/sync_seconds",
        "timing_s/testing": "time/evaluate_seconds",
        "timing_s/save_checkpoint": "time/checkpoint_seconds",
    },
    "trl": {
        "reward": "reward/mean",
        "reward_std": "reward/group_std",
        "frac_reward_zero_std": "reward/zero_spread_group_fraction",
        "completions/mean_length": "completion/length_tokens",
        "completions/min_length": "completion/length_min_tokens",
        "completions/max_length": "completion/length_max_tokens",
        "completions/mean_terminated_length": "completion/stopped_length_tokens",
        "completions/min_terminated_length": "completion/stopped_length_min_tokens",
        "completions/max_terminated_length": "completion/stopped_length_max_tokens",
        "completions/clipped_ratio": "completion/truncated_fraction",
        "loss": "policy/objective",
        "entropy": "policy/entropy",
        "kl": "policy/reference_kl",
        "clip_ratio/region_mean": "policy/clip_fraction",
        "clip_ratio/low_mean": "policy/clip_low_fraction",
        "clip_ratio/high_mean": "policy/clip_high_fraction",
        "grad_norm": "policy/grad_norm",
        "learning_rate": "policy/learning_rate",
        "sampling/sampling_logp_difference/mean": "policy/behaviour_gap_mean",
        "sampling/sampling_logp_difference/max": "policy/behaviour_gap_max",
        "sampling/importance_sampling_ratio/min": "policy/correction_min",
        "sampling/importance_sampling_ratio/mean": "policy/correction_mean",
        "sampling/importance_sampling_ratio/max": "policy/correction_max",
        "num_tokens": "progress/sampled_tokens",
        "step_time": "time/step_seconds",
        "eval_reward": "eval/pass@1",
    },
}
"""The name that people know from verl or TRL -> ours, by `logging.aliases`; only where it is the same quantity.

What differs in detail: our clip fractions include the dual clip; `time/update_seconds` includes rescoring, which verl
times apart as `timing_s/old_log_prob` and `timing_s/ref`; `memory/device_peak_gib` is of the busiest device; ratios of
learner to sampler are of tokens whatever `algorithm.correction` is, and verl holds them within its threshold and the
inverse of that for the effective sample size; a correction's weights are counted by token, TRL's of whole completions
by completion."""

# -------------------------------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class CurveRow:
    """One evaluation: a line of `curves.csv`, the table the scaling fits read."""

    run: str
    source: str
    """Where the row comes from: `rljax`, or the name of an imported table."""
    num_params: float
    step: int
    samples: int
    """Prompts consumed so far."""
    flops: float
    """Training compute so far as the paper counts it: 6 num_params tokens."""
    tokens: float
    test_loss: float
    """1 - pass@1."""
    unique: int | None = None
    repeats: int | None = None
    group_size: int | None = None
    eval: str | None = None
    """Which held-out set."""
    seed: int | None = None
    order: str | None = None
    """`data.order`."""
    num_non_embedding_params: int | None = None
    num_total_params: int | None = None
    full_flops: float | None = None
    """All computed so far: sampling, rescoring by policy and reference, updates; attention and head included."""
    full_flops_non_embedding: float | None = None
    """The same without the head."""
    accelerator_seconds: float | None = None
    """Devices x seconds of the steps so far, without evaluation and checkpoints."""


CURVE_COLUMNS = tuple(field.name for field in dataclasses.fields(CurveRow))


class _Extra(Protocol):
    """A sink that may fail."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricSink:
    """Writes a run folder's `metrics.jsonl`, `curves.csv` and `rollouts/`; on processes other than 0, nothing.

    Args:
      run_dir: folder of the run, made if absent.
      tensorboard: also write TensorBoard events to `run_dir/tensorboard`.
      wandb_project: also log to this W&B project; empty: off.
      aliases: second names of metrics, written beside the first in all three: a value of `ALIASES`.
      resume_step: the last step whose results are kept: what a killed run wrote beyond its checkpoint is cut off, or
        the curves would show those steps twice. None: a fresh start, everything is cut off.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        tensorboard: bool = False,
        wandb_project: str = "",
        aliases: Mapping[str, str] = MappingProxyType({}),
        resume_step: int | None = None,
    ) -> None:
        self._folder = Path(run_dir)
        self._aliases = aliases
        self._writes = jax.process_index() == 0
        self._last_step = -1 if resume_step is None else resume_step
        self._extras: dict[str, _Extra] = {}
        if not self._writes:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        keep = -1 if resume_step is None else resume_step
        _truncate_jsonl(self._folder / "metrics.jsonl", keep)
        _truncate_csv(self._folder / "curves.csv", keep)
        for file in (self._folder / "rollouts").glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > keep:
                file.unlink()
        # buffering=1: every line reaches the operating system at once, so a killed run keeps it.
        self._metrics = (self._folder / "metrics.jsonl").open("a", buffering=1)
        if tensorboard:
            self._try("TensorBoard", lambda: _TensorBoard(self._folder / "tensorboard", keep + 1))
        if wandb_project:
            self._try("W&B", lambda: _WandB(self._folder, wandb_project))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One JSON object: the step and its metrics. A value that is not finite is null, JSON has no NaN."""
        if not self._writes:
            return
        assert step > self._last_step, f"step {step} logged after step {self._last_step}; one object per step, in order"
        self._last_step = step
        metrics = {**metrics, **{alias: metrics[name] for alias, name in self._aliases.items() if name in metrics}}
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in metrics.items()}}
        self._metrics.write(json.dumps(row) + "\n")
        for name, extra in list(self._extras.items()):
            self._try(name, lambda extra=extra: extra.log(step, metrics))

    def write_curve(self, row: CurveRow) -> None:
        """Appends one evaluation to `curves.csv`."""
        if not self._writes:
            return
        file = self._folder / "curves.csv"
        is_new = not file.exists()
        with file.open("a", newline="") as out:
            writer = csv.DictWriter(out, CURVE_COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(dataclasses.asdict(row))

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Completions of a step for reading: `rollouts/step_000012.jsonl`, one JSON object per row."""
        if not self._writes:
            return
        file = self._folder / "rollouts" / f"step_{step:06d}.jsonl"
        file.parent.mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # A lone surrogate has no UTF-8; backslashreplace writes it as the JSON escape of itself.
        file.write_text(text, encoding="utf-8", errors="backslashreplace")

    def close(self) -> None:
        if not self._writes:
            return
        self._metrics.close()
        for name, extra in list(self._extras.items()):
            self._try(name, extra.close)
        self._extras.clear()

    def _try(self, name: str, action: Callable[[], "_Extra | None"]) -> None:
        """Opens, feeds or closes an extra sink; the first failure is logged and the sink dropped."""
        try:
            opened = action()
        except Exception as error:
            self._extras.pop(name, None)
            logger.warning("%s is off from here: %s: %s. The run goes on.", name, type(error).__name__, error)
        else:
            if opened is not None:
                self._extras[name] = opened


def _replace(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8", newline="")
    os.replace(partial, file)


def _truncate_jsonl(file: Path, last_step: int) -> None:
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            keep = json.loads(line)["step"] <= last_step
        except ValueError:  # the line a killed process was writing
            keep = False
        if keep:
            kept.append(line + "\n")
    _replace(file, "".join(kept))


def _truncate_csv(file: Path, last_step: int) -> None:
    if not file.exists():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = csv.DictReader(lines)
    assert rows.fieldnames is None or tuple(rows.fieldnames) == CURVE_COLUMNS, f"{file} has columns {rows.fieldnames}"
    out = [",".join(CURVE_COLUMNS) + "\n"]
    for line, row in zip(lines[1:], rows, strict=False):  # strict=False: a torn last line ends both
        if line.endswith("\n") and int(row["step"]) <= last_step:
            out.append(line)
    _replace(file, "".join(out))


class _TensorBoard:
    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboardX import SummaryWriter  # 0.2 s, paid only when asked for

        # purge_step hides what a killed run wrote at or after it.
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, project: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # the `wandb` extra

        # The id is kept in the folder, so that a resumed run goes on in the same W&B run.
        id_file = folder / "wandb_run_id.txt"
        run_id = id_file.read_text() if id_file.exists() else f"{folder.name}-{time.time_ns():x}"
        self._run = wandb.init(project=project, name=folder.name, id=run_id, resume="allow", dir=str(folder))
        id_file.write_text(run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


# ----------------------------------------------------------------------------------------------------------- terminal

_LINE = (
    ("reward", "reward/mean", "{:.3f}"),
    ("pass@1", "eval/pass@1", "{:.3f}"),
    ("loss", "policy/loss", "{:.4f}"),
    ("kl", "policy/reference_kl", "{:.5f}"),
    ("entropy", "policy/entropy", "{:.3f}"),
    ("gap", "policy/behaviour_gap_mean", "{:.5f}"),
    ("tokens", "completion/length_tokens", "{:.0f}"),
    ("tokens/s", "throughput/sampled_tokens_per_second", "{:,.0f}"),
)
"""What a step's line shows: word, metric, format."""


def step_line(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """One line for people; what was not measured is left out.

    `step 12/200  reward 0.412  loss 0.0012  tokens/s 3,100  8.2 s (sample 5.1, update 2.9)`
    """
    parts = [f"step {step}/{num_steps}"]
    parts += [f"{word} {form.format(metrics[name])}" for word, name, form in _LINE if name in metrics]
    ends = [metrics.get(f"forecast/final_test_loss{part}") for part in ("", "_low", "_high")]
    if None not in ends:
        parts.append("final loss {:.3f} ({:.3f} to {:.3f})".format(*ends))
    phases = {n[5:-8]: s for n, s in metrics.items() if n.startswith("time/") and n.endswith("_seconds")}
    total = phases.pop("step", sum(phases.values()))
    if total:
        shown = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items() if seconds >= 0.05)
        parts.append(f"{total:.1f} s" + (f" ({shown})" if shown else ""))
    return "  ".join(parts)


class Progress:
    """One line per step for people; process 0 only.

    On a terminal the lines scroll above a live bar with the step, the newest reward and pass@1, tokens/s and the time
    left. Elsewhere (a file, a pod's log) the same lines go through `logging`, free of escape codes. A context manager.
    """

    def __init__(self, num_steps: int, *, first_step: int = 0, console: Console | None = None) -> None:
        self._num_steps = num_steps
        self._shown: dict[str, float] = {}
        self._bar = None
        console = Console(file=sys.stdout) if console is None else console
        if console.is_terminal and jax.process_index() == 0:
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("step"),
                rich_progress.MofNCompleteColumn(),
                rich_progress.BarColumn(bar_width=None),
                rich_progress.TextColumn("{task.fields[newest]}", markup=False),
                rich_progress.TimeElapsedColumn(),
                rich_progress.TextColumn("left"),
                rich_progress.TimeRemainingColumn(),
                console=console,
                expand=True,
                speed_estimate_period=3600,  # steps take minutes: the default of 30 s forgets every one of them
            )
            self._task = self._bar.add_task("train", total=num_steps, completed=first_step, newest="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that `step` of the run is done."""
        if jax.process_index() != 0:
            return
        line = step_line(step, self._num_steps, metrics)
        if self._bar is None:
            logger.info(line)
            return
        on_bar = [part for part in _LINE if part[0] in ("reward", "pass@1", "tokens/s")]
        self._shown |= {name: metrics[name] for _, name, _ in on_bar if name in metrics}
        newest = "  ".join(
            f"{word} {form.format(self._shown[name])}" for word, name, form in on_bar if name in self._shown
        )
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._bar.update(self._task, completed=step, newest=newest)
