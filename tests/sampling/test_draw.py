"""Draws come from exactly the distribution they report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rljax.sampling.draw import Truncation, draw, row_uniforms

DRAWS = 200_000


def truncation(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Truncation:
    return Truncation(jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))


def exact_distribution(
    logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[np.ndarray, float]:
    """Probabilities and kept mass in float64, by sorting: the definition the bisection is held against."""
    full = np.exp(logits.astype(np.float64) / temperature)
    full /= full.sum()
    kept = np.ones(len(full), bool)
    if top_k:
        kept &= full >= np.sort(full)[::-1][min(top_k, len(full)) - 1]
    if top_p < 1:
        left = np.where(kept, full, 0) / full[kept].sum()
        ranked = np.sort(left)[::-1]
        kept &= left >= ranked[np.searchsorted(np.cumsum(ranked), top_p)]
    kept &= full >= min_p * full.max()
    return np.where(kept, full, 0) / full[kept].sum(), float(full[kept].sum())


def many_draws(logits: np.ndarray, temperature: float, cut: Truncation | None) -> list[np.ndarray]:
    key = jax.random.key(3)

    @jax.jit
    def run(ids: jax.Array) -> tuple[jax.Array, ...]:
        rows = jnp.broadcast_to(logits, (len(ids), len(logits)))
        return draw(rows, row_uniforms(key, ids, jnp.int32(5)), jnp.float32(temperature), cut)

    parts = [run(jnp.arange(start, start + 20_000, dtype=jnp.uint32)) for start in range(0, DRAWS, 20_000)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


CASES = {
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 2": {"temperature": 2.0},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "top-k of more than there are": {"top_k": 1000},
    "all three, warm": {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", [7, 300, 1200])  # one block; four segments of one block each; of one and a rest
def test_chi_square_against_the_exact_distribution(vocab: int, case: str) -> None:
    settings = CASES[case]
    logits = np.random.default_rng(vocab).normal(0, 1.5, vocab).astype(np.float32)
    exact, kept_mass = exact_distribution(logits, **settings)
    temperature = settings.get("temperature", 1.0)
    rest = {name: value for name, value in settings.items() if name != "temperature"}
    tokens, logprobs, kept = many_draws(logits, temperature, truncation(**rest) if rest else None)
    assert (exact[tokens] > 0).all()
    expected = exact * DRAWS
    order = np.argsort(expected)
    cut = np.searchsorted(np.cumsum(expected[order]), 10)  # pool what is expected fewer than ten times
    counts = np.bincount(tokens, minlength=vocab)[order]
    pooled = [np.concatenate([[x[: cut + 1].sum()], x[cut + 1 :]]) for x in (counts, expected[order])]
    assert stats.chisquare(*pooled).pvalue > 1e-3
    np.testing.assert_allclose(logprobs, np.log(exact[tokens]), atol=3e-6)
    np.testing.assert_allclose(kept, kept_mass, rtol=3e-6)


@pytest.mark.parametrize("vocab", [2, 37, 512, 1000, 4099])
def test_kept_tokens_are_those_of_a_sort(vocab: int) -> None:
    """Over many rows at once: the same set, hence the same kept mass, as sorting gives."""
    logits = np.random.default_rng(vocab).normal(0, 3, (64, vocab)).astype(np.float32)
    uniforms = jnp.asarray(np.random.default_rng(1).random((64, 2)), jnp.float32)
    for settings in ({"top_k": 3}, {"top_p": 0.35}, {"min_p": 0.3}, {"top_k": 20, "top_p": 0.8}, {"top_p": 1e-6}):
        token, logprob, kept = jax.jit(draw)(logits, uniforms, jnp.float32(1), truncation(**settings))
        for row in range(64):
            exact, mass = exact_distribution(logits[row], **settings)
            assert exact[token[row]] > 0
            assert float(kept[row]) == pytest.approx(mass, rel=1e-5)
            assert float(logprob[row]) == pytest.approx(np.log(exact[token[row]]), abs=1e-5)
        if settings.get("top_p") == 1e-6:
            np.testing.assert_array_equal(token, logits.argmax(axis=1))


def test_as_likely_as_the_last_one_kept_is_kept() -> None:
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    for settings, mass in (({"top_k": 2}, 0.8), ({"top_p": 0.5}, 0.8), ({"top_k": 4}, 1.0), ({"min_p": 0.6}, 0.4)):
        kept = draw(logits, jnp.full((1, 2), 0.5), jnp.float32(1), truncation(**settings))[2]
        assert float(kept[0]) == pytest.approx(mass, rel=1e-5)


def test_other_values_need_no_other_program() -> None:
    traces = []

    @jax.jit
    def jitted(*arguments) -> None:
        traces.append(draw(*arguments))

    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)), jnp.float32)
    for settings in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1, "top_k": 7}):
        for temperature in (0.0, 0.5, 1.0):
            jitted(logits, jnp.full((4, 2), 0.3), jnp.float32(temperature), truncation(**settings))
    assert len(traces) == 1


def test_banned_tokens_are_not_drawn_and_their_mass_is_told() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 40)).astype(np.float32)
    logits[:, 7] += 8  # would be drawn nearly always
    active = np.arange(200) % 2 == 0
    uniforms = jnp.asarray(np.random.default_rng(1).random((200, 2)), jnp.float32)
    banned = jnp.array([7, 3, 7, 99]), jnp.asarray(active)
    full = np.exp(logits.astype(np.float64))
    full /= full.sum(axis=1, keepdims=True)
    for temperature in (1.0, 0.0):
        token, logprob, kept = draw(jnp.asarray(logits), uniforms, jnp.float32(temperature), None, banned)
        token = np.asarray(token)
        assert not np.isin(token[active], [3, 7]).any()
        assert (token[~active] == 7).mean() > 0.9
        left = full.copy()
        left[active] = np.where(np.isin(np.arange(40), [3, 7]), 0, full[active])
        mass = left.sum(axis=1)
        np.testing.assert_allclose(kept, mass, rtol=1e-5)
        np.testing.assert_allclose(logprob, np.log(left[np.arange(200), token] / mass), atol=1e-5)
        if temperature == 0:
            np.testing.assert_array_equal(token, left.argmax(axis=1))


def test_a_token_without_mass_is_never_drawn() -> None:
    logits = np.full(300, -1e30, np.float32)
    logits[[5, 131, 260]] = [0.0, 1.0, 2.0]
    tokens, _, _ = many_draws(logits, 1.0, None)
    assert set(tokens) == {5, 131, 260}


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 0.5])
def test_extreme_uniforms_pick_a_live_token(uniform: float) -> None:
    logits = jnp.full((1, 300), -1e30).at[0, jnp.array([0, 299])].set(0.0)
    token, logprob, _ = draw(logits, jnp.full((1, 2), uniform), jnp.float32(1.0))
    assert int(token[0]) in (0, 299)
    assert float(logprob[0]) == pytest.approx(np.log(0.5), abs=1e-6)


def test_greedy_takes_the_first_maximum_and_reports_temperature_one() -> None:
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0]])
    for cut in (None, truncation(top_k=1)):
        token, logprob, kept = draw(logits, jnp.full((1, 2), 0.9), jnp.float32(0.0), cut)
        assert int(token[0]) == 1
        assert float(logprob[0]) == pytest.approx(float(jax.nn.log_softmax(logits[0])[1]), abs=1e-6)
        assert float(kept[0]) == pytest.approx(1.0)


@pytest.mark.parametrize("vocab", [37, 1024, 151936 // 64, 151936 // 32])
def test_greedy_is_argmax(vocab: int) -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(300, vocab)), jnp.float32)
    token, _, _ = draw(logits, jnp.full((300, 2), 0.7), jnp.float32(0.0))
    np.testing.assert_array_equal(token, logits.argmax(axis=1))


def test_uniforms_depend_on_key_row_and_position_only() -> None:
    key = jax.random.key(0)
    alone = row_uniforms(key, jnp.array([7], jnp.uint32), jnp.int32(3))
    among = row_uniforms(key, jnp.array([1, 7, 9], jnp.uint32), jnp.array([0, 3, 3]))
    np.testing.assert_array_equal(alone[0], among[1])
    for other in (
        row_uniforms(key, jnp.array([8], jnp.uint32), jnp.int32(3)),
        row_uniforms(key, jnp.array([7], jnp.uint32), jnp.int32(4)),
        row_uniforms(jax.random.key(1), jnp.array([7], jnp.uint32), jnp.int32(3)),
    ):
        assert not np.array_equal(alone, other)
