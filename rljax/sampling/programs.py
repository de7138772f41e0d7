"""The compiled programs of a sampler: one per static shape, made when first needed or earlier in the background."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

_CORES_PER_COMPILER, _MOST_COMPILERS = 4, 4
"""A program is compiled by one core for most of the time, and tuned on the one accelerator."""


class Programs:
    """Compiled programs by key, a tuple that begins with what the program does.

    `get` waits for one, `prepare` has one compiled while something else runs.
    """

    def __init__(self) -> None:
        self.compilers = min(_MOST_COMPILERS, max(1, (os.cpu_count() or 1) // _CORES_PER_COMPILER))
        """Programs that can be compiled at once in the background."""
        self._compiled: dict[tuple[Any, ...], Future[Any]] = {}
        self._lock = threading.Lock()
        self._background = ThreadPoolExecutor(self.compilers, thread_name_prefix="compile")
        self.seconds = 0.0
        """Spent on compiling by now, in the background included."""

    def __len__(self) -> int:
        return len(self._compiled)

    def count(self, kind: str) -> int:
        """Programs whose key begins with `kind`, those being compiled included."""
        return sum(key[0] == kind for key in self._compiled)

    def get(self, key: tuple[Any, ...], lower: Callable[[], jax.stages.Lowered]) -> Any:
        """The program of `key`; `lower` gives what to compile where there is none yet."""
        mine = Future()
        with self._lock:
            future = self._compiled.setdefault(key, mine)
        if future is mine:
            self._compile(mine, lower)
        return future.result()

    def prepare(self, key: tuple[Any, ...], lower: Callable[[], jax.stages.Lowered]) -> None:
        """Has the program of `key` compiled in the background, if there is none yet."""
        mine = Future()
        with self._lock:
            future = self._compiled.setdefault(key, mine)
        if future is mine:
            self._background.submit(self._compile, mine, lower)

    def _compile(self, future: "Future[Any]", lower: Callable[[], jax.stages.Lowered]) -> None:
        start = time.perf_counter()
        try:
            future.set_result(lower().compile())
        except BaseException as error:  # to whoever waits for the program, in its own thread
            future.set_exception(error)
        finally:
            with self._lock:
                self.seconds += time.perf_counter() - start
