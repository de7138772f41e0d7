"""What the TPU compiler says of a run's programs on a slice that is not here: `rljax plan --compile`."""

from collections.abc import Iterator

import jax

from rljax.aot import PROGRAMS, Compiled, Job, compile_program, tpu_devices
from rljax.config import ConfigError
from rljax.footprint import program_bytes
from rljax.mesh import make_mesh
from rljax.plan import Plan
from rljax.sampling.engine import EngineOptions

_LOOPS = ("once", "in each turn of a loop", "in each turn of a loop within one", "in each turn of the innermost loops")
_OFTEN = ("in all", "in each turn of the loop over micro-batches or tokens", "in each turn of a loop within that")
"""By loops of unknown length; those of known length, over layers and round rings, are gone through."""


def job_of(plan: Plan) -> Job:
    """The run of `plan`, to be compiled for its slice and mesh.

    Raises:
      ConfigError: libtpu is not installed, or the slice is not one it is known to compile for.
    """
    setting, config = plan.setting, plan.setting.config
    return Job(
        setting.arch,
        make_mesh(setting.mesh, tpu_devices(plan.where.name)),
        prompts=config.data.prompts_per_step,
        prompt_tokens=config.data.max_prompt_tokens,
        completion_tokens=config.sampling.max_completion_tokens,
        algorithm=config.algorithm,
        optimizer=config.optimizer,
        options=EngineOptions.of(config.sampling),
        compute_dtype=setting.compute_dtype,
        remat=config.model.remat,
    )


def compiled_lines(plan: Plan) -> Iterator[str]:
    """Lines of text on each program, as soon as it is compiled, which takes minutes.

    Raises:
      ConfigError: as `job_of`; at the end, if a program does not fit or does not reuse what it is given.
    """
    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left to the run that has it
    job, wrong = job_of(plan), []
    for name in PROGRAMS:
        found = compile_program(job, name)
        yield ""
        yield from describe(found, planned_bytes=sum(_planned(plan, name)))
        if found.refusal:
            wrong.append(f"the compiler refuses its {name}: {found.refusal}")
        elif not found.fits:
            wrong.append(f"its {name} needs {_gib(found.needed_bytes)} GiB of {_gib(found.hbm_bytes)}")
        elif not found.donation_aliases:
            wrong.append(f"its {name} holds what it is given twice")
    if wrong:
        raise ConfigError(
            f"this run does not go on {plan.where.name} as it is set up: {'; '.join(wrong)}; choose another mesh or "
            "slice, or shorter completions"
        )


def describe(found: Compiled, planned_bytes: int) -> list[str]:
    """A program as text.

    Args:
      planned_bytes: of the same program, by arithmetic.
    """
    head = f"{found.program}, compiled in {found.compile_seconds:.0f} s: {found.batch}"
    if found.refusal:
        return [head, f"  DOES NOT FIT: {found.refusal}"]
    own = found.needed_bytes - found.resident_bytes
    lines = [
        head,
        f"  {'fits' if found.fits else 'DOES NOT FIT'}: {_gib(found.needed_bytes)} GiB of {_gib(found.hbm_bytes)}, "
        f"{_gib(found.resident_bytes)} of them beside it; its own {_gib(own)} (planned {_gib(planned_bytes)})",
        f"  arguments {_gib(found.argument_bytes)}, results {_gib(found.output_bytes)}, of them in the arguments' "
        f"place {_gib(found.alias_bytes)}, temporaries {_gib(found.temporary_bytes)} GiB",
    ]
    if found.cache_copies:
        lines.append(f"  copies arrays as large as a layer's cache in each step: {found.cache_copies}")
    if found.cache_moves:
        lines.append(f"  takes such arrays into the fast memory or back in each step: {found.cache_moves}")
    for one in found.collectives:
        often = _LOOPS[min(one.loops, len(_LOOPS) - 1)]
        lines.append(f"  {one.count} {one.kind}, {one.bytes / 2**20:,.1f} MiB a device, {often}")
    for loops, sent in found.traffic.items():
        lines.append(f"  sends {sent.bytes / 2**20:,.1f} MiB in {sent.count:,} collectives {_OFTEN[min(loops, 2)]}")
    return lines


def _planned(plan: Plan, program: str) -> Iterator[int]:
    memory = plan.memory
    yield from program_bytes(plan.setting, program, remat=memory.remat, shape=memory.shape).values()  # type: ignore[arg-type]


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"
