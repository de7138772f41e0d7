"""Each script of tpu_scripts/ alone: what it would do, what it does, and what it does when something fails."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pod import BACKENDS, HERE, SCRIPTS, Pod, dry_runs, open_pod, wait_for

ALL = sorted([*SCRIPTS.rglob("*.sh"), *SCRIPTS.rglob("*.sbatch")])
COMMANDS = {
    *("create", "setup", "sync", "launch", "status", "logs", "supervise", "stop", "teardown", "doctor", "profile"),
}


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    with open_pod(tmp_path) as opened:
        yield opened


# ---------------------------------------------------------------------------------------------------------------- text


def test_shellcheck_is_content() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck (Debian: apt-get install shellcheck)")
    found = subprocess.run(["shellcheck", "-x", *map(str, ALL)], cwd=SCRIPTS, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ALL, ids=lambda file: file.name)
def test_scripts_are_short_and_parse(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert len(lines) < 100
    assert all(len(line) <= 120 for line in lines)
    subprocess.run(["bash", "-n", str(script)], check=True)
    is_command = script.name not in ("lib.sh", "settings.sh") and script.parent.name != "backends"
    assert is_command == (lines[0] == "#!/usr/bin/env bash") == bool(script.stat().st_mode & 0o100)


def test_every_script_and_setting_is_explained() -> None:
    readme = (SCRIPTS / "README.md").read_text()
    files = {str(file.relative_to(SCRIPTS)) for file in SCRIPTS.rglob("*") if file.is_file()}
    assert {name for name in files if f"`{name}`" not in readme} <= {"README.md", "config.env"}
    assert {f"{name}.sh" for name in COMMANDS} <= files
    example = (SCRIPTS / "config.env.example").read_text()
    text = "".join(file.read_text() for file in ALL)
    read = set(re.findall(r': "\$\{([A-Z_]+):=', text)) | set(re.findall(r'"\$\{([A-Z_]+):=', text))
    read |= {name for line in re.findall(r"^ *need ([A-Z_ ]+)$", text, re.MULTILINE) for name in line.split()}
    given = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    assert read == given


def test_the_example_is_a_config(tmp_path: Path) -> None:
    """Its values, commented ones included, and the defaults it names are those of the scripts."""
    show = f'source {SCRIPTS}/lib.sh && for n in $(compgen -v); do case $n in [A-Z]*) echo "$n=${{!n-}}" ;; esac; done'
    defaults = subprocess.run(
        ["bash", "-c", show, "show", "--dry-run", "--config", str(SCRIPTS / "config.env.example")],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    used = dict(line.partition("=")[::2] for line in defaults.splitlines())
    example = (SCRIPTS / "config.env.example").read_text()
    patience = example[example.index("# --- patience") :]
    said = re.findall(r"^#([A-Z_]+)=(\S+)", patience, re.MULTILINE)
    assert len(said) == 10
    for name, value in said:
        assert used[name] == value.replace("$HOME", str(tmp_path)).replace("$NAME", used["NAME"]), name


# ------------------------------------------------------------------------------------------------------------ dry runs


@pytest.mark.parametrize("backend", BACKENDS)
def test_dry_runs_show_the_exact_arguments_and_do_nothing(backend: str, tmp_path: Path) -> None:
    assert dry_runs(tmp_path, backend) == (HERE / "golden" / f"{backend}.txt").read_text()


def test_what_a_dry_run_shows_is_what_is_run(pod: Pod) -> None:
    shown = [
        shlex.split(line)
        for script in ("create", "setup", "sync", "launch", "stop", "teardown")
        for line in pod.run(script, "--dry-run").splitlines()
        if line.startswith("gcloud ")
    ]
    pod.ready()
    pod.run("launch")
    pod.run("stop")
    pod.run("teardown", "--yes")
    commit = (subprocess.check_output(["git", "-C", str(SCRIPTS.parent), "rev-parse", "HEAD"], text=True)).strip()
    # A dry run does not know the commit, nor that `stop` comes after `launch`.
    shown = [[w.replace("COMMIT", commit).replace("stop 0000", "stop 0001") for w in words] for words in shown]
    assert all(words in pod.calls() for words in shown) and len(shown) > 15


# ------------------------------------------------------------------------------------------------------- create, setup


def test_create_waits_and_says_why_it_failed(pod: Pod) -> None:
    pod.plan(states=["ABSENT?"])
    assert "makes no sense" in pod.run("create", code=1)
    assert pod.count("create") == 0
    pod.plan(states=["NOT_FOUND", "WAITING_FOR_RESOURCES", "PROVISIONING"])
    pod.run("create")
    pod.run("create")  # it is there: asked for once
    assert pod.count("queued-resources", "create") == 1 and pod.count("describe", "queued-resources") == 7
    pod.plan(final_state="FAILED")
    assert "preempted or failed" in pod.run("create", code=1)


def test_create_reports_the_reason(pod: Pod) -> None:
    pod.plan(states=["NOT_FOUND", "WAITING_FOR_RESOURCES", "FAILED"])
    assert "stockout in this zone" in pod.run("create", code=1)


def test_create_ends_in_time(pod: Pod) -> None:
    pod.configure(CREATE_SECONDS=1)
    pod.plan(final_state="WAITING_FOR_RESOURCES")
    assert "not there after 1 s" in pod.run("create", code=1)


def test_create_counts_the_workers(pod: Pod) -> None:
    pod.plan(size=3)
    assert "has 3 workers and NUM_WORKERS is 2" in pod.run("create", code=1)


def test_setup_twice_installs_once_and_keeps_secrets(pod: Pod) -> None:
    secrets = pod.folder / "secrets"
    secrets.write_text("TOKEN=very-secret\n")
    pod.configure(SECRETS_FILE=secrets, TRAIN_COMMAND='bash -c "echo token is $TOKEN"')
    secrets.chmod(0o644)
    assert "others may read" in pod.run("setup", code=64)
    secrets.chmod(0o600)
    pod.run("create")
    pod.plan(ssh_failures={"1": 2})
    pod.run("setup")  # worker 1 answers at the third try
    pod.run("setup")
    for worker in (0, 1):
        lines = (pod.host(worker).parent / "uv.log").read_text().splitlines()
        assert [line.split()[0] for line in lines] == ["venv", "pip"] and "--require-hashes" in lines[1]
        assert "hugepage" in (pod.host(worker).parent / "sudo.log").read_text()
        assert (pod.host(worker) / "env").stat().st_mode & 0o777 == 0o600
        assert pod.host(worker).stat().st_mode & 0o777 == 0o700
    assert not (pod.state / "staged" / "env").exists()
    pod.run("sync")
    pod.run("launch")
    wait_for(lambda: (pod.host(0) / "attempts" / "0001" / "exit").exists())
    assert "token is very-secret" in (pod.host(0) / "attempts" / "0001" / "log").read_text()
    assert not any("very-secret" in word for call in pod.calls() for word in call)


def test_setup_gives_up_on_a_host_and_names_it(pod: Pod) -> None:
    pod.run("create")
    pod.plan(ssh_failures={"1": 99})
    assert "failed on worker 1 (exit code 255)" in pod.run("setup", code=1)


def test_the_lock_has_what_the_package_needs() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    lines = (SCRIPTS / "requirements-tpu.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", lines, re.MULTILINE))
    assert locked["libtpu"] and lines.count("--hash=sha256:") > len(locked)
    for text in [*project["dependencies"], *project["optional-dependencies"]["tpu"]]:
        needed = Requirement(text)
        assert needed.specifier.contains(locked[needed.name.lower()]), text


def test_sync_brings_the_commit_and_nothing_else(pod: Pod) -> None:
    pod.run("create")
    pod.run("setup")
    (pod.host(1) / "code").mkdir()
    (pod.host(1) / "code" / "old.py").touch()
    pod.run("sync")
    root = SCRIPTS.parent
    tracked = subprocess.check_output(["git", "-C", str(root), "ls-tree", "-r", "--name-only", "HEAD"], text=True)
    for worker in (0, 1):
        code = pod.host(worker) / "code"
        found = {str(file.relative_to(code)) for file in code.rglob("*") if file.is_file()}
        assert found == {*tracked.split("\n")[:-1], "COMMIT"}


# ------------------------------------------------------------------------------------------- launch, logs, stop, status


def test_launch_writes_log_and_exit_code_of_every_worker(pod: Pod) -> None:
    pod.ready()
    pod.run("launch")
    wait_for(lambda: (pod.run_dir / "result" / "worker-1").exists())
    wait_for(lambda: (pod.cloud / "bucket/run/logs/0001/worker-1.log").exists())
    said = pod.run("status")
    assert "pod pod: ready" in said and "step 12" in said
    assert "worker 0 exit 0" in said and "worker 1 exit 0" in said
    said = pod.run("logs", "--lines", "1")
    assert sorted(said.splitlines()) == ["[0] step 12", "[1] step 12"]
    pod.run("logs", "--worker", "1", "--save")
    saved = (pod.state / "logs" / "0001" / "worker-1.log").read_text()
    assert saved.startswith("worker 1 starts after step 0\nstep 1\n") and saved.endswith("step 12\n")
    assert (pod.cloud / "bucket/run/logs/0001/worker-1.log").read_text() == saved


def test_a_broken_connection_does_not_start_a_program_twice(pod: Pod) -> None:
    pod.configure(TRAIN_COMMAND="sh -c 'echo begun; sleep 30'")
    pod.ready()
    pod.plan(ssh_breaks_after={"0": 1})
    pod.run("launch")
    assert pod.count("--worker=0", "ssh") > pod.count("--worker=1", "ssh")
    assert (pod.host(0) / "attempts" / "0001" / "log").read_text() == "begun\n"
    said = pod.run("launch", code=1)  # nor beside one that still runs
    assert "attempt 0001 still runs here" in said


def test_stop_lets_the_program_save(pod: Pod) -> None:
    pod.configure(TRAIN_COMMAND=pod.toy(hold=5), SAVE_SECONDS=60)
    pod.ready()
    pod.run("launch")
    pod.wait_for_hold()
    lock = pod.host(0).parent / "tmp" / "libtpu_lockfile"
    lock.touch()
    assert sorted(pod.run("stop").splitlines()) == ["[0] exit 75", "[1] exit 75"]
    assert not lock.exists()
    assert sorted(folder.name for folder in (pod.run_dir / "checkpoints").iterdir()) == ["3", "5"]


def test_a_signal_that_comes_as_the_program_ends_does_not_change_its_exit_code(tmp_path: Path) -> None:
    host = tmp_path / ".rljax"
    (host / "code").mkdir(parents=True)
    shutil.copy(SCRIPTS / "host.sh", host)
    program = tmp_path / "program.py"  # told to stop by another, it ends by itself, while its own signal is on the way
    program.write_text("""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(0.05)
sys.exit(75)
""")

    def exit_code(attempt: int) -> str:
        folder = host / "attempts" / str(attempt)
        folder.mkdir(parents=True)
        command = f"{sys.executable} -I -S {program} {folder}/ready"
        words = ["bash", str(host / "host.sh"), "work", str(attempt), "0", "1", "-", "-", command]
        process = subprocess.Popen(words, env={**os.environ, "HOME": str(tmp_path)}, stderr=subprocess.DEVNULL)
        wait_for(lambda: (folder / "ready").exists())
        time.sleep(0.04 + 0.03 * attempt / 60)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        return (folder / "exit").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(exit_code, range(60))) == {"75\n"}


def test_stop_kills_what_does_not_listen(pod: Pod) -> None:
    pod.configure(TRAIN_COMMAND="bash -c \"trap '' TERM; echo deaf; while :; do sleep 0.1; done\"", SAVE_SECONDS=1)
    pod.ready()
    pod.run("launch")
    wait_for(lambda: (pod.host(1) / "attempts" / "0001" / "log").read_text() == "deaf\n")
    pid = int((pod.host(1) / "attempts" / "0001" / "pid").read_text())
    assert sorted(pod.run("stop").splitlines()) == ["[0] exit 137", "[1] exit 137"]
    wait_for(lambda: subprocess.run(["pgrep", "-s", str(pid)], capture_output=True).returncode == 1)


def test_a_program_that_vanished_is_lost(pod: Pod) -> None:
    pod.configure(TRAIN_COMMAND="sleep 30")
    pod.ready()
    pod.run("launch")
    pod.signal(1, signal.SIGKILL, group=True)
    said = pod.run("status")
    assert "worker 0 running" in said and "worker 1 lost" in said


# ----------------------------------------------------------------------------------------- teardown, doctor, profile


def test_teardown_asks(pod: Pod) -> None:
    pod.run("create")
    assert "nothing was deleted" in pod.run("teardown", code=1)
    assert pod.count("delete") == 0
    said = pod.run("teardown", "--yes")
    assert pod.count("delete", "--force") == 1 and not (pod.cloud / "pod.json").exists()
    assert "What is left" in said and pod.count("du", "gs://bucket/run") == 1
    assert "there is no pod" in pod.run("teardown", "--yes")
    assert not any("rm" in call or "buckets" in call for call in pod.calls())


def test_doctor_finds_each_illness(pod: Pod) -> None:
    pod.ready()
    assert "all 2 workers are well: 8 chips" in pod.run("doctor")
    assert not list(pod.run_dir.glob(".doctor*"))
    (pod.host(1).parent / "chips").write_text("3\n")
    (pod.host(1) / "code" / "COMMIT").write_text("another\n")
    (pod.host(0) / "lock.installed").write_text("another\n")
    (pod.cloud / "no_legacy_bucket_reader").touch()
    late = 'test "$FAKE_HOST" = 1 && echo 5 || exec /bin/date "$@"'
    for tool, body in (("df", "echo Avail; echo 7G"), ("date", late)):
        (pod.folder / "bin" / tool).write_text(f"#!/bin/sh\n{body}\n")
        (pod.folder / "bin" / tool).chmod(0o755)
    said = pod.run("doctor", code=1)
    for illness in (
        "worker 1 has 3 chips, CHIPS_PER_WORKER is 4",
        "hosts differ in their commit",
        "hosts differ in their lock",
        "the clock of worker 1 is",
        "worker 0 has 7 GiB of disk left",
        "worker 1 cannot write, read and describe gs://bucket/run",
    ):
        assert illness in said
    assert "clock of worker 0" not in said and "well" not in said


def test_profile_fetches_what_is_there(pod: Pod) -> None:
    pod.run("profile", code=1)
    trace = pod.run_dir / "profile" / "plugins" / "profile" / "x" / "host.xplane.pb"
    trace.parent.mkdir(parents=True)
    trace.write_bytes(b"trace")
    assert f"xprof --logdir={pod.folder}/got" in pod.run("profile", f"{pod.folder}/got")
    assert (pod.folder / "got" / trace.relative_to(pod.run_dir / "profile")).read_bytes() == b"trace"


# ---------------------------------------------------------------------------------------------- backends and refusals


def test_a_managed_instance_group(tmp_path: Path) -> None:
    settings = {"MACHINE_TYPE": "ct6e-standard-4t", "TOPOLOGY": "2x4", "IMAGE_FAMILY": "family"}
    with open_pod(tmp_path, BACKEND="mig", **settings) as pod:
        pod.run("supervise")
        assert pod.result()[0] == pod.result()[1]
        assert pod.count("ssh", "group-0") and pod.count("ssh", "group-1")
        pod.plan(final_state="SUSPENDED")
        assert "gone" in pod.run("status")
        pod.run("teardown", "--yes")
        assert pod.count("instance-groups", "delete") == 1
        pod.plan()
        pod.run("create")  # policy and template are there already
        assert pod.count("workload-policy", "create") == pod.count("instance-templates", "create") == 1


def test_hosts_that_are_there_already(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("node0\nuser@node1\n")
    show = 'sh -c "echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"'
    with open_pod(tmp_path, BACKEND="ssh", HOSTS_FILE=hosts, RUN_DIR="/nowhere", TRAIN_COMMAND=show) as pod:
        for worker in (0, 1):
            (pod.cloud / "hosts" / str(worker) / "tmp").mkdir(parents=True)
        pod.run("supervise")
        for worker in (0, 1):
            log = (pod.host(worker) / "attempts" / "0001" / "log").read_text()
            assert log == f"{worker} of 2 at node0:8476\n"
        assert all(call[0] in ("ssh", "scp") for call in pod.calls())
        pod.configure(BACKEND="ssh", HOSTS_FILE=hosts, NUM_WORKERS=3)
        assert "has 2 hosts and NUM_WORKERS is 3" in pod.run("launch", code=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PROJECT": ""}, "does not set PROJECT"),
        ({"BACKEND": "cloud"}, "there are queued, mig and ssh"),
        ({"NUM_WORKERS": "many"}, "give the number of hosts"),
        ({"CAPACITY": "free"}, "give spot, reserved or on-demand"),
    ],
)
def test_settings_are_refused_before_anything_is_done(pod: Pod, settings: dict[str, str], message: str) -> None:
    pod.configure(**settings)
    assert message in pod.run("create", code=64)
    assert pod.count("create") == 0


def test_arguments_are_refused(pod: Pod) -> None:
    assert "does not know --bogus" in pod.run("create", "--bogus", code=64)
    assert "wants a value" in pod.run("create", "--config", code=64)
    assert "config.env.example" in pod.run("create", "--config", "/nowhere", code=64)
    assert pod.run("create", "--help").startswith("Asks for the pod")
    assert pod.calls() == []
