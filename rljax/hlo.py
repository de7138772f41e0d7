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
_CONSTANT = re.compile(r"^\s+%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_PART = re.compile(r"^\s+%?([\w.\-]+) = [su]32\[\]\S* get-tuple-element\(\S+\), index=(\d+)")
_SUM = re.compile(r"^\s+%?([\w.\-]+) = [su]32\[\]\S* add\(%?([\w.\-]+), %?([\w.\-]+)\)")
_STATE = re.compile(r"^\s+ROOT %?[\w.\-]+ = \(.*\) tuple\((.*?)\)(?:,|$)")
_COMMENT = re.compile(r"/\*.*?\*/")
_BELOW = re.compile(r"^\s+ROOT %?[\w.\-]+ = pred\[\]\S* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_GROUPS_BY_SHAPE = re.compile(r"replica_groups=\[([\d,]+)\]<=")
_GROUPS_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_GROUPS_BY_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}")
_AXIS_SIZE = re.compile(r"'(\w+)'=(\d+)")
_AXIS_NAME = re.compile(r"'(\w+)'")
_LAYOUT = re.compile(r"[a-z]+\d*\w*\[[\d,]*\](\{[^}]*\})?")
_CHANNEL = re.compile(r"channel_id=(\d+)")
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
class Traffic:
    """What a device sends in collectives."""

    count: int = 0
    """Of collectives."""
    bytes: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    opcode: str
    bytes: int
    """Of its results, together; of one that starts something of the largest, for its operands are named there too."""
    called: tuple[tuple[str, str], ...]
    """(role, computation), such as ("body", "while_body.3")."""
    channel: str = ""
    """Of a collective; those of one channel are parts of one."""
    devices: int = 1
    """That a collective is among."""
    moves: bool = False
    """It starts a copy from one of the chip's memories to another: TPU programs stage arrays in the fast one."""

    def sent_bytes(self, kind: str) -> float:
        """By each device of a ring, as a collective of `kind`, one of `KINDS`."""
        others = self.devices - 1
        if kind == "collective-permute":
            return self.bytes
        if kind == "reduce-scatter":
            return self.bytes * others
        return self.bytes * others / self.devices * (2 if kind == "all-reduce" else 1)


@dataclasses.dataclass
class Counter:
    """What a computation says of the counter of a loop, if it is the condition or the body of one."""

    limit: tuple[int, int] = (0, 0)
    """(place in the loop's state, what it must be below); 0 and 0: it compares nothing with a constant."""
    _constants: dict[str, int] = dataclasses.field(default_factory=dict)
    _places: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of parts of the state, by name."""
    _sums: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    _result: list[str] = dataclasses.field(default_factory=list)

    def read(self, line: str) -> None:
        """Takes in a line of the computation."""
        if found := _CONSTANT.match(line):
            self._constants[found[1]] = int(found[2])
        elif found := _PART.match(line):
            self._places[found[1]] = int(found[2])
        elif found := _SUM.match(line):
            self._sums[found[1]] = found[2], found[3]
        elif found := _STATE.match(line):
            self._result = [name.strip().lstrip("%") for name in _COMMENT.sub("", found[1]).split(",")]
        elif (found := _BELOW.match(line)) and found[1] in self._places and found[2] in self._constants:
            self.limit = self._places[found[1]], self._constants[found[2]]

    def step(self, place: int) -> int:
        """What a turn adds to the part of the state at `place`; 0: it is not to be seen."""
        names = self._sums.get(self._result[place], ()) if place < len(self._result) else ()
        if not any(self._places.get(name) == place for name in names):
            return 0
        return next((self._constants[name] for name in names if name in self._constants), 0)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a program a computation is."""

    loops: int
    """It is inside of."""
    unknown: int
    """Of these, those whose number of turns is not in the text."""
    turns: int
    """Of the others, all together."""


@dataclasses.dataclass(frozen=True)
class Module:
    """An optimised HLO module as text, by computation."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    counters: dict[str, Counter]
    """Those of conditions and bodies of loops."""

    @classmethod
    def parse(cls, text: str) -> "Module":
        computations: dict[str, list[Instruction]] = {}
        counters: dict[str, Counter] = {}
        entry, current = "", ""
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = head[1]
                computations[current], counters[current] = [], Counter()
                entry = current if line.startswith("ENTRY") else entry
            elif current and (found := _INSTRUCTION.match(line)):
                computations[current].append(_instruction(line, found[1], found[2]))
                counters[current].read(line)
        return cls({name: tuple(lines) for name, lines in computations.items()}, entry, counters)

    def turns(self, loop: Instruction) -> int | None:
        """Of a while loop from 0 to a constant; None: it is not to a constant. Where the step is fused with something
        else it is taken to be 1, as in every loop of JAX; XLA's own, round the devices of a ring, say theirs."""
        roles = dict(loop.called)
        if not {"condition", "body"} <= roles.keys() or roles["condition"] not in self.counters:
            return None
        place, limit = self.counters[roles["condition"]].limit
        step = self.counters[roles["body"]].step(place)
        return -(-limit // (step or 1)) if limit else None

    def places(self) -> dict[str, Place]:
        """Of each computation that is reached; of several places the one inside the fewest loops."""
        found, left = {self.entry: Place(0, 0, 1)}, [self.entry]
        while left:
            name = left.pop()
            here = found[name]
            for instruction in self.computations.get(name, ()):
                turns = self.turns(instruction) if instruction.opcode == "while" else None
                for role, called in instruction.called:
                    inside = here
                    if instruction.opcode == "while" and role in ("body", "condition"):
                        inside = Place(here.loops + 1, here.unknown + (turns is None), here.turns * (turns or 1))
                    if called in self.computations and (called not in found or inside.loops < found[called].loops):
                        found[called] = inside
                        left.append(called)
        return found

    def _collectives(self) -> list[tuple[str, Place, Instruction]]:
        """Each once: (kind, place, instruction). An asynchronous one where it starts, and only there where the TPU
        compiler has it go on beside several products, each fused with a part of it. A reduce-scatter of that compiler
        is a computation with a sum and a slice, whose result is the last line."""
        found, seen = [], set()
        for name, place in self.places().items():
            scatters = name.startswith("all-reduce-scatter")
            for instruction in self.computations[name]:
                kind = instruction.opcode.removesuffix("-start")
                if kind not in KINDS or instruction.channel in seen:
                    continue
                seen |= {instruction.channel} - {""}
                if scatters:
                    kind, last = "reduce-scatter", self.computations[name][-1]
                    instruction = dataclasses.replace(instruction, bytes=last.bytes)
                found.append((kind, place, instruction))
        return found

    def collectives(self) -> tuple[Collective, ...]:
        """By kind and number of loops."""
        found: dict[tuple[str, int], list[int]] = {}
        for kind, place, instruction in self._collectives():
            found.setdefault((kind, place.loops), []).append(instruction.bytes)
        return tuple(Collective(*key, len(sizes), sum(sizes)) for key, sizes in sorted(found.items()))

    def traffic(self) -> dict[int, Traffic]:
        """By the number of loops of unknown length that collectives are inside: in one turn of each of these, and in
        all turns of the loops whose length is known."""
        found: dict[int, Traffic] = {}
        for kind, place, instruction in self._collectives():
            sent = Traffic(place.turns, place.turns * instruction.sent_bytes(kind))
            found[place.unknown] = found.get(place.unknown, Traffic()) + sent
        return dict(sorted(found.items()))

    def copies_in_loops(self, least_bytes: int, *, moves: bool = False) -> int:
        """Copies of at least so many bytes inside loops: within a memory, or moves from one to another."""
        return sum(
            instruction.opcode in ("copy", "copy-start")
            and instruction.bytes >= least_bytes
            and instruction.moves == moves
            for name, place in self.places().items()
            if place.loops
            for instruction in self.computations[name]
        )


def _instruction(line: str, result: str, opcode: str) -> Instruction:
    called = tuple(
        (role, name.strip().lstrip("%"))
        for role, several, one in _CALLED.findall(line)
        for name in (several or one).split(",")
    )
    sizes = _array_bytes(result)
    size = max(sizes, default=0) if opcode.endswith("-start") else sum(sizes)
    channel = _CHANNEL.search(line)
    moves = opcode == "copy-start" and len(set(_memories(result)[:2])) == 2
    return Instruction(opcode, size, called, channel[1] if channel else "", _group_size(line), moves)


def _group_size(line: str) -> int:
    """Devices of each replica group: `[2,4]<=[8]` has groups of 4, `{{0,1},{2,3}}` of 2, and
    `mesh['a'=4,'b'=2] {'b'}` of 2."""
    if found := _GROUPS_BY_SHAPE.search(line):
        return int(found[1].split(",")[-1])
    if found := _GROUPS_LISTED.search(line):
        return len(found[1].split(","))
    if found := _GROUPS_BY_AXES.search(line):
        sizes = dict(_AXIS_SIZE.findall(found[1]))
        return math.prod(int(sizes[axis]) for axis in _AXIS_NAME.findall(found[2]))
    return 1


def _memories(shape: str) -> list[str]:
    """Where the arrays of a result lie: "" is the main memory."""
    spaces = (_SPACE.search(layout) for layout in _LAYOUT.findall(shape))
    return [space[1] if space else "" for space in spaces]


def _array_bytes(shape: str) -> list[int]:
    """Of the arrays of a result, which may be a tuple; layouts and tiles are in braces."""
    return [
        math.prod(map(int, dims.split(","))) * _element_bits(kind) // 8 if dims else _element_bits(kind) // 8
        for kind, dims in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape))
    ]


def _element_bits(kind: str) -> int:
    bits = _BITS.search(kind)
    return 8 if kind == "pred" else int(bits[0]) if bits else 0
