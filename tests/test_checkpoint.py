"""A checkpoint comes back bit for bit or not at all: faults, kills, other shardings, other configurations."""

import dataclasses
import gc
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint.experimental.v1._src.handlers import json_handler

from rljax.checkpoint import CheckpointStore, _sha256, digests
from rljax.config import AlgorithmConfig, CheckpointError, ConfigError, RunConfig
from rljax.config_file import config_differences, require_same_config
from rljax.types import TrainState

# A failed load or save leaves coroutines and TensorStore futures of Orbax behind, which complain when collected: that
# is done at the end of each test here, so that no other file's test gets to hear it.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect_what_orbax_left():
    yield
    gc.collect()


HOST = {"data": {"next_index": 7}, "config": {"seed": 3}, "counters": [1, 2], "note": None}


def _state(seed: int = 0, width: int = 64):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": jax.random.normal(keys[0], (32, width)),
        "layers": {"q": jax.random.normal(keys[1], (2, width, 4, 8))},
        "half": jax.random.normal(keys[2], (5, 3), jnp.bfloat16),
    }
    opt_state = optax.adamw(1e-3).init(params)
    return TrainState(params, opt_state, jnp.int32(4), jnp.zeros((), jnp.int32))


def _template(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        assert x.dtype == y.dtype, path
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def _save(folder, steps, keep=10):
    store = CheckpointStore(folder, keep)
    for step in steps:
        store.save(step, _state(step), HOST | {"step": step})
    store.close()


def _flip_a_bit(file: Path, at: float):
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 4
    file.write_bytes(data)


def _data_file(step_folder: Path) -> Path:
    return max((f for f in (step_folder / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


# ------------------------------------------------------------------------------------------------------------- digest


def test_digest_of_a_worked_example():
    # Bits of [1.0, 0.0]: 0x3f800000 and 0. The sum is 0x3f800000; index 0 hashes to 0, so its weight is 1.
    assert digests({"x": jnp.array([1.0, 0.0])}) == {"x": "3f8000003f800000"}
    # Index 1 through MurmurHash3's finisher (minus its first fold) in plain Python.
    h = 1 * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    weight = (h ^ (h >> 16)) | 1
    assert digests({"x": jnp.array([0.0, 1.0])}) == {"x": f"3f800000{0x3F800000 * weight % 2**32:08x}"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_digest_sees_one_bit_and_a_swap(dtype):
    values = np.asarray(jax.random.uniform(jax.random.key(1), (40, 3)) * 200).astype(dtype)
    if dtype == jnp.bool_:
        values = np.arange(120).reshape(40, 3) % 5 == 0
    seen = {digests({"x": jnp.asarray(values)})["x"]}
    rng = np.random.default_rng(0)
    for _ in range(30):
        other = values.copy()
        raw = other.reshape(-1).view(np.uint8)
        raw[rng.integers(raw.size)] ^= 1 if dtype == jnp.bool_ else 1 << rng.integers(8)
        assert digests({"x": jnp.asarray(other)})["x"] not in seen
    swapped = values.copy()
    swapped[[0, 1]] = values[[1, 0]]
    assert (swapped != values).any()
    assert digests({"x": jnp.asarray(swapped)})["x"] not in seen


def test_digest_and_restore_do_not_depend_on_the_sharding(tmp_path):
    # Its own process: the number of host devices is read once.
    program = f"""
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rljax.checkpoint import CheckpointStore, digests
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x = jax.random.normal(jax.random.key(0), (8, 12))
specs = [P(), P("a"), P(None, "a"), P("b", "a"), P(("a", "b"))]
values = [jax.device_put(x, NamedSharding(mesh, spec)) for spec in specs]
assert len({{digests({{"x": v}})["x"] for v in [x, *values]}}) == 1
store = CheckpointStore({str(tmp_path / "c")!r}, 1)
store.save(1, {{"x": values[1]}}, {{}})
for value in [x, *values]:
    got, _, _ = store.restore({{"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=value.sharding)}})
    assert got["x"].sharding == value.sharding, (got["x"].sharding, value.sharding)
    assert np.array_equal(got["x"], x)
store.close()
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------- round trips


def test_round_trip_is_bit_equal(tmp_path):
    state = _state()
    store = CheckpointStore(tmp_path / "c", keep=1)
    assert store.latest_step() is None
    store.save(5, state, HOST)
    restored, host, step = store.restore(_template(state))
    assert (step, host) == (5, HOST)
    assert isinstance(restored, TrainState)
    _assert_same_bits(restored, state)
    store.close()


def test_special_values_and_typed_keys_survive(tmp_path):
    state = {
        "key": jax.random.split(jax.random.key(3), 2),
        "x": jnp.array([np.nan, -np.nan, np.inf, -0.0, 1e-45], jnp.float32),
        "flag": jnp.array([True, False]),
    }
    store = CheckpointStore(tmp_path / "c", keep=1)
    store.save(0, state, {})
    restored, _, _ = store.restore(_template(state))
    _assert_same_bits(restored, state)
    store.close()


def test_the_state_may_be_donated_while_the_save_is_under_way(tmp_path):
    update = jax.jit(lambda x: x * -3.0 + 1.0, donate_argnums=0)
    store = CheckpointStore(tmp_path / "c", keep=1)
    x = jax.random.normal(jax.random.key(0), (2048, 1024))  # 8 MiB: still being written when the update runs
    before = np.array(x)
    store.save(0, {"x": x}, {})
    for _ in range(3):
        x = update(x)
    jax.block_until_ready(x)
    restored, _, _ = store.restore(_template({"x": x}))
    assert np.array_equal(restored["x"], before)
    store.close()


def test_the_newest_keep_steps_are_kept(tmp_path):
    _save(tmp_path / "c", [2, 4, 6, 8], keep=2)
    store = CheckpointStore(tmp_path / "c", keep=2)
    assert (store.steps(), store.latest_step()) == ([6, 8], 8)
    assert store.restore(_template(_state()), step=6)[1]["step"] == 6
    with pytest.raises(ConfigError, match="step 2 was asked for"):
        store.restore(_template(_state()), step=2)
    store.close()


def test_parameters_alone_can_be_read_from_a_run_that_is_writing(tmp_path):
    _save(tmp_path / "c", [1])
    half_written = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    half_written.mkdir()
    reader = CheckpointStore(tmp_path / "c", keep=None)
    template = _template(_state())
    restored, _, _ = reader.restore({"params": template.params}, partial=True)
    _assert_same_bits(restored["params"], _state(1).params)
    with pytest.raises(ConfigError, match="holds opt_state"):
        reader.restore({"params": template.params})
    reader.close()
    assert half_written.is_dir()
    with pytest.raises(ConfigError, match="does not exist"):
        CheckpointStore(tmp_path / "nowhere", keep=None)
    assert not (tmp_path / "nowhere").exists()


# ------------------------------------------------------------------------------------------------------------- faults


def _truncate(folder):
    os.truncate(_data_file(folder), _data_file(folder).stat().st_size // 2)


def _empty(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.unlink()


FAULTS = {
    "data truncated": _truncate,
    "data deleted": lambda folder: _data_file(folder).unlink(),
    "folder of the step empty": _empty,
    "manifest of the arrays empty": lambda folder: (folder / "state" / "manifest.ocdbt").write_bytes(b""),
    "array metadata cut": lambda folder: (folder / "state" / "_METADATA").write_text("{"),
    "host file deleted": lambda folder: next((folder / "host").glob("*.json")).unlink(),
    "host file cut": lambda folder: next((folder / "host").glob("*.json")).write_text('{"host": {'),
    "a bit of the data": lambda folder: _flip_a_bit(_data_file(folder), 0.37),
    "another bit of the data": lambda folder: _flip_a_bit(_data_file(folder), 0.81),
    "a number in the host state": lambda folder: [
        file.write_text(file.read_text().replace('"next_index": 7', '"next_index": 8'))
        for file in (folder / "host").glob("*.json")
    ],
    "a shape in the manifest": lambda folder: [
        file.write_text(file.read_text().replace("[[32, 64]", "[[32, 65]")) for file in (folder / "host").glob("*.json")
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_step_falls_back_to_the_one_before(tmp_path, fault, caplog):
    folder = tmp_path / "c"
    _save(folder, [10, 20])
    before = {file: file.read_bytes() for file in (folder / "20").rglob("*") if file.is_file()}
    FAULTS[fault](folder / "20")
    assert before != {file: file.read_bytes() for file in (folder / "20").rglob("*") if file.is_file()}
    store = CheckpointStore(folder, keep=1)
    restored, host, step = store.restore(_template(_state()))
    assert (step, host["step"]) == (10, 10)
    _assert_same_bits(restored, _state(10))
    assert "CHECKPOINT step 20 CANNOT BE RESTORED" in caplog.text
    # The bad step is out of the way of the next save, and does not push the good one out.
    assert (folder / "20.bad").is_dir()
    store.save(20, _state(21), HOST)
    store.wait()
    assert store.steps() == [20]
    _assert_same_bits(store.restore(_template(_state()))[0], _state(21))
    store.close()


def test_a_flipped_bit_names_the_leaf(tmp_path, caplog):
    # Orbax reads this array without complaint: only the digest knows.
    folder = tmp_path / "c"
    store = CheckpointStore(folder, keep=2)
    for step in (1, 2):
        store.save(step, _state(step), {})
    store.wait()
    content_file = next((folder / "2" / "host").glob("*.json"))
    content = json.loads(content_file.read_text())
    other = digests({"x": _state(2).params["embed"].at[3, 3].add(1e-6)})["x"]
    content["leaves"]["params.embed"][2] = other
    del content["sha256"]
    content_file.write_text(json.dumps(content | {"sha256": _sha256(content)}))
    assert store.restore(_template(_state()))[2] == 1
    assert "the bits of params.embed are not those saved" in caplog.text
    store.close()


def test_no_good_step_left_is_an_error_that_changes_nothing(tmp_path):
    folder = tmp_path / "c"
    _save(folder, [10, 20])
    for step in ("10", "20"):
        _truncate(folder / step)
    store = CheckpointStore(folder, keep=5)
    with pytest.raises(
        ConfigError, match=r"no step of .* can be restored \(20: \w+: .*OUT_OF_RANGE.*10: \w+: .*OUT_OF_RANGE"
    ):
        store.restore(_template(_state()))
    store.close()
    assert sorted(f.name for f in folder.iterdir()) == ["10", "20"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p | {"embed": jax.ShapeDtypeStruct((32, 64), jnp.bfloat16, sharding=p["embed"].sharding)},
            "params.embed is float32 of shape [32, 64] in the checkpoint and bfloat16 of shape [32, 64] in this run",
        ),
        (
            lambda p: p | {"embed": jax.ShapeDtypeStruct((33, 64), jnp.float32, sharding=p["embed"].sharding)},
            "params.embed is float32 of shape [32, 64] in the checkpoint and float32 of shape [33, 64] in this run",
        ),
        (lambda p: p | {"head": p["embed"]}, "the checkpoint has no params.head"),
        (lambda p: {"embed": p["embed"], "half": p["half"]}, "the checkpoint holds params.layers.q (1 such)"),
    ],
)
def test_another_template_is_refused_by_name(tmp_path, change, message):
    folder = tmp_path / "c"
    _save(folder, [10, 20])
    store = CheckpointStore(folder, keep=2)
    template = _template(_state())
    template = dataclasses.replace(template, params=change(template.params))
    with pytest.raises(ConfigError, match=re.escape(message)):
        store.restore(template)
    assert store.steps() == [10, 20]
    store.close()


def test_a_failed_background_save_is_raised_and_the_step_before_stays_good(tmp_path, monkeypatch):
    folder = tmp_path / "c"
    store = CheckpointStore(folder, keep=1)
    store.save(1, _state(1), {})
    store.wait()

    async def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json_handler.JsonHandler, "_background_save", disk_full)
        store.save(2, _state(2), {})
        with pytest.raises(CheckpointError, match=r"step 2 could not be saved in .*No space left.*holds step 1\b"):
            store.wait()
    assert store.steps() == [1]
    _assert_same_bits(store.restore(_template(_state()))[0], _state(1))
    store.save(2, _state(2), {})
    store.close()
    assert [f.name for f in folder.iterdir()] == ["2"]  # what the failed save left is gone


def test_a_killed_save_leaves_a_whole_step_or_none(tmp_path):
    folder = tmp_path / "c"
    program = f"""
import jax, jax.numpy as jnp
from rljax.checkpoint import CheckpointStore
store = CheckpointStore({str(folder)!r}, 1)
for step in range(1, 1000):
    store.save(step, {{"x": jnp.full((4096, 256), step, jnp.float32)}}, {{"step": step}})
    print(step, flush=True)
"""
    for kill_after in (3, 6):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(kill_after):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        store = CheckpointStore(folder, keep=1)
        template = {"x": jax.ShapeDtypeStruct((4096, 256), jnp.float32, sharding=jnp.zeros(()).sharding)}
        state, host, step = store.restore(template)
        # `save` returned `kill_after` times, so the one before is complete.
        assert step >= kill_after - 1
        assert host == {"step": step}
        assert np.array_equal(state["x"], np.full((4096, 256), step, np.float32))
        store.close()
        assert sorted(f.name for f in folder.iterdir()) == [str(step)]
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()


# ------------------------------------------------------------------------------------------------------------- config


def _plain(config: RunConfig):
    return dataclasses.asdict(config)


def test_fields_that_change_nothing_may_differ():
    saved = json.loads(json.dumps(_plain(RunConfig())))
    current = _plain(RunConfig(run_dir="elsewhere", steps=500))
    current["logging"]["rollouts"] = 0
    current["checkpoint"]["keep"] = 9
    current["evaluation"]["every"] = 7
    current["mesh"]["tensor"] = 2
    current["algorithm"]["microbatch_tokens"] = 1024
    # What `rljax sft`, `rljax eval` and `rljax sample` read, and a meter beside the reward.
    current["sft"]["steps"] = 9
    current["eval"]["data"] = ("task:arithmetic",)
    current["sample"]["top_k"] = 5
    current["reward"]["hack_meter"] = False
    assert config_differences(saved, current) == []
    require_same_config(saved, current)
    assert config_differences(saved, current, but=("sft",)) == ["sft.steps: 100 -> 9"]


@pytest.mark.parametrize("aggregation", get_args(AlgorithmConfig.__annotations__["aggregation"]))
def test_the_micro_batches_are_fixed_where_the_loss_depends_on_them(aggregation):
    saved, current = _plain(RunConfig()), _plain(RunConfig())
    saved["algorithm"]["aggregation"] = current["algorithm"]["aggregation"] = aggregation
    current["algorithm"]["microbatch_tokens"] = 1024
    fixed = ["algorithm.microbatch_tokens: 16384 -> 1024"] if aggregation == "micro_batch_token_mean" else []
    assert config_differences(saved, current) == fixed
    if fixed:
        with pytest.raises(ConfigError, match=re.escape(fixed[0])):
            require_same_config(saved, current)


def test_fields_that_change_the_computation_are_all_listed():
    saved, current = _plain(RunConfig()), _plain(RunConfig(seed=1))
    current["algorithm"]["clip_high"] = 0.28
    current["evaluation"]["temperature"] = 0.0
    current["sampling"]["stop_token_ids"] = (5,)
    del saved["sampling"]["temperature"]
    differences = config_differences(json.loads(json.dumps(saved)), current)
    assert differences == [
        "seed: 0 -> 1",
        "sampling.temperature: absent -> 1.0",
        "sampling.stop_token_ids: [] -> [5]",
        "algorithm.clip_high: 0.2 -> 0.28",
        "evaluation.temperature: 0.7 -> 0.0",
    ]
    with pytest.raises(ConfigError) as error:
        require_same_config(saved, current)
    assert all(line in str(error.value) for line in differences[2:])
    assert "give another run_dir" in str(error.value)


def test_a_field_that_the_current_version_dropped_is_listed():
    saved, current = _plain(RunConfig()), _plain(RunConfig())
    saved["algorithm"]["old_knob"] = 1
    assert config_differences(saved, current) == ["algorithm.old_knob: 1 -> absent"]
