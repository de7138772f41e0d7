"""The sampler: prompts in, rollouts out. One wave, decoded in chunks.

sampler = Sampler(arch, mesh, stop_ids=tokenizer.stop_ids)
sampler.sync(params)                                # learner layout -> sampler layout, after every update
rollouts = sampler.generate(prompts, 8, key=key, temperature=1.0, max_completion_tokens=512)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rljax.config import Architecture
from rljax.mesh import SAMPLER_RULES, num_row_shards, param_shardings, replicated, row_sharding
from rljax.models import qwen2
from rljax.sampling.decode import DrawSettings, decode_chunk, start_wave
from rljax.types import LENGTH, STOP, Prompts, Rollouts

_BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


def bucket(size: int) -> int:
    """The next of a few sizes, so that few programs serve all lengths: 16 ... 2048, then multiples of 1024."""
    return next((b for b in _BUCKETS if size <= b), -(-size // 1024) * 1024)


class Sampler:
    """Holds the sampler's copy of the parameters; everything else is passed in."""

    def __init__(
        self,
        arch: Architecture,
        mesh: Mesh,
        *,
        stop_ids: Sequence[int],
        compute_dtype: Any = jnp.float32,
        chunk_tokens: int = 32,
    ) -> None:
        self.arch, self.mesh, self.chunk_tokens = arch, mesh, chunk_tokens
        self._stop_ids = jnp.asarray(stop_ids, jnp.int32)
        self._params: qwen2.Params | None = None
        shapes = jax.eval_shape(lambda p: qwen2.sampler_params(p, arch, compute_dtype), qwen2.param_shapes(arch))
        shardings = param_shardings(mesh, shapes, qwen2.sampler_param_axes(arch), SAMPLER_RULES)
        self._to_sampler = jax.jit(
            lambda params: qwen2.sampler_params(params, arch, compute_dtype), out_shardings=shardings
        )

    def sync(self, params: qwen2.Params) -> None:
        """Takes over `params` (learner layout): cast, unstacked, fused and resharded in one program."""
        self._params = None  # free the old copy before the new one is made
        self._params = self._to_sampler(params)

    def block_until_ready(self) -> None:
        """Waits for the last `sync`."""
        jax.block_until_ready(self._params)

    def generate(
        self,
        prompts: Prompts,
        samples_per_prompt: int,
        *,
        key: jax.Array,
        temperature: float,
        max_completion_tokens: int,
    ) -> Rollouts:
        """Draws `samples_per_prompt` completions of each prompt, stop token included.

        Sample g of a prompt is a function of (`key`, prompt.position * samples_per_prompt + g, parameters, prompt): not
        of the other rows, their order or padding.

        Args:
          temperature: 0 is greedy; log-probs are then those of temperature 1.
          max_completion_tokens: a completion that reaches it ends with stop reason LENGTH.
        """
        assert self._params is not None, "call sync(params) first"
        count, rows = len(prompts), len(prompts) * samples_per_prompt
        padded = -(-count // num_row_shards(self.mesh)) * num_row_shards(self.mesh)
        take = np.minimum(np.arange(padded), count - 1)  # repeat the last prompt to fill the shards
        tokens = _fit_slots(prompts.tokens, bucket(int(prompts.lengths.max())))[take]
        ids = prompts.positions[take, None] * samples_per_prompt + np.arange(samples_per_prompt)
        by_rows, whole = row_sharding(self.mesh), replicated(self.mesh)
        settings = DrawSettings(
            key=jax.device_put(key, whole),
            sample_ids=jax.device_put(ids.reshape(-1).astype(np.uint32), by_rows),
            temperature=jax.device_put(np.float32(temperature), whole),
            stop_ids=jax.device_put(self._stop_ids, whole),
            max_tokens=jax.device_put(np.int32(max_completion_tokens), whole),
        )
        chunk = min(self.chunk_tokens, max(1, max_completion_tokens - 1))
        num_chunks = -(-(max_completion_tokens - 1) // chunk)
        prefix, state = start_wave(
            self._params,
            jax.device_put(tokens, by_rows),
            jax.device_put(prompts.lengths[take], by_rows),
            settings,
            arch=self.arch,
            samples_per_prompt=samples_per_prompt,
            slots=1 + num_chunks * chunk,
        )
        for _ in range(num_chunks):
            state, live = decode_chunk(self._params, prefix, state, settings, arch=self.arch, chunk_tokens=chunk)
            if int(live) == 0:
                break
        drawn, logprobs, lengths, stopped = jax.device_get((state.tokens, state.logprobs, state.lengths, state.stopped))
        return Rollouts(
            prompts=prompts,
            group_size=samples_per_prompt,
            tokens=np.ascontiguousarray(drawn[:max_completion_tokens].T[:rows]),
            lengths=lengths[:rows],
            behaviour_logprobs=np.ascontiguousarray(logprobs[:max_completion_tokens].T[:rows]),
            stop_reasons=np.where(stopped[:rows], STOP, LENGTH).astype(np.int8),
        )


def _fit_slots(tokens: np.ndarray, slots: int) -> np.ndarray:
    """`tokens` [P, S] cut or zero-padded to [P, slots]; only padding is ever cut."""
    kept = tokens[:, :slots]
    return np.pad(kept, ((0, 0), (0, slots - kept.shape[1])))
