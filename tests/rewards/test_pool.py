"""The reward pool under verifiers that hang, die, eat memory and talk, and under hostile completions."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from rljax.rewards.pool import RewardItem, RewardPool, RewardPoolError, Status, Verdict, summarise

WORKER = Path(__file__).with_name("misbehaving_worker.py")
COMMAND = (sys.executable, "-P", str(WORKER))


def item(verifier: str, response: str = "", ground_truth: str = "") -> RewardItem:
    return RewardItem(verifier, response, ground_truth)


EASY = item("naive_dapo/fixed", "\\boxed{\\frac{1}{2}}", "0.5")


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    """Two workers with a generous limit."""
    with RewardPool(2, 60.0, command=COMMAND) as pool:
        yield pool


@pytest.fixture(scope="module")
def strict_pool() -> Iterator[RewardPool]:
    """Two workers that get one second per item."""
    with RewardPool(2, 1.0, command=COMMAND) as pool:
        pool.score([EASY] * 6)  # the first comparison of a process compiles its patterns
        yield pool


def children() -> set[int]:
    """Live child processes of this one."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_verdicts_come_in_the_order_of_the_items(pool):
    lengths = [7, 0, 3, 19, 1, 4, 11, 2] * 5
    items = [item("length", "x" * length) for length in lengths]
    slow_first = [item("sleep", "0.5"), *items]
    verdicts = pool.score(slow_first)
    assert verdicts[0].seconds >= 0.5
    assert [verdict.score for verdict in verdicts[1:]] == [1 / (1 + length) for length in lengths]


def test_no_items_no_verdicts(pool):
    assert pool.score([]) == []


def test_submit_does_not_wait(pool):
    start = time.monotonic()
    handle = pool.submit([item("sleep", "2")])
    assert time.monotonic() - start < 1
    assert not handle.done()
    assert [verdict.score for verdict in handle.result()] == [1.0]
    assert handle.done()


@pytest.mark.parametrize("hang", [item("sleep", "600"), item("hold_the_lock")], ids=lambda hang: hang.verifier)
def test_a_hung_verifier_costs_its_own_item_only(strict_pool, hang):
    items = [EASY, hang, EASY, EASY, hang, hang, EASY, EASY]
    verdicts = strict_pool.score(items)
    hung = [i is hang for i in items]
    assert [verdict.status for verdict in verdicts] == ["timeout" if h else "scored" for h in hung]
    assert [verdict.score for verdict in verdicts] == [0.0 if h else 1.0 for h in hung]
    assert all(1.0 <= verdict.seconds < 5.0 for verdict in verdicts if verdict.status == "timeout")


@pytest.mark.parametrize("death, code", [("exit", "7"), ("kill", "-11")])
def test_a_dying_worker_costs_its_own_item_only(pool, death, code):
    verdicts = pool.score([EASY, item(death), EASY, item(death), item(death), item(death), EASY])
    assert [verdict.status for verdict in verdicts] == ["scored", "crashed", "scored", *["crashed"] * 3, "scored"]
    assert [verdict.score for verdict in verdicts] == [1, 0, 1, 0, 0, 0, 1]
    assert verdicts[1].message.endswith(f"exit status {code}")


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux only")
def test_memory_is_limited_and_the_worker_replaced():
    with RewardPool(1, 60.0, memory_bytes=1 << 30, command=COMMAND) as pool:
        before, hog, after = pool.score([item("pid"), item("allocate"), item("pid")])
    assert (hog.status, hog.score) == ("error", 0.0)
    assert hog.message.startswith("MemoryError")
    assert before.message != after.message


@pytest.mark.parametrize(
    "verifier, message",
    [
        ("pid", "ValueError: "),
        ("exit_politely", "SystemExit: 0"),
        ("too_high", "ValueError: verifier too_high returned 2.0"),
        ("not_a_number", "ValueError: verifier not_a_number returned nan"),
    ],
)
def test_a_raising_verifier_is_an_error_and_not_a_zero(pool, verifier, message):
    failed, easy = pool.score([item(verifier), EASY])
    assert (failed.status, failed.score, easy.status) == ("error", 0.0, "scored")
    assert failed.message.startswith(message)


def test_what_a_verifier_prints_does_not_reach_the_protocol(pool):
    verdicts = pool.score([item("print"), EASY, item("print"), EASY])
    assert [(verdict.score, verdict.message) for verdict in verdicts] == [(0.5, ""), (1.0, "")] * 2


@pytest.mark.parametrize(
    "response",
    ["\x00", "\ud800\udfff \udc80", 'quotes " and \\ and \n\r\u2028 lines', "x" * (1 << 20), "\ud800" * (1 << 20), ""],
    ids=["nul", "surrogates", "lines", "megabyte", "megabyte of surrogates", "empty"],
)
def test_any_text_goes_through_unchanged(pool, response):
    verdicts = pool.score([RewardItem("exact/fixed", response, response, {"index": 3}), item("length", response), EASY])
    assert [verdict.score for verdict in verdicts] == [1.0, 1 / (1 + len(response)), 1.0]


def test_workers_that_have_grown_are_replaced_and_others_not():
    """Three times 100 MiB are more than 256."""
    items = [*[item("pid")] * 2500, *[item("hoard", "100"), item("pid")] * 4]
    with RewardPool(1, 60.0, command=COMMAND) as pool:
        verdicts = pool.score(items)
    assert len({verdict.message for verdict in verdicts[:2500]}) == 1
    pids = [verdict.message for verdict in verdicts[2501::2]]
    assert pids[0] == pids[1] == verdicts[0].message
    assert pids[2] == pids[3] != pids[1]


def test_workers_import_no_jax(pool):
    """The second assertion shows that the question can be answered yes."""
    heavy = "jax jaxlib flax torch transformers"
    assert [verdict.score for verdict in pool.score([item("imports", name) for name in heavy.split()])] == [0.0] * 5
    assert [verdict.score for verdict in pool.score([item("imports", "math_verify")])] == [1.0]


def test_an_unknown_verifier_is_the_callers_mistake(pool):
    with pytest.raises(AssertionError, match=r"no verifier 'astrology'; there are .*math"):
        pool.score([EASY, item("astrology")])
    assert [verdict.score for verdict in pool.score([EASY] * 6)] == [1.0] * 6


@pytest.mark.parametrize(
    "program, reason",
    [
        ("raise ImportError('no module named sums')", "no module named sums"),
        ("import os; os._exit(3)", "exit status 3"),
        ("print('hello')", "which is not JSON"),
    ],
)
def test_a_worker_that_cannot_start_is_an_error_and_not_a_loop(tmp_path, program, reason):
    starts = tmp_path / "starts"
    script = f"open({str(starts)!r}, 'a').write('x')\n{program}"
    with (
        RewardPool(2, 5.0, command=(sys.executable, "-c", script)) as pool,
        pytest.raises(RewardPoolError, match=reason),
    ):
        pool.score([EASY] * 100)
    assert len(starts.read_text()) < 20


def test_no_process_is_left_behind_even_by_items_in_progress():
    before = children()
    with RewardPool(2, 600.0, command=COMMAND) as pool:
        assert pool.score([EASY])[0].score == 1.0
        handle = pool.submit([item("sleep", "600")] * 20)
        time.sleep(0.5)
        assert len(children() - before) == 3  # two workers and the spare
    assert children() <= before
    assert handle.done()


def test_workers_die_with_a_parent_that_is_killed():
    """Idle ones because their input ends; a busy one, even inside C, by its own alarm five seconds after the limit."""
    program = (
        "import os, sys, time\n"
        "from rljax.rewards.pool import RewardItem, RewardPool\n"
        f"pool = RewardPool(2, 3.0, command={COMMAND!r})\n"
        "pids = [v.message for v in pool.score([RewardItem('pid', '', '')] * 4)]\n"
        "pool.submit([RewardItem('hold_the_lock', '', '')])\n"
        "time.sleep(0.5)\n"
        "threads = os.listdir('/proc/self/task')\n"
        "workers = ' '.join(open(f'/proc/self/task/{t}/children').read() for t in threads).split()\n"
        "print(*workers, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    workers = [int(pid) for pid in result.stdout.split()]
    assert len(workers) == 3, result.stderr
    deadline = time.monotonic() + 30
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))


def test_summarise_counts_what_is_not_a_judgement():
    statuses = ["scored"] * 3 + ["timeout"] * 2 + ["crashed", "unparseable", "error"]
    assert summarise([Verdict(0.0, status, 0.1) for status in statuses]) == {
        "reward/unparseable_fraction": 1 / 8,
        "reward/error_fraction": 1 / 8,
        "reward/timeout_fraction": 2 / 8,
        "reward/crashed_fraction": 1 / 8,
    }
    assert set(summarise([]).values()) == {0.0}


def test_a_failure_is_the_verifiers_own():
    """One that will not judge has seen the answer, and one that hangs was given something to hang on: their 0 stays."""
    failures = [s for s in get_args(Status) if Verdict(0.0, s, 0.1).is_failure]
    assert failures == ["error"]


INJECTION = "__import__('os').system('touch {marker}')"
HOSTILE = {
    "power tower": "9^{9^{9^9}}",
    "power chain": "9^9^9",
    "large power": "10^{10^{8}}+1",
    "large negative power": "0.1^{-1000000000}",
    "power of a power": "((9^{9999})^{9999})^{9999}",
    "multinomial": "(x+y+z)^{300}",
    "logarithm of a tower": "\\log(9^{9^9})",
    "factorial": "100000000!",
    "factorials": "((9!)!)!",
    "binomial": "\\binom{100000000}{50000000}",
    "sum": "\\sum_{i=1}^{1000000000} i",
    "product": "\\prod_{i=1}^{10000000} i",
    "integral": "\\int_0^1 e^{x^x} dx",
    "parentheses": "(" * 3000 + "1" + ")" * 3000,
    "fractions": "\\frac{1}{" * 400 + "1" + "}" * 400,
    "roots": "\\sqrt{" * 31 + "2" + "}" * 31,
    "display brackets": "\\[" * 20_000,
    "set": "\\{" + ",".join(map(str, range(5000))) + "\\}",
    "digits": "1" * 10**6,
    "injection": INJECTION,
    "injection as text": f"\\text{{{INJECTION}}}",
    "nul and surrogates": "\x00\ud800",
    "division by zero": "\\frac{1}{0}",
    "dollars": "$" * 50_000,
    "spaces": "\\ " * 40_000,
    "matrix": "\\begin{pmatrix}" + "1&" * 100 + "1\\end{pmatrix}",
}


def test_hostile_answers_score_zero_within_the_limit(tmp_path):
    marker = tmp_path / "executed"
    answers = [answer.replace("{marker}", str(marker)) for answer in HOSTILE.values()]
    items = []
    for answer in answers:
        items += [item("naive_dapo/fixed", f"so \\boxed{{{answer}}}", "\\sqrt{2}+1"), EASY]
        items += [item("naive_dapo/fixed", answer, "7"), item("gsm8k/fixed", answer, "7")]
    with RewardPool(2, 3.0) as pool:
        verdicts = pool.score(items)
    hostile = dict(zip(HOSTILE, verdicts[::4], strict=True))
    assert {name: verdict.score for name, verdict in hostile.items()} == dict.fromkeys(HOSTILE, 0.0)
    assert all(verdict.seconds < 10 for verdict in verdicts)
    assert not any(verdict.status in ("error", "crashed") for verdict in verdicts)
    assert [verdict.score for verdict in verdicts[1::4]] == [1.0] * len(HOSTILE)  # the next item is scored normally
    assert [verdict.score for verdict in verdicts[2::4] + verdicts[3::4]] == [0.0] * 2 * len(HOSTILE)
    # What the checks before parsing are for: at most these few may cost the whole limit.
    slow = {name for name, verdict in hostile.items() if verdict.status == "timeout"}
    assert slow <= {"power of a power", "multinomial"}
    assert not marker.exists()
