"""Curves tables: both schemas, and what is wrong with a table said in words that help."""

import numpy as np
import pytest

from rljax.config import ConfigError
from rljax.run_log import CURVE_COLUMNS
from rljax.scaling.curves import MEASURED, read_curves

OURS = "run,source,num_params,step,samples,flops,tokens,test_loss,unique,repeats,group_size,eval,seed\n"


def table(tmp_path, text: str, name: str = "curves.csv"):
    file = tmp_path / name
    file.write_text(text)
    return file


def test_our_schema(tmp_path) -> None:
    rows = "".join(
        f"r{seed},rljax,1e6,{step},{step * 8},{step * 1e9},{step * 100},{0.9 - 0.1 * step + 0.02 * seed}"
        f",64,1,4,e,{seed}\n"
        for seed in (0, 1)
        for step in (0, 1, 2)
    )
    (curve,), notes = read_curves(table(tmp_path, OURS + rows))
    assert (curve.key, curve.step.tolist(), notes) == (1e6, [1, 2], [])  # step 0 has no logarithm
    np.testing.assert_allclose(curve.loss, [0.81, 0.71])  # the mean over both runs
    np.testing.assert_allclose(curve.runs, [[0.8, 0.7], [0.82, 0.72]])
    np.testing.assert_allclose(curve.x["flops"], [1e9, 2e9])
    np.testing.assert_allclose(curve.x["samples"], [8, 16])


def test_the_papers_schema(tmp_path) -> None:
    text = "source,size_b,step,flops_cum,loss_mean\nbase,0.5,1,1.5e16,0.98\nbase,0.5,2,3e16,0.97\nbase,7,1,2e17,0.87\n"
    (small, large), _ = read_curves(table(tmp_path, text))
    assert (small.key, large.key) == (0.5e9, 7e9)
    np.testing.assert_allclose(small.x["samples"], [512, 1024])
    assert np.isnan(small.x["tokens"]).all()


def test_reuse_and_group_size_tables(tmp_path) -> None:
    text = "source,tau,step,loss\nbase,1,10,0.76\nbase,25,10,0.77\n"
    assert [curve.key for curve in read_curves(table(tmp_path, text), by="repeats")[0]] == [1, 25]
    text = "source,rollout_n,step,flops_cum,loss\nbase,4,10,7e17,0.74\nbase,8,10,1e18,0.75\n"
    assert [curve.key for curve in read_curves(table(tmp_path, text), by="group_size")[0]] == [4, 8]


def test_the_real_tables(shared_data) -> None:
    folder = shared_data / "paper_curves"
    curves, notes = read_curves(folder / "holdout.csv")
    assert ([len(curve) for curve in curves], notes) == ([105] * 5 + [104, 103], [])
    curves, _ = read_curves(folder / "evals.csv", where={"source": "instruct", "eval": "gsm8k"})
    assert curves[0].step[0] == 5
    assert len(read_curves(folder / "data_reuse.csv", by="repeats")[0]) == 7
    assert len(read_curves(folder / "rollout_n.csv", by="group_size", where={"source": "instruct"})[0]) == 4


def test_a_repeated_step_keeps_its_last_row_and_says_so(tmp_path) -> None:
    text = "num_params,step,samples,test_loss\n1e6,1,8,0.9\n1e6,1,8,0.7\n1e6,2,16,0.6\n"
    (curve,), notes = read_curves(table(tmp_path, text))
    np.testing.assert_allclose(curve.loss, [0.7, 0.6])
    assert notes == ["num_params 1e+06: 1 rows repeat a step of their run; the last of each was kept"]


def test_missing_losses_are_left_out_and_counted(tmp_path) -> None:
    text = "num_params,step,samples,test_loss\n1e6,1,8,\n1e6,2,16,nan\n1e6,3,24,0.6\n"
    (curve,), notes = read_curves(table(tmp_path, text))
    assert (curve.step.tolist(), notes) == ([3], ["2 rows without a loss were left out"])


def test_runs_of_different_length_are_averaged_over_what_is_there(tmp_path) -> None:
    text = "run,num_params,step,flops,test_loss\na,1e6,1,10,0.9\na,1e6,2,20,0.8\nb,1e6,1,12,0.7\n"
    (curve,), _ = read_curves(table(tmp_path, text))
    np.testing.assert_allclose(curve.loss, [0.8, 0.8])
    np.testing.assert_allclose(curve.x["flops"], [11, 20])
    np.testing.assert_array_equal(np.isfinite(curve.runs), [[True, True], [True, False]])


def test_order_of_rows_spaces_and_a_byte_order_mark_do_not_matter(tmp_path) -> None:
    text = "\ufeffnum_params, step , test_loss\n2e6, 2, 0.5\n1e6,3,0.8\n2e6,1,0.6\n"
    small, large = read_curves(table(tmp_path, text))[0]
    assert (small.key, large.key, large.step.tolist()) == (1e6, 2e6, [1, 2])


def test_our_table_without_samples_has_none(tmp_path) -> None:
    """512 prompts a step are the paper's, not everybody's."""
    (curve,), _ = read_curves(table(tmp_path, "num_params,step,test_loss\n1e6,1,0.9\n"))
    assert np.isnan(curve.x["samples"]).all()


def test_several_files_are_one_table(tmp_path) -> None:
    head = "num_params,step,test_loss\n"
    files = [table(tmp_path, head + "1e6,1,0.9\n", "a.csv"), table(tmp_path, head + "2e6,1,0.8\n", "b.csv")]
    assert len(read_curves(files)[0]) == 2


SWEEP = "run,num_params,step,test_loss,repeats,unique,group_size,order,seed,data.seed,num_total_params,lr\n"


def swept(*runs: str) -> str:
    """A table of runs of one step each: 0.9, 0.8, ..."""
    rows = [f"r{i},1e6,1,{0.9 - 0.1 * i:g},{run}\n" for i, run in enumerate(runs)]
    return SWEEP + "".join(rows)


def test_runs_that_differ_in_seeds_alone_are_averaged(tmp_path) -> None:
    (curve,), _ = read_curves(table(tmp_path, swept("1,64,8,file,0,0,9,1e-4", "1,64,8,file,1,7,9,1e-4")))
    assert (len(curve.runs), curve.loss.tolist()) == (2, pytest.approx([0.85]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("1,64,8,shuffle,1,0,9,1e-4", r"mixes order file, shuffle at num_params 1e\+06; choose .* --where order=file"),
        ("1,32,8,file,1,0,9,1e-4", "mixes unique 32, 64 .* --where unique=32$"),
        ("1,64,8,file,1,0,9,3e-4", "mixes lr 1e-4, 3e-4 .* --where lr=1e-4, or leave the column out if it"),
        ("1,64,8,file,1,0,9,", r"mixes lr \(empty\), 1e-4 .* --where lr=1e-4"),
        ("1,64,8,file,1,0,8,1e-4", "mixes num_total_params 8, 9"),
        ("2,64,8,shuffle,1,0,9,1e-4", "mixes repeats 1, 2 .* --by repeats"),  # what we know best first
    ],
)
def test_runs_of_other_settings_are_not_averaged(tmp_path, other, message) -> None:
    with pytest.raises(ConfigError, match=message):
        read_curves(table(tmp_path, swept("1,64,8,file,0,0,9,1e-4", other)))


@pytest.mark.parametrize(
    "where", [{"order": "shuffle"}, {"unique": "3.2e1"}, {"lr": "0.0003"}, {"run": "r1"}, {"num_total_params": "8"}]
)
def test_any_column_of_the_table_chooses(tmp_path, where) -> None:
    (curve,), _ = read_curves(
        table(tmp_path, swept("1,64,8,file,0,0,9,1e-4", "1,32,8,shuffle,1,0,8,3e-4")), where=where
    )
    assert curve.loss.tolist() == [0.8]


def test_the_papers_columns_choose_by_their_own_names(tmp_path) -> None:
    text = "source,tau,step,loss\nbase,1,10,0.76\nbase,25,10,0.77\n"
    (curve,), _ = read_curves(table(tmp_path, text), by="repeats", where={"tau": "25"})
    assert curve.key == 25


def test_every_column_of_a_run_is_measured_or_a_setting_on_purpose() -> None:
    """A new column of curves.csv must be put on one side or the other."""
    size = {"num_params", "num_non_embedding_params", "num_total_params"}
    settings = size | {"unique", "repeats", "group_size", "order"}
    assert set(CURVE_COLUMNS) - MEASURED == settings | {"run", "source", "eval", "seed"}


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("size_b,step,flops_cum\n1,1,2\n", {}, "no test_loss or loss_mean or loss"),
        ("step,test_loss\n1,0.5\n", {}, "no num_params or size_b"),
        ("", {}, r"the columns \(none\)"),
        ("num_params,step,test_loss\n1e6,one,0.5\n", {}, r"curves.csv:2: step is 'one'"),
        ("num_params,step,test_loss\n", {}, "0 rows and none with a finite test_loss"),
        ("num_params,step,test_loss\n1e6,0,0.5\n", {}, "1 rows and none with"),
        ("num_params,step,test_loss\n,1,0.5\n", {}, "1 rows whose num_params is nan"),
        ("num_params,step,test_loss\n1e6,1,97.8\n", {}, "a test loss is 1 - pass@1"),
        ("source,num_params,step,test_loss\na,1,1,.5\nb,1,1,.5\n", {}, "the sources a, b, .*--where source=a"),
        ("eval,num_params,step,test_loss\na,1,1,.5\nb,1,1,.5\n", {}, "the evals a, b, .*--where eval=a"),
        ("num_params,repeats,step,test_loss\n1,1,1,.5\n1,25,1,.5\n", {}, "mixes repeats 1, 25 .*--by repeats"),
        ("num_params,step,test_loss\n1,1,.5\n", {"source": "base"}, r"no row .* source = base; it holds \(empty\)"),
        ("num_params,step,test_loss\n1,1,.5\n", {"colour": "red"}, "no such column"),
        ("num_params,step,test_loss\n1,1,.5\n", {"repeats": "few"}, "compared with a number"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, text, where, message) -> None:
    with pytest.raises(ConfigError, match=message):
        read_curves(table(tmp_path, text), where=where)


def test_an_absent_file(tmp_path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        read_curves(tmp_path / "none.csv")
