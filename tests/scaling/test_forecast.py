"""The forecast of a run's end: exact where the answer is known, calibrated on runs drawn from a law."""

import numpy as np
import pytest
from laws import paper_law
from scipy import stats

from rljax.config import ConfigError
from rljax.scaling import forecast as module
from rljax.scaling.forecast import MIN_POINTS, forecast, forecast_metrics, forecast_run


def test_a_power_law_without_noise_is_continued() -> None:
    step = np.arange(1, 21)
    made = forecast(step, paper_law(14e9, step * 512.0), 100)
    assert made.loss == pytest.approx(float(paper_law(14e9, 51200.0)), rel=1e-5)
    assert made.high - made.low < 1e-3


def test_without_bends_it_is_the_prediction_interval_of_a_regression(monkeypatch) -> None:
    """Textbook: y ± t s sqrt(1 + h), h = 1/n + (u - mean)² / sum of squares."""
    monkeypatch.setattr(module, "BENDS", np.array([1e-12]))
    rng = np.random.default_rng(0)
    step = np.arange(1, 31)
    u, y = np.log(step), -0.5 - 0.08 * np.log(step) + 0.02 * rng.standard_normal(30)
    made = forecast(step, np.exp(y), 100)
    line = stats.linregress(u, y)
    rest = y - line.intercept - line.slope * u
    spread = np.sqrt(rest @ rest / 28)
    at = np.log(100)
    half = stats.t.ppf(0.975, 28) * spread * np.sqrt(1 + 1 / 30 + (at - u.mean()) ** 2 / np.sum((u - u.mean()) ** 2))
    middle = line.intercept + line.slope * at
    assert [made.low, made.loss, made.high] == pytest.approx(
        [np.exp(middle - half), np.exp(middle), np.exp(middle + half)], rel=1e-6
    )


def test_intervals_hold_the_evaluation_to_come() -> None:
    """150 runs of a power law with noise: 95 % expected; fewer than 134 or all are chance once in a thousand."""
    held, step = 0, np.arange(1, 31)
    for trial in range(150):
        rng = np.random.default_rng(trial)
        made = forecast(step, paper_law(7e9, step * 512.0) + 0.01 * rng.standard_normal(30), 100)
        held += made.low <= float(paper_law(7e9, 51200.0)) + 0.01 * rng.standard_normal() <= made.high
    assert 134 <= held <= 149


def test_more_evaluations_narrow_the_interval() -> None:
    rng = np.random.default_rng(0)
    step = np.arange(1, 101)
    loss = paper_law(32e9, step * 512.0) + 0.01 * rng.standard_normal(100)
    widths = [(made := forecast(step[:n], loss[:n], 100)).high - made.low for n in (5, 20, 50, 90)]
    assert widths == sorted(widths, reverse=True)


def test_a_curve_that_bends_gets_a_wider_interval_than_a_line() -> None:
    step = np.arange(1, 41)
    noise = 0.003 * np.random.default_rng(0).standard_normal(40)
    straight = forecast(step, 0.9 * step**-0.05 + noise, 100)
    bent = forecast(step, 0.9 - 0.25 / (1 + (12 / step) ** 2) + noise, 100)
    assert bent.high - bent.low > 2 * (straight.high - straight.low)


def test_the_unit_of_x_does_not_matter() -> None:
    step = np.arange(1, 31)
    loss = paper_law(7e9, step * 512.0) + 0.01 * np.random.default_rng(0).standard_normal(30)
    first, second = forecast(step, loss, 100), forecast(step * 512.0 * 1e15, loss, 100 * 512.0 * 1e15)
    assert (first.loss, first.low, first.high) == pytest.approx((second.loss, second.low, second.high))


def test_many_points_are_averaged_without_changing_the_answer(monkeypatch) -> None:
    step = np.arange(1, 401)
    loss = paper_law(7e9, step * 512.0) + 0.01 * np.random.default_rng(0).standard_normal(400)
    thin = forecast(step, loss, 1000)
    monkeypatch.setattr(module, "MAX_POINTS", 400)
    full = forecast(step, loss, 1000)
    assert thin.loss == pytest.approx(full.loss, abs=2e-3)
    assert thin.high - thin.low == pytest.approx(full.high - full.low, rel=0.15)


def test_losses_stay_between_0_and_1() -> None:
    rng = np.random.default_rng(0)
    made = forecast([1, 2, 3, 4], 0.98 + 0.02 * rng.random(4), 1000)
    assert 0 <= made.low <= made.loss <= made.high <= 1
    made = forecast([1, 2, 3, 4, 5], [0.1, 0.0, 0.02, 0.0, 0.0], 6)
    assert 0 <= made.low < made.high
    assert forecast([1, 2, 3, 4], [0.0] * 4, 9).high == 1.0


@pytest.mark.parametrize(
    ("step", "at", "message"),
    [
        ([1, 2, 3], 9, r"3 evaluation\(s\) were given; a forecast takes 4"),
        ([0, 1, 2, 3], 9, "must be above 0 and ascend"),
        ([1, 2, 2, 3], 9, "must be above 0 and ascend"),
        ([1, 2, 3, 4], 3, "steps from 1 to 4 were given to forecast step 3"),
    ],
)
def test_what_cannot_be_forecast_is_refused(step, at, message) -> None:
    with pytest.raises(ConfigError, match=message):
        forecast(step, [0.5] * len(step), at)


def test_a_run_folder(tmp_path) -> None:
    assert forecast_run(tmp_path, 100) is None
    rows = [f"{step},{0.9 * max(step, 0.5) ** -0.05}\n" for step in range(MIN_POINTS + 1)]
    (tmp_path / "curves.csv").write_text("step,test_loss\n" + "".join(rows[:-1]))
    assert forecast_run(tmp_path, 100) is None  # step 0 does not count
    (tmp_path / "curves.csv").write_text("step,test_loss\n" + "".join(rows))
    made = forecast_run(tmp_path, 100)
    assert made is not None
    assert made.loss == pytest.approx(0.9 * 100**-0.05, rel=1e-4)
    assert forecast_metrics(tmp_path, 100)["forecast/final_test_loss_high"] == made.high
    assert forecast_metrics(tmp_path, MIN_POINTS) == {}  # the end has been evaluated
    with (tmp_path / "curves.csv").open("a") as file:
        file.write("50,0.")  # a killed process was writing it
    assert forecast_run(tmp_path, 100) == made
