"""Every verifier in both modes, in the pool, on completions that want to hang it, crash it or run code in it.

There is one worker, so that the item behind each hostile one is scored by the same process or by the one that took its
place.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import hostile
import pytest

from rljax.rewards import sandbox
from rljax.rewards.pool import RewardItem, RewardPool, Verdict

COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("impatient_worker.py")))
LIMIT = 5.0
PROGRAM_LIMIT = 3.0
SLACK = 10.0
"""Seconds beyond the limit, for a machine that does something else at the same time."""

GRID = json.dumps({"header": ["Position", "Job"], "rows": [["1", "cook"], ["2", "pilot"]]})
TESTS = json.dumps({"functional": "def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)"})

# verifier -> ground truth no hostile answer has (a drawn letter, in supergpqa's paper mode, is none of it), where
# the hostile text goes, and an easy item
PLACES = {
    "naive_dapo": ("\\sqrt{2}+1", ("\\boxed{@}", "@"), ("so \\boxed{\\frac{1}{2}}", "0.5")),
    "math_dapo": ("-987654321", ("\\boxed{@}", "@"), ("so \\boxed{12}", "12")),
    "gsm8k": ("-987654321", ("#### @", "\\boxed{@}"), ("#### 12", "12")),
    "supergpqa": ("K", ("\\boxed{@}", "Final Answer: @\n"), ("\\boxed{B}", "B")),
    "zebra": (
        GRID,
        ("<answer>@</answer>", '<answer>{"rows": [[@], [@]]}</answer>'),
        (f"<answer>{GRID}</answer>", GRID),
    ),
    "coder1": (TESTS, ("```python\n@\n```",), ("```python\ndef add(a, b): return a + b\n```", TESTS)),
}
TEXTS = {
    f"{kind}: {name}": text
    for kind, texts in (
        ("injection", hostile.INJECTIONS),
        ("expensive", hostile.EXPENSIVE),
        ("deep", hostile.DEEP),
        ("bait", hostile.BAIT),
        ("strange", hostile.STRANGE),
        ("large", hostile.LARGE),
    )
    for name, text in texts.items()
}


def named(verdicts: dict[str, Verdict], wrong) -> dict[str, Verdict]:
    """Those that are wrong, by name, for a message that says which."""
    return {name: verdict for name, verdict in verdicts.items() if wrong(verdict)}


def score_each(verifier: str, texts: dict[str, str]) -> dict[str, Verdict]:
    """The verdict of every hostile text in every place, each followed by an easy item that must be scored."""
    truth, places, easy = PLACES[verifier.partition("/")[0]]
    names, items = [], []
    for place in places:
        for name, text in texts.items():
            names.append(f"{name} in {place}")
            items += [RewardItem(verifier, place.replace("@", text), truth), RewardItem(verifier, *easy)]
    with RewardPool(1, LIMIT, command=COMMAND) as pool:
        verdicts = pool.score(items)
    after = dict(zip(names, verdicts[1::2], strict=True))
    assert not named(after, lambda verdict: (verdict.score, verdict.status) != (1.0, "scored"))
    return dict(zip(names, verdicts[::2], strict=True))


@pytest.mark.parametrize("mode", ["fixed", "paper"])
@pytest.mark.parametrize("verifier", [name for name in PLACES if name != "coder1"])
def test_texts(verifier: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {name: text.replace("{marker}", str(tmp_path / "marker")) for name, text in TEXTS.items()}
    verdicts = score_each(f"{verifier}/{mode}", texts)
    assert not named(verdicts, lambda verdict: verdict.score != 0)
    assert not named(verdicts, lambda verdict: verdict.status in ("error", "crashed"))
    assert not named(verdicts, lambda verdict: verdict.seconds > LIMIT + SLACK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["fixed", "paper"])
def test_programs(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sandbox.problem():
        pytest.skip(f"needs a sandbox: {sandbox.problem()}")
    monkeypatch.chdir(tmp_path)
    nap = f"86399.{os.getpid()}"  # seconds that nothing else sleeps
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        places = {"{marker}": str(tmp_path / "marker"), "{port}": str(listener.getsockname()[1]), "{nap}": nap}
        programs = {}
        for name, program in hostile.PROGRAMS.items():
            for place, value in places.items():
                program = program.replace(place, value)
            programs[name] = program
        verdicts = score_each(f"coder1/{mode}", programs)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not named(verdicts, lambda verdict: verdict.score != 0)
    assert not named(verdicts, lambda verdict: verdict.status != "scored")
    assert not named(verdicts, lambda verdict: verdict.seconds > PROGRAM_LIMIT + SLACK)
    assert list(tmp_path.iterdir()) == []
    assert not sleeps(nap)


def sleeps(nap: str) -> bool:
    """Whether a process still sleeps for so long; one that is being killed gets ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if command.read_bytes().split(b"\0")[:2] == [b"sleep", nap.encode()]:
                    break
            except OSError:
                continue
        else:
            return False
        time.sleep(0.1)
    return True


def test_programs_and_texts_in_one_worker_leave_it_as_it_was(tmp_path: Path) -> None:
    """What a verifier caches or sets, warnings, recursion limits, signal handlers, does not reach the next one."""
    easy = [RewardItem(f"{name}/{mode}", *place[2]) for name, place in PLACES.items() for mode in ("fixed", "paper")]
    if sandbox.problem():
        easy = [item for item in easy if not item.verifier.startswith("coder1/")]
    items = []
    for text in ("9**9**9**9", "(" * 5000, "\x00", "\ud800", hostile.LARGE["braces"]):
        for item in easy:
            truth, places, _ = PLACES[item.verifier.partition("/")[0]]
            items += [RewardItem(item.verifier, places[0].replace("@", text), truth), *easy[:4]]
        items += easy
    with RewardPool(1, LIMIT, command=COMMAND) as pool:
        verdicts = pool.score(items)
    easy_ids = {id(item) for item in easy}
    scores = {id(item) in easy_ids: set() for item in items}
    for item, verdict in zip(items, verdicts, strict=True):
        scores[id(item) in easy_ids].add(verdict.score)
    assert scores == {True: {1.0}, False: {0.0}}
