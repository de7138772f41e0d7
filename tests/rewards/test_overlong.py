"""Golden values of the length penalty."""

import numpy as np

from rljax.rewards.overlong import soft_overlong


def test_it_falls_in_a_line_over_the_buffer() -> None:
    lengths = np.array([50, 80, 81, 90, 100, 110])
    np.testing.assert_allclose(soft_overlong(lengths, 100, 20, 1.0), [0, 0, -0.05, -0.5, -1, -1], atol=1e-12)
    np.testing.assert_allclose(soft_overlong(lengths, 100, 20, 0.5), [0, 0, -0.025, -0.25, -0.5, -0.5], atol=1e-12)
