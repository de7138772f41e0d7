"""A cloud in a folder: what stands for gcloud and ssh on the PATH of a test. Needs nothing but Python.

FAKE_CLOUD is the folder:
    calls.jsonl     arguments of every call, a line each
    plan.json       what shall go wrong, see `PLAN`; counts in it go down as they are used
    pod.json        {"state": ..., "size": ...} while there is a pod
    hosts/0/        home of a worker, in which its commands run
    bucket/         gs://bucket
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
PLAN = {
    "create_failures": 0,  # requests that are refused
    "states": [],  # what describe says first, one each: a state, NOT_FOUND, ERROR, or text that is none
    "final_state": "ACTIVE",  # what it says then
    "sizes": [],  # workers of the pods made first
    "size": 2,
    "ssh_failures": {},  # worker -> connections that break
    "ssh_breaks_after": {},  # worker -> connections that break once their command has run
    "preempt_at_step": None,  # the pod is taken away once this checkpoint is there
}


def main(arguments: list[str]) -> int:
    with (CLOUD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    words = [word for word in arguments if not word.startswith("-")]
    options = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    if words[0] == "ssh":
        host, command = words[-2:]
        return ssh(node(host), command)
    if words[0] == "scp":
        return scp(node(words[-1]), paths(words))
    if words[:2] == ["gcloud", "storage"]:
        return storage(words[2:], options)
    verb = next(word for word in words[2:] if word in VERBS)
    return VERBS[verb](words, options)


def node(host: str) -> int:
    """3 of node3, user@node3 and node3:.rljax/."""
    return int(host.partition(":")[0].rpartition("node")[2])


def paths(words: list[str]) -> list[str]:
    """Without the -o options of scp."""
    return [word for word in words if word.startswith("/")]


# ---------------------------------------------------------------------------------------------------------------- plan


def plan() -> dict:
    return PLAN | json.loads((CLOUD / "plan.json").read_text())


def used(**changes: object) -> None:
    written = CLOUD / f"plan.{os.getpid()}"
    written.write_text(json.dumps(plan() | changes))
    written.rename(CLOUD / "plan.json")


def pod() -> dict | None:
    file = CLOUD / "pod.json"
    return json.loads(file.read_text()) if file.exists() else None


def refuse(message: str) -> int:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    return 1


# ----------------------------------------------------------------------------------------------------------------- pod


def create(words: list[str], options: dict[str, str]) -> int:
    if "instance-templates" in words or "resource-policies" in words:
        (CLOUD / "resources").mkdir(exist_ok=True)
        (CLOUD / "resources" / words[2]).touch()
        return 0
    if pod() is not None:
        return refuse(f"ALREADY_EXISTS: {words[-1]}")
    now = plan()
    if now["create_failures"]:
        used(create_failures=now["create_failures"] - 1)
        return refuse("RESOURCE_EXHAUSTED: no capacity")
    size = now["sizes"][0] if now["sizes"] else now["size"]
    used(sizes=now["sizes"][1:])
    for worker in range(size):
        (CLOUD / "hosts" / str(worker) / "tmp").mkdir(parents=True)
    (CLOUD / "pod.json").write_text(json.dumps({"size": size}))
    return 0


def delete(words: list[str], options: dict[str, str]) -> int:
    if pod() is None:
        return refuse("NOT_FOUND")
    take_away()
    (CLOUD / "pod.json").unlink()
    return 0


def take_away() -> None:
    """As when power fails: all sessions end, and what the hosts' disks held is lost."""
    for file in CLOUD.glob("hosts/*/.rljax/attempts/*/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(file.read_text()), signal.SIGKILL)
    shutil.rmtree(CLOUD / "hosts", ignore_errors=True)


def state() -> str | None:
    """What describe says; None: not found."""
    now, there = plan(), pod()
    if now["states"]:
        used(states=now["states"][1:])
        return None if now["states"][0] == "NOT_FOUND" else now["states"][0]
    if there is None:
        return None
    if there.get("preempted"):
        return "SUSPENDED"
    wanted = now["preempt_at_step"]
    if wanted is not None and max(steps(), default=0) >= wanted:
        used(preempt_at_step=None)
        (CLOUD / "pod.json").write_text(json.dumps(there | {"preempted": True}))
        take_away()
        return "SUSPENDED"
    return now["final_state"]


def describe(words: list[str], options: dict[str, str]) -> int:
    if "instance-templates" in words or "resource-policies" in words:
        return 0 if (CLOUD / "resources" / words[2]).exists() else refuse("was not found")
    if "tpu-vm" in words:
        print((pod() or {}).get("size", 0))
        return 0
    if options["format"] == "yaml(state)":
        print("state: FAILED\nreason: stockout in this zone")
        return 0
    answer = state()
    if answer is None:
        return refuse("NOT_FOUND: Resource 'x' was not found")
    if answer == "ERROR":
        return refuse("deadline exceeded")
    print(answer)
    return 0


def list_instances(words: list[str], options: dict[str, str]) -> int:
    answer = state()
    if answer is None:
        return refuse("was not found")
    status = {"ACTIVE": "RUNNING", "SUSPENDED": "TERMINATED"}.get(answer, answer)
    for worker in reversed(range((pod() or {}).get("size", 0))):
        print(f"group-{worker}\t{status if worker == 0 else 'RUNNING'}")
    return 0


def nothing(words: list[str], options: dict[str, str]) -> int:
    print(f"{words[-2]} {words[-1]}: nothing to say")
    return 0


# --------------------------------------------------------------------------------------------------------------- hosts


def connection(worker: int, when: str) -> bool:
    """Whether it breaks."""
    failures = plan()[when]
    left = failures.get(str(worker), 0)
    if left:
        used(**{when: failures | {str(worker): left - 1}})
    return left > 0


def ssh(worker: int, command: str) -> int:
    home = CLOUD / "hosts" / str(worker)
    if not home.is_dir() or connection(worker, "ssh_failures"):
        print(f"ssh: connect to host {worker}: Connection timed out", file=sys.stderr)
        return 255
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), "FAKE_HOST": str(worker)}
    code = subprocess.run(["bash", "-c", command], cwd=home, env=environment, stdin=subprocess.DEVNULL).returncode
    return 255 if connection(worker, "ssh_breaks_after") else code


def gcloud_ssh(words: list[str], options: dict[str, str]) -> int:
    return ssh(worker_of(words[-1], options), options["command"])


def scp(worker: int, files: list[str]) -> int:
    home = CLOUD / "hosts" / str(worker)
    if not home.is_dir() or connection(worker, "ssh_failures"):
        return 255
    for file in files:
        shutil.copy(file, home / ".rljax")
    return 0


def gcloud_scp(words: list[str], options: dict[str, str]) -> int:
    target = next(word for word in words if word.endswith(":.rljax/"))
    return scp(worker_of(target.partition(":")[0], options), paths(words))


def worker_of(name: str, options: dict[str, str]) -> int:
    return int(options["worker"]) if "worker" in options else int(name.rpartition("-")[2])


# -------------------------------------------------------------------------------------------------------------- bucket


def local(address: str) -> Path:
    return CLOUD / address.removeprefix("gs://")


def steps() -> list[int]:
    """Checkpoints that both workers have saved."""
    folders = CLOUD.glob("bucket/*/checkpoints/*")
    return [int(folder.name) for folder in folders if len(list(folder.glob("worker-?"))) == 2]


def storage(words: list[str], options: dict[str, str]) -> int:
    action, *rest = words
    if action == "ls":
        folder = local(rest[0])
        if not folder.is_dir():
            return refuse("One or more URLs matched no objects.")
        print("\n".join(f"{rest[0]}{name.name}/" for name in folder.iterdir()))
    elif action == "cp":
        target = local(rest[-1])
        target.parent.mkdir(parents=True, exist_ok=True)
        if len(rest) == 1:  # from standard input, whose "-" looks like an option
            target.write_bytes(sys.stdin.buffer.read())
        else:
            shutil.copy(rest[0], target)
    elif action == "cat":
        sys.stdout.write(local(rest[0]).read_text())
    elif action == "rm":
        local(rest[0]).unlink()
    elif action == "rsync":
        if not local(rest[0]).is_dir():
            return refuse("matched no objects")
        shutil.copytree(local(rest[0]), rest[1], dirs_exist_ok=True)
    elif action == "buckets" and (CLOUD / "no_legacy_bucket_reader").exists():
        return refuse("does not have storage.buckets.get access")
    return 0


VERBS = {
    "create": create,
    "delete": delete,
    "describe": describe,
    "list": nothing,
    "list-instances": list_instances,
    "list-errors": nothing,
    "ssh": gcloud_ssh,
    "scp": gcloud_scp,
}

if __name__ == "__main__":
    sys.exit(main([Path(sys.argv[1]).name, *sys.argv[2:]]))
