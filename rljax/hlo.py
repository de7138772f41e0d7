"""What a compiled program does, read from its text: collectives by the loops they are in, copies of large arrays.

module = Module.parse(compiled.as_text())
module.collectives()
"""

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(
    r"(condition|body|calls|to_apply|called_computations|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_PLACED = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of a kind in a program."""

    kind: str
    loops: int
    """Loops they are inside; 0: they happen once. Those in a loop are counted for one iteration."""
    count: int
    bytes: int
    """Of their results on a chip, together."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    opcode: str
    bytes: int
    """Of its results, together; of one that starts something of the largest, for its operands are named there too."""
    called: tuple[tuple[str, str], ...]
    """(role, computation), such as ("body", "while_body.3")."""
    moves: bool = False
    """It starts a copy from one of the chip's memories to another: TPU programs stage arrays in the fast one."""


@dataclasses.dataclass(frozen=True)
class Module:
    """An optimised HLO module as text, by computation."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Module":
        computations: dict[str, list[Instruction]] = {}
        entry, current = "", ""
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = head[1]
                computations[current] = []
                entry = current if line.startswith("ENTRY") else entry
            elif current and (found := _INSTRUCTION.match(line)):
                called = [
                    (role, name.strip().lstrip("%"))
                    for role, several, one in _CALLED.findall(line)
                    for name in (several or one).split(",")
                ]
                sizes = _array_bytes(found[1])
                size = max(sizes, default=0) if found[2].endswith("-start") else sum(sizes)
                moves = found[2] == "copy-start" and len(set(_memories(found[1])[:2])) == 2
                computations[current].append(Instruction(found[2], size, tuple(called), moves))
        return cls({name: tuple(lines) for name, lines in computations.items()}, entry)

    def loops_of(self) -> dict[str, int]:
        """How many loops each computation that is reached is inside; of several places the outermost."""
        depth, left = {self.entry: 0}, [self.entry]
        while left:
            name = left.pop()
            for instruction in self.computations.get(name, ()):
                for role, called in instruction.called:
                    inside = depth[name] + (instruction.opcode == "while" and role in ("body", "condition"))
                    if called in self.computations and inside < depth.get(called, 1 << 30):
                        depth[called] = inside
                        left.append(called)
        return depth

    def collectives(self) -> tuple[Collective, ...]:
        """By kind and number of loops. An asynchronous one counts where it starts. A reduce-scatter of the TPU compiler
        is a computation with a sum and a slice, whose result is the last line."""
        found: dict[tuple[str, int], list[int]] = {}
        for name, loops in self.loops_of().items():
            if name.startswith("all-reduce-scatter"):
                found.setdefault(("reduce-scatter", loops), []).append(self.computations[name][-1].bytes)
                continue
            for instruction in self.computations[name]:
                kind = instruction.opcode.removesuffix("-start")
                if kind in KINDS:
                    found.setdefault((kind, loops), []).append(instruction.bytes)
        return tuple(Collective(*key, len(sizes), sum(sizes)) for key, sizes in sorted(found.items()))

    def copies_in_loops(self, least_bytes: int, *, moves: bool = False) -> int:
        """Copies of at least so many bytes inside loops: within a memory, or moves from one to another."""
        return sum(
            instruction.opcode in ("copy", "copy-start")
            and instruction.bytes >= least_bytes
            and instruction.moves == moves
            for name, loops in self.loops_of().items()
            if loops
            for instruction in self.computations[name]
        )


def _memories(shape: str) -> list[str]:
    """Where the arrays of a result lie: "" is the main memory."""
    found = []
    for _, _, layout in _PLACED.findall(shape):
        space = _SPACE.search(layout)
        found.append(space[1] if space else "")
    return found


def _array_bytes(shape: str) -> list[int]:
    """Of the arrays of a result, which may be a tuple; layouts and tiles are in braces."""
    return [
        math.prod(map(int, dims.split(","))) * _element_bits(kind) // 8 if dims else _element_bits(kind) // 8
        for kind, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape))
    ]


def _element_bits(kind: str) -> int:
    bits = _BITS.search(kind)
    return 8 if kind == "pred" else int(bits[0]) if bits else 0
