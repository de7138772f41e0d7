"""supervise.sh: whatever happens to the pod, the run ends with the result of one that nothing happened to."""

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pod import PATIENCE, SCRIPTS, Pod, open_pod, wait_for

STEPS = 12


def undisturbed() -> str:
    """What the toy arrives at."""
    state = 1
    for step in range(1, STEPS + 1):
        state = (state * 6364136223846793005 + step) % 2**64
    return str(state)


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    with open_pod(tmp_path) as opened:
        yield opened


def test_nothing_happens(pod: Pod) -> None:
    pod.run("supervise")
    assert pod.result() == [undisturbed()] * 2
    assert pod.history() == ["0001 done, newest checkpoint: step 12"]
    assert pod.count("queued-resources", "create") == 1 and pod.count("delete") == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_worker(pod: Pod, sent: signal.Signals) -> None:
    """SIGTERM: both save the same step and end with 75. SIGKILL: one is lost, the other notices and ends with 70."""
    pod.configure(TRAIN_COMMAND=pod.toy(hold=5))
    process = pod.start("supervise")
    pod.wait_for_hold()
    pod.signal(1, sent, group=sent == signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert pod.result() == [undisturbed()] * 2
    assert f"exit codes: {'75 75' if sent == signal.SIGTERM else '70 137'}" in errors
    assert [line.split()[1] for line in pod.history()] == ["relaunch,", "done,"]
    resumed = 5 if sent == signal.SIGTERM else 3
    assert f"starts after step {resumed}\n" in (pod.host(0) / "attempts" / "0002" / "log").read_text()
    assert pod.count("queued-resources", "create") == 1 and pod.count("delete") == 0


def test_suspended_mid_run(pod: Pod) -> None:
    """The pod and its disks are gone; another is made, set up, and the run resumes from the bucket."""
    pod.configure(TRAIN_COMMAND=pod.toy(hold=5))
    pod.plan(preempt_at_step=3)
    pod.run("supervise")
    assert pod.result() == [undisturbed()] * 2
    assert [line.split()[1] for line in pod.history()] == ["recreate,", "done,"]
    assert pod.count("queued-resources", "create") == 2 and pod.count("queued-resources", "delete") == 1
    assert "starts after step 3" in (pod.host(0) / "attempts" / "0002" / "log").read_text()


def test_create_fails_twice(pod: Pod) -> None:
    pod.plan(create_failures=2)
    pod.run("supervise")
    assert pod.result() == [undisturbed()] * 2 and pod.count("queued-resources", "create") == 3


def test_create_never_works(pod: Pod) -> None:
    pod.configure(CREATE_TRIES=2)
    pod.plan(create_failures=99)
    assert "could not be made and set up in 2 tries" in pod.run("supervise", code=1)
    assert pod.count("queued-resources", "create") == 2


def test_ssh_breaks_on_one_worker(pod: Pod) -> None:
    """Twice where three tries are made, so nobody notices."""
    pod.plan(ssh_failures={"1": 2})
    pod.run("supervise")
    assert pod.result() == [undisturbed()] * 2 and pod.count("delete") == 0


def test_a_worker_that_stays_silent_costs_the_pod(pod: Pod) -> None:
    """Setup of the first pod never reaches it."""
    pod.plan(ssh_failures={"1": 3})
    pod.run("supervise")
    assert pod.result() == [undisturbed()] * 2
    assert pod.count("queued-resources", "create") == 2 and pod.count("queued-resources", "delete") == 1


def test_the_wrong_number_of_workers(pod: Pod) -> None:
    pod.plan(sizes=[1])
    pod.run("supervise")
    assert pod.result() == [undisturbed()] * 2
    assert pod.count("queued-resources", "create") == 2 and pod.count("queued-resources", "delete") == 1


def test_a_pod_it_did_not_make_is_not_deleted(pod: Pod) -> None:
    """Found with three workers: most likely the setting is wrong."""
    pod.configure(CREATE_TRIES=2)
    pod.plan(size=3)
    pod.run("create", code=1)
    assert "has 3 workers and NUM_WORKERS is 2" in pod.run("supervise", code=1)
    assert pod.count("delete") == 0


def test_garbage_from_describe(pod: Pod) -> None:
    """Before there is a pod, and while one runs: asked again."""
    pod.configure(TRAIN_COMMAND=pod.toy(hold=5))
    pod.plan(states=["<html>502</html>"])
    process = pod.start("supervise")
    pod.wait_for_hold()
    pod.plan(states=["{}", "ERROR"])
    wait_for(lambda: not json.loads((pod.cloud / "plan.json").read_text())["states"])
    (pod.run_dir / "go").touch()
    out, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + errors
    assert pod.result() == [undisturbed()] * 2
    assert pod.count("queued-resources", "create") == 1 and pod.count("delete") == 0


def test_garbage_for_ever_deletes_nothing(pod: Pod) -> None:
    pod.configure(TRAIN_COMMAND=pod.toy(hold=5))
    process = pod.start("supervise")
    pod.wait_for_hold()
    pod.plan(final_state="ACTIVE, more or less")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and "made no sense 3 times in a row" in errors
    assert pod.count("delete") == 0
    pod.plan()
    assert "worker 0 running" in pod.run("status")


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        *(("0 0", "done"), ("75 75", "relaunch"), ("70 70", "relaunch"), ("134 134", "relaunch"), ("137", "relaunch")),
        *(("0 75", "relaunch"), ("1 137", "relaunch"), ("134 1 70", "relaunch")),  # one was killed, others noticed
        *(("64 64", "64"), ("75 64", "64"), ("137 71", "71"), ("72 75", "72")),
        *(("1 1", "1"), ("0 2", "2"), ("139 0", "139"), ("7 0", "7"), ("164 0", "164")),
    ],
)
def test_verdict(codes: str, expected: str) -> None:
    text = (SCRIPTS / "supervise.sh").read_text()
    (function,) = re.findall(r"^verdict\(\) \{\n.*?^\}\n", text, re.DOTALL | re.MULTILINE)
    said = subprocess.run(["bash", "-euc", f"{function}\nverdict {codes}"], capture_output=True, text=True, check=True)
    assert said.stdout == f"{expected}\n"


def test_what_another_try_would_not_change(pod: Pod) -> None:
    pod.configure(TRAIN_COMMAND="bash -c 'codes=(75 64); exit ${codes[$RLJAX_WORKER]}'")
    assert "ended with exit code 64" in pod.run("supervise", code=64)
    assert len(pod.history()) == 1


def test_it_gives_up_without_progress(pod: Pod) -> None:
    pod.configure(TRAIN_COMMAND="bash -c 'exit 70'", STALE_ATTEMPTS=2)
    assert "2 attempts without a new checkpoint" in pod.run("supervise", code=1)
    assert len(pod.history()) == 2


def test_progress_is_counted_from_the_best_step(pod: Pod) -> None:
    """Three attempts that each add a checkpoint are not two without one."""
    save = f"mkdir -p {pod.run_dir}/checkpoints/$((10#$RLJAX_ATTEMPT))"
    pod.configure(TRAIN_COMMAND=f"bash -c '{save}; [[ $RLJAX_ATTEMPT == 0003 ]] || exit 75'", STALE_ATTEMPTS=1)
    pod.run("supervise")
    assert [line.split()[-1] for line in pod.history()] == ["1", "2", "3"]


def test_one_hangs_when_the_other_has_failed(pod: Pod) -> None:
    """It is stopped after SAVE_SECONDS, and both are launched again."""
    hang = "trap : TERM; while :; do sleep 0.1; done"
    script = f"[[ $RLJAX_ATTEMPT == 0001 ]] || exit 0; [[ $RLJAX_WORKER == 1 ]] || exit 134; {hang}"
    (pod.folder / "program").write_text(script)
    pod.configure(TRAIN_COMMAND=f"bash {pod.folder}/program", SAVE_SECONDS=1)
    said = pod.run("supervise")
    assert "others hang" in said and "exit codes: 134 137" in said


def test_a_supervisor_that_is_killed_is_replaced(pod: Pod) -> None:
    """The run does not notice, and the next supervisor watches it instead of starting another."""
    pod.configure(TRAIN_COMMAND=pod.toy(hold=5))
    first = pod.start("supervise")
    pod.wait_for_hold()
    first.kill()
    first.communicate(timeout=PATIENCE)
    asked = pod.count("queued-resources", "describe")
    second = pod.start("supervise")
    wait_for(lambda: pod.count("queued-resources", "describe") > asked + 3)
    (pod.run_dir / "go").touch()
    _, errors = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0 and "attempt 0001 is running: watching it" in errors
    assert pod.result() == [undisturbed()] * 2
    assert [line.split()[:2] for line in pod.history()] == [["0001", "done,"]]
    assert pod.count("queued-resources", "create") == 1
