"""What others run: the JobSet of GKE, xpk, SkyPilot and SLURM say what they must, and their shell does what it says."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pod import SCRIPTS, open_pod

RESUMABLE = [70, 75, 134, 137]


def jobset() -> dict[str, Any]:
    return yaml.safe_load((SCRIPTS / "gke" / "jobset.yaml").read_text())


def test_jobset_restarts_what_may_be_tried_again_and_nothing_else() -> None:
    spec = jobset()["spec"]
    (job,) = spec["replicatedJobs"]
    work = job["template"]["spec"]
    (rule,) = work["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "NotIn", "values": RESUMABLE}
    assert spec["failurePolicy"]["rules"] == [
        {"name": "give-up", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert spec["failurePolicy"]["maxRestarts"] > 0 and work["backoffLimit"] == 0
    pod = work["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert pod["terminationGracePeriodSeconds"] >= 120
    # Its exit code and its SIGTERM are those of the program: no shell between, and it is not process 1.
    (container,) = pod["containers"]
    assert container["command"][:2] == ["rljax", "train"] and "args" not in container
    assert pod["shareProcessNamespace"] is True


def test_jobset_asks_for_one_whole_slice() -> None:
    (job,) = jobset()["spec"]["replicatedJobs"]
    work = job["template"]["spec"]
    pod = work["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert work["parallelism"] == work["completions"] == rows * columns // chips
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert not any("TOKEN" in str(word) for word in container["command"]) and "env" not in container


def test_skypilot_recovers_from_the_same_exit_codes() -> None:
    recipe = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    assert recipe["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": RESUMABLE}
    assert "requirements-tpu.lock" in recipe["setup"] and recipe["resources"]["use_spot"]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=recipe[part], text=True, check=True)


def test_xpk_arguments(tmp_path: Path) -> None:
    with open_pod(tmp_path, CLUSTER="cluster", TPU_TYPE="v6e-16", IMAGE="image", TRAIN_COMMAND="rljax train a") as pod:
        assert pod.run("xpk", "--dry-run") == (
            "xpk workload create --workload=pod --cluster=cluster --project=project --zone=zone-a --tpu-type=v6e-16 "
            "--num-slices=1 --docker-image=image --max-restarts=20 --restart-on-user-code-failure "
            "--termination-grace-period-seconds=4 '--command=rljax train a'\n"
        )
        assert pod.calls() == []


# --------------------------------------------------------------------------------------------------------------- SLURM

SRUN = """#!/usr/bin/env bash
# Runs the words after its options as two tasks.
while [[ $1 == --* ]]; do [[ $1 != --output=* ]] || output=${1#*=}; shift; done
for task in 0 1; do
  SLURM_PROCID=$task "$@" >"${output/\\%t/$task}" 2>&1 & pids[task]=$!
  echo $! >"$FAKE/task-$task"
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
SCANCEL = """#!/usr/bin/env bash
echo "$@" >>"$FAKE/scancel"
for task in 0 1; do pkill -TERM -P "$(cat "$FAKE/task-$task")"; done
"""


def slurm(folder: Path, *command: str) -> subprocess.Popen[str]:
    """slurm.sbatch on two nodes of which this machine plays both."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", '#!/bin/sh\necho "$@" >>"$FAKE/scontrol"\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return subprocess.Popen(
        [str(SCRIPTS / "slurm.sbatch"), *command],
        env={
            **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "FAKE": str(folder), "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(folder),
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [((0, 0), 0, False), ((75, 75), 0, True), ((1, 137), 0, True), ((75, 64), 64, False), ((0, 3), 3, False)],
)
def test_slurm_queues_again_or_not(tmp_path: Path, codes: tuple[int, int], code: int, requeued: bool) -> None:
    process = slurm(tmp_path, "bash", "-c", f"codes=({codes[0]} {codes[1]}); exit ${{codes[SLURM_PROCID]}}")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert (tmp_path / "scontrol").exists() == requeued
    for task in (0, 1):
        assert (tmp_path / f"attempts/7/0001/exit-{task}").read_text() == f"{codes[task]}\n"


def test_slurm_lets_the_programs_save(tmp_path: Path) -> None:
    program = f"trap 'touch {tmp_path}/saved-$SLURM_PROCID; exit 75' TERM; echo up; while :; do sleep 0.05; done"
    process = slurm(tmp_path, "bash", "-c", program)
    logs = [tmp_path / f"attempts/7/0001/worker-{task}.log" for task in (0, 1)]
    end = time.monotonic() + 120
    while not all(log.exists() and log.read_text() == "up\n" for log in logs):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert (tmp_path / "scancel").read_text() == "--signal=TERM 7.0\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_slurm_keeps_secrets_to_their_owner(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text("TOKEN=x\n")
    secrets.chmod(0o644)
    environment = {**os.environ, "RLJAX_SECRETS": str(secrets)}
    words = [str(SCRIPTS / "slurm.sbatch"), "true"]
    refused = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert refused.returncode == 64 and "others may read" in refused.stderr
