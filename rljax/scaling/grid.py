"""A sweep file to the runs it means: every combination of the values of its axes, each a whole config.

    folder: runs/ladder               # everything goes here; without it, runs/NAME of NAME.yaml
    config: [configs/quickstart.yaml] # files below the settings, as `rljax train` reads them
    settings: {steps: 50}             # of all runs
    warm_start: {model.path: ""}      # settings of `rljax sft`: one warm start for each size; without it, none
    axes:                             # or a list of such, each a grid; a run that is in two is done once
      size: [tiny, qwen2.5-0.5b]
      optimizer.learning_rate: [1e-4, 2e-4]
      recipe: {plain: {}, dapo: {algorithm.clip_high: 0.28, algorithm.overlong: mask}}

An axis is a list of values of a setting, or labels with the settings that each stands for.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rljax.config import ConfigError, RunConfig
from rljax.config_file import config_of, dotted, read_yaml

SHORT = {
    "size": "model.architecture",
    "group_size": "algorithm.group_size",
    "order": "data.order",
    "unique": "data.unique",
    "repeats": "data.repeats",
    "tau": "data.repeats",
}
"""Axes with a name of their own. `tau` divides data.unique by what it multiplies data.repeats with."""

_Tree = tuple[Mapping[str, Any], str]
"""Settings, and where they come from, for messages."""

_KEYS = ("folder", "config", "settings", "warm_start", "axes")
_OURS = ("run_dir", "sft.output")
"""Settings that a sweep gives itself."""
_START_AXES = ("model", "sft", "data.train", "data.task_records", "data.seed", "data.system_prompt")
"""Axes that a warm start follows; runs that differ in others, seeds among them, share one."""


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """A call of `rljax sft` that several runs begin from."""

    name: str
    config: RunConfig
    """`sft.output` is where it is written; it moves to `folder` when it is whole."""
    folder: Path


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A call of `rljax train`."""

    name: str
    config: RunConfig
    labels: dict[str, str]
    """Its value on each axis, as text; `size` and `tau` are always there."""
    start: WarmStart | None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file means."""

    file: Path
    folder: Path
    runs: tuple[PlannedRun, ...]

    @property
    def starts(self) -> list[WarmStart]:
        """Each once, in the order in which runs need them."""
        return list({run.start.name: run.start for run in self.runs if run.start is not None}.values())


@dataclasses.dataclass(frozen=True)
class _Choice:
    """One value of one axis."""

    axis: str
    label: str
    settings: Mapping[str, Any]
    labelled: bool
    """The file gave the label, and it says enough in a name."""

    @property
    def part(self) -> str:
        """What it adds to the name of a run."""
        short = self.axis.rpartition(".")[2]
        if self.labelled or self.axis == "size":
            text = self.label
        else:
            text = f"{short}{self.label}" if self.label[:1].isdigit() else f"{short}-{self.label}"
        return re.sub(r"[^A-Za-z0-9.+_-]", "-", text)


def read_sweep(file: str | Path) -> Sweep:
    """The runs of a sweep file, in the order of the file, the last axis running fastest.

    Raises:
      ConfigError: the file is none of a sweep, a setting is wrong, or two different runs would have one name.
    """
    path, tree = Path(file), read_yaml(file)
    unknown = [key for key in tree if key not in _KEYS]
    if unknown or not tree.get("axes"):
        raise ConfigError(
            f"sweep file {file} has {f'the key {unknown[0]!r}' if unknown else 'no axes'}; its keys are "
            f"{', '.join(_KEYS)}, and axes says what differs between runs, such as `axes: {{seed: [0, 1, 2]}}`"
        )
    folder = Path(tree.get("folder") or Path("runs") / path.stem)
    configs = tree.get("config") or []
    configs = [configs] if isinstance(configs, str) else configs
    base: list[_Tree] = [(read_yaml(config), f" in {config}") for config in configs]
    base.append((_mapping(tree, "settings", file), f" in {file}"))
    warm = _mapping(tree, "warm_start", file) if "warm_start" in tree else None
    runs: dict[str, PlannedRun] = {}
    grids = tree["axes"] if isinstance(tree["axes"], list) else [tree["axes"]]
    for choices in itertools.chain.from_iterable(_combinations(grid, file) for grid in grids):
        _add(runs, _plan(choices, base, warm, folder, f" in {file}"))
    return Sweep(path, folder, tuple(runs.values()))


def _mapping(tree: Mapping[str, Any], key: str, file: str | Path) -> Mapping[str, Any]:
    value = tree.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} in {file} is {value!r} and must be a mapping of settings, such as {{steps: 5}}")
    for name in _OURS:
        section, _, field = name.rpartition(".")
        if name in value or (section and isinstance(value.get(section), dict) and field in value[section]):
            raise ConfigError(f"{key} in {file} gives {name}, which a sweep sets for each run; remove it")
    return value


def _combinations(grid: Any, file: str | Path) -> Sequence[tuple[_Choice, ...]]:
    if not isinstance(grid, dict):
        raise ConfigError(f"axes in {file} holds {grid!r}; write a mapping of axes, or a list of such mappings")
    return list(itertools.product(*(_choices(str(axis), values, file) for axis, values in grid.items())))


def _choices(axis: str, values: Any, file: str | Path) -> list[_Choice]:
    if isinstance(values, dict) and values:
        settings = {str(label): _mapping(values, label, file) for label in values}
        return [_Choice(axis, label, changed, labelled=True) for label, changed in settings.items()]
    if not isinstance(values, list) or not values or axis in _OURS:
        raise ConfigError(
            f"axis {axis} in {file} is {values!r}; write a list of values of a setting, `seed: [0, 1]`, or labels with "
            f"their settings, `size: {{small: {{model.architecture: tiny}}}}`; {' and '.join(_OURS)} are none"
        )
    name = SHORT.get(axis, axis)
    return [_Choice(axis, _text(value), {name: value}, labelled=False) for value in values]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plan(
    choices: Sequence[_Choice],
    base: Sequence[_Tree],
    warm: Mapping[str, Any] | None,
    folder: Path,
    where: str,
) -> PlannedRun:
    """The run of one combination; `base` are the trees of settings below it."""
    name = "_".join(choice.part for choice in choices)
    trees = [*base, *((choice.settings, where) for choice in choices if choice.axis != "tau")]
    for choice in choices:
        if choice.axis == "tau":
            trees.append((_reuse(config_of(trees), choice, where), where))
    start, ours = None, {"run_dir": str(folder / "runs" / name)}
    if warm is not None:
        start = _start(choices, base, warm, folder, where)
        ours["model.path"] = str(start.folder)
    config = config_of([*trees, (ours, "")])
    labels = {choice.axis: choice.label for choice in choices}
    size = labels.get("size") or Path(config_of(trees).model.path).name or config.model.architecture
    return PlannedRun(name, config, {**labels, "size": size, "tau": str(config.data.repeats)}, start)


def _reuse(config: RunConfig, choice: _Choice, where: str) -> dict[str, int]:
    """data.unique and data.repeats of a tau, at the number of prompts that `config` has."""
    prompts = config.data.unique * config.data.repeats
    tau = choice.settings.get("data.repeats")
    if choice.labelled or type(tau) is not int or tau < 1 or prompts < tau or prompts % tau:
        raise ConfigError(
            f"tau = {choice.label}{where} must be a whole number that divides data.unique x data.repeats = "
            f"{config.data.unique} x {config.data.repeats}, the prompts of a run; set data.unique to a multiple of "
            "every tau (0, all records, is not known here)"
        )
    return {"data.unique": prompts // tau, "data.repeats": tau}


def _start(
    choices: Sequence[_Choice],
    base: Sequence[_Tree],
    warm: Mapping[str, Any],
    folder: Path,
    where: str,
) -> WarmStart:
    """The warm start of a run: of what is the same for its size, whatever else the run varies."""
    followed = [
        (choice, {key: value for key, value in dotted(choice.settings).items() if _is_under(key, _START_AXES)})
        for choice in choices
    ]
    name = "_".join(choice.part for choice, settings in followed if settings) or "start"
    whole = folder / "starts" / name
    ours = {"run_dir": str(whole), "sft.output": f"{whole}.partial"}
    trees = [*base, *((settings, where) for _, settings in followed), (warm, where), (ours, "")]
    return WarmStart(name, config_of(trees), whole)


def _is_under(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _add(runs: dict[str, PlannedRun], run: PlannedRun) -> None:
    """Adds a run unless the same is there already, under this name or another."""
    for other in runs.values():
        same = dataclasses.replace(other.config, run_dir="") == dataclasses.replace(run.config, run_dir="")
        if same:
            runs[other.name] = dataclasses.replace(other, labels=run.labels | other.labels)
            return
        if other.name == run.name or (
            other.start and run.start and other.start.name == run.start.name and other.start != run.start
        ):
            raise ConfigError(
                f"two runs that differ would both be called {run.name}, or begin from warm starts of one name; give "
                "the axis in which they differ to both grids, or other labels"
            )
    runs[run.name] = run
