"""What generate offers beside plain sampling, and what it refuses."""

import jax
import numpy as np
import pytest
from conftest import make_prompts

from rljax.sampling.engine import EngineOptions, Sampler
from rljax.sampling.stop import StopStrings
from rljax.types import LENGTH, STOP

KEY = jax.random.key(3)
PROMPTS = make_prompts([4, 7, 5])


@pytest.fixture(scope="module")
def sampler(tiny, tiny_params, mesh) -> Sampler:
    return Sampler(tiny_params, tiny, mesh, stop_ids=(1, 30), options=EngineOptions(chunk_tokens=8))


def generate(sampler: Sampler, **settings):
    return sampler.generate(PROMPTS, 8, **{"key": KEY, "max_completion_tokens": 40} | settings)


def test_truncation_is_told_with_the_mass_it_left(sampler) -> None:
    """log p of the full distribution = log p of what was sampled + log kept mass: the learner could renormalise."""
    rollouts = generate(sampler, top_k=5, top_p=0.9, temperature=0.8)
    assert rollouts.kept_mass is not None
    used = np.arange(40) < rollouts.lengths[:, None]
    assert (rollouts.kept_mass[used] < 1).any() and (rollouts.kept_mass[~used] == 1).all()
    completions = [row[:n] for row, n in zip(rollouts.tokens, rollouts.lengths, strict=True)]
    full = sampler.score(PROMPTS, completions, temperature=0.8)
    longest = full.shape[1]
    told = rollouts.behaviour_logprobs + np.log(rollouts.kept_mass)
    np.testing.assert_allclose(told[:, :longest], full, atol=2e-5)
    assert generate(sampler).kept_mass is None


def test_other_settings_need_no_other_program(sampler) -> None:
    generate(sampler, top_k=5)
    generate(sampler)
    before = len(sampler._programs)
    for settings in ({"temperature": 0.3}, {"temperature": 0.0}, {"top_k": 2}, {"min_p": 0.2, "top_p": 0.5}):
        generate(sampler, **settings)
    generate(sampler, key=jax.random.key(9))
    assert len(sampler._programs) == before


def test_top_k_of_one_is_greedy(sampler) -> None:
    np.testing.assert_array_equal(generate(sampler, top_k=1).tokens, generate(sampler, temperature=0.0).tokens)


def test_a_forced_minimum_length(sampler) -> None:
    free, forced = generate(sampler), generate(sampler, min_completion_tokens=12)
    assert free.lengths.min() < 12
    assert forced.lengths.min() >= 12
    stops = np.isin(forced.tokens, (1, 30))
    assert not stops[:, :11].any()
    assert stops[:, 11:].any()
    assert forced.kept_mass is not None and (forced.kept_mass[:, :11] < 1).all()
    np.testing.assert_allclose(forced.kept_mass[:, 11:], 1, rtol=1e-6)
    completions = [row[:n] for row, n in zip(forced.tokens, forced.lengths, strict=True)]
    full = sampler.score(PROMPTS, completions)
    told = forced.behaviour_logprobs + np.log(forced.kept_mass)
    np.testing.assert_allclose(told[:, : full.shape[1]], full, atol=2e-5)


@pytest.mark.parametrize("options", [EngineOptions(chunk_tokens=8), EngineOptions(chunk_tokens=5, max_rows=8)])
def test_stop_strings_end_where_the_text_is_complete(sampler, tiny, tiny_params, mesh, options) -> None:
    """Of single characters a to z and more: whatever the chunks, the first token that completes one is the last."""

    def decode(tokens: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)

    free = generate(sampler)
    stop = StopStrings(["db", "m"], decode)
    engine = Sampler(tiny_params, tiny, mesh, stop_ids=(1, 30), options=options)
    cut = generate(engine, stop_strings=stop)
    found = 0
    for row in range(24):
        text = decode(free.tokens[row, : free.lengths[row]].tolist())
        ends = [text.index(s) + len(s) for s in ("db", "m") if s in text]
        length = min([*ends, free.lengths[row]])
        assert cut.lengths[row] == length
        np.testing.assert_array_equal(cut.tokens[row], np.where(np.arange(40) < length, free.tokens[row], 0))
        assert not cut.behaviour_logprobs[row, length:].any()
        assert cut.stop_reasons[row] == (STOP if ends else free.stop_reasons[row])
        found += bool(ends)
    assert 5 < found < 24
    assert LENGTH in free.stop_reasons


def test_what_cannot_be_asked_for(sampler, tiny, mesh) -> None:
    for settings, message in (
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"min_p": 2.0}, "min_p = 2"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(sampler, **settings)
    with pytest.raises(RuntimeError, match=r"call sync\(params\) first"):
        generate(Sampler(None, tiny, mesh, stop_ids=()))
    with pytest.raises(ValueError, match="none of them empty"):
        StopStrings([""], str)
