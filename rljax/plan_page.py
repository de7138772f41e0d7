"""What the runs of the paper cost, as a page: `rljax plan --costs configs/paper > configs/paper/README.md`."""

import dataclasses
from pathlib import Path

from rljax.config import ConfigError, RunConfig
from rljax.config_file import parse_config
from rljax.hardware import slice_named
from rljax.plan import Plan, mesh_text, plan_run, planned_meshes

RUNS = 3
"""Of each size and kind in the paper."""
REUSES = (2, 5, 20, 25, 50, 100)
"""tau of its runs with fewer unique prompts: 100 steps each. tau 1 is a main run."""
GROUPS = (4, 16, 32)
"""Completions per prompt of its other runs; 8 is a main run."""
_ABLATED = "qwen2.5-7b"
"""The size of those runs, base and instruct, one of each."""

_ABOUT = """\
# The paper's runs, and what they cost

Written by `rljax plan --costs configs/paper > configs/paper/README.md`; nothing here is measured. Each file is a run of
arXiv:2509.25300: one of its seven sizes, base or instruct, its recipe, its data as `rljax data prepare guru-math`
writes them to `data/guru`, and a mesh for each slice that it was planned on. To run one on its first slice, and to see
what another would do:

    rljax train configs/paper/qwen2.5-0.5b.yaml
    rljax plan configs/paper/qwen2.5-0.5b.yaml --plan.slice v5p-8
    rljax plan configs/paper/qwen2.5-72b.yaml --plan.slice v5p --search

Memory is of the longest prompts and completions, time of lengths with the paper's means. A step has its rollouts, both
rescoring passes, four updates, the weight sync and the evaluation on the 500 held-out problems that follows every step.
"""


def page(folder: str | Path) -> str:
    """Markdown of all YAML files of `folder`.

    Raises:
      ConfigError: there is none; one of them names no slices, or does not fit on one.
    """
    files = sorted(Path(folder).glob("*.yaml"), key=lambda file: _order(file.stem))
    if not files:
        raise ConfigError(f"{folder} holds no YAML file; give a folder of configs such as configs/paper")
    configs = {file.stem: parse_config([str(file)]) for file in files}
    plans = {name: plans_of(name, config) for name, config in configs.items()}
    shares = next(iter(configs.values())).plan
    lines = [
        _ABOUT,
        f"Assumed: {shares.sampler_share:g} of the data sheet's roofline in sampling and {shares.learner_share:g} in "
        "the learner,\nshares measured on an H200 with models up to 7B (`rljax/config.py` says how); a TPU may do "
        "better or worse.",
        "",
        f"One run, and the {RUNS} that the paper made of each:",
        "",
        "| config | slice | chips | hosts | mesh | remat | GiB a device | s a step | tokens/s a chip | hours "
        f"| chip-hours | of {RUNS} runs |",
        "|---|---|---:|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in plans.items():
        lines += [_row(f"`{name}.yaml`", plan) for plan in found]
    first = [found[0] for found in plans.values()]
    total = RUNS * sum(plan.chip_hours for plan in first)
    lines += ["", f"All {RUNS * len(first)} on the first slice of each: {total:,.0f} chip-hours, of unlike chips.", ""]
    lines += _ablations({name: config for name, config in configs.items() if name.startswith(_ABLATED)})
    return "\n".join([*lines, ""])


def plans_of(name: str, config: RunConfig) -> list[Plan]:
    """On each slice that the config names.

    Raises:
      ConfigError: it names none, or does not fit on one.
    """
    found = [plan_run(config, slice_named(where), mesh) for where, mesh in planned_meshes(config).items()]
    if not found:
        raise ConfigError(f"{name}: plan.meshes is empty; list slices with their meshes, as in v5p-128 1x8x8")
    for plan in found:
        if not plan.memory.fits:
            raise ConfigError(
                f"{name} does not fit on {plan.where.name} with the mesh {mesh_text(plan.setting.mesh)} of its "
                f"plan.meshes; `rljax plan` with --plan.slice {plan.where.name} recommends another"
            )
    return found


def _order(name: str) -> tuple[float, str]:
    """By size: `qwen2.5-0.5b-instruct` is (0.5, ...)."""
    sizes = [part[:-1] for part in name.split("-") if part[:1].isdigit() and part.endswith("b")]
    return (float(sizes[0]) if sizes else 0.0, name)


def _row(name: str, plan: Plan) -> str:
    memory, where = plan.memory, plan.where
    cells = (
        name,
        where.name,
        f"{where.chips}",
        f"{where.hosts}",
        mesh_text(plan.setting.mesh),
        memory.remat,
        f"{memory.peak / 2**30:.1f} of {memory.usable / 2**30:.1f}",
        f"{plan.time.total:,.0f}",
        f"{plan.tokens_per_second_per_chip:,.0f}",
        f"{plan.hours:,.1f}",
        f"{plan.chip_hours:,.0f}",
        f"{RUNS * plan.chip_hours:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _ablations(configs: dict[str, RunConfig]) -> list[str]:
    """Its other runs, each on the first slice of its config that holds it."""
    if not configs:
        return []
    lines = [
        "The paper's other runs, one of each: prompts used tau times (`--data.subset paper`, `--data.unique` 51,200 "
        "/ tau,\n`--data.repeats` tau), and other group sizes (`--algorithm.group_size`), here with the mean length of "
        "groups of 8.\nEach is on the first slice of its config that holds it.",
        "",
        "| config | runs | slice | s a step | hours each | chip-hours in all |",
        "|---|---|---|---:|---:|---:|",
    ]
    total = 0.0
    for name, config in configs.items():
        variants = [("tau " + ", ".join(map(str, REUSES)), dataclasses.replace(config, steps=100), len(REUSES))]
        for group in GROUPS:
            algorithm = dataclasses.replace(config.algorithm, group_size=group)
            variants.append((f"groups of {group}", dataclasses.replace(config, algorithm=algorithm), 1))
        for what, variant, count in variants:
            found = [plan_run(variant, slice_named(where), mesh) for where, mesh in planned_meshes(config).items()]
            plan = next((plan for plan in found if plan.memory.fits), None)
            if plan is None:
                raise ConfigError(f"{name} with {what} fits on no slice of its plan.meshes; add a larger one")
            total += count * plan.chip_hours
            lines.append(
                f"| `{name}.yaml` | {what} | {plan.where.name} | {plan.time.total:,.0f} | {plan.hours:,.1f} | "
                f"{count * plan.chip_hours:,.0f} |"
            )
    return [*lines, "", f"Together {total:,.0f} chip-hours."]
