"""`rljax eval` of the demo model against a script that knows nothing of rljax: transformers draws greedily, and
Math-Verify alone compares the final answer with the truth."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch
from math_verify import parse, verify
from transformers import AutoModelForCausalLM, AutoTokenizer

from rljax.cli import main
from rljax.models.gguf import convert_gguf, demo_gguf

pytestmark = pytest.mark.timeout(1800)  # transformers draws 16,384 tokens

SETS = ("gsm8k", "math__math_500")
PROMPTS, TOKENS, BATCH = 64, 128, 32


@pytest.fixture(scope="module")
def files(shared_data) -> list[Path]:
    return [shared_data / "guru_math" / "online_eval" / f"{name}.parquet" for name in SETS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("eval") / "m"
    convert_gguf(demo_gguf(), destination)
    return destination


@pytest.fixture(scope="module")
def ours(folder: Path, files: list[Path]) -> list[dict[str, Any]]:
    out = folder.parent / "out"
    given = ["--model.path", str(folder), "--model.compute_dtype", "float32", "--eval.data", *map(str, files)]
    given += ["--eval.temperature", "0", "--eval.max_prompts", str(PROMPTS), "--eval.output", str(out)]
    given += ["--eval.max_completion_tokens", str(TOKENS)]
    assert main(["eval", *given]) == 0
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def theirs(folder: Path, files: list[Path]) -> list[dict[str, Any]]:
    """Completions by transformers, batches padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [row for file in files for row in parquet.read_table(file).slice(0, PROMPTS).to_pylist()]
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        texts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, tokenize=False) for r in part]
        given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        drawn = model.generate(**given, do_sample=False, max_new_tokens=TOKENS, repetition_penalty=1.0)
        for row, completion in zip(part, drawn[:, given["input_ids"].shape[1] :], strict=True):
            row["response"] = tokenizer.decode(completion, skip_special_tokens=True)
    return rows


def independent_score(row: dict[str, Any]) -> float:
    """1 if Math-Verify finds the answer in the last box, of GSM8K else the last number, equal to the truth."""
    boxes = re.findall(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}", row["response"])
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", row["response"])
    if boxes:
        answer = boxes[-1]
    elif row["data_source"] == "openai/gsm8k" and numbers:
        answer = numbers[-1].rstrip(",")
    else:
        return 0.0
    truth = row["reward_model"]["ground_truth"]
    return float(verify(parse(f"\\boxed{{{truth}}}"), parse(f"\\boxed{{{answer}}}")))


def test_greedy_completions_are_those_of_transformers(ours, theirs) -> None:
    """But for near-ties: rows are padded on the left there and rounded otherwise."""
    assert len(ours) == len(theirs) == len(SETS) * PROMPTS
    differ = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a["response"] != b["response"]]
    assert len(differ) <= 2, differ


def test_scores_are_those_of_math_verify(ours, theirs) -> None:
    mine, independent = [line["score"] for line in ours], [independent_score(row) for row in theirs]
    differ = [
        (i, ours[i]["response"], ours[i]["ground_truth"])
        for i, (a, b) in enumerate(zip(mine, independent, strict=True))
        if a != b
    ]
    assert not differ
    assert 0 < sum(mine) < len(mine)  # or the comparison would say nothing
