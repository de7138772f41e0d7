"""`rljax fit` and `rljax advise`: what they write, print and refuse."""

import csv
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from laws import paper_curves

from rljax.cli import main
from rljax.config import ConfigError
from rljax.scaling import command, fit, forms
from rljax.scaling.advise import Budget, advise, reuse_cost
from rljax.scaling.result import FIELDS, load_fit

COLUMNS = ("run", "source", "num_params", "step", "samples", "flops", "tokens", "test_loss", "repeats")


def write(path, curves, *, repeats=1, **fixed):
    """Curves as a table of ours."""
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, COLUMNS)
        out.writeheader()
        for one in curves:
            for i, step in enumerate(one.step):
                x = {name: one.x[name][i] for name in ("samples", "flops", "tokens")}
                row = {"run": "r", "source": "rljax", "num_params": one.key, "step": step, "test_loss": one.loss[i]}
                out.writerow({**row, **x, "repeats": repeats, **fixed})
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "curves.csv", paper_curves(np.random.default_rng(0), steps=40))
    return tmp_path


def fitted(*arguments: str) -> dict:
    assert main(["fit", "curves.csv", "--draws", "39", *arguments]) == 0
    with open("fit.json") as file:
        return json.load(file)


def test_fit_json_holds_its_fields(folder, capsys) -> None:
    found = fitted("--x", "samples")
    assert tuple(found) == FIELDS
    assert (found["form"], found["x"]) == ("loglinear_kn", "samples")
    assert found["params"]["k_max"] == pytest.approx(0.14, abs=0.02)
    assert found["params"]["n0"] == pytest.approx(13e9, rel=0.3)
    assert list(found["params"]["e"]) == [
        "500000000", "1500000000", "3000000000", "7000000000", "14000000000", "32000000000", "72000000000"
    ]  # fmt: skip
    for name in ("k_max", "n0"):
        low, high = found["intervals"][name]
        assert low < found["params"][name] < high
    low, high = found["intervals"]["e"]["72000000000"]
    assert low < found["params"]["e"]["72000000000"] < high
    assert found["r2"] > found["r2_baseline"] > 0.9
    entry = found["per_curve"][-1]
    assert (entry["num_params"], entry["n"], entry["role"], entry["runs"]) == (72e9, 40, "fitted", 1)
    assert entry["k_interval"][0] < entry["k"] < entry["k_interval"][1]
    assert (entry["samples_per_step"], entry["x_min"], entry["x_max"]) == (512, 512, 512 * 40)
    assert entry["flops_per_sample"] == pytest.approx(6 * 72e9 * 6e3)
    assert found["warnings"] == []
    printed = capsys.readouterr().out
    assert "a constant per curve 0.9" in printed
    assert "written: fit.json" in printed


def test_two_commands_write_the_same_bytes(folder) -> None:
    fitted()
    first = (folder / "fit.json").read_bytes()
    fitted()
    assert (folder / "fit.json").read_bytes() == first


@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_is_written_and_read_back(folder, form) -> None:
    fitted("--form", form, "--draws", "0")
    saved = load_fit("fit.json")
    data = json.loads((folder / "fit.json").read_text())
    curves = paper_curves(np.random.default_rng(0), steps=40)
    for i, (curve, entry) in enumerate(zip(curves, data["per_curve"], strict=True)):
        law = saved.solution.predict(np.log10(curve.x["flops"]), np.full(40, i))
        assert fit.rmse(curve.loss, law) == pytest.approx(entry["rmse"], rel=1e-6)


def test_intra_scores_what_was_held_out(folder, capsys) -> None:
    found = fitted("--protocol", "intra", "--drop-last", "20")
    assert [entry["n"] for entry in found["per_curve"]] == [20] * 7
    assert [entry["held_out"]["n"] for entry in found["per_curve"]] == [20] * 7
    assert "held-out" in capsys.readouterr().out


def test_inter_predicts_the_largest(folder, capsys) -> None:
    found = fitted("--protocol", "inter")
    assert len(found["params"]["e"]) == 6
    entry = found["per_curve"][-1]
    assert (entry["num_params"], entry["role"]) == (72e9, "predicted")
    assert entry["slope_only"]["r2"] > 0.8
    assert entry["strict"]["n"] == 30
    assert entry["final_interval"][0] < entry["final_loss"] < entry["final_interval"][1]
    assert "slope predicted, E from its first points alone" in capsys.readouterr().out


def test_a_warm_up_is_left_out_of_the_largest_too(folder) -> None:
    found = fitted("--protocol", "inter", "--first-step", "4", "--drop-last", "10")
    assert [entry["n"] for entry in found["per_curve"]] == [27] * 6 + [37]
    assert found["per_curve"][-1]["strict"]["n"] == 27


def test_a_curve_with_nothing_held_out_has_its_row(folder, capsys) -> None:
    curves = paper_curves(np.random.default_rng(0), steps=40)
    write(folder / "curves.csv", [curves[0].part(slice(0, 20)), *curves[1:]])
    found = fitted("--protocol", "intra", "--last-step", "20")
    assert found["per_curve"][0]["held_out"] is None
    assert found["per_curve"][1]["held_out"]["n"] == 20


def test_forms_are_compared_on_the_same_points(folder, capsys) -> None:
    fitted("--compare", "--draws", "0")
    printed = capsys.readouterr().out
    assert all(name in printed for name in forms.FORMS)


def test_one_size_falls_back_to_a_line_and_says_so(folder) -> None:
    found = fitted("--where", "num_params=7e9")
    assert found["form"] == "loglinear"
    assert found["warnings"][0] == "one curve has no law across curves: form loglinear was fitted"


def test_two_sizes_are_fitted_with_a_warning(folder) -> None:
    write(folder / "curves.csv", paper_curves(np.random.default_rng(0), steps=40, ladder=2))
    assert any("nothing checks the law" in warning for warning in fitted()["warnings"])


def test_a_small_ladder_does_not_determine_where_slopes_saturate(folder) -> None:
    """Sizes far below N0: the slope is proportional to N, and k_max and N0 come as a ratio only."""
    curves = [one for one in paper_curves(np.random.default_rng(0), steps=40) if one.key < 4e9]
    write(folder / "curves.csv", curves)
    assert any("N0" in warning or "n0" in warning for warning in fitted()["warnings"])


def test_a_table_without_flops_is_fitted_on_samples(folder) -> None:
    write(folder / "curves.csv", paper_curves(np.random.default_rng(0), steps=40), flops="")
    assert fitted()["x"] == "samples"


def test_intervals_from_few_runs_say_so(folder) -> None:
    for seed in range(3):
        write(folder / f"{seed}.csv", paper_curves(np.random.default_rng(seed), steps=20), run=f"r{seed}")
    assert main(["fit", "0.csv", "1.csv", "2.csv", "--draws", "39"]) == 0
    found = json.loads((folder / "fit.json").read_text())
    assert found["intervals"]["over"] == "runs"
    assert not any("as far apart" in warning for warning in found["warnings"])
    assert [entry["runs"] for entry in found["per_curve"]] == [3] * 7


def test_runs_of_one_size_further_apart_than_the_others_are_said(folder) -> None:
    """Their spreads are pooled, so one that is unlike the others must not go unseen."""
    for seed in range(3):
        curves = paper_curves(np.random.default_rng(seed), steps=40)
        shifted = dataclasses.replace(curves[3], loss=curves[3].loss + 0.1 * (seed - 1))
        write(folder / f"{seed}.csv", [*curves[:3], shifted, *curves[4:]], run=f"r{seed}")
    assert main(["fit", "0.csv", "1.csv", "2.csv", "--draws", "9"]) == 0
    found = json.loads((folder / "fit.json").read_text())["warnings"]
    assert [warning[:66] for warning in found if "as far apart" in warning] == [
        "the runs of num_params 7000000000 are more than 3 times as far apa"
    ]


def test_notes_of_the_table_are_warnings_of_the_fit(folder) -> None:
    with (folder / "curves.csv").open("a") as file:
        file.write("r,rljax,5e8,41,20992,1e17,1e8,,1\n")
    assert "1 rows without a loss were left out" in fitted()["warnings"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "none.csv is not a file"),
        (["curves.csv", "--protocol", "intra"], "give --preset base, --preset instruct, --drop-last N"),
        (["curves.csv", "--where", "source"], "COLUMN=VALUE is required"),
        (["curves.csv", "--form", "loglinear_kn", "--where", "num_params=7e9"], "needs 2 or more"),
        (["curves.csv", "--form", "cubic"], "invalid choice: 'cubic'"),
        (["curves.csv", "--output", "nowhere/fit.json"], "its folder is not there"),
        (["curves.csv", "--drop-last", "-3"], "has a negative number"),
        (["curves.csv", "--drop-last", "40"], "leaves none to fit"),
        (["curves.csv", "--resample", "runs"], "train with more seeds, or draw steps"),
        ([], "the following arguments are required"),
    ],
)
def test_what_cannot_be_fitted_is_refused(folder, capsys, arguments, message) -> None:
    assert main(["fit", *arguments]) == 64
    assert message in capsys.readouterr().err


def test_names_known_without_numpy_are_the_real_ones() -> None:
    assert set(command.FORM_NAMES) == set(forms.FORMS)
    assert command.RESOURCES == fit.RESOURCES


@pytest.mark.parametrize("name", ["fit", "advise"])
def test_help_imports_nothing_heavy(name) -> None:
    code = (
        f"import sys\nfrom rljax.cli import main\nassert main(['{name}', '--help']) == 0\n"
        "assert not {'scipy', 'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# -------------------------------------------------------------------------------------------------------------- advise


def test_advice_is_the_least_loss_of_the_law(folder, capsys) -> None:
    fitted()
    saved = load_fit("fit.json")
    found = advise(saved, Budget.parse("1e18"), unique=1000)
    by_hand = [10 ** (np.log10(s) - e["k"] * 18) for s, e in zip(saved.solution.scale, saved.curves, strict=True)]
    assert [option.loss for option in found.options] == pytest.approx(by_hand)
    assert found.best is found.options[int(np.argmin(by_hand))]
    assert found.best.interval is not None
    assert found.best.interval[0] < found.best.loss < found.best.interval[1]
    cost = 6 * found.best.size * 6e3
    assert found.best.prompts == pytest.approx(1e18 / cost)
    assert found.best.steps == max(int(1e18 / cost / 512), 1)
    assert found.best.repeats == int(np.ceil(1e18 / cost / 1000))
    assert main(["advise", "--budget", "1e18", "--unique", "1000"]) == 0
    assert "advice: size" in capsys.readouterr().out


def test_beyond_the_curves_it_says_so(folder, capsys) -> None:
    fitted("--x", "samples")
    assert main(["advise", "--budget", "500000prompts", "--unique", "1000"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "this is outside the measured range: samples 512 to 2.05e+04" in printed
    assert "500 is beyond: find 20,000 unique prompts or more" in printed
    assert main(["advise", "--budget", "20000prompts", "--unique", "20000"]) == 0
    assert "outside the measured range" not in capsys.readouterr().out


def test_prompts_and_flops_agree(folder) -> None:
    """The same training, said in prompts or in FLOPs, has the same loss."""
    fitted("--x", "samples")
    saved = load_fit("fit.json")
    prompts = advise(saved, Budget.parse("10000prompts"), unique=10).options[2]
    flops = advise(saved, Budget.parse(str(prompts.flops)), unique=10).options[2]
    assert flops.loss == pytest.approx(prompts.loss)
    assert (flops.steps, flops.repeats) == (prompts.steps, prompts.repeats) == (19, 1000)


def test_the_cost_of_repeats(folder) -> None:
    curves = paper_curves(np.random.default_rng(0), steps=40, ladder=3)
    for one, repeats in zip(curves, (100, 10, 1), strict=True):  # the largest has the least loss
        write(folder / f"{repeats}.csv", [one], repeats=repeats, num_params=7e9)
    files = [f"{repeats}.csv" for repeats in (1, 10, 100)]
    assert main(["fit", *files, "--by", "repeats", "--x", "step", "--draws", "39", "--output", "reuse.json"]) == 0
    saved = load_fit("reuse.json")
    assert saved.form == "loglinear"
    (line,) = reuse_cost(saved, 80, 30)
    assert line.startswith("repeats: 100, the nearest of 1, 10, 100 measured, against 1: test loss +0.")
    assert "outside the measured range: repeats 1 to 100, steps 1 to 40" in reuse_cost(saved, 500, 30)[1]
    assert "outside the measured range" in reuse_cost(saved, 80, 41)[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2e19", (2e19, "flops")), ("2e19flops", (2e19, "flops")), ("50,000 prompts", (5e4, "prompts"))],
)
def test_budgets(text, expected) -> None:
    found = Budget.parse(text)
    assert (found.amount, found.unit) == expected


@pytest.mark.parametrize("text", ["much", "0", "-1e18", "inf", "nan", "prompts"])
def test_amounts_that_are_none(text) -> None:
    with pytest.raises(ConfigError, match="is no amount above 0"):
        Budget.parse(text)


def damaged(change) -> str:
    """fit.json after `change`, as text."""
    with open("fit.json") as file:
        whole = json.load(file)
    change(whole)
    return json.dumps(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda fit: fit.update(form="cubic"),
        lambda fit: fit.update(form=[]),
        lambda fit: fit.update(per_curve=[]),
        lambda fit: fit.update(per_curve=["fitted"]),
        lambda fit: fit.update(intervals=None),
        lambda fit: fit["params"].pop("k_max"),
        lambda fit: fit["params"].update(n0=-1.0),
        lambda fit: fit["params"].update(n0=None),
        lambda fit: fit["params"]["e"].pop("7000000000"),
        lambda fit: fit["per_curve"][0].pop("role"),
        lambda fit: fit["per_curve"][0].pop("num_params"),
        lambda fit: fit["per_curve"][3].pop("x_max"),
        lambda fit: fit["intervals"]["draws"].pop("scale"),
        lambda fit: fit["intervals"]["draws"]["theta"].pop(),
        lambda fit: fit["intervals"].update(level="high"),
    ],
)
def test_a_damaged_fit_is_refused(folder, change) -> None:
    fitted("--x", "samples", "--draws", "2")
    text = damaged(change)
    (folder / "fit.json").write_text(text)
    with pytest.raises(ConfigError, match=r"fit.json cannot be read as a fit \(.*; give the fit.json of `rljax fit`"):
        load_fit("fit.json")


def test_what_tells_the_curves_apart_is_found_wherever_it_stands(folder) -> None:
    fitted("--x", "samples")
    text = damaged(lambda fit: fit.update(per_curve=[dict(reversed(entry.items())) for entry in fit["per_curve"]]))
    (folder / "fit.json").write_text(text)
    assert load_fit("fit.json").by == "num_params"


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", "{}", '"fit"'])
def test_json_that_is_no_fit_is_refused(tmp_path, text) -> None:
    (tmp_path / "fit.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot be read as a fit"):
        load_fit(tmp_path / "fit.json")


def test_fits_that_give_no_advice(folder, capsys) -> None:
    assert main(["advise", "--budget", "1e18", "--unique", "10"]) == 64
    assert "cannot be read as a fit (FileNotFoundError" in capsys.readouterr().err
    (folder / "fit.json").write_text("{}")
    assert main(["advise", "--budget", "1e18", "--unique", "10"]) == 64
    assert "has no form, x, params" in capsys.readouterr().err
    fitted("--x", "tokens", "--draws", "0")
    assert main(["advise", "--budget", "1e18", "--unique", "10"]) == 64
    assert "advice takes one by num_params on flops or samples" in capsys.readouterr().err
    write(folder / "curves.csv", paper_curves(np.random.default_rng(0), steps=40), flops="")
    fitted("--draws", "0")
    assert main(["advise", "--budget", "1e18", "--unique", "10"]) == 64
    assert "do not say what a prompt costs at size 500000000" in capsys.readouterr().err
    assert main(["advise", "--budget", "1000prompts", "--unique", "10"]) == 0
    assert main(["advise", "--budget", "1000prompts", "--unique", "0"]) == 64
