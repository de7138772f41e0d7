"""Where updates stop scaling, on paper: what compiled updates send against what links and arithmetic take.

python benchmarks/aot.py --scaling          # compiles them; lines in results/weak_scaling.jsonl
python benchmarks/weak_scaling.py           # writes results/weak_scaling.md of these lines

Nothing is timed: no TPU is there. Bytes and collectives are the compiler's, rates the data sheets'.
"""

import dataclasses
import math
import re
from pathlib import Path

from common import RESULTS, Line
from table import newest, number, read

from rljax.config import ARCHITECTURES, AlgorithmConfig, PlanConfig
from rljax.costs import forward_flops
from rljax.hardware import Slice, slice_named
from rljax.models.scoring import MAX_CHUNK

PAGE = RESULTS / "weak_scaling.md"
SIZES = [name.removeprefix("qwen2.5-") for name in ARCHITECTURES if name.startswith("qwen2.5-")]
PROMPTS, UPDATES = 512, AlgorithmConfig.updates_per_step
"""Of a step of the paper's."""

ABOUT = """\
# Where updates stop scaling

Written by `python benchmarks/weak_scaling.py` from updates compiled for TPU slices that were not there
(`weak_scaling.jsonl`); nothing here was timed. The parameters are split over more and more chips. Of one micro-batch,
which has the tokens that a run of the paper's batch would choose, fewer where many chips share it:

- *sent*: bytes a chip sends in collectives, and how many there are, counted in the program as compiled, loops over
  layers and chunks of the loss head included;
- *links*: these bytes over two links, one each way round a ring (a torus has more, which a collective over one axis of
  the mesh may or may not use);
- *compute*: forward, backward and, with remat full, forward again, of the layers' and the head's products; attention
  and what is no product left out, so that links are not flattered. At the data sheet's rate, and at {share:g} of it, as
  `rljax plan` assumes;
- *links / compute*: with {share:g}. Below 1 there is enough computed to hide what is sent behind, if the compiler
  overlaps them: gathers of parameters may be, sums over tensor wait for each other, and `rljax plan` hides none of
  these.
"""


@dataclasses.dataclass(frozen=True)
class Update:
    """A compiled update, per micro-batch and chip."""

    line: Line

    @property
    def case(self) -> Line:
        return self.line["case"]

    @property
    def where(self) -> Slice:
        return slice_named(self.case["slice"])

    @property
    def axes(self) -> dict[str, int]:
        return {"data": 1} | {axis: int(size) for axis, size in re.findall(r"(\w+) (\d+)", self.case["mesh"])}

    @property
    def row_shards(self) -> int:
        return self.axes["data"] * self.axes["fsdp"]

    @property
    def remat(self) -> str:
        return self.case["batch"].rpartition("remat ")[2]

    @property
    def tokens(self) -> int:
        """Slots of a row shard."""
        _, rows, positions = map(int, re.findall(r"\d+", self.case["batch"])[:3])
        return rows * positions // self.row_shards

    def sent(self) -> tuple[float, float]:
        """(bytes, collectives)."""
        inside, head = (self.line["traffic"].get(loops, {"mib": 0, "collectives": 0}) for loops in ("1", "2"))
        chunks = math.ceil(self.tokens / MAX_CHUNK)
        size, count = (inside[name] + chunks * head[name] for name in ("mib", "collectives"))
        return size * 2**20, count

    def seconds(self) -> dict[str, float]:
        """Links, and compute at the data sheet's rate."""
        arch, chip = ARCHITECTURES[f"qwen2.5-{self.case['model']}"], self.where.chip
        size, _ = self.sent()
        again = forward_flops(arch, self.tokens, 0, 0) if self.remat == "full" else 0
        flops = 3 * forward_flops(arch, self.tokens, 0, self.tokens) + again
        return {
            "links": size / chip.link_rate,
            "compute": flops / self.axes["tensor"] / chip.flops,
        }

    @property
    def ratio(self) -> float:
        """Links over compute, the latter at the share of its rate that `rljax plan` assumes."""
        seconds = self.seconds()
        return seconds["links"] * PlanConfig.learner_share / seconds["compute"]


def verdict(updates: list[Update]) -> str:
    """What becomes of one size, in a sentence or two."""
    plan, first, last = PlanConfig(), updates[0], updates[-1]
    group = AlgorithmConfig.group_size
    tokens = PROMPTS / UPDATES * (plan.prompt_tokens + group * plan.completion_tokens)
    most = max(int(tokens // last.tokens), 1) * last.axes["tensor"]
    growth = last.sent()[0] / last.tokens / (first.sent()[0] / first.tokens) - 1
    stops = next((update for update in updates if update.ratio > 1), None)
    said = f"**{last.case['model']}**: "
    if last is first:
        said += f"compiled for {last.where.chips} chips only; links take {last.ratio:.2f} of the compute"
    else:
        said += (
            f"from {first.where.chips} to {last.where.chips} chips a chip sends {100 * growth:+.0f} % a token; "
            f"links take {first.ratio:.2f} to {last.ratio:.2f} of the compute"
        )
    if stops is None:
        said += ", so they can hide behind it at every number of chips compiled."
    else:
        said += f": they are what limits it from {stops.where.chips} chips on."
    said += (
        f" The paper's own batch, {PROMPTS} "
        f"prompts in {UPDATES} updates, is {tokens / 1e3:,.0f} thousand tokens an update: it fills one micro-batch on "
        f"each of {most:,} chips, and beyond those more chips do not help."
    )
    return said


def row(update: Update) -> str:
    size, count = update.sent()
    seconds, where = update.seconds(), update.where
    compute = seconds["compute"]
    cells = [
        where.name, f"{where.chips}", update.case["mesh"], update.remat, f"{update.tokens:,}",
        f"{size / 2**20:,.0f} in {count:,.0f}", number(1e3 * seconds["links"]),
        number(1e3 * compute), number(1e3 * compute / PlanConfig.learner_share), f"{update.ratio:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page(lines: list[Line]) -> str:
    """Markdown of all updates of `lines`, by size."""
    updates = sorted((Update(line) for line in newest(lines)), key=lambda one: one.where.chips)
    sizes = sorted({one.case["model"] for one in updates}, key=lambda name: float(name.removesuffix("b")))
    text = [ABOUT.format(share=PlanConfig.learner_share)]
    left = [name for name in SIZES if name not in sizes]
    if left:
        text += [f"Not compiled yet: {', '.join(left)}.", ""]
    share = f"ms at {PlanConfig.learner_share:g}"
    for size in sizes:
        mine = [one for one in updates if one.case["model"] == size]
        text += [
            f"## {size}",
            "",
            "| slice | chips | mesh | remat | tokens of a row shard | sent, MiB in collectives | links, ms "
            f"| compute, ms | {share} | links / compute |",
            "|---|---:|---|---|---:|---:|---:|---:|---:|---:|",
            *map(row, mine),
            "",
            verdict(mine),
            "",
        ]
    return "\n".join(text)


def main() -> None:
    file: Path = RESULTS / "weak_scaling.jsonl"
    PAGE.write_text(page(read([file])))
    print(PAGE)


if __name__ == "__main__":
    main()
