"""The sandbox against programs that mean harm, and its refusal where there is none."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rljax.config import ConfigError
from rljax.rewards import sandbox


def working():
    """Skips where there is no sandbox."""
    sandbox._probe.cache_clear()
    if sandbox.problem():
        pytest.skip(f"needs a sandbox: {sandbox.problem()}")


@pytest.fixture
def bwrap():
    working()


@pytest.fixture
def no_bwrap(monkeypatch):
    """As on a machine without bubblewrap."""
    monkeypatch.setattr(sandbox.shutil, "which", lambda program: None)
    monkeypatch.setattr(sandbox, "_settled", None)
    sandbox._probe.cache_clear()
    yield
    sandbox._probe.cache_clear()


HOSTILE = {  # program -> what its output must hold; None: it must be stopped
    "write": ("open('/tmp/x', 'w').write('x' * 1000); print(len(open('/tmp/x').read()))", b"1000"),
    "root": ("open('/x', 'w')", b"Read-only"),
    "usr": ("open('/usr/x', 'w')", b"Read-only"),
    "dev": ("open('/dev/shm/x', 'w')", b"Read-only"),
    "core pattern": ("open('/proc/sys/kernel/core_pattern', 'w')", b"Read-only"),
    "project": (f"import os; os.listdir({str(Path(__file__).parent)!r})", b"No such file"),
    "shadow": ("open('/etc/shadow')", b"No such file"),
    "environment": ("import os; print(sorted(os.environ) == ['HOME', 'LC_CTYPE', 'PWD'])", b"True"),
    "loopback": ("import socket; socket.create_connection(('127.0.0.1', 22), 1)", b"Error"),
    "network": ("import socket; socket.create_connection(('1.1.1.1', 80), 1)", b"Network is unreachable"),
    "big file": ("open('/tmp/x', 'wb').write(bytes(9 << 20))", b"File too large"),
    "full disk": ("[open(f'/tmp/{i}', 'wb').write(bytes(1 << 20)) for i in range(40)]", b"No space left"),
    "memory": ("bytearray(4 << 30)", b"MemoryError"),
    "files": ("held = [open('/dev/null') for _ in range(100)]", b"Too many open files"),
    "processes": ("import os\nwhile os.fork(): pass\nimport time; time.sleep(60)", b"Resource temporarily unavailable"),
    "limits": ("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))", b"not allowed"),
    "kill all": ("import os; os.kill(-1, 9)", b"No such process"),
    "namespace": (
        "import ctypes; c = ctypes.CDLL(None); print(c.unshare(0x10000000))",
        b"-1",
    ),
    "mount": ("import ctypes; print(ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None))", b"-1"),
    "input": ("input()", b"EOFError"),
    "segmentation fault": ("import ctypes; ctypes.string_at(1)", b""),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", None),
    "sleep": ("import time; time.sleep(60)", None),
    "loop": ("while True: pass", None),
    "flood": ("while True: print('x' * 1000)", None),
    "closed streams": ("import os, time; os.close(1); os.close(2); time.sleep(60)", None),
}


@pytest.mark.parametrize("program, said", HOSTILE.values(), ids=HOSTILE)
def test_hostile(bwrap, program, said):
    start = time.monotonic()
    result = sandbox.run(program, seconds=2 if said is None else 20)
    assert time.monotonic() - start < 20
    if said is None:
        assert result.exit_status is None
    else:
        assert said in result.output
    assert sandbox.run("print('next')", seconds=20) == sandbox.Result(0, b"next\n")


def alive(mark):
    return mark.encode() in b"".join(
        path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()
    )


def command(pid):
    """Empty of a process that has ended, even where nothing has taken note of its end."""
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [grand for child in children for grand in descendants(int(child))]


def test_daemons_end(bwrap):
    program = (
        "import os, sys\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0: os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(61.625)'])\n"
    )
    assert sandbox.run(program, seconds=20).exit_status == 0
    time.sleep(0.3)
    assert not alive("sleep(61.625)")


def test_ends_with_its_parent(bwrap):
    program = "from rljax.rewards import sandbox; sandbox.run('import time; time.sleep(60)', seconds=60)"
    parent = subprocess.Popen([sys.executable, "-c", program])
    time.sleep(3)
    started = descendants(parent.pid)
    assert any(b"--unshare-user" in command(pid) for pid in started)
    parent.kill()
    parent.wait()
    time.sleep(0.5)
    assert not any(command(pid) for pid in started)


def test_output(bwrap):
    assert sandbox.run("print(PAYLOAD)", seconds=20, payload=[1]) == sandbox.Result(0, b"[1]\n")
    assert sandbox.run("import sys; sys.exit(7)", seconds=20).exit_status == 7
    assert sandbox.run("print('x' * 99, flush=True)", seconds=20, output_bytes=10) == sandbox.Result(None, b"x" * 10)
    assert sandbox.run("PAYLOAD", seconds=20).exit_status == 1
    assert sandbox.run("json", seconds=20).exit_status == 1
    assert sandbox.run("\0", seconds=20).exit_status == 1
    assert sandbox.run("'\ud800'", seconds=20).exit_status == 1
    assert sandbox.run("#" * 2_000_000, seconds=20).exit_status == 0


def test_refuses(no_bwrap):
    message = r"bwrap is not installed.*bubblewrap \(0\.8 or newer\).*reward\.unsandboxed_code true"
    with pytest.raises(ConfigError, match=message):
        sandbox.check()
    with pytest.raises(ConfigError):
        sandbox.run("pass", seconds=1)


def test_says_what_fails(no_bwrap, monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda program: program)
    monkeypatch.setattr(sandbox, "_sandbox", lambda: ["env"])
    with pytest.raises(ConfigError, match=r"(?s)its test failed \(.*AssertionError.*user namespaces"):
        sandbox.check()
    sandbox._probe.cache_clear()
    monkeypatch.setattr(sandbox, "_sandbox", lambda: ["false"])
    with pytest.raises(ConfigError, match="exit status 1"):
        sandbox.check()
    sandbox._probe.cache_clear()
    monkeypatch.setattr(sandbox, "_sandbox", lambda: ["sleep", "60"])
    monkeypatch.setattr(sandbox, "_python", lambda: ["60"])
    monkeypatch.setattr(sandbox, "_PROBE_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"did not answer in 0\.2 s; try sleep by hand"):
        sandbox.check()
    monkeypatch.setattr(sandbox, "_sandbox", lambda: ["false"])
    with pytest.raises(ConfigError, match="exit status 1"):  # tried again: a machine is not busy for ever
        sandbox.check()
    with pytest.raises(ConfigError, match="exit status 1"):
        sandbox.check()


def test_root_needs_setpriv(no_bwrap, monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda program: None if program == "setpriv" else program)
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 0)
    with pytest.raises(ConfigError, match="setpriv is not installed; install the package util-linux"):
        sandbox.check()


def test_unsandboxed_only_where_it_is_allowed(no_bwrap):
    sandbox.settle("as another process found", unsandboxed=False)
    with pytest.raises(ConfigError, match="no sandbox for them: as another process found"):
        sandbox.check()
    sandbox.settle("as another process found", unsandboxed=True)
    sandbox.check()
    result = sandbox.run("import os; print(os.getcwd(), os.environ['HOME'])", seconds=20)
    assert result.exit_status == 0
    assert result.output.split()[0] == result.output.split()[1]
    assert not os.path.exists(result.output.split()[0])
    assert sandbox.run("bytearray(4 << 30)", seconds=20).exit_status == 1
    assert sandbox.run("import time; time.sleep(60)", seconds=0.5).exit_status is None
    # A child that keeps the pipe does not keep us, and ends with the program.
    program = "import os, time\nif os.fork() == 0: time.sleep(60)\n"
    start = time.monotonic()
    assert sandbox.run(program, seconds=20).exit_status == 0
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("user", [0, 1000])
@pytest.mark.parametrize("prefix", ["/usr", "/usr/local", "/opt/python", "/home/me/.local/python"])
@pytest.mark.parametrize("merged", [True, False])
def test_command(monkeypatch, user, prefix, merged):
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: user)
    monkeypatch.setattr(sandbox.sys, "base_prefix", prefix)
    monkeypatch.setattr(sandbox.os.path, "realpath", lambda path: path)
    monkeypatch.setattr(sandbox.os.path, "islink", lambda path: merged)
    monkeypatch.setattr(sandbox.os, "readlink", lambda path: f"usr{path}")
    command = sandbox._sandbox()
    assert ("setpriv" in command) == (user == 0)
    assert ("/home/me" in command) == (prefix == "/home/me/.local/python")
    assert prefix in command
    assert ("usr/lib64" in command) == merged
