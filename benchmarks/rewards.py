"""How many completions the verifier pool scores per second, what its start costs, and what an item that hangs costs.

    python benchmarks/rewards.py
    python benchmarks/rewards.py --cases 'naive_dapo/*' start --reps 5

Items are made here, from a seed: completions of about a thousand characters, half of the answers wrong, every number
drawn anew so that no cache answers. They go through `RewardPool` as a run sends them, replacing workers after so many
items included. A row is void unless every score is the one the items were made with.
Lines go to benchmarks/results/rewards.jsonl (format: README.md).
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from common import (
    RESULTS,
    Contender,
    Line,
    append,
    describe_cpu,
    family_seconds,
    line,
    run_fields,
    summary,
    undisturbed,
    versions,
    wait_until_quiet,
)

from rljax.config import ConfigError
from rljax.rewards import sandbox
from rljax.rewards.pool import RewardItem, RewardPool

TIMEOUT_SECONDS = 30.0
HANG_LIMIT_SECONDS = 2.0
START, HANG = "start", "hang"

HANGING = """
from rljax.rewards import math

def score(response, ground_truth, extra_info):
    while response == "hang":
        pass
    return math.score(response, ground_truth, extra_info)
"""

Made = tuple[str, str, float]
"""Response, ground truth, score."""


class Void(Exception):
    """A row that must not be recorded, and why."""


# --------------------------------------------------------------------------------------------------------------- items


def working(rng: random.Random) -> str:
    """What stands before an answer: about a thousand characters."""
    lines = []
    for step in range(1, 21):
        a, b = rng.randrange(10, 1000), rng.randrange(10, 1000)
        lines.append(f"Step {step}: we have ${a} + {b} = {a + b}$, and so we go on.")
    return "\n".join(lines)


def math_answer(rng: random.Random) -> tuple[str, str, str]:
    """An answer, its ground truth, and a wrong answer: mostly integers, as in the paper's training set."""
    a, b, c = rng.randrange(2, 10_000), rng.randrange(2, 100), rng.choice((2, 3, 5, 7, 11, 13))
    kind = rng.random()
    if kind < 0.6:
        return f"{a}", f"{a}", f"{a + b}"
    if kind < 0.75:
        return f"\\dfrac{{{a}}}{{{b}}}", f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{a + 1}}}{{{b}}}"
    if kind < 0.85:
        return f"\\sqrt{{{b * b * c}}}", f"{b}\\sqrt{{{c}}}", f"{b}\\sqrt{{{c + 1}}}"
    if kind < 0.95:
        return f"x^2 + {2 * b}x + {b * b}", f"(x+{b})^2", f"x^2 + {2 * b}x + {b * b + 1}"
    return f"({b}, {a}]", f"({b},{a}]", f"({b}, {a})"


def make_math(rng: random.Random, right: bool) -> Made:
    answer, truth, wrong = math_answer(rng)
    return f"{working(rng)}\nThe answer is $\\boxed{{{answer if right else wrong}}}$.", truth, float(right)


def make_aime(rng: random.Random, right: bool) -> Made:
    """Integers: of other truths the paper's rule may read a piece."""
    truth = rng.randrange(1, 1000)
    return f"{working(rng)}\nThe answer is $\\boxed{{{truth if right else truth + 1}}}$.", f"{truth}", float(right)


def make_gsm8k(rng: random.Random, right: bool) -> Made:
    truth = rng.randrange(2000, 100_000)  # larger than any number of the working
    return f"{working(rng)}\n#### {truth if right else truth + 1}", f"{truth}", float(right)


def make_supergpqa(rng: random.Random, right: bool) -> Made:
    truth, other = rng.sample("ABCDEFGHIJ", 2)
    return f"{working(rng)}\nThe answer is \\boxed{{{truth if right else other}}}.", truth, float(right)


def make_zebra(rng: random.Random, right: bool) -> Made:
    """Five rows, six columns; of a wrong one the last column is."""
    grid = {
        "header": ["Position", "Name", "Job", "Pet", "Drink", "Colour"],
        "rows": [[str(row), *(f"{column}{rng.randrange(1000)}" for column in "njpdc")] for row in range(1, 6)],
    }
    truth = json.dumps(grid)
    if not right:
        for row in grid["rows"]:
            row[-1] += "x"
    return f"{working(rng)}\n<answer>{json.dumps(grid)}</answer>", truth, 1.0 if right else 25 / 30


def make_coder1(rng: random.Random, right: bool) -> Made:
    a, b = rng.randrange(10_000), rng.randrange(10_000)
    tests = "\n".join(f"    assert candidate({x}, {y}) == {x * a + y * b}" for x, y in ((1, 2), (3, 4), (5, 6)))
    truth = json.dumps({"functional": f"def check(candidate):\n{tests}\n\ncheck(mix)"})
    body = f"def mix(x, y):\n    return {a} * x + {b if right else b + 1} * y"
    return f"{working(rng)}\n```python\n{body}\n```", truth, float(right)


MAKERS: dict[str, tuple[Callable[[random.Random, bool], Made], int]] = {
    "naive_dapo": (make_math, 2000),
    "math_dapo": (make_aime, 2000),
    "gsm8k": (make_gsm8k, 2000),
    "supergpqa": (make_supergpqa, 4000),
    "zebra": (make_zebra, 4000),
    "coder1": (make_coder1, 100),
}
"""By verifier: what makes its items, and how many there are in a repeat."""

ROWS = [*(f"{name}/{mode}" for name in MAKERS for mode in ("fixed", "paper")), START, HANG]


def make_items(verifier: str, name: str, count: int, seed: int) -> tuple[list[RewardItem], list[float]]:
    """`count` items for the verifier, made as those of `name`, and their scores."""
    rng, items, scores = random.Random(seed), [], []
    for place in range(count):
        response, truth, score = MAKERS[name][0](rng, place % 2 == 0)
        items.append(RewardItem(verifier, response, truth))
        scores.append(score)
    return items, scores


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Setup:
    """What all rows share."""

    fields: Line
    workers: int
    repeats: int
    patience: float
    busy: bool
    """Count every repeat, whatever else runs."""

    def case(self, count: int, **more: object) -> Line:
        """No model takes part; the completions are all of about one length."""
        return {"items": count, "workers": self.workers, **more}

    def measure(self, name: str, run: Callable[[int], float], *, watched: bool = True) -> list[float]:
        """Seconds of the repeats that count. Raises Void when that is none.

        Args:
          watched: a repeat must be undisturbed; otherwise, only the machine quiet before it.
        """
        contender = Contender(name, os.getpid(), run, family_seconds)
        seconds = []
        for seed in range(1, self.repeats + 1):
            if self.busy:
                taken = run(seed)
            elif watched:
                taken = undisturbed(contender, seed, patience=self.patience)
            else:
                taken = run(seed) if wait_until_quiet(self.patience) else None
            seconds += [] if taken is None else [taken]
        if not seconds:
            raise Void(f"{name}: other processes disturbed every repeat")
        return seconds


def timed(pool: RewardPool, items: Sequence[RewardItem], scores: Sequence[float]) -> float:
    """Seconds until all items are scored. Raises Void when a score is not the expected one."""
    started = time.perf_counter()
    verdicts = pool.score(items)
    seconds = time.perf_counter() - started
    for item, verdict, score in zip(items, verdicts, scores, strict=True):
        if abs(verdict.score - score) > 1e-9 or (verdict.status != "scored" and item.response != "hang"):
            raise Void(f"{item.verifier}: {item.response[-80:]!r} for {item.ground_truth[:80]!r} is {verdict}")
    return seconds


def throughput(verifier: str, setup: Setup) -> Iterator[Line]:
    """Items per second of one verifier in one mode, workers warm."""
    name = verifier.partition("/")[0]
    count = MAKERS[name][1]
    with RewardPool(setup.workers, TIMEOUT_SECONDS) as pool:
        timed(pool, *make_items(verifier, name, max(20, count // 10), 0))  # first comparisons compile patterns
        seconds = setup.measure(
            verifier,
            lambda seed: timed(pool, *make_items(verifier, name, count, seed)),
            watched=name != "coder1",  # of a program that is killed nobody learns what it used
        )
    case = setup.case(count, verifier=verifier)
    yield line(setup.fields, case, "throughput", "items/s", [count / each for each in seconds])


def start(setup: Setup) -> Iterator[Line]:
    """From nothing to the first verdict of every worker, the spare started beside them."""

    def run(seed: int) -> float:
        items = make_items("naive_dapo/fixed", "naive_dapo", setup.workers, seed)
        started = time.perf_counter()
        with RewardPool(setup.workers, TIMEOUT_SECONDS) as pool:
            timed(pool, *items)
            return time.perf_counter() - started

    yield line(setup.fields, setup.case(setup.workers), "start", "seconds", setup.measure(START, run))


def hang(setup: Setup) -> Iterator[Line]:
    """One item in a thousand never comes back: what the batch takes with it and without it; no other score changes."""
    count = 1000

    def run(seed: int, hanging: bool) -> float:
        items, scores = make_items("custom", "naive_dapo", count, seed)
        if hanging:
            items[0], scores[0] = RewardItem("custom", "hang", ""), 0.0
        with RewardPool(setup.workers, HANG_LIMIT_SECONDS, reward_file=f"{file}:score") as pool:
            timed(pool, *make_items("custom", "naive_dapo", 100, 0))
            return timed(pool, items, scores)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hanging.py"
        file.write_text(HANGING)
        without = setup.measure("nothing hangs", lambda seed: run(seed, False))
        hung = setup.measure("one item hangs", lambda seed: run(seed, True))
    least = summary(without)["median"]
    for number, seconds in ((0, without), (1, hung)):
        case = setup.case(count, hanging=number, limit_seconds=HANG_LIMIT_SECONDS)
        yield line(setup.fields, case, "scored", "seconds", seconds)
    yield line(setup.fields, case, "cost of a hung item", "seconds", [each - least for each in hung])


def run_row(name: str, setup: Setup) -> Iterator[Line]:
    """Lines of one row.

    Raises:
      Void: a score is wrong, or other processes disturbed every repeat.
      ConfigError: it needs a sandbox, and there is none.
    """
    if name == START:
        return start(setup)
    if name == HANG:
        return hang(setup)
    if name.startswith("coder1/"):
        sandbox.check()
    return throughput(name, setup)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["*"], help=f"rows by name or pattern: {', '.join(ROWS)}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--out", type=Path, default=RESULTS / "rewards.jsonl")
    parser.add_argument("--busy", action="store_true", help="count every repeat, whatever else runs: a rehearsal")
    given = parser.parse_args()
    rows = [name for name in ROWS if any(fnmatch(name, pattern) for pattern in given.cases)]
    if not rows:
        raise SystemExit(f"--cases {' '.join(given.cases)}: no such row; there are {', '.join(ROWS)}")
    packages = ("rljax", "math-verify", "latex2sympy2-extended", "sympy")
    fields = run_fields("rewards", describe_cpu(), versions(packages))
    setup = Setup(fields, given.workers, given.reps, given.patience, given.busy)
    problems = []
    for name in rows:
        try:
            lines = list(run_row(name, setup))
        except (Void, ConfigError) as problem:
            problems.append(f"{name}: {problem}")
            continue
        append(given.out, lines)
        for made in lines:
            spread = f"({made['min']:g} .. {made['max']:g}, n {made['n']})"
            print(f"{name:18} {made['metric']:20} {made['median']:10.4g} {made['unit']} {spread}", flush=True)
    for problem in problems:
        print(f"VOID {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
