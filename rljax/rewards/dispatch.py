"""Which verifier scores a record: by its data source, in one of two modes.

paper: what the code of arXiv 2509.25300 does, defects included (`verl/utils/reward_score/`), so that its numbers can be
compared with. fixed: the repaired rule. Where the two differ, `paper` rewards what is wrong or refuses what is right.
"""

from typing import Literal, get_args

from rljax.config import ConfigError
from rljax.rewards import char_count, coder1, exact, gsm8k, math, math_dapo, naive_dapo, supergpqa, zebra
from rljax.rewards.answers import Verifier

Mode = Literal["paper", "fixed"]

_BOTH: dict[str, dict[Mode, Verifier]] = {
    "naive_dapo": {"paper": naive_dapo.paper_score, "fixed": math.score},
    "math_dapo": {"paper": math_dapo.paper_score, "fixed": math.score},
    "gsm8k": {"paper": gsm8k.paper_score, "fixed": gsm8k.score},
    "supergpqa": {"paper": supergpqa.paper_score, "fixed": supergpqa.score},
    "zebra": {"paper": zebra.paper_score, "fixed": zebra.score},
    "coder1": {"paper": coder1.paper_score, "fixed": coder1.score},
    # The project's own: there is nothing to repair.
    "char_count": {"paper": char_count.score, "fixed": char_count.score},
    "exact": {"paper": exact.score, "fixed": exact.score},
}
"""By the names that `reward.name` takes."""

VERIFIERS: dict[str, Verifier] = {
    f"{name}/{mode}": score for name, modes in _BOTH.items() for mode, score in modes.items()
}
"""By "name/mode", what `verifier_for` gives."""

PROGRAMS = frozenset(f"coder1/{mode}" for mode in _BOTH["coder1"])
"""Those that run a program: they need `sandbox`, and `coder1.SECONDS` beside the limit of an item."""

CUSTOM = "custom"
"""The verifier that `reward.file` names."""

_SOURCES: dict[str, str] = {
    "math": "naive_dapo",
    "aime": "math_dapo",
    "DigitalLearningGmbH/MATH-lighteval": "naive_dapo",
    "openai/gsm8k": "gsm8k",
    "stem__supergpqa": "supergpqa",
    "logic__zebra_puzzle": "zebra",
    "codegen": "coder1",
    "char_count": "char_count",
    "arithmetic": "char_count",
    "sorting": "char_count",
    "exact": "exact",
}
"""Beginning of `data_source` -> verifier; "aime" is also the AMC set, whose source is "aimeamc2023"."""


def verifier_for(data_source: str, name: str = "auto", mode: Mode = "fixed") -> str:
    """Key of `VERIFIERS` for a record.

    Args:
      name: the config's `reward.name`: a verifier, "auto" for the one of the data source, or `CUSTOM`.

    Raises:
      ConfigError: the name or the mode is unknown, or it is "auto" and no known source begins the record's.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"reward.mode = {mode!r} is not known; choose {' or '.join(get_args(Mode))}")
    if name == CUSTOM:
        return CUSTOM
    if name != "auto":
        if name not in _BOTH:
            raise ConfigError(f"reward.name = {name!r} is not known; choose auto or one of {', '.join(_BOTH)}")
        return f"{name}/{mode}"
    for beginning, verifier in _SOURCES.items():
        if data_source.startswith(beginning):
            return f"{verifier}/{mode}"
    raise ConfigError(
        f"data_source = {data_source!r} has no verifier with reward.name = 'auto', which knows sources that begin with "
        f"{', '.join(_SOURCES)}; correct the records' data_source or set reward.name (to `rljax reward` and "
        f"`rljax eval --rescore`: --name) to one of {', '.join(_BOTH)}"
    )


def in_other_mode(verifier: str) -> str | None:
    """The key of the same verifier in the other mode; None where both modes are one rule."""
    if verifier == CUSTOM:
        return None
    name, _, mode = verifier.partition("/")
    other = f"{name}/{'fixed' if mode == 'paper' else 'paper'}"
    return None if VERIFIERS[other] is VERIFIERS[verifier] else other
