"""Choice of the verifier, and the two verifiers that fit in a line."""

import typing

import pytest

from rljax.config import ConfigError, RewardConfig
from rljax.rewards import coder1
from rljax.rewards.dispatch import CUSTOM, PROGRAMS, VERIFIERS, in_other_mode, verifier_for


@pytest.mark.parametrize(
    "data_source, verifier",
    [
        ("math__merged_deduped_dapo_or1_dataset", "naive_dapo"),
        ("math__deepscaler_preview", "naive_dapo"),
        ("math__math", "naive_dapo"),
        ("aime2024", "math_dapo"),
        ("aimeamc2023", "math_dapo"),
        ("DigitalLearningGmbH/MATH-lighteval", "naive_dapo"),
        ("openai/gsm8k", "gsm8k"),
        ("stem__supergpqa", "supergpqa"),
        ("logic__zebra_puzzle_dataset", "zebra"),
        ("codegen__humaneval", "coder1"),
        ("char_count", "char_count"),
        ("arithmetic", "char_count"),
        ("sorting", "char_count"),
        ("exact", "exact"),
    ],
)
def test_auto_goes_by_the_data_source(data_source, verifier):
    assert verifier_for(data_source, "auto", "paper") == f"{verifier}/paper"
    assert verifier_for(data_source) == f"{verifier}/fixed"


def test_those_that_run_programs():
    assert {key for key, score in VERIFIERS.items() if score.__module__ == coder1.__name__} == PROGRAMS


def test_a_name_overrides_the_data_source():
    assert verifier_for("openai/gsm8k", "exact") == "exact/fixed"
    assert verifier_for("whatever", "math_dapo", "paper") == "math_dapo/paper"
    assert verifier_for("whatever", CUSTOM) == CUSTOM


def test_a_verifier_in_its_other_mode():
    assert in_other_mode("gsm8k/paper") == "gsm8k/fixed"
    assert in_other_mode("naive_dapo/fixed") == "naive_dapo/paper"
    assert in_other_mode("exact/fixed") is None  # one rule
    assert in_other_mode(CUSTOM) is None


@pytest.mark.parametrize("data_source", ["", "stem__other", "my_math", "gsm8k"])
def test_an_unknown_source_is_told_what_is_known(data_source):
    with pytest.raises(ConfigError, match=rf"data_source = '{data_source}' .*openai/gsm8k.*reward\.name"):
        verifier_for(data_source, "auto")


def test_an_unknown_name_is_told_what_is_known():
    with pytest.raises(ConfigError, match=r"reward\.name = 'astrology' .*naive_dapo, .*, exact"):
        verifier_for("math", "astrology")


def test_an_unknown_mode_is_told_what_is_known():
    with pytest.raises(ConfigError, match=r"reward\.mode = 'kind' .*paper or fixed"):
        verifier_for("math", "auto", "kind")  # type: ignore[arg-type]


def test_the_config_offers_every_verifier():
    hints = typing.get_type_hints(RewardConfig)
    names, modes = typing.get_args(hints["name"]), typing.get_args(hints["mode"])
    assert {f"{name}/{mode}" for name in names if name != "auto" for mode in modes} == set(VERIFIERS)


@pytest.mark.parametrize(
    "response, reward",
    [
        ("a0b1c1b2=2", 1),
        ("a0b1c1b2=2 \n", 1),
        ("7+5+0=12;0+0+1=01;=2", 1),
        ("=02", 1),
        ("a0b1c1b2=3", 0),
        ("a0b1c1b2=2=3", 0),
        ("a0b1c1b2=2;", 0),
        ("a0b1c1b2=2 2", 0),
        ("=2.0", 0),
        ("=+2", 0),
        ("=\N{SUPERSCRIPT TWO}", 0),
        ("=\N{ARABIC-INDIC DIGIT TWO}", 0),
        ("=" + "2" * 10_000, 0),
        ("=", 0),
        ("2", 0),
        ("", 0),
    ],
)
def test_char_count(response, reward):
    assert VERIFIERS["char_count/fixed"](response, "2", {}) == reward


def test_char_count_takes_negative_answers():
    assert VERIFIERS["char_count/fixed"]("3-5=-2", "-2", {}) == 1
    assert VERIFIERS["char_count/fixed"]("3-5=-2", "2", {}) == 0


@pytest.mark.parametrize("response, reward", [("abc", 1), (" abc\n", 1), ("ABC", 0), ("abcd", 0), ("ab c", 0), ("", 0)])
def test_exact(response, reward):
    assert VERIFIERS["exact/fixed"](response, "abc", {}) == reward
