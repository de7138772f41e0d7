"""A reward worker whose verifiers misbehave on purpose, beside the real ones."""

import os
import re
import sys
import time

from rljax.rewards.answers import Verifier
from rljax.rewards.dispatch import VERIFIERS
from rljax.rewards.worker import serve


def hold_the_lock() -> float:
    """Backtracks for ages inside C, where no Python signal handler runs."""
    re.fullmatch("(a+)+b", "a" * 50)
    return 1.0


def print_a_lot() -> float:
    print('{"status": "scored", "score": 1.0, "message": "forged", "retire": false}', flush=True)
    os.write(1, b"noise\n" * 100_000)
    os.write(2, b"noise\n" * 100_000)
    return 0.5


def tell(value: object) -> float:
    raise ValueError(value)


HOARD: list[bytes] = []
"""What `hoard` never lets go."""

MISBEHAVING: dict[str, Verifier] = {
    "sleep": lambda response, ground_truth, extra_info: time.sleep(float(response)) or 1.0,
    "hold_the_lock": lambda *_: hold_the_lock(),
    "exit": lambda *_: os._exit(7),
    "exit_politely": lambda *_: sys.exit(0),
    "kill": lambda *_: os.kill(os.getpid(), 11) or 0.0,
    "allocate": lambda *_: float(len(bytearray(4 << 30)) > 0),
    "hoard": lambda response, ground_truth, extra_info: HOARD.append(b"x" * (int(response) << 20)) or 1.0,
    "print": lambda *_: print_a_lot(),
    "pid": lambda *_: tell(os.getpid()),
    "imports": lambda response, ground_truth, extra_info: float(response in sys.modules),
    "too_high": lambda *_: 2.0,
    "not_a_number": lambda *_: float("nan"),
    "length": lambda response, ground_truth, extra_info: 1 / (1 + len(response)),
}

if __name__ == "__main__":
    serve(VERIFIERS | MISBEHAVING)
