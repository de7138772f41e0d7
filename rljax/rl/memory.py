"""Which rung of the remat ladder an update's free memory allows."""

import dataclasses
import logging

import jax
from jax.sharding import Mesh

from rljax.config import Architecture
from rljax.costs import update_bytes
from rljax.hosts import least, processes_of
from rljax.mesh import free_bytes, num_row_shards
from rljax.models.attention import choose_backend
from rljax.models.scoring import chunk_tokens
from rljax.rl.packing import RowShape

logger = logging.getLogger(__name__)

LADDER = ("none", "dots", "full")
"""From the fastest, which keeps all activations, to the smallest."""

SHARE = 0.9
"""Of the free memory; the rest is for fragments and what the estimate does not know."""


@dataclasses.dataclass(frozen=True)
class Remat:
    """A rung, what an update needs with it, and what there is, on the fullest device."""

    rung: str
    needed_bytes: int
    """As `costs.update_bytes` estimates it."""
    free_bytes: int

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= SHARE * self.free_bytes

    def __str__(self) -> str:
        needed, free = self.needed_bytes / 2**30, self.free_bytes / 2**30
        return f"remat {self.rung}: an update needs about {needed:.2f} of the {free:.2f} GiB that a device has free"


def choose_remat(
    remat: str,
    arch: Architecture,
    mesh: Mesh,
    shape: RowShape,
    compute_dtype: str,
    trained_params: int,
    free: int | None = None,
) -> Remat:
    """`remat` if it is a rung; of "auto" the first of `LADDER` that fits, the last if none does. The log says which.

    All processes of a run get the same, and call it together. It depends on what is free now: call it when everything
    that lives through an update is in place, once, and keep the answer, for another rung rounds otherwise.

    Args:
      shape: of the rows of the updates.
      trained_params: those that have a gradient.
      free: bytes of a device; None: what the fullest has now.
    """
    free = _free_everywhere(mesh) if free is None else free
    tokens = shape.rows * shape.positions // num_row_shards(mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    with jax.set_mesh(mesh):
        dense = choose_backend(shape.positions, arch.head_dim, compute_dtype) == "dense"
        logits = chunk_tokens(tokens, arch.vocab_size) * arch.vocab_size

    def of(rung: str) -> Remat:
        needed = update_bytes(
            arch,
            "float32" if on_cpu else compute_dtype,  # where XLA:CPU keeps bfloat16 activations, too
            rung,
            tokens=tokens,
            scores=shape.positions if dense else 0,
            logits=logits,
            trained_params=trained_params,
            tensor=mesh.shape["tensor"],
            shards=mesh.shape["fsdp"] * mesh.shape["tensor"],
        )
        return Remat(rung, needed, free)

    rungs = [of(rung) for rung in (LADDER if remat == "auto" else (remat,))]
    chosen = next((rung for rung in rungs if rung.fits), rungs[-1])
    if chosen.fits:
        logger.info("%s", chosen)
    else:
        logger.warning(
            "%s, which may be too little; it goes on. If it runs out of memory: %sa smaller "
            "algorithm.microbatch_tokens (now %d slots a device), or more devices to split the model over",
            chosen,
            "" if chosen.rung == LADDER[-1] else "model.remat = full, ",
            tokens,
        )
    return chosen


def _free_everywhere(mesh: Mesh) -> int:
    """Bytes on the fullest device of all processes; of several in whole MiB, which an int32 counts."""
    free = free_bytes(mesh)
    return free if len(processes_of(mesh)) == 1 else least(free >> 20, mesh) << 20
