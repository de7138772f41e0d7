"""What is sampled does not depend on how it is decoded: waves, growth, compaction, refill, chunks, or dead memory."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_prompts

from rljax.models import layers
from rljax.sampling.cache import visible_slots
from rljax.sampling.decode import take_cache
from rljax.sampling.device import DecodeDevice
from rljax.sampling.engine import EngineOptions, Sampler
from rljax.types import Rollouts

KEY = jax.random.key(7)
PROMPTS = make_prompts([3 + 5 * i % 14 for i in range(72)])
CAP = 160
WAYS = {
    "growing": EngineOptions(compact=False),
    "growing and compacted": EngineOptions(),
    "chunks of 8": EngineOptions(chunk_tokens=8),
    "chunks of 50, growth 2": EngineOptions(chunk_tokens=50, growth=2.0),
    "waves of 96": EngineOptions(max_rows=96, refill=False),
    "refilled, 64 at once": EngineOptions(max_rows=64),
    "refilled, 40 at once, full cache": EngineOptions(max_rows=40, growth=1.0, chunk_tokens=16),
}


def generate(sampler: Sampler, prompts=PROMPTS, samples: int = 8, **settings) -> Rollouts:
    return sampler.generate(prompts, samples, **{"key": KEY, "max_completion_tokens": CAP} | settings)


@pytest.fixture(scope="module")
def engine(tiny, tiny_params, mesh) -> Callable[[EngineOptions], Sampler]:
    """The sampler of some options; one for all tests, so that its programs are compiled once."""
    return functools.cache(lambda options: Sampler(tiny_params, tiny, mesh, stop_ids=(1,), options=options))


@pytest.fixture(scope="module")
def plain(engine) -> Rollouts:
    """One wave with a cache of full length: nothing ever changes shape."""
    return generate(engine(EngineOptions(growth=1.0, compact=False)))


@pytest.mark.parametrize("way", WAYS)
def test_no_token_depends_on_the_way(plain, engine, way: str) -> None:
    sampler = engine(WAYS[way])
    rollouts = generate(sampler)
    assert plain.lengths.sum() > 20_000
    assert plain.lengths.min() < 10 and (plain.lengths == CAP).any()
    np.testing.assert_array_equal(rollouts.tokens, plain.tokens)
    np.testing.assert_array_equal(rollouts.lengths, plain.lengths)
    np.testing.assert_array_equal(rollouts.stop_reasons, plain.stop_reasons)
    np.testing.assert_allclose(rollouts.behaviour_logprobs, plain.behaviour_logprobs, atol=1e-5)
    stats = sampler.stats
    assert stats.drawn_tokens == plain.lengths.sum()
    assert stats.waves == {"waves of 96": 6}.get(way, 1)
    assert (stats.admissions > 0) == way.startswith("refilled")
    # Samples that are admitted together, 5 or 8 of them, are of two prompts at most, and each is run once.
    at_first = {"refilled, 64 at once": 9, "refilled, 40 at once, full cache": 6}.get(way, len(PROMPTS))
    assert stats.prompts_run == at_first + 2 * stats.admissions
    assert (stats.reshapes > 0) or way == "refilled, 40 at once, full cache"
    again = generate(sampler)  # the same shapes: the same bits
    np.testing.assert_array_equal(again.tokens, rollouts.tokens)
    np.testing.assert_array_equal(again.behaviour_logprobs, rollouts.behaviour_logprobs)


def test_dead_memory_has_no_influence(engine, monkeypatch) -> None:
    """NaN in every slot that holds no token of a live row, before every chunk, changes not a bit. Values of prompts are
    not written again: what is hidden of them is finite from the start."""
    sampler = engine(EngineOptions(max_rows=64))
    clean = generate(sampler)
    decode, poisoned = DecodeDevice.decode, []

    def poison(self: DecodeDevice, shape):
        state, prefix = self._state, self._prefix
        slots = state.suffix.values[0].shape[2]
        keep = visible_slots(state.lengths - 1, state.slot - 1, slots) & state.live()[:, None]
        in_prompt = jnp.arange(prefix.values[0].shape[2]) < prefix.lengths[:, None]

        def dirty(cache, kept, axis):
            spread = kept[:, None, None, :] if axis == 3 else kept[:, None, :, None]
            return jax.jit(lambda c, k: jnp.where(k, c, jnp.nan), out_shardings=self._on.cache)(cache, spread)

        def all_dirty(record, kept):
            return dataclasses.replace(
                record,
                keys=[dirty(cache, kept, 3) for cache in record.keys],
                values=[dirty(cache, kept, 2) for cache in record.values],
            )

        assert all(jnp.isfinite(values).all() for values in prefix.values)
        self._prefix = dataclasses.replace(prefix, keys=[dirty(cache, in_prompt, 3) for cache in prefix.keys])
        self._state = dataclasses.replace(state, suffix=all_dirty(state.suffix, keep))
        poisoned.append(int((~keep).sum()))
        return decode(self, shape)

    monkeypatch.setattr(DecodeDevice, "decode", poison)
    dirty = generate(sampler)
    assert sum(poisoned) > 10_000
    np.testing.assert_array_equal(dirty.tokens, clean.tokens)
    np.testing.assert_array_equal(dirty.behaviour_logprobs, clean.behaviour_logprobs)


@pytest.mark.parametrize("slot", [0, 1, 5, 7])
def test_a_ring_that_grows_keeps_what_lies_behind_its_slot(slot: int) -> None:
    old, new = 8, 13
    heads, head_dim, rows = 2, 4, jnp.array([2, -1, 0])
    values = jax.random.normal(jax.random.key(0), (3, heads, old, head_dim))
    keys = values.swapaxes(2, 3)
    grown_keys, grown = take_cache(keys, values, rows, jnp.int32(slot), slots=new, shards=1)
    assert grown.shape == (3, heads, new, head_dim)
    np.testing.assert_array_equal(grown_keys, grown.swapaxes(2, 3))
    for age in range(1, old + 1):
        np.testing.assert_array_equal(grown[::2, :, (slot - age) % new], values[::-2, :, (slot - age) % old])


def test_every_completion_may_have_its_own_cap(plain, engine) -> None:
    caps = np.random.default_rng(0).integers(1, CAP + 1, 576)
    rollouts = generate(engine(EngineOptions()), max_completion_tokens=caps)
    np.testing.assert_array_equal(rollouts.lengths, np.minimum(caps, plain.lengths))
    kept = np.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]
    longest = rollouts.tokens.shape[1]
    np.testing.assert_array_equal(rollouts.tokens, np.where(kept, plain.tokens[:, :longest], 0))


def test_groups_are_told_of_once_and_whole(engine) -> None:
    for options in (EngineOptions(), EngineOptions(max_rows=64)):
        told: dict[int, Rollouts] = {}
        during = []

        def on_group(prompt: int, group: Rollouts, told=told, during=during) -> None:
            assert prompt not in told
            told[prompt] = group
            during.append(int(group.lengths.max()))

        rollouts = generate(engine(options), on_group=on_group)
        assert sorted(told) == list(range(72))
        assert during != [max(during)] * 72
        for prompt, group in told.items():
            rows = slice(8 * prompt, 8 * prompt + 8)
            assert group.prompts.records == PROMPTS.records[prompt : prompt + 1]
            for name in ("tokens", "lengths", "behaviour_logprobs", "stop_reasons"):
                np.testing.assert_array_equal(getattr(group, name), getattr(rollouts, name)[rows])


def test_score_gives_the_log_probs_that_were_sampled(plain, engine) -> None:
    sampler = engine(EngineOptions())
    completions = [row[:n] for row, n in zip(plain.tokens, plain.lengths, strict=True)]
    scored = sampler.score(PROMPTS, completions)
    np.testing.assert_allclose(scored, plain.behaviour_logprobs[:, : scored.shape[1]], atol=1e-5)
    warm = generate(sampler, temperature=0.5)
    completions = [row[:n] for row, n in zip(warm.tokens, warm.lengths, strict=True)]
    scored = sampler.score(PROMPTS, completions, temperature=0.5)
    np.testing.assert_allclose(scored, warm.behaviour_logprobs[:, : scored.shape[1]], atol=2e-5)
    with pytest.raises(ValueError, match="71 completions of 72 prompts"):
        sampler.score(PROMPTS, completions[:71])


def test_rows_and_columns_draw_the_same(tiny, tiny_params, mesh, monkeypatch) -> None:
    """A CPU multiplies a step's rows as columns of the right operand, a GPU or TPU as rows of the left one."""
    prompts, caps = make_prompts([3, 8, 5]), np.arange(1, 13, dtype=np.int32)
    drawn = []
    for columns in (True, False):
        asked = []
        monkeypatch.setattr(layers, "feeds_columns", lambda columns=columns, asked=asked: asked.append(1) or columns)
        sampler = Sampler(tiny_params, tiny, mesh, stop_ids=())
        drawn.append(sampler.generate(prompts, 4, key=KEY, max_completion_tokens=caps))
        assert asked, "the programs were not traced anew"
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
    np.testing.assert_allclose(drawn[0].behaviour_logprobs, drawn[1].behaviour_logprobs, atol=1e-5)
