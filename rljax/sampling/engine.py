"""The sampler: prompts in, rollouts out.

sampler = Sampler(params, arch, mesh, stop_ids=tokenizer.stop_ids)
rollouts = sampler.generate(prompts, 8, key=key, temperature=1.0, max_completion_tokens=512)
sampler.sync(new_params)                            # learner layout -> sampler layout, after every update
logprobs = sampler.score(prompts, completions)

All rows that fit are decoded as one wave: the prompts are run once each, the suffix cache grows with the completions,
and the batch is halved when half of its rows have ended (`loop.py`). What does not fit waits: by default freed rows
take the next prompts (refill), otherwise the next wave does.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rljax.config import Architecture, SamplingConfig
from rljax.hosts import least, local_part, processes_of, sampling_mesh, to_devices
from rljax.mesh import SAMPLER_RULES, num_row_shards, param_shardings, replicated
from rljax.models import qwen2
from rljax.models.layers import with_a_kv_head_each
from rljax.sampling.decode import DrawSettings
from rljax.sampling.device import DecodeDevice
from rljax.sampling.draw import Truncation
from rljax.sampling.loop import DecodeLoop, Outputs, Plan
from rljax.sampling.memory import rows_that_fit
from rljax.sampling.programs import Programs
from rljax.sampling.schedule import Stats
from rljax.sampling.score import score_completions
from rljax.sampling.stop import StopStrings
from rljax.types import LENGTH, STOP, Prompts, Rollouts, select_prompts

_BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


def bucket(size: int) -> int:
    """The next of a few sizes, so that few programs serve all lengths: 16 ... 2048, then multiples of 1024."""
    return next((b for b in _BUCKETS if size <= b), -(-size // 1024) * 1024)


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How completions are decoded. None of it changes what is sampled."""

    chunk_tokens: int = 16
    """Steps between looks of the host at the rows."""
    growth: float = 1.5
    """Factor between sizes of the suffix cache; 1: full length from the start."""
    compact: bool = True
    """Halve the rows when half of them have ended."""
    refill: bool = True
    """What does not fit at once takes over freed rows; False: it waits for the next wave."""
    max_rows: int = 0
    """Rows decoded at once, all devices together; 0: as many as the free memory holds."""

    @classmethod
    def of(cls, config: SamplingConfig) -> Self:
        """Those of a run."""
        return cls(
            chunk_tokens=config.chunk_tokens,
            growth=config.cache_growth,
            compact=config.compact,
            refill=config.refill,
            max_rows=config.max_rows,
        )


class Sampler:
    """Holds the sampler's copy of the parameters and the compiled programs; everything else is passed in.

    Args:
      params: learner layout; None: `sync` brings them later.
      arch: the model.
      mesh: rows are split over its data and fsdp axes, heads and vocabulary over tensor. Of one with devices of
        several processes, each decodes rows of its own on its own part (`mesh` below), and only `sync` is common; where
        a tensor group has devices of several, these decode the same rows, in lockstep (`processes` below).
      stop_ids: tokens that end a completion.
      compute_dtype: of parameters and caches.
      head_dtype: of the final norm and the head; None: the compute dtype.
    """

    def __init__(
        self,
        params: qwen2.Params | None,
        arch: Architecture,
        mesh: Mesh,
        *,
        stop_ids: Sequence[int],
        compute_dtype: Any = jnp.float32,
        head_dtype: Any = None,
        options: EngineOptions = EngineOptions(),
    ) -> None:
        shapes = qwen2.param_shapes(arch)
        self._whole_mesh = mesh
        self.arch = arch = with_a_kv_head_each(arch, mesh.shape["tensor"])
        self.mesh, self.options = sampling_mesh(mesh), options
        self.processes = processes_of(self.mesh)
        """That decode in lockstep with this one, itself included: they all make the same calls."""
        self.stats = Stats()
        """What the last `generate` did."""
        self._stop_ids = np.asarray(stop_ids, np.int32)
        self._dtype = jnp.dtype(compute_dtype)
        self._programs = Programs()
        self._params: qwen2.Params | None = None

        def to_sampler(params: qwen2.Params) -> qwen2.Params:
            return qwen2.sampler_params(params, arch, compute_dtype, head_dtype)

        def layer_to_sampler(layers: qwen2.Params, index: jax.Array) -> qwen2.Params:
            return qwen2.sampler_layer(layers, index, arch, compute_dtype)

        def outside_to_sampler(outside: qwen2.Params) -> qwen2.Params:
            return qwen2.sampler_outside(outside, arch, compute_dtype, head_dtype)

        shapes = jax.eval_shape(to_sampler, shapes)
        shardings = param_shardings(mesh, shapes, qwen2.sampler_param_axes(arch), SAMPLER_RULES)
        self.shapes = jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)
        """Tree of `ShapeDtypeStruct` of the sampler's parameters."""
        outside = {name: shardings[name] for name in shardings if name != "layers"}
        self.layer_to_sampler = jax.jit(layer_to_sampler, out_shardings=shardings["layers"][0])
        """The weight sync of a layer: stacked parameters and its index to its parameters."""
        self.outside_to_sampler = jax.jit(outside_to_sampler, out_shardings=outside)
        """The weight sync of what is of no layer."""
        if params is not None:
            self.sync(params)

    def sync(self, params: qwen2.Params) -> None:
        """Takes over `params` (learner layout): cast, unstacked, fused and resharded.

        Layer by layer with one program, so that beside both layouts there is room needed for a layer only.
        """
        self.release()
        outside = {name: leaf for name, leaf in params.items() if name != "layers"}
        with jax.set_mesh(self._whole_mesh):
            layers = [self.layer_to_sampler(params["layers"], index) for index in range(self.arch.num_layers)]
            params = {**self.outside_to_sampler(outside), "layers": layers}
        self._params = params if self.mesh is self._whole_mesh else local_part(params, self.mesh)

    @property
    def params(self) -> qwen2.Params:
        """What it draws from, in the sampler's layout.

        Raises:
          RuntimeError: it holds none.
        """
        if self._params is None:
            raise RuntimeError("the sampler holds no parameters; give them to Sampler(...) or call sync(params) first")
        return self._params

    def release(self) -> None:
        """Frees the parameters, until `sync` brings others: an update has their memory."""
        self._params = None

    def block_until_ready(self) -> None:
        """Waits for the last `sync`."""
        jax.block_until_ready(self._params)

    def generate(
        self,
        prompts: Prompts,
        samples_per_prompt: int,
        *,
        key: jax.Array,
        max_completion_tokens: int | np.ndarray,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        min_completion_tokens: int = 0,
        stop_strings: StopStrings | None = None,
        on_group: Callable[[int, Rollouts], None] | None = None,
    ) -> Rollouts:
        """Draws `samples_per_prompt` completions of each prompt, stop token included.

        Sample g of a prompt is a function of (`key`, prompt.position * samples_per_prompt + g, parameters, prompt): not
        of the other rows, their order, padding, waves, chunks, growth, compaction, refill or number of devices.

        Args:
          key: typed JAX key.
          max_completion_tokens: cap; a completion that reaches it ends with stop reason LENGTH. An array [P * G] gives
            every completion its own.
          temperature: 0 is greedy; log-probs are then those of temperature 1.
          top_k, top_p, min_p: truncation for evaluation, as in `draw.Truncation`; 0, 1 and 0 are off.
          min_completion_tokens: stop ids cannot be drawn before; stop strings can.
          stop_strings: texts that end a completion.
          on_group: called with a prompt's place in `prompts` and its completions as soon as all of them have ended,
            while others are still being decoded.
        """
        params = self.params
        rows = len(prompts) * samples_per_prompt
        limits = np.broadcast_to(np.asarray(max_completion_tokens, np.int32), (rows,))
        _check(rows, limits, temperature, top_k, top_p, min_p)
        longest = int(limits.max())
        settings = self._settings(key, temperature, top_k, top_p, min_p, min_completion_tokens)
        prompt_slots = bucket(int(prompts.lengths.max()))
        options = self.options
        plan = Plan.make(
            samples_per_prompt=samples_per_prompt,
            num_prompts=len(prompts),
            prompt_slots=prompt_slots,
            max_tokens=longest,
            max_rows=options.max_rows
            or least(
                rows_that_fit(self.arch, self._dtype, self.mesh, prompt_slots, longest, samples_per_prompt), self.mesh
            ),
            shards=num_row_shards(self.mesh),
            chunk=options.chunk_tokens,
            growth=options.growth,
            compact=options.compact,
            refill=options.refill,
        )
        ids = prompts.positions[:, None] * samples_per_prompt + np.arange(samples_per_prompt)
        device = DecodeDevice(
            params,
            self.arch,
            self.mesh,
            self._programs,
            prompts=prompts,
            prompt_slots=prompt_slots,
            sample_ids=ids.reshape(-1).astype(np.uint32),
            limits=limits,
            settings=settings,
            chunk=plan.chunk,
        )
        collector = _Collector(
            prompts,
            samples_per_prompt,
            Outputs.empty(rows, longest),
            settings.truncation is not None or settings.min_tokens is not None,
            stop_strings,
            on_group,
        )
        self.stats = Stats()
        DecodeLoop(plan, device, limits, collector.outputs, self.stats, collector.take_in).run()
        self.stats.programs, self.stats.compile_seconds = len(self._programs), self._programs.seconds
        self.stats.decode_programs = self._programs.count("decode")
        return collector.rollouts()

    def score(self, prompts: Prompts, completions: Sequence[np.ndarray], *, temperature: float = 1.0) -> np.ndarray:
        """Log-probs [B, R] float32 of given completions, B a multiple of P: row p * (B // P) + g is one of prompt p.

        Of softmax(logits / temperature) over the full vocabulary; 0 after the end of a completion. R is the longest.
        """
        if not completions or len(completions) % len(prompts):
            raise ValueError(
                f"{len(completions)} completions of {len(prompts)} prompts; give the same number, at least 1, of each"
            )
        return score_completions(
            self.params, self.arch, self.mesh, self._programs, prompts, completions, temperature=temperature
        )

    def _settings(
        self, key: jax.Array, temperature: float, top_k: int, top_p: float, min_p: float, min_tokens: int
    ) -> DrawSettings:
        whole = replicated(self.mesh)

        def put(value: Any) -> jax.Array:
            return to_devices(value, whole)

        seed, kind = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)
        truncation = None
        if top_k > 0 or top_p < 1 or min_p > 0:
            truncation = Truncation(put(np.int32(top_k)), put(np.float32(top_p)), put(np.float32(min_p)))
        return DrawSettings(
            key=jax.random.wrap_key_data(put(seed), impl=kind),
            temperature=put(np.float32(temperature)),
            stop_ids=put(self._stop_ids),
            min_tokens=put(np.int32(min_tokens)) if min_tokens > 1 else None,
            truncation=truncation,
        )


def _check(rows: int, limits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    if rows < 1:
        raise ValueError("there is nothing to sample: give at least one prompt and one sample of each")
    if limits.min() < 1:
        raise ValueError(f"max_completion_tokens is {limits.min()} for a completion; every completion has at least 1")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature = {temperature} must be finite and at least 0 (0 is greedy)")
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(
            f"top_k = {top_k}, top_p = {top_p}, min_p = {min_p}: top_k is at least 0 (0: off), top_p above 0 and at "
            "most 1 (1: off), min_p between 0 and 1 (0: off)"
        )


class _Collector:
    """Completions coming in: finds stop strings, tells of finished groups, and makes `Rollouts` of them."""

    def __init__(
        self,
        prompts: Prompts,
        group: int,
        outputs: Outputs,
        truncated: bool,
        stop_strings: StopStrings | None,
        on_group: Callable[[int, Rollouts], None] | None,
    ) -> None:
        self.outputs = outputs
        self._prompts, self._group, self._truncated = prompts, group, truncated
        self._stop_strings, self._on_group = stop_strings, on_group
        self._left = np.full(len(prompts), group)
        self._seen = np.zeros(len(outputs.lengths), bool)

    def take_in(self, samples: np.ndarray) -> np.ndarray:
        """After new tokens of `samples` [n]; returns those that a stop string has ended."""
        out, ended = self.outputs, []
        if self._stop_strings is not None:
            for sample in samples:
                length = self._stop_strings.end(out.tokens[sample, : out.lengths[sample]])
                if length is not None:
                    self._cut(sample, length)
                    if not out.done[sample]:
                        ended.append(sample)
        newly = samples[out.done[samples] | np.isin(samples, ended)]
        newly = newly[~self._seen[newly]]
        self._seen[newly] = True
        for prompt, count in zip(*np.unique(newly // self._group, return_counts=True), strict=True):
            self._left[prompt] -= count
            if self._left[prompt] == 0 and self._on_group is not None:
                self._on_group(int(prompt), select_prompts(self.rollouts(), [int(prompt)]))
        return np.array(ended, np.int64)

    def _cut(self, sample: int, length: int) -> None:
        out = self.outputs
        out.tokens[sample, length:], out.logprobs[sample, length:], out.kept_mass[sample, length:] = 0, 0, 1
        out.lengths[sample] = length
        out.stopped[sample] = True

    def rollouts(self) -> Rollouts:
        """The completions so far."""
        out = self.outputs
        return Rollouts(
            prompts=self._prompts,
            group_size=self._group,
            tokens=out.tokens,
            lengths=out.lengths,
            behaviour_logprobs=out.logprobs,
            stop_reasons=np.where(out.stopped, STOP, LENGTH).astype(np.int8),
            kept_mass=out.kept_mass if self._truncated else None,
        )
