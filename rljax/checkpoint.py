"""Learner state and host state of a step, saved and restored as one unit. Every Orbax call of the project is here.

A step's folder holds the arrays and one JSON file: the caller's host state (data position, counters, config) and a
manifest with the shape, dtype and digest of every leaf. Orbax renames the folder into place when all of it is written,
so a step is there whole or not at all. It does not notice a flipped bit (9 to 12 of 12 went unseen): the digest does.

    checkpoints/20/state/...            arrays
    checkpoints/20/host/data.json       {"host": ..., "leaves": {"params.embed": [[64, 128], "float32", ...]}, "sha256"}
    checkpoints/10.bad                  a step that could not be restored, set aside
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp  # the API that Orbax 1.0 keeps; works in full in 0.12.8

from rljax.config import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------------- digest


@jax.jit
def _leaf_digest(leaf: jax.Array) -> jax.Array:
    """[2] uint32: the sum of the leaf's bits, and their sum weighted by a hash of where they stand, modulo 2**32.

    Integer sums are exact in any order, so every sharding and device count gives the same two numbers. The first sees
    any single flipped bit, the second sees values that changed places. Detects corruption, not an attacker.
    """
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32))
    bits = bits.astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # The finisher of MurmurHash3; odd, so that no bit of a value is multiplied away.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> shift)) * np.uint32(factor)
    weight = (index ^ (index >> 16)) | 1
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * weight, dtype=jnp.uint32)])


def digests(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
    """16 hex digits per leaf, computed on the device; the same for every sharding."""
    # addressable_data: a full copy is here even where the leaf itself spans hosts, the sums are replicated.
    sums = jax.device_get([_leaf_digest(leaf).addressable_data(0) for leaf in leaves.values()])
    return {path: f"{plain:08x}{weighted:08x}" for path, (plain, weighted) in zip(leaves, sums, strict=True)}


# -------------------------------------------------------------------------------------------------------------- store


class CheckpointStore:
    """Steps of one run in `folder`, the newest `keep` of them.

    Saves run in the background: `save` waits for the one before and copies the arrays to the host before it returns, so
    the caller may donate them. A failed background save raises at the next `save`, `wait` or `close`, once; the steps
    before it stay, and the store can go on saving.

    Args:
      folder: made if absent; half-written steps in it are removed.
      keep: complete steps kept. None: only read, and change nothing (a run may be writing there right now).

    Raises:
      ConfigError: `keep` is None and there is no such folder.
    """

    def __init__(self, folder: str | Path, keep: int | None) -> None:
        self._folder = Path(folder).absolute()
        self._read_only = keep is None
        if keep is None and not self._folder.is_dir():
            raise ConfigError(f"checkpoint folder {folder} does not exist; give the `checkpoints` folder of a run")
        self._keep = keep
        self._steps = self._open()
        self._saving = None

    def _open(self) -> ocp.training.Checkpointer:
        if not self._read_only and jax.process_index() == 0:
            # Not by Orbax's option: it cleans in the background, and fails if a write of a failed save is in flight.
            for half_written in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half_written, ignore_errors=True)
        context = ocp.Context()
        context.checkpointables.registry = ocp.handlers.local_registry().add(
            ocp.handlers.JsonHandler, checkpointable_name="host"
        )
        context.pytree.loading.partial_load = True  # `_check_template` is the stricter check
        policies = ocp.training.preservation_policies
        return ocp.training.Checkpointer(
            str(self._folder),
            context=context,
            # Orbax's own annotation of LatestN does not fit its protocol.
            preservation_policy=policies.LatestN(self._keep),  # pyright: ignore[reportArgumentType]
        )

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return [checkpoint.step for checkpoint in self._steps.checkpoints]

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Starts saving a step.

        Args:
          step: later than every step saved so far.
          state: tree of jax arrays, typed keys included.
          host: whatever else is needed to go on, as JSON; comes back as JSON gives it (tuples as lists).

        Raises:
          CheckpointError: this step, or the one before, which is waited for, could not be written.
        """
        assert not self._read_only, "this store was opened only to read"
        self.wait()
        leaves = _flatten(state)
        for path, leaf in leaves.items():
            assert isinstance(leaf, jax.Array), f"{path} is a {type(leaf).__name__}; a checkpoint holds jax arrays"
            assert leaf.size, f"{path} is empty, of shape {leaf.shape}; Orbax cannot save it"
        sums = digests(leaves)
        content = {
            "host": json.loads(json.dumps(host)),
            "leaves": {path: [*_signature(leaf), sums[path]] for path, leaf in leaves.items()},
        }
        content["sha256"] = _sha256(content)
        with self._writing(step):
            # force: when to save is the caller's decision, not a policy's.
            saving = self._steps.save_checkpointables_async(step, {"state": leaves, "host": content}, force=True)
        assert saving is not None, f"Orbax did not save step {step}"
        self._saving = step, saving

    def wait(self) -> None:
        """Returns when the last save is complete on disk.

        Raises:
          CheckpointError: it could not be written.
        """
        begun, self._saving = self._saving, None
        if begun is not None:
            step, saving = begun
            with self._writing(step):
                saving.result()

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """What fails in it is a `CheckpointError`. An Orbax checkpointer raises the error of one failed save at every
        later one; a new one does not, and frees the space of the half-written step."""
        try:
            yield
        except Exception as error:
            self._steps = self._open()
            raise CheckpointError(
                f"step {step} could not be saved in {self._folder}: {error!r}; it holds step {self.latest_step()}. "
                "Make room there or repair what is named, and give the same command again"
            ) from error

    def close(self) -> None:
        """Waits, then lets go."""
        try:
            self.wait()
        finally:
            self._steps.close()

    def restore(self, template: Any, *, step: int | None = None, partial: bool = False) -> tuple[Any, dict, int]:
        """(state, host, step) of the newest step that is whole, its bits checked against the saved digests.

        A step that cannot be read, or whose bits changed, is reported, the one before it is tried, and on success the
        bad ones are set aside as `STEP.bad`.

        Args:
          template: tree of `ShapeDtypeStruct` with shardings; the arrays are placed on them.
          step: exactly this step; None: the newest good one.
          partial: the template may leave out leaves: `{"params": ...}` reads the parameters only.

        Raises:
          ConfigError: no step can be restored; or the template's paths, shapes or dtypes are not those saved.
        """
        self.wait()
        candidates = [s for s in reversed(self.steps()) if step is None or s == step]
        if not candidates:
            raise ConfigError(
                f"checkpoint step {'latest' if step is None else step} was asked for, and {self._folder} holds "
                f"{self.steps() or 'no complete step'}; give another folder or step"
            )
        failures: dict[int, str] = {}
        for candidate in candidates:
            state = host = error = None
            try:
                state, host = self._load(candidate, template, partial)
            except ConfigError:
                raise
            except Exception as caught:  # Orbax and TensorStore raise many types for a damaged file
                error = caught
            # Either all processes go on with this step or none does.
            if _on_no_process(error is not None):
                assert host is not None, "loaded without an error, so there is a host state"
                self._set_aside(list(failures))
                return state, host, candidate
            while error is not None and (cause := error.__cause__ or error.__context__) is not None:
                error = cause  # Orbax's own wrapper speaks of an incompatible handler whatever happened
            failures[candidate] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            logger.warning("CHECKPOINT step %d CANNOT BE RESTORED (%s)", candidate, failures[candidate])
        raise ConfigError(
            f"no step of {self._folder} can be restored ({'; '.join(f'{s}: {why}' for s, why in failures.items())}). "
            "Nothing was changed. Put a copy of the folder back, or start over in another run_dir"
        )

    def _load(self, step: int, template: Any, partial: bool) -> tuple[Any, dict]:
        content = self._steps.load_checkpointables(step, {"host": None})["host"]
        if content.pop("sha256") != _sha256(content):
            raise ValueError("host/data.json changed since it was saved")
        wanted = _flatten(template)
        _check_template(content["leaves"], wanted, partial)
        leaves = self._steps.load_checkpointables(step, {"state": wanted})["state"]
        for path, digest in digests(leaves).items():
            if digest != content["leaves"][path][2]:
                raise ValueError(
                    f"the bits of {path} are not those saved: digest {digest}, {content['leaves'][path][2]}"
                )
        return jax.tree.unflatten(jax.tree.structure(template), [leaves[path] for path in wanted]), content["host"]

    def _set_aside(self, bad_steps: list[int]) -> None:
        """Renames bad steps, or they would count as the newest, and go on to push good ones out of `keep`."""
        if self._read_only or not bad_steps:
            return
        for step in bad_steps:
            if jax.process_index() == 0:
                aside = self._folder / f"{step}.bad"
                number = 1
                while aside.exists():
                    number += 1
                    aside = self._folder / f"{step}.bad{number}"
                (self._folder / str(step)).rename(aside)
                logger.warning("checkpoint step %d is now %s; delete it when you no longer need it", step, aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("rljax bad checkpoints set aside")
        self._steps.reload()


def _flatten(tree: Any) -> dict[str, Any]:
    """{"params.layers.q": leaf}: paths of our own, so that a file does not depend on optax's classes."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _signature(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _on_no_process(flag: bool) -> bool:
    if jax.process_count() == 1:
        return not flag
    return not np.any(multihost_utils.process_allgather(np.array([flag])))


def _check_template(saved: Mapping[str, list], wanted: Mapping[str, Any], partial: bool) -> None:
    """Orbax casts to a dtype asked for without a word; here anything that differs is refused, by name."""
    for path, leaf in wanted.items():
        assert leaf.sharding is not None, f"the template's {path} has no sharding; say where it goes"
        if path not in saved:
            raise ConfigError(
                f"the checkpoint has no {path}, which this run needs; continue with the model and optimizer it was "
                "saved with, or start in another run_dir"
            )
        (shape, dtype), (want_shape, want_dtype) = saved[path][:2], _signature(leaf)
        if [shape, dtype] != [want_shape, want_dtype]:
            raise ConfigError(
                f"{path} is {dtype} of shape {shape} in the checkpoint and {want_dtype} of shape {want_shape} in this "
                "run; continue with the model it was saved with, or start in another run_dir"
            )
    extra = [path for path in saved if path not in wanted]
    if extra and not partial:
        raise ConfigError(
            f"the checkpoint holds {extra[0]} ({len(extra)} such), which this run does not have; continue with the "
            "model and optimizer it was saved with, or start in another run_dir"
        )
