"""Benchmarks: lines, lengths, tables and counting are right, and peers answer. No timings."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import ablations  # noqa: E402
import common  # noqa: E402
import learning  # noqa: E402
import parts  # noqa: E402
import peer  # noqa: E402
import quickstart  # noqa: E402
import rewards  # noqa: E402
import roofline  # noqa: E402
import sampling  # noqa: E402
import scaling  # noqa: E402
import simulate  # noqa: E402
import table  # noqa: E402
import weak_scaling  # noqa: E402
from contenders import Rljax, Void, load_sampler  # noqa: E402
from models import model_folder  # noqa: E402
from peers.protocol import Turns, split_by_rows  # noqa: E402
from workloads import ARCHS, DEFAULT_ROWS, REALISTIC, ROWS, Workload, realistic_lengths  # noqa: E402

from rljax.rewards import sandbox  # noqa: E402
from rljax.rewards.dispatch import VERIFIERS  # noqa: E402
from rljax.rewards.pool import RewardPool  # noqa: E402
from rljax.sampling.engine import EngineOptions  # noqa: E402
from rljax.sampling.loop import Plan  # noqa: E402
from rljax.sampling.schedule import FREE, LanePrompts, Shape  # noqa: E402

FIELDS = {"bench", "case", "metric", "unit", "median", "min", "max", "n", "device", "commit", "date", "versions"}


def made(metric: str = "throughput", value: float = 10.0, date: str = "2026-01-02", **more: Any) -> dict[str, Any]:
    """A line of results."""
    case = {"model": "tiny", "batch": 8, "lengths": "fixed", "group": 8, "prompt": 64, "cap": 128}
    case |= more.pop("case", {})
    fields = {"bench": "sampling", "device": "cpu", "commit": "abc", "date": date, "versions": {}}
    return common.line(fields, case, metric, "tokens/s", [value]) | more


# --------------------------------------------------------------------------------------------------------------- lines


def test_a_line_has_the_documented_fields() -> None:
    fields = common.run_fields("sampling", "cpu", common.versions(("numpy", "no-such-package"), torch="2"))
    line = common.line(fields, {"model": "tiny"}, "throughput", "tokens/s", [3.0, 1.0, 2.0])
    assert set(line) == FIELDS
    assert (line["median"], line["min"], line["max"], line["n"]) == (2.0, 1.0, 3.0, 3)
    assert set(line["versions"]) == {"python", "numpy", "torch"}
    documented = (FOLDER / "README.md").read_text()
    assert all(f"`{field}`" in documented for field in [*FIELDS, "peer", "peer_median", "ratio", "baseline"])


def test_what_is_recorded_has_the_format() -> None:
    files = sorted((FOLDER / "results").glob("*.jsonl"))
    lines = table.read(files)
    assert lines
    for line in lines:
        assert set(line) >= FIELDS, line
        if line["bench"] not in ("fits", "rewards"):  # which run no model
            assert set(line["case"]) >= {"model", "batch", "lengths"}, line
        assert line["min"] <= line["median"] <= line["max"], line
        assert ("peer" in line) == ("peer_median" in line), line


@pytest.mark.parametrize(("more_is_better", "ratio"), [(True, 2.0), (False, 0.5)])
def test_a_ratio_above_one_is_ours(more_is_better: bool, ratio: float) -> None:
    made = common.compared([4.0, 4.0, 9.0], [2.0], more_is_better=more_is_better)
    assert made == {"peer_median": 2.0, "peer_min": 2.0, "peer_max": 2.0, "ratio": ratio}


def test_lines_are_appended(tmp_path: Path) -> None:
    file = tmp_path / "results" / "some.jsonl"
    common.append(file, [made()])
    common.append(file, [made(value=3.0), made(value=4.0)])
    assert [line["median"] for line in map(json.loads, file.read_text().splitlines())] == [10.0, 3.0, 4.0]


def test_contenders_take_turns_and_slow_variants_are_dropped() -> None:
    seconds = {"rljax": 5.0, "hf fast": 1.0, "hf near": 1.2, "hf slow": 2.0}
    calls: list[str] = []

    def measure(contender: common.Contender, seed: int) -> float:
        calls.append(contender.name)
        return seconds[contender.name]

    contenders = [common.Contender(name, 0, lambda seed: 0.0) for name in seconds]
    times = common.interleaved(contenders, 2, keep=sampling.keep_close, measure=measure)
    assert calls == ["rljax", "hf fast", "hf near", "hf slow", "rljax", "hf fast", "hf near"]
    assert {name: len(some) for name, some in times.items()} == {"rljax": 2, "hf fast": 2, "hf near": 2, "hf slow": 1}


# ----------------------------------------------------------------------------------------------------------- workloads


@pytest.mark.parametrize(
    ("count", "cap", "share", "sigma"), [(256, 512, 0.25, 0.8), (64, 100, 0.5, 0.4), (1000, 64, 0.1, 2)]
)
def test_lengths_have_the_mean_and_keep_the_cap(count: int, cap: int, share: float, sigma: float) -> None:
    lengths = realistic_lengths(count, cap, share * cap, sigma, seed=0)
    assert lengths.dtype == np.int32 and lengths.shape == (count,)
    assert lengths.min() >= 1 and lengths.max() <= cap
    assert abs(lengths.mean() - share * cap) <= 0.5
    assert np.array_equal(lengths, realistic_lengths(count, cap, share * cap, sigma, seed=0))
    assert not np.array_equal(lengths, realistic_lengths(count, cap, share * cap, sigma, seed=1))


def test_the_mean_of_lengths_must_be_below_the_cap() -> None:
    with pytest.raises(ValueError, match=r"mean = 64 tokens with cap = 64"):
        realistic_lengths(8, 64, 64, 1.0, seed=0)


def test_the_realistic_mix() -> None:
    lengths = REALISTIC.lengths()
    assert (REALISTIC.prompts, REALISTIC.group, REALISTIC.cap) == (32, 8, 512)
    assert abs(lengths.mean() - 128) < 0.5 and lengths.max() == 512
    spread = np.log(lengths[lengths < 512]).std()
    assert 0.7 < spread < 0.9  # log-normal of 0.8


def test_rows_are_what_their_names_say() -> None:
    assert set(DEFAULT_ROWS) <= set(ROWS)
    for name, workload in ROWS.items():
        model, *rest = name.split("-")
        assert model in (workload.model, "rehearsal")
        assert all(int(word[1:]) == workload.batch for word in rest if word[0] == "b" and word[1:].isdigit())
        assert ("realistic" in rest) == bool(workload.sigma)
    prompts = ROWS["tiny-b8"].make_prompts()
    assert prompts.tokens.min() >= 1 and prompts.tokens.max() < ARCHS["tiny"].vocab_size


def test_rows_are_chosen_by_pattern() -> None:
    assert list(sampling.chosen(["135m-b3*", "tiny-b8"])) == ["tiny-b8", "135m-b32", "135m-b32-alone"]
    with pytest.raises(SystemExit, match="no such row; there are tiny-b8"):
        sampling.chosen(["nothing"])


# ------------------------------------------------------------------------------------------------------------ roofline


def test_the_floor_of_a_rollout_worked_by_hand() -> None:
    """Two completions of 3 and 2 tokens after one prompt of 4: two rows take step 1, one takes step 2."""
    arch = ARCHS["tiny"]
    mm, head = 4 * 256 * ((2 * 4 + 2 * 2) * 64 + 3 * 1024), 256 * 512
    attention = 4 * 4 * 4 * 64  # FLOPs per key attended
    flops = roofline.Ceilings(1.0, float("inf"), float("inf"))
    prefill = 2 * mm * 4 + attention * 10 + 2 * head
    steps = 3 * 2 * (mm + head) + attention * (2 * 5 + 6)
    prompts, lengths = np.array([4]), np.array([3, 2])
    assert roofline.decode_floor_seconds(arch, prompts, lengths, flops, "float32") == steps
    assert roofline.floor_seconds(arch, prompts, lengths, flops, "float32") == prefill + steps
    memory = roofline.Ceilings(float("inf"), 1.0, 1.0)
    kv = 2 * 4 * 2 * 64 * 4  # bytes per slot
    # The prompt is read once for both rows.
    expected = 2 * 4 * (mm + head) + kv * ((4 + 2 * 1) + (4 + 2)) + 3 * 3 * 4 * 512
    assert roofline.decode_floor_seconds(arch, prompts, lengths, memory, "float32") == expected


def test_the_counts_of_learning_worked_by_hand() -> None:
    """The same two completions: 9 tokens through the layers, logits of 5."""
    arch, prompts, lengths = ARCHS["tiny"], np.array([4]), np.array([3, 2])
    counts = (9, 10 + (6 + 3 * 4) + (3 + 2 * 4), 5)
    assert roofline.learning_counts(prompts, lengths) == counts
    mm, head = 4 * 256 * ((2 * 4 + 2 * 2) * 64 + 3 * 1024), 256 * 512
    forward = 2 * mm * 9 + 4 * 4 * 4 * 64 * 39 + 2 * head * 5
    assert roofline.learning_flops(arch, prompts, lengths) == 4 * forward  # reference, and thrice for the update
    flops = roofline.Ceilings(1.0, float("inf"), float("inf"))
    assert roofline.update_floor_seconds(arch, prompts, lengths, flops) == 4 * forward


# ---------------------------------------------------------------------------------------------------------- simulation


def plan(**changed: Any) -> Plan:
    arguments = dict(
        samples_per_prompt=2, num_prompts=4, prompt_slots=16, max_tokens=40, max_rows=8, shards=1, chunk=8, growth=1.5,
        compact=True, refill=True,
    )  # fmt: skip
    return Plan.make(**(arguments | changed))


def device(lengths: list[int], plan: Plan) -> simulate.CountingDevice:
    return simulate.CountingDevice(np.array(lengths), plan, ARCHS["tiny"], simulate.FLOPS_ONLY, "float32")


def test_the_counting_device_follows_the_rows() -> None:
    shape = Shape(2, 2, 16)
    counting = device([1, 9, 12, 30], plan())
    started = counting.start(shape, LanePrompts(np.array([0, 1]), None), np.array([0, 1, 2, FREE]))
    assert started.lengths.tolist() == [1, 1, 1, 0]
    assert started.stopped.tolist() == [True, False, False, False]
    drawn = counting.decode(shape)
    assert drawn.tokens.shape == (8, 4)
    assert drawn.lengths.tolist() == [1, 9, 9, 0]
    assert drawn.stopped.tolist() == [True, True, False, False]
    admitted = counting.admit(
        shape, np.array([0, 2]), LanePrompts(np.array([1, FREE]), None), np.array([3, FREE, FREE, FREE])
    )
    assert admitted.lengths.tolist() == [1, 0, 0, 0]
    assert counting.decode(shape).lengths.tolist() == [9, 0, 12, 0]
    counting.reshape(shape, Shape(1, 2, 24), np.array([0, FREE]), np.array([0]))
    assert counting.decode(Shape(1, 2, 24)).lengths.tolist() == [17, 0]


def test_the_counting_device_adds_up_what_is_computed() -> None:
    arch, shape = ARCHS["tiny"], Shape(2, 2, 16)
    counting = device([9, 9, 9, 9], plan())
    counting.start(shape, LanePrompts(np.array([0, 1]), None), np.arange(4))
    counting.decode(shape)
    step = roofline.step_seconds(arch, simulate.FLOPS_ONLY, "float32", rows=4, own=4 * 16, read=2 * 16, attended=4 * 16)
    assert counting.step_seconds == 8 * step
    prompts = roofline.prefill_seconds(arch, np.array([16, 16]), simulate.FLOPS_ONLY, "float32")
    assert counting.prefill_seconds == prompts


@pytest.mark.parametrize("mode", simulate.MODES)
def test_every_mode_draws_the_lengths_and_never_less_than_the_least(mode: str) -> None:
    workload = Workload("tiny", prompts=16, prompt=64, cap=128, sigma=0.8)
    rows = workload.batch // 4 if mode in simulate.QUARTER else 0
    counted = simulate.simulate(workload, simulate.MODES[mode], max_rows=rows)
    shares = counted.shares()
    assert list(shares) == ["row-steps", "suffix slots", "prefix slots", "decode cost", "cost"]
    assert all(0 < share <= 100 for share in shares.values()), shares
    assert counted.least["suffix slots"] == counted.stats.suffix_slots_used


def test_nothing_is_wasted_where_all_rows_are_alike() -> None:
    """33 tokens: 32 steps in one chunk, for rows that all live; slots fill up one by one."""
    workload = Workload("tiny", prompts=8, prompt=64, cap=33)
    shares = simulate.simulate(workload, simulate.MODES["static"]).shares()
    assert shares["row-steps"] == shares["prefix slots"] == 100
    assert shares["suffix slots"] == pytest.approx(100 * (32 * 33 / 2) / (32 * 32))


@pytest.mark.parametrize("name", simulate.MIXES)
def test_growing_and_compacting_reaches_60_percent_of_ideal_in_12_programs(name: str) -> None:
    counted = simulate.simulate(simulate.MIXES[name], EngineOptions())
    assert counted.shares()["decode cost"] >= 60
    assert len(set(counted.stats.shapes)) <= 12


@pytest.mark.parametrize("name", simulate.MIXES)
def test_growing_and_compacting_is_worth_it(name: str) -> None:
    cost = {mode: simulate.simulate(simulate.MIXES[name], simulate.MODES[mode]).shares()["decode cost"] for mode in
            ("static", "grow", "grow+compact")}  # fmt: skip
    assert cost["static"] < cost["grow"] < cost["grow+compact"]
    assert cost["grow+compact"] > 2 * cost["static"]


# --------------------------------------------------------------------------------------------------------------- table


def test_the_newest_line_counts_and_keeps_its_place() -> None:
    lines = [
        made(value=1.0, date="2026-01-03"),
        made(metric="roofline", value=5.0),
        made(value=2.0, date="2026-01-02"),
        made(value=3.0, date="2026-01-03"),
        made(value=4.0, case={"batch": 32}),
        made(value=6.0, device="gpu"),
    ]
    kept = table.newest(lines)
    assert [(line["metric"], line["median"]) for line in kept] == [
        ("throughput", 3.0), ("roofline", 5.0), ("throughput", 4.0), ("throughput", 6.0),
    ]  # fmt: skip


def test_the_table_of_rollouts() -> None:
    against = {"peer": "transformers", "peer_median": 400.0, "peer_variant": "dynamic", "ratio": 3.0}
    lines = [
        made(value=1200.0),
        made(metric="roofline", value=33.333),
        made(value=1200.0, **against),
        made(metric="peak memory", value=1.0, **against),
        made(value=5.0, case={"batch": 16, "lengths": "realistic", "sigma": 0.8}),
    ]
    assert table.rollout_table(lines).splitlines() == [
        "| rollouts | tokens/s | % of roofline | padding % | dead rows % | transformers |",
        "|---|---:|---:|---:|---:|---:|",
        "| tiny, 8 rows, 64 + 128 tokens | 1,200 | 33.3 |  |  | 400 dynamic: **3.00x** |",
        "| tiny, 16 rows, 64 + up to 128 tokens, spread 0.8 | 5 |  |  |  |  |",
    ]


def test_the_table_of_targets() -> None:
    against = {"peer": "transformers", "peer_median": 400.0, "peer_variant": "static"}
    lines = [
        made(metric="roofline", value=56.0, case={"model": "1.5b"}),
        made(metric="roofline", value=44.9, case={"model": "0.5b"}),
        made(value=1.0, ratio=2.5, case={"model": "1.5b"}, **against),
        made(metric="padding"),
    ]
    rows = [[cell.strip() for cell in row.split("|")[2:-1]] for row in table.target_table(lines).splitlines()[2:]]
    assert rows == [
        ["% of roofline", "56", "55", "yes"],
        ["% of roofline", "44.9", "45", "no"],
        ["x transformers (static)", "2.5", "3", "no"],
    ]


def test_every_recorded_line_has_its_table() -> None:
    """Lines of scripts that run no model, too."""
    lines = table.newest(table.read(sorted(common.RESULTS.glob("*.jsonl"))))
    benches = {made["bench"] for made in lines}
    assert "fits" in benches and "sampling" in benches
    assert sum(text.count("coverage") for text in table.tables(lines).values()) > 10


def test_tables_of_everything_and_by_device() -> None:
    lines = [
        made(),
        made(case={"ablation": "cache", "variant": "grow"}, baseline="full", ratio=1.5),
        made(bench="simulate", metric="decode cost", device="none", case={"mode": "grow"}),
        made(bench="quickstart"),
    ]
    made_tables = table.tables(lines)
    assert list(made_tables) == ["Rollouts, cpu", "Ablations, cpu", "Other, cpu", "Counted, none"]
    assert "| cache | grow | tiny, 8 rows, 64 + 128 tokens | 10 | 1.50 |" in made_tables["Ablations, cpu"]


def test_lines_of_a_quickstart() -> None:
    result = {"sft_seconds": 70.0, "train_seconds": 120.0, "curve": [[0, 0.25], [10, 0.5], [20, 0.75]]}
    fields = common.run_fields("quickstart", "cpu", {})
    lines = quickstart.lines_of(fields, 3, result, peak_gib=0.9)
    assert {line["metric"]: line["median"] for line in lines} == {
        "pass@1 change": 0.5,
        "pass@1 before": 0.25,
        "pass@1 after": 0.75,
        "warm start": 70.0,
        "training": 120.0,
        "peak memory": 0.9,
    }
    kept = [json.loads(line) for line in (FOLDER / "results" / "quickstart.jsonl").read_text().splitlines()[-6:]]
    for new, old in zip(lines, kept, strict=True):  # what is in the results by now, field for field
        assert list(new) == list(old) and new["case"].keys() == old["case"].keys()
        assert (new["metric"], new["unit"]) == (old["metric"], old["unit"])


@pytest.mark.parametrize("row", [row for row in rewards.ROWS if row in VERIFIERS])
def test_items_of_the_reward_benchmark_have_the_scores_they_were_made_with(row: str) -> None:
    name = row.partition("/")[0]
    if name == "coder1" and sandbox.problem():
        pytest.skip(f"needs a sandbox: {sandbox.problem()}")
    items, scores = rewards.make_items(row, name, 2 if name == "coder1" else 100, seed=1)
    assert [VERIFIERS[row](item.response, item.ground_truth, {}) for item in items] == pytest.approx(scores)
    assert len({item.response for item in items}) == len(items)
    assert all(score == 1 for score in scores[::2]) and all(score < 1 for score in scores[1::2])


def test_a_wrong_score_voids_a_row_of_the_reward_benchmark() -> None:
    items, scores = rewards.make_items("exact/fixed", "gsm8k", 2, seed=1)
    with RewardPool(1, 30.0) as pool, pytest.raises(rewards.Void, match="exact/fixed"):
        rewards.timed(pool, items, scores)


def test_the_time_of_a_child_that_runs_is_the_familys() -> None:
    program = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\nsys.stdin.read()"
    before = common.process_seconds(os.getpid())
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert common.family_seconds(os.getpid()) >= common.process_seconds(os.getpid()) + 0.25
        child.communicate()
    assert common.process_seconds(os.getpid()) >= before + 0.25


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("{}\n[1]\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not a JSON object: \[1\]"):
        table.read([file])


# ---------------------------------------------------------------------------------------------------------- contenders

SMALL = Workload("tiny", prompts=2, group=2, prompt=16, cap=12, sigma=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.FOLDERS", tmp_path_factory.mktemp("bench"))
        return model_folder("tiny", "float32")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Rljax:
    return Rljax(load_sampler(folder, ARCHS["tiny"], "float32"), SMALL)


def test_rollouts_have_the_lengths_asked_for(ours: Rljax) -> None:
    assert ours.run(0) > 0
    assert ours.rollouts is not None
    assert len(set(ours.lengths.tolist())) > 1
    assert ours.rollouts.lengths.tolist() == ours.lengths.tolist()


def test_repeated_prompts_draw_what_shared_ones_draw(ours: Rljax) -> None:
    """The gate of the ablation passes for the same samples, and fails for others."""
    alone = ablations.OneEach(ours.sampler, SMALL)

    def tokens(of: Rljax) -> Any:
        return lambda: of.rollouts.tokens if of.rollouts else None

    variants = [ablations.Variant(str(i), one.run, 1.0, tokens(one)) for i, one in enumerate((alone, ours))]
    assert alone.prompts.tokens.shape == (4, 16)
    assert ablations.check_equal("prefix", variants) == [0, 0]
    other = Rljax(ours.sampler, SMALL)
    wrong = ablations.Variant("wrong", lambda seed: other.run(seed + 1), 1.0, tokens(other))
    with pytest.raises(Void, match=r"prefix: wrong and 0 differ in \d of 4 rows"):
        ablations.check_equal("prefix", [variants[0], wrong])


def test_every_ablation_is_known_by_its_name() -> None:
    with pytest.raises(SystemExit, match="no such ablation; there are cache, prefix"):
        ablations.run_ablations(["nothing"], None)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ learning


def test_even_ids_are_rewarded(ours: Rljax) -> None:
    ours.run(0)
    assert ours.rollouts is not None
    rewards = learning.even_share(ours.rollouts)
    rows = [row[:n].tolist() for row, n in zip(ours.rollouts.tokens, ours.rollouts.lengths, strict=True)]
    assert rewards.reshape(-1).tolist() == [sum(t % 2 == 0 for t in row) / len(row) for row in rows]


def test_the_gate_lets_no_other_weights_pass(folder: Path, ours: Rljax) -> None:
    learner = learning.load_learner(folder, ARCHS["tiny"], group=SMALL.group)
    ours.sampler.sync(learner.state.params)
    ours.run(0)
    assert ours.rollouts is not None
    learning.check_logprobs(learner, ours.rollouts, [])
    learner.state = dataclasses.replace(learner.state, params=jax.tree.map(lambda x: 1.05 * x, learner.state.params))
    with pytest.raises(Void, match="log-probs of the learner and the sampler differ by"):
        learning.check_logprobs(learner, ours.rollouts, [])


def test_an_iteration_and_what_it_is_made_of(folder: Path, ours: Rljax) -> None:
    iteration = learning.Iteration(folder, SMALL)
    iteration.sampler = ours.sampler  # its programs are there
    seconds = iteration.run(0)
    assert list(iteration.phases) == ["rollout", "reward", "update", "sync"]
    assert sum(iteration.phases.values()) == pytest.approx(seconds)
    assert 0 <= iteration.metrics["learner/padding_fraction"] < 1 and iteration.peak_mib > 0
    # The second one is of other weights than the reference, and draws with them.
    iteration.run(1)
    assert iteration.metrics["policy/reference_kl"] > 0
    assert iteration.metrics["policy/behaviour_gap_max"] < 1e-4


def test_completions_alone_are_the_same_completions(ours: Rljax) -> None:
    assert ours.rollouts is not None
    alone = learning.ungrouped(ours.rollouts)
    sent, shared = learning.as_ids(alone), learning.as_ids(ours.rollouts)
    assert sent["completions"] == shared["completions"]
    assert sent["prompts"] == [prompt for prompt in shared["prompts"] for _ in range(SMALL.group)]


def test_a_batch_that_is_too_large_is_taken_in_whole_groups() -> None:
    assert learning.batch_variants(["a", "b"], ROWS["tiny-b64"]) == ["a/64", "b/64"]
    assert learning.batch_variants(["a"], REALISTIC) == ["a/16", "a/32"]


def test_the_loss_head_in_chunks_needs_less_than_half_the_memory() -> None:
    whole, chunked = parts.head_memory(parts.HEAD_TOKENS, common.run_fields("update", "cpu", {}))
    assert chunked["ratio"] > 2 and whole["ratio"] == 1


def test_a_loop_takes_its_turns() -> None:
    steps: list[int] = []

    def loop(turns: Turns) -> None:
        for step in range(3):
            turns.begin()
            turns.timed("rollout", steps.append)(step)
            if step == 2:
                raise ValueError("no more")
            turns.end()

    turns = Turns(loop)
    assert steps == []
    told = turns.step()
    assert steps == [0] and set(told) == {"seconds", "rollout", "reference", "update", "peak_mib"}
    assert told["seconds"] == told["rollout"] + told["reference"] + told["update"]
    turns.step()
    with pytest.raises(ValueError, match="no more"):
        turns.step()
    turns.stop()
    stopped = Turns(loop)
    stopped.stop()
    assert steps == [0, 1, 2]


# --------------------------------------------------------------------------------------------------------------- peers


def test_a_static_batch_runs_to_its_longest_row() -> None:
    assert split_by_rows([3, 5, 2, 1], 0) == [(slice(0, 4), 5)]
    assert split_by_rows([3, 5, 2, 1], 2) == [(slice(0, 2), 5), (slice(2, 4), 2)]


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_HF_PYTHON", "/nowhere/python")
    with pytest.raises(peer.PeerError, match=r"/nowhere/python, which is not there; run `make bench-peers`"):
        peer.Worker("hf")


def test_peers_continue_as_rljax_does(folder: Path) -> None:
    """Those that are installed, side by side."""
    names = [name for name in sorted(peer.SAMPLERS) if peer.is_installed(name)]
    if not names:
        pytest.skip("needs .venv-hf or .venv-tunix (make bench-peers)")
    workers = [peer.Worker(name) for name in names]
    try:
        sampling.check_gate("tiny", workers, folder)
        for worker in workers:
            told = worker.ask("load", folder=str(folder), dtype="float32")
            assert told["variants"] and told["versions"]
            drawn = worker.ask("sample", prompts=[[1, 2, 3]] * 2, lengths=[2, 4], variant=told["variants"][0], seed=0)
            assert drawn["drawn"] == 8 and drawn["seconds"] > 0
            with pytest.raises(peer.PeerError, match="failed to sample"):
                worker.ask("sample", prompts=[[1, 2, 3]], lengths=[2], variant="unheard of", seed=0)
    finally:
        for worker in workers:
            worker.close()


# ------------------------------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize(("loss", "verdict"), [(lambda n, step: 1.0, "undecided"), (None, "holds")])
def test_runs_that_learnt_nothing_decide_nothing(tmp_path: Path, loss: Any, verdict: str) -> None:
    """The rehearsal's end so; curves that follow the law with N0 within their sizes are told to saturate."""
    rng, sizes = np.random.default_rng(0), (20_000, 200_000, 2_000_000)
    law = loss or (
        lambda n, step: 0.9 * (4.0 * step) ** (-0.4 / (1 + 100_000 / n)) * float(np.exp(rng.normal(0, 1e-3)))
    )
    rows = ["run,num_params,step,samples,flops,tokens,test_loss"]
    rows += [f"{n},{n},{s},{4 * s},{n * s}e3,{s},{law(n, s)}" for n in sizes for s in range(1, 11)]
    (tmp_path / "curves.csv").write_text("\n".join(rows))
    curves, _ = scaling.read_held(tmp_path / "curves.csv", where={}, by="num_params")
    assert scaling.saturates(scaling.fits_of(curves, "samples", 20)["law"]).verdict == verdict


# -------------------------------------------------------------------------------------------------------- weak scaling


def an_update(chips: int, mib: float) -> dict[str, Any]:
    case = {
        "model": "7b",
        "program": "update",
        "slice": f"v6e-{chips}",
        "mesh": f"fsdp {chips // 4} x tensor 4",
        "batch": f"4 x {chips // 4} x 6144, remat full",
        "lengths": "2048 + 4096",
    }
    traffic = {"0": {"collectives": 3, "mib": 1.0}, "1": {"collectives": 100, "mib": mib}}
    traffic["2"] = {"collectives": 2, "mib": 10.0}
    return {**made(bench="aot", case=case, metric="memory"), "traffic": traffic}


def test_what_an_update_sends_and_how_long_that_takes() -> None:
    update = weak_scaling.Update(an_update(8, 1000.0))
    assert (update.where.chips, update.row_shards, update.tokens, update.remat) == (8, 2, 6144, "full")
    size, count = update.sent()
    assert size == (1000 + 6 * 10) * 2**20 and count == 100 + 6 * 2  # six chunks of 1,024 tokens
    seconds = update.seconds()
    assert seconds["links"] == pytest.approx(1060 * 2**20 / (2 * 9e10))
    layers, head = 28 * (3584 * 3584 * 2 + 2 * 3584 * 512 + 3 * 3584 * 18944), 3584 * 152064
    assert seconds["compute"] == pytest.approx(6144 * (8 * layers + 6 * head) / 4 / 918e12)


def test_the_page_says_where_links_limit_a_size() -> None:
    compute = weak_scaling.Update(an_update(8, 0.0)).seconds()["compute"] / 0.28
    enough = compute * 2 * 9e10 / 2**20  # MiB that links send in that time
    text = weak_scaling.page([an_update(8, 0.5 * enough), an_update(64, 1.5 * enough)])
    assert "they are what limits it from 64 chips on" in text
    assert "so they can hide behind it" in weak_scaling.page([an_update(8, 0.5 * enough), an_update(64, 0.5 * enough)])
    # 128 prompts of 150 tokens with 8 completions of 800 each: 136 micro-batches of 6,144 slots, on 4 chips each.
    assert "compiled for 8 chips only" in weak_scaling.page([an_update(8, 1.0)])
    assert "Not compiled yet: 0.5b, 1.5b, 3b, 14b, 32b, 72b." in text
    assert "838 thousand tokens an update: it fills one micro-batch on each of 544 chips" in text


def test_the_page_of_weak_scaling_is_current() -> None:
    lines = table.read([common.RESULTS / "weak_scaling.jsonl"])
    assert weak_scaling.page(lines) == weak_scaling.PAGE.read_text()
