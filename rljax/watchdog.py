"""Ends a process that no longer gets on: where another process of the run is gone, a collective may wait for ever, and
chips are paid for that do nothing. A launcher starts the run again from its last checkpoint (exit code 70).

with Watchdog(300) as watchdog:
    watchdog.enter("update")
    ...
"""

import faulthandler
import os
import sys
import threading
from typing import Self

STUCK = 70
"""Exit code of a process that its watchdog ended."""

_TIMES_LONGEST = 10
"""A phase may take so many times as long as it ever took."""
_TIMES_UNKNOWN = 12
"""A phase that has not ended yet, with its programs still to be compiled: so many times the least."""
_TICK_SECONDS = 0.5


class Watchdog:
    """Watches from a thread of its own that one phase follows the other. A context manager.

    A phase may take `least_seconds`, or ten times as long as the longest of its name, whichever is more. The first of a
    name may take twelve times `least_seconds` and does not count as the longest, for it compiles. Time in which this
    process was stopped as a whole, as by Ctrl-Z, does not count.

    Args:
      least_seconds: 0: nothing is watched.
    """

    def __init__(self, least_seconds: float) -> None:
        self._least = least_seconds
        self._longest: dict[str, float] = {}
        """Seconds by name of those that have ended, without the first of each."""
        self._phase, self._ticks = "", 0
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._least > 0:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def enter(self, phase: str) -> None:
        """`phase` begins, and what was before it has ended."""
        with self._lock:
            longest = self._longest.get(self._phase)
            took = self._ticks * _TICK_SECONDS
            self._longest[self._phase] = 0.0 if longest is None else max(longest, took)
            self._phase, self._ticks = phase, 0

    def limit(self, phase: str) -> float:
        """Seconds that `phase` may take now."""
        if phase not in self._longest:
            return _TIMES_UNKNOWN * self._least
        return max(self._least, _TIMES_LONGEST * self._longest[phase])

    def _watch(self) -> None:
        while not self._over.wait(_TICK_SECONDS):
            with self._lock:
                self._ticks += 1
                phase, limit = self._phase, self.limit(self._phase)
                stuck = self._ticks * _TICK_SECONDS > limit
            if stuck:
                self._end(phase, limit)

    def _end(self, phase: str, limit: float) -> None:
        print(
            f"error: {phase or 'what follows a phase'} has taken more than {limit:.0f} s, as when another process of "
            f"the run is gone; this one ends with exit code {STUCK}, and the run goes on from its last checkpoint when "
            "it is started again. watchdog_seconds sets the limit. Where each thread was:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(STUCK)  # the main thread is inside a call that does not return
