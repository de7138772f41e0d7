"""A config is what its files and flags say: round trips, layers, and a refusal for each value that cannot be meant."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
import yaml

from rljax.config import (
    _AT_LEAST_ONE,
    _AT_LEAST_ZERO,
    ARCHITECTURES,
    NOMINAL_PARAMS,
    Architecture,
    ConfigError,
    RunConfig,
)
from rljax.config_file import _KINDS, _REQUIRED, dump_config, parse_config

CONFIGS = sorted(
    file
    for file in (Path(__file__).resolve().parents[1] / "configs").rglob("*.yaml")
    if file.parent.name != "scaling"  # sweep files: tests/scaling/test_ladder.py
)


def parse_text(tmp_path: Path, *texts: str, flags: tuple[str, ...] = ()) -> RunConfig:
    """The config of YAML texts, given as files from left to right, and flags."""
    files = []
    for number, text in enumerate(texts):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        files.append(str(file))
    return parse_config([*files, *flags])


def replaced(**sections: Any) -> RunConfig:
    """The default config with fields of its sections replaced: `replaced(data={"repeats": 2}, seed=1)`."""
    default = RunConfig()
    changes = {
        name: dataclasses.replace(getattr(default, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(default, **changes)


def with_value(dotted: str, value: Any) -> RunConfig:
    section, _, field = dotted.rpartition(".")
    return replaced(**({section: {field: value}} if section else {field: value}))


# ---------------------------------------------------------------------------------------------------- parse and dump


def test_no_argument_gives_the_defaults() -> None:
    assert parse_config([]) == RunConfig()


UNUSUAL = replaced(
    run_dir="runs/with space",
    seed=7,
    model={"path": "", "tokenizer": "a=b", "compute_dtype": "bfloat16"},
    mesh={"fsdp": -1, "tensor": 2},
    data={"order": "shuffle", "system_prompt": "--first line: 'x'\n\nsecond # line, \"quoted\""},
    sampling={"stop_token_ids": (3, 151643)},
    optimizer={"learning_rate": 1e-7, "eps": 1e-15},
    logging={"tensorboard": True, "wandb": "null"},
)


@pytest.mark.parametrize("config", [RunConfig(), UNUSUAL], ids=["default", "unusual"])
def test_dump_then_parse_is_the_same_config(tmp_path: Path, config: RunConfig) -> None:
    assert parse_text(tmp_path, dump_config(config)) == config


def test_files_overlay_from_left_to_right_and_flags_last(tmp_path: Path) -> None:
    left = "seed: 1\nsteps: 10\ndata:\n  repeats: 2\n  seed: 5\n"
    right = "steps: 20\ndata:\n  repeats: 3\n"
    config = parse_text(tmp_path, left, right, flags=("--data.repeats", "4"))
    assert config == replaced(seed=1, steps=20, data={"repeats": 4, "seed": 5})
    swapped = parse_text(tmp_path, right, left)
    assert (swapped.steps, swapped.data.repeats) == (10, 2)


def test_flags_win_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 1\n")
    assert parse_config(["--seed", "2", str(file)]).seed == parse_config([str(file), "--seed=2"]).seed == 2


def test_a_later_list_replaces_an_earlier_one(tmp_path: Path) -> None:
    first, second = "sampling: {stop_token_ids: [1, 2, 3]}", "sampling: {stop_token_ids: [4]}"
    assert parse_text(tmp_path, first).sampling.stop_token_ids == (1, 2, 3)
    assert parse_text(tmp_path, first, second).sampling.stop_token_ids == (4,)
    assert parse_text(tmp_path, first, "sampling: {stop_token_ids: []}").sampling.stop_token_ids == ()


def test_a_float_may_be_written_without_a_point(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    config = parse_text(tmp_path, "optimizer: {learning_rate: 1e-3, weight_decay: 0, eps: 2.5E-9}")
    assert config.optimizer.learning_rate == 0.001
    assert (config.optimizer.weight_decay, config.optimizer.eps) == (0.0, 2.5e-9)


@pytest.mark.parametrize(("written", "value"), [("true", True), ("false", False), ("yes", True), ("off", False)])
def test_booleans(tmp_path: Path, written: str, value: bool) -> None:
    assert parse_text(tmp_path, f"logging: {{tensorboard: {written}}}").logging.tensorboard is value


@pytest.mark.parametrize("text", ["", "# nothing\n", "data: {}\n", "model: {path: ''}\n"])
def test_what_says_nothing_changes_nothing(tmp_path: Path, text: str) -> None:
    assert parse_text(tmp_path, text) == RunConfig()


@pytest.mark.parametrize(
    ("text", "name"),
    [("data:\n", "data"), ("data: {system_prompt: null}", "data.system_prompt"), ("model: {path: ~}", "model.path")],
)
def test_null_is_refused_and_never_the_text_none(tmp_path: Path, text: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} = null .* give one .* remove the line"):
        parse_text(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- seed\n- 1\n", "holds a list; it must be a mapping"),
        ("just words\n", "holds a str; it must be a mapping"),
        ("a: [1\nb: {\n", "is not YAML .*line 2.*fix the line"),
        ("a: \x00", "is not YAML .*fix the line"),
        ("seed: 2025-02-30", "is not YAML .*day is out of range.*fix the line"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse_text(tmp_path, text)
    assert "0.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x81")
    with pytest.raises(ConfigError, match=r"binary\.yaml is not YAML \('utf-8' .*; fix the line or the bytes"):
        parse_config([str(tmp_path / "binary.yaml")])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist; give the path of a YAML file"):
        parse_config([str(tmp_path / "absent.yaml")])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: 2.5", "steps = 2.5 in FILE must be a whole number; .* default, 0"),
        ("steps: [3]", r"steps = \[3\] in FILE must be a whole number; "),
        ("seed: true", "seed = True in FILE must be a whole number; "),
        ("seed: {a: 1}", "seed = {'a': 1} in FILE must be a whole number; "),
        ("optimizer: {b1: high}", "optimizer.b1 = 'high' in FILE must be a number; "),
        (f"optimizer: {{b1: 1{'0' * 400}}}", "optimizer.b1 = 10+ in FILE must be a number; "),
        (
            "algorithm: {loss: ppo}",
            "algorithm.loss = 'ppo' in FILE must be one of clip, cispo, gspo, dppo_mask; give that, or leave it",
        ),
        ("logging: {tensorboard: 2}", "logging.tensorboard = 2 in FILE must be true or false; "),
        ("logging: {wandb: yes}", "logging.wandb = True in FILE must be text in quotes; "),
        ("model: {revision: 0012}", "model.revision = 10 in FILE must be text in quotes; "),
        ("sampling: {stop_token_ids: 1}", "sampling.stop_token_ids = 1 in FILE must be a list of whole numbers, "),
        (
            "sampling: {stop_token_ids: [1, x]}",
            r"stop_token_ids = \[1, 'x'\] in FILE must be a list of whole ",
        ),
        ("algorithm: 3", "algorithm in FILE is a section, not a value; give its fields, such as algorithm.group_s"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("FILE", re.escape(str(tmp_path / "0.yaml")))):
        parse_text(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "algorithm: {group_sise: 4}",
            "algorithm.group_sise in FILE is not a setting; perhaps you meant algorithm.g",
        ),
        (
            "algorithm.group_sise: 4",
            "algorithm.group_sise in FILE is not a setting; perhaps you meant algorithm.group",
        ),
        ("algorythm: {group_size: 4}", "algorythm.group_size in FILE .* perhaps you meant algorithm.group_size;"),
        ("algorythm: {}", "algorythm in FILE is not a setting; "),
        ("algorythm:", "algorythm in FILE is not a setting; "),
        ("step: 4", "step in FILE is not a setting; perhaps you meant steps;"),
        ("group_sise: 4", "group_sise in FILE is not a setting; perhaps you meant algorithm.group_size;"),
        ("learning_rate: 1", "perhaps you meant optimizer.learning_rate or sft.learning_rate;"),
        ("evaluation: {max_token: 4}", "perhaps you meant evaluation.max_completion_tokens;"),
        ("sampling: {temprature: 4}", "perhaps you meant sampling.temperature;"),
        ("optimizer: {lr: 4}", "optimizer.lr in FILE is not a setting; `rljax train"),
        ("zzz: 4", "zzz in FILE is not a setting; `rljax train --help` lists them"),
        ("3: 4", "3 in FILE is not a setting; `rljax train --help` lists them"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path, text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint.replace("FILE", re.escape(str(tmp_path / "0.yaml")))):
        parse_text(tmp_path, text)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--algorithm.group_sise=4"], "^--algorithm.group_sise is not .* perhaps you meant --algorithm.group_size;"),
        (
            ["--algorithm.group-size", "4"],
            "^--algorithm.group-size is not .* you meant --algorithm.group_size;",
        ),
        (["--steps", "many"], "^--steps = 'many' must be a whole number; "),
        (["--steps", "3", "4"], "^--steps was given 2 values: 3, 4; it takes one"),
        (["--run_dir", "--seed", "3"], "^--run_dir was given 0 values; it takes one, .* --run_dir=TEXT"),
        (["--steps"], "^--steps was given 0 values; it takes one"),
        (["--algorithm", "3"], "^--algorithm is a section, not a value; give its fields, such as --algorithm.group_si"),
        (["--logging.tensorboard"], "^--logging.tensorboard was given 0 values; it takes one"),
        (["--logging.tensorboard", "maybe"], "^--logging.tensorboard = 'maybe' must be true or false; "),
        (
            ["--sampling.stop_token_ids", "1", "x"],
            r"stop_token_ids = \['1', 'x'\] must be a list of whole ",
        ),
        (["quickstart"], "^'quickstart' is neither a YAML file nor a flag; .* --section.field VALUE"),
        (["-x"], "^'-x' is neither a YAML file nor a flag; "),
    ],
)
def test_flags_that_cannot_be_meant(argv: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config(argv)


def test_flags_of_every_kind() -> None:
    argv = ["--mesh.fsdp", "-1", "--run_dir=--x", "--data.system_prompt", "", "--sampling.stop_token_ids", "1", "2"]
    argv += ["--logging.tensorboard", "True", "--optimizer.eps", "1e-3", "--data.train=a=b.yaml"]
    assert parse_config(argv) == replaced(
        run_dir="--x",
        sampling={"stop_token_ids": (1, 2)},
        logging={"tensorboard": True},
        optimizer={"eps": 1e-3},
        data={"train": "a=b.yaml"},
    )
    assert parse_config(["--sampling.stop_token_ids", "1", "--sampling.stop_token_ids"]).sampling.stop_token_ids == ()


def test_every_field_can_be_given(tmp_path: Path) -> None:
    """In YAML and as flags: no field is of a kind that cannot be read."""
    tree = yaml.safe_load(dump_config(RunConfig()))
    flags = []
    for section, value in tree.items():
        for name, field in value.items() if isinstance(value, dict) else [("", value)]:
            flags.append(f"--{section}{'.' * bool(name)}{name}")
            flags += map(str, field) if isinstance(field, list) else [str(field)]
    assert len(flags) > 120
    assert set(flags) >= {f"--{name}" for name in _KINDS}
    assert all(get_origin(kind) is Literal or kind in _REQUIRED for kind in _KINDS.values())  # or no message fits
    assert parse_config(flags) == parse_text(tmp_path, yaml.safe_dump(tree)) == RunConfig()


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_config_parses(file: Path, tmp_path: Path) -> None:
    config = parse_config([str(file)])
    assert config != RunConfig() or file.name == "paper.yaml"  # the defaults, written out
    assert parse_text(tmp_path, dump_config(config)) == config


# ------------------------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("name", "bound"),
    [*((name, 1) for name in _AT_LEAST_ONE), *((name, 0) for name in _AT_LEAST_ZERO)],
)
def test_each_bound(name: str, bound: int) -> None:
    for value in (bound - 1, math.nan, math.inf):
        with pytest.raises(ConfigError) as caught:
            with_value(name, value)
        said = str(caught.value)
        assert said.startswith(f"{name} = {value} must be at least {bound}") and f"--{name}" in said
    own_rule = "sampling.temperature", "algorithm.group_size", "data.prompts_per_step", "algorithm.correction_high"
    if name not in own_rule:
        assert with_value(name, bound) is not None


def test_every_number_has_a_check() -> None:
    """Numbers in no list of bounds: checked by their own rule, or any value is meant."""
    unlisted = set()
    for section in dataclasses.fields(RunConfig):
        value = getattr(RunConfig(), section.name)
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        numbers = {f"{section.name}.{f.name}" for f in fields if type(getattr(value, f.name)) in (int, float)}
        unlisted |= numbers | ({section.name} if type(value) in (int, float) else set())
    unlisted -= {*_AT_LEAST_ONE, *_AT_LEAST_ZERO}
    mesh = {"mesh.data", "mesh.fsdp", "mesh.tensor"}  # against the devices, when the mesh is made
    own_rule = {"optimizer.b1", "optimizer.b2", "reward.timeout_seconds", "sample.top_p", "sample.min_p"}
    own_rule |= {"eval.top_p", "optimizer.final_learning_rate_fraction", "plan.sampler_share", "plan.learner_share"}
    assert unlisted == mesh | own_rule


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("name", ["optimizer.b1", "optimizer.b2"])
def test_running_means_keep_less_than_everything(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} = {value} must be at least 0 and below 1"):
        with_value(name, value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_verifier_always_has_a_limit(value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^reward\.timeout_seconds = {value} must be positive and finite; change"):
        with_value("reward.timeout_seconds", value)


def test_group_of_one() -> None:
    with pytest.raises(ConfigError, match=r"group_size = 1: .*'grpo' .* standard deviation.* at least 2"):
        replaced(algorithm={"group_size": 1})
    with pytest.raises(ConfigError, match=r"group_size = 1: .*'dr_grpo' compares .* at least 2"):
        replaced(algorithm={"group_size": 1, "advantage": "dr_grpo"})
    assert replaced(algorithm={"group_size": 1, "advantage": "reinforce_pp"}).algorithm.group_size == 1


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        ({"old_logprobs": "current"}, r"'current' makes every ratio 1.*updates_per_step is 4; set it to 1"),
        ({"loss": "dppo_mask"}, r"'dppo_mask' is a loss against the sampler's .*set it to 'behaviour'"),
        (
            {"correction": "token_mask", "old_logprobs": "behaviour"},
            r"'token_mask' weighs old against .*use 'recompute'",
        ),
        ({"correction_normalise": True}, r"correction_normalise = true .*'off'.*; set a correction and old_logprobs ="),
        (
            {
                "correction_normalise": True,
                "correction": "token_mask",
                "old_logprobs": "current",
                "updates_per_step": 1,
            },
            r"correction_normalise = true .*'current': the mean is of the weights of a whole update",
        ),
        ({"correction_low": 3.0}, r"correction_low = 3.0 is above .*correction_high = 2.0"),
        ({"kl_in": "reward", "kl_importance_weight": True}, r"a reward has no gradient .*set kl_in to 'loss'"),
        ({"kl_in": "reward", "advantage": "reinforce_pp"}, r"needs a return per token.*set kl_in to 'loss'"),
        (
            {"dynamic_sampling_rounds": 2, "group_size": 1, "advantage": "reinforce_pp"},
            r"dynamic_sampling_rounds = 2 looks for groups .*group_size = 1 has none; set the rounds to 0",
        ),
        (
            {"reference_update": "periodic", "reference_every_steps": 2, "kl_coefficient": 0.0},
            r"'periodic' moves a reference .*kl_coefficient = 0 keeps none; set a coefficient above 0",
        ),
        ({"reference_update": "ema"}, r"reference_ema_decay = 0.0 with .*'ema': it must be above 0 and below 1"),
        ({"reference_update": "ema", "reference_ema_decay": 1.0}, r"reference_ema_decay = 1.0 .*below 1"),
        ({"reference_ema_decay": 0.9}, r"reference_ema_decay = 0.9 with .*'fixed'.* 0 without"),
        ({"reference_update": "periodic"}, r"reference_every_steps = 0 with .*'periodic': it must be at least 1"),
        ({"reference_every_steps": 3}, r"reference_every_steps = 3 with .*'fixed'.* 0 without"),
    ],
)
def test_objectives_that_contradict_themselves(algorithm: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replaced(algorithm=algorithm)


def test_updates_are_equal_parts() -> None:
    with pytest.raises(ConfigError, match=r"prompts_per_step = 10 .*updates_per_step = 4 equal updates; make it a mul"):
        replaced(data={"prompts_per_step": 10})
    assert replaced(data={"prompts_per_step": 12}).data.prompts_per_step == 12


def test_training_is_not_greedy() -> None:
    with pytest.raises(ConfigError, match=r"temperature = 0 samples greedily.*use a positive temperature"):
        replaced(sampling={"temperature": 0.0})
    assert replaced(evaluation={"temperature": 0.0}).evaluation.temperature == 0


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_the_final_learning_rate_is_a_share(value: float) -> None:
    with pytest.raises(ConfigError, match=rf"_fraction = {value} must be from 0 to 1, .* change it in the YAML"):
        replaced(optimizer={"schedule": "cosine", "decay_updates": 5, "final_learning_rate_fraction": value})


@pytest.mark.parametrize("name", ["decay_updates", "final_learning_rate_fraction"])
def test_a_decay_needs_a_schedule(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} = 1 .*do nothing with .*'constant'; set the schedule to 'linear'"):
        replaced(optimizer={name: 1})


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_ends_after_the_warm_up(schedule: str) -> None:
    says = f"decay_updates = 3 with .*schedule = '{schedule}' must be above optimizer.warmup_updates = 3, .* its steps"
    with pytest.raises(ConfigError, match=says):
        replaced(optimizer={"schedule": schedule, "decay_updates": 3, "warmup_updates": 3})
    decayed = replaced(optimizer={"schedule": schedule, "decay_updates": 4, "warmup_updates": 3})
    assert decayed.optimizer.decay_updates == 4


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (("q", "gat"), r"^lora\.targets holds 'gat', which is no matrix of a layer; perhaps you meant gate; choose"),
        (
            ("up_proj",),
            r"^lora\.targets holds 'up_proj', .*; perhaps you meant up; choose from q, k, v, o, gate, up, d",
        ),
        (("lm_head",), r"^lora\.targets holds 'lm_head', which is no matrix of a layer; choose from q, k"),
        ((), r"^lora\.targets = \[\] with lora\.rank = 8 must name at least one matrix.* set lora\.rank to 0"),
        (("q", "q"), r"^lora\.targets = \['q', 'q'\] .* none twice; choose from q"),
    ],
)
def test_an_adapter_lies_beside_matrices_there_are(targets: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replaced(lora={"rank": 8, "targets": targets})


def test_an_adapter_has_no_whole_matrix_for_muon() -> None:
    with pytest.raises(ConfigError, match=r"'muon' orthogonalises .* lora\.rank = 8 trains factors.*name to 'adamw'"):
        replaced(lora={"rank": 8}, optimizer={"name": "muon"})
    assert replaced(lora={"rank": 0}, optimizer={"name": "muon"}).lora.rank == 0


def test_the_reference_of_an_adapter_stays_the_frozen_model() -> None:
    moving = {"reference_update": "periodic", "reference_every_steps": 5}
    with pytest.raises(ConfigError, match=r"reference_update = 'periodic' .* lora\.rank = 8 that is the frozen model"):
        replaced(lora={"rank": 8}, algorithm=moving)


def test_the_scale_of_an_adapter() -> None:
    assert replaced(lora={"rank": 8}).lora.scale == 2
    assert replaced(lora={"rank": 8, "alpha": 4}).lora.scale == 0.5


def test_an_unknown_architecture() -> None:
    with pytest.raises(ConfigError, match=r"architecture = 'qwen9' is not known; choose one of tiny, .* model\.path"):
        replaced(model={"architecture": "qwen9"})
    assert replaced(model={"architecture": "qwen9", "path": "folder"}).model.path == "folder"  # not used


def test_shapes_that_cannot_be() -> None:
    base = ARCHITECTURES["tiny"]
    with pytest.raises(ConfigError, match="num_heads = 4 is not a multiple of num_kv_heads = 3"):
        dataclasses.replace(base, num_kv_heads=3)
    with pytest.raises(ConfigError, match="head_dim = 31 is odd"):
        dataclasses.replace(base, head_dim=31)


def test_the_papers_sizes_are_known_shapes() -> None:
    assert len(NOMINAL_PARAMS) == 7
    assert set(NOMINAL_PARAMS) <= set(ARCHITECTURES)
    assert all(isinstance(arch, Architecture) for arch in ARCHITECTURES.values())


# ------------------------------------------------------------------------------------------------------- as a value


def test_a_config_is_a_value() -> None:
    """Sections are static arguments of jitted functions: equal ones must hash alike."""
    a, b = replaced(seed=3), replaced(seed=3)
    assert a == b and a is not b and hash(a) == hash(b)
    assert a != RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.seed = 4  # type: ignore[misc]


def test_importing_and_parsing_needs_no_jax() -> None:
    code = (
        "import sys; from rljax.config_file import parse_config; parse_config(['--seed', '1']); "
        "heavy = {'jax', 'numpy', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
