"""Every recipe lies over a run's config without a contradiction and says what it is named for, whatever lies below."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from rljax.config import AlgorithmConfig, RunConfig, field_value
from rljax.config_file import parse_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml"))
OBJECTIVES = [name for name in RECIPES if name != "lora"]

ON_POLICY = {"algorithm.updates_per_step": 1, "algorithm.old_logprobs": "current", "algorithm.correction": "off"}
CAP_OF_5 = {"algorithm.loss": "cispo", "algorithm.clip_low": 1.0, "algorithm.clip_high": 4.0}
NO_KL = {"algorithm.kl_coefficient": 0.0}
PUBLISHED: dict[str, dict[str, Any]] = {
    "paper": {
        "data.prompts_per_step": 512, "data.order": "file", "data.max_prompt_tokens": 2048,
        "sampling.temperature": 1.0, "sampling.max_completion_tokens": 4096, "reward.mode": "paper",
        "algorithm.group_size": 8, "algorithm.updates_per_step": 4, "algorithm.advantage": "grpo",
        "algorithm.advantage_eps": 1e-6, "algorithm.loss": "clip", "algorithm.clip_low": 0.2,
        "algorithm.clip_high": 0.2, "algorithm.dual_clip": 3.0, "algorithm.aggregation": "token_mean",
        "algorithm.kl_coefficient": 0.001, "algorithm.kl_estimator": "k3", "algorithm.kl_in": "loss",
        "algorithm.old_logprobs": "recompute", "optimizer.learning_rate": 1e-6, "optimizer.weight_decay": 0.1,
        "optimizer.schedule": "constant", "optimizer.warmup_updates": 0,
    },
    "grpo": {
        **ON_POLICY, "algorithm.advantage": "grpo", "algorithm.aggregation": "seq_mean_token_mean",
        "algorithm.kl_coefficient": 0.04, "algorithm.kl_estimator": "k3", "algorithm.kl_in": "loss",
    },
    "dr_grpo": {
        **ON_POLICY, **NO_KL, "algorithm.advantage": "dr_grpo", "algorithm.aggregation": "constant",
        "algorithm.group_size": 8, "sampling.max_completion_tokens": 3000, "optimizer.learning_rate": 1e-6,
    },
    "dapo": {
        **NO_KL, "algorithm.clip_low": 0.2, "algorithm.clip_high": 0.28, "algorithm.dual_clip": 10.0,
        "algorithm.group_size": 16, "algorithm.updates_per_step": 16, "algorithm.aggregation": "token_mean",
        "algorithm.dynamic_sampling_rounds": 29, "reward.overlong_buffer_tokens": 4096, "reward.overlong_penalty": 1.0,
        "sampling.max_completion_tokens": 20480, "optimizer.learning_rate": 1e-6, "optimizer.weight_decay": 0.1,
        "optimizer.warmup_updates": 160,
    },
    "gspo": {
        **NO_KL, "algorithm.loss": "gspo", "algorithm.clip_low": 3e-4, "algorithm.clip_high": 4e-4,
        "algorithm.updates_per_step": 4, "algorithm.aggregation": "seq_mean_token_mean",
    },
    "cispo": {**NO_KL, **CAP_OF_5, "algorithm.advantage": "grpo", "algorithm.aggregation": "token_mean"},
    "scalerl": {
        **NO_KL, **CAP_OF_5, "algorithm.advantage": "batch_std", "algorithm.aggregation": "prompt_mean",
        "algorithm.zero_variance_groups": "drop", "algorithm.group_size": 16,
    },
    "rloo": {
        **ON_POLICY, "algorithm.advantage": "rloo", "algorithm.kl_in": "reward", "algorithm.kl_estimator": "k1",
        "algorithm.kl_coefficient": 0.05, "algorithm.aggregation": "seq_mean_token_sum",
    },
    "decoupled_ppo": {
        **NO_KL, "algorithm.loss": "clip", "algorithm.old_logprobs": "recompute",
        "algorithm.correction": "token_truncate", "algorithm.correction_high": 5.0,
    },
    "lora": {"lora.rank": 32, "optimizer.learning_rate": 1e-5, "optimizer.weight_decay": 0.0},
}  # fmt: skip
"""What the papers and their code say, of what each is named for."""


def recipe(name: str, *below: str) -> RunConfig:
    """Over the quickstart and the files `below`."""
    files = [str(CONFIGS / "quickstart.yaml"), *below, str(CONFIGS / "recipes" / f"{name}.yaml")]
    return parse_config([*files, "--data.prompts_per_step", "512"])


def test_the_recipes_people_ask_for_are_there() -> None:
    assert set(RECIPES) == set(PUBLISHED)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_was_published(name: str) -> None:
    config = recipe(name)
    assert config.run_dir == "runs/quickstart"  # an overlay leaves the rest alone
    assert {field: field_value(config, field) for field in PUBLISHED[name]} == PUBLISHED[name]


def test_the_paper_is_the_default_but_for_its_verifiers() -> None:
    path = str(CONFIGS / "recipes" / "paper.yaml")
    assert parse_config([path, "--data.train", "x"]) == parse_config(["--data.train", "x", "--reward.mode", "paper"])


def idle(algorithm: AlgorithmConfig) -> set[str]:
    """Fields that change nothing in this objective, or are no part of one."""
    fields = {"group_size", "microbatch_tokens"}
    if algorithm.loss != "dppo_mask":
        fields |= {"dppo_mask", "dppo_penalty"}
    if algorithm.advantage not in ("grpo", "batch_std", "reinforce_pp"):
        fields.add("advantage_eps")
    if algorithm.kl_coefficient == 0:
        fields.add("kl_estimator")
    if algorithm.correction == "off":
        fields |= {"correction_low", "correction_high"}
    if algorithm.correction == "token_truncate":
        fields.add("correction_low")
    return fields


def another(name: str, value: Any) -> Any:
    """A value of that field which is not `value`."""
    kind = get_type_hints(AlgorithmConfig)[name]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    return not value if kind is bool else value + 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_recipe_is_the_same_objective_over_any_other(name: str, tmp_path: Path) -> None:
    """Everything that has a part in it is different in the file below."""
    plain = recipe(name)
    different = {
        field: another(field, value)
        for field, value in dataclasses.asdict(plain.algorithm).items()
        if field not in idle(plain.algorithm)
    }
    below = tmp_path / "below.yaml"
    buffer = plain.reward.overlong_buffer_tokens + 7
    below.write_text(yaml.safe_dump({"algorithm": different, "reward": {"overlong_buffer_tokens": buffer}}))
    assert recipe(name, str(below)) == plain
