"""Draws come from exactly the distribution they report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rljax.sampling.draw import draw, row_uniforms

DRAWS = 200_000


def many_draws(logits: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    key = jax.random.key(3)

    @jax.jit
    def run(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.broadcast_to(logits, (len(ids), len(logits)))
        return draw(rows, row_uniforms(key, ids, jnp.int32(5)), jnp.float32(temperature))

    parts = [run(jnp.arange(start, start + 20_000, dtype=jnp.uint32)) for start in range(0, DRAWS, 20_000)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("vocab", [7, 300])  # one block, and three with a ragged last
def test_chi_square_against_the_exact_distribution(vocab: int, temperature: float) -> None:
    logits = np.random.default_rng(vocab).normal(0, 1.5, vocab).astype(np.float32)
    exact = np.exp(logits.astype(np.float64) / temperature)
    exact /= exact.sum()
    tokens, logprobs = many_draws(logits, temperature)
    expected = exact * DRAWS
    order = np.argsort(expected)
    cut = np.searchsorted(np.cumsum(expected[order]), 10)  # pool what is expected fewer than ten times
    counts = np.bincount(tokens, minlength=vocab)[order]
    pooled = [np.concatenate([[x[: cut + 1].sum()], x[cut + 1 :]]) for x in (counts, expected[order])]
    assert stats.chisquare(*pooled).pvalue > 1e-3
    np.testing.assert_allclose(logprobs, np.log(exact)[tokens], atol=2e-6)


def test_a_token_without_mass_is_never_drawn() -> None:
    logits = np.full(300, -1e30, np.float32)
    logits[[5, 131, 260]] = [0.0, 1.0, 2.0]  # one live token in each block
    tokens, _ = many_draws(logits, 1.0)
    assert set(tokens) == {5, 131, 260}


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 0.5])
def test_extreme_uniforms_pick_a_live_token(uniform: float) -> None:
    logits = jnp.full((1, 300), -1e30).at[0, jnp.array([0, 299])].set(0.0)
    token, logprob = draw(logits, jnp.full((1, 2), uniform), jnp.float32(1.0))
    assert int(token[0]) in (0, 299)
    assert float(logprob[0]) == pytest.approx(np.log(0.5), abs=1e-6)


def test_greedy_takes_the_first_maximum_and_reports_temperature_one() -> None:
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0]])
    token, logprob = draw(logits, jnp.full((1, 2), 0.9), jnp.float32(0.0))
    assert int(token[0]) == 1
    assert float(logprob[0]) == pytest.approx(float(jax.nn.log_softmax(logits[0])[1]), abs=1e-6)


def test_uniforms_depend_on_key_row_and_position_only() -> None:
    key = jax.random.key(0)
    alone = row_uniforms(key, jnp.array([7], jnp.uint32), jnp.int32(3))
    among = row_uniforms(key, jnp.array([1, 7, 9], jnp.uint32), jnp.int32(3))
    np.testing.assert_array_equal(alone[0], among[1])
    for other in (
        row_uniforms(key, jnp.array([8], jnp.uint32), jnp.int32(3)),
        row_uniforms(key, jnp.array([7], jnp.uint32), jnp.int32(4)),
        row_uniforms(jax.random.key(1), jnp.array([7], jnp.uint32), jnp.int32(3)),
    ):
        assert not np.array_equal(alone, other)
