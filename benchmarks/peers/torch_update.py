"""One GRPO update in torch as a worker (operations: protocol.py), in the environment of transformers.

Clipped surrogate with the k3 estimate of the KL, mean over all completion tokens, AdamW: what rljax computes, on a
padded batch with a copy of the prompt in every row. Parameters and moments are float32; `dtype` bfloat16 is autocast,
with a reference held in it. Variants `eager/ROWS` and `compiled/ROWS`: rows of a forward and backward pass; attention
is torch's own (SDPA). Compiled are the layers, one program for all of them, and what turns logits into log-probs.
"""

import contextlib
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

ON_GPU = torch.cuda.is_available() and os.environ.get("BENCH_DEVICE", "cpu") == "gpu"
GATE_ROWS = 8
"""Completions whose log-probs are computed at once."""
state: dict[str, Any] = {}


def load(folder: str, dtype: str) -> dict[str, Any]:
    state.clear()
    if ON_GPU:
        torch.cuda.empty_cache()
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to("cuda" if ON_GPU else "cpu")
    reference = copy.deepcopy(model).to(getattr(torch, dtype)).requires_grad_(False)
    state.update(model=model, reference=reference, pick=_pick, dtype=getattr(torch, dtype))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {"versions": versions, "variants": ["eager", "compiled"]}


def _compile() -> None:
    """Once per load."""
    if "compiled" not in state:
        for model in (state["model"], state["reference"]):
            for layer in model.model.layers:
                layer.compile()
        state["pick"] = torch.compile(_pick)
        state["compiled"] = True


def _padded(
    prompts: list[list[int]], completions: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(tokens [B, S + R], attention mask [B, S + R], completion mask [B, R]); prompts are of one length S.

    Where all completions are as long, no mask: attention is then causal and no more, torch's fastest.
    """
    longest, group = max(map(len, completions)), len(completions) // len(prompts)
    tokens = [prompts[i // group] + row + [0] * (longest - len(row)) for i, row in enumerate(completions)]
    inside = torch.arange(longest) < torch.tensor([[len(row)] for row in completions])
    attended = None
    if not inside.all():
        attended = torch.cat([torch.ones(len(completions), len(prompts[0]), dtype=torch.bool), inside], dim=1).long()
    device = state["model"].device
    moved = (None if part is None else part.to(device) for part in (torch.tensor(tokens), attended, inside))
    return tuple(moved)  # type: ignore[return-value]


def _pick(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probs [B, R] of `tokens` [B, R] under `logits` [B, R, V], in float32."""
    logits = logits.float()
    return logits.gather(-1, tokens[..., None])[..., 0] - torch.logsumexp(logits, dim=-1)


def _score(
    model: Any, tokens: torch.Tensor, attended: torch.Tensor | None, longest: int, as_held: bool = False
) -> torch.Tensor:
    """Log-probs [B, R] of the last `longest` tokens; `as_held`: in the dtype of the model's parameters, no autocast."""
    mixed = contextlib.nullcontext()
    if state["dtype"] != torch.float32 and not as_held:
        mixed = torch.autocast(tokens.device.type, state["dtype"])
    with mixed:
        logits = model(input_ids=tokens, attention_mask=attended, logits_to_keep=longest + 1, use_cache=False).logits[
            :, :-1
        ]
    return state["pick"](logits, tokens[:, -longest:])


@torch.no_grad()
def logprobs(prompts: list[list[int]], completions: list[list[int]], kind: str = "exact") -> dict[str, Any]:
    """`exact`: of the model, in float32. `held`: of its copy in the dtype of the updates, before the first of them."""
    model = {"exact": state["model"], "held": state["reference"]}[kind]
    tokens, attended, inside = _padded(prompts, completions)
    scored = []
    for part in (slice(first, first + GATE_ROWS) for first in range(0, len(tokens), GATE_ROWS)):
        mask = None if attended is None else attended[part]
        scored += _score(model, tokens[part], mask, inside.shape[1], as_held=True)
    return {"logprobs": [row[mask].tolist() for row, mask in zip(scored, inside, strict=True)]}


def update(
    prompts: list[list[int]],
    completions: list[list[int]],
    advantages: list[float],
    variant: str,
    settings: dict[str, float],
) -> dict[str, Any]:
    kind, _, rows = variant.partition("/")
    if kind == "compiled":
        _compile()
    model = state["model"]
    if "optimizer" not in state:
        state["optimizer"] = torch.optim.AdamW(
            model.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"], fused=True
        )
    _begin()
    started = time.perf_counter()
    tokens, attended, inside = _padded(prompts, completions)
    longest, total = inside.shape[1], inside.sum()
    gains = torch.tensor(advantages, device=tokens.device)[:, None]
    for part in (slice(first, first + int(rows)) for first in range(0, len(tokens), int(rows))):
        mask = None if attended is None else attended[part]
        with torch.no_grad():
            reference = _score(state["reference"], tokens[part], mask, longest)
        scored = _score(model, tokens[part], mask, longest)
        ratio = torch.exp(scored - scored.detach())
        policy = -torch.minimum(ratio * gains[part], ratio.clamp(0.8, 1.2) * gains[part])
        gap = reference - scored
        loss = policy + settings["kl_coefficient"] * (torch.exp(gap) - gap - 1)
        ((loss * inside[part]).sum() / total).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
    state["optimizer"].step()
    state["optimizer"].zero_grad()
    norm = float(norm)
    if ON_GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else peak_mib()
    return {"seconds": seconds, "grad_norm": norm, "peak_mib": peak}


def _begin() -> None:
    """Memory and time are counted from here."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        reset_peak_memory()


if __name__ == "__main__":
    serve({"load": load, "logprobs": logprobs, "update": update})
