"""Every recipe lies over a run's config without a contradiction and says what it is named for."""

from pathlib import Path

import pytest

from rljax.config import AlgorithmConfig, RunConfig
from rljax.config_file import parse_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml"))


def recipe(name: str) -> RunConfig:
    fits = ["--data.prompts_per_step", "64"]
    return parse_config([str(CONFIGS / "quickstart.yaml"), str(CONFIGS / "recipes" / f"{name}.yaml"), *fits])


def test_the_recipes_people_ask_for_are_there() -> None:
    assert {"paper", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "scalerl"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_accepted_and_changes_what_it_is_about(name: str) -> None:
    config = recipe(name)
    assert config.run_dir == "runs/quickstart"  # an overlay leaves the rest alone
    if name == "lora":
        assert config.lora.rank == 32
    elif name != "paper":
        assert config.algorithm != AlgorithmConfig()


def test_the_paper_is_the_default_but_for_its_verifiers() -> None:
    path = str(CONFIGS / "recipes" / "paper.yaml")
    assert parse_config([path, "--data.train", "x"]) == parse_config(["--data.train", "x", "--reward.mode", "paper"])
