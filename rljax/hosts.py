"""Several processes as one run: how they start, what they tell each other, how they stop.

Every process runs the same program on the same prompts. Arrays of the learner span all of their devices; each samples
and scores its own block of the prompts on its own devices, and `exchange` brings the results together, so that all go
on with the same numbers. Processes whose devices split the same layers (`sampling_mesh`) decode their blocks together,
in lockstep: each asks for the same programs in the same order, and reads all that they draw. Only process 0 writes
files, but for checkpoints, which all write together.
"""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from rljax.config import PREEMPTED, ConfigError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_HEARTBEAT_SECONDS = 30
"""A process that was killed is missed after this; JAX's default is 100."""

_LEAST_CPU_THREADS = 8
_FAREWELL_SECONDS = 5
"""For processes that fail of the same to say so."""

# -------------------------------------------------------------------------------------------------------------- start


def start() -> None:
    """Joins the other processes of the run, before anything else uses a device; alone, does nothing.

    JAX finds the others by itself on TPU pods (also of GKE), under SLURM and Open MPI, and with its extra `k8s` in a
    Kubernetes job. Elsewhere every process is told in its environment: JAX_COORDINATOR_ADDRESS, host:port of process 0;
    JAX_NUM_PROCESSES; JAX_PROCESS_ID, from 0. JAX_NUM_PROCESSES=1 on its own: nobody is looked for.

    Raises:
      ConfigError: only some of the three are set, or they contradict.
      RuntimeError: the others do not come within five minutes.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in (_ADDRESS, _COUNT, _INDEX) if os.environ.get(name)}
    if given == {_COUNT: "1"}:
        return
    told = _told(given)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, **told)
    except ValueError:  # what JAX raises where it finds no cluster
        if told:
            raise
        return
    except RuntimeError as error:
        if told or "before any JAX calls" not in str(error):
            raise
        return  # devices are in use already: a notebook, a test
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # or CPU processes could not compute together
    # XLA reads it where there is no accelerator: a program that waits for another process holds a thread of its pool,
    # which has one per core, and on a machine with few of them none was left for what the other waited for.
    os.environ.setdefault("NPROC", str(max(os.cpu_count() or 1, _LEAST_CPU_THREADS)))


def _told(given: dict[str, str]) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` that the environment gives; none: JAX is to find them."""
    if not given:
        return {}
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    if len(given) < 3:
        missing = [name for name in (_ADDRESS, _COUNT, _INDEX) if name not in given]
        raise ConfigError(
            f"the environment has {said} and not {' and '.join(missing)}; set all three in every process, or none "
            "where JAX finds the others by itself (TPU pods, SLURM)"
        )
    count, index = given[_COUNT], given[_INDEX]
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)) or ":" not in given[_ADDRESS]:
        raise ConfigError(
            f"{said}: the address must be HOST:PORT, and the id a number from 0 that is below the number of processes; "
            "set them so"
        )
    return {
        "coordinator_address": given[_ADDRESS],
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def leave(code: int) -> None:
    """Ends a process that failed without the goodbye that JAX waits for at exit: the others are stuck in a collective
    operation, and learn it from the missing heartbeats. Returns where there are no others."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(_FAREWELL_SECONDS)  # without the coordinator, which is here, JAX ends the others at once
        os._exit(code)


# ------------------------------------------------------------------------------------------------------------ devices


def devices_by_process() -> list[Any]:
    """All devices of the run, those of a process next to each other: so the last mesh axis stays within a host."""
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


def sampling_mesh(mesh: Mesh) -> Mesh:
    """The part of `mesh` that this process decodes on, a row a tensor group: those that hold a device of its own or of
    a process it shares such a group with. Where no group has devices of several processes, its own devices."""
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    members = [{device.process_index for device in group} for group in groups]
    together: set[int] = set()
    found = {jax.process_index()}
    while found != together:
        together = found
        found = together.union(*(group for group in members if group & together))
    here = [bool(group & together) for group in members]
    if all(here) or _is_elsewhere(mesh):
        return mesh
    return Mesh(groups[here][None], mesh.axis_names, axis_types=mesh.axis_types)


def processes_of(mesh: Mesh) -> tuple[int, ...]:
    """Those with devices in `mesh`, in their order."""
    if _is_elsewhere(mesh):
        return (jax.process_index(),)
    return tuple(sorted({device.process_index for device in mesh.devices.flat}))


def _is_elsewhere(mesh: Mesh) -> bool:
    """Of a slice that is only compiled for (`rljax/aot.py`)."""
    return set(jax.devices()).isdisjoint(mesh.devices.flat)


def readable(sharding: NamedSharding) -> NamedSharding:
    """`sharding` where all of its devices are this process's; else the whole array on each, for every process to
    read."""
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    return sharding if len(processes_of(mesh)) == 1 else NamedSharding(mesh, PartitionSpec())


def least(count: int, mesh: Mesh) -> int:
    """The least `count`, below 2^31, that a process of `mesh` gives; all of them call it together."""
    if len(processes_of(mesh)) == 1:
        return count
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    counts = jax.make_array_from_callback((mesh.size,), each, lambda _: np.full(1, count, np.int32))
    return int(jax.jit(jnp.min, out_shardings=NamedSharding(mesh, PartitionSpec()))(counts))


def local_part(tree: Any, mesh: Mesh) -> Any:
    """`tree` of arrays that are the same on every row of their mesh, as arrays on the rows that `mesh` has of it
    (`sampling_mesh`); nothing is copied."""

    def part(array: jax.Array) -> jax.Array:
        assert isinstance(array.sharding, NamedSharding)
        shards = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, NamedSharding(mesh, array.sharding.spec), shards)

    return jax.tree.map(part, tree)


def to_devices(tree: Any, sharding: Sharding) -> Any:
    """`tree` of arrays on `sharding`; NumPy arrays must be the same on every process, which copies its part."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, sharding)
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def to_host(array: jax.Array) -> np.ndarray:
    """All of `array`, on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


# ----------------------------------------------------------------------------------------------------------- exchange

_LEAST_BYTES = 1 << 16
_MOST_BYTES = 1 << 28
"""Gathered at once, all processes together: every device holds that much for a moment."""


def block_of(process: int, count: int) -> slice:
    """Of `count` rows those of a process: blocks in the order of the processes, as equal as can be."""
    processes = jax.process_count()
    return slice(process * count // processes, (process + 1) * count // processes)


def exchange(payload: bytes) -> list[bytes]:
    """The payloads of all processes, in their order, on every one of them; all call it together."""
    processes = jax.process_count()
    if processes == 1:
        return [payload]
    assert len(payload) < 1 << 31, f"{len(payload)} bytes are more than an int32 counts"
    sizes = multihost_utils.process_allgather(np.array([len(payload)], np.int32)).reshape(-1)
    # A program is compiled for every size: few sizes, then.
    most = max(_LEAST_BYTES, 1 << (_MOST_BYTES // processes).bit_length() - 1)
    part = min(most, max(_LEAST_BYTES, 1 << int(sizes.max()).bit_length()))
    parts: list[list[bytes]] = [[] for _ in range(processes)]
    for first in range(0, int(sizes.max()), part):
        piece, mine = np.zeros(part, np.uint8), np.frombuffer(payload[first : first + part], np.uint8)
        piece[: len(mine)] = mine
        for received, one in zip(parts, multihost_utils.process_allgather(piece), strict=True):
            received.append(one.tobytes())
    return [b"".join(received)[:size] for received, size in zip(parts, sizes.tolist(), strict=True)]


def wait_for_all(what: str) -> None:
    """Returns when every process has come to `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


# --------------------------------------------------------------------------------------------------------- preemption


class Preempted(SystemExit):
    """The run was told to stop (SIGTERM) and has saved its step: exit code 75, which a launcher starts again."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class Preemption:
    """Notices a SIGTERM and says after which step to save and stop: on all processes the same. A context manager.

    JAX has a handler of its own in a process that `start` joined to others, and tells them; another one would take the
    signal from it. Elsewhere one is installed here, for as long as the context lasts; a second SIGTERM ends the process
    at once.
    """

    def __init__(self) -> None:
        self._noticed = self._installed = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before, self._installed = signal.signal(signal.SIGTERM, self._notice), True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`; to be asked after every step, by all processes."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noticed
