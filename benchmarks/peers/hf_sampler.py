"""transformers' `generate` as a worker (operations: protocol.py). Runs in the environment `make bench-peers` makes.

Variants: `dynamic` and `static` are its caches, each batch running to its longest row; `continuous` is its continuous
batching, where every row ends at its own length. `NAME/ROWS` runs batches of ROWS rows one after the other. On a GPU
transformers compiles `static` by itself. On a CPU it does not, and `static-compiled` makes it; that is tried only where
BENCH_HF_COMPILED is set, as it takes half a minute for each shape and was slower than `dynamic` on every one tried.
"""

import os
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# CPU threads that compile kernels stay alive, and busy for a while; one process compiles them in turn.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
import transformers
from protocol import peak_mib, reset_peak_memory, serve, split_by_rows
from transformers import AutoModelForCausalLM, CompileConfig, ContinuousBatchingConfig, GenerationConfig

ON_GPU = torch.cuda.is_available() and os.environ.get("BENCH_DEVICE", "cpu") == "gpu"
NEVER_STOP = -1
model: Any = None


def load(folder: str, dtype: str) -> dict[str, Any]:
    global model
    if not ON_GPU:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    if ON_GPU:
        model = model.to("cuda")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if ON_GPU else f"{torch.get_num_threads()} threads",
        "variants": ["dynamic", "static", "continuous"] + ["static-compiled"] * ("BENCH_HF_COMPILED" in os.environ),
    }


def greedy(prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    drawn = [
        _generate([prompt], new_tokens, do_sample=False, cache_implementation=None)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    return {"tokens": drawn}


def sample(prompts: list[list[int]], lengths: list[int], variant: str, seed: int) -> dict[str, Any]:
    """Draws at least `lengths[i]` tokens after `prompts[i]`; prompts are of one length."""
    torch.manual_seed(seed)
    kind, _, rows = variant.partition("/")
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        reset_peak_memory()
    started = time.perf_counter()
    drawn = (
        _continuous(prompts, lengths, seed) if kind == "continuous" else _static(prompts, lengths, kind, int(rows or 0))
    )
    if ON_GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else peak_mib()
    return {"seconds": seconds, "drawn": drawn, "peak_mib": peak}


def _static(prompts: list[list[int]], lengths: list[int], kind: str, rows: int) -> int:
    assert kind in ("dynamic", "static", "static-compiled"), kind
    options: dict[str, Any] = {"cache_implementation": None if kind == "dynamic" else "static"}
    if kind == "static-compiled":
        options["compile_config"] = CompileConfig(mode="default")
        options["compile_config"]._compile_all_devices = True
    drawn = 0
    for part, longest in split_by_rows(lengths, rows):
        out = _generate(prompts[part], longest, do_sample=True, **options)
        assert out.shape == (len(prompts[part]), len(prompts[0]) + longest), out.shape
        drawn += out[:, len(prompts[0]) :].numel()
    return drawn


def _generate(prompts: list[list[int]], new_tokens: int, **options: Any) -> torch.Tensor:
    ids = torch.tensor(prompts, device=model.device)
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if options["do_sample"] else {}
    with torch.inference_mode():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, use_cache=True, **sampling, **options
        )


def _continuous(prompts: list[list[int]], lengths: list[int], seed: int) -> int:
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(lengths), eos_token_id=NEVER_STOP,
        pad_token_id=0,
    )  # fmt: skip
    # By itself it takes 90 % of free memory for the cache; this much holds every row at its full length.
    page = 256
    pages = len(prompts) * -(-(len(prompts[0]) + max(lengths)) // page)
    batching = ContinuousBatchingConfig(page_size=page, num_blocks=pages + 8, seed=seed)
    waiting = len(prompts)
    with model.continuous_batching_context_manager(config, True, 60, batching) as manager:
        for prompt, length in zip(prompts, lengths, strict=True):
            manager.add_request(prompt, max_new_tokens=length)
        drawn = 0
        while waiting:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                drawn, waiting = drawn + len(result.generated_tokens), waiting - 1
            assert result is not None or manager.is_running(), "continuous batching stopped before it was done"
    return drawn


if __name__ == "__main__":
    serve({"load": load, "greedy": greedy, "sample": sample})
