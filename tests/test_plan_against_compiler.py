"""What `rljax plan` says of memory and links, against what the TPU compiler said of the same programs
(`benchmarks/aot.py`)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rljax.config import (
    ARCHITECTURES,
    AlgorithmConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
)
from rljax.footprint import Setting, footprint, layer_on_device, program_bytes
from rljax.mesh import SAMPLER_RULES
from rljax.models.scoring import MAX_CHUNK
from rljax.steptime import learner_link_bytes, sampler_link_bytes, sync_link_bytes

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "aot.jsonl"
SIZES = ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")


def newest() -> dict[str, dict[str, Any]]:
    """Lines of the table by what they are of, as it was set up last."""
    found = {}
    for text in RESULTS.read_text().splitlines():
        line = json.loads(text)
        case = line["case"]
        found[" ".join(case[name] for name in ("model", "slice", "program"))] = line
    return found


def setting(case: dict[str, Any]) -> Setting:
    fsdp, tensor = map(int, re.findall(r"\d+", case["mesh"]))
    prompt, completion = map(int, re.findall(r"\d+", case["lengths"]))
    name = f"qwen2.5-{case['model']}"
    config = RunConfig(
        model=ModelConfig(architecture=name),
        data=DataConfig(prompts_per_step=512, max_prompt_tokens=prompt),
        sampling=SamplingConfig(max_completion_tokens=completion),
        optimizer=OptimizerConfig(moments_dtype=case["moments"]),
        algorithm=AlgorithmConfig(microbatch_tokens=case["microbatch_tokens"]),
    )
    return Setting(config, ARCHITECTURES[name], MeshConfig(1, fsdp, tensor))


@pytest.mark.parametrize("line", newest().values(), ids=newest().keys())
def test_the_plan_is_within_15_percent_of_the_compiler(line: dict[str, Any]) -> None:
    case = line["case"]
    one = setting(case)
    memory = footprint(one, int(line["hbm_gib"] * 2**30))
    planned = program_bytes(one, case["program"], remat=memory.remat, shape=memory.shape)
    compiled = line["argument_gib"] + line["output_gib"] + line["temporary_gib"] - line["alias_gib"]
    in_gib = {part: round(size / 2**30, 3) for part, size in planned.items()}
    assert sum(planned.values()) / 2**30 == pytest.approx(compiled, rel=0.15), (in_gib, case["batch"])


LINK_BOUNDS = {"prefill": 0.03, "decode": 0.03, "sync": 0.1, "update": 0.3}
"""What is left to the compiler is most in updates: whether weights that were gathered are kept, and how it multiplies
while it gathers. In a sync it is how copies of key/value heads are made."""


@pytest.mark.parametrize("line", newest().values(), ids=newest().keys())
def test_the_plan_sends_what_the_compiler_sends(line: dict[str, Any]) -> None:
    """Bytes that a chip sends: of a sync a layer, of a decode a step, of an update a micro-batch."""
    case = line["case"]
    one = setting(case)
    first, *sizes = map(int, re.findall(r"\d+", case["batch"]) or [0])
    if case["program"] == "update":
        updates = one.config.algorithm.updates_per_step
        tokens = updates * sizes[0] * sizes[1]  # a micro-batch of each
        again = case["batch"].endswith("remat full")
        planned = sum(learner_link_bytes(one, tokens, backward=True, again=again)) / updates
    elif case["program"] == "sync":
        planned = sync_link_bytes(one, layer_on_device(one.sampler_arch, one.mesh, SAMPLER_RULES))
    else:
        planned = sampler_link_bytes(
            one, first / one.row_shards * (1 if case["program"] == "decode" else one.prompt_slots)
        )
    inside, head = (line["traffic"].get(loops, {"mib": 0.0})["mib"] for loops in ("1", "2"))
    sent = {
        "update": inside + -(-one.microbatch // MAX_CHUNK) * head,
        "decode": inside,
    }.get(case["program"], line["traffic"].get("0", {"mib": 0.0})["mib"])
    assert planned / 2**20 == pytest.approx(sent, rel=LINK_BOUNDS[case["program"]], abs=0.01)


def test_what_fits() -> None:
    """All four programs of every size on every slice of the table."""
    lines = [line["case"] for line in newest().values()]
    assert {case["model"] for case in lines} == set(SIZES) and len(lines) == 40
    assert all(case["fits"] for case in lines)


def test_what_was_compiled_reuses_what_it_is_given() -> None:
    assert all(line["donation_aliases"] and not line["cache_copies"] for line in newest().values())
