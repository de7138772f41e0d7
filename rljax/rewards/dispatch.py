"""Which verifier scores a record."""

from rljax.config import ConfigError
from rljax.rewards import char_count, exact, gsm8k, math
from rljax.rewards.answers import Verifier

VERIFIERS: dict[str, Verifier] = {
    "math": math.score,
    "gsm8k": gsm8k.score,
    "char_count": char_count.score,
    "exact": exact.score,
}
"""By the names that `reward.name` takes."""

_SOURCES: dict[str, str] = {
    "math": "math",
    "aime": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "openai/gsm8k": "gsm8k",
    "char_count": "char_count",
    "arithmetic": "char_count",
    "exact": "exact",
}
"""Beginning of `data_source` -> verifier; "aime" is also the AMC set, whose source is "aimeamc2023"."""


def verifier_for(data_source: str, name: str) -> str:
    """Key of `VERIFIERS` for a record: `name` (the config's `reward.name`) itself, or for "auto" by the data source.

    Raises:
      ConfigError: the name is unknown, or it is "auto" and no known source begins the record's.
    """
    if name != "auto":
        if name not in VERIFIERS:
            raise ConfigError(f"reward.name = {name!r} is not known; choose auto or one of {', '.join(VERIFIERS)}")
        return name
    for beginning, verifier in _SOURCES.items():
        if data_source.startswith(beginning):
            return verifier
    raise ConfigError(
        f"data_source = {data_source!r} has no verifier with reward.name = 'auto', which knows sources that begin with "
        f"{', '.join(_SOURCES)}; correct the records' data_source or set reward.name to one of {', '.join(VERIFIERS)}"
    )
