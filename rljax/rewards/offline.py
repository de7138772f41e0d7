"""Scores saved completions: lines of JSON in, the same lines with their scores out. No model, no JAX."""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from rljax.config import ConfigError, RewardConfig
from rljax.jsonl import read_lines
from rljax.rewards.pool import Verdict
from rljax.rewards.scorer import Scorer, open_scorer

_REQUIRED = ("data_source", "response", "ground_truth")
_AHEAD = 256
"""Lines handed to the workers before the first answer is waited for: they never idle, and memory stays small."""


def score_file(path: str, config: RewardConfig, output: str = "") -> int:
    """Writes every line of the JSONL file `path` with `score`, `error` and `seconds` added; returns their number.

    A line holds `data_source`, `response`, `ground_truth` and, if it likes, `extra_info`; what else it holds is kept.
    `error` is "" where the verifier decided, else what happened, and the score then is 0.

    Args:
      output: JSONL file to write; empty: the terminal.

    Raises:
      ConfigError: a line is not such an object, or of a source without a verifier: before anything is scored.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path} does not exist; give a JSONL file with {', '.join(_REQUIRED)} in every line")
    if output and Path(output).exists():
        raise ConfigError(f"--output {output} exists and is not overwritten; give another file")
    if output and not Path(output).resolve().parent.is_dir():
        raise ConfigError(f"--output {output}: its folder is not there; make it, or give another file")
    sources = {line["data_source"] for line in _lines(path)}
    if not sources:
        raise ConfigError(f"{path} holds no line; give a JSONL file with {', '.join(_REQUIRED)} in every line")
    with open_scorer(config) as scorer:
        scorer.check(sources)
        with open(output, "w", encoding="utf-8") if output else nullcontext(sys.stdout) as out:
            return _score_lines(path, scorer, out)


def _score_lines(path: str, scorer: Scorer, out: TextIO) -> int:
    waiting: list[tuple[dict[str, Any], Any]] = []
    written = 0

    def write_first() -> None:
        line, scoring = waiting.pop(0)
        out.write(json.dumps(line | scored_fields(scoring.result()[0])) + "\n")

    for line in _lines(path):
        truth = line["ground_truth"]
        text = truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False)
        waiting.append(
            (line, scorer.submit(line["data_source"], text, line.get("extra_info") or {}, [line["response"]]))
        )
        written += 1
        if len(waiting) >= _AHEAD:
            write_first()
    while waiting:
        write_first()
    return written


def scored_fields(verdict: Verdict) -> dict[str, Any]:
    """What a line gets of its verdict."""
    error = "" if verdict.status == "scored" else f"{verdict.status}: {verdict.message}"
    return {"score": verdict.score, "error": error, "seconds": round(verdict.seconds, 6)}


def _lines(path: str) -> Iterator[dict[str, Any]]:
    for where, line in read_lines(path):
        _check(line, where)
        yield line


def _check(line: dict[str, Any], where: str) -> None:
    missing = [name for name in _REQUIRED if line.get(name) is None]
    if missing:
        raise ConfigError(
            f"{where}: no {' and no '.join(missing)}; found {', '.join(line) or 'nothing'}; each line needs "
            f"{', '.join(_REQUIRED)}"
        )
    for name, kind in (("data_source", str), ("response", str), ("extra_info", dict)):
        if not isinstance(line.get(name), kind | None):
            raise ConfigError(f"{where}: {name} is a {type(line[name]).__name__}; it must be a {kind.__name__}")
