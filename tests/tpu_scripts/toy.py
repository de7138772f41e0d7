"""A program that behaves as a run over several hosts does, without JAX: toy.py RUN_FOLDER STEPS [HOLD]

The state is a number that every step changes. All workers do each step together; one whose peer is dead, or does not
come for a minute, ends with 70, as a watchdog makes it. SIGTERM to one makes all save after the same step and end with
75. Each saves its own copy every third step, and all resume from the newest step that every one has saved.
The first attempt goes no further than before step HOLD until something happens to it, or RUN_FOLDER/go is there.
"""

import os
import signal
import sys
import time
from pathlib import Path


def is_alive(pid: int) -> bool:
    """A zombie is not: who started it may be slow to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def write(file: Path, text: str) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial{os.getpid()}")
    partial.write_text(text)
    partial.rename(file)


def main(run: Path, num_steps: int, hold: int) -> int:
    worker, workers = int(os.environ["RLJAX_WORKER"]), int(os.environ["RLJAX_NUM_WORKERS"])
    meeting = run / "meeting" / os.environ["RLJAX_ATTEMPT"]
    asked_to_stop = []
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    write(meeting / f"pid-{worker}", str(os.getpid()))

    def all_alive() -> bool:
        return all(is_alive(int(file.read_text())) for file in meeting.glob("pid-?"))

    def wait() -> None:
        while not asked_to_stop and all_alive() and not any(file.exists() for file in (run / "go", meeting / "stop")):
            time.sleep(0.02)
        if asked_to_stop:
            write(meeting / "stop", "")

    def meet(step: int) -> bool:
        """Waits for all; whether any was asked to stop."""
        write(meeting / f"{step}-{worker}", "stop" if asked_to_stop else "go")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            alive = all_alive()  # before what they said
            said = [file.read_text() for file in meeting.glob(f"{step}-?")]
            if len(said) == workers:
                return "stop" in said
            if not alive:
                break
            time.sleep(0.01)
        print(f"worker {worker}: not all came to step {step}", flush=True)
        sys.exit(70)

    saved = [folder for folder in run.glob("checkpoints/*") if len(list(folder.glob("worker-?"))) == workers]
    first = max((int(folder.name) for folder in saved), default=0)
    state = int((run / "checkpoints" / str(first) / f"worker-{worker}").read_text()) if first else 1
    print(f"worker {worker} starts after step {first}", flush=True)
    for step in range(first + 1, num_steps + 1):
        if step == hold and meeting.name == "0001":
            wait()
        stops = meet(step)
        state = (state * 6364136223846793005 + step) % 2**64
        if stops or step % 3 == 0 or step == num_steps:
            write(run / "checkpoints" / str(step) / f"worker-{worker}", str(state))
        print(f"step {step}", flush=True)
        if stops:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python's own end would hear a late one by dying of it
            return 75
    write(run / "result" / f"worker-{worker}", str(state))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
