"""The programs of a run compiled for TPUs that are not here: whether they compile and fit, and what they send.

job = Job(ARCHITECTURES["qwen2.5-72b"], make_mesh(MeshConfig(fsdp=16, tensor=4), tpu_devices("v5p-128")))
print(compile_program(job, "update").fits)

The jitted functions are those of training, for arrays that are only described. libtpu (extra `tpu`) compiles without a
TPU. No time and no number is learnt from it, and bytes between hosts of several slices are not seen.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from rljax.config import AlgorithmConfig, Architecture, ConfigError, OptimizerConfig
from rljax.costs import num_params
from rljax.hlo import Collective, Module, Traffic
from rljax.mesh import LEARNER_RULES, microbatch_sharding, num_row_shards, param_shardings, replicated
from rljax.models import qwen2
from rljax.rl.learner import reference_dtype, state_shapes, update_shape
from rljax.rl.memory import choose_remat
from rljax.rl.packing import RowShape, batch_shapes
from rljax.rl.update import Compute, grpo_update
from rljax.sampling.decode import DrawSettings
from rljax.sampling.device import DecodeDevice, Shardings
from rljax.sampling.engine import EngineOptions, Sampler, bucket
from rljax.sampling.loop import Plan
from rljax.sampling.memory import rows_that_fit
from rljax.sampling.programs import Programs
from rljax.sampling.schedule import Shape, most_prompts
from rljax.types import TrainState

# ------------------------------------------------------------------------------------------------------------- slices


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice by its name at the cloud, and libtpu's name for it."""

    topology: str
    chips: int
    options: tuple[tuple[str, Any], ...] = ()


_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
_ONE = (("chips_per_host_bounds", (1, 1, 1)),)

SLICES: dict[str, Slice] = {
    **{f"{kind}-1": Slice(f"{kind}:1x1", 1, _ONE) for kind in ("v5e", "v6e")},
    **{f"{kind}-{chips}": Slice(f"{kind}:{dims}", chips) for kind in ("v5e", "v6e") for chips, dims in _FLAT.items()},
    **{f"v5p-{2 * chips}": Slice(f"v5p:{dims}", chips) for chips, dims in _CUBES.items()},
}
"""v5p-N counts TensorCores, two to a chip; v5e-N and v6e-N chips. A JAX device is a chip in all of them."""

HBM_BYTES = {
    "TPU v5 lite": int(15.75 * 2**30),
    "TPU v6 lite": int(31.25 * 2**30),
    "TPU v5": int(95.74 * 2**30),
}
"""What libtpu lets programs of a device use, by `device_kind`."""

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
"""Neither a metadata server nor a TPU is looked for, two processes may compile at once, and no log files are left."""


def has_libtpu() -> bool:
    """Whether anything can be compiled here."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_devices(name: str) -> Sequence[Any]:
    """Devices of the slice `name` that programs can be compiled for and nothing else.

    The process should stay on its CPU: start it with JAX_PLATFORMS=cpu.

    Raises:
      ConfigError: no such slice, or no libtpu.
    """
    if name not in SLICES:
        raise ConfigError(f"slice = {name!r} is not one of {', '.join(SLICES)}; give one of these")
    if not has_libtpu():
        raise ConfigError("compiling for TPUs needs libtpu, which is not installed; pip install 'rljax[tpu]'")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    known = SLICES[name]
    return topologies.get_topology_desc(known.topology, platform="tpu", **dict(known.options)).devices


# ---------------------------------------------------------------------------------------------------------------- job


@dataclasses.dataclass(frozen=True)
class Job:
    """What is compiled: a model on a mesh, learner and sampler on the same devices, and the sizes of a step.

    Sizes that follow from memory are those a run would choose: micro-batch, rung of remat, rows of a decode.
    """

    arch: Architecture
    mesh: Mesh
    prompts: int = 512
    """Of a step."""
    prompt_tokens: int = 2048
    completion_tokens: int = 4096
    algorithm: AlgorithmConfig = dataclasses.field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    options: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    compute_dtype: str = "bfloat16"
    remat: str = "auto"

    @property
    def hbm_bytes(self) -> int:
        """Of a chip."""
        return HBM_BYTES[self.mesh.devices.flat[0].device_kind]

    @functools.cached_property
    def params(self) -> qwen2.Params:
        """Learner's parameters, float32."""
        shapes = qwen2.param_shapes(self.arch)
        shardings = param_shardings(self.mesh, shapes, qwen2.param_axes(self.arch), LEARNER_RULES)
        return jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)

    @functools.cached_property
    def state(self) -> TrainState:
        return state_shapes(self.params, self.optimizer, self.mesh)

    @functools.cached_property
    def sampler(self) -> Sampler:
        return Sampler(
            None, self.arch, self.mesh, stop_ids=(0, 1), compute_dtype=self.compute_dtype, options=self.options
        )

    @property
    def reference_bytes(self) -> int:
        """Of the reference model on a chip; 0 without one."""
        if not self.algorithm.kl_coefficient:
            return 0
        dtype = reference_dtype(self.algorithm, self.compute_dtype)
        return bytes_per_chip(jax.tree.map(lambda s: s.update(dtype=jnp.dtype(dtype)), self.params))

    @property
    def row_shape(self) -> RowShape:
        """Of the arrays of an update."""
        prompts = self.prompts // self.algorithm.updates_per_step
        slots = bucket(self.prompt_tokens)
        return update_shape(self.arch, self.mesh, self.algorithm, prompts, slots, self.completion_tokens)

    @functools.cached_property
    def rung(self) -> str:
        """Of remat."""
        free = self.hbm_bytes - bytes_per_chip(self.state) - self.reference_bytes
        trained = num_params(self.arch)
        shape = self.row_shape
        return choose_remat(self.remat, self.arch, self.mesh, shape, self.compute_dtype, trained, free).rung

    @functools.cached_property
    def plan(self) -> Plan:
        """Of a step's rollouts."""
        free = self.hbm_bytes - bytes_per_chip((self.state, self.sampler.shapes)) - self.reference_bytes
        slots, group = bucket(self.prompt_tokens), self.algorithm.group_size
        rows = rows_that_fit(
            self.sampler.arch, self.compute_dtype, self.mesh, slots, self.completion_tokens, group, max(free, 0)
        )
        return Plan.make(
            samples_per_prompt=group,
            num_prompts=self.prompts,
            prompt_slots=slots,
            max_tokens=self.completion_tokens,
            max_rows=self.options.max_rows or rows,
            shards=num_row_shards(self.mesh),
            chunk=self.options.chunk_tokens,
            growth=self.options.growth,
            compact=self.options.compact,
            refill=self.options.refill,
        )

    @property
    def decode_device(self) -> DecodeDevice:
        """What lowers the sampler's programs."""
        whole = replicated(self.mesh)

        def scalar(dtype: Any, *dims: int) -> Any:
            return jax.ShapeDtypeStruct(dims, dtype, sharding=whole)

        settings = DrawSettings(scalar(jax.random.key(0).dtype), scalar(jnp.float32), scalar(jnp.int32, 2), None, None)
        nothing: Any = None
        return DecodeDevice(
            self.sampler.shapes,
            self.sampler.arch,
            self.mesh,
            Programs(),
            prompts=nothing,
            prompt_slots=self.plan.prompt_slots,
            sample_ids=nothing,
            limits=nothing,
            settings=settings,
            chunk=self.plan.chunk,
        )


def bytes_per_chip(tree: Any) -> int:
    """Of a tree of `ShapeDtypeStruct` with shardings."""
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(tree))


# ----------------------------------------------------------------------------------------------------------- programs


@dataclasses.dataclass(frozen=True)
class Lowering:
    """A program before it is compiled, and what is known of its memory beforehand; bytes of a chip."""

    lowered: jax.stages.Lowered
    batch: str
    """What it works on, in words."""
    donated_bytes: int
    resident_bytes: int
    """Of what lies beside it in a run on the same devices and is no argument of it."""
    cache_bytes: int = 0
    """Of the smallest array of the suffix cache that a step writes; 0: it has none."""


def _update(job: Job) -> Lowering:
    shape, count = job.row_shape, jax.ShapeDtypeStruct((), jnp.int32)
    compute = Compute(job.compute_dtype, job.rung, head_dtype=job.compute_dtype)
    constants: dict[str, Any] = {"arch": job.arch, "algorithm": job.algorithm, "optimizer": job.optimizer}
    with jax.set_mesh(job.mesh):
        lowered = grpo_update.lower(
            job.state,
            batch_shapes(shape, microbatch_sharding(job.mesh)),
            count,
            None,
            count,
            **constants,
            compute=compute,
        )
    batch = f"{shape.num_microbatches} x {shape.rows} x {shape.positions}, remat {job.rung}"
    return Lowering(lowered, batch, bytes_per_chip(job.state), job.reference_bytes)


def _prefill(job: Job) -> Lowering:
    plan, on = job.plan, Shardings.on(job.mesh)
    shape = Shape(*plan.levels[0], plan.slots[0])
    prompts = plan.shards * most_prompts(shape.lanes, plan.samples_per_prompt // shape.width)
    lanes, rows = plan.shards * shape.lanes, plan.shards * shape.rows

    def table(dtype: Any, *dims: int) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=on.rows)

    tables = (
        table(jnp.int32, prompts, plan.prompt_slots),
        table(jnp.int32, prompts),
        None if prompts == lanes else table(jnp.int32, lanes),
        table(jnp.uint32, rows),
        table(jnp.int32, rows),
    )
    lowered = job.decode_device.lower_start(shape, tables)
    batch = f"{prompts} prompts, {rows} rows of {shape.slots} slots"
    return Lowering(lowered, batch, 0, bytes_per_chip(job.state) + job.reference_bytes)


def _decode(job: Job) -> Lowering:
    plan, arch, on = job.plan, job.sampler.arch, Shardings.on(job.mesh)
    shape = Shape(*plan.levels[0], plan.slots[-1])
    rows = plan.shards * shape.rows
    layer = (rows, arch.num_kv_heads, shape.slots, arch.head_dim)
    each = bytes_per_chip(jax.ShapeDtypeStruct(layer, jnp.dtype(job.compute_dtype), sharding=on.cache))
    batch = f"{rows} rows of {shape.slots} slots, {plan.shards * shape.lanes} prompts"
    return Lowering(
        job.decode_device.lower_decode(shape),
        batch,
        2 * arch.num_layers * each,
        bytes_per_chip(job.state) + job.reference_bytes,
        each,
    )


def _sync(job: Job) -> Lowering:
    layers, index = job.params["layers"], jax.ShapeDtypeStruct((), jnp.int32)
    sampler = job.sampler  # made out here: it makes a key, and within the mesh that would be done on its devices
    with jax.set_mesh(job.mesh):
        lowered = sampler.layer_to_sampler.lower(layers, index)
    held = (job.state, sampler.shapes)
    beside = bytes_per_chip(held) - bytes_per_chip((layers, sampler.shapes["layers"][0]))
    return Lowering(lowered, "a layer", 0, beside + job.reference_bytes)


PROGRAMS: dict[str, Callable[[Job], Lowering]] = {
    "update": _update,
    "prefill": _prefill,
    "decode": _decode,
    "sync": _sync,
}
"""An update, the start of a wave, a chunk of its decode in the largest cache, and the weight sync of a layer."""


# ---------------------------------------------------------------------------------------------------------- the result


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program. Bytes are of a chip."""

    program: str
    batch: str
    compile_seconds: float
    hbm_bytes: int
    resident_bytes: int
    """Of what lies beside it in a run on the same devices and is no argument of it."""
    donated_bytes: int
    argument_bytes: int = 0
    output_bytes: int = 0
    temporary_bytes: int = 0
    alias_bytes: int = 0
    collectives: tuple[Collective, ...] = ()
    traffic: dict[int, Traffic] = dataclasses.field(default_factory=dict)
    """What a chip sends, as `hlo.Module.traffic`: of an update under 1 in a micro-batch, but for what it sends in each
    chunk of its loss head, which is under 2."""
    cache_copies: int = 0
    """Copies as large as a layer's suffix cache inside the loops of a decode, within the main memory."""
    cache_moves: int = 0
    """The same between it and the fast memory, where the compiler takes a layer's cache to be read from there."""
    refusal: str = ""
    """The compiler's own words where it found that it does not fit; its counts are then not known."""

    @property
    def needed_bytes(self) -> int:
        """At once, that beside it included."""
        own = self.argument_bytes + self.output_bytes + self.temporary_bytes - self.alias_bytes
        return own + self.resident_bytes

    @property
    def fits(self) -> bool:
        return not self.refusal and self.needed_bytes <= self.hbm_bytes

    @property
    def donation_aliases(self) -> bool:
        """Whether what is donated lies where the result does."""
        return self.alias_bytes >= self.donated_bytes


def compile_program(job: Job, program: str) -> Compiled:
    """Compiles one of `PROGRAMS`.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refused it for another reason than its memory.
    """
    start = time.perf_counter()
    lowering = PROGRAMS[program](job)
    known = {
        "program": program,
        "batch": lowering.batch,
        "hbm_bytes": job.hbm_bytes,
        "resident_bytes": lowering.resident_bytes,
        "donated_bytes": lowering.donated_bytes,
    }
    try:
        compiled = lowering.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(**known, compile_seconds=time.perf_counter() - start, refusal=str(error).splitlines()[0])
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    module = Module.parse(compiled.as_text() or "")
    return Compiled(
        **known,
        compile_seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        collectives=module.collectives(),
        traffic=module.traffic(),
        cache_copies=module.copies_in_loops(lowering.cache_bytes) if lowering.cache_bytes else 0,
        cache_moves=module.copies_in_loops(lowering.cache_bytes, moves=True) if lowering.cache_bytes else 0,
    )
