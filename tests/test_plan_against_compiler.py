"""What `rljax plan` says of memory, against what the TPU compiler said of the same programs (`benchmarks/aot.py`)."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rljax.config import (
    ARCHITECTURES,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
)
from rljax.footprint import Setting, footprint, program_bytes

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "aot.jsonl"
SIZES = ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")


def newest() -> dict[str, dict[str, Any]]:
    """Lines of the table by what they are of."""
    found = {}
    for text in RESULTS.read_text().splitlines():
        line = json.loads(text)
        case = line["case"]
        found[" ".join(case[name] for name in ("model", "slice", "program", "lengths", "moments"))] = line
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
    )
    return Setting(config, ARCHITECTURES[name], MeshConfig(1, fsdp, tensor))


@pytest.mark.parametrize("line", newest().values(), ids=newest().keys())
def test_the_plan_is_within_15_percent_of_the_compiler(line: dict[str, Any]) -> None:
    if "refusal" in line:
        pytest.skip(f"the compiler refused it: {line['refusal']}")
    one = setting(line["case"])
    memory = footprint(one, int(line["hbm_gib"] * 2**30))
    planned = program_bytes(one, line["case"]["program"], remat=memory.remat, shape=memory.shape)
    compiled = line["argument_gib"] + line["output_gib"] + line["temporary_gib"] - line["alias_gib"]
    in_gib = {part: round(size / 2**30, 3) for part, size in planned.items()}
    assert sum(planned.values()) / 2**30 == pytest.approx(compiled, rel=0.15), (in_gib, line["batch"])


def test_every_program_of_every_size_fits_somewhere() -> None:
    fitting = {(line["case"]["model"], line["case"]["program"]) for line in newest().values() if line["case"]["fits"]}
    assert fitting == {(size, program) for size in SIZES for program in ("update", "prefill", "decode", "sync")}
    of_72b = {line["case"]["slice"]: set() for line in newest().values() if line["case"]["model"] == "72b"}
    for line in newest().values():
        if line["case"]["model"] == "72b" and line["case"]["fits"]:
            of_72b[line["case"]["slice"]].add(line["case"]["program"])
    assert len(of_72b["v5p-128"]) == len(of_72b["v6e-64"]) == 4


def test_what_was_compiled_reuses_what_it_is_given_and_copies_no_cache() -> None:
    for name, line in newest().items():
        assert line["donation_aliases"] and line["cache_copies"] == 0, name
