"""A pod for tests: the scripts' settings, and a cloud in a folder that their `gcloud`, `ssh` and `scp` reach."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parents[1] / "tpu_scripts"

PATIENCE = 240
"""Seconds a script may take on a machine that has other things to do; it takes one or two."""

TOOLS = {
    "gcloud": f'exec {sys.executable} -I -S {HERE}/fake_gcloud.py gcloud "$@"',
    "ssh": f'exec {sys.executable} -I -S {HERE}/fake_gcloud.py ssh "$@"',
    "scp": f'exec {sys.executable} -I -S {HERE}/fake_gcloud.py scp "$@"',
    # Of the hosts. An environment whose Python counts chips; an install is only noted down.
    "uv": 'echo "$@" >>"$HOME/uv.log"\n'
    '[ "$1" != venv ] || { mkdir -p venv/bin && printf "#!/bin/sh\\ncat $HOME/chips 2>/dev/null || echo 4\\n" '
    ">venv/bin/python && chmod +x venv/bin/python; }",
    "sudo": 'echo "$@" >>"$HOME/sudo.log"',
}
"""Programs put before all others on the PATH."""


class Pod:
    """One test's cloud, settings and state."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.cloud = folder / "cloud"
        self.state = folder / "state"
        self.run_dir = self.cloud / "bucket" / "run"
        self.config = folder / "config.env"
        self.started: list[subprocess.Popen[str]] = []
        for made in (self.cloud, folder / "bin", folder / "home"):
            made.mkdir()
        (self.cloud / "calls.jsonl").touch()
        self.plan()
        for name, body in TOOLS.items():
            tool = folder / "bin" / name
            tool.write_text(f"#!/bin/sh\n{body}\n")
            tool.chmod(0o755)
        self.configure(**settings)

    def configure(self, **settings: Any) -> None:
        """Two workers of a queued resource that train the toy to step 12, unless `settings` say otherwise."""
        values = {
            "NAME": "pod",
            "BACKEND": "queued",
            "PROJECT": "project",
            "ZONE": "zone-a",
            "ACCELERATOR_TYPE": "v5litepod-8",
            "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
            "NUM_WORKERS": 2,
            "RUN_DIR": "gs://bucket/run",
            "TRAIN_COMMAND": self.toy(),
            "STATE_DIR": self.state,
            "POLL_SECONDS": 0.1,
            "RETRY_SECONDS": 0.1,
            "SAVE_SECONDS": 4,
            "CREATE_SECONDS": 20,
            "UNKNOWN_POLLS": 3,
            "SSH_TRIES": 3,
        }
        lines = [f"{name}={shlex.quote(str(value))}" for name, value in (values | settings).items()]
        self.config.write_text("\n".join(lines) + "\n")

    def toy(self, hold: int = 0) -> str:
        return f"{sys.executable} -I -S {HERE}/toy.py {self.run_dir} 12 {hold}"

    def plan(self, **what: Any) -> None:
        """What shall go wrong: see fake_gcloud.py."""
        (self.cloud / "plan.json").write_text(json.dumps(what))

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder / "home"),
            "FAKE_CLOUD": str(self.cloud),
            "CONFIG": str(self.config),
        }

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(SCRIPTS / f"{script}.sh"), *arguments],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, script: str, *arguments: str, code: int = 0) -> str:
        """What it says on both streams; its exit code must be `code`."""
        out, err = (process := self.start(script, *arguments)).communicate(timeout=PATIENCE)
        assert process.returncode == code, f"{script} ended with {process.returncode}\n{out}\n{err}"
        return out + err

    def ready(self) -> None:
        """Made, set up, and the code is there."""
        for script in ("create", "setup", "sync"):
            self.run(script)

    def host(self, worker: int) -> Path:
        return self.cloud / "hosts" / str(worker) / ".rljax"

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.cloud / "calls.jsonl").read_text().splitlines()]

    def count(self, *words: str) -> int:
        """Calls that hold all these words."""
        return sum(all(word in call for word in words) for call in self.calls())

    def wait_for_hold(self) -> None:
        """Both workers of `toy(hold=5)` have done step 4, and saved step 3."""
        logs = [self.host(worker) / "attempts" / "0001" / "log" for worker in (0, 1)]
        wait_for(lambda: all(log.exists() and "step 4\n" in log.read_text() for log in logs))

    def result(self) -> list[str]:
        """What the workers of a run that is done arrived at."""
        return [(self.run_dir / "result" / f"worker-{worker}").read_text() for worker in (0, 1)]

    def history(self) -> list[str]:
        """Outcome of each attempt."""
        return (self.state / "history").read_text().splitlines()

    def signal(self, worker: int, number: signal.Signals, attempt: str = "0001", *, group: bool = False) -> None:
        """To the wrapper of a program, or to it and the program."""
        pid = int((self.host(worker) / "attempts" / attempt / "pid").read_text())
        (os.killpg if group else os.kill)(pid, number)

    def close(self) -> None:
        """Ends what still runs, here and on the hosts."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()
        for file in self.cloud.glob("hosts/*/.rljax/attempts/*/pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(int(file.read_text()), signal.SIGKILL)


def wait_for(what: Callable[[], bool]) -> None:
    """Until `what()` is true."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@contextlib.contextmanager
def open_pod(folder: Path, **settings: Any) -> Iterator[Pod]:
    pod = Pod(folder, **settings)
    try:
        yield pod
    finally:
        pod.close()


# ------------------------------------------------------------------------------------------------------------ dry runs

BACKENDS: dict[str, dict[str, Any]] = {
    "queued": {"SERVICE_ACCOUNT": "trainer@project.iam.gserviceaccount.com", "SUBNETWORK": "sub", "SECRETS": True},
    "mig": {
        "MACHINE_TYPE": "ct6e-standard-4t",
        "TOPOLOGY": "2x4",
        "IMAGE_FAMILY": "tpu-family",
        "CAPACITY": "reserved",
        "RESERVATION": "ours",
    },
    "ssh": {"HOSTS": "node0\n# spare: node9\nuser@node1\n", "RUN_DIR": "/shared/run"},
}
"""Settings whose dry runs are in golden/BACKEND.txt."""

DRY_RUNS = (
    *("create", "setup", "sync", "launch", "status", "logs --attempt 3 --lines 9 --follow", "logs --worker 1 --save"),
    *("stop", "doctor", "profile /destination", "teardown", "supervise"),
)


def dry_runs(folder: Path, backend: str) -> str:
    """What every script would do, as one text with no path of this machine in it."""
    settings = dict(BACKENDS[backend])
    for name, target in (("SECRETS", "SECRETS_FILE"), ("HOSTS", "HOSTS_FILE")):
        if text := settings.pop(name, None):
            (folder / name).write_text(str(text))
            (folder / name).chmod(0o600)
            settings[target] = folder / name
    with open_pod(folder, BACKEND=backend, TRAIN_COMMAND="rljax train a.yaml --model.path ''", **settings) as pod:
        parts = []
        for command in DRY_RUNS:
            if backend == "ssh" and command.startswith("profile"):
                continue  # refused: the disk is there
            script, *arguments = command.split()
            process = pod.start(script, "--dry-run", *arguments)
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, err
            parts.append(f"$ {script}.sh --dry-run {' '.join(arguments)}".rstrip() + f"\n{out}")
        assert pod.calls() == [] and not pod.state.exists(), "a dry run did something"
    text = "\n".join(parts)
    for path, name in ((folder, "{folder}"), (SCRIPTS.parent, "{repository}")):
        text = text.replace(str(path), name)
    return text
