"""Metrics merge exactly, and what a run folder holds survives a kill and a failing extra sink."""

import io
import json
import logging
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rljax.metrics import (
    Correlation,
    EffectiveShare,
    Max,
    Min,
    PhaseTimer,
    Spread,
    Sum,
    WeightedMean,
    merge,
    nothing_counted,
    to_floats,
)
from rljax.run_log import ALIASES, CURVE_COLUMNS, CurveRow, MetricSink, Progress, step_line


def _lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def _row(step, **columns):
    return CurveRow("r", "rljax", 0.5e9, step, 512 * step, 1e15 * step, 4e6 * step, 0.5, **columns)


def test_a_mean_of_unequal_parts_is_weighted():
    # [1, 3] and [5]: (1 + 3 + 5) / 3 = 3, where a mean of means would be 3.5
    assert (WeightedMean(4.0, 2.0) + WeightedMean(5.0, 1.0)).value() == 3.0


def test_an_empty_mean_is_zero_and_adds_nothing():
    empty = WeightedMean(jnp.float32(0), jnp.float32(0))
    assert empty.value() == 0.0
    assert (empty + WeightedMean(6.0, 4.0)).value() == 1.5


def test_merge_is_by_type_not_by_name():
    a = {"mean": WeightedMean(2.0, 2.0), "sum": Sum(1.0), "max": Max(-1.0), "min": Min(-1.0), "only_a": Sum(7.0)}
    b = {"mean": WeightedMean(8.0, 3.0), "sum": Sum(2.0), "max": Max(-5.0), "min": Min(-5.0), "only_b": Max(9.0)}
    expected = {"mean": 2.0, "sum": 3.0, "max": -1.0, "min": -5.0, "only_a": 7.0, "only_b": 9.0}
    assert to_floats(merge(a, b)) == expected
    assert to_floats(merge(b, a)) == expected


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_sums_of_any_parts_give_the_statistic_of_the_whole(parts):
    """Against NumPy on all values at once, in parts of unequal size."""
    draw = np.random.default_rng(0)
    x, weight = draw.normal(2.0, 0.5, 40), draw.random(40)
    y = 0.3 * x + draw.normal(size=40)
    total = {}
    for a, b, w in zip(*(np.split(v, [3, 4, 20, 31][: parts - 1]) for v in (x, y, weight)), strict=True):
        found = {
            "spread": Spread(a.sum(), (a**2).sum(), len(a)),
            "correlation": Correlation(a.sum(), b.sum(), (a**2).sum(), (b**2).sum(), (a * b).sum(), len(a)),
            "effective": EffectiveShare(w.sum(), (w**2).sum(), len(w)),
        }
        total = merge(total, found)
    assert to_floats(total) == pytest.approx(
        {
            "spread": np.std(x, ddof=1),
            "correlation": np.corrcoef(x, y)[0, 1],
            "effective": 1 / np.mean((weight / weight.mean()) ** 2),
        },
        rel=1e-9,
    )


def test_statistics_of_too_little_are_zero():
    assert Spread(0.0, 0.0, 0.0).value() == Spread(3.0, 9.0, 1.0).value() == 0.0
    assert Correlation(*[0.0] * 6).value() == Correlation(2.0, 4.0, 2.0, 10.0, 4.0, 2.0).value() == 0.0
    assert EffectiveShare(0.0, 0.0, 0.0).value() == 0.0 and EffectiveShare(6.0, 12.0, 3.0).value() == 1.0
    assert Min(math.inf).value() == 0.0


def test_merging_with_nothing_changes_nothing():
    """A device without a token of the loss has such metrics."""
    metrics = {
        "min": Min(jnp.float32(0.7)),
        "max": Max(jnp.float32(1.2)),
        "mean": WeightedMean(jnp.float32(4), jnp.float32(2)),
        "spread": Spread(jnp.float32(3), jnp.float32(5), jnp.float32(2)),
    }
    nothing = nothing_counted(metrics)
    assert to_floats(merge(nothing, metrics)) == to_floats(merge(metrics, nothing)) == to_floats(metrics)
    assert set(to_floats(nothing).values()) == {0.0}


def test_merge_refuses_two_types_under_one_name():
    with pytest.raises(AssertionError, match="reward"):
        merge({"reward": Sum(1.0)}, {"reward": Max(1.0)})


def test_metrics_pass_through_jit_and_scan():
    @jax.jit
    def total(values):
        def body(carry, value):
            new = {"mean": WeightedMean(value, 1.0), "max": Max(value), "min": Min(value), "sum": Sum(value)}
            return merge(carry, new), None

        zero = jnp.float32(0)
        start = {"mean": WeightedMean(zero, zero), "max": Max(zero - 9), "min": Min(zero + 9), "sum": Sum(zero)}
        return jax.lax.scan(body, start, values)[0]

    assert to_floats(total(jnp.array([1.0, -2.0, 4.0]))) == {"mean": 1.0, "max": 4.0, "min": -2.0, "sum": 3.0}


def test_a_nan_is_not_swallowed_by_max_or_min():
    for kind in (Max, Min):
        for a, b in ((1.0, math.nan), (math.nan, 1.0)):
            assert math.isnan((kind(a) + kind(b)).value())
            assert math.isnan((kind(jnp.float32(a)) + kind(jnp.float32(b))).value())


def test_to_floats_passes_plain_numbers():
    floats = to_floats({"a": 2, "b": np.float32(0.5), "c": jnp.int32(3)})
    assert floats == {"a": 2.0, "b": 0.5, "c": 3.0}
    assert all(type(value) is float for value in floats.values())


def test_every_line_is_on_disk_before_the_sink_is_closed(tmp_path):
    sink = MetricSink(tmp_path)
    sink.log(0, {"eval/pass@1": 0.25})
    sink.log(1, {"reward/mean": 0.5, "policy/grad_norm": math.inf})
    assert _lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "eval/pass@1": 0.25},
        {"step": 1, "reward/mean": 0.5, "policy/grad_norm": None},
    ]
    with pytest.raises(AssertionError, match="step 1 logged after step 1"):
        sink.log(1, {})
    sink.close()


def test_resume_cuts_what_was_written_beyond_the_checkpoint(tmp_path):
    def write(steps, resume_step):
        sink = MetricSink(tmp_path, resume_step=resume_step)
        for step in steps:
            sink.log(step, {"x": float(step)})
            sink.write_curve(_row(step, seed=3))
            sink.write_rollouts(step, [{"completion": f"step {step}"}])
        sink.close()

    write(range(0, 6), None)
    # What a kill leaves: half a line in each file.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "x"')
    with (tmp_path / "curves.csv").open("a") as file:
        file.write("r,rljax,5e8,6")
    write(range(4, 8), 3)
    assert [row["step"] for row in _lines(tmp_path / "metrics.jsonl")] == list(range(8))
    curves = (tmp_path / "curves.csv").read_text().splitlines()
    assert curves[0] == (
        "run,source,num_params,step,samples,flops,tokens,test_loss,unique,repeats,group_size,eval,seed,order,"
        "num_non_embedding_params,num_total_params,full_flops,full_flops_non_embedding,accelerator_seconds"
    )
    assert curves[1] == "r,rljax,500000000.0,0,0,0.0,0.0,0.5,,,,,3,,,,,,"
    assert [line.split(",")[3] for line in curves[1:]] == [str(step) for step in range(8)]
    assert sorted(f.name for f in (tmp_path / "rollouts").iterdir()) == [f"step_{s:06d}.jsonl" for s in range(8)]
    write([0], None)  # no checkpoint: a fresh start
    assert [row["step"] for row in _lines(tmp_path / "metrics.jsonl")] == [0]
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 2
    assert [f.name for f in (tmp_path / "rollouts").iterdir()] == ["step_000000.jsonl"]


def test_a_resume_with_no_curves_yet_starts_the_table_with_its_header(tmp_path):
    (tmp_path / "curves.csv").write_text("")
    sink = MetricSink(tmp_path, resume_step=2)
    sink.write_curve(_row(3))
    sink.close()
    assert (tmp_path / "curves.csv").read_text().splitlines()[0] == ",".join(CURVE_COLUMNS)


def test_rollouts_keep_any_text(tmp_path):
    rows = [{"prompt": "1 + 1?\n", "completion": "二\u2028\udc80<b>\\boxed{2}", "reward": 1.0}]
    sink = MetricSink(tmp_path)
    sink.write_rollouts(12, rows)
    sink.close()
    text = (tmp_path / "rollouts" / "step_000012.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.rstrip("\n").split("\n")] == rows


def test_tensorboard_holds_the_values(tmp_path):
    sink = MetricSink(tmp_path, tensorboard=True)
    sink.log(3, {"reward/mean": 0.375})
    sink.close()
    (events,) = (tmp_path / "tensorboard").glob("events*")
    data = events.read_bytes()
    assert b"reward/mean" in data
    assert np.float32(0.375).tobytes() in data


def _fake_wandb(log, ids):
    def init(*, id, **_):
        ids.append(id)
        return types.SimpleNamespace(log=log, finish=lambda: None)

    return types.SimpleNamespace(init=init)


def test_wandb_gets_every_step_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    seen, ids = [], []
    monkeypatch.setitem(sys.modules, "wandb", _fake_wandb(lambda row, step: seen.append((step, row)), ids))
    for resume_step in (None, 1):
        sink = MetricSink(tmp_path, wandb_project="p", resume_step=resume_step)
        sink.log(1 if resume_step is None else 2, {"x": 1.0})
        sink.close()
    assert seen == [(1, {"x": 1.0}), (2, {"x": 1.0})]
    assert ids[0] == ids[1]


def test_an_extra_sink_that_fails_is_dropped_and_logged_once(tmp_path, monkeypatch, caplog):
    def offline(row, step):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", _fake_wandb(offline, []))
    sink = MetricSink(tmp_path, wandb_project="p")
    for step in range(3):
        sink.log(step, {"x": 1.0})
    sink.close()
    assert len(_lines(tmp_path / "metrics.jsonl")) == 3
    assert [r.message for r in caplog.records] == ["W&B is off from here: OSError: no network. The run goes on."]


def test_a_missing_wandb_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink = MetricSink(tmp_path, wandb_project="p")
    sink.log(0, {"x": 1.0})
    sink.close()
    assert "W&B is off from here" in caplog.text


def test_timer_adds_up_a_phase_and_starts_over():
    timer = PhaseTimer()
    for _ in range(2):
        with timer("sample"):
            pass
    with pytest.raises(KeyError), timer("update"):
        raise KeyError
    first = timer.take()
    assert list(first) == ["time/sample_seconds", "time/update_seconds"]
    assert all(seconds > 0 for seconds in first.values())
    assert timer.take() == {}


_METRICS = {
    "reward/mean": 0.4125,
    "throughput/sampled_tokens_per_second": 3100.4,
    "time/sample_seconds": 5.12,
    "time/sync_seconds": 0.01,
    "time/update_seconds": 2.9,
    "time/step_seconds": 8.2,
}


KNOWN_NAMES = {
    "verl": """
        critic/score/mean critic/score/max critic/score/min critic/rewards/mean critic/advantages/mean
        critic/advantages/max critic/advantages/min critic/returns/mean critic/returns/max critic/returns/min
        actor/pg_loss actor/entropy actor/kl_loss actor/kl_coef actor/ppo_kl actor/pg_clipfrac actor/pg_clipfrac_lower
        actor/grad_norm actor/lr response_length/mean response_length/max response_length/min response_length/clip_ratio
        prompt_length/mean prompt_length/max prompt_length/min prompt_length/clip_ratio rollout_corr/kl
        rollout_corr/k3_kl rollout_corr/chi2_token rollout_corr/rollout_is_mean rollout_corr/rollout_is_min
        rollout_corr/rollout_is_max rollout_corr/rollout_is_eff_sample_size rollout_corr/rollout_rs_masked_fraction
        training/rollout_probs_diff_mean training/rollout_probs_diff_max training/rollout_probs_diff_std
        training/rollout_actor_probs_pearson_corr perf/total_num_tokens
        perf/throughput perf/time_per_step perf/mfu/actor perf/max_memory_allocated_gb perf/max_memory_reserved_gb
        perf/cpu_memory_used_gb timing_s/gen timing_s/reward timing_s/old_log_prob timing_s/ref timing_s/adv
        timing_s/update_actor timing_s/update_weights timing_s/testing timing_s/save_checkpoint timing_s/step
        """,
    "trl": """
        reward reward_std frac_reward_zero_std loss policy_loss entropy kl clip_ratio/low_mean clip_ratio/low_min
        clip_ratio/high_mean clip_ratio/high_max clip_ratio/region_mean cispo_clip_ratio grad_norm learning_rate
        completions/mean_length completions/min_length completions/max_length completions/clipped_ratio
        completions/mean_terminated_length completions/min_terminated_length completions/max_terminated_length
        sampling/sampling_logp_difference/mean sampling/sampling_logp_difference/max
        sampling/importance_sampling_ratio/min sampling/importance_sampling_ratio/mean
        sampling/importance_sampling_ratio/max num_tokens step_time epoch eval_reward
        """,
}
"""What dashboards made for these libraries read."""


@pytest.mark.parametrize("library", KNOWN_NAMES)
def test_aliases_are_names_of_that_library(library):
    aliases = set(ALIASES[library])
    assert aliases <= set(KNOWN_NAMES[library].split())
    assert len(aliases) > 20
    assert set(ALIASES) == {"none", *KNOWN_NAMES}


def test_aliases_are_written_beside_the_names(tmp_path):
    class Kept(list):
        def log(self, step, metrics):
            self.append(dict(metrics))

        def close(self):
            pass

    sink = MetricSink(tmp_path, aliases=ALIASES["trl"])
    sink._extras["kept"] = kept = Kept()
    sink.log(1, {"reward/mean": 0.5, "policy/objective": math.nan, "mine": 2.0})
    sink.close()
    assert _lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/mean": 0.5, "policy/objective": None, "mine": 2.0, "reward": 0.5, "loss": None}
    ]
    assert kept[0]["reward"] == 0.5 and set(kept[0]) == {"reward/mean", "policy/objective", "mine", "reward", "loss"}


def test_step_line():
    assert step_line(12, 200, _METRICS) == ("step 12/200  reward 0.412  tokens/s 3,100  8.2 s (sample 5.1, update 2.9)")
    assert step_line(0, 200, {"eval/pass@1": 0.5}) == "step 0/200  pass@1 0.500"
    ends = {"": 0.41, "_low": 0.38, "_high": 0.447}
    forecast = {f"forecast/final_test_loss{part}": loss for part, loss in ends.items()}
    assert step_line(9, 200, forecast) == "step 9/200  final loss 0.410 (0.380 to 0.447)"


def test_progress_in_a_file_is_plain_log_lines(caplog):
    out = io.StringIO()
    with caplog.at_level(logging.INFO), Progress(200, console=Console(file=out)) as progress:
        progress.step(12, _METRICS)
    assert caplog.messages == [step_line(12, 200, _METRICS)]
    assert out.getvalue() == ""


def test_progress_on_a_terminal_prints_the_line_above_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress(200, first_step=11, console=console) as progress:
        progress.step(12, _METRICS)
    text = out.getvalue()
    assert step_line(12, 200, _METRICS) in text
    assert " 12/200" in text.split("update 2.9)")[-1]
    assert "reward 0.412" in text.split("update 2.9)")[-1]
