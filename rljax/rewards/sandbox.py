"""Runs Python that a model wrote where it can do no harm: bubblewrap namespaces, resource limits, a wall-clock limit.

Inside there are new user, process, network, IPC, host-name and cgroup namespaces; the system's and the interpreter's
files, read-only, and of the user's files nothing; private /proc and /dev; one small tmpfs that can be written; an empty
environment; no capability and no way to make another user namespace; limits on address space, CPU time, processes,
file size and open files, set before the program's first line. All of it dies with its parent, daemons too.

Not stopped: what the kernel itself lets through (there is no system-call filter; for hostile users take a virtual
machine), time spent on the CPU, and memory up to the address space times the processes of one run.

Without a working bubblewrap nothing is run: `check` says what is missing. Only where `settle` allowed it, which is
`reward.unsandboxed_code`, does a plain process with the resource limits alone take its place, which can read, write and
send whatever the user can.
"""

import contextlib
import dataclasses
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

from rljax.config import ConfigError

_NOBODY = "65534"
_SCRATCH_BYTES = 16 << 20
_PROBE_SECONDS = 20.0
_LIMITS = {
    "RLIMIT_AS": 1 << 30,
    "RLIMIT_CPU": 40,
    "RLIMIT_NPROC": 16,
    "RLIMIT_FSIZE": 8 << 20,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
}

# Limits what runs in this interpreter before anything hostile does, and leaves no name behind that a program forgot to
# import. The job comes through an inherited file: an argument is limited to 128 KiB, and standard input is the job's.
_BOOT = """
def __job():
    import json, os, resource, sys
    with os.fdopen(int(sys.argv.pop()), encoding="ascii") as file:
        job = json.load(file)
    for name, value in job["limits"].items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    if job["payload"] is not None:
        globals()["PAYLOAD"] = job["payload"]
    return compile(job["code"], "<string>", "exec")
exec(__job())
"""

_PROBE = """
import os, socket
assert os.getuid() == 65534, "the user is not nobody"
assert [name for _, name in socket.if_nameindex()] in ([], ["lo"]), "there is a network"
assert not os.path.exists(PAYLOAD["file"]), "files of the user can be seen"
for folder in ("/", "/usr", "/dev", "/dev/shm", "/proc"):
    try:
        open(os.path.join(folder, "written"), "w").close()
    except OSError:
        continue
    raise AssertionError(folder + " can be written")
with open("/proc/self/status") as file:
    held = [line.split()[1] for line in file if line.startswith("Cap")]
assert held and not any(int(mask, 16) for mask in held), "there are capabilities"
children = 0
try:
    while children < 100 and os.fork():
        children += 1
    if children < 100:
        import signal
        signal.pause()
except OSError:
    print(PAYLOAD["token"])
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended."""

    exit_status: int | None
    """None when it was stopped, at the wall-clock limit or for writing too much; negative for a signal."""
    output: bytes
    """Standard output and standard error, as they came."""


def check() -> None:
    """Returns if programs can be run.

    Raises:
      ConfigError: there is no working sandbox, and programs may not run without one.
    """
    found = problem()
    if found and not (_settled and _settled.unsandboxed):
        raise ConfigError(
            f"code rewards run programs that a model wrote, and there is no sandbox for them: {found}; or, to run "
            "them with all the rights of this user, give --reward.unsandboxed_code true (to `rljax reward` and "
            "`rljax eval --rescore`: --unsandboxed-code)"
        )


def settle(found: str, *, unsandboxed: bool) -> None:
    """For this process, from now on: takes what another found, instead of trying within the limit of an item.

    Args:
      found: its `problem()`.
      unsandboxed: programs may run where there is no sandbox.
    """
    global _settled
    _settled = _Settled(found, unsandboxed)


def run(code: str, *, seconds: float, output_bytes: int = 1 << 20, payload: Any = None) -> Result:
    """Runs a program to its end or its limits, with nothing on standard input. Arguments as for `process`.

    Args:
      output_bytes: a program that writes more is stopped.
    """
    deadline = time.monotonic() + seconds
    with process(code, payload, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
        output = read(running, running.stdout, deadline=deadline, at_most=output_bytes)
        if len(output) > output_bytes:
            return Result(None, output[:output_bytes])
        try:
            return Result(running.wait(max(0.0, deadline - time.monotonic())), output)
        except subprocess.TimeoutExpired:
            return Result(None, output)


@contextlib.contextmanager
def process(
    code: str,
    payload: Any = None,
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[bytes]]:
    """A started program; killed, with what it started, when the context ends.

    Args:
      code: Python, run as `__main__`.
      payload: JSON-able; the code finds it as the global PAYLOAD, unless None.
      stdin, stdout, stderr: as for `subprocess.Popen`.

    Raises:
      ConfigError: as `check`.
    """
    check()
    with contextlib.ExitStack() as stack:
        job = stack.enter_context(tempfile.TemporaryFile())
        job.write(json.dumps({"limits": _LIMITS, "code": code, "payload": payload}).encode("ascii"))
        job.seek(0)
        folder, bare = "/", bool(problem())
        if bare:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rljax-code-", ignore_cleanup_errors=True))
        running = subprocess.Popen(
            [*([] if bare else _sandbox()), *_python(), str(job.fileno())],
            pass_fds=[job.fileno()],
            cwd=folder,
            env={"HOME": folder, "PATH": os.defpath},
            start_new_session=True,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
        stack.callback(_end, running)
        yield running


def read(running: subprocess.Popen[bytes], pipe: IO[bytes] | None, *, deadline: float, at_most: int) -> bytes:
    """What comes through the pipe until it or the program ends, the deadline, or one byte more than `at_most`."""
    assert pipe is not None, "a pipe was asked for"
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    received = b""
    while len(received) <= at_most:
        remaining = deadline - time.monotonic()
        ended = running.poll() is not None  # asked first: what it wrote before is then in the pipe
        if not poller.poll(0 if ended else 1000 * max(0.0, min(remaining, 0.1))):
            if ended or remaining <= 0:
                break
            continue
        part = os.read(pipe.fileno(), min(1 << 16, at_most + 1 - len(received)))
        if not part:
            break
        received += part
    return received


def _end(running: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    for pipe in (running.stdin, running.stdout, running.stderr):
        if pipe is not None:
            pipe.close()


@dataclasses.dataclass(frozen=True)
class _Settled:
    problem: str
    unsandboxed: bool


_settled: _Settled | None = None


def problem() -> str:
    """Why there is no sandbox, and what to do about it; "" when there is one that holds.

    Tried once per process; where it did not answer in time, which a busy machine may cause, at each call anew.
    """
    if _settled is not None:
        return _settled.problem
    try:
        return _probe()
    except subprocess.TimeoutExpired as error:
        return f"bubblewrap did not answer in {error.timeout:g} s; try {error.cmd[0]} by hand"


@functools.cache
def _probe() -> str:
    """What `problem` says. Raises subprocess.TimeoutExpired, which is not remembered."""
    for program, package in (("bwrap", "bubblewrap (0.8 or newer)"), ("setpriv", "util-linux")):
        if shutil.which(program) is None and (program == "bwrap" or os.geteuid() == 0):
            return f"the program {program} is not installed; install the package {package}"
    token = os.urandom(16).hex()
    with tempfile.NamedTemporaryFile() as seen, tempfile.TemporaryFile() as job:
        payload = {"token": token, "file": seen.name}
        job.write(json.dumps({"limits": _LIMITS, "code": _PROBE, "payload": payload}).encode("ascii"))
        job.seek(0)
        command = [*_sandbox(), *_python(), str(job.fileno())]
        done = subprocess.run(
            command, capture_output=True, timeout=_PROBE_SECONDS, pass_fds=[job.fileno()], stdin=subprocess.DEVNULL
        )
    said = done.stderr.decode("utf-8", "replace").strip()[-300:] or f"exit status {done.returncode}"
    if done.returncode == 0 and done.stdout.decode("ascii", "replace").split() == [token]:
        return ""
    return (
        f"bubblewrap is installed, but its test failed ({said}); install bubblewrap 0.8 or newer and let this user "
        "create user namespaces (sysctl kernel.unprivileged_userns_clone=1 and, on Ubuntu, "
        "kernel.apparmor_restrict_unprivileged_userns=0; in Docker, --security-opt seccomp=unconfined "
        "--security-opt systempaths=unconfined --cap-add SYS_ADMIN)"
    )


def _python() -> list[str]:
    """The interpreter below any virtual environment: only the standard library is to be had."""
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return [executable, "-I", "-B", "-X", "utf8", "-c", _BOOT]


def _sandbox() -> list[str]:
    """The command in front of the one to run."""
    inner = [
        *("bwrap", "--die-with-parent", "--new-session", "--clearenv", "--setenv", "HOME", "/tmp"),
        *("--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"),
        *("--disable-userns", "--uid", _NOBODY, "--gid", _NOBODY, "--cap-drop", "ALL", "--hostname", "sandbox"),
        *_system(),
        *("--proc", "/proc", "--dev", "/dev", "--size", str(_SCRATCH_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/dev", "--remount-ro", "/proc", "--remount-ro", "/", "--"),
    ]
    if os.geteuid() != 0:
        return inner
    # Root is exempt from RLIMIT_NPROC, in user namespaces too. So root becomes nobody first, in a view of the files in
    # which nobody can reach the interpreter, which may lie below /root. It does so in a process namespace, whose end
    # asks nobody; the signal that says a parent died is not delivered from one user to another.
    return [
        *(
            "bwrap",
            "--die-with-parent",
            "--unshare-pid",
            *_system(),
            "--bind",
            "/proc",
            "/proc",
            "--dev-bind",
            "/dev",
            "/dev",
        ),
        *("--tmpfs", "/tmp", "--", "setpriv", "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups"),
        *("--inh-caps=-all", "--pdeathsig", "KILL", "--", *inner),
    ]


def _system() -> list[str]:
    """Arguments that show the system's programs and libraries and the interpreter's, read-only."""
    cache = "/etc/ld.so.cache"
    arguments = ["--ro-bind", "/usr", "/usr", "--perms", "0755", "--dir", "/etc", "--ro-bind-try", cache, cache]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            arguments += ["--symlink", os.readlink(name), name]
        else:
            arguments += ["--ro-bind-try", name, name]
    prefix = os.path.realpath(sys.base_prefix)
    if prefix != "/usr":
        above, parents = os.path.dirname(prefix), []
        while above not in ("/", "/usr"):
            parents = ["--perms", "0755", "--dir", above, *parents]  # else only root may pass
            above = os.path.dirname(above)
        arguments += [*(parents if above == "/" else []), "--ro-bind", prefix, prefix]
    return arguments
