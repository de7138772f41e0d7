"""The process that runs verifiers: one JSON line in, one JSON line out, until its input ends.

Started by `pool.RewardPool` as `python -m rljax.rewards.worker MEMORY_BYTES ALARM_SECONDS [FILE.py:FUNCTION]`; with a
file, that function is the one verifier there is, `custom`. It is its own program
rather than a `multiprocessing` child because a spawned child imports the parent's `__main__` again, which here may
bring JAX and take hold of the accelerator, and because JSON, unlike pickle, cannot carry code. Of the project it
imports `rljax.rewards` and `rljax.config`, neither of which knows JAX.

  in   {"verifier": "math", "response": "...", "ground_truth": "...", "extra_info": {}}
       for programs also {"alarm_seconds": 45.0, "sandbox": {"found": "", "unsandboxed": false}}: another alarm, and
       the arguments of `sandbox.settle`
  out  {"verifiers": ["math", ...]}                                            once, when ready
       {"status": "scored", "score": 1.0, "message": "", "retire": false}      per line in
"""

import asyncio
import importlib.util
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any

from rljax.rewards import sandbox
from rljax.rewards.answers import Undecidable, Verifier, checked_score, is_coroutine_function

GROWTH_BEFORE_RETIRING = 256 * 2**20
"""sympy caches what it sees and never forgets: a worker that has grown by so many bytes is replaced. Not after so many
items: of a verifier that takes microseconds, workers would do nothing but start, which takes each a second or two."""


def serve(verifiers: Mapping[str, Verifier]) -> None:
    """Answers requests from standard input with `verifiers` until it ends, then exits.

    Limits, set by the two command-line arguments: an address space of MEMORY_BYTES, no core file, and a SIGALRM with
    the kernel's default action (death) after ALARM_SECONDS on one item. The pool kills earlier; the alarm is for a
    worker left alone in a long computation by a parent that died, even a computation that holds the interpreter lock.
    """
    memory_bytes, alarm_seconds = int(sys.argv[1]), float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # elsewhere the kernel does not offer it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    requests, replies = _take_standard_streams()
    _write(replies, {"verifiers": sorted(verifiers)})
    grown = _held_bytes() + GROWTH_BEFORE_RETIRING
    for line in requests:
        signal.setitimer(signal.ITIMER_REAL, alarm_seconds)
        reply, retire = _answer(verifiers, line)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(replies, reply | {"retire": retire or _held_bytes() > grown})


def _held_bytes() -> int:
    """Memory of this process: where the kernel says, what it holds, elsewhere the most it has held.

    The latter is not for Linux, where a new program begins with the most that its parent held.
    """
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _take_standard_streams() -> tuple[Any, Any]:
    """Private copies of standard input and output; the well-known ones, and standard error, become /dev/null.

    What a library prints would otherwise land in the protocol. Standard error is given up only here, so that the pool
    can show why a worker failed to start.
    """
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    return requests, replies


def _answer(verifiers: Mapping[str, Verifier], line: bytes) -> tuple[dict[str, Any], bool]:
    """The reply without its last field, and whether this process should not be trusted with another item."""
    try:
        request = json.loads(line)
        verifier = verifiers[request["verifier"]]
        if "sandbox" in request:
            sandbox.settle(**request["sandbox"])
        if "alarm_seconds" in request:
            signal.setitimer(signal.ITIMER_REAL, request["alarm_seconds"])
        score = verifier(request["response"], request["ground_truth"], request["extra_info"])
        score = checked_score(request["verifier"], score)
        return {"status": "scored", "score": score, "message": ""}, False
    except Undecidable as error:
        return {"status": "unparseable", "score": 0.0, "message": _clip(error)}, False
    except BaseException as error:  # counted by the pool; SystemExit and Math-Verify's own are not Exceptions
        return {"status": "error", "score": 0.0, "message": _clip(error)}, isinstance(error, MemoryError)


def _clip(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _write(replies: Any, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode("ascii") + b"\n")  # all else is escaped, so a line is a line
    replies.flush()


def load_function(given: str) -> Verifier:
    """FUNCTION of FILE.py, `given` as FILE.py:FUNCTION; a coroutine function is run to its end at each call.

    The file may import its neighbours: its folder comes last on the path, so that none of them hides a library.
    """
    path, _, name = given.rpartition(":")
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location("rljax_custom_reward", path)
    assert spec is not None and spec.loader is not None, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    if is_coroutine_function(function):
        return lambda *arguments: asyncio.run(function(*arguments))
    return function


if __name__ == "__main__":
    if len(sys.argv) > 3:
        serve({"custom": load_function(sys.argv[3])})
    else:
        from rljax.rewards.dispatch import VERIFIERS

        serve(VERIFIERS)
