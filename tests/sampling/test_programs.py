"""Counts, read from what was compiled: few programs, none after warm-up, no copy of the cache, all state donated."""

import re

import jax
import numpy as np
from conftest import make_prompts

from rljax.config import ARCHITECTURES
from rljax.models import qwen2
from rljax.sampling.engine import EngineOptions, Sampler

KEY = jax.random.key(1)


def log_normal_caps(seed: int, rows: int, cap: int) -> np.ndarray:
    """Lengths of completions with a mean of about a quarter of the cap; the host does not know them in advance."""
    drawn = np.random.default_rng(seed).lognormal(np.log(cap / 4) - 0.32, 0.8, rows)
    return np.clip(np.rint(drawn), 1, cap).astype(np.int32)


def test_a_run_needs_few_programs_and_none_after_warm_up(tiny, tiny_params, mesh) -> None:
    sampler = Sampler(tiny_params, tiny, mesh, stop_ids=())
    prompts = make_prompts([9] * 32, slots=16)

    def step(seed: int) -> None:
        sampler.generate(prompts, 8, key=KEY, max_completion_tokens=np.append(log_normal_caps(seed, 255, 512), 512))

    step(0)
    first = sampler.stats
    assert first.decode_programs <= 12
    for seed in range(1, 4):  # lengths differ, and with them the shapes on the way
        step(seed)
    warm = sampler.stats
    assert warm.decode_programs <= 14
    for seed in range(1, 4):
        step(seed)
    assert sampler.stats.programs == warm.programs
    assert sampler.stats.compile_seconds == warm.compile_seconds


def test_decoding_copies_no_cache_and_gives_all_state_back(mesh) -> None:
    arch = ARCHITECTURES["tiny"]
    sampler = Sampler(
        qwen2.init(jax.random.key(0), arch), arch, mesh, stop_ids=(1,), options=EngineOptions(growth=1.0, compact=False)
    )
    sampler.generate(make_prompts([9] * 4, slots=16), 8, key=KEY, max_completion_tokens=129)
    (compiled,) = [f.result() for key, f in sampler._programs._compiled.items() if key[0] == "decode"]
    text = compiled.as_text()
    rows, heads, slots, dim = 32, arch.num_kv_heads, 128, arch.head_dim
    cache = rows * heads * slots * dim
    starts = [text.index(f"%{name} (") for name in re.findall(r"body=%?([\w.\-]+)", text)]
    bodies = [text[start : text.index("\n}\n", start)] for start in starts]
    (loop,) = [body for body in bodies if f"f32[{rows},{heads},{slots},{dim}]" in body]
    for line in loop.splitlines():
        made = re.search(r"= f32\[([\d,]+)\]\S* (copy|transpose|concatenate|fusion)\(", line)
        if made and np.prod([int(n) for n in made.group(1).split(",")]) >= cache:
            # A fusion of that size is the write into the donated cache.
            assert made.group(2) == "fusion" and "dynamic-update-slice" in line, line
    layers = arch.num_layers
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * layers * cache * 4
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliased is not None
    assert aliased.group(1).count("may-alias") + aliased.group(1).count("must-alias") >= 2 * layers + 6
