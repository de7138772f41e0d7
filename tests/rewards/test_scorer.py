"""Rewards of the caller's own, both modes at once, and what is refused before anything is scored."""

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path

import pytest

from rljax.config import ConfigError, RewardConfig
from rljax.rewards import sandbox
from rljax.rewards.answers import Undecidable
from rljax.rewards.pool import Verdict
from rljax.rewards.scorer import hack_metrics, open_scorer

QUICK = RewardConfig(workers=2, timeout_seconds=0.5)


def half(response: str, ground_truth: str, extra_info: dict) -> float:
    if response == "hang":
        time.sleep(3)
    if response == "raise":
        raise KeyError("no")
    if response == "decline":
        raise Undecidable("too long")
    return 2.0 if response == "two" else 0.5 * (response == ground_truth) + extra_info.get("more", 0)


async def slow_half(response: str, ground_truth: str, extra_info: dict) -> float:
    await asyncio.sleep(0.05)
    if response == "hang":
        await asyncio.sleep(30)
    return half(response, ground_truth, extra_info)


class Judge:
    """An object that is called, and waits."""

    async def __call__(self, response: str, ground_truth: str, extra_info: dict) -> float:
        return await slow_half(response, ground_truth, extra_info)


RESPONSES = ["a", "b", "hang", "raise", "decline", "two", "a"]
STATUSES = ["scored", "scored", "timeout", "error", "unparseable", "error", "scored"]


@pytest.mark.parametrize("function", [half, slow_half, Judge()])
def test_a_function_of_the_caller(function) -> None:
    with open_scorer(QUICK, function) as scorer:
        scorer.check(["any source"])
        verdicts = scorer.submit("any source", "a", {"more": 0.25}, RESPONSES).result()
    assert [v.status for v in verdicts] == STATUSES
    assert [v.score for v in verdicts] == [0.75, 0.25, 0, 0, 0, 0, 0.75]
    assert "KeyError" in verdicts[3].message and "not in [0, 1]" in verdicts[5].message


async def two_arguments(response: str, ground_truth: str) -> float:
    return 1.0


@pytest.mark.parametrize("function", [lambda response, ground_truth: 1.0, two_arguments])
def test_a_function_that_cannot_be_called_fails_its_items_alone(function) -> None:
    with open_scorer(QUICK, function) as scorer:
        verdicts = scorer.submit("any source", "a", {}, ["a", "b"]).result()
    assert [v.status for v in verdicts] == ["error", "error"]
    assert all(v.message.startswith("TypeError: ") for v in verdicts)


def test_coroutines_wait_together() -> None:
    """As many as there are, whatever `workers` is: they are services that answer slowly."""

    async def wait(*_) -> float:
        await asyncio.sleep(0.2)
        return 1.0

    with open_scorer(RewardConfig(workers=1, timeout_seconds=30.0), wait) as scorer:
        start = time.monotonic()
        verdicts = scorer.submit("s", "", {}, ["x"] * 50).result()
        assert time.monotonic() - start < 5
    assert all(v.score == 1 for v in verdicts)


def test_no_thread_is_left_when_nothing_hung() -> None:
    before = threading.active_count()
    with open_scorer(QUICK, half) as scorer:
        scorer.submit("s", "a", {}, ["a"] * 20).result()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before


CUSTOM = """
import asyncio, os, sys
from neighbour import HALF

def score(response, ground_truth, extra_info):
    if response == "die":
        os._exit(3)
    return HALF if response == ground_truth else float("jax" in sys.modules)

async def later(response, ground_truth, extra_info):
    await asyncio.sleep(0.01)
    return 1.0

class Judge:
    async def __call__(self, response, ground_truth, extra_info):
        return await later(response, ground_truth, extra_info)

judge = Judge()
"""


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("HALF = 0.5\n")
    (tmp_path / "my_reward.py").write_text(CUSTOM)
    return tmp_path / "my_reward.py"


def test_a_file_runs_in_processes_of_its_own(custom: Path) -> None:
    with open_scorer(RewardConfig(file=f"{custom}:score", timeout_seconds=60.0)) as scorer:
        verdicts = scorer.submit("any", "a", {}, ["a", "die", "b", "a"]).result()
    assert [(v.score, v.status) for v in verdicts] == [(0.5, "scored"), (0, "crashed"), (0, "scored"), (0.5, "scored")]


@pytest.mark.parametrize("name", ["later", "judge"])
def test_a_coroutine_function_in_a_file(custom: Path, name: str) -> None:
    with open_scorer(RewardConfig(file=f"{custom}:{name}", timeout_seconds=60.0)) as scorer:
        assert scorer.submit("any", "", {}, ["x"]).result()[0].score == 1


@pytest.mark.parametrize(
    "given, says",
    [
        ("reward.py", r"must be FILE\.py:FUNCTION"),
        ("reward.txt:score", r"must be FILE\.py:FUNCTION"),
        ("reward.py:1+1", r"must be FILE\.py:FUNCTION"),
        ("missing.py:score", r"there is no file missing\.py"),
    ],
)
def test_what_is_no_file(given, says) -> None:
    with pytest.raises(ConfigError, match=says), open_scorer(RewardConfig(file=given)):
        pass


def test_two_rewards_are_refused(custom: Path) -> None:
    with pytest.raises(ConfigError, match=r"a reward function was given and reward\.file"):
        open_scorer(RewardConfig(file=f"{custom}:score"), half).__enter__()
    with pytest.raises(ConfigError, match=r"reward\.name = 'gsm8k' names a verifier"):
        open_scorer(RewardConfig(name="gsm8k"), half).__enter__()
    with pytest.raises(ConfigError, match=r"reward\.name = 'custom' is what a reward of your own is called"):
        open_scorer(RewardConfig(name="custom")).__enter__()  # type: ignore[arg-type]


def test_both_modes_at_once() -> None:
    """The answer of the text books' hack: the paper's rule reads one number out of the truth."""
    with open_scorer(RewardConfig(mode="paper", timeout_seconds=60.0)) as scorer:
        scoring = scorer.submit("math__math", "2\\sqrt{3}", {}, ["\\boxed{2}", "\\boxed{2\\sqrt{3}}"], both_modes=True)
        verdicts, others = scoring.result(), scoring.other()
        plain = scorer.submit("exact", "a", {}, ["a"], both_modes=True)
        assert plain.other() == [None]
    assert [v.score for v in verdicts] == [1, 1]
    assert [o.score for o in others if o] == [0, 1]
    assert hack_metrics(verdicts, others, "paper") == {
        "reward/modes_differ_fraction": 0.5,
        "reward/hacked_fraction": 0.5,
        "reward/modes_unjudged_fraction": 0.0,
    }


def test_the_meter_counts_what_has_two_modes() -> None:
    def verdict(score: float) -> Verdict:
        return Verdict(score, "scored", 0.0)

    mine, other = [verdict(1), verdict(0), verdict(1)], [verdict(0), verdict(1), None]
    assert hack_metrics(mine, other, "fixed") == {
        "reward/modes_differ_fraction": 1.0,
        "reward/hacked_fraction": 0.5,
        "reward/modes_unjudged_fraction": 0.0,
    }
    assert hack_metrics(mine, [None] * 3, "fixed") == {}
    late = Verdict(0.0, "timeout", 9.0)  # a right answer that one mode could not judge is no hack
    assert hack_metrics([verdict(1), verdict(1)], [late, verdict(1)], "paper") == {
        "reward/modes_differ_fraction": 0.0,
        "reward/hacked_fraction": 0.0,
        "reward/modes_unjudged_fraction": 0.5,
    }


ADD = "```python\ndef add(a, b):\n    return a + b\n```"
ADD_TESTS = json.dumps({"functional": "def check(f):\n    assert f(1, 2) == 3\n\ncheck(add)"})


@pytest.mark.parametrize("allowed", [True, False])
def test_workers_go_by_what_the_caller_found_and_was_allowed(monkeypatch, allowed) -> None:
    """They do not try the sandbox anew, each within the limit of its first program."""
    monkeypatch.setattr(sandbox, "problem", lambda: "none here")
    settings = RewardConfig(workers=1, timeout_seconds=60.0, unsandboxed_code=allowed)
    with open_scorer(settings) as scorer:
        with contextlib.nullcontext() if allowed else pytest.raises(ConfigError, match="for them: none here"):
            scorer.check(["codegen"])
        (verdict,) = scorer.submit("codegen", ADD_TESTS, {}, [ADD]).result()
    assert (verdict.status, verdict.score) == (("scored", 1.0) if allowed else ("error", 0.0))
    assert allowed or "for them: none here" in verdict.message


def test_a_source_without_a_verifier_is_refused_before_anything_is_scored() -> None:
    with open_scorer(RewardConfig()) as scorer, pytest.raises(ConfigError, match="data_source = 'poetry'"):
        scorer.check(["math__math", "poetry"])
