"""Scores completions in killable worker processes, each item under a wall-clock limit.

Completions are hostile input: `9^{9^{9^9}}` or 3,000 nested brackets stop a computer-algebra system for ever, and no
limit inside the process that runs it can be relied on. So verifiers run in `worker.py` processes that own nothing; one
that overruns is killed and replaced, which costs that item its reward and no other item anything. What a worker could
not decide scores 0 and says so in its status; `summarise` turns statuses into metrics.
"""

import collections
import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, Literal

from rljax.rewards import coder1, sandbox
from rljax.rewards.dispatch import PROGRAMS

Status = Literal["scored", "unparseable", "error", "timeout", "crashed"]

_WORKER_COMMAND = (sys.executable, "-P", "-m", "rljax.rewards.worker")  # -P: a math.py in the user's folder is not ours
_START_SECONDS = 120.0
_START_ATTEMPTS = 3
_ALARM_MARGIN_SECONDS = 5.0


class RewardPoolError(RuntimeError):
    """Workers cannot be started: no item can be scored."""


@dataclasses.dataclass(frozen=True)
class RewardItem:
    """One completion to score."""

    verifier: str
    """Key of `dispatch.VERIFIERS`; see `dispatch.verifier_for`."""
    response: str
    ground_truth: str
    extra_info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """JSON-able."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one item. The score is in [0, 1], and 0 unless `status` is "scored".

    scored: the verifier decided. unparseable: it saw an answer that it cannot or will not judge. error: it raised.
    timeout: it was killed at the limit. crashed: its process died.
    """

    score: float
    status: Status
    seconds: float
    """Wall-clock, from handing the item to a worker."""
    message: str = ""

    @property
    def is_failure(self) -> bool:
        """The verifier failed, so that the 0 says nothing of the completion.

        One that was hung or brought down was so by what it read: were that no reward instead of 0, a policy that cannot
        solve a problem would do better to hang its verifier.
        """
        return self.status == "error"


def summarise(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of the items whose 0 is not a judgement, by kind: `reward/{unparseable,error,timeout,crashed}_fraction`."""
    counts = collections.Counter(verdict.status for verdict in verdicts)
    kinds = ("unparseable", "error", "timeout", "crashed")
    return {f"reward/{kind}_fraction": counts[kind] / max(len(verdicts), 1) for kind in kinds}


class RewardPool:
    """Worker processes that score items; a context manager, since processes are held open.

    One process more than `workers` is kept: it is the spare that takes over, already started, when one is killed.

    Args:
      workers: items scored at the same time.
      timeout_seconds: wall-clock limit of one item, the start of the process not included.
      memory_bytes: address space of one worker (Linux).
      reward_file: FILE.py:FUNCTION of a custom verifier, the only one of these workers.
      unsandboxed_code: let programs in completions run where there is no sandbox.
      command: program and arguments of a worker; tests give one with verifiers that misbehave.
    """

    def __init__(
        self,
        workers: int,
        timeout_seconds: float,
        memory_bytes: int = 2 << 30,
        *,
        reward_file: str = "",
        unsandboxed_code: bool = False,
        command: Sequence[str] = _WORKER_COMMAND,
    ) -> None:
        assert workers >= 1, f"workers = {workers} must be at least 1"
        assert timeout_seconds > 0, f"timeout_seconds = {timeout_seconds} must be positive"
        self._timeout_seconds = timeout_seconds
        alarm = str(timeout_seconds + _ALARM_MARGIN_SECONDS)
        self._command = (*command, str(memory_bytes), alarm, *([reward_file] if reward_file else []))
        self._unsandboxed_code = unsandboxed_code
        self._environment = {"PYTHONHASHSEED": "0"}  # sympy's order of terms, hence a verdict, must not vary
        self._lock = threading.Lock()
        self._closed = False
        self._failure = ""
        self._alive: set[_Worker] = set()
        self._idle: collections.deque[_Worker] = collections.deque()  # right: used last and warm; left: starting
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        for _ in range(workers + 1):
            self._idle.appendleft(self._start())

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers; items not yet scored are dropped."""
        with self._lock:
            self._closed = True
            doomed = list(self._alive)
        for worker in doomed:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in doomed:
            worker.release()
        self._alive.clear()

    def score(self, items: Sequence[RewardItem]) -> list[Verdict]:
        """One verdict per item, in the order of the items.

        Raises:
          RewardPoolError: workers cannot be started.
        """
        return self.submit(items).result()

    def submit(self, items: Sequence[RewardItem]) -> "RewardHandle":
        """As `score`, without waiting: the items are scored while the caller does something else."""
        return RewardHandle([self._threads.submit(self._score_one, item) for item in items])

    def _score_one(self, item: RewardItem) -> Verdict:
        request, limit = dataclasses.asdict(item), self._timeout_seconds
        if item.verifier in PROGRAMS:
            limit += coder1.SECONDS
            request["alarm_seconds"] = limit + _ALARM_MARGIN_SECONDS
            # Tried here: once, and outside the limit of an item.
            request["sandbox"] = {"found": sandbox.problem(), "unsandboxed": self._unsandboxed_code}
        # surrogatepass: a lone surrogate goes through (`json.loads` decodes it so); JSON escapes NUL and line ends.
        line = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        worker = self._ready_worker()
        if item.verifier not in worker.verifiers:
            self._idle.append(worker)
            raise AssertionError(f"no verifier {item.verifier!r}; there are {', '.join(worker.verifiers)}")
        start = time.monotonic()
        try:
            reply = worker.ask(line, deadline=start + limit)
        except TimeoutError:
            seconds = time.monotonic() - start
            self._replace(worker)
            return Verdict(0.0, "timeout", seconds, f"stopped after {limit:g} s")
        except _WorkerEnded:
            seconds = time.monotonic() - start
            self._replace(worker)
            return Verdict(0.0, "crashed", seconds, f"the worker died, exit status {worker.returncode}")
        if reply["retire"]:
            self._replace(worker)
        else:
            self._idle.append(worker)
        return Verdict(reply["score"], reply["status"], time.monotonic() - start, reply["message"])

    def _ready_worker(self) -> "_Worker":
        """An idle worker that has started. There always is an idle one: one more is kept than there are threads."""
        reason = self._failure
        for _ in range(0 if self._failure else _START_ATTEMPTS):
            worker = self._idle.pop()
            try:
                worker.wait_until_ready()
                return worker
            except (_WorkerEnded, TimeoutError) as error:
                self._replace(worker)
                reason = f"{error}, exit status {worker.returncode}. {worker.startup_output}".strip()
        self._failure = reason  # remembered: the items still queued fail at once instead of starting processes
        raise RewardPoolError(
            f"a reward worker did not start in {_START_ATTEMPTS} attempts: {reason}; "
            f"the command {' '.join(self._command)} must stay up and write one line of JSON"
        )

    def _replace(self, worker: "_Worker") -> None:
        worker.kill()
        worker.release()
        with self._lock:
            self._alive.discard(worker)
        self._idle.appendleft(self._start())

    def _start(self) -> "_Worker":
        with self._lock:  # closing and starting exclude each other: no worker is started that nobody would kill
            if self._closed:
                raise RewardPoolError("the reward pool is closed")
            worker = _Worker(self._command, self._environment)
            self._alive.add(worker)
        return worker


class RewardHandle:
    """Items being scored."""

    def __init__(self, futures: Sequence["Future[Verdict]"]) -> None:
        self._futures = futures

    def done(self) -> bool:
        """True when `result` would not wait."""
        return all(future.done() for future in self._futures)

    def result(self) -> list[Verdict]:
        """Waits for the verdicts, in the order of the items. Raises as `RewardPool.score`."""
        return [future.result() for future in self._futures]


class _WorkerEnded(Exception):
    """The process is gone, or no longer keeps to the protocol."""


class _Worker:
    """One process and its pipes. Used by one thread at a time, but `kill` may come from any."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.verifiers: list[str] = []
        self.startup_output = ""
        """What a killed process had written to standard error before it was ready (the end of it)."""
        self._ready = False
        self._received = b""
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, closed by `release`
        self._start_deadline = time.monotonic() + _START_SECONDS
        # Own session: Ctrl-C is for the parent.
        # No preexec_fn: with it Python really forks, and JAX's threads do not survive that.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        assert self._process.stdin is not None and self._process.stdout is not None, "pipes were asked for"
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._writable, self._readable = select.poll(), select.poll()  # select() cannot watch descriptors past 1023
        self._writable.register(self._in, select.POLLOUT)
        self._readable.register(self._out, select.POLLIN)

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def wait_until_ready(self) -> None:
        """Returns once the process has reported what it can verify. Raises _WorkerEnded or TimeoutError."""
        if not self._ready:
            self.verifiers = self._read(self._start_deadline)["verifiers"]
            self._ready = True
        if self._process.poll() is not None:  # while idle: not the fault of the item that would be next
            raise _WorkerEnded("it ended")

    def ask(self, line: bytes, deadline: float) -> dict[str, Any]:
        """The reply to one line. Raises _WorkerEnded or TimeoutError, after which the worker must be replaced."""
        rest = memoryview(line)
        while rest:
            _wait(self._writable, deadline)
            try:
                rest = rest[os.write(self._in, rest) :]
            except BrokenPipeError as error:
                raise _WorkerEnded("it stopped reading") from error
        return self._read(deadline)

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            _wait(self._readable, deadline)
            part = os.read(self._out, 1 << 16)
            if not part:
                raise _WorkerEnded("it ended")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError as error:
            raise _WorkerEnded(f"it wrote {line[:200]!r}, which is not JSON") from error

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def release(self) -> None:
        """Closes the files of a killed process; no thread may be using them. May be called twice."""
        if not self._stderr.closed:
            self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 2000))
            self.startup_output = self._stderr.read().decode("utf-8", "replace")
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


def _wait(poller: select.poll, deadline: float) -> None:
    if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("it did not respond in time")
