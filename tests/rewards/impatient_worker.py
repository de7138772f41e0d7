"""The reward worker, but programs get three seconds where a run gives them thirty."""

from rljax.rewards import coder1
from rljax.rewards.dispatch import VERIFIERS
from rljax.rewards.worker import serve

if __name__ == "__main__":
    coder1.SECONDS = 3.0
    serve(VERIFIERS)
