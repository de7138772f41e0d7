"""The device's side of one generate call: arrays, shardings and compiled programs behind the calls of `DecodeLoop`."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rljax.config import Architecture
from rljax.hosts import readable, to_devices
from rljax.mesh import ROWS, num_row_shards
from rljax.models.qwen2 import Params, block_dtype
from rljax.sampling import decode
from rljax.sampling.cache import PrefixCache, SuffixCache
from rljax.sampling.decode import DecodeState, Drawn, DrawSettings
from rljax.sampling.loop import HostDrawn
from rljax.sampling.programs import Programs
from rljax.sampling.schedule import FREE, LanePrompts, Shape
from rljax.types import Prompts


@dataclasses.dataclass(frozen=True)
class Shardings:
    """Where the arrays of a decode lie."""

    rows: NamedSharding  # [rows or lanes, ...]
    lines: NamedSharding  # [steps, rows]
    cache: NamedSharding  # [rows or lanes, K, ...]
    whole: NamedSharding

    @classmethod
    def on(cls, mesh: Mesh) -> "Shardings":
        """Rows over data and fsdp, key/value heads over tensor."""
        specs = ROWS, PartitionSpec(None, *ROWS), PartitionSpec(*ROWS, "tensor"), PartitionSpec()
        return cls(*(NamedSharding(mesh, spec) for spec in specs))

    def prefix(self, layers: int) -> PrefixCache:
        """Tree of shardings like a `PrefixCache`."""
        return PrefixCache([self.cache] * layers, [self.cache] * layers, self.rows)  # type: ignore[arg-type]

    def state(self, layers: int) -> DecodeState:
        """Tree of shardings like a `DecodeState`; 0 layers: one without a cache."""
        suffix = SuffixCache([self.cache] * layers, [self.cache] * layers)  # type: ignore[arg-type]
        return DecodeState(suffix, self.whole, *[self.rows] * 5)  # type: ignore[arg-type]

    def drawn(self) -> Drawn:
        """Tree of shardings like a `Drawn`, of which every process reads all."""
        lines, rows = readable(self.lines), readable(self.rows)
        return Drawn(*[lines] * 3, *[rows] * 2)  # type: ignore[arg-type]


class DecodeDevice:
    """Owns the caches and the state of one generate call.

    Args:
      programs: shared by the calls of a sampler, so that each is compiled once.
      sample_ids: [samples] uint32, what the draws of a sample are seeded with.
      limits: [samples] int32, cap of each completion.
    """

    def __init__(
        self,
        params: Params,
        arch: Architecture,
        mesh: Mesh,
        programs: Programs,
        *,
        prompts: Prompts,
        prompt_slots: int,
        sample_ids: np.ndarray,
        limits: np.ndarray,
        settings: DrawSettings,
        chunk: int,
    ) -> None:
        self._params, self._arch, self._programs, self._settings = params, arch, programs, settings
        self._prompts, self._prompt_slots, self._chunk = prompts, prompt_slots, chunk
        self._sample_ids, self._limits = sample_ids, limits
        self._mesh, self._shards, self._on = mesh, num_row_shards(mesh), Shardings.on(mesh)
        # On a GPU a loop of unknown length waits for the host at every step; elsewhere the end of the last row ends it.
        self._early_exit = mesh.devices.flat[0].platform != "gpu"
        self._prefix: Any = None
        self._state: Any = None

    # --------------------------------------------------------------------------------------------- what DecodeLoop asks

    def start(self, shape: Shape, prompts: LanePrompts, row_sample: np.ndarray) -> Drawn:
        """Runs the prompts of all lanes and draws the first token of every row."""
        self._prefix = self._state = None  # free the wave before
        tables = self._tables(prompts, row_sample)
        run = self._programs.get(
            ("start", shape, self._prompt_slots, self._variant), partial(self.lower_start, shape, tables)
        )
        self._prefix, self._state, drawn = run(self._params, *tables, self._settings)
        return _begin_copy(drawn)

    def admit(self, shape: Shape, lane: np.ndarray, prompts: LanePrompts, row_sample: np.ndarray) -> Drawn:
        """Puts prompts into the lanes `lane`, which count within a shard."""
        tables = self._tables(prompts, row_sample)
        lane_on_device = to_devices(lane.astype(np.int32), self._on.rows)
        arguments = (self._params, self._prefix, self._state, lane_on_device, *tables, self._settings)
        layers = self._arch.num_layers
        run = self._programs.get(
            ("admit", shape, len(lane), self._prompt_slots, self._variant),
            lambda: self._lower(
                partial(decode.admit, arch=self._arch, shards=self._shards),
                arguments,
                out_shardings=(self._on.prefix(layers), self._on.state(layers), self._on.drawn()),
                donate_argnums=(1, 2),
            ),
        )
        self._prefix, self._state, drawn = run(*arguments)
        return _begin_copy(drawn)

    def decode(self, shape: Shape) -> Drawn:
        """A chunk of every row."""
        run = self._programs.get(self._decode_key(shape), partial(self.lower_decode, shape))
        self._state, drawn = run(self._params, self._prefix, self._state, self._settings)
        return _begin_copy(drawn)

    def reshape(self, old: Shape, new: Shape, rows: np.ndarray | None, lanes: np.ndarray | None) -> None:
        """Goes on in `new` with the old `rows` [new rows] and `lanes` [new lanes]; None: with all, the ring grows."""
        state, prefix = self._state, self._prefix
        self._state = self._prefix = None  # a layer's old cache is freed when its new one is made
        suffix, slot = state.suffix, state.slot
        small: Any = dataclasses.replace(state, suffix=SuffixCache([], []))
        row_table = None
        if rows is not None:
            assert lanes is not None
            row_table, lane_table = (to_devices(t.astype(np.int32), self._on.rows) for t in (rows, lanes))
            small, lengths = self._take_program(old, new)(small, prefix.lengths, row_table, lane_table)
            self._take_layers(("lanes", old, new), prefix, lane_table, slot, self._prompt_slots)
            prefix = dataclasses.replace(prefix, lengths=lengths)
        self._take_layers(("rows", old, new), suffix, row_table, slot, new.slots)
        self._prefix, self._state = prefix, dataclasses.replace(small, suffix=suffix)

    def cancel(self, shape: Shape, rows: np.ndarray) -> None:
        """Ends `rows` (of all shards) where they are."""
        ended = np.zeros(shape.rows * self._shards, bool)
        ended[rows] = True
        stopped = jax.jit(jnp.logical_or, out_shardings=self._on.rows)(
            self._state.stopped, to_devices(ended, self._on.rows)
        )
        self._state = dataclasses.replace(self._state, stopped=stopped)

    @property
    def compilers(self) -> int:
        """Programs that `prepare` can have compiled at once."""
        return self._programs.compilers

    def prepare(self, shape: Shape) -> None:
        """Compiles in the background what decodes in `shape`."""
        self._programs.prepare(self._decode_key(shape), partial(self.lower_decode, shape))

    def read(self, drawn: Drawn) -> HostDrawn:
        """Waits for `drawn`."""
        return HostDrawn(*(np.asarray(getattr(drawn, field.name)) for field in dataclasses.fields(drawn)))

    # --------------------------------------------------------------------------------------------------------- programs

    @property
    def _variant(self) -> tuple[Any, ...]:
        """What of the settings is compiled in."""
        s = self._settings
        return s.truncation is not None, s.min_tokens is not None, len(s.stop_ids)

    def _decode_key(self, shape: Shape) -> tuple[Any, ...]:
        return "decode", shape, self._prompt_slots, self._chunk, self._variant

    def _lower(self, function: Any, arguments: Any, **options: Any) -> jax.stages.Lowered:
        """`function`, jitted with `options`, for `arguments`; it knows the mesh it is to run on."""
        with jax.set_mesh(self._mesh):
            return jax.jit(function, **options).lower(*arguments)

    def lower_start(self, shape: Shape, tables: Sequence[Any]) -> jax.stages.Lowered:
        """What `start` runs, for the tables of `_tables` or their shapes."""
        layers = self._arch.num_layers
        return self._lower(
            partial(decode.start_wave, arch=self._arch, slots=shape.slots, shards=self._shards),
            (self._params, *tables, self._settings),
            out_shardings=(self._on.prefix(layers), self._on.state(layers), self._on.drawn()),
        )

    def lower_decode(self, shape: Shape) -> jax.stages.Lowered:
        """What `decode` runs."""
        layers, arch = self._arch.num_layers, self._arch
        lanes, rows = shape.lanes * self._shards, shape.rows * self._shards
        dtype = block_dtype(self._params)
        heads, dim = arch.num_kv_heads, arch.head_dim

        def cache(rows: int, slots: int) -> tuple[list[Any], list[Any]]:
            key = jax.ShapeDtypeStruct((rows, heads, dim, slots), dtype, sharding=self._on.cache)
            value = jax.ShapeDtypeStruct((rows, heads, slots, dim), dtype, sharding=self._on.cache)
            return [key] * layers, [value] * layers

        def per(count: int, kind: Any) -> Any:
            return jax.ShapeDtypeStruct((count,), kind, sharding=self._on.rows)

        prefix = PrefixCache(*cache(lanes, self._prompt_slots), per(lanes, jnp.int32))
        slot: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._on.whole)
        kinds = jnp.int32, jnp.int32, jnp.bool_, jnp.int32, jnp.uint32
        state = DecodeState(SuffixCache(*cache(rows, shape.slots)), slot, *(per(rows, kind) for kind in kinds))
        return self._lower(
            partial(decode.decode_chunk, arch=arch, steps=self._chunk, early_exit=self._early_exit),
            (self._params, prefix, state, self._settings),
            out_shardings=(self._on.state(layers), self._on.drawn()),
            donate_argnums=2,
        )

    def _take_program(self, old: Shape, new: Shape) -> Any:
        program = jax.jit(
            partial(decode.take_rows, shards=self._shards), out_shardings=(self._on.state(0), self._on.rows)
        )
        key = "take", old.lanes, old.width, new.lanes, new.width
        return lambda *arguments: self._programs.get(key, lambda: program.lower(*arguments))(*arguments)

    def _take_layers(self, key: tuple[Any, ...], cache: Any, table: Any, slot: jax.Array, slots: int) -> None:
        """Layer by layer, so that no more than one is held twice."""
        program = jax.jit(
            partial(decode.take_cache, slots=slots, shards=self._shards), out_shardings=(self._on.cache, self._on.cache)
        )
        for layer in range(len(cache.keys)):
            arguments = cache.keys[layer], cache.values[layer], table, slot
            run = self._programs.get((*key, self._prompt_slots), lambda a=arguments: program.lower(*a))
            cache.keys[layer], cache.values[layer] = run(*arguments)

    def _tables(self, prompts: LanePrompts, row_sample: np.ndarray) -> tuple[jax.Array | None, ...]:
        """Tokens and lengths by prompt, its place by lane, ids and caps by row; nobody has a short prompt."""
        taken, prompt = prompts.prompts != FREE, np.maximum(prompts.prompts, 0)
        lengths = np.where(taken, self._prompts.lengths[prompt], 1)
        kept = self._prompts.tokens[:, : self._prompt_slots]
        tokens = np.zeros((len(prompt), self._prompt_slots), np.int32)
        tokens[:, : kept.shape[1]] = kept[prompt]
        rows, sample = row_sample != FREE, np.maximum(row_sample, 0)
        tables = (
            tokens,
            lengths.astype(np.int32),
            None if prompts.place is None else prompts.place.astype(np.int32),
            self._sample_ids[sample],
            np.where(rows, self._limits[sample], 0).astype(np.int32),
        )
        return tuple(None if table is None else to_devices(table, self._on.rows) for table in tables)


def _begin_copy(drawn: Drawn) -> Drawn:
    """Starts the copy to the host without waiting for it."""
    for leaf in jax.tree.leaves(drawn):
        leaf.copy_to_host_async()
    return drawn
