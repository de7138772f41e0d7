"""Synthetic curves from known laws, with the paper's ladder, steps and noise."""

import numpy as np

from rljax.scaling.curves import Curve

SIZES = np.array([0.5, 1.5, 3, 7, 14, 32, 72]) * 1e9
NOISE = np.array([0.0082, 0.0091, 0.0129, 0.0147, 0.0149, 0.0143, 0.0143]) / np.sqrt(3)
"""Standard deviation of a mean of three runs (arXiv 2509.25300, Table 5; of 32B, whose late steps are one run, that of
its neighbours)."""


def slope(size: float, k_max: float = 0.14, n0: float = 13e9) -> float:
    """k(N)."""
    return k_max / (1 + n0 / size)


def intercept(size: float) -> float:
    """E(N) on prompts: near the paper's .004 to .185."""
    return 0.085 * float(np.log10(size / 5e8))


def paper_law(size: float, x: np.ndarray | float) -> np.ndarray:
    """L [n] of loglinear_kn on prompts x [n], with k_max .14 and N0 13e9."""
    return 10.0 ** (intercept(size) - slope(size) * np.log10(x))


def curve(size: float, steps: np.ndarray, loss: np.ndarray) -> Curve:
    """One run; X in prompts, 6e3 tokens each."""
    samples = steps * 512.0
    x = {"samples": samples, "flops": 6 * size * samples * 6e3, "tokens": samples * 6e3, "step": steps.astype(float)}
    return Curve(size, steps, x, loss, loss[None])


def paper_curves(rng: np.random.Generator, *, steps: int = 105, noise: float = 1.0, ladder: int = 7) -> list[Curve]:
    """The paper's ladder, its noise times `noise`."""
    step = np.arange(1, steps + 1)
    return [
        curve(size, step, paper_law(size, step * 512.0) + noise * sigma * rng.standard_normal(steps))
        for size, sigma in zip(SIZES[-ladder:], NOISE[-ladder:], strict=True)
    ]
