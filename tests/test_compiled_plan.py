"""What `rljax plan --compile` says, with a compiler that is not asked, and that it needs one."""

import dataclasses
from pathlib import Path

import pytest

from rljax.aot import Compiled, Job, has_libtpu
from rljax.cli import USAGE_ERROR, main
from rljax.compiled_plan import compiled_lines, job_of
from rljax.config import ConfigError, MeshConfig, RunConfig
from rljax.config_file import parse_config
from rljax.hardware import slice_named
from rljax.hlo import Collective, Traffic
from rljax.mesh import make_mesh
from rljax.plan import Plan, plan_run, planned_meshes
from rljax.sampling.engine import EngineOptions

PAPER = Path(__file__).resolve().parents[1] / "configs" / "paper"
GIB = 2**30


def plan_of(name: str, where: str) -> Plan:
    config = parse_config([str(PAPER / f"{name}.yaml")])
    return plan_run(config, slice_named(where), planned_meshes(config)[where])


def compiled(program: str, **changes: object) -> Compiled:
    found = Compiled(
        program, "some rows", 60.0, 16 * GIB, 2 * GIB, donated_bytes=GIB, argument_bytes=3 * GIB, output_bytes=GIB,
        temporary_bytes=4 * GIB, alias_bytes=GIB, collectives=(Collective("all-gather", 2, 3, 5 << 20),),
        traffic={1: Traffic(84, 140 << 20)},
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr("rljax.compiled_plan.job_of", lambda plan: None)
    return plan_of("qwen2.5-0.5b", "v5e-8")


def test_what_fits_is_told_program_by_program(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rljax.compiled_plan.compile_program", lambda job, name: compiled(name))
    lines = list(compiled_lines(plan))
    assert [line.split(",")[0] for line in lines if "compiled in" in line] == ["update", "prefill", "decode", "sync"]
    assert sum("fits: 9.00 GiB of 16.00, 2.00 of them beside it; its own 7.00 (planned " in line for line in lines) == 4
    assert "  3 all-gather, 5.0 MiB a device, in each turn of a loop within one" in lines
    assert "  sends 140.0 MiB in 84 collectives in each turn of the loop over micro-batches or tokens" in lines


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"refusal": "RESOURCE_EXHAUSTED: 17 of 16 GiB"}, "refuses its decode: RESOURCE_EXHAUSTED: 17 of 16 GiB"),
        ({"temporary_bytes": 12 * GIB}, r"its decode needs 17.00 GiB of 16.00"),
        ({"alias_bytes": 0}, "its decode holds what it is given twice"),
    ],
)
def test_what_does_not_fit_is_refused_after_all_were_told(
    plan: Plan, changes: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "rljax.compiled_plan.compile_program",
        lambda job, name: compiled(name, **changes if name == "decode" else {}),
    )
    lines = []
    with pytest.raises(ConfigError, match=words):
        for line in compiled_lines(plan):
            lines.append(line)
    assert "sync, compiled" in "\n".join(lines)


def test_the_job_is_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    device = jax.devices()[0]
    monkeypatch.setattr("rljax.compiled_plan.tpu_devices", lambda name: [device] * 4 if name == "v5p-8" else [])
    config = dataclasses.replace(parse_config([str(PAPER / "qwen2.5-1.5b.yaml")]))
    plan = plan_run(config, slice_named("v5p-8"), MeshConfig(1, 2, 2))
    made = job_of(plan)
    mesh = make_mesh(MeshConfig(1, 2, 2), [device] * 4)
    wanted = Job(
        plan.setting.arch, mesh, config.data.prompts_per_step, config.data.max_prompt_tokens,
        config.sampling.max_completion_tokens, config.algorithm, config.optimizer, EngineOptions.of(config.sampling),
    )  # fmt: skip
    assert made == wanted and made.compute_dtype == "bfloat16" and made.remat == "auto"
    assert EngineOptions.of(RunConfig().sampling) == EngineOptions()


@pytest.mark.skipif(has_libtpu(), reason="libtpu is installed here")
def test_without_the_compiler_the_plan_is_told_and_then_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(PAPER / "qwen2.5-0.5b.yaml"), "--compile"]) == USAGE_ERROR
    said = capsys.readouterr()
    assert "fits: the peak is" in said.out and "rljax[tpu]" in said.err


@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed: pip install 'rljax[tpu]'")
def test_the_compiler_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "model.architecture": "ladder-200k", "data.train": "task:char_count", "data.max_prompt_tokens": 32,
        "data.prompts_per_step": 64, "sampling.max_completion_tokens": 64, "plan.slice": "v5e-4", "mesh.fsdp": 2,
        "mesh.tensor": 2,
    }  # fmt: skip
    assert main(["plan", *(f"--{name}={value}" for name, value in settings.items()), "--compile"]) == 0
    said = capsys.readouterr().out
    assert said.count("compiled in") == 4 and said.count("  fits: ") == 4 and "sends" in said
