"""The policy of a run: its architecture, tokenizer and mesh, and its parameters from where the config says."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rljax.checkpoint import CheckpointStore
from rljax.config import (
    ARCHITECTURES,
    Architecture,
    ConfigError,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
)
from rljax.config_file import parse_config, read_yaml
from rljax.data.tasks import TASKS
from rljax.hosts import devices_by_process
from rljax.mesh import LEARNER_RULES, make_mesh, param_shardings
from rljax.models import hf, qwen2
from rljax.models.lora import adapter_axes, adapter_shapes, init_adapter, merge
from rljax.sampling.engine import EngineOptions, Sampler
from rljax.tokenizer import Tokenizer, character_tokenizer, load_tokenizer

_TASK_PREFIX = "task:"
_VOCAB_MULTIPLE = 32
"""Rows of a task's embedding are rounded up to this, so that small meshes divide them."""

_ADAPTER_DRAWS = 3
"""Folded into the run's key; training and evaluation have 1 and 2."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is fixed about the model of a run; the parameters are passed beside it."""

    arch: Architecture
    tokenizer: Tokenizer
    mesh: Mesh
    compute_dtype: str
    head_dtype: str
    source: Path | None
    """Folder the parameters come from; None: random."""
    lora: LoraConfig

    @functools.cached_property
    def shapes(self) -> qwen2.Params:
        """Tree of `ShapeDtypeStruct` with the learner's shardings."""
        return self._placed(qwen2.param_shapes(self.arch), qwen2.param_axes(self.arch))

    @functools.cached_property
    def trained_shapes(self) -> qwen2.Params:
        """The same of what updates change: all parameters, or with LoRA the adapter."""
        if not self.lora.rank:
            return self.shapes
        return self._placed(adapter_shapes(self.arch, self.lora), adapter_axes(self.arch, self.lora))

    def _placed(self, shapes: qwen2.Params, axes: qwen2.Params) -> qwen2.Params:
        shardings = param_shardings(self.mesh, shapes, axes, LEARNER_RULES)
        return jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)

    def load_params(self, seed: int, dtype: str = "float32") -> qwen2.Params:
        """Parameters in the learner layout on the mesh: from `source`, or random from `seed`."""
        shardings = jax.tree.map(lambda s: s.sharding, self.shapes)
        if self.source is not None:
            return hf.load_params(self.source, self.arch, shardings=shardings, dtype=dtype)

        def draw(key: jax.Array) -> qwen2.Params:
            return jax.tree.map(lambda leaf: leaf.astype(dtype), qwen2.init(key, self.arch))

        return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))

    def load_base(self, seed: int) -> qwen2.Params | None:
        """What an adapter lies beside: frozen, so held in the compute dtype. None where all parameters are trained."""
        return self.load_params(seed, self.compute_dtype) if self.lora.rank else None

    def fresh_trained(self, seed: int) -> qwen2.Params:
        """float32 values of `trained_shapes` for a run to start from."""
        if not self.lora.rank:
            return self.load_params(seed)
        shardings = jax.tree.map(lambda s: s.sharding, self.trained_shapes)
        draw = jax.jit(lambda key: init_adapter(key, self.arch, self.lora), out_shardings=shardings)
        return draw(jax.random.fold_in(jax.random.key(seed), _ADAPTER_DRAWS))

    def sampler(self, config: SamplingConfig) -> Sampler:
        """A sampler of this policy; it holds no parameters until `sync`."""
        return Sampler(
            None,
            self.arch,
            self.mesh,
            stop_ids=self.tokenizer.stop_ids,
            compute_dtype=self.compute_dtype,
            head_dtype=self.head_dtype,
            options=EngineOptions.of(config),
        )

    def export(self, params: qwen2.Params, folder: str | Path) -> None:
        """Writes a Hugging Face folder that transformers opens, tokenizer included and adapters merged."""
        hf.save_folder(merge(params), self.arch, folder, tokenizer=self.tokenizer)


def open_policy(config: RunConfig) -> Policy:
    """Reads what there is to know before any weight is loaded.

    Raises:
      ConfigError: no such folder; another architecture; a tokenizer that does not fit; a mesh that does not divide.
    """
    source = hf.resolve(config.model.path, config.model.revision) if config.model.path else None
    known = None if source is None else hf.read_architecture(source)  # first: a foreign model is named as such
    tokenizer = _tokenizer(config, source)
    if known is not None:
        arch = known
    else:
        arch = ARCHITECTURES[config.model.architecture]
        if config.data.train.startswith(_TASK_PREFIX) and not config.model.tokenizer:
            arch = dataclasses.replace(arch, vocab_size=-(-tokenizer.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE)
    if tokenizer.vocab_size > arch.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {arch.vocab_size} vocabulary rows; "
            "give model.tokenizer the tokenizer the model was trained with"
        )
    compute_dtype = resolve_dtype(config.model.compute_dtype)
    policy = Policy(
        arch=dataclasses.replace(arch, num_tokens=tokenizer.vocab_size),
        tokenizer=tokenizer,
        mesh=make_mesh(config.mesh, devices_by_process()),
        compute_dtype=compute_dtype,
        head_dtype=compute_dtype if config.model.head_dtype == "auto" else config.model.head_dtype,
        source=source,
        lora=config.lora,
    )
    _ = policy.shapes, policy.trained_shapes  # a mesh that does not divide is refused now, not after the data is read
    return policy


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run's policy with the parameters of one of its checkpoints."""

    config: RunConfig
    policy: Policy
    trained: qwen2.Params
    """What the run trained: all parameters, or with LoRA the adapter."""
    base: qwen2.Params | None
    """What the adapter lies beside; None without LoRA."""
    step: int

    @property
    def lora_scale(self) -> float:
        return self.config.lora.scale


def load_run(
    run_dir: Path,
    *,
    step: int | None = None,
    with_base: bool = True,
    mesh: MeshConfig | None = None,
    compute_dtype: str = "",
) -> LoadedRun:
    """The newest checkpoint of a run, or that of `step`.

    Model and tokenizer are those described in `run_dir`/model, so a run can be moved; a run without that folder needs
    the folders named in its config.yaml, as seen from the working directory. So does a run with LoRA, whose checkpoints
    hold the adapter and not the model it belongs to.

    Args:
      with_base: load what an adapter lies beside.
      mesh: None: whatever this machine makes, for its devices need not be those of the run.
      compute_dtype: as `model.compute_dtype`; empty: the run's, or "auto" where `run_dir`/model is all that is read.

    Raises:
      ConfigError: no such run or step; a folder that is needed is not there.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} holds no config.yaml, so it is not the folder of a run; give one that is")
    with_lora = bool(read_yaml(run_dir / "config.yaml").get("lora", {}).get("rank"))
    if (run_dir / "model").is_dir() and not with_lora:
        config = RunConfig(model=ModelConfig(path=str(run_dir / "model")))
    else:
        config = parse_config([str(run_dir / "config.yaml")])
    model = dataclasses.replace(config.model, compute_dtype=compute_dtype or config.model.compute_dtype)
    policy = open_policy(dataclasses.replace(config, model=model, mesh=mesh or MeshConfig()))
    store = CheckpointStore(run_dir / "checkpoints", None)
    try:
        state, _, found = store.restore({"params": policy.trained_shapes}, partial=True, step=step)
    finally:
        store.close()
    base = policy.load_params(config.seed) if with_lora and with_base else None
    return LoadedRun(config, policy, state["params"], base, found)


def resolve_dtype(compute_dtype: str) -> str:
    """ "auto" is bfloat16 where the hardware multiplies it (TPU, GPU) and float32 on a CPU."""
    if compute_dtype != "auto":
        return compute_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _tokenizer(config: RunConfig, source: Path | None) -> Tokenizer:
    stop_ids = config.sampling.stop_token_ids
    if config.model.tokenizer:
        return load_tokenizer(config.model.tokenizer, stop_ids=stop_ids)
    if source is not None:
        return load_tokenizer(source, stop_ids=stop_ids)
    task = TASKS.get(config.data.train.removeprefix(_TASK_PREFIX))
    if not config.data.train.startswith(_TASK_PREFIX) or task is None:
        raise ConfigError(
            f"model.path is empty and data.train = {config.data.train!r} is not a procedural task, so there is no "
            f"tokenizer; give model.path or model.tokenizer, or data.train = one of "
            f"{', '.join(_TASK_PREFIX + name for name in TASKS)}"
        )
    return character_tokenizer(task.alphabet)


def memory_gib() -> dict[str, float]:
    """Peak resident memory of this process and, where the backend says, of the busiest device, in GiB."""
    import resource

    peaks = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    stats: list[Any] = [device.memory_stats() for device in jax.local_devices()]
    used = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if used:
        peaks["memory/device_peak_gib"] = max(used) / 2**30
    return peaks
