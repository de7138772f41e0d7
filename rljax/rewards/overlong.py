"""A reward's penalty for coming close to the cap."""

import numpy as np


def soft_overlong(lengths: np.ndarray, cap: int, buffer: int, penalty: float) -> np.ndarray:
    """What is added to the rewards of completions of `lengths` tokens: DAPO's soft overlong punishment, float64.

    0 up to cap - buffer, then falling in a line to -penalty at the cap (arXiv:2503.14476, 3.4).
    """
    over = (lengths - (cap - buffer)) / buffer
    return -penalty * np.clip(over, 0.0, 1.0)
