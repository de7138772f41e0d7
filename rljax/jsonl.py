"""Files of JSON lines, as people and other programs write them: a line that cannot be read is named."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rljax.config import ConfigError


def read_lines(file: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, "train.jsonl:17", and what it holds) of each line that is not blank.

    Raises:
      ConfigError: a line is not UTF-8, or is no JSON object.
    """
    path = Path(file)
    with path.open("rb") as lines:  # as bytes only a line feed ends one: text may hold what Unicode calls a line end
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ConfigError(f"{where}: not UTF-8 ({error}); give a JSONL file, as text") from error
            except ValueError as error:
                raise ConfigError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: a {type(row).__name__}; each line must be one JSON object")
            yield where, row
