"""Two processes of two devices are one run: the step of one device, files of one process, and they stop together.

Each is a `rljax train` of its own on this machine, with CPU devices that are forced and gloo between them.
"""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import make_prompts
from jax.sharding import Mesh
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).with_name("tpu_scripts")))
from pod import open_pod, wait_for

from rljax import hosts
from rljax.cli import USAGE_ERROR
from rljax.config import PREEMPTED, ConfigError, MeshConfig
from rljax.evaluate.shared import Scored, from_bytes, to_bytes
from rljax.mesh import AXES, make_mesh
from rljax.policy import load_run
from rljax.rewards.pool import Verdict
from rljax.types import Rollouts, prompt_block
from rljax.watchdog import STUCK

TIMEOUT_SECONDS = 250
"""Of a run, which takes a twentieth of this on two idle cores."""
STEPS = 8

REWARD = """
import time
from pathlib import Path

def score(response, ground_truth, extra_info):
    if Path(__file__).with_name("slow").exists():
        time.sleep(0.1)
    return sum(letter in "aeiou13579" for letter in response) / max(len(response), 1)
"""
"""Tells random completions apart, and can be made to take its time."""

SETTINGS = {
    "steps": STEPS,
    "model.architecture": "ladder-18k",
    "model.remat": "none",
    "data.train": "task:char_count",
    "data.prompts_per_step": 8,
    "data.order": "shuffle",
    "data.max_prompt_tokens": 32,
    "data.task_records": 160,
    "sampling.max_completion_tokens": 24,
    "sampling.chunk_tokens": 8,
    "sampling.cache_growth": 1,
    "sampling.compact": "false",
    "reward.workers": 1,
    "algorithm.group_size": 4,
    "algorithm.updates_per_step": 2,
    "algorithm.kl_coefficient": 0.01,
    "algorithm.microbatch_tokens": 512,
    "optimizer.learning_rate": 1e-4,
    "evaluation.data": "task:char_count",
    "evaluation.every": 4,
    "evaluation.max_prompts": 7,  # which two do not share evenly
    "evaluation.samples_per_prompt": 4,
    "checkpoint.every": 1,
    "checkpoint.keep": 20,
    "logging.rollouts": 1000,
}

FOUR_HEADS: dict[str, Any] = {"model__architecture": "ladder-200k", "steps": 1, "evaluation__data": ""}


@dataclasses.dataclass(frozen=True)
class Ended:
    """Processes that have ended: what each returned, and said."""

    codes: list[int]
    said: list[str]


class Processes:
    """`count` processes of `devices` devices each that know of each other, if there are several.

    Args:
      log: what they say goes to files of this name.
      commands: arguments of Python, of each.
    """

    def __init__(self, log: Path, devices: int, commands: Sequence[Sequence[str]]) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self._all = []
        self._logs = [log.with_name(f"{log.name}.{time.time_ns()}.{index}.log") for index in range(len(commands))]
        for index, (command, said) in enumerate(zip(commands, self._logs, strict=True)):
            environment = os.environ | surroundings(devices) | {"JAX_NUM_PROCESSES": str(len(commands))}
            if len(commands) > 1:
                environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(index)}
            with said.open("w") as out:
                self._all.append(
                    subprocess.Popen([sys.executable, *command], env=environment, stdout=out, stderr=subprocess.STDOUT)
                )

    def wait_for(self, index: int, words: str) -> None:
        """Until a process has said so, or has ended."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while words not in self._logs[index].read_text() and self._all[index].poll() is None:
            assert time.monotonic() < end, self._logs[index].read_text()[-3000:]
            time.sleep(0.05)

    def signal(self, index: int, number: int) -> None:
        self._all[index].send_signal(number)

    def code(self, index: int) -> int:
        """Of a process, once it has ended."""
        return self._all[index].wait(TIMEOUT_SECONDS)

    def wait(self) -> Ended:
        """Until all have ended; those that do not are killed."""
        end = time.monotonic() + TIMEOUT_SECONDS
        try:
            codes = [process.wait(max(1.0, end - time.monotonic())) for process in self._all]
        finally:
            for process in self._all:
                process.kill()
                process.wait()
        return Ended(codes, [log.read_text() for log in self._logs])

    def succeed(self) -> None:
        ended = self.wait()
        assert ended.codes == [0] * len(ended.codes), "\n\n".join(said[-3000:] for said in ended.said)


RLJAX = ("-m", "rljax.cli")
UNHEARD = ("-c", "from rljax import cli, hosts; hosts._HEARTBEAT_SECONDS = 1000; raise SystemExit(cli.main())")
"""The same, where heartbeats say nothing: on a slow machine a watchdog is slower than they are."""


def surroundings(devices: int) -> dict[str, str]:
    """Environment of a process with so many devices."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # programs run a few times here, and take long to optimise
    }


def flags_of(folder: Path, run: Path, own: Mapping[str, Any] = {}, **settings: Any) -> list[str]:
    """`SETTINGS` with what is changed, as flags; the reward is that of `folder`."""
    given = SETTINGS | {"run_dir": run, "reward.file": f"{folder / 'reward.py'}:score"}
    given |= {name.replace("__", "."): value for name, value in settings.items()} | dict(own)
    return [f"--{name}={value}" for name, value in given.items()]


def train(
    run: Path,
    count: int,
    devices: int,
    *,
    rljax: Sequence[str] = RLJAX,
    each: Sequence[Mapping[str, Any]] = (),
    **settings: Any,
) -> Processes:
    """`rljax train`, in one run if `count` is more than 1.

    Args:
      rljax: arguments of Python that make it the command `rljax`.
      each: settings of each process, by their dotted names.
      settings: of all, as `checkpoint__every`.
    """
    commands = [[*rljax, "train", *flags_of(run.parent, run, own, **settings)] for own in each or [{}] * count]
    return Processes(run, devices, commands)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def rollouts_of(run: Path, step: int) -> list[dict[str, Any]]:
    """Every completion of a step: one character is one token."""
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def digests_of(run: Path, step: int) -> dict[str, list[Any]]:
    """Of every leaf of a checkpoint: shape, dtype and a digest that does not depend on the sharding."""
    return json.loads((run / "checkpoints" / str(step) / "host" / "data.json").read_text())["leaves"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    train(folder / "alone", 1, 1).succeed()
    return folder / "alone"


@pytest.fixture(scope="module")
def together(folder: Path) -> Path:
    train(folder / "together", 2, 2).succeed()
    return folder / "together"


@pytest.fixture(scope="module")
def preempted(folder: Path) -> tuple[Path, Ended]:
    """A SIGTERM to process 1 during the second step."""
    run, slow = folder / "preempted", folder / "slow"
    slow.touch()
    processes = train(run, 2, 2, checkpoint__every=100)
    processes.wait_for(0, f"step 1/{STEPS}")
    processes.signal(1, signal.SIGTERM)
    ended = processes.wait()
    slow.unlink()
    return run, ended


def assert_same_step(one: Path, other: Path, step: int, tolerance: float) -> None:
    assert rollouts_of(one, step) == rollouts_of(other, step)
    here, there = ({row["step"]: row for row in metrics_of(run)}[step] for run in (one, other))
    machine = ("time/", "throughput/", "memory/", "sampler/", "progress/accelerator", "learner/padding", "forecast/")
    compared = [name for name in here if not name.startswith(machine)]
    assert compared == [name for name in there if not name.startswith(machine)] and len(compared) > 60
    for name in compared:
        assert here[name] == pytest.approx(there[name], rel=tolerance, abs=tolerance), name


def assert_close_parameters(one: Path, other: Path, step: int, tolerance: float) -> None:
    here, there = (jax.device_get(load_run(run, step=step).trained) for run in (one, other))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        assert np.abs(a - b).max() < tolerance
    start = jax.device_get(load_run(one, step=step).policy.fresh_trained(0))
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(start), strict=True)) > 1e-4


def test_a_step_of_two_processes_is_that_of_one_device(alone: Path, together: Path) -> None:
    assert len(rollouts_of(alone, 1)) == 32
    assert len({row["reward"] for row in rollouts_of(alone, 1)}) > 5
    assert_same_step(alone, together, 1, 1e-5)
    assert_close_parameters(alone, together, 1, 1e-5)
    assert_close_parameters(alone, together, STEPS, 1e-5)


@pytest.fixture(scope="module")
def with_four_heads(folder: Path) -> Path:
    """A step of one device, of a model that four can split."""
    train(folder / "four-heads", 1, 1, **FOUR_HEADS).succeed()
    return folder / "four-heads"


@pytest.mark.parametrize(("fsdp", "tensor"), [(2, 2), (1, 4)], ids=["layers split in each", "layers split over both"])
def test_a_step_of_two_processes_that_split_layers_is_that_of_one_device(
    with_four_heads: Path, folder: Path, fsdp: int, tensor: int
) -> None:
    run = folder / f"fsdp-{fsdp}-tensor-{tensor}"
    train(run, 2, 2, **FOUR_HEADS, mesh__fsdp=fsdp, mesh__tensor=tensor).succeed()
    assert_same_step(with_four_heads, run, 1, 1e-5)
    assert_close_parameters(with_four_heads, run, 1, 1e-5)


def test_they_draw_the_same_prompts_in_every_step_and_measure_all_of_the_held_out_set(
    alone: Path, together: Path
) -> None:
    for step in range(1, STEPS + 1):
        assert [row["prompt"] for row in rollouts_of(together, step)] == [r["prompt"] for r in rollouts_of(alone, step)]
    (first, *_), (other, *_) = metrics_of(together), metrics_of(alone)
    assert first["eval/num_prompts"] == 7
    assert first["eval/pass@1"] == pytest.approx(other["eval/pass@1"], abs=1e-6)
    assert first["eval/standard_error"] == pytest.approx(other["eval/standard_error"], abs=1e-6)


def test_only_one_process_writes(alone: Path, together: Path) -> None:
    """Lines twice, or files of the other process, would show."""
    names = {str(file.relative_to(run)) for run in (together,) for file in run.iterdir()}
    assert names == {str(file.relative_to(alone)) for file in alone.iterdir()}
    assert [row["step"] for row in metrics_of(together)] == list(range(STEPS + 1))
    assert len((together / "curves.csv").read_text().splitlines()) == 1 + 3  # steps 0, 4 and 8
    assert len(list((together / "rollouts").iterdir())) == STEPS


def test_a_signal_to_one_process_stops_both_after_the_same_step(preempted: tuple[Path, Ended]) -> None:
    run, ended = preempted
    assert ended.codes == [PREEMPTED, PREEMPTED], "\n\n".join(said[-3000:] for said in ended.said)
    (step,) = (int(folder.name) for folder in (run / "checkpoints").iterdir())
    assert 1 <= step < STEPS
    assert all(f"step {step} is saved" in said for said in ended.said)
    assert metrics_of(run)[-1]["step"] == step and not (run / "finished.json").exists()


def test_a_preempted_run_goes_on_to_the_same_bits(preempted: tuple[Path, Ended], together: Path, folder: Path) -> None:
    run = folder / "relaunched"
    shutil.copytree(preempted[0], run)
    train(run, 2, 2, checkpoint__every=100).succeed()
    assert digests_of(run, STEPS) == digests_of(together, STEPS)
    assert [row["reward/mean"] for row in metrics_of(run)[1:]] == [r["reward/mean"] for r in metrics_of(together)[1:]]


def test_a_pod_that_is_told_to_stop_is_launched_again_and_ends_in_the_same_bits(
    together: Path, folder: Path, tmp_path: Path
) -> None:
    """By tpu_scripts/supervise.sh on two workers of a fake cloud, with the code that it synced to them."""
    slow = folder / "slow"
    slow.touch()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        told = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": 2}
    told |= surroundings(2) | {"JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}
    with open_pod(tmp_path) as pod:
        words = [*(f"{name}={value}" for name, value in told.items()), sys.executable]
        words += [*RLJAX, "train", *flags_of(folder, pod.run_dir, checkpoint__every=100)]
        pod.configure(TRAIN_COMMAND=f"env JAX_PROCESS_ID=$RLJAX_WORKER {shlex.join(words)}", SAVE_SECONDS=60)
        process = pod.start("supervise")
        log = pod.host(0) / "attempts" / "0001" / "log"
        wait_for(lambda: log.exists() and f"step 1/{STEPS}" in log.read_text())
        pod.signal(1, signal.SIGTERM)
        slow.unlink()
        _, said = process.communicate(timeout=2 * TIMEOUT_SECONDS)
        assert process.returncode == 0, said
        assert "exit codes: 75 75" in said
        assert [line.split()[1] for line in pod.history()] == ["relaunch,", "done,"]
        assert digests_of(pod.run_dir, STEPS) == digests_of(together, STEPS)


def test_one_process_goes_on_where_two_stopped(preempted: tuple[Path, Ended], together: Path, folder: Path) -> None:
    run = folder / "alone-from-there"
    shutil.copytree(preempted[0], run)
    train(run, 1, 1, checkpoint__every=100).succeed()
    (step, _) = sorted(int(each.name) for each in (run / "checkpoints").iterdir())
    for later in range(step + 1, STEPS + 1):
        assert [row["prompt"] for row in rollouts_of(run, later)] == [r["prompt"] for r in rollouts_of(together, later)]
    assert_same_step(run, together, step + 1, 1e-5)
    assert_close_parameters(run, together, STEPS, 1e-5)


def test_a_single_process_notices_the_signal_and_a_second_one_is_not_caught() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with hosts.Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(1) and preemption.reached(2)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_warm_start_of_two_processes_is_that_of_one(folder: Path) -> None:
    names = ("model.architecture", "model.remat", "data.train", "algorithm.microbatch_tokens")
    settings = {name: SETTINGS[name] for name in names}
    settings |= {"data.task_records": 64, "sft.steps": 3, "sft.batch_size": 8, "sft.learning_rate": 1e-4}
    written = []
    for count in (1, 2):
        output = folder / f"sft-of-{count}"
        flags = [f"--{name}={value}" for name, value in (settings | {"sft.output": output}).items()]
        Processes(output, count, [["-m", "rljax.cli", "sft", *flags]] * count).succeed()
        written.append(load_file(output / "model.safetensors"))
    one, two = written
    assert one.keys() == two.keys() and len(one) > 20
    for name, values in one.items():
        assert np.abs(values - two[name]).max() < 1e-5, name


EXCHANGE = """
import jax, numpy as np
from jax.sharding import PartitionSpec
from rljax import hosts
from rljax.config import MeshConfig
from rljax.mesh import make_mesh, microbatch_sharding, replicated
hosts.start()
process = jax.process_index()
assert jax.process_count() == 2 and jax.local_device_count() == 2 and jax.device_count() == 4
hosts._MOST_BYTES = 1 << 17  # in several parts
payloads = [bytes(range(256)) * 1000, b"other"], [b"", b"x"], [b"", b""]
for payload in payloads:
    assert tuple(hosts.exchange(payload[process])) == tuple(payload)
mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), hosts.devices_by_process())
rows = np.arange(3 * 4 * 5, dtype=np.int32).reshape(3, 4, 5)
spread = hosts.to_devices({"a": rows}, microbatch_sharding(mesh))["a"]
assert not spread.is_fully_addressable and {s.data.shape for s in spread.addressable_shards} == {(3, 2, 5)}
assert np.array_equal(hosts.to_host(spread), rows)
again = hosts.to_devices(spread * 2, replicated(mesh))
assert np.array_equal(hosts.to_host(again), rows * 2)
here = hosts.sampling_mesh(mesh)
assert here.devices.shape == (1, 1, 2) and all(d.process_index == process for d in here.devices.flat)
split = jax.sharding.NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
wide = hosts.local_part(hosts.to_devices(np.arange(24).reshape(2, 3, 4), split), here)
assert wide.is_fully_addressable and np.array_equal(wide, np.arange(24).reshape(2, 3, 4))
assert {s.data.shape for s in wide.addressable_shards} == {(2, 3, 2)}
hosts.wait_for_all("end")
print("all is well", process)
"""


LOCKSTEP = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
sys.path.insert(0, sys.argv[1])
from conftest import TINY, make_prompts
from rljax import hosts
from rljax.config import MeshConfig
from rljax.mesh import AXES, LEARNER_RULES, make_mesh, param_shardings
from rljax.models import qwen2
from rljax.sampling.engine import EngineOptions, Sampler
hosts.start()
wide = jax.tree_util.tree_map_with_path(
    lambda path, x: x if "norm" in jax.tree_util.keystr(path) else x * 5, qwen2.init(jax.random.key(0), TINY))
wide = jax.device_get(wide)
prompts = make_prompts([3 + 5 * i % 14 for i in range(36)])

def drawn(mesh):
    shardings = param_shardings(mesh, qwen2.param_shapes(TINY), qwen2.param_axes(TINY), LEARNER_RULES)
    params = jax.tree.map(hosts.to_devices, wide, shardings)
    # Few rows at once, so that freed ones are refilled; later on they are halved.
    sampler = Sampler(None, TINY, mesh, stop_ids=(1,), options=EngineOptions(chunk_tokens=8, max_rows=96, growth=1))
    sampler.sync(params)
    rollouts = sampler.generate(prompts, 8, key=jax.random.key(7), temperature=1.0, max_completion_tokens=120)
    assert sampler.stats.admissions > 3 and sampler.stats.reshapes > 0, sampler.stats
    completions = [row[:n] for row, n in zip(rollouts.tokens, rollouts.lengths)]
    return sampler, rollouts, sampler.score(prompts, completions)

_, one, scores = drawn(make_mesh(MeshConfig(), jax.local_devices()[:1]))
assert one.lengths.sum() > 5000, one.lengths.sum()
devices = np.array(hosts.devices_by_process())
for grid in (devices.reshape(1, 1, 4), devices.reshape(1, 2, 2).swapaxes(1, 2)):
    mesh = Mesh(grid, AXES, axis_types=make_mesh(MeshConfig()).axis_types)
    assert all({d.process_index for d in group} == {0, 1} for group in grid.reshape(-1, grid.shape[2]))
    sampler, many, scored = drawn(mesh)
    assert sampler.processes == (0, 1)
    assert np.array_equal(one.tokens, many.tokens) and np.array_equal(one.stop_reasons, many.stop_reasons)
    assert np.abs(one.behaviour_logprobs - many.behaviour_logprobs).max() < 2e-6
    assert np.abs(scores - scored).max() < 5e-6
hosts.wait_for_all("end")
print("the same tokens", jax.process_index())
"""


def test_processes_that_split_layers_decode_in_lockstep(folder: Path) -> None:
    """One tensor group of all four devices, and two whose devices are each of both processes: the same 5,000 tokens and
    log-probs as on one device."""
    ended = Processes(folder / "lockstep", 2, [["-c", LOCKSTEP, str(Path(__file__).parent)]] * 2).wait()
    assert ended.codes == [0, 0], "\n\n".join(said[-3000:] for said in ended.said)
    assert all(f"the same tokens {process}" in said for process, said in enumerate(ended.said))


def test_what_processes_tell_each_other(folder: Path) -> None:
    ended = Processes(folder / "exchange", 2, [["-c", EXCHANGE]] * 2).wait()
    assert ended.codes == [0, 0], "\n\n".join(ended.said)
    assert all(f"all is well {process}" in said for process, said in enumerate(ended.said))


def test_a_killed_process_takes_the_other_with_it(folder: Path) -> None:
    processes = train(folder / "killed", 2, 1)
    processes.wait_for(1, "row shard")
    processes.signal(1, signal.SIGKILL)
    ended = processes.wait()
    assert ended.codes[1] == -signal.SIGKILL and ended.codes[0] not in (0, PREEMPTED, USAGE_ERROR), ended


def test_a_process_that_waits_in_vain_is_ended(folder: Path) -> None:
    """Another one stands still, as when its host is lost without a word."""
    processes = train(folder / "stuck", 2, 2, rljax=UNHEARD, watchdog_seconds=10)
    processes.wait_for(0, f"step 2/{STEPS}")
    processes.signal(1, signal.SIGSTOP)
    try:
        assert processes.code(0) == STUCK
    finally:
        processes.signal(1, signal.SIGKILL)
        said = processes.wait().said[0]
    assert "has taken more than" in said and "in _step" in said


def test_processes_with_other_settings_are_no_run(folder: Path) -> None:
    ended = train(folder / "two-minds", 2, 1, each=[{}, {"seed": 1}]).wait()
    assert ended.codes == [USAGE_ERROR] * 2
    assert all("process 1 is not doing the run of process 0" in said and "seed: 0 -> 1" in said for said in ended.said)
    assert not (folder / "two-minds").exists()


@dataclasses.dataclass(frozen=True)
class Device:
    """What `sampling_mesh` asks of one."""

    id: int
    process_index: int


@pytest.mark.parametrize(
    ("shape", "order", "each", "own", "processes"),
    [
        ((1, 4, 2), range(8), 4, [[4, 5], [6, 7]], (1,)),
        ((2, 1, 4), range(8), 4, [[4, 5, 6, 7]], (1,)),
        ((4, 2, 1), range(8), 4, [[4], [5], [6], [7]], (1,)),
        ((1, 1, 8), range(8), 4, [[0, 1, 2, 3, 4, 5, 6, 7]], (0, 1)),
        ((2, 1, 4), range(8), 2, [[0, 1, 2, 3]], (0, 1)),
        ((1, 4, 2), (0, 2, 3, 4, 1, 5, 6, 7), 2, [[0, 2], [3, 4], [1, 5]], (0, 1, 2)),
    ],
    ids=["tensor 2 of 4", "tensor 4 of 4", "tensor 1", "all", "two and two", "a chain"],
)
def test_the_part_of_a_mesh_that_a_process_decodes_on(
    shape: tuple[int, ...],
    order: Sequence[int],
    each: int,
    own: list[list[int]],
    processes: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of process 1; there are `each` devices a process."""
    grid = np.array(order).reshape(shape)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    devices: Any = np.array([Device(number, number // each) for number in range(8)])
    monkeypatch.setattr(jax, "devices", lambda: list(devices))
    here = hosts.sampling_mesh(Mesh(devices[grid], AXES))
    assert here.axis_names == AXES and hosts.processes_of(here) == processes
    assert [[device.id for device in group] for group in here.devices.reshape(-1, shape[2])] == own
    elsewhere: Any = np.array([Device(number + 8, number // each) for number in range(8)])
    compiled_for = Mesh(elsewhere[grid], AXES)
    assert hosts.sampling_mesh(compiled_for) is compiled_for and hosts.processes_of(compiled_for) == (1,)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "not JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        (
            {"JAX_COORDINATOR_ADDRESS": "here", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "must be HOST:PORT",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "here:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "below the number of processes",
        ),
    ],
)
def test_what_the_environment_cannot_say(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        hosts.start()


def test_alone_nothing_is_started() -> None:
    hosts.start()
    assert not jax.distributed.is_initialized()
    assert hosts.exchange(b"mine") == [b"mine"]
    assert hosts.block_of(0, 7) == slice(0, 7)
    assert hosts.least(3 << 20, make_mesh(MeshConfig(), jax.devices()[:1])) == 3 << 20


@pytest.mark.parametrize(("rows", "processes"), [(8, 2), (7, 3), (2, 5), (0, 2)])
def test_blocks_are_all_rows_in_order(rows: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    blocks = [list(range(rows)[hosts.block_of(process, rows)]) for process in range(processes)]
    assert [row for block in blocks for row in block] == list(range(rows))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_scored_rollouts_come_back_as_they_were_sent() -> None:
    prompts = make_prompts([3, 5, 4])
    block = prompt_block(prompts, slice(1, 3))
    tokens = np.arange(4 * 6, dtype=np.int32).reshape(4, 6)
    rollouts = Rollouts(
        block, 2, tokens, np.array([1, 6, 2, 3], np.int32), tokens.astype(np.float32), np.zeros(4, np.int8)
    )
    verdicts = [
        Verdict(0.5, "scored", 0.25),
        Verdict(0.0, "error", 1.0, "no: \ud800"),
        *[Verdict(1, "scored", 0.1)] * 2,
    ]
    rewards = np.array([[0.5, 0], [1, 1]], np.float32)
    own = Scored(rollouts, rewards, rewards > 0, ["a", "\ud83d", "", "d"], verdicts, [None, verdicts[0], None, None])
    there = from_bytes(to_bytes(own), prompts, 1)
    assert (there.texts, there.verdicts, there.others) == (own.texts, own.verdicts, own.others)
    assert there.rollouts.prompts.records == block.records and there.rollouts.kept_mass is None
    for name in ("tokens", "lengths", "behaviour_logprobs", "stop_reasons"):
        sent, came = getattr(rollouts, name), getattr(there.rollouts, name)
        assert came.dtype == sent.dtype and np.array_equal(came, sent)
    assert np.array_equal(there.rewards, rewards) and np.array_equal(there.judged, own.judged)
