"""A worker's side of the line between a benchmark and a peer: JSON objects, one a line, in on stdin and out on stdout.

Standard library only, for every peer runs in an environment of its own. A request is `{"do": name, ...arguments}`, a
reply `{...}` or `{"error": text}`. Whatever a library prints goes to stderr.

The operations of a sampler:

  load    folder, dtype                          -> versions, device, variants
  greedy  prompts, new_tokens                    -> tokens: a list of ids per prompt
  sample  prompts, lengths, variant, seed        -> seconds, drawn, peak_mib

The operations of a trainer, whose completions are lists of ids, `len(prompts)` groups of them:

  load      folder, dtype                        -> versions, variants
  logprobs  prompts, completions                 -> logprobs: a list per completion, under the weights of the folder
  start     prompts, lengths, variant, settings  -> a new run on those weights; one before it ends
  step                                           -> seconds, rollout, reference, update, peak_mib of its next step

And of an update: `load`, `logprobs`, and

  update  prompts, completions, advantages, variant, settings  -> seconds, grad_norm, peak_mib
"""

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

STATUS = "/proc/self/status"


def reset_peak_memory() -> None:
    """Lets `peak_mib` count from what is resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_mib() -> float:
    """Largest resident memory of this process since `reset_peak_memory`, MiB."""
    with open(STATUS) as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def split_by_rows(lengths: list[int], rows: int) -> list[tuple[slice, int]]:
    """Batches of at most `rows` neighbouring rows, each with its longest length: what a static batch has to draw."""
    cuts = range(0, len(lengths), rows or len(lengths))
    parts = [slice(start, start + (rows or len(lengths))) for start in cuts]
    return [(part, max(lengths[part])) for part in parts]


class Stop(Exception):
    """Raised in a training loop that is to end."""


class Turns:
    """A library's own training loop, in a thread, which waits before each step until `step` is called.

    Args:
      loop: runs until `Stop` comes out of `begin`.
    """

    def __init__(self, loop: Callable[["Turns"], None]) -> None:
        self._go: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[dict[str, float] | BaseException] = queue.Queue()
        self._seconds: dict[str, float] = {}
        self._started = 0.0
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)
        self._thread.start()

    def _run(self, loop: Callable[["Turns"], None]) -> None:
        try:
            loop(self)
        except Stop:
            return
        except BaseException as error:
            self._done.put(error)
            return
        self._done.put(RuntimeError("the training loop ended by itself"))

    def begin(self) -> None:
        """Called in the loop before a step."""
        if not self._go.get():
            raise Stop
        reset_peak_memory()
        self._seconds = {"rollout": 0.0, "reference": 0.0}
        self._started = time.perf_counter()

    def end(self) -> None:
        """Called in the loop after a step; what is neither rollout nor reference is the update."""
        seconds = time.perf_counter() - self._started
        update = seconds - sum(self._seconds.values())
        self._done.put({"seconds": seconds, **self._seconds, "update": update, "peak_mib": peak_mib()})

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its seconds added to those of a phase."""

        def run(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._seconds[phase] += time.perf_counter() - started

        return run

    def step(self) -> dict[str, float]:
        """Lets the loop make one step; what `end` says about it."""
        self._go.put(True)
        told = self._done.get()
        if isinstance(told, BaseException):
            raise told
        return told

    def stop(self) -> None:
        """Ends the loop."""
        self._go.put(False)
        self._thread.join()


def serve(operations: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers requests until stdin closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's print may not end up among the replies
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = operations[request.pop("do")](**request)
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
