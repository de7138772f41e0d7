"""Procedural tasks: endless problems with worked solutions, their own small vocabulary, and a held-out split.

They let the whole stack learn something real with no download: a tiny model warm-starts on `solution` and then improves
by reinforcement. A question is a pure function of (task, split, seed, index). Questions of each difficulty level are
numbered; a fixed shuffle of the numbers deals them to the splits (even places to training, odd to evaluation), so that
no seed can bring a question of one split into the other, and a shuffle from the seed orders each split, so that no
question comes twice.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Literal

from rljax.config import ConfigError
from rljax.types import PromptRecord

Split = Literal["train", "eval"]
_SPLITS = {"train": 0, "eval": 1}

DIFFICULTY_FIELD = "pass_rate_proxy"
"""Field of `extra_info` that stands for a pass rate: 1 for the shortest questions, 0 for the longest."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A family of questions. Records cycle through the levels, so every batch mixes easy and hard."""

    name: str
    alphabet: tuple[str, ...]
    """Every character a question or a solution may hold."""
    level_sizes: tuple[int, ...]
    """Questions of each level."""
    difficulties: tuple[float, ...]
    """`DIFFICULTY_FIELD` of each level."""
    question: Callable[[int, int], str]
    """Question number `rank` of level `level`."""
    solve: Callable[[str], str]
    """Worked solution; the answer follows its last "="."""

    @property
    def capacity(self) -> int:
        """Records of one split before a question would come twice."""
        return len(self.level_sizes) * (min(self.level_sizes) // 2)

    def record(self, index: int, split: Split, seed: int) -> PromptRecord:
        """Record `index` of a split.

        Raises:
          ConfigError: the index is not in [0, capacity) or the split is unknown.
        """
        if split not in _SPLITS:
            raise ConfigError(f"split = {split!r} of task {self.name!r} is not known; choose 'train' or 'eval'")
        if not 0 <= index < self.capacity:
            raise ConfigError(
                f"record {index} of task {self.name!r} does not exist: a split holds {self.capacity} questions; "
                "ask for fewer records"
            )
        rank_in_level, level = divmod(index, len(self.level_sizes))
        size = self.level_sizes[level]
        place = 2 * _permuted(rank_in_level, size // 2, f"{self.name}/{level}/{split}/{seed}") + _SPLITS[split]
        question = self.question(level, _permuted(place, size, f"{self.name}/{level}"))
        solution = self.solve(question)
        return PromptRecord(
            prompt=({"role": "user", "content": question},),
            data_source=self.name,
            ground_truth=solution.rpartition("=")[2],
            solution=solution,
            extra_info={"index": index, "split": split, DIFFICULTY_FIELD: self.difficulties[level]},
        )

    def records(self, split: Split, count: int, seed: int) -> list[PromptRecord]:
        """The first `count` records of a split, all different. Raises ConfigError when the task has fewer."""
        if not 1 <= count <= self.capacity:
            raise ConfigError(
                f"{count} records of task {self.name!r} were asked for; a split holds 1 to {self.capacity}, "
                "choose a number in that range"
            )
        return [self.record(index, split, seed) for index in range(count)]


def _permuted(index: int, size: int, key: str) -> int:
    """Where a keyed shuffle of range(size) sends `index`, without holding the shuffle.

    A Feistel network permutes the next power of four; following it until the value falls inside the range
    (cycle walking) leaves a permutation of the range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(4):
            digest = hashlib.blake2b(f"{key}/{round_}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        index = left << half | right
        if index < size:
            return index


# ------------------------------------------------------------------------------------------------------- char_count

_LETTERS = "abcdefgh"
_WORD_LENGTHS = range(6, 15)


def _char_count_question(level: int, rank: int) -> str:
    """ "b:abcbbcab": how many b are in the word?"""
    letters = []
    for _ in range(1 + _WORD_LENGTHS[level]):
        rank, letter = divmod(rank, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return f"{letters[0]}:{''.join(letters[1:])}"


def _char_count_solution(question: str) -> str:
    """ "a0b1c1b2b3c3a3b4=4": each letter of the word with the count so far."""
    target, _, word = question.partition(":")
    count, walk = 0, ""
    for letter in word:
        count += letter == target
        walk += f"{letter}{count}"
    return f"{walk}={count}"


# ------------------------------------------------------------------------------------------------------- arithmetic

_DIGITS = ((2, 2), (2, 3), (3, 2), (3, 3))


def _arithmetic_question(level: int, rank: int) -> str:
    """ "47+385"."""
    low_left, low_right = (10 ** (digits - 1) for digits in _DIGITS[level])
    left, right = divmod(rank, 9 * low_right)
    return f"{low_left + left}+{low_right + right}"


def _arithmetic_solution(question: str) -> str:
    """ "7+5+0=12;4+8+1=13;0+3+1=04;=432": columns from the right as digit + digit + carry = two digits."""
    left, _, right = question.partition("+")
    width = max(len(left), len(right))
    carry, columns = 0, ""
    for a, b in zip(reversed(left.zfill(width)), reversed(right.zfill(width)), strict=True):
        total = int(a) + int(b) + carry
        columns += f"{a}+{b}+{carry}={total:02d};"
        carry = total // 10
    return f"{columns}={int(left) + int(right)}"


# ---------------------------------------------------------------------------------------------------------- sorting

_DIGIT_COUNTS = (4, 5, 6, 7, 8, 10, 12, 14, 16, 18)


def _sorting_question(level: int, rank: int) -> str:
    """ "31472"."""
    digits = []
    for _ in range(_DIGIT_COUNTS[level]):
        rank, digit = divmod(rank, 9)
        digits.append(str(1 + digit))
    return "".join(digits)


def _sorting_solution(question: str) -> str:
    """ "=12347". No step is written down, so a model's depth and width must do; the chance of a guess is nil."""
    return "=" + "".join(sorted(question))


TASKS: dict[str, Task] = {
    "char_count": Task(
        name="char_count",
        alphabet=(*_LETTERS, *"0123456789:="),
        level_sizes=tuple(len(_LETTERS) ** (1 + length) for length in _WORD_LENGTHS),
        difficulties=tuple(1 - level / (len(_WORD_LENGTHS) - 1) for level in range(len(_WORD_LENGTHS))),
        question=_char_count_question,
        solve=_char_count_solution,
    ),
    "arithmetic": Task(
        name="arithmetic",
        alphabet=tuple("0123456789+=;"),
        level_sizes=tuple(9 * 10 ** (a - 1) * 9 * 10 ** (b - 1) for a, b in _DIGITS),
        difficulties=tuple(1 - (a + b - 4) / 2 for a, b in _DIGITS),
        question=_arithmetic_question,
        solve=_arithmetic_solution,
    ),
    "sorting": Task(
        name="sorting",
        alphabet=tuple("123456789="),
        level_sizes=tuple(9**count for count in _DIGIT_COUNTS),
        difficulties=tuple(1 - level / (len(_DIGIT_COUNTS) - 1) for level in range(len(_DIGIT_COUNTS))),
        question=_sorting_question,
        solve=_sorting_solution,
    ),
}
"""Tasks by name; `data.train = task:NAME`."""
