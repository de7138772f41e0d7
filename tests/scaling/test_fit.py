"""The laws against finite differences and known answers; the paper's Table 6 from the paper's curves."""

import numpy as np
import pytest
from laws import SIZES, curve, paper_curves, paper_law, slope

from rljax.config import ConfigError
from rljax.scaling.curves import Curve, read_curves
from rljax.scaling.fit import (
    WEIGHTS,
    Data,
    _Problem,
    aicc,
    collect,
    constant_baseline,
    layout,
    parameters_of,
    r_squared,
    solve,
)
from rljax.scaling.forms import FORMS, Points

BILLION = 1e9


@pytest.fixture(scope="module")
def paper(shared_data) -> list[Curve]:
    curves, notes = read_curves(shared_data / "paper_curves" / "holdout.csv", where={"source": "base"})
    assert notes == []
    return curves


def inter(curves: list[Curve]) -> list[Curve]:
    return [one for one in curves if one.key < 50 * BILLION]


def intra(curves: list[Curve]) -> list[Curve]:
    return [one.part(slice(0, len(one) - 80)) for one in curves]


def everything(curves: list[Curve]) -> list[Curve]:
    return curves


@pytest.mark.parametrize(
    ("part", "x", "n", "k_max", "n0", "r2"),
    [
        (inter, "flops", 629, 0.1518, 17.37, 0.9944),
        (inter, "samples", 629, 0.1631, 16.95, 0.9947),
        (intra, "flops", 172, 0.1349, 13.09, 0.9955),
        (intra, "samples", 172, 0.1348, 11.52, 0.9953),
        (everything, "flops", 732, 0.1330, 13.77, 0.9955),
        (everything, "samples", 732, 0.1399, 13.0, 0.9957),
    ],
)
def test_table_6_of_the_paper(paper, part, x, n, k_max, n0, r2) -> None:
    data = collect(part(paper), x)
    assert len(data.loss) == n
    solution = solve(data, FORMS["loglinear_kn"])
    found = parameters_of(solution)
    assert found["k_max"] == pytest.approx(k_max, abs=6e-5)  # all printed digits
    assert found["n0"] / BILLION == pytest.approx(n0, abs=1e-2)
    assert r_squared(data.loss, solution.predict(data.points.log_x, data.points.curve)) == pytest.approx(r2, abs=6e-5)
    assert solution.at_bound == ()


def test_the_error_is_the_one_the_paper_minimised(paper) -> None:
    """Its history file says 1.487e-4 for base C on all points; the curves are read off figures."""
    assert solve(collect(paper, "flops"), FORMS["loglinear_kn"]).cost == pytest.approx(1.487e-4, rel=5e-3)


def test_a_constant_per_size_scores_nearly_as_high(paper) -> None:
    assert constant_baseline(collect(paper, "samples")) == pytest.approx(0.953, abs=1e-3)


def test_slopes_of_the_paper_without_a_law_of_sizes(paper) -> None:
    """Section 10.2 of the specification: free slopes per size on C."""
    found = parameters_of(solve(collect(paper, "flops"), FORMS["loglinear"]))
    assert list(found["k"].values()) == pytest.approx(
        [0.0068, 0.0286, 0.0169, 0.0416, 0.0674, 0.0994, 0.1070], abs=6e-4
    )


# ---------------------------------------------------------------------------------------------------------- derivatives


def small_data() -> Data:
    rng = np.random.default_rng(0)
    curves = [one.part(slice(None, None, 7)) for one in paper_curves(rng, steps=50, ladder=4)]
    return collect(curves, "samples")


def some_theta(name: str, data: Data, rng: np.random.Generator) -> np.ndarray:
    """Well inside the bounds, near a start: every parameter another value."""
    theta = []
    for parameter, _ in layout(FORMS[name], data.num_curves):
        low, high = parameter.bounds(data.points)
        start = parameter.starts(data.points)[0]
        theta.append(np.clip(start + 0.1 * rng.standard_normal() * max(abs(start), 0.1), low + 1e-3, high - 1e-3))
    return np.array(theta)


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    data, rng = small_data(), np.random.default_rng(1)
    problem = _Problem(data, FORMS[name])
    theta = some_theta(name, data, rng)
    analytic = problem.jacobian(theta)
    assert analytic.shape == (len(data.loss), len(theta))
    for i in range(len(theta)):
        h = 1e-6 * max(abs(theta[i]), 1.0)
        up, down = theta.copy(), theta.copy()
        up[i] += h
        down[i] -= h
        numeric = (problem.residuals(up) - problem.residuals(down)) / (2 * h)
        np.testing.assert_allclose(analytic[:, i], numeric, rtol=1e-5, atol=1e-7 * np.abs(analytic).max())


def test_the_scale_is_the_best_one() -> None:
    """The projected scales leave weighted residuals orthogonal to the basis, curve by curve."""
    data = small_data()
    solution = solve(data, FORMS["loglinear_kn"])
    residual = solution.predict(data.points.log_x, data.points.curve) - data.loss
    basis = FORMS["loglinear_kn"].evaluate(solution.theta, data.points).basis
    for i in range(data.num_curves):
        mine = data.points.curve == i
        assert abs(np.sum((data.weight * residual * basis)[mine])) < 1e-12


# --------------------------------------------------------------------------------------------------------- known truth

TRUTH = {
    "loglinear": np.array([0.02, 0.05, 0.08, 0.12]),
    "loglinear_kn": np.array([0.14, 10.1]),
    "loglinear_kn_e0": np.array([0.14, 10.1, 0.3, 9.9]),
    "loglinear_kn_floor": np.array([0.3, 10.1, 0.25]),
    "invexp": np.array([1.5, 0.02, 0.05, 0.08, 0.12]),
    "powlaw": np.array([0.2, 9.4, 1.5, 0.7, 0.3]),
    "powlawmul": np.array([0.14, 10.1, 8.0, -0.6]),
    "postopenai": np.array([9.2, 0.8, 0.3, 2.2, 2.0, 1.8, 1.5, 3.2, 3.0, 2.9, 3.1]),
    "decomposition": np.array([0.1, 9.0, 0.5, 0.9, 3.7, 3.6, 3.4, 3.5]),
    "sigmoid": np.array([3.6, 3.5, 3.4, 3.3, 0.8, 1.0, 1.2, 1.4, 0.6, 0.5, 0.4, 0.3]),
}
SCALE = np.array([0.99, 1.05, 1.15, 1.3])


@pytest.mark.parametrize("name", FORMS)
def test_a_law_without_noise_is_found(name: str) -> None:
    """Predictions to 1e-5 for all; the parameters where the law is not flat in them."""
    form, steps, sizes = FORMS[name], np.arange(1, 101), SIZES[-4:]
    points = Points(np.tile(np.log10(steps * 512.0), 4), np.repeat(np.arange(4), 100), sizes)
    scale = {"lambda": SCALE / 5, "l0": np.array([0.9, 0.8, 0.7, 0.6])}.get(form.scale or "", SCALE)
    parts = form.evaluate(TRUTH[name], points)
    loss = parts.offset + (0 if parts.basis is None else scale[points.curve] * parts.basis)
    curves = [curve(n, steps, loss[i * 100 : (i + 1) * 100]) for i, n in enumerate(sizes)]
    data = collect(curves, "samples")
    solution = solve(data, form)
    predicted = solution.predict(points.log_x, points.curve)
    np.testing.assert_allclose(predicted, loss, atol=1e-5)
    if name not in ("powlaw", "powlawmul", "postopenai", "decomposition"):  # valleys: far from it and as good
        np.testing.assert_allclose(solution.theta, TRUTH[name], rtol=1e-3)


def test_weights_make_sizes_count_alike() -> None:
    """A short curve weighs as much as a long one by `size`, and less by `point`."""
    rng = np.random.default_rng(0)
    long, short = paper_curves(rng, ladder=2)
    data = collect([long, short.part(slice(0, 20))], "samples", "size")
    sums = np.bincount(data.points.curve, data.weight)
    assert sums[0] == pytest.approx(sums[1])
    data = collect([long, short.part(slice(0, 20))], "samples", "point")
    np.testing.assert_array_equal(data.weight, 1.0)
    assert set(WEIGHTS) == {"size", "point", "relative", "binomial"}


def test_two_fits_are_the_same_to_the_bit() -> None:
    data = small_data()
    first, second = solve(data, FORMS["loglinear_kn"]), solve(data, FORMS["loglinear_kn"])
    assert first.theta.tobytes() == second.theta.tobytes()
    assert first.scale.tobytes() == second.scale.tobytes()


def test_units_do_not_matter() -> None:
    """Sizes and X a million times smaller give the same slopes: nothing is tied to the paper's scale."""
    curves = paper_curves(np.random.default_rng(0))
    tiny = [Curve(c.key / 1e6, c.step, {k: v / 1e6 for k, v in c.x.items()}, c.loss, c.runs) for c in curves]
    big, small = (parameters_of(solve(collect(c, "flops"), FORMS["loglinear_kn"])) for c in (curves, tiny))
    assert small["k_max"] == pytest.approx(big["k_max"], rel=1e-6)
    assert small["n0"] * 1e6 == pytest.approx(big["n0"], rel=1e-6)


def test_one_size_has_no_law_of_sizes() -> None:
    (only,) = paper_curves(np.random.default_rng(0), ladder=1)
    with pytest.raises(ConfigError, match=r"1 size\(s\) were given .* needs 2 or more; .*--form loglinear"):
        solve(collect([only], "samples"), FORMS["loglinear_kn"])
    assert 0.05 < parameters_of(solve(collect([only], "samples"), FORMS["loglinear"]))["k"]["72000000000"] < 0.2


def test_too_few_points_are_refused() -> None:
    curves = paper_curves(np.random.default_rng(0), steps=1)
    with pytest.raises(ConfigError, match=r"has 1 point\(s\)"):
        solve(collect(curves, "samples"), FORMS["loglinear_kn"])


def test_an_x_that_is_not_there_is_named() -> None:
    (only,) = paper_curves(np.random.default_rng(0), ladder=1)
    empty = Curve(only.key, only.step, {**only.x, "flops": np.full(len(only), np.nan)}, only.loss, only.runs)
    with pytest.raises(ConfigError, match="none with flops above 0"):
        collect([empty], "flops")


def test_aicc_by_hand() -> None:
    """Residuals 1, -1, 1, -1, 1 with one parameter: n ln 1 + 2 * 2 + 12 / 2."""
    assert aicc(np.array([1.0, -1, 1, -1, 1]), np.zeros(5), 1) == pytest.approx(4 + 2 * 2 * 3 / 2)


def test_the_synthetic_ladder_is_what_it_says() -> None:
    curves = paper_curves(np.random.default_rng(0), noise=0.0)
    found = parameters_of(solve(collect(curves, "samples"), FORMS["loglinear_kn"]))
    assert found["k_max"] == pytest.approx(0.14, rel=1e-6)
    assert found["n0"] == pytest.approx(13e9, rel=1e-6)
    assert curves[0].loss[-1] == pytest.approx(paper_law(5e8, 105 * 512.0))
    assert slope(13e9) == pytest.approx(0.07)
