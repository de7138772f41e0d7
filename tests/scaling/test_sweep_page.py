"""The page of a sweep: laws, figures and runs of its table, and nothing that is fetched or run."""

import base64
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rljax.config import ConfigError
from rljax.scaling.sweep_page import _cell, _runs, write_sweep_report

COLUMNS = "run,source,size,num_params,step,samples,flops,test_loss,repeats,group_size,seed,accelerator_seconds"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a sweep folder with four sizes and two seeds; one run's completions hold HTML."""
    folder = tmp_path_factory.mktemp("ladder")
    rng = np.random.default_rng(0)
    lines = [COLUMNS]
    for size in (1e6, 3e6, 1e7, 3e7):
        for seed in range(2):
            for step in range(0, 41):
                loss = 0.9 * max(step, 1) ** (-0.2 * size / (size + 5e6)) + rng.normal(0, 0.004)
                row = (f"r{size:g}-{seed}", "base", f"{size:g}", size, step, 8 * step, size * 6e3 * step, loss, 1, 4)
                lines.append(",".join(map(str, (*row, seed, 0.5 * step))))
    (folder / "curves.csv").write_text("\n".join(lines) + "\n")
    rollouts = folder / "runs" / "r1" / "rollouts"
    rollouts.mkdir(parents=True)
    for step in (1, 40):
        row = f'{{"prompt": "p{step}", "completion": "<script>alert({step})</script>", "reward": 1.0}}\n'
        (rollouts / f"step_{step:06d}.jsonl").write_text(row)
    assert write_sweep_report(folder) == folder / "report.html"
    assert (folder / "figures" / "law_flops-base.png").is_file()
    return (folder / "report.html").read_text()


def test_laws_with_intervals_and_baseline(page: str) -> None:
    rows = re.findall(r"<td>base (flops|samples)</td><td>([\d.]+) \(([\d.]+) to ([\d.]+)\)</td>", page)
    assert [row[0] for row in rows] == ["flops", "samples"]
    for _, value, low, high in rows:
        assert float(low) < 0.2 < float(high) and float(low) < float(value) < float(high)
    assert "R² of a constant per size" in page


def test_every_figure_is_in_the_page_and_drawn_by_vectors(page: str) -> None:
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == 9  # law, inter, intra, slopes over two resources, and intervals
    assert all(b"<svg" in base64.b64decode(image) for image in images)
    captions = re.findall(r"<figcaption><span>([^<]+)", page)
    assert len(set(captions)) == 9 and "Slope K(N), data size, base" in captions


def test_runs_with_what_they_cost(page: str) -> None:
    assert page.count("<td>r1e+06-0</td>") == 1 and page.count("<td>r3e+07-1</td>") == 1
    assert "accelerator_seconds" in page


def test_names_stay_as_they_are_and_a_loss_that_is_none_is_said(tmp_path: Path) -> None:
    rows = [f"{run},{step},{loss}" for run, loss in (("1e5", "nan"), ("007", "inf")) for step in (1, 2)]
    (tmp_path / "curves.csv").write_text("run,step,test_loss\n" + "\n".join(rows) + "\n1e6\n")
    cells = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", _runs(tmp_path / "curves.csv"))
    assert cells == [("1e5", "2", "nan"), ("007", "2", "inf"), ("1e6", "", "")]
    assert _cell("num_params", "590000") == "590,000" and _cell("flops", "1.23456e18") == "1.235e+18"


def test_completions_before_and_after_and_nothing_hostile(page: str) -> None:
    assert "Completions of r1, step 1<" in page and "Completions of r1, step 40<" in page
    assert "<script" not in page and "&lt;script&gt;alert(40)" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_the_law_of_a_sweep_over_several_axes_is_of_one_reuse_and_one_order(tmp_path: Path) -> None:
    lines = [COLUMNS + ",order"]
    for size in (1e6, 3e6, 1e7, 3e7):
        for tau, order in [(1, "shuffle"), *([(5, "shuffle"), (1, "curriculum")] if size == 3e6 else [])]:
            for step in range(1, 31):
                loss = 0.9 * step ** (-0.2 * size / (size + 5e6)) * (1 if (tau, order) == (1, "shuffle") else 0.5)
                row = (f"r{size:g}-{tau}-{order}", "base", f"{size:g}", size, step, 8 * step, size * 6e3 * step, loss)
                lines.append(",".join(map(str, (*row, tau, 4, 0, 0.5 * step, order))))
    (tmp_path / "curves.csv").write_text("\n".join(lines) + "\n")
    text = write_sweep_report(tmp_path).read_text()
    slopes = re.findall(r"<td>base (?:flops|samples)</td><td>([\d.]+) ", text)
    assert [float(slope) for slope in slopes] == pytest.approx([0.2, 0.2], rel=1e-3)


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no curves\.csv"):
        write_sweep_report(tmp_path)
