"""Intervals: they cover what they should, from steps and from runs, and are the same every time."""

import dataclasses

import numpy as np
import pytest
from laws import NOISE, SIZES, curve, paper_curves, paper_law

from rljax.config import ConfigError
from rljax.scaling.curves import Curve
from rljax.scaling.fit import Data, collect, solve
from rljax.scaling.forms import FORMS
from rljax.scaling.intervals import (
    _as_long_as,
    _runs,
    autocorrelation,
    block_length,
    blocks_of_residuals,
    bootstrap,
    interval,
    kept_by_blocks,
)

KN = FORMS["loglinear_kn"]
FAR = np.array([np.log10(4 * 105 * 512.0)])


def test_intervals_cover_the_truth() -> None:
    """Sixty trials of the benchmark's five hundred: chance alone leaves 51 hits or more of 60 in 997 of 1,000 cases."""
    truths = {"k_max": 0.14, "log_n0": np.log10(13e9), "loss": float(paper_law(72e9, 10 ** FAR[0]))}
    hits = dict.fromkeys(truths, 0)
    for trial in range(60):
        data = collect(paper_curves(np.random.default_rng(trial), steps=40), "samples")
        solution = solve(data, KN)
        draws = bootstrap(data, solution, draws=79, seed=trial)
        drawn = (draws.theta[:, 0], draws.theta[:, 1], draws.predict(FAR, np.array([6]))[:, 0])
        for (name, truth), values in zip(truths.items(), drawn, strict=True):
            low, high = interval(values)
            hits[name] += low <= truth <= high
    assert all(count >= 51 for count in hits.values()), hits


def test_the_width_is_that_of_the_spread_of_repeated_fits() -> None:
    """Not too wide either: half-widths within a quarter of 1.96 standard deviations over 80 experiments."""
    fits = [solve(collect(paper_curves(np.random.default_rng(t)), "samples"), KN).theta for t in range(80)]
    spread = np.std(fits, axis=0)
    data = collect(paper_curves(np.random.default_rng(99)), "samples")
    low, high = interval(bootstrap(data, solve(data, KN), draws=300).theta)
    np.testing.assert_allclose((high - low) / 3.92, spread, rtol=0.25)


def with_runs(rng: np.random.Generator, runs: int, offset: float) -> list[Curve]:
    """Each run has noise per step and an offset of its own, which no block of steps can see."""
    step = np.arange(1, 61)
    found = []
    for size, sigma in zip(SIZES, NOISE, strict=True):
        loss = paper_law(size, step * 512.0) + sigma * rng.standard_normal((runs, 60))
        loss = loss + offset * rng.standard_normal((runs, 1))
        mean = curve(size, step, loss.mean(axis=0))
        found.append(Curve(size, step, mean.x, mean.loss, loss))
    return found


def test_drawing_runs_sees_what_shifts_whole_runs() -> None:
    data = collect(with_runs(np.random.default_rng(0), 8, offset=0.02), "samples")
    solution = solve(data, KN)
    drawn = {over: bootstrap(data, solution, draws=100, over=over) for over in ("steps", "runs")}
    width = {over: np.subtract(*interval(d.predict(FAR, np.array([3]))[:, 0])[::-1]) for over, d in drawn.items()}
    assert width["runs"] > 1.5 * width["steps"]
    assert bootstrap(data, solution, draws=2).over == "runs"


def runs_alone(curves: list[np.ndarray]) -> Data:
    """Points of curves given by their runs [R, n]."""
    made = [curve(1e9 + i, np.arange(1, runs.shape[1] + 1), runs.mean(axis=0)) for i, runs in enumerate(curves)]
    return dataclasses.replace(collect(made, "samples"), runs=tuple(curves))


def test_the_spread_over_runs_is_that_of_all_sizes() -> None:
    """Of means of three runs each, s² / 3 of the pooled s², in units of each size's noise; times d / (d - 2), the
    variance of t."""
    rng = np.random.default_rng(0)
    noisy = [0.5 + 0.01 * rng.standard_normal((3, 30)) for _ in range(20)]
    noisy += [0.5 + 0.006 * rng.standard_normal((3, 50)) for _ in range(20)]
    noisy[0] = np.full((3, 30), 0.5)  # three runs that happen to agree
    draw = _runs(runs_alone(noisy))
    variance = np.var([draw(rng) for _ in range(1500)], axis=0)
    expected = 39 / 40 / 3 * 80 / 78
    assert variance[30 : 20 * 30].mean() == pytest.approx(expected * 0.01**2, rel=0.05)
    assert variance[20 * 30 :].mean() == pytest.approx(expected * 0.006**2, rel=0.05)
    assert variance[:30].mean() == pytest.approx(expected * (19 * 0.01**2 + 20 * 0.006**2) / 39, rel=0.1)


@pytest.mark.parametrize("sizes", [1, 7])
def test_three_runs_of_a_size_are_enough_to_cover_its_loss(sizes: int) -> None:
    """Runs that differ by an offset each: without what the small number costs, 81 % or less of intervals hold 0.5."""
    hits = []
    for trial in range(150):
        rng = np.random.default_rng(trial)
        draw = _runs(runs_alone([0.5 + 0.01 * rng.standard_normal((3, 1)) + np.zeros(2) for _ in range(sizes)]))
        low, high = interval(np.stack([draw(rng) for _ in range(99)]))
        hits += list((low[::2] <= 0.5) & (high[::2] >= 0.5))
    assert 0.9 <= np.mean(hits) <= 0.98


def test_curves_of_other_lengths_lend_their_spread() -> None:
    rng = np.random.default_rng(0)
    data = runs_alone([0.5 + 0.01 * rng.standard_normal((3, n)) for n in (20, 41)])
    drawn = np.stack([_runs(data)(rng) for _ in range(20)])
    assert drawn.shape == (20, 61) and np.isfinite(drawn).all()
    np.testing.assert_array_equal(_as_long_as(np.arange(5.0)[None], 3), [[0, 2, 4]])


def test_runs_that_stop_early_leave_the_mean() -> None:
    data = collect(with_runs(np.random.default_rng(0), 3, offset=0.0), "samples")
    short = tuple(np.where((np.arange(60) > 40) & (np.arange(3)[:, None] > 0), np.nan, runs) for runs in data.runs)
    data = type(data)(data.points, data.loss, data.weight, short)
    assert np.isfinite(bootstrap(data, solve(data, KN), draws=5, over="runs").theta).all()


def test_correlated_noise_asks_for_longer_blocks() -> None:
    rng = np.random.default_rng(0)
    white = rng.standard_normal(100)
    red = np.convolve(rng.standard_normal(120), np.ones(8), "valid")[:100]
    assert autocorrelation(white) == 0.0 and block_length(100, 0.0) == 1
    assert block_length(100, autocorrelation(red)) > 8
    assert autocorrelation(np.zeros(10)) == 0.0


@pytest.mark.parametrize("r", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_blocks_keep_the_covariance_within_them(length: int, r: float) -> None:
    """Against the covariances themselves, summed by blocks and over a series so long that its ends do not count."""
    apart = np.abs(np.subtract.outer(np.arange(2800), np.arange(2800)))
    of_series = np.power(r, apart)
    of_blocks = np.power(r, apart[:length, :length]).sum() * 2800 / length
    assert kept_by_blocks(length, r) == pytest.approx(of_blocks / of_series.sum(), rel=5e-3)


@pytest.mark.parametrize("r", [0.0, 0.5])
def test_drawn_noise_moves_a_mean_as_the_noise_did(r: float) -> None:
    """Residuals of 80 autocorrelated series: what their draws' means vary by is on average what the series' own did.

    Of slower noise a fit follows a part that no residual shows: at r = .8 the draws keep four fifths.
    """
    rng = np.random.default_rng(0)
    step, drawn = np.arange(1, 301), []
    for _ in range(80):
        noise = rng.standard_normal(300)
        for i in range(1, 300):
            noise[i] = r * noise[i - 1] + np.sqrt(1 - r**2) * noise[i]
        curves = [curve(size, step, paper_law(size, step * 512.0) + 0.008 * noise) for size in SIZES[:3]]
        data = collect(curves, "samples")
        draw = blocks_of_residuals(data, solve(data, KN), 1)
        drawn.append(np.var([draw(rng).mean() for _ in range(100)]))
    assert np.mean(drawn) == pytest.approx(0.008**2 * (1 + r) / (1 - r) / 300, rel=0.15)


@pytest.mark.parametrize("points", [3, 5, 8])
def test_few_points_that_hang_together_are_widened_not_narrowed(points: int) -> None:
    bend = 0.004 * np.cos(np.linspace(0, 2 * np.pi, points))  # the law cannot follow it
    step = np.arange(1, points + 1)
    data = collect([curve(size, step, paper_law(size, step * 512.0) + bend) for size in SIZES], "samples")
    solution = solve(data, KN)
    residuals = data.loss[:points] - solution.predict(data.points.log_x[:points], data.points.curve[:points])
    drawn = blocks_of_residuals(data, solution, 0)
    rng = np.random.default_rng(0)
    assert np.std([drawn(rng) for _ in range(200)]) > np.std(residuals)


def test_the_same_seed_gives_the_same_draws() -> None:
    data = collect(paper_curves(np.random.default_rng(0), steps=20), "samples")
    solution = solve(data, KN)
    first, second = (bootstrap(data, solution, draws=5, seed=3) for _ in range(2))
    assert first.theta.tobytes() == second.theta.tobytes()


def test_what_cannot_be_drawn_is_refused() -> None:
    data = collect(paper_curves(np.random.default_rng(0), steps=20), "samples")
    solution = solve(data, KN)
    with pytest.raises(ConfigError, match=r"a size has 1; 2 or more .* or draw steps"):
        bootstrap(data, solution, over="runs")
    with pytest.raises(ConfigError, match="draws = 1; an interval needs 2"):
        bootstrap(data, solution, draws=1)


def test_interval_ends_by_hand() -> None:
    """Of 39 draws the first and the last are the 2.5 and 97.5 % points: 1/40 of the law lies outside each."""
    low, high = interval(np.arange(1.0, 40.0))
    assert (low, high) == pytest.approx((1.0, 39.0))
