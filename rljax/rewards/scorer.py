"""What a run scores completions with: a verifier by name or by data source, in one mode, in worker processes; or a
function of the caller's own.

with open_scorer(config.reward) as scorer:
    handle = scorer.submit("openai/gsm8k", "72", {}, ["... #### 72", "... 71"])
    verdicts = handle.result()
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from rljax.config import ConfigError, RewardConfig
from rljax.rewards import sandbox
from rljax.rewards.answers import Undecidable, checked_score, is_coroutine_function
from rljax.rewards.dispatch import CUSTOM, PROGRAMS, Mode, in_other_mode, verifier_for
from rljax.rewards.pool import RewardHandle, RewardItem, RewardPool, Verdict

RewardFunction = Callable[[str, str, dict[str, Any]], Any]
"""fn(response, ground_truth, extra_info) -> reward in [0, 1], or a coroutine function that returns one."""


class Pool(Protocol):
    """What scores items beside the caller: `RewardPool` or `CallablePool`."""

    def submit(self, items: Sequence[RewardItem]) -> RewardHandle: ...

    def close(self) -> None: ...


class CallablePool:
    """Scores with a function of this process: in threads or, if it is a coroutine function, in one event loop.

    A thread cannot be killed: one that overruns the limit scores 0, and its thread is left behind.

    Args:
      workers: calls at the same time; coroutines have no such limit.
      timeout_seconds: wall-clock limit of a call.
    """

    def __init__(self, function: RewardFunction, workers: int, timeout_seconds: float) -> None:
        self._function, self._timeout_seconds = function, timeout_seconds
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._loop: asyncio.AbstractEventLoop | None = None
        if is_coroutine_function(function):
            self._loop = asyncio.new_event_loop()
            self._loop_thread = threading.Thread(target=self._run_loop, args=(self._loop,), name="reward", daemon=True)
            self._loop_thread.start()

    def submit(self, items: Sequence[RewardItem]) -> RewardHandle:
        """As `RewardPool.submit`; what an item calls its verifier plays no part."""
        if self._loop is not None:
            return RewardHandle([asyncio.run_coroutine_threadsafe(self._await_one(i), self._loop) for i in items])
        return RewardHandle([self._threads.submit(self._call_one, item) for item in items])

    def close(self) -> None:
        """Drops the items not yet scored."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join()

    @staticmethod
    def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()

    def _call_one(self, item: RewardItem) -> Verdict:
        result: Future[float] = Future()

        def call() -> None:
            try:
                result.set_result(self._function(item.response, item.ground_truth, dict(item.extra_info)))
            except BaseException as error:
                result.set_exception(error)

        start = time.monotonic()
        threading.Thread(target=call, name="reward call", daemon=True).start()
        return self._verdict(lambda: result.result(self._timeout_seconds), start)

    async def _await_one(self, item: RewardItem) -> Verdict:
        start = time.monotonic()
        try:
            call = self._function(item.response, item.ground_truth, dict(item.extra_info))
            score = await asyncio.wait_for(call, self._timeout_seconds)
        except BaseException as error:
            return self._verdict(_raising(error), start)
        return self._verdict(lambda: score, start)

    def _verdict(self, outcome: Callable[[], Any], start: float) -> Verdict:
        try:
            score = checked_score(CUSTOM, outcome())
            return Verdict(score, "scored", time.monotonic() - start)
        except TimeoutError:
            return Verdict(0.0, "timeout", time.monotonic() - start, f"stopped after {self._timeout_seconds:g} s")
        except Undecidable as error:
            return Verdict(0.0, "unparseable", time.monotonic() - start, str(error)[:500])
        except Exception as error:
            return Verdict(0.0, "error", time.monotonic() - start, f"{type(error).__name__}: {error}"[:500])


def _raising(error: BaseException) -> Callable[[], Any]:
    def outcome() -> Any:
        raise error

    return outcome


@dataclasses.dataclass(frozen=True)
class Scoring:
    """Completions of one prompt on their way through the verifiers."""

    verdicts: RewardHandle
    in_other_mode: RewardHandle | None
    """Of the same completions in the other mode, which rewards nobody; None where it is not asked or not another."""

    def result(self) -> list[Verdict]:
        """Waits for the verdicts, one a completion. Raises as `RewardPool.score`."""
        return self.verdicts.result()

    def other(self) -> list[Verdict | None]:
        """Waits for those of the other mode."""
        if self.in_other_mode is None:
            return [None] * len(self.verdicts.result())
        return list(self.in_other_mode.result())


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Which verifier, in which mode, run where."""

    pool: Pool
    name: str = "auto"
    """`reward.name`, or `dispatch.CUSTOM`."""
    mode: Mode = "fixed"
    unsandboxed_code: bool = False
    """Programs may run where there is no sandbox."""

    def check(self, data_sources: Iterable[str]) -> None:
        """Raises ConfigError for a source that has no verifier, or one that cannot run here, before any is scored."""
        for source in sorted(set(data_sources)):
            verifier = verifier_for(source, self.name, self.mode)
            if verifier in PROGRAMS and not self.unsandboxed_code:
                sandbox.check()

    def submit(
        self,
        data_source: str,
        ground_truth: str,
        extra_info: Mapping[str, Any],
        responses: Sequence[str],
        *,
        both_modes: bool = False,
    ) -> Scoring:
        """Begins to score completions of one prompt.

        Args:
          both_modes: for the hack meter: score them in the other mode too.

        Raises:
          ConfigError: no verifier is known for the data source.
        """
        verifier = verifier_for(data_source, self.name, self.mode)
        other = in_other_mode(verifier) if both_modes else None

        def begin(key: str) -> RewardHandle:
            return self.pool.submit([RewardItem(key, text, ground_truth, extra_info) for text in responses])

        return Scoring(begin(verifier), None if other is None else begin(other))


@contextlib.contextmanager
def open_scorer(config: RewardConfig, function: RewardFunction | None = None) -> Iterator[Scorer]:
    """A scorer whose processes or threads live as long as the context.

    Args:
      function: scores in the place of any verifier.

    Raises:
      ConfigError: two rewards are given, or the file of `reward.file` is not there.
    """
    name: str = config.name
    if name == CUSTOM:
        raise ConfigError("reward.name = 'custom' is what a reward of your own is called; give it as reward.file")
    if function is not None and config.file:
        raise ConfigError(f"a reward function was given and reward.file = {config.file!r}, too; leave one out")
    if (function is not None or config.file) and name != "auto":
        raise ConfigError(
            f"reward.name = {name!r} names a verifier, and a reward of your own was given, too; leave one out"
        )
    if function is not None:
        pool: Pool = CallablePool(function, config.workers, config.timeout_seconds)
    else:
        if config.file:
            check_reward_file(config.file)
        pool = RewardPool(
            config.workers,
            config.timeout_seconds,
            reward_file=config.file,
            unsandboxed_code=config.unsandboxed_code,
        )
    if function is not None or config.file:
        name = CUSTOM
    try:
        yield Scorer(pool, name, config.mode, config.unsandboxed_code)
    finally:
        pool.close()


def check_reward_file(given: str) -> None:
    """Raises ConfigError when `given` is not FILE.py:FUNCTION with a file that is there; it is not run here."""
    path, colon, function = given.rpartition(":")
    if not colon or not path.endswith(".py") or not function.isidentifier():
        raise ConfigError(f"reward.file = {given!r} must be FILE.py:FUNCTION, such as my_reward.py:score")
    if not Path(path).is_file():
        raise ConfigError(f"reward.file = {given!r}: there is no file {path}; give the path of one")


def hack_metrics(verdicts: Sequence[Verdict], others: Sequence[Verdict | None], mode: Mode) -> dict[str, float]:
    """The hack meter: on which share of the completions that both modes judged the modes differ.

    `reward/modes_differ_fraction`: they give another reward. `reward/hacked_fraction`: the paper's rule gives more than
    the fixed one, which is what a policy can learn to exploit. `reward/modes_unjudged_fraction`: of all completions
    given to both, those that one or the other did not judge (unparseable, timeout, error), which is no hack. Nothing
    where no completion was given to both.
    """
    both = [(verdict, other) for verdict, other in zip(verdicts, others, strict=True) if other is not None]
    if not both:
        return {}
    pairs = [(v.score, o.score) for v, o in both if v.status == o.status == "scored"]
    paper_more = [(a > b if mode == "paper" else b > a) for a, b in pairs]
    return {
        "reward/modes_differ_fraction": sum(a != b for a, b in pairs) / max(len(pairs), 1),
        "reward/hacked_fraction": sum(paper_more) / max(len(pairs), 1),
        "reward/modes_unjudged_fraction": 1 - len(pairs) / len(both),
    }
