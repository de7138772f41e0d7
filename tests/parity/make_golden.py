"""Writes tests/golden/hf.json: what transformers on torch makes of tiny models with `formula_weights`,
tests/golden/prompts.json: ids of chats under the Qwen2.5 instruct and base templates, and
tests/golden/smollm2.json: a greedy answer of the demo model, read from GGUF by transformers itself.

  .venv-parity/bin/python tests/parity/make_golden.py

Per model: config.json as transformers writes it, the names and shapes of its state dict, and a few logits.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
from golden.weights import formula_weights  # noqa: E402

from rljax.models.gguf import demo_gguf  # noqa: E402

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
SHAPE |= dict(vocab_size=64, max_position_embeddings=128, head_dim=16, bos_token_id=None, eos_token_id=1)
CASES = {
    "qwen2-tied": Qwen2Config(
        **SHAPE, tie_word_embeddings=True, rope_parameters=dict(rope_theta=1e6, rope_type="default")
    ),
    "qwen2-untied": Qwen2Config(
        **SHAPE, tie_word_embeddings=False, rope_parameters=dict(rope_theta=1e6, rope_type="default")
    ),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True, rope_parameters=dict(rope_theta=1e6, rope_type="default")),
    "llama": LlamaConfig(
        **SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=dict(rope_theta=1e5, rope_type="default")
    ),
}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 63]


def golden(config) -> dict:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    names = {
        n: list(t.shape) for n, t in model.state_dict().items() if not (config.tie_word_embeddings and "lm_head" in n)
    }
    weights = {name: torch.from_numpy(value) for name, value in formula_weights(names).items()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    return {
        "config": json.loads(config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]},
        "shapes": names,
        "tokens": TOKENS,
        "logits_first_5_ids": [[round(x, 6) for x in row[:5].tolist()] for row in logits],
        "logsumexp": [round(x, 6) for x in logits.logsumexp(-1).tolist()],
    }


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


CHATS = [
    [user("Janet’s ducks lay 16 eggs per day. Please output the final answer within \\boxed{}.")],
    [user("  Compute $\\frac{1}{2} + 3,000.50$;\n\n\tanswer: ½ × 2 = 1. 东京 don't <|im_end|> <|endoftext|>")],
    [{"role": "system", "content": "Be brief."}, user("2+2?")],
    [user("2+2?"), {"role": "assistant", "content": "\\boxed{4}"}, user("and 3+3?")],
]
INSTRUCT, BASE = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "You are a helpful assistant."


def golden_prompts() -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(TESTS.parents[1] / "shared" / "data" / "qwen2.5_tokenizer")
    templates = {"instruct": tokenizer.chat_template, "base": tokenizer.chat_template.replace(INSTRUCT, BASE)}

    def ids(messages: list, template: str, prompt: bool) -> list[int]:
        made = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=prompt)
        return list(made["input_ids"])

    return [
        {"messages": messages, "add_generation_prompt": prompt}
        | {kind: ids(messages, template, prompt) for kind, template in templates.items()}
        for messages in CHATS
        for prompt in (True, False)
    ]


def golden_smollm2() -> dict:
    file = demo_gguf()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    messages = [user("Tell me about the number 12,345 and the sea.")]
    prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    greedy: list[int] = []
    largest: list[float] = []
    for _ in range(24):  # no generate(): nothing but the argmax of the logits
        with torch.no_grad():
            logits = model(torch.tensor([prompt + greedy])).logits[0, -1]
        greedy.append(int(logits.argmax()))
        largest.append(round(float(logits.max()), 5))
    return {"messages": messages, "prompt": prompt, "greedy": greedy, "greedy_logits": largest}


if __name__ == "__main__":
    (TESTS / "golden" / "smollm2.json").write_text(json.dumps(golden_smollm2()) + "\n")
    (TESTS / "golden" / "prompts.json").write_text(json.dumps(golden_prompts(), ensure_ascii=False) + "\n")
    found = {name: golden(config) for name, config in CASES.items()}
    (TESTS / "golden" / "hf.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
