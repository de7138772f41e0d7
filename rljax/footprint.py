"""What of a run lies in the memory of one device, part by part, by arithmetic: no array, no device, no compiler.

A run holds the learner's state and the reference all the time (`resident`). Beside them come and go the arguments and
temporaries of its programs (`program_bytes`): the sampler's weights are made (`sync`), layer by layer; prompts are run
(`prefill`) and completions drawn (`decode`) with their caches; and, the sampler's weights freed, rows are learnt from
(`update`).

Letters as in `config.Architecture`: L layers, D hidden_size, N query heads, K key-value heads, H head_dim, F mlp_size,
V vocab_size.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from rljax.config import Architecture, ConfigError, MeshConfig, RunConfig
from rljax.costs import BYTES, kept_bytes_per_token, kv_bytes_per_token, update_parts
from rljax.mesh import LEARNER_RULES, SAMPLER_RULES, Rules
from rljax.models.attention import DENSE_UP_TO
from rljax.models.layers import with_a_kv_head_each
from rljax.models.scoring import MAX_CHUNK
from rljax.rl.memory import LADDER, SHARE
from rljax.rl.packing import RowShape, row_shape
from rljax.sampling.decode import PREFILL_SCORES
from rljax.sampling.memory import rows_in
from rljax.sampling.schedule import Shape, slot_ladder

Program = Literal["prefill", "decode", "update", "sync"]
Parts = dict[str, int]
"""Bytes on one device by what they are of."""

_BATCH_BYTES = 10 * 4 + 1
"""Of a slot of `types.TrainBatch`."""

# ------------------------------------------------------------------------------------------------------------- weights


@dataclasses.dataclass(frozen=True)
class Weight:
    """Parameters that lie alike."""

    name: str
    count: int
    """Such arrays in the model: L for those of a layer."""
    dims: tuple[tuple[int, str], ...]
    """Size and logical name of each dim, as `models/qwen2.py` declares them."""

    @property
    def size(self) -> int:
        return self.count * math.prod(size for size, _ in self.dims)

    def on_device(self, mesh: MeshConfig, rules: Rules) -> int:
        """Entries on each device."""
        split = math.prod(getattr(mesh, axis) for _, name in self.dims if (axis := rules.get(name)))
        return self.size // split


def weights(arch: Architecture) -> list[Weight]:
    """All parameters; q|k|v and gate|up of the sampler's layout lie as they do apart."""
    size, layers = (arch.hidden_size, "embed"), arch.num_layers
    heads, kv, head = (arch.num_heads, "heads"), (arch.num_kv_heads, "kv_heads"), (arch.head_dim, "head_dim")
    mlp, vocab, norm = (arch.mlp_size, "mlp"), (arch.vocab_size, "vocab"), (arch.hidden_size, "norm")
    found = [
        Weight("norms", 2 * layers, (norm,)),
        Weight("q", layers, (size, heads, head)),
        Weight("k and v", 2 * layers, (size, kv, head)),
        Weight("o", layers, (heads, head, size)),
        Weight("gate, up, down", 3 * layers, (size, mlp)),
        Weight("embed", 1, (vocab, size)),
        Weight("final norm", 1, (norm,)),
    ]
    if not arch.tied_embeddings:
        found.append(Weight("head", 1, (size, vocab)))
    if arch.qkv_bias:
        found += [Weight("q bias", layers, (heads, head)), Weight("k and v bias", 2 * layers, (kv, head))]
    if arch.qk_norm:
        found.append(Weight("query and key norms", 2 * layers, ((arch.head_dim, "norm"),)))
    return found


_OUTSIDE = ("embed", "final norm", "head")
"""Of no layer."""
MATRICES = ("q", "k and v", "o", "gate, up, down")
"""What Muon moves, with one moment each."""


def params_on_device(arch: Architecture, mesh: MeshConfig, rules: Rules = LEARNER_RULES) -> int:
    """Parameters on each device."""
    return sum(weight.on_device(mesh, rules) for weight in weights(arch))


def check_divides(arch: Architecture, mesh: MeshConfig) -> None:
    """Refuses a mesh that a parameter cannot be split over.

    Raises:
      ConfigError: says which axis, which size, and the nearest choices that work.
    """
    for axis, name, size, of in _split_dims(arch):
        given = getattr(mesh, axis)
        if _divides(given, name, size):
            continue
        fits = sizes_that_divide(arch, axis)
        below, above = max(n for n in fits if n < given), [n for n in fits if n > given]
        also = f", above it {min(above)}" if above else ""
        raise ConfigError(
            f"mesh.{axis} = {given} does not divide {name} = {size} of {of}; of what divides all that {axis} splits in "
            f"this model the nearest below is mesh.{axis} = {below}{also}"
        )


def sizes_that_divide(arch: Architecture, axis: str) -> list[int]:
    """Sizes of a mesh axis that go with every dim it splits; of data any, so 1."""
    dims = [(name, size) for of, name, size, _ in _split_dims(arch) if of == axis]
    common = math.gcd(*(size for name, size in dims if name != "kv_heads")) if dims else 1
    return [n for n in range(1, common + 1) if common % n == 0 and all(_divides(n, *dim) for dim in dims)]


def _split_dims(arch: Architecture) -> list[tuple[str, str, int, str]]:
    """(mesh axis, dim's name, its size, what it is of) of all dims that are split."""
    return [
        (axis, name, size, weight.name)
        for rules in (LEARNER_RULES, SAMPLER_RULES)
        for weight in weights(arch)
        for size, name in weight.dims
        if (axis := rules.get(name)) is not None
    ]


def _divides(shards: int, name: str, size: int) -> bool:
    """Key/value heads may also be fewer than the shards, each then copied for several (`layers.copy_kv_heads`)."""
    return size % shards == 0 or (name == "kv_heads" and shards % size == 0)


# ------------------------------------------------------------------------------------------------------------- a run


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run on a mesh, as far as bytes go: prompts and completions are planned for at their longest.

    Args:
      config: its own mesh is not looked at.
      mesh: every axis positive.
      platform: tpu or gpu.
    """

    config: RunConfig
    arch: Architecture
    mesh: MeshConfig
    platform: str = "tpu"

    def __post_init__(self) -> None:
        if self.config.lora.rank:
            raise ConfigError(
                f"lora.rank = {self.config.lora.rank}: the memory of a run with an adapter is not planned; set it to 0 "
                "for an upper bound, all parameters trained"
            )
        check_divides(self.arch, self.mesh)

    @property
    def compute_dtype(self) -> str:
        """`model.compute_dtype`; auto is bfloat16 on both platforms."""
        given = self.config.model.compute_dtype
        return "bfloat16" if given == "auto" else given

    @property
    def row_shards(self) -> int:
        """Devices, or groups of them, with rows of their own."""
        return self.mesh.data * self.mesh.fsdp

    @property
    def shards(self) -> int:
        """Devices that share one copy of the learner's parameters."""
        return self.mesh.fsdp * self.mesh.tensor

    @property
    def prompt_slots(self) -> int:
        return self.config.data.max_prompt_tokens

    @property
    def max_tokens(self) -> int:
        """Longest completion."""
        return self.config.sampling.max_completion_tokens

    @cached_property
    def sampler_arch(self) -> Architecture:
        """The model as the sampler holds it: no device of `tensor` is without a key/value head."""
        return with_a_kv_head_each(self.arch, self.mesh.tensor)

    @cached_property
    def rows(self) -> RowShape:
        """Shape of the arrays of an update."""
        algorithm = self.config.algorithm
        return row_shape(
            self.arch,
            self.prompt_slots,
            self.max_tokens,
            algorithm.group_size,
            completions=self.config.data.prompts_per_step // algorithm.updates_per_step * algorithm.group_size,
            row_shards=self.row_shards,
            microbatch_tokens=algorithm.microbatch_tokens,
            platform=self.platform,
        )

    @property
    def microbatch(self) -> int:
        """Slots of a micro-batch on each device."""
        return self.rows.rows * self.rows.positions // self.row_shards

    @property
    def _slot_ladder(self) -> Sequence[int]:
        """Lengths of the cache of completions, as it grows."""
        sampling = self.config.sampling
        return slot_ladder(self.max_tokens, sampling.chunk_tokens, sampling.cache_growth)

    def first_shape(self, shape: Shape) -> Shape:
        """`shape` when its prompts have been run."""
        return dataclasses.replace(shape, slots=self._slot_ladder[0])

    def decode_shape(self, free: int) -> Shape:
        """Rows that the sampler decodes at once on each shard where `free` bytes are left, in the longest cache."""
        config, group = self.config, self.config.algorithm.group_size
        rows = max(1, config.sampling.max_rows // self.row_shards)
        if not config.sampling.max_rows:
            rows = rows_in(
                max(free, 0),
                self.sampler_arch,
                self.compute_dtype,
                prompt_slots=self.prompt_slots,
                max_tokens=self.max_tokens,
                samples_per_prompt=group,
                tensor=self.mesh.tensor,
            )
        slots = self._slot_ladder[-1]
        prompts = -(-config.data.prompts_per_step // self.row_shards)
        if prompts * group <= rows:
            return Shape(prompts, group, slots)
        if config.sampling.refill:  # every row has a prompt of its own
            return Shape(rows, 1, slots)
        return Shape(max(1, rows // group), group, slots)


# ------------------------------------------------------------------------------------------------------------- parts


def resident(setting: Setting) -> Parts:
    """What is held all the time."""
    config, arch, mesh = setting.config, setting.arch, setting.mesh
    parts = {**train_state(setting)}
    if config.algorithm.kl_coefficient > 0:
        wide = config.algorithm.reference_update == "ema" or config.model.head_dtype == "float32"
        size = 4 if wide else BYTES[setting.compute_dtype]
        parts["reference"] = size * params_on_device(arch, mesh)
    return parts


def sampler_weights(setting: Setting) -> int:
    """Bytes; held from one sync to the next update."""
    return BYTES[setting.compute_dtype] * params_on_device(setting.sampler_arch, setting.mesh, SAMPLER_RULES)


def train_state(setting: Setting) -> Parts:
    """Of `TrainState`, but for its counters."""
    optimizer, mesh = setting.config.optimizer, setting.mesh
    entries = {weight.name: weight.on_device(mesh, LEARNER_RULES) for weight in weights(setting.arch)}
    single = sum(entries[name] for name in MATRICES) if optimizer.name == "muon" else 0
    total = sum(entries.values())
    return {"master weights": 4 * total, "moments": BYTES[optimizer.moments_dtype] * (2 * total - single)}


def program_bytes(setting: Setting, program: Program, *, remat: str = "full", shape: Shape | None = None) -> Parts:
    """Arguments, results that take no argument's place, and temporaries of one program.

    Args:
      remat: rung of an update.
      shape: of prefill and decode, per shard: `Setting.decode_shape`.

    Raises:
      ValueError: a decode without a shape.
    """
    if program == "update":
        return train_state(setting) | update_work(setting, remat)
    if program == "sync":
        layers = setting.arch.num_layers
        size = BYTES[setting.compute_dtype]
        return {
            "master weights": 4 * layers * layer_on_device(setting.arch, setting.mesh, LEARNER_RULES),
            "sampler weights": size * layer_on_device(setting.sampler_arch, setting.mesh, SAMPLER_RULES),
            "temporaries": sync_work(setting),
        }
    if shape is None:
        raise ValueError(f"{program} needs a shape: how many rows, lanes and slots each shard has")
    held = {"sampler weights": sampler_weights(setting)}
    if program == "decode":
        return held | {"KV cache": cache_bytes(setting, shape), "temporaries": decode_work(setting, shape)}
    cache = cache_bytes(setting, setting.first_shape(shape))
    logits = _prefill_logits(setting, shape)
    # The memory of the cache, which is its result, serves for the rest until it is written.
    work = max(logits, prefill_work(setting, shape) - cache)
    return held | {"KV cache": cache, "temporaries": work}


def update_work(setting: Setting, remat: str) -> Parts:
    """What an update needs beside the state: its rows, gradients, activations, the loss head, temporaries."""
    rows, arch = setting.rows, setting.arch
    parts = update_parts(
        arch,
        setting.compute_dtype,
        remat,
        tokens=setting.microbatch,
        scores=rows.positions if rows.positions <= DENSE_UP_TO else 0,
        logits=min(setting.microbatch, MAX_CHUNK) * arch.vocab_size,
        trained_params=sum(weight.size for weight in weights(arch)),
        tensor=setting.mesh.tensor,
        shards=setting.shards,
    )
    if setting.platform == "gpu" and rows.positions > DENSE_UP_TO:  # cuDNN's mask, a bool and a bfloat16 of each pair
        parts["temporaries"] += 3 * setting.microbatch * rows.positions
    return {"rows": rows.num_microbatches * setting.microbatch * _BATCH_BYTES} | parts


def sync_work(setting: Setting) -> int:
    """Temporaries of the weight sync of a layer: as it comes from the other devices, before it is fused."""
    return BYTES[setting.compute_dtype] * layer_on_device(setting.sampler_arch, setting.mesh, SAMPLER_RULES)


def layer_on_device(arch: Architecture, mesh: MeshConfig, rules: Rules) -> int:
    """Parameters of one layer on each device."""
    layers = [weight for weight in weights(arch) if weight.name not in _OUTSIDE]
    return sum(weight.on_device(mesh, rules) for weight in layers) // arch.num_layers


def cache_bytes(setting: Setting, shape: Shape) -> int:
    """Keys and values of prompts, once per lane, and of completions."""
    slots = shape.lanes * setting.prompt_slots + shape.rows * shape.slots
    return slots * kv_bytes_per_token(setting.sampler_arch, setting.compute_dtype) // setting.mesh.tensor


def decode_work(setting: Setting, shape: Shape) -> int:
    """Temporaries of a chunk of decoding: three times the logits in float32, one layer's scores, twice."""
    arch, tensor = setting.arch, setting.mesh.tensor
    scores = arch.num_heads * (setting.prompt_slots + shape.slots)
    return shape.rows * 4 * (3 * arch.vocab_size + 2 * scores) // tensor


def prefill_work(setting: Setting, shape: Shape) -> int:
    """Temporaries of running the prompts of all lanes beside a cache that is in use: one layer's activations of a piece
    of them, the logits of their last tokens twice, and where there are several pieces the prompts' cache once more."""
    arch, tensor, dtype, slots = setting.sampler_arch, setting.mesh.tensor, setting.compute_dtype, setting.prompt_slots
    prompts = shape.lanes if shape.width > 1 else -(-shape.lanes // setting.config.algorithm.group_size)
    piece = max(1, PREFILL_SCORES // (arch.num_heads * slots * slots))
    count = next(n for n in range(-(-prompts // piece), prompts + 1) if prompts % n == 0)
    scores = slots if slots <= DENSE_UP_TO else 0
    layer = kept_bytes_per_token(arch, dtype, "none", scores=scores, tensor=tensor, split_residual=False)
    layer += 4 * BYTES[dtype] * arch.mlp_size // tensor
    again = prompts * slots * kv_bytes_per_token(arch, dtype) // tensor if count > 1 else 0
    return prompts // count * slots * layer + _prefill_logits(setting, shape) + again


def _prefill_logits(setting: Setting, shape: Shape) -> int:
    """Of the last tokens of the prompts, twice."""
    return 2 * 4 * shape.lanes * setting.arch.vocab_size // setting.mesh.tensor


# -------------------------------------------------------------------------------------------------------------- phases


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What one device of a run holds, and where the most of it is."""

    usable: int
    remat: str
    """The rung of the updates: the first that fits, or the last."""
    shape: Shape
    """Decoded at most, per shard."""
    phases: dict[str, Parts]
    """Of rollout, update and sync, all that is there then; a sync's when its last layer is made."""

    @property
    def peak(self) -> int:
        """Bytes of the fullest phase."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def fits(self) -> bool:
        """Every phase lies within what is usable, an update with the reserve that a run wants for it."""
        held = sum(self.phases["update"][part] for part in self.phases["update"] if part not in _OF_UPDATE)
        work = sum(self.phases["update"][part] for part in self.phases["update"] if part in _OF_UPDATE)
        return self.peak <= self.usable and work <= SHARE * (self.usable - held)


_OF_UPDATE = ("rows", "gradients", "activations", "embedding", "loss head", "temporaries")


def footprint(setting: Setting, usable: int) -> Footprint:
    """Of a run on devices with `usable` bytes each, as it would choose its rung of remat and the rows it decodes."""
    held = resident(setting)
    free = usable - sum(held.values())
    sampler = {"sampler weights": sampler_weights(setting)}
    rungs = LADDER if setting.config.model.remat == "auto" else (setting.config.model.remat,)
    works = {rung: update_work(setting, rung) for rung in rungs}
    rung = next((rung for rung in rungs if sum(works[rung].values()) <= SHARE * free), rungs[-1])
    shape = setting.decode_shape(free - sampler["sampler weights"])
    rollout = {
        "KV cache": cache_bytes(setting, shape),
        "temporaries": max(decode_work(setting, shape), prefill_work(setting, shape)),
    }
    phases = {
        "rollout": held | sampler | rollout,
        "update": held | works[rung],
        "sync": held | sampler | {"temporaries": sync_work(setting)},
    }
    return Footprint(usable, rung, shape, phases)
