"""This machine's XLA computes what NumPy computes, where builds of it are known to have gone wrong.

jaxlib 0.10.2 to 0.11.x can fuse reductions wrongly on a CPU (jax-ml/jax#39103); `rljax/__init__.py` sets the flag that
keeps it from doing so. Should these fail, no other number of the project can be trusted.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.attention import AttentionLayout, dense_attention
from rljax.rl.advantages import group_advantages


@pytest.mark.parametrize("size", [8, 64, 129, 1000])
def test_matrix_vector_square_and_sum_under_jit(size: int) -> None:
    rng = np.random.default_rng(size)
    matrix, vector = rng.normal(size=(size, size)).astype(np.float32), rng.normal(size=size).astype(np.float32)
    expected = np.sum((matrix.astype(np.float64) @ vector) ** 2)
    assert float(jax.jit(lambda m, v: jnp.sum((m @ v) ** 2))(matrix, vector)) == pytest.approx(expected, rel=1e-5)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum((matrix @ v) ** 2)))(vector)
    exact = 2 * matrix.T.astype(np.float64) @ (matrix.astype(np.float64) @ vector)
    np.testing.assert_allclose(gradient, exact, atol=1e-5 * np.abs(exact).max())


def test_attention_gradient_under_jit_equals_op_by_op() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 9, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    layout = AttentionLayout.right_padded(jnp.array([9, 5]), 9)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(dense_attention(q, k, v, layout)[:, :5] ** 2)

    together = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    with jax.disable_jit():
        apart = jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_the_flag_is_set_unless_the_user_chose() -> None:
    version = tuple(map(int, jax.lib.__version__.split(".")[:3]))
    if (0, 10, 2) <= version < (0, 12, 0):
        assert "xla_cpu_experimental_ynn_fusion_type" in os.environ["XLA_FLAGS"]


def test_standard_deviation_is_of_a_sample() -> None:
    """NumPy's and JAX's default divides by n, torch's by n - 1."""
    rewards = np.array([[0.0, 1.0, 1.0, 0.0]], np.float32)
    expected = (rewards - 0.5) / (np.sqrt(1 / 3) + 1e-6)
    np.testing.assert_allclose(group_advantages(rewards, np.full((1, 4), 7), "grpo", 1e-6), expected, rtol=1e-6)
