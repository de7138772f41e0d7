"""A process that hangs is ended with a code of its own and says where it hung; one that gets on is left alone."""

import subprocess
import sys
import time

import pytest

from rljax.watchdog import STUCK, Watchdog

HANGS = """
import sys, time
from rljax.watchdog import Watchdog

def waits_for_ever():
    time.sleep(60)

with Watchdog(float(sys.argv[1])) as watchdog:
    for _ in range(2):
        watchdog.enter("update")
        time.sleep(0.1)
    watchdog.enter("" if sys.argv[2] == "between" else sys.argv[2])
    waits_for_ever()
"""


@pytest.mark.parametrize("phase", ["update", "between"])
def test_a_hang_ends_the_process_and_is_shown(phase: str) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS, "1", phase], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == STUCK and time.monotonic() - began < 45
    assert "waits_for_ever" in done.stderr and "another process of the run is gone" in done.stderr
    assert ("update has taken more than 1 s" in done.stderr) == (phase == "update")


def test_limits() -> None:
    watchdog = Watchdog(300)
    assert watchdog.limit("update") == 3600  # it compiles
    watchdog.enter("update")
    watchdog._ticks = 2000
    watchdog.enter("sync")
    assert watchdog.limit("update") == 300  # the first says nothing of the next
    watchdog.enter("update")
    watchdog._ticks = 20  # ten seconds
    watchdog.enter("sync")
    assert watchdog.limit("update") == 300 and watchdog.limit("sync") == 300
    watchdog.enter("update")
    watchdog._ticks = 200
    watchdog.enter("sync")
    assert watchdog.limit("update") == 1000
    watchdog.enter("update")
    watchdog.enter("sync")
    assert watchdog.limit("update") == 1000  # the longest, not the last


def test_what_gets_on_is_left_alone() -> None:
    with Watchdog(1) as watchdog:
        for _ in range(20):
            watchdog.enter("update")
            time.sleep(0.1)
            watchdog.enter("sync")
    with Watchdog(0):
        time.sleep(0.1)


def test_it_stops_with_its_context() -> None:
    with Watchdog(1) as watchdog:
        pass
    assert not watchdog._thread.is_alive()
