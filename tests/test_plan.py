"""What a plan says against numbers worked by hand, against the shapes of the real state, and against itself."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from rljax import costs
from rljax.cli import main
from rljax.config import (
    ARCHITECTURES,
    AlgorithmConfig,
    Architecture,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PlanConfig,
    RunConfig,
    SamplingConfig,
    field_value,
)
from rljax.config_file import parse_config, read_yaml
from rljax.footprint import (
    Setting,
    check_divides,
    footprint,
    params_on_device,
    program_bytes,
    resident,
    sampler_weights,
    sizes_that_divide,
    train_state,
    update_work,
    weights,
)
from rljax.hardware import CHIPS, slice_named, slices_of
from rljax.mesh import AXES, LEARNER_RULES, SAMPLER_RULES, param_shardings
from rljax.models import qwen2
from rljax.models.layers import with_a_kv_head_each
from rljax.plan import architecture_of, meshes_on, plan_command, plan_run, planned_meshes, recommended, search
from rljax.plan_page import page
from rljax.rl.learner import state_shapes
from rljax.rl.memory import LADDER
from rljax.sampling.memory import rows_in
from rljax.sampling.schedule import Shape
from rljax.steptime import learner_link_bytes, survival

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PAPER = sorted((CONFIGS / "paper").glob("*.yaml"))
SMALL, LARGE = ARCHITECTURES["qwen2.5-0.5b"], ARCHITECTURES["qwen2.5-72b"]


def run(architecture: str = "qwen2.5-0.5b", **sections: object) -> RunConfig:
    return RunConfig(model=ModelConfig(architecture=architecture), **sections)  # type: ignore[arg-type]


def setting(architecture: str, data: int, fsdp: int, tensor: int, **sections: object) -> Setting:
    return Setting(run(architecture, **sections), ARCHITECTURES[architecture], MeshConfig(data, fsdp, tensor))


# -------------------------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize(
    ("name", "chips", "devices", "hosts"),
    [
        ("v5e-1", 1, 1, 1),
        ("v5e-8", 8, 8, 1),
        ("v5e-16", 16, 16, 4),
        ("v6e-256", 256, 256, 64),
        ("v4-8", 4, 4, 1),
        ("v5p-32", 16, 16, 4),
        ("v5p-128", 64, 64, 16),
        ("V5P-128", 64, 64, 16),
        ("tpu7x-8", 4, 8, 1),
        ("tpu7x-64", 32, 64, 8),
        ("h200-4", 4, 4, 1),
        ("h100-32", 32, 32, 4),
    ],
)
def test_what_a_slice_is(name: str, chips: int, devices: int, hosts: int) -> None:
    where = slice_named(name)
    assert (where.chips, where.devices, where.hosts) == (chips, devices, hosts)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e-12", ("counts chips", "nearest is v5e-8")),
        ("v5p-100", ("counts TensorCores, two to a chip", "nearest is v5p-128")),
        ("h200-12", ("counts GPUs", "multiple of 8", "nearest is h200-8")),
        ("v5p", ("names no slice of v5p", "v5p-8")),
        ("v5-8", ("perhaps you meant v5", "v5p-128")),
        ("", ("v4, v5e, v5p, v6e, tpu7x",)),
    ],
)
def test_a_slice_that_is_none(name: str, said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        slice_named(name)
    assert all(part in str(raised.value) for part in said), raised.value


def test_every_generation_has_what_is_needed() -> None:
    for generation, chip in CHIPS.items():
        found = slices_of(generation)
        assert [where.chips for where in found] == sorted(where.chips for where in found)
        assert all(slice_named(where.name) == where for where in found)
        assert chip.usable_bytes < chip.memory_bytes * 1.1 and chip.sizes
    assert CHIPS["v5e"].usable_bytes / 2**30 == 15.75 and CHIPS["v6e"].usable_bytes / 2**30 == 31.25
    # The learner's peaks agree with those that utilisation is measured by; TPU7x: of half a chip.
    for kind, name in (("TPU v5p", "v5p"), ("TPU v5e", "v5e"), ("TPU v6e", "v6e"), ("TPU v4", "v4")):
        assert costs.PEAK_FLOPS[kind] == CHIPS[name].flops
    assert costs.PEAK_FLOPS["NVIDIA H200"] == CHIPS["h200"].flops


def test_gpus_of_other_hosts_are_further_away() -> None:
    where = slice_named("h200-16")
    assert where.rate_between(8) == 4.5e11 and where.rate_between(16) == 5e10
    assert slice_named("v5p-128").rate_between(64) == 1.8e11


# --------------------------------------------------------------------------------------------------------------- bytes


def real_bytes(arch: Architecture, sizes: MeshConfig, optimizer: OptimizerConfig) -> dict[str, int]:
    """Of the real state and the real sampler's weights, leaf by leaf, on a device of a mesh that need not exist."""
    mesh = AbstractMesh(tuple(getattr(sizes, axis) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def placed(shapes: object, axes: object, rules: dict[str, str | None]) -> object:
        shardings = param_shardings(mesh, shapes, axes, rules)  # type: ignore[arg-type]
        return jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)

    def size(tree: object) -> int:
        total = 0
        for leaf in jax.tree.leaves(tree):
            if leaf.size > 8:  # neither the counters nor Muon's coefficients
                assert isinstance(leaf.sharding, NamedSharding)
                total += int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        return total

    params = placed(qwen2.param_shapes(arch), qwen2.param_axes(arch), dict(LEARNER_RULES))
    state = state_shapes(params, optimizer, mesh)  # type: ignore[arg-type]
    copied = with_a_kv_head_each(arch, sizes.tensor)
    made = jax.eval_shape(lambda p: qwen2.sampler_params(p, copied, "bfloat16"), qwen2.param_shapes(arch))
    sampler = placed(made, qwen2.sampler_param_axes(copied), dict(SAMPLER_RULES))
    return {
        "master weights": size(state.params),
        "moments": size(state.opt_state),
        "sampler weights": size(sampler),
        "a layer of them": size(sampler["layers"][0]),
        "layers": size(params["layers"]),
    }


ODD = Architecture(96, 3, 8, 2, 16, 160, 128, tied_embeddings=False, qkv_bias=False, qk_norm=True)
TIED = Architecture(64, 2, 4, 2, 16, 192, 64, tied_embeddings=True)


@pytest.mark.parametrize("arch", [ODD, TIED], ids=["untied, query-key norms", "tied, biases"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 4, 1), (1, 2, 2), (4, 8, 2), (1, 2, 4)])
@pytest.mark.parametrize(
    "optimizer", [OptimizerConfig(), OptimizerConfig(name="muon"), OptimizerConfig(moments_dtype="bfloat16")],
    ids=["adamw", "muon", "bfloat16 moments"],
)  # fmt: skip
def test_the_state_is_what_the_real_one_is(
    arch: Architecture, mesh: tuple[int, int, int], optimizer: OptimizerConfig
) -> None:
    one = Setting(run(optimizer=optimizer), arch, MeshConfig(*mesh))
    planned, real = resident(one), real_bytes(arch, MeshConfig(*mesh), optimizer)
    assert {name: planned[name] for name in ("master weights", "moments")}.items() <= real.items()
    assert sampler_weights(one) == real["sampler weights"]
    sync = program_bytes(one, "sync")
    assert (sync["master weights"], sync["sampler weights"]) == (real["layers"], real["a layer of them"])
    assert planned["reference"] * 2 == planned["master weights"]


def test_all_parameters_are_there() -> None:
    for name, arch in ARCHITECTURES.items():
        assert sum(weight.size for weight in weights(arch)) == costs.num_params(arch), name


def test_half_a_billion_by_hand() -> None:
    """494,032,768 parameters on one device: 4 bytes, 8 bytes, 2 and 2."""
    held = resident(setting("qwen2.5-0.5b", 1, 1, 1))
    assert held == {
        "master weights": 1_976_131_072,
        "moments": 3_952_262_144,
        "reference": 988_065_536,
    }
    assert sampler_weights(setting("qwen2.5-0.5b", 1, 1, 1)) == 988_065_536
    # Rows of 2,048 + 4,096; 16,384 slots hold two: 12,288 slots a micro-batch, and 1,024 completions 512 of them.
    work = update_work(setting("qwen2.5-0.5b", 1, 1, 1), "full")
    assert work["rows"] == 512 * 12_288 * 41
    assert work["gradients"] == 1_976_131_072
    # 24 layers' inputs of 896 bfloat16, and one layer anew: 16 of 896; 3 of 896, 2 of 128, 2 of 4,864 bfloat16 and 14
    # float32; the gate and its product once more, twice 2 of 4,864 bfloat16.
    again = 16 * 896 + 2 * (3 * 896 + 2 * 128 + 2 * 4864) + 4 * 14 + 8 * 4864
    assert work["activations"] == 12_288 * (24 * 2 * 896 + again)
    # The table's gradient and its bfloat16 copy, as table and as head; two chunks of 1,024 tokens' logits.
    assert work["embedding"] == 896 * 151_936 * 6
    assert work["loss head"] == 896 * 151_936 * 6 + 2 * 4 * 1024 * 151_936


def test_seventy_two_billion_by_hand() -> None:
    """On 8 x 8: matrices, table and head split over all 64, biases over tensor, norms over nothing."""
    norms, biases = 80 * 2 * 8192 + 8192, 80 * (64 + 2 * 8) * 128
    matrices = 72_706_203_648 - norms - biases
    local = matrices // 64 + biases // 8 + norms
    held = resident(setting("qwen2.5-72b", 1, 8, 8))
    assert held == {
        "master weights": 4 * local,
        "moments": 8 * local,
        "reference": 2 * local,
    }
    made = sampler_weights(setting("qwen2.5-72b", 1, 8, 8))
    assert made == 2 * (matrices // 8 + biases // 8 + norms)
    assert made / 1e9 == pytest.approx(18.2, abs=0.05)  # what performance notes call 18 GB
    # 16 lanes of 8 rows, 2,048 slots each lane and 4,096 each row, 327,680 bytes a token over 8 devices.
    decode = program_bytes(setting("qwen2.5-72b", 1, 8, 8), "decode", shape=Shape(16, 8, 4096))
    assert decode["KV cache"] == (16 * 2048 + 128 * 4096) * 327_680 // 8
    assert decode["temporaries"] == 128 * 4 * (3 * 152_064 + 2 * 64 * 6144) // 8


def test_programs_hold_what_they_are_given() -> None:
    one = setting("qwen2.5-7b", 1, 4, 4)
    update = program_bytes(one, "update", remat="dots")
    assert update.items() >= train_state(one).items() and "reference" not in update
    assert update.items() >= update_work(one, "dots").items()
    shape = Shape(4, 8, 512)
    prefill, decode = (program_bytes(one, program, shape=shape) for program in ("prefill", "decode"))  # type: ignore
    first = one.first_shape(shape)
    assert first.slots < shape.slots and first.rows == shape.rows
    assert decode["KV cache"] - prefill["KV cache"] == shape.rows * (512 - first.slots) * 57_344 // 4
    assert prefill["sampler weights"] == decode["sampler weights"] == sampler_weights(one)
    with pytest.raises(ValueError, match="needs a shape"):
        program_bytes(one, "decode")


def test_a_rung_further_keeps_less_and_more_chips_hold_less() -> None:
    """Whatever an axis is doubled by, no part of state, update or sync grows on any device, nor does a given cache."""
    for name, fsdps, tensors in (
        ("qwen2.5-7b", (1, 2, 4, 8), (1, 2, 4)),
        ("qwen2.5-72b", (4, 8, 16, 32), (1, 2, 4, 8)),
    ):
        meshes = [(data, fsdp, tensor) for data in (1, 2, 4) for fsdp in fsdps for tensor in tensors]
        shape = Shape(4, 8, 1024)

        def parts(mesh: tuple[int, int, int], name: str = name, shape: Shape = shape) -> dict[str, int]:
            one = setting(name, *mesh)
            works = {rung: update_work(one, rung) for rung in LADDER}
            sums = [sum(works[rung].values()) for rung in LADDER]
            assert sums == sorted(sums, reverse=True)
            found = {f"update, {rung}, {part}": size for rung in LADDER for part, size in works[rung].items()}
            for program in ("prefill", "decode", "sync"):
                for part, size in program_bytes(one, program, shape=shape).items():  # type: ignore[arg-type]
                    found[f"{program}, {part}"] = size
            return found | resident(one)

        known = {mesh: parts(mesh) for mesh in meshes}
        compared = 0
        for mesh in meshes:
            for axis in range(3):
                doubled = [size * 2 if place == axis else size for place, size in enumerate(mesh)]
                more = doubled[0], doubled[1], doubled[2]
                if more in known:
                    compared += 1
                    for part, size in known[more].items():
                        assert size <= known[mesh][part], (name, mesh, more, part)
        assert compared > 50


def test_what_optional_parts_cost() -> None:
    base = resident(setting("qwen2.5-0.5b", 1, 1, 1))
    assert "reference" not in resident(setting("qwen2.5-0.5b", 1, 1, 1, algorithm=AlgorithmConfig(kl_coefficient=0.0)))
    moving = AlgorithmConfig(reference_update="ema", reference_ema_decay=0.9)
    assert resident(setting("qwen2.5-0.5b", 1, 1, 1, algorithm=moving))["reference"] == 2 * base["reference"]
    with pytest.raises(ConfigError, match="adapter is not planned"):
        setting("qwen2.5-0.5b", 1, 1, 1, lora=LoraConfig(rank=8))


def test_a_run_takes_the_first_rung_that_fits() -> None:
    one = setting("qwen2.5-7b", 1, 8, 1)
    held = sum(resident(one).values())
    for rung in LADDER:
        enough = held + int(sum(update_work(one, rung).values()) / 0.9) + 2
        found = footprint(one, enough)
        assert found.remat == rung
        assert found.phases["update"] == resident(one) | update_work(one, rung)
        assert found.phases["rollout"]["sampler weights"] == found.phases["sync"]["sampler weights"]
    tight = footprint(one, held + sum(update_work(one, "full").values()))  # without the reserve
    assert tight.remat == "full" and not tight.fits
    forced = dataclasses.replace(one.config, model=dataclasses.replace(one.config.model, remat="none"))
    assert footprint(Setting(forced, one.arch, one.mesh), 2**30).remat == "none"


def test_rows_that_memory_holds_by_hand() -> None:
    """Of 0.5B: 4,096 slots and a share of 2,048 / 8, 12,288 bytes a token and a quarter more, the logits thrice."""
    each = 12_288 * (4096 + 2048 / 8) * 1.25 + 3 * 4 * 151_936
    sizes = {"prompt_slots": 2048, "max_tokens": 4096, "samples_per_prompt": 8}

    def rows(fitting: float, tensor: int = 1) -> int:
        return rows_in(int(each / 0.8 * fitting) + 1, SMALL, "bfloat16", tensor=tensor, **sizes)

    assert [rows(n) for n in (0, 1, 2, 3, 5.9, 6, 7.9, 8, 11.9, 12)] == [1, 1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert rows(6, tensor=2) == 12


def test_what_is_decoded_at_once() -> None:
    """512 prompts of 8 on 8 shards: all 64 groups where they fit, else rows with a prompt each, else whole groups."""
    one = setting("qwen2.5-0.5b", 1, 8, 1)
    assert one.decode_shape(2**40) == Shape(64, 8, 4096)
    some = one.decode_shape(8 * 2**30)
    assert some.width == 1 and some.lanes < 512
    waves = setting("qwen2.5-0.5b", 1, 8, 1, sampling=SamplingConfig(refill=False))
    assert waves.decode_shape(8 * 2**30) == Shape(some.lanes // 8, 8, 4096)
    fixed = setting("qwen2.5-0.5b", 1, 8, 1, sampling=SamplingConfig(max_rows=800, cache_growth=1.0))
    assert fixed.decode_shape(0).rows == 100


# -------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("name", "mesh", "said"),
    [
        # 28 query heads, but 4 of keys and values: 1, 2 and 4 divide both.
        ("qwen2.5-7b", (1, 1, 7), "mesh.tensor = 7 does not divide kv_heads = 4 of k and v; .* is mesh.tensor = 4"),
        ("qwen2.5-7b", (1, 1, 8), "mesh.tensor = 8 does not divide heads = 28 of q; .* is mesh.tensor = 4"),
        ("qwen2.5-0.5b", (1, 1, 4), "mesh.tensor = 4 does not divide heads = 14 of q; .* is mesh.tensor = 2"),
        ("qwen2.5-14b", (1, 8, 16), "mesh.tensor = 16 does not divide heads = 40 of q; .* mesh.tensor = 8"),
        ("qwen2.5-0.5b", (1, 24, 1), "mesh.fsdp = 24 .* embed = 896 of q; .* mesh.fsdp = 16, above it 28"),
    ],
)
def test_a_mesh_that_does_not_divide(name: str, mesh: tuple[int, int, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_divides(ARCHITECTURES[name], MeshConfig(*mesh))


def test_what_divides() -> None:
    assert sizes_that_divide(ARCHITECTURES["qwen2.5-7b"], "tensor") == [1, 2, 4]
    assert sizes_that_divide(ARCHITECTURES["qwen2.5-1.5b"], "tensor") == [1, 2, 4]  # two heads, copied for four
    assert sizes_that_divide(LARGE, "tensor") == [1, 2, 4, 8, 16, 32, 64]  # its MLP is 128 * 231
    assert sizes_that_divide(SMALL, "fsdp") == [n for n in range(1, 897) if 896 % n == 0]
    where = slice_named("v5e-8")
    found = meshes_on(where, SMALL)
    assert {(m.data, m.fsdp, m.tensor) for m in found} == {
        (8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2),
    }  # fmt: skip
    for mesh in found:
        check_divides(SMALL, mesh)


def test_the_mesh_is_that_of_the_slice() -> None:
    where, config = slice_named("v5p-128"), run("qwen2.5-72b")
    assert plan_run(config, where, MeshConfig(1, -1, 8)).setting.mesh == MeshConfig(1, 8, 8)
    assert plan_run(config, slice_named("tpu7x-8"), MeshConfig()).setting.mesh == MeshConfig(1, 8, 1)
    with pytest.raises(ConfigError, match="multiply to 32 and must multiply to 64, the devices of v5p-128"):
        plan_run(config, where, MeshConfig(1, 4, 8))
    with pytest.raises(ConfigError, match="multiply to 3 and must divide 64"):
        plan_run(config, where, MeshConfig(3, -1, 1))
    with pytest.raises(ConfigError, match="at most one is -1"):
        plan_run(config, where, MeshConfig(-1, -1, 1))


def test_the_search_takes_the_fewest_chips_then_the_fastest() -> None:
    """One v5e chip of 15.75 GiB cannot hold 12 + 2 bytes of 494 M parameters and three gradients; four can."""
    config = run("qwen2.5-0.5b")
    one = plan_run(config, slice_named("v5e-1"), MeshConfig(1, 1, 1))
    assert sum(resident(one.setting).values()) == 14 * 494_032_768 and not one.memory.fits
    found = search(config, "v5e")
    assert found.where.name == "v5e-4" and found.memory.fits
    fitting = [
        plan for mesh in meshes_on(found.where, SMALL) if (plan := plan_run(config, found.where, mesh)).memory.fits
    ]
    assert found.time.total <= 1.05 * min(plan.time.total for plan in fitting)
    assert search(config, "v6e").where.name == "v6e-1"
    # 72B: every slice below the one found has no mesh that fits; the state alone is 12 bytes a parameter.
    large = search(run("qwen2.5-72b"), "v5p")
    assert large.where.chips * large.memory.usable > 12 * costs.num_params(LARGE)
    for where in slices_of("v5p"):
        if where.chips < large.where.chips:
            assert recommended(run("qwen2.5-72b"), where) is None
    longest = run("qwen2.5-72b", sampling=SamplingConfig(max_completion_tokens=1 << 17))
    with pytest.raises(ConfigError, match="no v5e slice holds this run: with the best mesh of v5e-256"):
        search(longest, "v5e")


# ---------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(("mean", "cap"), [(800, 4096), (50, 64), (5000, 4096)])
def test_lengths_have_the_mean_that_was_asked_for(mean: float, cap: int) -> None:
    live = survival(mean, cap)
    assert len(live) == cap and live[0] == 1 and (np.diff(live) <= 0).all()
    assert live.sum() == pytest.approx(min(mean, 0.999 * cap), rel=1e-3)


def test_an_update_at_its_roofline_by_hand() -> None:
    """One device has no links: three times the forward FLOPs over its rate, and the optimizer's bytes."""
    plan_config = PlanConfig(sampler_share=1.0, learner_share=1.0, prompt_tokens=100, completion_tokens=64)
    config = run(
        "qwen2.5-0.5b",
        plan=plan_config,
        data=DataConfig(prompts_per_step=64, max_prompt_tokens=128),
        sampling=SamplingConfig(max_completion_tokens=65, max_rows=8),
        algorithm=AlgorithmConfig(microbatch_tokens=8192),
    )
    plan = plan_run(config, slice_named("h200-1"), MeshConfig(1, 1, 1))
    assert plan.memory.remat == "none"
    live = survival(64, 65)
    mean, own = live.sum(), (live * np.arange(1, 66)).sum()
    tokens, drawn = 64 * (100 + 8 * mean), 64 * 8 * mean
    context = 64 * (5050 + 8 * (100 * mean + own))
    flops = costs.forward_flops(SMALL, round(tokens), round(context), round(drawn))
    optimizer = 4 * 28 * 494_032_768 / 4.8e12
    assert plan.time.seconds["update"] == pytest.approx(3 * flops / 989e12 + optimizer, rel=1e-9)
    assert plan.time.seconds["reference"] == plan.time.seconds["old log-probs"] == pytest.approx(flops / 989e12)
    assert plan.time.completion_tokens == pytest.approx(drawn)
    # Decoding 512 rows eight at a time reads the weights at least 64 times as often as a completion has tokens.
    assert plan.time.seconds["decode"] > 64 * mean * 2 * 493_895_680 / 4.8e12
    half = dataclasses.replace(config, plan=dataclasses.replace(plan_config, learner_share=0.5))
    assert plan_run(half, slice_named("h200-1"), MeshConfig(1, 1, 1)).time.seconds["update"] == pytest.approx(
        2 * plan.time.seconds["update"]
    )


def test_link_bytes_by_hand() -> None:
    """Of 8 x 8, per micro-batch: gathers of bfloat16, sums of float32 gradients; per layer sums of the stream."""
    one = setting("qwen2.5-72b", 1, 8, 8)
    whole = params_on_device(LARGE, MeshConfig(1, 1, 8))
    slots = one.rows.rows * one.rows.positions  # of a micro-batch; four updates of one each
    forward = learner_link_bytes(one, 4.0 * slots)
    assert forward[0] == pytest.approx(4 * 2 * whole * 7 / 8)
    assert forward[1] == pytest.approx(80 * 2 * 2 * (4 * slots / 8) * 8192 * 2 * 7 / 8)
    update = learner_link_bytes(one, 4.0 * slots, backward=True, again=True)
    assert update[0] == pytest.approx(4 * (2 * 2 + 4) * whole * 7 / 8)
    assert update[1] == pytest.approx(3 * forward[1])
    assert learner_link_bytes(setting("qwen2.5-72b", 1, 1, 1), 1e6, backward=True) == (0, 0)


def test_what_is_not_done_takes_no_time() -> None:
    where, mesh = slice_named("v5e-8"), MeshConfig(1, 8, 1)
    whole = plan_run(run("qwen2.5-0.5b", evaluation=EvaluationConfig(data="x")), where, mesh).time
    assert list(whole.seconds) == [
        "prefill", "decode", "reference", "old log-probs", "update", "sync", "evaluation",
    ]  # fmt: skip
    rare = plan_run(run("qwen2.5-0.5b", evaluation=EvaluationConfig(data="x", every=10)), where, mesh).time
    assert rare.seconds["evaluation"] == pytest.approx(whole.seconds["evaluation"] / 10)
    lean = AlgorithmConfig(kl_coefficient=0.0, old_logprobs="behaviour")
    assert list(plan_run(run("qwen2.5-0.5b", algorithm=lean), where, mesh).time.seconds) == [
        "prefill", "decode", "update", "sync",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- command


def test_the_architecture_of_a_hub_name(tmp_path: Path) -> None:
    assert architecture_of(RunConfig(model=ModelConfig(path="Qwen/Qwen2.5-72B-Instruct"))) == LARGE
    assert architecture_of(run("tiny")) == ARCHITECTURES["tiny"]
    with pytest.raises(ConfigError, match="neither a folder here nor the hub name"):
        architecture_of(RunConfig(model=ModelConfig(path="someone/else")))
    with pytest.raises(ConfigError, match=r"config\.json"):
        architecture_of(RunConfig(model=ModelConfig(path=str(tmp_path))))


def test_the_printed_plan(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(CONFIGS / "paper" / "qwen2.5-72b.yaml")
    assert main(["plan", file, "--plan.steps", "10"]) == 0
    said = capsys.readouterr().out
    plan = plan_run(parse_config([file, "--plan.steps", "10"]), slice_named("v5p-128"), MeshConfig(1, 8, 8))
    assert "v5p-128: 64 chips, 64 devices of 95.74 usable GiB, 16 hosts" in said
    assert "mesh: 1x8x8 (--mesh.data 1 --mesh.fsdp 8 --mesh.tensor 8)" in said
    table = {line.split("  ")[0]: line.split()[-3:] for line in said.splitlines() if line}
    assert table["master weights"] == [f"{plan.memory.phases['rollout']['master weights'] / 2**30:.2f}"] * 3
    assert table["sum"] != [] and f"\nfits: the peak is {plan.memory.peak / 2**30:.2f} GiB" in said
    assert f"10 steps: {plan.hours:,.1f} hours of 64 chips, {plan.chip_hours:,.0f} chip-hours" in said
    assert plan.chip_hours == pytest.approx(10 * plan.time.total / 3600 * 64)
    assert "assumed: 0.3 of the roofline in sampling, 0.28 in the learner" in said
    assert "recommended: this mesh" in said


def test_the_printed_plan_of_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["plan", "--model.architecture", "qwen2.5-7b"]
    assert main([*small, "--plan.slice", "v5p-8"]) == 0
    said = capsys.readouterr().out
    best = recommended(run("qwen2.5-7b"), slice_named("v5p-8"))
    assert best is not None and "recommended: --mesh.data" in said
    assert main([*small, "--plan.slice", "v5e-4"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "recommended: no mesh of v5e-4 fits" in said
    assert main([*small, "--plan.slice", "v5e", "--search"]) == 0
    assert f"{search(run('qwen2.5-7b'), 'v5e').where.name}: " in capsys.readouterr().out
    for arguments, reason in (
        (small, "plan.slice is empty"),
        ([*small, "--plan.slice", "v5p-9"], "nearest is v5p-8"),
        ([*small, "--plan.slice", "v5p-8", "--mesh.fsdp", "3"], "must multiply to 4"),
        (
            [*small, "--plan.slice", "v5e-8", "--mesh.fsdp", "1", "--mesh.tensor", "8"],
            "nearest below is mesh.tensor = 4",
        ),
        ([*small, "--plan.slice", "v5p-8", "--plan.meshes", "v5p-8"], "data x fsdp x tensor"),
        ([*small, "--plan.sampler_share", "0"], "a share of the roofline"),
        (["plan", "--costs"], "takes one folder"),
        (["plan", "--costs", "/nowhere"], "holds no YAML file"),
    ):
        assert main(arguments) == 64
        assert reason in capsys.readouterr().err


def test_a_plan_touches_no_device() -> None:
    """A TPU that a run has for itself must not be opened by somebody who plans the next."""
    code = (
        "import sys; from rljax.cli import main; assert main(sys.argv[1:]) == 0; "
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    file = str(CONFIGS / "paper" / "qwen2.5-72b.yaml")
    done = subprocess.run([sys.executable, "-c", code, "plan", file], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------- the paper's configs


def test_there_is_one_of_each_size_and_kind() -> None:
    sizes = ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")
    assert {file.stem for file in PAPER} == {f"qwen2.5-{s}{kind}" for s in sizes for kind in ("", "-instruct")}


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_a_config_of_the_paper(file: Path) -> None:
    config = parse_config([str(file)])
    arch = architecture_of(config)
    assert arch == ARCHITECTURES[file.stem.removesuffix("-instruct")]
    assert config.model.path.lower() == f"qwen/{file.stem}"
    is_large = file.stem.startswith("qwen2.5-72b")
    # 53,904 prompts; of 72B those of more than 512 tokens are dropped, 0.34 %.
    assert config.steps == (104 if is_large else 53_904 // 512)
    assert config.data.max_prompt_tokens == (512 if is_large else 2048)
    assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (config.evaluation.every, config.evaluation.temperature, config.evaluation.samples_per_prompt) == (1, 0.7, 1)
    # What the recipe writes out is what holds here, whatever the defaults become.
    recipe = read_yaml(CONFIGS / "recipes" / "paper.yaml")
    for section, fields in recipe.items():
        for name, value in fields.items():
            if name != "max_prompt_tokens":
                assert field_value(config, f"{section}.{name}") == value, name


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_a_config_of_the_paper_fits_with_the_mesh_that_is_recommended(file: Path) -> None:
    config = parse_config([str(file)])
    meshes = planned_meshes(config)
    assert len(meshes) >= 3 and next(iter(meshes)) == config.plan.slice
    assert config.mesh == meshes[config.plan.slice]  # a run on the first needs no flag
    for name, mesh in meshes.items():
        assert plan_run(config, slice_named(name), mesh).memory.fits, name
        best = recommended(config, slice_named(name))
        assert best is not None and best.setting.mesh == mesh, (name, best)
    assert "recommended: this mesh" in "\n".join(plan_command(config))


def test_the_page_of_costs_is_current() -> None:
    assert page(CONFIGS / "paper") == (CONFIGS / "paper" / "README.md").read_text()
