"""The command as a user meets it: input that cannot be used is answered in one paragraph and exit code 64; a run of
minimal size goes from warm start to exported folder, and stopped and resumed gives the bits of one unbroken."""

import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from orbax.checkpoint.experimental.v1._src.handlers import json_handler
from safetensors.numpy import load_file

from rljax import costs
from rljax.checkpoint import CheckpointStore
from rljax.cli import COMMANDS, USAGE_ERROR, main
from rljax.config import ARCHITECTURES, ConfigError, ModelConfig, RunConfig
from rljax.config_file import dump_config, parse_config
from rljax.data.tasks import TASKS
from rljax.export import save_description
from rljax.models import hf
from rljax.policy import open_policy
from rljax.rewards import sandbox
from rljax.rl.advantages import group_advantages
from rljax.rl.learner import checkpoint_shapes, state_shapes, update_shape
from rljax.run_log import ALIASES
from rljax.tokenizer import character_tokenizer, load_tokenizer
from rljax.train import batch_table, train

SETTINGS: dict[str, Any] = {
    "model": {"architecture": "tiny", "remat": "none"},
    "data": {
        "train": "task:char_count",
        "prompts_per_step": 4,
        "unique": 12,
        "repeats": 2,
        "order": "shuffle",
        "max_prompt_tokens": 32,
        "task_records": 16,
    },
    "sampling": {"max_completion_tokens": 8, "chunk_tokens": 7},
    "reward": {"workers": 1},
    "algorithm": {"group_size": 4, "updates_per_step": 2, "kl_coefficient": 0.01, "microbatch_tokens": 512},
    "optimizer": {"learning_rate": "3e-4"},
    "evaluation": {"data": "task:char_count", "max_prompts": 4, "samples_per_prompt": 4, "temperature": 1.0},
    "checkpoint": {"every": 2},
    "sft": {"steps": 20, "batch_size": 8, "learning_rate": "5e-3"},
    "logging": {"rollouts": 16},
}
"""Seconds a run. Old log-probs are the learner's, a reference model is kept, and 3 steps are an epoch."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with what the tests share."""

    root: Path
    config: str
    """YAML file of `SETTINGS`, starting from `start`."""
    tokenizer: str
    start: Path
    """Hugging Face folder of the warm start."""

    def train(self, *flags: str) -> list[str]:
        return ["train", self.config, *flags]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The config, a tokenizer, and a model that `rljax sft` taught to answer with "=1" or "=2", so rewards differ."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = character_tokenizer(TASKS["char_count"].alphabet)
    tokenizer.save(root / "tokenizer")
    place = Place(root, str(root / "run.yaml"), str(root / "tokenizer"), root / "start")
    Path(place.config).write_text(yaml.safe_dump(SETTINGS | {"model": {"path": str(place.start), "remat": "none"}}))
    (root / "from_scratch.yaml").write_text(yaml.safe_dump(SETTINGS))
    rows = [{"prompt": "a:bcda", "answer": str(n), "solution": f"={n}", "data_source": "char_count"} for n in (1, 2)]
    (root / "drill.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [str(root / "from_scratch.yaml"), "--data.train", str(root / "drill.jsonl")]
    given += ["--model.tokenizer", place.tokenizer, "--sft.output", str(place.start)]
    assert main(["sft", *given]) == 0
    return place


@pytest.fixture(scope="module")
def unbroken(place: Place) -> Path:
    """A run of four steps."""
    folder = place.root / "unbroken"
    assert main(place.train("--run_dir", str(folder), "--steps", "4")) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(place: Place) -> Path:
    """The same run, two steps of it."""
    folder = place.root / "stopped"
    assert main(place.train("--run_dir", str(folder), "--steps", "2")) == 0
    return folder


@pytest.fixture(scope="module")
def resumed(place: Place, stopped: Path) -> Path:
    """A copy of the stopped run, continued to four steps."""
    folder = place.root / "resumed"
    shutil.copytree(stopped, folder)
    assert main(place.train("--run_dir", str(folder), "--steps", "4")) == 0
    return folder


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused and gives the one plain paragraph it says, on one line."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert main(argv) == USAGE_ERROR == 64
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith("\n"), said
        return said.strip()

    return run


def command(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "rljax.cli", *argv],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


# ------------------------------------------------------------------------------------------------- commands and help


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr()
    assert not said.err and all(f"rljax {name} " in said.out for name in COMMANDS)


@pytest.mark.parametrize("name", ["train", "sft", "eval", "plan"])
def test_help_lists_every_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    for section in dataclasses.fields(RunConfig):
        value = getattr(RunConfig(), section.name)
        names = [section.name]
        if dataclasses.is_dataclass(value):
            names = [f"{section.name}.{field.name}" for field in dataclasses.fields(value)]
        missing = [flag for flag in names if f"--{flag}" not in said]
        assert not missing


@pytest.mark.parametrize("name", ["convert", "report", "reward", "sweep", "fit", "advise"])
def test_help_of_the_others(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: rljax {name} ") and not said.err


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_help_may_be_cut_short() -> None:
    """As by `rljax train --help | head`."""
    program = f"{shlex.quote(sys.executable)} -m rljax.cli train --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 64
    assert "usage: rljax COMMAND" in capsys.readouterr().out


def test_an_unknown_command(refused: Refused) -> None:
    said = refused("trian")
    assert "no command 'trian'" in said and "perhaps you meant train" in said and ", ".join(COMMANDS) in said
    assert "perhaps" not in refused("zzz")


def test_a_refusal_leaves_the_process_with_64() -> None:
    done = command("train", "absent.yaml")
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("error: config file absent.yaml does not exist; give the path")
    assert done.stderr.count("\n") == 1


def test_help_leaves_the_process_with_0() -> None:
    done = command("--help")
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (OSError("disk full"), 1)])
def test_what_is_not_the_users_input_has_another_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int
) -> None:
    def fail(argv: list[str]) -> None:
        raise raised

    monkeypatch.setitem(COMMANDS, "train", fail)
    assert main(["train"]) == code
    said = capsys.readouterr().err
    assert ("Traceback" in said and "disk full" in said) if code == 1 else "resumes from the last checkpoint" in said


def test_only_a_run_is_said_to_resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(argv: list[str]) -> None:
        raise KeyboardInterrupt

    for name in ("sft", "convert", "report"):
        monkeypatch.setitem(COMMANDS, name, interrupt)
        assert main([name]) == 130
        assert capsys.readouterr().err == "interrupted\n"


# ------------------------------------------------------------------------------------------------ config files, flags


def test_a_missing_config(refused: Refused) -> None:
    said = refused("train", "absent.yaml")
    assert "absent.yaml does not exist" in said and "give the path of a YAML file" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- model\n- data\n", ["holds a list", "must be a mapping", "write `section:`"]),
        ("data: [1\nx: {\n", ["is not YAML", "line 2", "fix the line"]),
        ("data:\n", ["data = null", "every field has a value", "remove the line"]),
    ],
)
def test_a_config_that_is_no_mapping(tmp_path: Path, refused: Refused, text: str, words: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    said = refused("train", str(tmp_path / "bad.yaml"))
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "algorithm:\n  group_sise: 4\n",
            ["algorithm.group_sise", "is not a setting", "perhaps you meant algorithm.group_size;", "train --help"],
        ),
        ("steps: many\n", ["steps = 'many'", "must be a whole number", "default, 0"]),
        (
            "data: {order: random}\n",
            [
                "data.order = 'random'",
                "must be one of file, curriculum, reverse, shuffle, shuffle_once",
                "default, 'file'",
            ],
        ),
        ("algorithm: 3\n", ["algorithm in ", "is a section", "such as algorithm.group_size"]),
        ("steps: null\n", ["steps = null", "every field has a value", "remove the line"]),
    ],
    ids=["name", "type", "choice", "section", "null"],
)
def test_what_a_config_cannot_say(tmp_path: Path, refused: Refused, text: str, words: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    said = refused("train", str(tmp_path / "bad.yaml"))
    assert all(word in said for word in [*words, str(tmp_path / "bad.yaml")]), said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--algorithm.group_sise", "4"],
            ["--algorithm.group_sise is not", "you meant --algorithm.group_size;"],
        ),
        (["--zzz"], ["--zzz is not a setting; `rljax train --help` lists them"]),
        (["--steps", "many"], ["--steps = 'many'", "must be a whole number"]),
        (
            ["--data.order=random"],
            ["--data.order = 'random'", "must be one of file, curriculum, reverse, shuffle, shuffle_once"],
        ),
        (["--algorithm.group_size", "1"], ["group_size = 1", "standard deviation", "use a group of at least 2"]),
        (
            ["--data.prompts_per_step", "9"],
            ["data.prompts_per_step = 9", "algorithm.updates_per_step = 4", "make it a multiple"],
        ),
        (["--sampling.temperature", "0"], ["temperature = 0 samples greedily", "use a positive temperature"]),
        (["--optimizer.learning_rate", "nan"], ["learning_rate = nan", "at least 0", "--optimizer.learning_rate"]),
        (["--model.architecture", "qwen9"], ["'qwen9' is not known", "choose one of tiny", "or give model.path"]),
    ],
    ids=lambda value: value[0].removeprefix("--") if value[0].startswith("--") else "",
)
@pytest.mark.parametrize("name", ["train", "sft"])
def test_what_flags_cannot_say(refused: Refused, name: str, flags: list[str], words: list[str]) -> None:
    said = refused(name, *flags)
    assert all(word in said for word in words), said


def test_an_error_of_several_lines_is_one_paragraph(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    """What is quoted in a message, a template's error or a path, may hold a line's end."""

    def fail(argv: list[str]) -> None:
        raise ConfigError("first 'a\nb';\n  give another\n")

    monkeypatch.setitem(COMMANDS, "train", fail)
    assert refused("train") == "error: first 'a b'; give another"


# -------------------------------------------------------------------------------------------------------------- data


@pytest.fixture
def from_scratch(place: Place, refused: Refused) -> Refused:
    """Refuses `rljax train` of random weights with the saved tokenizer and the flags given."""

    def run(*flags: str) -> str:
        config = str(place.root / "from_scratch.yaml")
        run_dir = place.root / "refused"
        said = refused("train", config, "--run_dir", str(run_dir), "--model.tokenizer", place.tokenizer, *flags)
        assert not run_dir.exists()  # a refusal leaves nothing behind
        return said

    return run


def test_a_missing_data_file(from_scratch: Refused) -> None:
    said = from_scratch("--data.train", "absent.jsonl")
    assert "data file 'absent.jsonl' does not exist" in said and "give the path of an existing .jsonl file" in said


def test_no_data(from_scratch: Refused) -> None:
    said = from_scratch("--data.train", "")
    assert "data.train is empty" in said and "give a .parquet or .jsonl file" in said


def test_a_kind_of_file_that_is_not_read(from_scratch: Refused) -> None:
    said = from_scratch("--data.train", "rows.csv")
    assert "'rows.csv' is not a kind of file that is read" in said and ".parquet or .jsonl" in said


def test_an_unknown_task(place: Place, refused: Refused, from_scratch: Refused) -> None:
    without_tokenizer = refused("train", str(place.root / "from_scratch.yaml"), "--data.train", "task:chess")
    for said in (from_scratch("--data.train", "task:chess"), without_tokenizer):
        assert "'task:chess'" in said and "task:char_count, task:arithmetic" in said


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_wrong_column(tmp_path: Path, from_scratch: Refused, kind: str) -> None:
    rows = [{"prompt": "a:ab", "ground_truth": "1"}, {"prompt": "a:b", "reply": "0"}]
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.table({"text": ["a:ab", "a:b"], "ground_truth": ["1", "0"]}), file)
    said = from_scratch("--data.train", str(file))
    if kind == "jsonl":
        assert 'rows.jsonl:2: missing the ground truth; found "prompt", "reply"' in said
    else:
        assert 'rows.parquet row 0: missing "prompt"; found "text", "ground_truth"' in said
    assert 'a record needs "prompt"' in said and "rename or add the column" in said


def test_a_prompt_over_the_cap(from_scratch: Refused) -> None:
    said = from_scratch("--data.max_prompt_tokens", "12", "--data.overlong", "error")
    assert re.search(r"(\d+) of 16 prompts are longer .* = 12 \(\1 of 16 char_count\): record \d+ has \d+ tokens", said)
    assert "raise data.max_prompt_tokens, or set data.overlong = drop" in said


def test_more_steps_than_prompts(from_scratch: Refused) -> None:
    said = from_scratch("--steps", "7")
    assert "steps = 7 x data.prompts_per_step = 4 take 28 prompts" in said
    assert "data.unique = 12 x data.repeats = 2 give 24" in said and "set data.repeats to at least 3" in said


def test_more_unique_prompts_than_records(from_scratch: Refused) -> None:
    said = from_scratch("--data.unique", "17")
    assert "data.unique = 17" in said and "16 records" in said and "use at most 16" in said


# ------------------------------------------------------------------------------------------------------ mesh, weights


def test_a_mesh_of_more_devices_than_there_are(from_scratch: Refused) -> None:
    said = from_scratch("--mesh.data", "3")
    assert "mesh.data = 3" in said and "must divide 1, the number of devices here" in said and "change one" in said


def test_a_mesh_that_does_not_divide_the_heads(place: Place) -> None:
    done = command(
        *("train", str(place.root / "from_scratch.yaml"), "--run_dir", str(place.root / "split")),
        *("--mesh.tensor", "8", "--mesh.fsdp", "1"),
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    assert done.returncode == 64, done.stderr
    said = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "mesh.tensor = 8 does not divide heads = 4" in said and "mesh.tensor = 4" in said
    assert "Traceback" not in done.stderr


@pytest.fixture
def damaged(place: Place, tmp_path: Path) -> Path:
    """A copy of the warm start, to be changed."""
    return Path(shutil.copytree(place.start, tmp_path / "damaged"))


def test_a_folder_of_another_architecture(place: Place, damaged: Path, refused: Refused) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    said = refused(*place.train("--run_dir", str(place.root / "x"), "--model.path", str(damaged)))
    assert "model_type = 'mamba' is not supported" in said and "qwen2, qwen3 and llama are" in said
    assert "use another model" in said


def test_a_truncated_file_of_weights(place: Place, damaged: Path, refused: Refused) -> None:
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    said = refused(*place.train("--run_dir", str(place.root / "x"), "--model.path", str(damaged)))
    assert f"{weights} is damaged or cut short" in said and "fetch it again" in said


def test_a_folder_that_is_not_there(place: Place, refused: Refused) -> None:
    said = refused(*place.train("--model.path", "./absent"))
    assert "'./absent' is not a folder" in said and "give the path of a folder" in said


def test_a_tokenizer_larger_than_the_vocabulary(place: Place, refused: Refused) -> None:
    character_tokenizer([chr(0x100 + i) for i in range(100)]).save(place.root / "large_tokenizer")
    said = refused(*place.train("--model.tokenizer", str(place.root / "large_tokenizer")))
    assert "the tokenizer has 105 tokens and the model 64 vocabulary rows" in said
    assert "give model.tokenizer the tokenizer the model was trained with" in said


# ------------------------------------------------------------------------------------------------- convert and report


def test_missing_arguments(refused: Refused) -> None:
    said = refused("convert")
    assert "rljax convert was given 0 argument(s)" in said and "give SOURCE and DESTINATION" in said
    assert "RUN_DIR | SWEEP_DIR | CURVES.csv" in refused("report")


def test_convert_overwrites_nothing(place: Place, tmp_path: Path, refused: Refused) -> None:
    said = refused("convert", str(place.root), str(tmp_path))
    assert f"destination {tmp_path} exists" in said and "give a folder that does not" in said


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nothing", ["source 'nothing' is not a .gguf file", "no config.yaml", "give one of these"]),
        ("absent.gguf", ["GGUF file absent.gguf does not exist", "give the path of one"]),
    ],
)
def test_convert_of_an_unknown_source(tmp_path: Path, refused: Refused, source: str, words: list[str]) -> None:
    said = refused("convert", source, str(tmp_path / "new"))
    assert all(word in said for word in words), said
    assert not (tmp_path / "new").exists()


def test_convert_of_a_folder_that_is_one_already(place: Place, tmp_path: Path, refused: Refused) -> None:
    said = refused("convert", str(place.start), str(tmp_path / "new"))
    assert f"source {place.start} is a Hugging Face folder already" in said and "give it as model.path" in said


def test_sft_overwrites_nothing(place: Place, tmp_path: Path, refused: Refused) -> None:
    """And says so before it trains."""
    config, weights = str(place.root / "from_scratch.yaml"), (place.start / "model.safetensors").read_bytes()
    said = refused("sft", config, "--sft.output", str(place.start), "--data.train", "task:char_count")
    assert f"sft.output = {place.start} exists" in said and "give another folder, or remove it" in said
    assert (place.start / "model.safetensors").read_bytes() == weights
    (tmp_path / "run" / "sft").mkdir(parents=True)
    assert f"sft.output = {tmp_path}/run/sft exists" in refused("sft", config, "--run_dir", str(tmp_path / "run"))


def test_inspect_shows_what_has_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a surrogate pair, which JSON may hold."""
    line = r'{"question": "a \ud800 b", "answer": "1", "data_source": "math"}'
    (tmp_path / "x.jsonl").write_text(line + "\n")
    for flags in ([], ["--json"]):
        assert main(["data", "inspect", str(tmp_path / "x.jsonl"), *flags]) == 0
        assert "ud800 b" in capsys.readouterr().out


def test_report_of_no_run(tmp_path: Path, refused: Refused) -> None:
    said = refused("report", str(tmp_path))
    assert f"{tmp_path} holds neither metrics.jsonl nor curves.csv" in said and "give the run_dir of a run" in said
    said = refused("report", str(tmp_path), "--output", "x")
    assert "--output, --beside and --models are of a sweep or a table" in said


# ------------------------------------------------------------------------------------------------------- runs, resume


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def repeatable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without those that a clock or the operating system gives."""
    measured = ("time/", "memory/", "throughput/", "timing_s/", "perf/", "progress/accelerator_seconds")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]


def curve_of(run: Path) -> list[dict[str, Any]]:
    """Rows of curves.csv without what a clock gives."""
    rows = csv.DictReader((run / "curves.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "accelerator_seconds"} for row in rows]


def state_of(run: Path) -> tuple[Any, dict[str, Any], int]:
    """Newest checkpoint of a run: state and, where it moves, reference; host state; step."""
    config = parse_config([str(run / "config.yaml")])
    policy = open_policy(config)
    store = CheckpointStore(run / "checkpoints", None)
    try:
        shapes = state_shapes(policy.trained_shapes, config.optimizer, policy.mesh)
        return store.restore(checkpoint_shapes(shapes, config.algorithm, policy.head_dtype))
    finally:
        store.close()


def differing(a: Any, b: Any) -> list[str]:
    """Paths of the leaves of two trees that are not the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return [
        jax.tree_util.keystr(path)
        for (path, x), y in pairs
        if x.dtype != y.dtype or np.asarray(x).tobytes() != np.asarray(y).tobytes()
    ]


def test_a_run_folder_holds_what_it_should(stopped: Path, place: Place) -> None:
    config = parse_config([str(stopped / "config.yaml")])
    assert config == parse_config([place.config, "--run_dir", str(stopped), "--steps", "2"])
    rows = metrics_of(stopped)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert "eval/pass@1" in rows[0]
    phases = ("data", "sample", "reward", "update", "sync", "evaluate", "step")
    for row in rows[1:]:
        assert 0 <= row["policy/behaviour_gap_max"] <= 1e-4
        assert {f"time/{phase}_seconds" for phase in phases} <= set(row)
        assert row["time/step_seconds"] > 0
        assert row["eval/test_loss"] == 1 - row["eval/pass@1"]
        assert row["policy/skipped_updates"] == 0
        assert row["progress/prompts_seen"] == 4 * row["step"]
        rollouts = (stopped / "rollouts" / f"step_{row['step']:06d}.jsonl").read_text().splitlines()
        rewards = [json.loads(line)["reward"] for line in rollouts]
        assert len(rewards) == 16 and np.mean(rewards) == pytest.approx(row["reward/mean"])
    assert [(row["run"], row["step"], row["samples"]) for row in curve_of(stopped)] == [
        ("stopped", str(step), str(4 * step)) for step in range(3)
    ]
    assert (stopped / "report.html").read_text().startswith("<!doctype html>")
    assert (stopped / "checkpoints" / "2").is_dir()


def test_the_compute_of_a_run_is_that_of_its_parts(stopped: Path) -> None:
    """Once 6 N tokens, and once all that was computed: sampling, rescoring by policy and reference, and updates."""
    policy = open_policy(parse_config([str(stopped / "config.yaml")]))
    size = costs.num_params(policy.arch)
    full = without_head = seconds = 0.0
    for row, curve in zip(metrics_of(stopped)[1:], curve_of(stopped)[1:], strict=True):
        phases = [row[f"compute/{phase}_flops"] for phase in ("generation", "old_logprobs", "reference", "update")]
        generation, old, reference, update = phases
        assert 0 < generation < old == reference == update / 3  # the last token of a completion is never fed
        assert row["learner/model_flops"] == old + reference + update
        assert 0 < row["compute/attention_flops"] < sum(phases) - row["compute/head_flops"]
        full, without_head = full + sum(phases), without_head + sum(phases) - row["compute/head_flops"]
        assert row["progress/compute_flops"] == 6 * size * row["progress/tokens"] == float(curve["flops"])
        assert (row["progress/full_flops"], row["progress/full_flops_non_embedding"]) == (full, without_head)
        assert (float(curve["full_flops"]), float(curve["full_flops_non_embedding"])) == (full, without_head)
        assert float(curve["num_params"]) == int(curve["num_total_params"]) == size
        assert int(curve["num_non_embedding_params"]) == costs.num_non_embedding_params(policy.arch)
        assert curve["order"] == "shuffle"
        worked = row["time/step_seconds"] - row["time/evaluate_seconds"] - row.get("time/checkpoint_seconds", 0.0)
        assert row["progress/accelerator_seconds"] - seconds == pytest.approx(worked, abs=0.05)  # of one device
        seconds = row["progress/accelerator_seconds"]


def test_accelerator_seconds_go_on_after_a_resume(stopped: Path, resumed: Path) -> None:
    seconds = [row["progress/accelerator_seconds"] for row in metrics_of(resumed)[1:]]
    assert seconds[1] == metrics_of(stopped)[2]["progress/accelerator_seconds"]
    assert seconds == sorted(seconds) and len(set(seconds)) == 4


def test_a_run_says_that_it_is_finished(stopped: Path, resumed: Path, place: Place) -> None:
    assert json.loads((stopped / "finished.json").read_text()) == {"step": 2}
    assert json.loads((resumed / "finished.json").read_text()) == {"step": 4}
    again = Path(shutil.copytree(stopped, place.root / "fails_later"))
    flags = ("--evaluation.max_prompts", "5")  # refused: it has a checkpoint
    assert main(place.train("--run_dir", str(again), "--steps", "4", *flags)) == USAGE_ERROR
    assert (again / "finished.json").is_file()


def test_what_is_finished_is_not_done_again(stopped: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ("metrics.jsonl", "curves.csv", "config.yaml")
    before = {name: (stopped / name).read_bytes() for name in kept}
    assert main(place.train("--run_dir", str(stopped), "--steps", "2")) == 0
    assert {name: (stopped / name).read_bytes() for name in kept} == before
    assert "pass@1 before" in capsys.readouterr().out


def test_a_checkpoint_of_another_config(stopped: Path, place: Place, refused: Refused) -> None:
    before = (stopped / "config.yaml").read_bytes()
    said = refused(*place.train("--run_dir", str(stopped), "--steps", "2", "--optimizer.learning_rate", "2e-3"))
    assert f"run_dir = {stopped} holds a checkpoint of another configuration" in said
    assert "optimizer.learning_rate: 0.0003 -> 0.002" in said and "give another run_dir" in said
    assert (stopped / "config.yaml").read_bytes() == before


def test_convert_gives_the_parameters_of_the_run(stopped: Path, tmp_path: Path, place: Place) -> None:
    exported = tmp_path / "exported"
    assert main(["convert", str(stopped), str(exported)]) == 0
    state, _, step = state_of(stopped)
    assert step == 2
    arch = hf.read_architecture(exported)
    assert differing(state["params"], hf.load_params(exported, arch)) == []
    assert len(differing(state["params"], hf.load_params(place.start, arch))) > 10  # it has learnt something
    assert (exported / "tokenizer.json").read_bytes() == (place.start / "tokenizer.json").read_bytes()


def test_convert_needs_only_the_run_folder(
    stopped: Path, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another machine, so to speak: the run was moved, and the folders it started from are not there."""
    moved = Path(shutil.copytree(stopped, tmp_path / "moved"))
    settings = parse_config([str(moved / "config.yaml")])
    save_description(open_policy(settings), moved / "model")
    gone = dataclasses.replace(settings, model=ModelConfig(path="gone/start", tokenizer="gone/tokenizer"))
    (moved / "config.yaml").write_text(dump_config(gone) + "of_another_version: 1\n")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "moved", "exported"]) == 0
    assert main(["convert", str(stopped), "as_ever"]) == 0
    files = sorted(file.name for file in Path("as_ever").iterdir())
    assert files == sorted(file.name for file in Path("exported").iterdir()) and "model.safetensors" in files
    for name in files:
        assert (Path("exported") / name).read_bytes() == (Path("as_ever") / name).read_bytes(), name


def test_report_writes_the_page_again(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stopped / "report.html").unlink(missing_ok=True)
    assert main(["report", str(stopped)]) == 0
    assert capsys.readouterr().out.strip() == str(stopped / "report.html")
    assert (stopped / "report.html").is_file()


def test_rewards_differ_within_groups(unbroken: Path) -> None:
    """Or every advantage is 0, and that a resumed run is the same would say less."""
    rows = metrics_of(unbroken)[1:]
    assert min(row["reward/zero_spread_group_fraction"] for row in rows[2:]) < 1  # after the resume, too
    assert min(row["reward/zero_spread_group_fraction"] for row in rows[:2]) < 1
    assert all(row["policy/reference_kl"] > 0 for row in rows[1:])


def test_resumed_is_unbroken_in_every_bit_of_the_state(unbroken: Path, resumed: Path, stopped: Path) -> None:
    (whole, host, step), (parts, host_parts, step_parts) = state_of(unbroken), state_of(resumed)
    assert step == step_parts == 4
    assert differing(whole, parts) == []
    assert int(whole["updates"]) == 8 and "reference" not in whole  # a fixed one is read from its source again
    for name in ("data", "counters", "exposures"):
        assert host[name] == host_parts[name]
    assert len(differing(whole, state_of(stopped)[0])) > 20  # the comparison sees two more steps


def test_resumed_is_unbroken_in_every_metric(unbroken: Path, resumed: Path) -> None:
    whole, parts = repeatable(metrics_of(unbroken)), repeatable(metrics_of(resumed))
    assert [row["step"] for row in whole] == [0, 1, 2, 3, 4]
    assert whole == parts
    assert len(whole[4]) > 20


def test_a_run_forecasts_its_end(unbroken: Path, place: Place, tmp_path: Path) -> None:
    """From four evaluations on, until the end itself is evaluated."""
    folder = Path(shutil.copytree(unbroken, tmp_path / "longer"))
    assert main(place.train("--run_dir", str(folder), "--steps", "6")) == 0
    forecasts = {row["step"]: [v for k, v in row.items() if k.startswith("forecast/")] for row in metrics_of(folder)}
    assert [step for step, found in forecasts.items() if found] == [5]
    loss, low, high = forecasts[5]
    assert 0 <= low <= loss <= high <= 1


def test_a_run_says_how_often_each_prompt_was_used(unbroken: Path, resumed: Path, stopped: Path) -> None:
    """Four steps of 4 of 12 prompts: one epoch and a third. The checkpoint says the same as the file."""
    tables = {run: (run / "exposures.csv").read_text() for run in (unbroken, resumed, stopped)}
    assert tables[unbroken] == tables[resumed]
    for run, served in ((unbroken, 16), (stopped, 8)):
        uses = [int(row["uses"]) for row in csv.DictReader(tables[run].splitlines())]
        assert len(uses) == 12 and sum(uses) == served and set(uses) == {served // 12, served // 12 + 1}
        assert state_of(run)[1]["exposures"] == uses


def test_resumed_is_unbroken_in_prompts_and_completions(unbroken: Path, resumed: Path) -> None:
    files = sorted(file.name for file in (unbroken / "rollouts").iterdir())
    assert files == sorted(file.name for file in (resumed / "rollouts").iterdir()) and len(files) == 4
    prompts = []
    for name in files:
        text = (unbroken / "rollouts" / name).read_text()
        assert text == (resumed / "rollouts" / name).read_text()
        prompts += [json.loads(line)["prompt"] for line in text.splitlines()[::4]]
    assert len(set(prompts[:12])) == 12 and set(prompts[12:]) < set(prompts[:12])  # an epoch, and the next begun


def test_resumed_is_unbroken_in_its_curve(unbroken: Path, resumed: Path) -> None:
    whole, parts = curve_of(unbroken), curve_of(resumed)
    assert len(whole) == 5
    # The two steps before the stop were written under the name the folder had then.
    assert [row | {"run": ""} for row in whole] == [row | {"run": ""} for row in parts]


def test_a_run_keeps_the_remat_it_chose(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is free later changes no bit: the choice is in the run's config, the checkpoint's and the file."""
    auto, given = place.root / "remat_auto", place.root / "remat_given"
    flags = place.train("--evaluation.data", "", "--model.remat")
    for steps, free in (("1", 2**20), ("2", 2**50)):
        monkeypatch.setattr("rljax.rl.memory.free_bytes", lambda mesh, free=free: free)
        assert main([*flags, "auto", "--run_dir", str(auto), "--steps", steps]) == 0
        assert yaml.safe_load((auto / "config.yaml").read_text())["model"]["remat"] == "full"
    assert main([*flags, "full", "--run_dir", str(given), "--steps", "2"]) == 0
    (state, host, step), (state_given, *_) = state_of(auto), state_of(given)
    assert (step, host["config"]["model"]["remat"]) == (2, "full")
    assert differing(state, state_given) == []
    monkeypatch.setattr("rljax.rl.memory.free_bytes", lambda mesh: 2**50)
    fresh = place.root / "remat_fresh"
    assert main([*flags, "auto", "--run_dir", str(fresh), "--steps", "1"]) == 0
    assert yaml.safe_load((fresh / "config.yaml").read_text())["model"]["remat"] == "none"


def test_a_run_that_learns_nothing_any_more_ends(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """One update blows the parameters up, and no gradient after it is finite."""
    run = place.root / "not_finite"
    flags = ["--optimizer.max_nonfinite_steps", "2", "--steps", "6", "--evaluation.data", "", "--checkpoint.every", "1"]
    assert main([*place.train("--optimizer.learning_rate", "1e38"), *flags, "--run_dir", str(run)]) == 71
    said = capsys.readouterr().err
    rows = metrics_of(run)
    last = len(rows)
    assert f"no update of steps {last - 1} to {last} had a finite gradient" in said and "Traceback" not in said
    assert 2 <= last < 6 and all(row["policy/nonfinite_updates"] >= 1 for row in rows[-2:])
    kept = (run / "rollouts" / f"step_{last:06d}.jsonl").read_text().splitlines()
    assert len(kept) > 1  # all of them, not those that are shown


def test_a_run_that_cannot_save_ends_and_goes_on_where_it_could(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place.root / "disk_full"
    flags = place.train("--evaluation.data", "", "--checkpoint.every", "1", "--run_dir", str(run), "--steps")
    assert main([*flags, "1"]) == 0

    async def disk_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json_handler.JsonHandler, "_background_save", disk_full)
        assert main([*flags, "4"]) == 72
    assert re.search(r"error: step 2 could not be saved in .*No space left.*it holds step 1\.", capsys.readouterr().err)
    assert main([*flags, "3"]) == 0
    assert state_of(run)[2] == 3


def test_a_run_killed_between_checkpoints_ends_the_same(unbroken: Path, place: Place) -> None:
    """As a kill after step 4 would leave it, before its checkpoint was complete: steps 3 and 4 are done again."""
    killed = Path(shutil.copytree(unbroken, place.root / "killed" / unbroken.name))
    shutil.rmtree(killed / "checkpoints" / "4")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    assert main(place.train("--run_dir", str(killed), "--steps", "4")) == 0
    assert repeatable(metrics_of(killed)) == repeatable(metrics_of(unbroken))
    assert metrics_of(killed)[:3] == metrics_of(unbroken)[:3]  # kept, times and all
    assert metrics_of(killed)[3:] != metrics_of(unbroken)[3:]  # measured anew
    assert curve_of(killed) == curve_of(unbroken)
    assert differing(state_of(killed)[0], state_of(unbroken)[0]) == []


@pytest.mark.parametrize("library", ["verl", "trl"])
def test_every_alias_is_of_a_metric_that_a_run_writes(stopped: Path, library: str) -> None:
    accelerators_only = {"throughput/update_mfu", "memory/device_peak_gib"}
    of_corrections = {f"policy/correction_{name}" for name in ("min", "mean", "max", "dropped_fraction")}
    missing = set(ALIASES[library].values()) - set(metrics_of(stopped)[2])
    assert missing <= accelerators_only | of_corrections


def test_metrics_of_a_step_agree_with_its_completions(stopped: Path) -> None:
    steps = metrics_of(stopped)[1:]
    for row in steps:
        lines = (stopped / "rollouts" / f"step_{row['step']:06d}.jsonl").read_text().splitlines()
        lengths = [json.loads(line)["tokens"] for line in lines]
        assert row["completion/length_tokens"] == np.mean(lengths)
        assert row["completion/length_min_tokens"] == min(lengths)
        assert row["completion/length_max_tokens"] == max(lengths)
        completions = [json.loads(line) for line in lines]
        ended = [c["tokens"] for c in completions if c["stop_reason"] == "stop"] or [0]
        for name, value in (("", np.mean(ended)), ("_min", min(ended)), ("_max", max(ended))):
            assert row[f"completion/stopped_length{name}_tokens"] == value
        rewards = np.array([c["reward"] for c in completions]).reshape(-1, 4)
        assert row["reward/all_zero_group_fraction"] == np.mean((rewards == 0).all(axis=1))
        assert row["reward/all_one_group_fraction"] == np.mean((rewards == 1).all(axis=1))
        assert 1 <= row["prompt/length_min_tokens"] <= row["prompt/length_tokens"] <= row["prompt/length_max_tokens"]
        assert row["throughput/sampled_tokens_per_second"] * row["time/sample_seconds"] == pytest.approx(sum(lengths))
        assert row["throughput/trained_tokens_per_second"] * row["time/update_seconds"] == pytest.approx(sum(lengths))
        assert not any(name.startswith("dynamic_sampling/") for name in row)
        assert row["progress/tokens"] == row["progress/sampled_tokens"]
    whole = steps[1]["throughput/tokens_per_second_per_device"] * steps[1]["time/step_seconds"] * jax.device_count()
    assert whole == pytest.approx(steps[1]["progress/tokens"] - steps[0]["progress/tokens"])


def test_the_table_of_the_batch(place: Place) -> None:
    """4 prompts x 4 completions in 2 updates; prompts of at most 16 tokens, completions of 8."""
    config = parse_config([place.config, "--algorithm.dynamic_sampling_rounds", "2"])
    policy = open_policy(config)
    shape = update_shape(policy.arch, policy.mesh, config.algorithm, 2, 16, 8)
    rows, positions = shape.rows, shape.positions
    assert [line.split() for line in batch_table(config, policy, 16)] == [
        ["batch", "completions", "prompts", "tokens", "each", "of", "the", "longest;", "float32", "compute"],
        ["group", "4", "1", str(16 + 4 * 8)],
        f"sampled in a step 48 12 {12 * 48} at most, in 3 rounds".split(),
        f"step 16 4 {4 * 48} 2 updates".split(),
        f"update 8 2 {2 * 48} at most {shape.num_microbatches} micro-batches".split(),
        f"micro-batch {rows * ((positions - 16) // 8)} {rows * positions} {rows} rows x {positions} positions".split(),
        f"row shard {rows * ((positions - 16) // 8)} {rows * positions} 1 in all, {rows} rows each".split(),
    ]
    lines, ends = batch_table(config, policy, 16), ("tokens", "48", "576")
    assert len({line.rindex(number) + len(number) for line, number in zip(lines[:3], ends, strict=True)}) == 1


# ------------------------------------------------------------------------------ dynamic sampling and a moving reference


@pytest.fixture(scope="module")
def refilled(place: Place) -> tuple[Path, Path]:
    """12 rounds of 4 prompts in steps of up to 3, to the end of the prompts: unbroken, and stopped after 2 steps."""
    flags = "--algorithm.dynamic_sampling_rounds 2 --data.repeats 4 --evaluation.every 0 --checkpoint.every 100 "
    flags += "--algorithm.reference_update ema --algorithm.reference_ema_decay 0.5 "
    flags += "--logging.rollouts 48 --logging.aliases verl"
    whole, parts = place.root / "refilled", place.root / "refilled_in_parts"
    for folder, steps in ((whole, "0"), (parts, "2"), (parts, "0")):
        assert main(place.train("--run_dir", str(folder), "--steps", steps, *flags.split())) == 0
    return whole, parts


def test_dynamic_sampling_trains_on_the_first_groups_with_a_spread(refilled: tuple[Path, Path], place: Place) -> None:
    run, tokenizer = refilled[0], load_tokenizer(place.start)
    rows = metrics_of(run)[1:]
    prompts = trained_tokens = sampled_tokens = 0
    for row in rows:
        lines = (run / "rollouts" / f"step_{row['step']:06d}.jsonl").read_text().splitlines()
        completions = [json.loads(line) for line in lines]
        groups = [completions[i : i + 4] for i in range(0, len(completions), 4)]
        spread = [len({completion["reward"] for completion in group}) > 1 for group in groups]
        rounds = row["dynamic_sampling/rounds"]
        assert len(groups) == row["dynamic_sampling/prompts"] == 4 * rounds
        assert rounds == 1 or sum(spread[:-4]) < 4  # none too many
        assert sum(spread) >= 4 or rounds == 3 or row is rows[-1]  # nor too few
        kept = [place for place, differ in enumerate(spread) if differ][:4]
        filling = [place for place, differ in enumerate(spread) if not differ][: 4 - len(kept)]
        assert row["dynamic_sampling/missing_groups"] == len(filling)
        assert row["dynamic_sampling/kept_group_fraction"] == len(kept) / len(groups)
        tokens = [
            sum(completion["tokens"] for completion in group)
            + 4 * len(tokenizer.encode_chat([{"role": "user", "content": group[0]["prompt"]}]))
            for group in groups
        ]
        prompts += len(groups)
        sampled_tokens += sum(tokens)
        trained_tokens += sum(tokens[place] for place in kept + filling)
        assert row["progress/prompts_seen"] == prompts
        assert row["progress/tokens"] == trained_tokens and row["progress/sampled_tokens"] == sampled_tokens
        assert row["reward/mean"] == row["critic/score/mean"]
        assert row["reward/mean"] == pytest.approx(np.mean([completion["reward"] for completion in completions]))
    assert len({row["dynamic_sampling/rounds"] for row in rows}) > 1 and trained_tokens < sampled_tokens


def test_dynamic_sampling_ends_with_the_prompts(refilled: tuple[Path, Path], place: Place) -> None:
    """Its last step, known as such only then, is measured and saved like any other last step."""
    for run in refilled:
        rows = metrics_of(run)
        assert rows[-1]["progress/prompts_seen"] == 48 and 4 <= rows[-1]["step"] < 12
        assert "eval/pass@1" in rows[-1]
        assert state_of(run)[2] == rows[-1]["step"]
    assert [row["step"] for row in metrics_of(refilled[0]) if "eval/pass@1" in row] == [0, rows[-1]["step"]]
    before = (refilled[0] / "metrics.jsonl").read_bytes()
    assert main(["train", str(refilled[0] / "config.yaml")]) == 0
    assert (refilled[0] / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_refills_as_the_unbroken(refilled: tuple[Path, Path]) -> None:
    """The prompts of further rounds are behind the saved position, and the moving reference is in the checkpoint."""
    (whole, host, _), (parts, host_parts, _) = (state_of(run) for run in refilled)
    assert differing(whole, parts) == []
    assert host["data"] == host_parts["data"] and host["counters"] == host_parts["counters"]
    assert len(differing(whole["reference"], whole["params"])) > 10
    rows, rows_parts = (
        # The first part measured its last step.
        [{name: value for name, value in row.items() if not name.startswith("eval/")} for row in repeatable(metrics)]
        for metrics in map(metrics_of, refilled)
    )
    assert len(rows) > 4 and rows == rows_parts


# -------------------------------------------------------------------------------------------------- one's own reward

OWN_REWARD = "def score(response, ground_truth, extra_info):\n    return 0.5 if '1' in response else 0.125\n"


def test_a_reward_of_ones_own_in_code_and_in_a_file(place: Place, tmp_path: Path, refused: Refused) -> None:
    """The same rewards, in the same place of the loop; the run says where they came from and does not run it itself."""
    names: dict[str, Any] = {}
    exec(OWN_REWARD, names)
    file, in_code, in_file = tmp_path / "mine.py", tmp_path / "code", tmp_path / "file"
    file.write_text(OWN_REWARD)
    given, own = [place.config, "--steps", "1"], f"{file}:score"
    train(parse_config([*given, "--run_dir", str(in_code)]), reward=names["score"])
    assert main(["train", *given, "--run_dir", str(in_file), "--reward.file", own]) == 0
    for folder in (in_code, in_file):
        rows = [json.loads(line) for line in (folder / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
        assert {row["reward"] for row in rows} == {0.5, 0.125}
        assert all(row["reward"] == names["score"](row["completion"], "", {}) for row in rows)
    assert metrics_of(in_code)[1]["reward/mean"] == metrics_of(in_file)[1]["reward/mean"]

    written = (in_file / "config.yaml").read_text()
    assert f"# given on the command line: --reward.file {own}\n" in written
    assert parse_config([str(in_file / "config.yaml")]).reward.file == ""
    said = refused("train", *given, "--run_dir", str(in_file), "--steps", "2")
    assert "reward.file" in said
    assert main(["train", *given, "--run_dir", str(in_file), "--steps", "2", "--reward.file", own]) == 0


@pytest.mark.parametrize(("mode", "missing"), [("fixed", True), ("paper", False)])
def test_where_a_reward_fails_there_is_none(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, missing: bool
) -> None:
    """All others are alike, so nothing is learnt; the paper's code took 0 for it, which differs from them."""
    learnt: list[np.ndarray] = []

    def spy(*given: Any, **named: Any) -> np.ndarray:
        learnt.append(group_advantages(*given, **named))
        return learnt[-1]

    def half(response: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
        return float("nan") if "1" in response else 0.5

    monkeypatch.setattr("rljax.train.group_advantages", spy)
    given = ["--steps", "1", "--evaluation.data", "", "--reward.mode", mode, "--run_dir", str(tmp_path)]
    train(parse_config([place.config, *given]), reward=half)
    (row,) = metrics_of(tmp_path)
    failed = row["reward/error_fraction"]
    assert 0 < failed < 1
    assert row["reward/missing_fraction"] == failed * missing
    assert row["reward/mean"] == pytest.approx(0.5 if missing else 0.5 * (1 - failed))
    assert len(learnt) == 1 and learnt[0].any() != missing
    assert (row["reward/zero_spread_group_fraction"] == 1) == missing


def test_no_file_may_say_what_code_to_run(tmp_path: Path, refused: Refused) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("reward: {file: 'mine.py:score'}\n")
    said = refused("train", str(config))
    assert "reward.file = 'mine.py:score'" in said and "command line only" in said


@pytest.mark.parametrize("which", ["data.train", "evaluation.data"])
@pytest.mark.parametrize(
    ("source", "says"),
    [("codegen__toy", "no sandbox for them: none here"), ("poetry", "data_source = 'poetry' has no verifier")],
)
def test_a_run_that_could_not_score_does_not_begin(
    place: Place, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, which: str, source: str, says: str
) -> None:
    """Without a sandbox every program would score 0, and a run would train on that."""
    monkeypatch.setattr(sandbox, "problem", lambda: "none here")
    rows = [{"prompt": "a:bcda", "ground_truth": '{"functional": "check(f)"}', "data_source": source}] * 24
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"--{which}", str(tmp_path / "toy.jsonl"), "--model.tokenizer", place.tokenizer]
    assert says in refused("train", place.config, *given, "--run_dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_hack_meter_of_a_run(place: Place, tmp_path: Path) -> None:
    """Completions are single digits and the truth a surd: the paper's rule reads one number out of it."""
    rows = [{"prompt": "a:bcda", "answer": "1 \\sqrt{2}", "data_source": "math__toy"}] * 24
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--data.train", str(tmp_path / "toy.jsonl"), "--model.tokenizer", place.tokenizer, "--steps", "1"]
    given += ["--evaluation.data", "", "--reward.mode", "paper", "--reward.timeout_seconds", "60"]
    for meter in ("true", "false"):
        folder = tmp_path / meter
        assert main(["train", place.config, *given, "--reward.hack_meter", meter, "--run_dir", str(folder)]) == 0
        (row,) = metrics_of(folder)
        if meter == "false":
            assert "reward/hacked_fraction" not in row
        else:
            assert row["reward/hacked_fraction"] == row["reward/modes_differ_fraction"] == row["reward/mean"] > 0


def test_sft_learns_the_prompts_of_the_run(place: Place, tmp_path: Path, refused: Refused) -> None:
    """System message included, which here is what makes them too long."""
    config = [str(place.root / "from_scratch.yaml"), "--run_dir", str(tmp_path), "--sft.max_tokens", "40"]
    said = refused("sft", *config, "--data.system_prompt", "a" * 40)
    assert "no example has at most sft.max_tokens = 40" in said


def test_sft_of_a_task_makes_its_own_vocabulary(place: Place, tmp_path: Path) -> None:
    """Random weights of a named shape, the task's characters, its worked solutions: nothing is read from disk."""
    config = str(place.root / "from_scratch.yaml")
    assert main(["sft", config, "--run_dir", str(tmp_path), "--sft.steps", "1", "--sft.batch_size", "2"]) == 0
    arch = hf.read_architecture(tmp_path / "sft")
    assert dataclasses.replace(arch, vocab_size=64) == ARCHITECTURES["tiny"]
    assert arch.vocab_size == 32
    assert load_tokenizer(tmp_path / "sft").vocab_size == 5 + len(TASKS["char_count"].alphabet)


# -------------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def with_lora(place: Place) -> list[str]:
    """Command of four steps that train an adapter."""
    lora = ["--lora.rank", "2", "--lora.alpha", "3", "--lora.targets", "q", "o", "down"]
    return place.train("--steps", "4", *lora, "--optimizer.learning_rate", "1e-2", "--evaluation.data", "")


@pytest.fixture(scope="module")
def adapted(place: Place, with_lora: list[str]) -> Path:
    """The run of `with_lora`."""
    folder = place.root / "adapted"
    assert main([*with_lora, "--run_dir", str(folder)]) == 0
    return folder


def test_a_resumed_adapter_is_the_unbroken_one(adapted: Path, place: Place, with_lora: list[str]) -> None:
    state, _, step = state_of(adapted)
    adapter = state["params"]
    assert step == 4 and set(adapter) == {"layers"} and set(adapter["layers"]) == {"q", "o", "down"}
    assert all(factors["b"].any() for factors in adapter["layers"].values())
    killed = Path(shutil.copytree(adapted, place.root / "killed_adapter"))
    shutil.rmtree(killed / "checkpoints" / "4")
    assert len(differing(state, state_of(killed)[0])) > 15
    assert main([*with_lora, "--run_dir", str(killed)]) == 0
    assert differing(state, state_of(killed)[0]) == []
    assert repeatable(metrics_of(killed)) == repeatable(metrics_of(adapted))
    assert all(row["policy/behaviour_gap_max"] < 1e-4 for row in metrics_of(adapted))


def test_convert_merges_an_adapter_or_writes_it_for_peft(adapted: Path, place: Place, tmp_path: Path) -> None:
    assert main(["convert", str(adapted), str(tmp_path / "merged")]) == 0
    assert main(["convert", str(adapted), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3)
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj"]
    assert config["base_model_name_or_path"] == str(place.start)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    layers = [f"model.layers.{layer}.{module}" for layer in range(4) for module in modules]
    assert set(factors) == {f"base_model.model.{name}.lora_{side}.weight" for name in layers for side in "AB"}
    shapes = {name.split(".", 5)[5]: factor.shape for name, factor in factors.items()}
    assert shapes["self_attn.q_proj.lora_A.weight"] == (2, 128) and shapes["mlp.down_proj.lora_A.weight"] == (2, 256)
    assert all(shape == (128, 2) for name, shape in shapes.items() if "lora_B" in name)
    base, merged = (load_file(folder / "model.safetensors") for folder in (place.start, tmp_path / "merged"))
    assert set(base) == set(merged)
    for name, weight in base.items():
        change = 0.0
        if name.removesuffix(".weight") in layers:
            a, b = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
            change = 3 / 2 * (b.astype(np.float64) @ a)
            assert np.abs(change).max() > 1e-4
        np.testing.assert_allclose(merged[name], weight + change, rtol=0, atol=1e-6 if np.any(change) else 0)


def test_sft_with_lora_adds_products_of_its_rank_to_the_targets_alone(place: Place, tmp_path: Path) -> None:
    given = [place.config, "--data.train", str(place.root / "drill.jsonl"), "--sft.output", str(tmp_path / "taught")]
    given += ["--sft.steps", "3", "--lora.rank", "2", "--lora.targets", "q", "down"]
    assert main(["sft", *given]) == 0
    base, taught = (load_file(folder / "model.safetensors") for folder in (place.start, tmp_path / "taught"))
    assert set(base) == set(taught)
    for name, weight in base.items():
        change = taught[name].astype(np.float64) - weight
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            scales = np.linalg.svd(change, compute_uv=False)
            assert scales[1] > 1e-4 and scales[2] < 1e-3 * scales[1]
        else:
            assert not change.any()


def test_only_a_run_with_lora_has_an_adapter(stopped: Path, place: Place, tmp_path: Path, refused: Refused) -> None:
    said = refused("convert", "--adapter", str(stopped), str(tmp_path / "new"))
    assert f"{stopped} is a run without LoRA" in said and "leave --adapter out" in said
    said = refused("convert", str(place.start), str(tmp_path / "new"), "--adapter")
    assert "only the folder of a run with LoRA holds an adapter; give one" in said


# -------------------------------------------------------------------------------------------------------------- sample


def test_sample_writes_a_line_per_completion(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    given = [place.config, "--sample.prompts", "a:bcda", "b:bb", "--sample.samples_per_prompt", "3"]
    given += ["--sample.max_completion_tokens", "6", "--sample.logprobs", "true"]
    assert main(["sample", *given]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted((line["place"], line["sample"]) for line in lines) == [(p, s) for p in (0, 1) for s in (0, 1, 2)]
    tokenizer = load_tokenizer(place.start)
    for line in lines:
        assert line["prompt"] == ["a:bcda", "b:bb"][line["place"]]
        assert line["completion"] == tokenizer.decode(line["tokens"])
        assert len(line["tokens"]) == len(line["logprobs"]) == line["num_tokens"] <= 6
        assert line["logprob"] == pytest.approx(sum(line["logprobs"]))
        assert (line["stop_reason"] == "stop") == (line["tokens"][-1] in tokenizer.stop_ids)


def test_sample_from_a_file_to_a_file(place: Place, tmp_path: Path) -> None:
    given = [place.config, "--sample.data", str(place.root / "drill.jsonl"), "--sample.temperature", "0"]
    output = tmp_path / "out.jsonl"
    assert main(["sample", *given, "--sample.output", str(output), "--sample.stop_strings", "="]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["completion"] for line in lines] == ["=", "="]  # taught to begin with it
    assert main(["sample", *given, "--sample.output", str(output)]) == USAGE_ERROR


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "neither given; give texts with --sample.prompts"),
        (["--sample.prompts", "a", "--sample.data", "x.jsonl"], "both given"),
        (["--sample.prompts", "a", "--sample.top_p", "0"], "sample.top_p = 0.0 must be above 0"),
        (["--sample.prompts", "a" * 40], "prompts are longer than data.max_prompt_tokens = 32"),
    ],
)
def test_sample_refuses(place: Place, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert main(["sample", place.config, *flags]) == USAGE_ERROR
    assert words in " ".join(capsys.readouterr().err.split())
