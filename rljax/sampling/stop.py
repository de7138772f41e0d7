"""Texts that end a completion. Looked for on the host, since tokens do not end where texts do."""

from collections.abc import Callable, Sequence

import numpy as np


class StopStrings:
    """Finds where a completion first contains one of `strings`.

    Args:
      strings: texts; a completion ends with the token that completes one of them.
      decode: token ids to text.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        if not strings or not all(strings):
            raise ValueError(f"stop strings {list(strings)} must be at least one text, and none of them empty")
        self._strings, self._decode = tuple(strings), decode

    def end(self, tokens: np.ndarray) -> int | None:
        """Fewest tokens of `tokens` [n] whose text contains a stop string; None where none does."""
        if not self._in(tokens):
            return None
        low, high = 1, len(tokens)  # the text only gets longer: halve
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._in(tokens[:middle]) else (middle + 1, high)
        return low

    def _in(self, tokens: np.ndarray) -> bool:
        text = self._decode(tokens.tolist())
        return any(string in text for string in self._strings)
