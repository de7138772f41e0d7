"""Programs compiled for TPUs that are not here, and what is read from the compiler's text."""

import json
import os
import subprocess
import sys

import jax
import pytest

from rljax.aot import SLICES, has_libtpu, tpu_devices
from rljax.config import ConfigError
from rljax.hlo import Collective, Module, Traffic

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0:T(8,128)})->f32[8,16]{1,0:T(8,128)}}

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%fused (p: bf16[4,128]) -> bf16[4,128] {
  %p = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.9 = bf16[4,128]{0,1:T(8,128)(2,1)} copy(%p)
}

%all-reduce-scatter.1 (q: bf16[4,128]) -> bf16[1,128] {
  %q = bf16[4,128]{1,0} parameter(0)
  %whole.1 = bf16[4,128]{1,0} all-reduce(%q), replica_groups=[1,4]<=[4], to_apply=%add.1
  ROOT %kept = bf16[1,128]{1,0} dynamic-slice(%whole.1, %at), dynamic_slice_sizes={1,128}
}

%inner_body (arg: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %arg = (s32[]{:T(128)}, bf16[4,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %f = bf16[4,128]{0,1:T(8,128)(2,1)} fusion(%arg), kind=kLoop, calls=%fused
  %small = bf16[2,128]{1,0} copy(%f)
  %part = bf16[1,128]{1,0} fusion(%f), kind=kCustom, calls=%all-reduce-scatter.1
  %ag = (bf16[1,128]{1,0}, bf16[4,128]{1,0}) all-gather-start(%f), channel_id=1, dimensions={0}
  %got = bf16[4,128]{1,0} all-gather-done(%ag)
  %staged = (bf16[4,128]{1,0:T(8,128)S(1)}, bf16[4,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%got)
  %apart = (bf16[4,128]{1,0:T(8,128)}, bf16[4,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%got)
  ROOT %t = (s32[]{:T(128)}, /*index=1*/bf16[4,128]{1,0}) tuple(%i, %got)
}

%async_collective_fusion.1 (r: bf16[4,128]) -> bf16[4,128] {
  %begun = bf16[8,128]{1,0} all-gather(%r), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %first = bf16[4,128]{1,0} add(%r, %r)
}

%async_collective_fusion.2 (r: bf16[4,128]) -> bf16[4,128] {
  %goes.on = bf16[8,128]{1,0} all-gather(%r), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %second = bf16[4,128]{1,0} add(%r, %r)
}

%fixed_body (arg: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %one = bf16[4,128]{1,0} fusion(%arg), kind=kOutput, calls=%async_collective_fusion.1
  %two = bf16[4,128]{1,0} fusion(%arg), kind=kOutput, calls=%async_collective_fusion.2
  %next = bf16[2,128]{1,0} collective-permute(%two), channel_id=10, source_target_pairs={{0,1},{1,0}}
  %done = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %at.once = s32[]{:T(128)} constant(2)
  %more = s32[]{:T(128)S(6)} add(%done, %at.once), metadata={op_name="while/add"}
  ROOT %both = (s32[], /*index=1*/bf16[4,128]{1,0}) tuple(%more, /*index=1*/%two), backend_config={}
}

%fixed_condition (arg: (s32[], bf16[4,128])) -> pred[] {
  %turn = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %layers = s32[]{:T(128)} constant(55)
  ROOT %below = pred[]{:T(512)} compare(%turn, %layers), direction=LT
}

%inner_condition (arg: (s32[], bf16[4,128])) -> pred[] {
  %any = u32[]{:T(128)} all-reduce(%live), to_apply=%add.1
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%outer_body (arg: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %loop = (s32[]{:T(128)}, bf16[4,128]{1,0}) while(%arg), condition=%inner_condition, body=%inner_body
  %stack = (s32[]{:T(128)}, bf16[4,128]{1,0}) while(%loop), condition=%fixed_condition, body=%fixed_body
  ROOT %ar = f32[8,16]{1,0:T(8,128)} all-reduce(%y), replica_groups=[1,4]<=[4], to_apply=%add.1
}

ENTRY %main (p0: f32[8,16]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %whole = f32[8,16]{0,1:T(8,128)} copy(%p0)
  %w = (s32[]{:T(128)}, bf16[4,128]{1,0}) while(%whole), condition=%inner_condition, body=%outer_body
  %a = f32[8,16]{1,0:T(8,128)} all-reduce(%p0), to_apply=%add.1
  %b = (f32[8,16]{1,0:T(8,128)}, /*index=1*/f32[2]{0:T(128)}) all-reduce(%a, %e), to_apply=%add.1
  ROOT %c = f32[2,16]{1,0:T(8,128)} reduce-scatter(%b), dimensions={0}, to_apply=%add.1
}
"""


def test_collectives_are_counted_by_the_loops_they_are_in() -> None:
    assert Module.parse(TEXT).collectives() == (
        Collective("all-gather", loops=2, count=2, bytes=(4 + 8) * 128 * 2),
        Collective("all-reduce", loops=0, count=2, bytes=(2 * 8 * 16 + 2) * 4),
        Collective("all-reduce", loops=1, count=2, bytes=8 * 16 * 4 + 4),
        Collective("collective-permute", loops=2, count=1, bytes=2 * 128 * 2),
        Collective("reduce-scatter", loops=0, count=1, bytes=2 * 16 * 4),
        Collective("reduce-scatter", loops=2, count=1, bytes=128 * 2),
    )


def test_bytes_sent_are_those_of_all_turns_that_are_known() -> None:
    """In a turn of the outer loop: a sum among 4 sends 2 * 3/4 of it, a gather 3/4; the stack goes to 55 by twos."""
    sent = Module.parse(TEXT).traffic()
    stack = 28 * (8 * 128 * 2 * 3 / 4 + 2 * 128 * 2)
    assert sent[1] == Traffic(1 + 1 + 28 * 2, 2 * 8 * 16 * 4 * 3 / 4 + stack)
    assert sent[2] == Traffic(2, 128 * 2 * 3)  # reduce-scatter among 4; the other gather names no group


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={2}", 4),
        ("replica_groups={{0,2,4},{1,3,5}}, to_apply=%sum", 3),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=1] {'a','b'}, dimensions={1}", 8),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, use_global_device_ids=true", 4),
        ("source_target_pairs={{0,1},{1,0}}", 1),
    ],
)
def test_devices_of_a_group(groups: str, devices: int) -> None:
    line = f"  %x = bf16[4,128]{{1,0}} all-gather(%y), channel_id=3, {groups}"
    (found,) = Module.parse(f"ENTRY %main (y: bf16[1]) -> bf16[4] {{\n{line}\n}}").computations["main"]
    assert found.devices == devices


def test_copies_outside_of_loops_and_small_ones_do_not_count() -> None:
    module = Module.parse(TEXT)
    assert module.copies_in_loops(4 * 128 * 2) == 2  # the fused one and %apart
    assert module.copies_in_loops(4 * 128 * 2, moves=True) == 1
    assert module.copies_in_loops(2 * 128 * 2) == 3
    assert module.copies_in_loops(4 * 128 * 2 + 1) == 0


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"v5e-9.* is not one of .*v5e-8"):
        tpu_devices("v5e-9")
    monkeypatch.setattr("rljax.aot.has_libtpu", lambda: False)
    with pytest.raises(ConfigError, match=r"libtpu.*rljax\[tpu\]"):
        tpu_devices("v5e-8")


def test_a_v5p_is_named_by_its_cores() -> None:
    for name, known in SLICES.items():
        kind, size = name.split("-")
        dims = [int(side) for side in known.topology.split(":")[1].split("x")]
        chips = int(size) // (2 if kind == "v5p" else 1)
        assert known.chips == chips == jax.numpy.prod(jax.numpy.array(dims))


SMOKE = """
import dataclasses, json
from rljax.aot import PROGRAMS, Job, compile_program, tpu_devices
from rljax.config import ARCHITECTURES, MeshConfig
from rljax.mesh import make_mesh
arch = dataclasses.replace(ARCHITECTURES["qwen2.5-0.5b"], num_layers=2)
job = Job(arch, make_mesh(MeshConfig(fsdp=2, tensor=2), tpu_devices("v5e-4")), prompts=16, prompt_tokens=64,
          completion_tokens=1024)
assert "tpu_custom_call" in PROGRAMS["update"](job).lowered.as_text()  # attention is a kernel of Mosaic's
found = {}
for name in ("update", "decode"):
    program = compile_program(job, name)
    found[name] = {"fits": program.fits, "aliases": program.donation_aliases, "donated": program.donated_bytes,
                   "copies": program.cache_copies, "loops": [c.loops for c in program.collectives]}
print(json.dumps(found))
"""


@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed: pip install 'rljax[tpu]'")
def test_update_and_decode_of_two_layers_compile_for_a_tpu() -> None:
    """In a process of its own: libtpu reads its environment once."""
    done = subprocess.run(
        [sys.executable, "-c", SMOKE],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for program in json.loads(done.stdout.splitlines()[-1]).values():
        assert program["fits"] and program["aliases"] and program["donated"] > 0
        assert program["copies"] == 0
        assert max(program["loops"]) >= 1  # heads are split over tensor: sums in every layer
