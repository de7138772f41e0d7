"""One GRPO update in torch eager as a worker (operations: protocol.py), in the environment of transformers.

Clipped surrogate with the k3 estimate of the KL, mean over all completion tokens, AdamW: what rljax computes, on a
padded batch with a copy of the prompt in every row. Variant `eager/ROWS`: rows of a forward and backward pass.
"""

import copy
import os
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from protocol import peak_mib, reset_peak_memory, serve
from transformers import AutoModelForCausalLM

state: dict[str, Any] = {}


def load(folder: str, dtype: str) -> dict[str, Any]:
    state.clear()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    state["model"] = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    state["reference"] = copy.deepcopy(state["model"]).requires_grad_(False)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {"versions": versions, "variants": ["eager"]}


def _padded(prompts: list[list[int]], completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens [B, S + R], attention mask [B, S + R], completion mask [B, R]); prompts are of one length S."""
    longest, group = max(map(len, completions)), len(completions) // len(prompts)
    tokens = [prompts[i // group] + row + [0] * (longest - len(row)) for i, row in enumerate(completions)]
    inside = torch.arange(longest) < torch.tensor([[len(row)] for row in completions])
    attended = torch.cat([torch.ones(len(completions), len(prompts[0]), dtype=torch.bool), inside], dim=1)
    return torch.tensor(tokens), attended.long(), inside


def _score(model: Any, tokens: torch.Tensor, attended: torch.Tensor, longest: int) -> torch.Tensor:
    """Log-probs [B, R] of the last `longest` tokens."""
    logits = model(input_ids=tokens, attention_mask=attended, logits_to_keep=longest + 1).logits[:, :-1]
    chosen = logits.gather(-1, tokens[:, -longest:, None])[..., 0]
    return chosen - torch.logsumexp(logits, dim=-1)


@torch.no_grad()
def logprobs(prompts: list[list[int]], completions: list[list[int]]) -> dict[str, Any]:
    tokens, attended, inside = _padded(prompts, completions)
    scored = _score(state["model"], tokens, attended, inside.shape[1])
    return {"logprobs": [row[mask].tolist() for row, mask in zip(scored, inside, strict=True)]}


def update(
    prompts: list[list[int]],
    completions: list[list[int]],
    advantages: list[float],
    variant: str,
    settings: dict[str, float],
) -> dict[str, Any]:
    model, rows = state["model"], int(variant.partition("/")[2])
    if "optimizer" not in state:
        state["optimizer"] = torch.optim.AdamW(
            model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"], fused=True
        )
    reset_peak_memory()
    started = time.perf_counter()
    tokens, attended, inside = _padded(prompts, completions)
    longest, total = inside.shape[1], inside.sum()
    gains = torch.tensor(advantages)[:, None]
    for part in (slice(first, first + rows) for first in range(0, len(tokens), rows)):
        with torch.no_grad():
            reference = _score(state["reference"], tokens[part], attended[part], longest)
        scored = _score(model, tokens[part], attended[part], longest)
        ratio = torch.exp(scored - scored.detach())
        policy = -torch.minimum(ratio * gains[part], ratio.clamp(0.8, 1.2) * gains[part])
        gap = reference - scored
        loss = policy + settings["kl_coefficient"] * (torch.exp(gap) - gap - 1)
        ((loss * inside[part]).sum() / total).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "grad_norm": float(norm), "peak_mib": peak_mib()}


if __name__ == "__main__":
    serve({"load": load, "logprobs": logprobs, "update": update})
