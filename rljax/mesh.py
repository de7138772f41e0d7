"""Devices as a grid `(data, fsdp, tensor)`, and what of each array lies where.

Arrays name their dims logically (`rljax/models/qwen2.py`); two rule tables say which mesh axis splits which name.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rljax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))
"""Leading dim of every batch of rows."""

Rules = Mapping[str, str | None]

LEARNER_RULES: Rules = {"vocab": "tensor", "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
"""Parameters, gradients and optimizer state: every matrix is split twice."""

SAMPLER_RULES: Rules = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
"""Decoding: never over fsdp, or the weights would cross the network once per token."""


def whole_mesh(config: MeshConfig, count: int, what: str) -> MeshConfig:
    """`config` with the axis that is -1 filled in from `count` devices, which an error calls `what`.

    Raises:
      ConfigError: the axes do not multiply to that number.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    given = ", ".join(f"mesh.{axis} = {size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"{given}: axes are positive, and at most one is -1 (what is left); set the others")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = count // fixed
    if fixed * (sizes[free[0]] if free else 1) != count:
        raise ConfigError(
            f"{given}: the fixed axes multiply to {fixed} and must {'divide' if free else 'multiply to'} {count}, "
            f"{what}; change one, or set it to -1 to take what is left"
        )
    return MeshConfig(**sizes)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (`jax.Device`s; default: all).

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = whole_mesh(config, len(devices), "the number of devices here")
    shape = [getattr(sizes, axis) for axis in AXES]
    grid = np.asarray(devices).reshape(shape)
    if devices[0].platform == "tpu":  # neighbours of an axis should be so in the torus, too
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform() -> str:
    """What is compiled for, "cpu", "gpu" or "tpu": that of the mesh entered (`jax.set_mesh`), else of this process.

    The two differ where programs are compiled for a machine that is not here (`rljax/aot.py`).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def tensor_shards() -> int:
    """Devices that split heads and columns on the mesh entered; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def num_row_shards(mesh: Mesh) -> int:
    """Shards a batch of rows is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dim split over data and fsdp."""
    return NamedSharding(mesh, ROWS)


def microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """`[M, b, ...]`: the rows of each micro-batch split, the micro-batches not."""
    return NamedSharding(mesh, PartitionSpec(None, *ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, shapes: Any, axes: Any, rules: Rules) -> Any:
    """Tree of shardings for a tree of shapes and a same-structured tree of logical axis names.

    Key/value heads that are fewer than the devices to split them, and a divisor of those, are split within each head.

    Raises:
      ConfigError: a dim is not a multiple of the mesh axis that splits it.
    """

    def sharding(path: Any, leaf: Any, names: tuple[str, ...]) -> NamedSharding:
        spec = [rules.get(name) for name in names]
        if "kv_heads" in names and "head_dim" in names:
            place = names.index("kv_heads")
            axis, heads = spec[place], leaf.shape[place]
            if axis is not None and mesh.shape[axis] > heads and mesh.shape[axis] % heads == 0:
                spec[place], spec[names.index("head_dim")] = None, axis
        for size, name, axis in zip(leaf.shape, names, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                fits = [n for n in range(1, mesh.shape[axis] + 1) if size % n == 0]
                raise ConfigError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide {name} = {size} of parameter "
                    f"{jax.tree_util.keystr(path)} {tuple(leaf.shape)}; "
                    f"the nearest that does is mesh.{axis} = {fits[-1]}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, shapes, axes)


def free_bytes(mesh: Mesh) -> int:
    """Unused memory of the fullest of this process's devices; its share of the machine's where the backend is silent.

    Raises:
      RuntimeError: neither the backend nor the machine says.
    """
    devices = mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in each for each in stats):
        return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // len(devices)
    raise RuntimeError(
        f"neither {devices[0]} nor {meminfo} says how much memory is free; give sampling.max_rows and model.remat"
    )
