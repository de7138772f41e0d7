"""Markdown tables of results/*.jsonl for the README: the newest line of each case, metric and peer.

python benchmarks/table.py                                      # every table there are lines for
python benchmarks/table.py --targets benchmarks/results/gpu.jsonl   # beside what was aimed at on a GPU
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from common import RESULTS, Line

ROOFLINE_TARGETS = {"0.5b": 45.0, "1.5b": 55.0, "7b": 60.0}
"""Percent of what the measured bandwidth and arithmetic allow."""
PEER_TARGET = 3.0
"""Times the tokens of transformers."""


def read(files: Iterable[Path]) -> list[Line]:
    """The lines of `files`, in order.

    Raises:
      ValueError: a line is not one JSON object.
    """
    lines = []
    for file in files:
        for number, text in enumerate(file.read_text().splitlines(), 1):
            try:
                made = json.loads(text)
                assert isinstance(made, dict)
            except (ValueError, AssertionError) as error:
                raise ValueError(f"{file}:{number}: not a JSON object: {text[:80]}") from error
            lines.append(made)
    return lines


def identity(made: Line) -> str:
    """What a line is about: bench, device, case, metric and peer. A curve is a result, not what was run."""
    case = {name: value for name, value in made["case"].items() if not isinstance(value, list)}
    return json.dumps([made["bench"], made["device"], case, made["metric"], made.get("peer")], sort_keys=True)


def newest(lines: Sequence[Line]) -> list[Line]:
    """The last line of each identity, by date and then by place, where the first one stood."""
    kept = {identity(made): made for made in lines}  # in the order of the first
    for made in sorted(lines, key=lambda made: made["date"]):
        kept[identity(made)] = made
    return list(kept.values())


def number(value: float) -> str:
    """Three significant digits, thousands with commas."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def spread(made: Line) -> str:
    """Median, and the range where there is one."""
    text = number(made["median"])
    return text if made["n"] == 1 else f"{text} ({number(made['min'])}–{number(made['max'])})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all but the first column to the right."""
    out = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    return "\n".join(out + ["| " + " | ".join(row) + " |" for row in rows])


def grouped(lines: Iterable[Line], key: Callable[[Line], str]) -> dict[str, list[Line]]:
    """Lines by `key`, in order."""
    groups: dict[str, list[Line]] = {}
    for made in lines:
        groups.setdefault(key(made), []).append(made)
    return groups


def describe(case: Line) -> str:
    """One cell for what was run."""
    said = {"model", "batch", "group", "prompt", "cap", "lengths", "dtype", "mode", "ablation", "variant"}
    said |= {"sigma", "mean"}
    words = [form.format(case[name]) for name, form in (("model", "{}"), ("batch", "{} rows")) if name in case]
    if case.get("group") == 1:
        words.append("no groups")
    if "cap" in case:
        words.append(f"{case['prompt']} + {'up to ' if case['lengths'] == 'realistic' else ''}{case['cap']} tokens")
    if "mean" in case:
        words.append(f"mean {case['mean']}")
    if case.get("sigma"):
        words.append(f"spread {case['sigma']}")
    if case.get("dtype", "float32") != "float32":
        words.append(case["dtype"])
    words += [f"{name} {value}" for name, value in case.items() if name not in said and not isinstance(value, list)]
    return ", ".join(words)


# --------------------------------------------------------------------------------------------------------------- tables


def rollout_table(lines: Sequence[Line]) -> str:
    """tokens/s and shares of the rows, with a column per peer: its tokens/s, and how many times that rljax draws."""
    peers = list(dict.fromkeys(made["peer"] for made in lines if "peer" in made))
    rows = []
    for name, mine in grouped(lines, lambda made: describe(made["case"])).items():
        own = {made["metric"]: made for made in mine if "peer" not in made}
        theirs = {made["peer"]: made for made in mine if made.get("peer") and made["metric"] == "throughput"}
        rows.append(
            [name, *(spread(own[metric]) if metric in own else "" for metric in ("throughput", "roofline"))]
            + [number(own[metric]["median"]) if metric in own else "" for metric in ("padding", "dead rows")]
            + [_versus(theirs.get(peer)) for peer in peers]
        )
    head = ["rollouts", "tokens/s", "% of roofline", "padding %", "dead rows %", *peers]
    return markdown(head, rows)


def _versus(made: Line | None) -> str:
    if made is None:
        return ""
    return f"{number(made['peer_median'])} {made['peer_variant']}: **{made['ratio']:.2f}x**"


def ablation_table(lines: Sequence[Line]) -> str:
    """One row per variant, set against the first of its ablation."""
    rows = [
        [
            made["case"]["ablation"],
            made["case"]["variant"],
            describe(made["case"]),
            spread(made),
            f"{made['ratio']:.2f}",
        ]
        for made in lines
    ]
    return markdown(["ablation", "variant", "of", "tokens/s", "x first"], rows)


def simulation_table(lines: Sequence[Line]) -> str:
    """Decode cost: the least as a percentage of what was asked for, a column per mode."""
    lines = [made for made in lines if made["metric"] == "decode cost"]
    modes = list(dict.fromkeys(made["case"]["mode"] for made in lines))
    rows = []
    for name, mine in grouped(lines, lambda made: describe(made["case"])).items():
        by_mode = {made["case"]["mode"]: made for made in mine}
        rows.append([name, *(number(by_mode[mode]["median"]) if mode in by_mode else "" for mode in modes)])
    return markdown(["least cost, % of the engine's", *modes], rows)


def plain_table(lines: Sequence[Line]) -> str:
    """One row per line, whatever it is of."""
    rows = [[describe(made["case"]), made["metric"], spread(made), made["unit"]] for made in lines]
    return markdown(["case", "metric", "median", "unit"], rows)


def target_table(lines: Sequence[Line]) -> str:
    """Rows of the models that have targets, with what was aimed at and whether it was reached."""
    rows = []
    for made in lines:
        model, metric, peer = made["case"]["model"], made["metric"], made.get("peer")
        if metric == "roofline":
            what, got, aim = "% of roofline", made["median"], ROOFLINE_TARGETS.get(model)
        elif metric == "throughput" and peer == "transformers":
            what, got, aim = f"x transformers ({made['peer_variant']})", made["ratio"], PEER_TARGET
        else:
            continue
        reached = "" if aim is None else ("yes" if got >= aim else "no")
        rows.append([describe(made["case"]), what, number(got), "" if aim is None else number(aim), reached])
    return markdown(["rollouts", "measured", "is", "target", "reached"], rows)


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """Title to Markdown, of everything there are lines for."""
    made = {}
    for device, mine in grouped(lines, lambda made: made["device"]).items():
        rows = [line for line in mine if line["bench"] == "sampling"]
        ablations = [line for line in rows if "ablation" in line["case"]]
        rollouts = [line for line in rows if "ablation" not in line["case"]]
        simulated = [line for line in mine if line["bench"] == "simulate"]
        others = [line for line in mine if line["bench"] not in ("sampling", "simulate")]
        for title, kind, some in (
            ("Rollouts", rollout_table, rollouts),
            ("Ablations", ablation_table, ablations),
            ("Counted", simulation_table, simulated),
            ("Other", plain_table, others),
        ):
            if some:
                made[f"{title}, {device}"] = kind(some)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="instead of all of results/")
    parser.add_argument("--targets", type=Path, help="print the lines of this file beside the targets")
    given = parser.parse_args()
    if given.targets:
        print(target_table(newest(read([given.targets]))))
        return
    for title, text in tables(newest(read(given.files or sorted(RESULTS.glob("*.jsonl"))))).items():
        print(f"### {title}\n\n{text}\n")


if __name__ == "__main__":
    main()
