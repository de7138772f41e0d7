"""Writes evaluation_prompts.json: the ids of two prompts of every evaluation set, as base and instruct models see them.

python tests/golden/make_evaluation_prompts.py SHARED_DATA

Nothing of rljax takes part: the conversation is spelt out here and encoded by the `tokenizers` library alone.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

SETS = (
    "math__full_difficulty_ordered_test_500",
    "online_eval/aime2024",
    "online_eval/amc2023",
    "online_eval/codegen__humaneval_164",
    "online_eval/gsm8k",
    "online_eval/logic__zebra_puzzle_dataset_200",
    "online_eval/math__math_500",
    "online_eval/stem__supergpqa_200",
)
SYSTEM = {
    "instruct": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "base": "You are a helpful assistant.",
}
ROWS = (0, -1)


def summary(ids: list[int]) -> dict[str, object]:
    digest = hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()  # int32, little-endian
    return {"sha256": digest, "tokens": len(ids), "first": ids[:8], "last": ids[-8:]}


def main() -> None:
    shared = Path(sys.argv[1])
    tokenizer = Tokenizer.from_file(str(shared / "qwen2.5_tokenizer" / "tokenizer.json"))
    golden = {}
    for name in SETS:
        prompts = pq.read_table(shared / "guru_math" / f"{name}.parquet")["prompt"].to_pylist()
        golden[name] = []
        for row in ROWS:
            ((user,),) = [prompts[row]]
            kinds = {"row": row % len(prompts)}
            for kind, system in SYSTEM.items():
                text = "".join(
                    f"<|im_start|>{role}\n{content}<|im_end|>\n"
                    for role, content in (("system", system), (user["role"], user["content"]))
                )
                kinds[kind] = summary(tokenizer.encode(text + "<|im_start|>assistant\n", add_special_tokens=False).ids)
            golden[name].append(kinds)
    lines = [f" {json.dumps(name)}: {json.dumps(rows)}" for name, rows in golden.items()]
    Path(__file__).with_name("evaluation_prompts.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
