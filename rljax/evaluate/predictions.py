"""Scored completions as a file, and the table made of them; neither needs a model, so saved ones can be scored anew.

`predictions.jsonl` holds a line per completion: `set, place, sample, data_source, response, ground_truth, extra_info,
stop_reason, num_tokens` and what scored it: `score, error, seconds`.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rljax.config import ConfigError, RewardConfig
from rljax.evaluate.estimators import Estimate, majority_at_k, mean_at_k, pass_at_k, powers_up_to
from rljax.jsonl import read_lines
from rljax.rewards.answers import marked_answer
from rljax.rewards.offline import scored_fields
from rljax.rewards.scorer import Scorer, open_scorer

PREDICTIONS, RESULTS, TABLE = "predictions.jsonl", "results.json", "results.md"

_WITHOUT_VOTE = ("logic__zebra_puzzle", "codegen")
"""Beginnings of the sources whose answers are no short text: no two are alike, so there is no majority."""


@dataclasses.dataclass(frozen=True)
class SetResult:
    """What one set came to."""

    name: str
    prompts: int
    """Evaluated."""
    dropped: int
    """Not evaluated, their prompt being too long."""
    samples_per_prompt: int
    mean: Estimate
    passed: dict[int, Estimate]
    """pass@k by k."""
    majority: Estimate | None
    """None where completions have no short answer."""
    by_source: dict[str, Estimate]
    """mean@k by data source: the paper's overall score is the mean of these."""
    undecided: dict[str, float]
    """Share of completions that scored 0 without a judgement, by kind."""
    truncated: float
    """Share of completions that reached the cap."""
    mean_tokens: float

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def summarise_set(name: str, lines: Sequence[dict[str, Any]], dropped: int = 0) -> SetResult:
    """Of the lines of one set, every prompt with as many completions.

    Raises:
      ConfigError: prompts have different numbers of completions.
    """
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        by_prompt.setdefault(line["place"], []).append(line)
    groups = list(by_prompt.values())
    counts = {len(group) for group in groups}
    if len(counts) != 1:
        raise ConfigError(
            f"set {name!r} has prompts with {min(counts)} and with {max(counts)} completions; estimates need the same "
            "number of each, so give the file as it was written"
        )
    scores = np.array([[line["score"] for line in group] for group in groups])
    sources = [group[0]["data_source"] for group in groups]
    has_votes = not any(source.startswith(_WITHOUT_VOTE) for source in sources)
    answers = [[marked_answer(line["response"]) or None for line in group] for group in groups]  # "" is no vote
    kinds = [line["error"].partition(":")[0] for line in lines if line["error"]]
    return SetResult(
        name=name,
        prompts=len(groups),
        dropped=dropped,
        samples_per_prompt=scores.shape[1],
        mean=mean_at_k(scores),
        passed={k: pass_at_k(scores, k) for k in powers_up_to(scores.shape[1])},
        majority=majority_at_k(scores, answers) if has_votes else None,
        by_source={
            source: mean_at_k(scores[[place for place, other in enumerate(sources) if other == source]])
            for source in dict.fromkeys(sources)
        },
        undecided={kind: kinds.count(kind) / len(lines) for kind in sorted(set(kinds))},
        truncated=float(np.mean([line["stop_reason"] == "length" for line in lines])),
        mean_tokens=float(np.mean([line["num_tokens"] for line in lines])),
    )


def overall(results: Sequence[SetResult]) -> float:
    """The paper's `val/overall_pass1`: the unweighted mean over data sources."""
    values: dict[str, list[float]] = {}
    for result in results:
        for source, estimate in result.by_source.items():
            values.setdefault(source, []).append(estimate.value)
    return float(np.mean([np.mean(found) for found in values.values()]))


def table_rows(results: Sequence[SetResult]) -> list[list[str]]:
    """Header and a row per set, all text."""
    n = max(result.samples_per_prompt for result in results)
    ks = [k for k in powers_up_to(n) if k > 1]
    voting = n > 2 and any(result.majority for result in results)  # a vote of two is a draw
    header = ["set", "prompts", "dropped", "pass@1" if n == 1 else f"mean@{n}"]
    header += [f"pass@{k}" for k in ks] + [f"maj@{n}"] * voting + ["tokens", "truncated", "undecided"]
    rows = [header]
    for r in results:
        rows.append(
            [
                r.name,
                f"{r.prompts:,}",
                f"{r.dropped:,}",
                _text(r.mean),
                *(_text(r.passed.get(k)) for k in ks),
                *([_text(r.majority)] * voting),
                f"{r.mean_tokens:,.0f}",
                f"{100 * r.truncated:.1f} %",
                f"{100 * sum(r.undecided.values()):.1f} %",
            ]
        )
    return rows


def _text(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.3f} ± {estimate.standard_error:.3f}"


def write_results(
    folder: Path, lines: Sequence[dict[str, Any]], results: Sequence[SetResult], about: dict[str, Any]
) -> None:
    """Writes results as JSON, the table as Markdown and predictions into a folder that is made.

    The predictions come last and whole: a folder that holds them is finished, and any other may be written again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**about, "overall": overall(results), "sets": [result.as_json() for result in results]}
    (folder / RESULTS).write_text(json.dumps(whole, indent=2) + "\n")
    header, *rows = table_rows(results)
    align = ["---", *["---:"] * (len(header) - 1)]
    text = "".join(f"| {' | '.join(row)} |\n" for row in (header, align, *rows))
    mean = f"Unweighted mean over data sources: {whole['overall']:.3f}. ± is a standard error, clustered by prompt.\n"
    (folder / TABLE).write_text(f"{text}\n{mean}")
    partial = folder / f"{PREDICTIONS}.partial"
    with partial.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    os.replace(partial, folder / PREDICTIONS)


def reward_settings(config: RewardConfig, scorer: Scorer) -> dict[str, Any]:
    """What scored, for `results.json`; the name is `custom` where it was none of the verifiers."""
    return {"mode": config.mode, "reward": {**dataclasses.asdict(config), "name": scorer.name}}


def rescore(folder: str, config: RewardConfig, output: str = "") -> list[SetResult]:
    """Scores the predictions saved in `folder` anew, without a model; writes them to `output`, or without it to
    rescored-MODE in `folder`.

    Raises:
      ConfigError: there are none, or the output exists.
    """
    source = Path(folder) / PREDICTIONS
    if not source.is_file():
        raise ConfigError(f"{folder} holds no {PREDICTIONS}; give a folder that `rljax eval` wrote")
    to = Path(output) if output else Path(folder) / f"rescored-{config.mode}"
    if (to / PREDICTIONS).exists():
        raise ConfigError(f"{to} holds predictions already and is not overwritten; give another folder with --output")
    about, lines = _read_results(Path(folder) / RESULTS), _read_predictions(source)
    with open_scorer(config) as scorer:
        scorer.check({line["data_source"] for line in lines})
        scored = score_lines(lines, scorer)
    dropped = {s["name"]: s["dropped"] for s in about["sets"]}
    results = [summarise_set(name, part, dropped.get(name, 0)) for name, part in by_set(scored).items()]
    about = {name: value for name, value in about.items() if name not in ("sets", "overall")}
    # The mode also chooses the prompt of some sets (`held_out.repaired_prompt`), which scoring anew does not change.
    sampled = {"sampled_in_mode": about.get("sampled_in_mode", about.get("mode"))}
    about |= sampled | reward_settings(config, scorer) | {"rescored_from": str(folder)}
    write_results(to, scored, results, about)
    return results


_LINE = ("set", "place", "data_source", "response", "ground_truth", "extra_info", "stop_reason", "num_tokens")


def _read_predictions(file: Path) -> list[dict[str, Any]]:
    lines = []
    for where, line in read_lines(file):
        missing = [name for name in _LINE if name not in line]
        if missing:
            raise ConfigError(f"{where}: no {', '.join(missing)}; give the file as `rljax eval` wrote it")
        lines.append(line)
    if not lines:
        raise ConfigError(f"{file} holds no prediction; give the folder of an evaluation that came to its end")
    return lines


def _read_results(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); give a folder that `rljax eval` wrote, whole") from error
    if not isinstance(about, dict) or "sets" not in about:
        raise ConfigError(f"{file} holds no sets; give a folder that `rljax eval` wrote, whole")
    return about


def score_lines(lines: Sequence[dict[str, Any]], scorer: Scorer) -> list[dict[str, Any]]:
    """`lines` with `score`, `error` and `seconds` of this scorer."""
    handles = [
        scorer.submit(line["data_source"], line["ground_truth"], line["extra_info"], [line["response"]])
        for line in lines
    ]
    return [line | scored_fields(handle.result()[0]) for line, handle in zip(lines, handles, strict=True)]


def by_set(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each set, in their order."""
    sets: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        sets.setdefault(line["set"], []).append(line)
    return sets
