"""Figures of any table of curves: which there are, what they show, and the same bytes each time."""

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rljax.config import ConfigError
from rljax.scaling import plot
from rljax.scaling.curves import Curve, read_curves
from rljax.scaling.figures import _models, open_table, read_models, read_varied, write_figures

SIZES = (5e8, 1.5e9, 3e9, 7e9, 14e9)


def law(size: float, samples: np.ndarray) -> np.ndarray:
    return 10 ** (0.1 * size / (size + 5e9) * -np.log10(samples) + 0.05)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Five sizes, three runs of each, on two evaluation sets."""
    rng = np.random.default_rng(0)
    lines = ["run,source,eval,num_params,step,samples,flops,test_loss,repeats,group_size"]
    for name in ("holdout", "gsm8k"):
        for size in SIZES:
            for run in range(3):
                for step in range(1, 101):
                    loss = law(size, np.array(512.0 * step)) + rng.normal(0, 0.004)
                    row = (run, "base", name, size, step, 512 * step, 6 * size * 4e6 * step, loss, 1, 8)
                    lines.append(",".join(map(str, row)))
    path = tmp_path / "curves.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def names(files: list[Path]) -> set[str]:
    assert {file.suffix for file in files} == {".png", ".svg"}
    assert all(file.stat().st_size > 1000 for file in files)
    return {file.stem for file in files}


def test_a_sweep_over_sizes_has_every_figure_of_the_paper_it_has_data_for(table: Path, tmp_path: Path) -> None:
    kinds = {f"{kind}_{x}" for kind in ("law", "inter", "intra", "slopes") for x in ("flops", "samples")}
    kinds |= {"intervals", "evals_num_params", "evals_ends"}
    assert names(write_figures(table, tmp_path / "f")) == {f"{kind}-base" for kind in kinds}


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    """As the shipped ladder: sizes in two seeds; at one of them, reuse, group sizes and the other order."""
    rng = np.random.default_rng(0)
    runs = [(size, 1, 2400, 8, "shuffle", seed) for size in SIZES for seed in (0, 1)]
    runs += [(SIZES[2], tau, 2400 // tau, 8, "shuffle", 0) for tau in (2, 5)]
    runs += [(SIZES[2], 1, 2400, group, "shuffle", 0) for group in (4, 16)]
    runs.append((SIZES[2], 1, 2400, 8, "curriculum", 0))
    lines = ["run,size,tau,source,eval,num_params,step,samples,flops,test_loss,repeats,unique,group_size,order,seed"]
    for number, (size, tau, unique, group, order, seed) in enumerate(runs):
        for step in range(1, 31):
            # What each axis does is far above the noise: a mean over another would show.
            shift = 0.02 * (tau - 1) - 0.01 * (group - 8) + 0.3 * (order == "curriculum")
            loss = law(size, np.array(512.0 * step)) * (1 - shift) + rng.normal(0, 1e-4)
            row = (
                f"r{number}",
                f"{size:g}",
                tau,
                "rljax",
                "task",
                size,
                step,
                512 * step,
                6 * size * 4e6 * step * group,
            )
            lines.append(",".join(map(str, (*row, loss, tau, unique, group, order, seed))))
    path = tmp_path / "ladder.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_else_a_sweep_varies_is_held_in_each_figure(ladder: Path, tmp_path: Path) -> None:
    kinds = {f"{kind}_{x}" for kind in ("law", "inter", "intra", "slopes") for x in ("flops", "samples")} | {
        "intervals"
    }
    kinds |= {f"{axis}_{x}" for axis in ("repeats", "group_size") for x in ("flops", "samples")}
    assert names(write_figures(ladder, tmp_path / "f")) == {f"{kind}-rljax" for kind in kinds}
    table, middle = open_table(ladder), f"{SIZES[2]:.12g}"
    fixed = {
        "num_params": {"repeats": "1", "group_size": "8", "order": "shuffle"},
        "repeats": {"num_params": middle, "group_size": "8", "order": "shuffle"},
        "group_size": {"num_params": middle, "repeats": "1", "order": "shuffle"},
    }
    for axis, wanted in fixed.items():
        curves, held = read_varied(table, "rljax", "task", axis)
        assert held == wanted
        for curve in curves:
            key, size = curve.key, curve.key if axis == "num_params" else SIZES[2]
            shift = {"num_params": 0, "repeats": 0.02 * (key - 1), "group_size": -0.01 * (key - 8)}[axis]
            assert curve.loss == pytest.approx(law(size, curve.x["samples"]) * (1 - shift), abs=1e-3)
    assert len(read_varied(table, "rljax", "task", "num_params")[0]) == len(SIZES)
    assert (
        f"num_params {middle}, group_size 8, order shuffle" in (tmp_path / "f" / "repeats_flops-rljax.svg").read_text()
    )


def test_reuse_and_group_size(tmp_path: Path) -> None:
    for column, wanted in (("tau", {"repeats_samples"}), ("rollout_n", {"group_size_samples"})):
        path = tmp_path / f"{column}.csv"
        rows = [f"base,{value},{step},{0.9 - 0.001 * step}" for value in (4, 8, 16) for step in range(1, 41)]
        path.write_text(f"source,{column},step,loss\n" + "\n".join(rows))
        assert names(write_figures(path, tmp_path / column)) == {f"{name}-base" for name in wanted}


def test_response_lengths_alone_or_beside_losses(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    rows = [f"base,{size},{step},{800 - step + size}" for size in (0.5, 7, 72) for step in range(11, 101)]
    path.write_text("source,size_b,step,mean_response_tokens\n" + "\n".join(rows))
    assert names(write_figures(path, tmp_path / "a")) == {"lengths_num_params-base"}
    table = open_table(path)
    (first, *_), _ = read_varied(table, "base", "", "num_params", "completion_tokens")
    assert (first.key, first.loss[0], first.x["samples"][0]) == (5e8, 789.5, 11 * 512)
    rows = [f"{size},{step},{8 * step},0.5,{'' if step < 2 else 30 + step}" for size in (1, 2) for step in range(20)]
    path.write_text("num_params,step,samples,test_loss,completion_tokens\n" + "\n".join(rows))
    assert names(write_figures(path, tmp_path / "b")) == {"law_samples", "lengths_num_params"}


def test_a_line_that_need_not_be_monotone_turns() -> None:
    x = np.arange(1.0, 101.0)
    truth = 800 + 100 * np.cos(np.log(x))
    line = plot.smooth(x, truth + np.random.default_rng(0).normal(0, 5, 100), monotone=False)
    assert np.abs(line - truth)[5:].max() < 20


def test_beside_another_table_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    for column in ("tau", "rollout_n"):
        rows = [f"base,{value},{step},{0.9 - 0.001 * step}" for value in (4, 8) for step in range(1, 20)]
        (tmp_path / f"{column}.csv").write_text(f"source,{column},step,loss\n" + "\n".join(rows))
    tau, groups = tmp_path / "tau.csv", tmp_path / "rollout_n.csv"
    beside, unlike = write_figures(tau, tmp_path / "a", beside=tau), write_figures(tau, tmp_path / "b", beside=groups)
    again = write_figures(tau, tmp_path / "c", beside=tau)
    from matplotlib.image import imread

    assert imread(beside[0]).shape[1] == 3600 and imread(unlike[0]).shape[1] == 1800
    assert [file.read_bytes() for file in beside] == [file.read_bytes() for file in again]


def test_lines_are_solid_where_the_law_was_fitted_and_dashed_beyond(table: Path) -> None:
    from rljax.scaling.figures import _early, _inter, span

    curves, _ = read_curves(table, where={"source": "base", "eval": "holdout"})
    law_of_early, seen = _early(curves, "samples", "ours")
    _, extended = _inter(curves, "samples")
    smaller = {curve.key: span(curve, "samples") for curve in curves[:-1]}
    for fitted, spans, whole in ((law_of_early, seen, False), (extended, smaller, True)):
        with plot.figure() as (_, axes):
            plot.draw_law(axes[0, 0], curves, "samples", fitted=fitted, spans=spans)
            lines = [line for line in axes[0, 0].get_lines() if len(line.get_xdata())]
        solid, dashed = lines[0::2], lines[1::2]
        assert len(solid) == len(dashed) == len(SIZES)
        drawn = [np.isfinite(line.get_ydata()) for line in solid]
        assert all((a ^ np.isfinite(b.get_ydata())).all() for a, b in zip(drawn, dashed, strict=True))
        assert drawn[-1].any() == (not whole)  # the largest size was predicted, or each size's later half
        assert drawn[0].all() == whole
        x, y = solid[0].get_xdata()[drawn[0]], solid[0].get_ydata()[drawn[0]]
        assert y == pytest.approx(law(SIZES[0], x), abs=0.01)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_smoothed_line_follows_the_curve_up_or_down(sign: int) -> None:
    x = np.arange(1.0, 101.0)
    truth = 0.7 + sign * 0.1 * np.log10(x)
    line = plot.smooth(x, truth + np.random.default_rng(0).normal(0, 0.01, 100))
    assert np.abs(line - truth).max() < 0.015
    assert (sign * np.diff(line) >= -1e-12).all()


@pytest.mark.parametrize(("last", "wanted"), [(3e3, [200, 500, 1000, 2000]), (1e6, [1e3, 1e4, 1e5, 1e6])])
def test_labels_of_x_have_room(last: float, wanted: list[float]) -> None:
    with plot.figure() as (drawn, axes):
        axes[0, 0].plot([160, last], [1, 2])
        plot.log_x(axes[0, 0])
        drawn.canvas.draw()
        ticks = [tick for which in ("major", "minor") for tick in axes[0, 0].xaxis.get_ticklabels(which=which)]
        low, high = axes[0, 0].get_xlim()
        shown = [tick.get_position()[0] for tick in ticks if tick.get_text() and low <= tick.get_position()[0] <= high]
    assert shown == pytest.approx(wanted)


def test_intervals_are_those_of_the_last_step_all_runs_have() -> None:
    runs = np.array([[0.9, 0.8, 0.7], [0.9, 0.82, np.nan], [0.9, 0.84, np.nan]])
    curve = Curve(1e9, np.array([1, 2, 3]), {"step": np.arange(1.0, 4.0)}, np.nanmean(runs, axis=0), runs)
    with plot.figure() as (_, axes):
        plot.draw_intervals(axes[0, 0], [curve])
        (low, high) = axes[0, 0].containers[0][2][0].get_segments()[0][:, 1]
    assert (low + high) / 2 == pytest.approx(0.82)
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-5)  # t of 2 degrees of freedom


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a file"):
        write_figures(tmp_path / "none.csv", tmp_path)
    one = tmp_path / "one.csv"
    one.write_text("source,size_b,step,loss_mean\nbase,7,1,0.9\nbase,7,2,0.8\n")
    with pytest.raises(ConfigError, match="compares several"):
        write_figures(one, tmp_path)
    one.write_text("source,size_b,step,loss_mean\n")
    with pytest.raises(ConfigError, match="no row"):
        write_figures(one, tmp_path)


def sizes_table(folder: Path) -> Path:
    """Two sizes, the larger measured for longer."""
    rows = [f"base,{size},{step},{level - 0.001 * step}" for size, level, last in ((1e9, 0.9, 50), (4e9, 0.7, 80))
            for step in range(1, last + 1)]  # fmt: skip
    (folder / "sizes.csv").write_text("source,num_params,step,loss\n" + "\n".join(rows))
    return folder / "sizes.csv"


def test_other_models_stand_beside_sizes_after_as_many_prompts(tmp_path: Path) -> None:
    models = tmp_path / "models.csv"
    models.write_text("family,model,num_params,test_loss\nA,a,1e9,0.5\nB,b,2e9,0.4\nA,c,8e9,0.3\n")
    table = sizes_table(tmp_path)
    files = write_figures(table, tmp_path / "f", models=models)
    assert "models" in names(files) and "models" not in names(write_figures(table, tmp_path / "g"))

    class Axes:
        def __init__(self) -> None:
            self.drawn: dict[str, tuple[Any, Any]] = {}

        def plot(self, x: Any, y: Any, marker: str, *, color: str, label: str) -> None:
            self.drawn[label] = x, y

        def __getattr__(self, name: str) -> Any:
            return MagicMock(return_value=(1.0, 1e3))

    axes = Axes()
    _models(open_table(table), read_models(models)).panels[0][1](axes)
    assert axes.drawn["A"] == ((1e9, 8e9), (0.5, 0.3)) and axes.drawn["B"] == ((2e9,), (0.4,))
    x, y = axes.drawn["base, 25,600 prompts"]  # 50 steps of 512, where the smaller ends
    assert x == (1e9, 4e9)
    assert y == pytest.approx((0.9 - 0.048, 0.7 - 0.048))  # the mean of steps 46 to 50


@pytest.mark.parametrize(
    "text, said",
    [
        ("family,num_params,test_loss\n", "holds no model"),
        ("family,num_params\nA,1e9\n", "line 2 .* give the three in every line"),
        ("family,num_params,test_loss\nA,1e9,0.5\nA,large,0.5\n", "line 3 .*large"),
        ("family,num_params,test_loss\nA,1e9,0\n", "are above 0"),
    ],
)
def test_what_is_no_table_of_models(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "models.csv").write_text(text)
    with pytest.raises(ConfigError, match=said):
        write_figures(sizes_table(tmp_path), tmp_path / "f", models=tmp_path / "models.csv")
    with pytest.raises(ConfigError, match="is not a file"):
        write_figures(sizes_table(tmp_path), tmp_path / "f", models=tmp_path / "none.csv")


def test_the_models_of_the_paper_are_read() -> None:
    models = read_models(Path(__file__).resolve().parents[2] / "configs" / "scaling" / "paper_models.csv")
    assert {family: len(points) for family, points in models.items()} == {"Qwen3": 6, "Qwen3 MoE": 2, "GPT-OSS": 2}
    assert models["GPT-OSS"][1] == (120e9, 0.34)  # Table 4: pass@1 .660
