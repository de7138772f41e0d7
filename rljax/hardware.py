"""Accelerators by arithmetic's needs: rates, memory, links, and what a slice's name stands for. No JAX.

TPU rates are those of the TPU page of "How to Scale Your Model" (jax-ml/scaling-book, tpus.md) and of Google Cloud's
pages on each generation; GPU rates those of NVIDIA's data sheets, dense. Usable bytes of a TPU are what its compiler
says a program may use; those of a GPU the share of its memory that JAX takes unless told otherwise, 0.75
(`XLA_PYTHON_CLIENT_MEM_FRACTION`). The names and sizes of slices are MaxText's (accelerator_to_spec_map.py).
"""

import dataclasses
import difflib

from rljax.config import ConfigError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation. Rates and bytes are of one JAX device, which on TPU7x is half a chip, elsewhere a chip."""

    platform: str
    """As JAX names it: `tpu` or `gpu`."""
    flops: float
    """bfloat16 FLOP/s."""
    memory_bytes: int
    """HBM."""
    usable_bytes: int
    """Of it, what programs may use."""
    memory_rate: float
    """Bytes/s of HBM."""
    link_rate: float
    """Bytes/s that a device sends in a ring of its slice or host: two links of a TPU, one each way round; NVLink."""
    host_devices: int
    """Devices of a host in a slice of several."""
    sizes: tuple[int, ...]
    """Numbers that follow the generation in the name of a slice."""
    counts_cores: bool = False
    """Those numbers count TensorCores, two to a chip; otherwise chips."""
    devices_per_chip: int = 1
    network_rate: float = 0.0
    """Bytes/s of a device to another host, where that is not a link like others; 0: it is."""
    largest_host: int = 0
    """Devices of the largest host that is a slice by itself; 0: `host_devices`."""


_FLAT = (1, 4, 8, 16, 32, 64, 128, 256)
"""v5e and v6e: 1x1, 2x2, 2x4, 4x4 ... 16x16."""
_CUBES = (8, 16, 32, 64, 128, 256, 384, 512, 1024, 1536, 2048, 4096)
"""v4 and v5p: 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4 ..., in cores; v5p has more between."""
_NODES = (1, 2, 4, *range(8, 1025, 8))

CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 275e12, 32 * 10**9, int(31.25 * _GIB), 1.2e12, 2 * 4.5e10, 4, _CUBES, counts_cores=True),
    "v5e": Chip("tpu", 197e12, 16 * 10**9, int(15.75 * _GIB), 8.1e11, 2 * 4.5e10, 4, _FLAT, largest_host=8),
    "v5p": Chip("tpu", 459e12, 95 * 10**9, int(95.74 * _GIB), 2.77e12, 2 * 9e10, 4, _CUBES, counts_cores=True),
    "v6e": Chip("tpu", 918e12, 32 * 10**9, int(31.25 * _GIB), 1.64e12, 2 * 9e10, 4, _FLAT, largest_host=8),
    # Ironwood: 2,307 TFLOP/s, 192 GiB, 7.4 TB/s and, both ways, 1,200 GB/s over six links a chip; two devices each.
    "tpu7x": Chip(
        "tpu", 2307e12 / 2, 96 * _GIB, int(94.75 * _GIB), 7.4e12 / 2, 2 * 1e11 / 2, 8,
        (8, 16, 32, 64, 128, 256, 512, 1024, 2048), counts_cores=True, devices_per_chip=2,
    ),
    # NVLink both ways: 900 GB/s (Hopper), 600 (Ampere); InfiniBand of a usual node: 400 and 200 Gb/s a GPU.
    "a100": Chip("gpu", 312e12, 80 * 10**9, int(0.75 * 79.25 * _GIB), 2.04e12, 3e11, 8, _NODES, network_rate=2.5e10),
    "h100": Chip("gpu", 989e12, 80 * 10**9, int(0.75 * 79.65 * _GIB), 3.35e12, 4.5e11, 8, _NODES, network_rate=5e10),
    "h200": Chip("gpu", 989e12, 141 * 10**9, int(0.75 * 139.8 * _GIB), 4.8e12, 4.5e11, 8, _NODES, network_rate=5e10),
}  # fmt: skip
"""By the beginning of a slice's name."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some chips that one run has for itself."""

    name: str
    chip: Chip
    chips: int

    @property
    def devices(self) -> int:
        """As JAX counts them: the product of the mesh."""
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        """Machines, and processes of a run."""
        alone = self.chip.largest_host or self.chip.host_devices
        return 1 if self.devices <= alone else -(-self.devices // self.chip.host_devices)

    def rate_between(self, devices: int) -> float:
        """Bytes/s a device sends in a ring of so many of this slice's."""
        outside = self.chip.network_rate and devices > self.chip.host_devices
        return self.chip.network_rate if outside else self.chip.link_rate


def slices_of(generation: str) -> list[Slice]:
    """All slices of a generation, the smallest first."""
    chip = _chip(generation, generation)
    return [
        Slice(f"{generation}-{size}", chip, size // 2 if chip.counts_cores else size) for size in sorted(chip.sizes)
    ]


def slice_named(name: str) -> Slice:
    """`v5p-128`: 64 chips on 16 hosts, for v4, v5p and tpu7x count TensorCores; `v6e-8`: 8 chips; `h200-8`: 8 GPUs.

    Raises:
      ConfigError: no such generation, or none of this size.
    """
    generation, _, number = name.strip().lower().partition("-")
    chip = _chip(generation, name)
    if not number.isdigit() or int(number) not in chip.sizes:
        said = f"{name!r} names no slice of {generation}"
        counted = "TensorCores, two to a chip" if chip.counts_cores else "GPUs" if chip.platform == "gpu" else "chips"
        near = sorted(chip.sizes, key=lambda size: abs(size - int(number)))[0] if number.isdigit() else chip.sizes[0]
        sizes = "1, 2, 4 or a multiple of 8" if chip.platform == "gpu" else ", ".join(map(str, chip.sizes))
        raise ConfigError(
            f"plan.slice = {said}: the number counts {counted}, and there are {sizes}; the nearest is "
            f"{generation}-{near}"
        )
    return next(found for found in slices_of(generation) if found.name == f"{generation}-{int(number)}")


def _chip(generation: str, name: str) -> Chip:
    if generation not in CHIPS:
        near = difflib.get_close_matches(generation, CHIPS, n=1)
        hint = f"perhaps you meant {near[0]}; " if near else ""
        raise ConfigError(
            f"plan.slice = {name!r} is of no generation known here; {hint}give one of {', '.join(CHIPS)} and a size, "
            "such as v5p-128"
        )
    return CHIPS[generation]
