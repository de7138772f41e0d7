"""Intervals: they cover what they should, from steps and from runs, and are the same every time."""

import numpy as np
import pytest
from laws import NOISE, SIZES, curve, paper_curves, paper_law

from rljax.config import ConfigError
from rljax.scaling.curves import Curve
from rljax.scaling.fit import collect, solve
from rljax.scaling.forms import FORMS
from rljax.scaling.intervals import _runs, block_length, bootstrap, interval

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


def test_the_spread_over_runs_is_widened_for_their_small_number() -> None:
    """Of three runs: the variance of their mean is s² / 3; drawing as they are would show two thirds of it."""
    rng = np.random.default_rng(0)
    runs = 0.5 + 0.01 * rng.standard_normal((3, 400))
    data = collect([curve(1e9, np.arange(1, 401), runs.mean(axis=0))], "samples")
    data = type(data)(data.points, data.loss, data.weight, (runs,))
    draw = _runs(data)
    drawn = np.stack([draw(rng) for _ in range(2000)])
    expected = runs.var(axis=0, ddof=1) / 3
    assert np.mean(drawn.var(axis=0)) == pytest.approx(np.mean(expected), rel=0.05)


def test_runs_that_stop_early_leave_the_mean() -> None:
    data = collect(with_runs(np.random.default_rng(0), 3, offset=0.0), "samples")
    short = tuple(np.where((np.arange(60) > 40) & (np.arange(3)[:, None] > 0), np.nan, runs) for runs in data.runs)
    data = type(data)(data.points, data.loss, data.weight, short)
    assert np.isfinite(bootstrap(data, solve(data, KN), draws=5, over="runs").theta).all()


def test_correlated_noise_asks_for_longer_blocks() -> None:
    rng = np.random.default_rng(0)
    white = rng.standard_normal(100)
    red = np.convolve(rng.standard_normal(120), np.ones(8), "valid")[:100]
    assert block_length(white) == 1
    assert block_length(red) > 8
    assert block_length(np.zeros(10)) == 1


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
