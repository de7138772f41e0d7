"""Choice of the verifier, and the two verifiers that fit in a line."""

import typing

import pytest

from rljax.config import ConfigError, RewardConfig
from rljax.rewards.dispatch import VERIFIERS, verifier_for


@pytest.mark.parametrize(
    "data_source, verifier",
    [
        ("math__merged_deduped_dapo_or1_dataset", "math"),
        ("math__deepscaler_preview", "math"),
        ("math__math", "math"),
        ("aime2024", "math"),
        ("aimeamc2023", "math"),
        ("DigitalLearningGmbH/MATH-lighteval", "math"),
        ("openai/gsm8k", "gsm8k"),
        ("char_count", "char_count"),
        ("arithmetic", "char_count"),
        ("exact", "exact"),
    ],
)
def test_auto_goes_by_the_data_source(data_source, verifier):
    assert verifier_for(data_source, "auto") == verifier


def test_a_name_overrides_the_data_source():
    assert verifier_for("openai/gsm8k", "exact") == "exact"
    assert verifier_for("whatever", "math") == "math"


@pytest.mark.parametrize("data_source", ["", "stem__supergpqa", "my_math", "gsm8k"])
def test_an_unknown_source_is_told_what_is_known(data_source):
    with pytest.raises(ConfigError, match=rf"data_source = '{data_source}' .*openai/gsm8k.*reward\.name"):
        verifier_for(data_source, "auto")


def test_an_unknown_name_is_told_what_is_known():
    with pytest.raises(ConfigError, match=r"reward\.name = 'astrology' .*math, gsm8k, char_count, exact"):
        verifier_for("math", "astrology")


def test_the_config_offers_every_verifier():
    assert set(typing.get_args(typing.get_type_hints(RewardConfig)["name"])) == {"auto", *VERIFIERS}


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
    assert VERIFIERS["char_count"](response, "2", {}) == reward


def test_char_count_takes_negative_answers():
    assert VERIFIERS["char_count"]("3-5=-2", "-2", {}) == 1
    assert VERIFIERS["char_count"]("3-5=-2", "2", {}) == 0


@pytest.mark.parametrize("response, reward", [("abc", 1), (" abc\n", 1), ("ABC", 0), ("abcd", 0), ("ab c", 0), ("", 0)])
def test_exact(response, reward):
    assert VERIFIERS["exact"](response, "abc", {}) == reward
