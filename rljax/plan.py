"""Does a run fit on a slice, how fast can it be there, and what does it cost: by arithmetic alone (`rljax plan`).

Memory is planned for the longest prompts and completions (`footprint.py`), time for lengths around their means
(`steptime.py`). What is said is a prediction: no TPU has been measured. The compiler is asked on demand
(`compiled_plan.py`).
"""

import dataclasses
from pathlib import Path

from rljax.config import ARCHITECTURES, Architecture, ConfigError, MeshConfig, RunConfig
from rljax.footprint import Footprint, Setting, check_divides, footprint, sizes_that_divide
from rljax.hardware import CHIPS, Slice, slice_named, slices_of
from rljax.mesh import AXES, whole_mesh
from rljax.models import hf
from rljax.steptime import StepTime, step_time

_ALIKE = 1.05
"""Steps that take so much longer than the fastest are as fast."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a slice with a mesh."""

    setting: Setting
    where: Slice
    memory: Footprint
    time: StepTime
    steps: int
    """Of the run that is paid for; 0: not known."""

    @property
    def tokens_per_second_per_chip(self) -> float:
        """Completion tokens drawn in a step over its seconds, evaluation included, and the chips."""
        return self.time.completion_tokens / self.time.total / self.where.chips

    @property
    def hours(self) -> float:
        return self.steps * self.time.total / 3600

    @property
    def chip_hours(self) -> float:
        return self.hours * self.where.chips


def plan_run(config: RunConfig, where: Slice, mesh: MeshConfig, arch: Architecture | None = None) -> Plan:
    """`config` on `where` with `mesh`, whatever fits or not.

    Raises:
      ConfigError: the mesh is not that of the slice, or does not divide the model.
    """
    setting = Setting(config, arch or architecture_of(config), _whole(mesh, where), where.chip.platform)
    memory = footprint(setting, where.chip.usable_bytes)
    return Plan(setting, where, memory, step_time(setting, memory, where), config.plan.steps or config.steps)


def meshes_on(where: Slice, arch: Architecture) -> list[MeshConfig]:
    """All that the slice has and the model divides by."""
    found = []
    for tensor in sizes_that_divide(arch, "tensor"):
        for fsdp in sizes_that_divide(arch, "fsdp"):
            if where.devices % (tensor * fsdp) == 0:
                found.append(MeshConfig(where.devices // (tensor * fsdp), fsdp, tensor))
    return found


def recommended(config: RunConfig, where: Slice, arch: Architecture | None = None) -> Plan | None:
    """The fastest mesh of the slice that fits; None where none does.

    Of those that are as fast within what such predictions can tell apart, the one that splits layers least.
    """
    arch = arch or architecture_of(config)
    plans = [plan_run(config, where, mesh, arch) for mesh in meshes_on(where, arch)]
    fitting = [plan for plan in plans if plan.memory.fits]
    best = min((plan.time.total for plan in fitting), default=0.0)
    near = [plan for plan in fitting if plan.time.total <= _ALIKE * best]
    return min(near, key=lambda plan: (plan.setting.mesh.tensor, plan.time.total), default=None)


def search(config: RunConfig, generation: str) -> Plan:
    """The fewest chips of `generation` on which the run fits, and there the fastest mesh.

    Raises:
      ConfigError: it fits on none; says what is short.
    """
    arch = architecture_of(config)
    for where in slices_of(generation):
        found = recommended(config, where, arch)
        if found is not None:
            return found
    largest = slices_of(generation)[-1]
    plans = [plan_run(config, largest, mesh, arch) for mesh in meshes_on(largest, arch)]
    least = min(plans, key=lambda plan: plan.memory.peak)
    raise ConfigError(
        f"no {generation} slice holds this run: with the best mesh of {largest.name}, "
        f"{mesh_text(least.setting.mesh)}, {least.memory.peak_phase} needs {_gib(least.memory.peak)} GiB of the "
        f"{_gib(least.memory.usable)} that a device has (and an update a reserve); use a generation with more memory, "
        "shorter prompts and completions, or optimizer.moments_dtype = bfloat16"
    )


def planned_meshes(config: RunConfig) -> dict[str, MeshConfig]:
    """`plan.meshes` by slice.

    Raises:
      ConfigError: an entry is not of the form `v5p-128 1x8x8`, or is no mesh of that slice.
    """
    found = {}
    for entry in config.plan.meshes:
        name, _, sizes = entry.partition(" ")
        numbers = sizes.strip().split("x")
        if len(numbers) != 3 or not all(number.isdigit() and int(number) for number in numbers):
            raise ConfigError(
                f"plan.meshes holds {entry!r}, which is not a slice and its mesh; write data x fsdp x tensor, as in "
                "v5p-128 1x8x8"
            )
        found[name] = _whole(MeshConfig(*map(int, numbers)), slice_named(name))
    return found


def architecture_of(config: RunConfig) -> Architecture:
    """Shape of the model of a run, without its weights: from its folder, or by the name of a known one.

    Raises:
      ConfigError: `model.path` is neither.
    """
    path = config.model.path
    if not path:
        return ARCHITECTURES[config.model.architecture]
    if Path(path).is_dir():
        return hf.read_architecture(Path(path))
    name = path.rpartition("/")[2].lower()
    known = name.removesuffix("-instruct").removesuffix("-base")
    if known not in ARCHITECTURES:
        raise ConfigError(
            f"model.path = {path!r} is neither a folder here nor the hub name of a model whose shape is known; "
            f"give its folder, or set model.path to '' and model.architecture to one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[known]


def _whole(mesh: MeshConfig, where: Slice) -> MeshConfig:
    """`mesh` with the axis that is -1 filled in from the slice."""
    return whole_mesh(mesh, where.devices, f"the devices of {where.name}")


# ---------------------------------------------------------------------------------------------------------------- text


def planned(config: RunConfig) -> Plan:
    """The run on the slice and mesh that the config names, or with `plan.search` on those that are found for it.

    Raises:
      ConfigError: no slice is given, or the config does not go together with it.
    """
    generation = config.plan.slice.strip().lower().partition("-")[0]
    if not generation:
        raise ConfigError(
            f"plan.slice is empty; give --plan.slice v5p-128, or with --search a generation: {', '.join(CHIPS)}"
        )
    if config.plan.search:
        return search(config, generation)
    where = slice_named(config.plan.slice)
    arch = architecture_of(config)
    mesh = planned_meshes(config).get(where.name, config.mesh)
    check_divides(arch, _whole(mesh, where))
    return plan_run(config, where, mesh, arch)


def plan_command(config: RunConfig) -> list[str]:
    """What `rljax plan` prints, the compiler aside.

    Raises:
      ConfigError: as `planned`.
    """
    plan = planned(config)
    lines = describe(plan)
    if not config.plan.search:
        lines.append(_recommendation(plan, recommended(config, plan.where, plan.setting.arch)))
    return [*lines, *_listed(config)]


def _recommendation(plan: Plan, best: Plan | None) -> str:
    if best is None:
        return f"recommended: no mesh of {plan.where.name} fits; --search finds the smallest slice that does"
    if best.setting.mesh == plan.setting.mesh:
        return f"recommended: this mesh, with remat {best.memory.remat}"
    return (
        f"recommended: {_mesh_flags(best.setting.mesh)} with remat {best.memory.remat}: "
        f"{best.time.total:,.0f} s a step, peak {_gib(best.memory.peak)} GiB"
    )


def describe(plan: Plan) -> list[str]:
    """Memory by part, time by phase, and the cost, as lines of text."""
    setting, where, memory, time = plan.setting, plan.where, plan.memory, plan.time
    options = setting.config.plan
    names = list(dict.fromkeys(name for parts in memory.phases.values() for name in parts))
    table = [("GiB on each device", *memory.phases)]
    table += [(name, *(_gib(p[name]) if name in p else "" for p in memory.phases.values())) for name in names]
    table.append(("sum", *(_gib(sum(parts.values())) for parts in memory.phases.values())))
    seconds = [(name, f"{value:,.1f}", f"{100 * value / time.total:.0f} %") for name, value in time.seconds.items()]
    tokens = plan.tokens_per_second_per_chip
    lines = [
        f"{where.name}: {_counted(where.chips, 'chip')}, {_counted(where.devices, 'device')} of "
        f"{_gib(memory.usable)} usable GiB, {_counted(where.hosts, 'host')}",
        f"mesh: {mesh_text(setting.mesh)} ({_mesh_flags(setting.mesh)})",
        f"updates: remat {memory.remat}, micro-batches of {setting.microbatch:,} slots on each of "
        f"{setting.row_shards} row shards",
        f"sampler: {memory.shape.rows:,} rows at once on each row shard, {memory.shape.slots:,} slots each",
        "",
        *_aligned(table),
        "",
        f"{'fits' if memory.fits else 'DOES NOT FIT'}: the peak is {_gib(memory.peak)} GiB in {memory.peak_phase}, "
        f"{100 * memory.peak / memory.usable:.0f} % of what is usable",
        "",
        *_aligned([("seconds of a step", "", ""), *seconds, ("sum", f"{time.total:,.1f}", "")]),
        "",
        f"assumed: {options.sampler_share:g} of the roofline in sampling, {options.learner_share:g} in the learner "
        f"(plan.sampler_share, plan.learner_share); prompts of {options.prompt_tokens:g} and completions of "
        f"{options.completion_tokens:g} tokens",
        f"{tokens:,.0f} completion tokens/s a chip",
    ]
    if plan.steps:
        lines.append(
            f"{plan.steps:,} steps: {plan.hours:,.1f} hours of {_counted(where.chips, 'chip')}, "
            f"{plan.chip_hours:,.0f} chip-hours"
        )
    return lines


def _listed(config: RunConfig) -> list[str]:
    """What becomes of the run on each slice of `plan.meshes`."""
    if not config.plan.meshes:
        return []
    table = [("plan.meshes", "mesh", "fits", "remat", "peak GiB", "s a step", "recommended")]
    for name, mesh in planned_meshes(config).items():
        where = slice_named(name)
        plan, best = plan_run(config, where, mesh), recommended(config, where)
        table.append(
            (
                name,
                mesh_text(mesh),
                "yes" if plan.memory.fits else "no",
                plan.memory.remat,
                f"{_gib(plan.memory.peak)} of {_gib(plan.memory.usable)}",
                f"{plan.time.total:,.0f}",
                mesh_text(best.setting.mesh) if best else "none fits",
            )
        )
    return ["", *_aligned(table)]


def mesh_text(mesh: MeshConfig) -> str:
    """`1x8x8`: data, fsdp, tensor."""
    return "x".join(str(getattr(mesh, axis)) for axis in AXES)


def _mesh_flags(mesh: MeshConfig) -> str:
    return " ".join(f"--mesh.{axis} {getattr(mesh, axis)}" for axis in AXES)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(row[1:], wide[1:], strict=True))]).rstrip()
        for row in rows
    ]
