"""The report shows what the files say, escapes what a model wrote, and needs nothing but itself."""

import html.parser
import json
import math
import re

import pytest

from rljax.config import ConfigError
from rljax.scaling.report import read_run, thin, ticks, write_report

TAGS = (
    {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "section", "div", "span", "b", "pre"}
    | {"table", "thead", "tbody", "tr", "th", "td", "article", "details", "summary"}
    | {"figure", "figcaption", "svg", "path", "text", "g", "circle"}
)
HEADER = "run,source,num_params,step,samples,flops,tokens,test_loss,unique,repeats,group_size,eval,seed\n"


def _write_run(folder, steps=20):
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 0, "eval/pass@1": 0.125, "time/evaluate_seconds": 3.0}) + "\n")
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "reward/mean": 0.2 + 0.02 * step,
                "completion/length_tokens": 40.0 + step,
                "policy/entropy": 2.0 / step,
                "policy/reference_kl": 1e-4 * step,
                "policy/grad_norm": None if step == 7 else 1.5,
                "policy/behaviour_gap_mean": 1e-5,
                "time/sample_seconds": 2.0,
                "time/update_seconds": 1.0,
                "time/step_seconds": 4.0,
                "progress/prompts_seen": 32 * step,
                "progress/tokens": 81_920 * step,
                "progress/compute_flops": 3.9e11 * step,
            }
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 21, "rew')  # a run still going
    with (folder / "curves.csv").open("w") as file:
        file.write(HEADER)
        for step in range(0, steps + 1, 5):
            file.write(f"r,rljax,8e5,{step},{32 * step},1e9,1e6,{0.875 - 0.025 * step},,,8,char_count,0\n")
    (folder / "rollouts").mkdir()
    for step in (1, 10, steps):
        row = {"prompt": f"prompt of {step}", "completion": f"answer of {step}", "reward": 1.0, "stop_reason": "stop"}
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "config.yaml").write_text("seed: 0\nmodel:\n  architecture: tiny\n")
    return folder


class _Elements(html.parser.HTMLParser):
    """Tags opened, attributes, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _assert_self_contained(text):
    elements = _Elements(text)
    assert elements.open == []
    assert set(elements.tags) <= TAGS
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_shows_the_run(tmp_path):
    report = write_report(_write_run(tmp_path / "my-run"))
    assert report == tmp_path / "my-run" / "report.html"
    text = report.read_text()
    _assert_self_contained(text)
    assert "<h1>my-run</h1>" in text
    assert "<b>0.125 → 0.625</b><span>+0.500 by step 20</span>" in text
    assert "<span>tokens</span><b>1.64 M</b>" in text
    # 20 steps of 4 s, of which phases cover 3 s; and 3 s of evaluation before the first: 83 s
    assert "<td>sample</td><td>40.0</td><td>2.00</td><td>48.2 %</td>" in text
    assert "<td>other</td><td>20.0</td>" in text
    assert "<span>time</span><b>83.0 s</b>" in text
    assert text.count("<svg") == 7
    assert [s for s in ("answer of 1<", "answer of 10<", "answer of 20<") if s in text] == [
        "answer of 1<",
        "answer of 20<",
    ]
    assert "architecture: tiny" in text


def test_a_value_that_was_not_finite_breaks_the_line(tmp_path):
    text = write_report(_write_run(tmp_path / "run")).read_text()
    path = re.search(r"Gradient norm by step.*?class=\"curve\" d=\"([^\"]*)\"", text)
    assert path is not None
    assert path[1].count("M") == 2
    assert path[1].count("L") == 17  # 19 finite points in two strokes


def test_hostile_text_is_only_text(tmp_path):
    folder = _write_run(tmp_path / "a&b<i>")
    attack = '</pre><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"\x00\x1b[31m\u2028\udc80'
    row = {"prompt": attack, "completion": attack, attack: attack, "reward": 0.5}
    (folder / "rollouts" / "step_000001.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "config.yaml").write_text(attack, encoding="utf-8", errors="replace")
    (folder / "curves.csv").write_text(HEADER + '"<script>",x,1,0,0,0,0,0.5,,,,"<script>",0\n' * 2)
    text = write_report(folder).read_text()
    _assert_self_contained(text)
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)" in text
    assert not [c for c in text if ord(c) < 32 and c not in "\n\t"]


def test_a_run_of_one_evaluation(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "curves.csv").write_text(HEADER + "r,rljax,8e5,0,0,0,0,0.875,,,,,\nr,rljax,8e5,5")
    text = write_report(folder).read_text()
    _assert_self_contained(text)
    assert "<b>0.125</b><span>step 0, the only evaluation</span>" in text
    assert text.count("<svg") == 1
    assert text.count("<circle") == 1
    assert "nan" not in text.lower()


def test_the_line_a_killed_process_was_writing_is_no_evaluation(tmp_path):
    (tmp_path / "curves.csv").write_text(HEADER + "r,rljax,8e5,0,0,0,0,0.875,,,,,\nr,rljax,8e5,5,0,0,0,0.1")
    assert read_run(tmp_path).pass_at_1 == {"held-out": [(0, 0.125)]}


def test_metrics_alone_give_pass_at_1_too(tmp_path):
    folder = _write_run(tmp_path / "run")
    (folder / "curves.csv").unlink()
    assert read_run(folder).pass_at_1 == {"held-out": [(0, 0.125)]}


def test_an_empty_metrics_file_is_a_page_without_charts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    text = write_report(tmp_path).read_text()
    _assert_self_contained(text)
    assert "<svg" not in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"neither metrics\.jsonl nor curves.csv"):
        write_report(tmp_path / "nowhere")


def _with_forecasts(folder, last):
    """A run whose evaluations up to step `last` forecast its end."""
    folder = _write_run(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    for row in rows:
        if 0 < row["step"] <= last and row["step"] % 5 == 0:
            row["forecast/final_test_loss"] = 0.4 - 0.001 * row["step"]
            row |= {"forecast/final_test_loss_low": 0.3, "forecast/final_test_loss_high": 0.45}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(folder).read_text()


def test_a_run_under_way_shows_where_it_will_end(tmp_path):
    text = _with_forecasts(tmp_path / "run", last=20)
    _assert_self_contained(text)
    assert "<span>pass@1 at the end, forecast</span><b>0.620</b><span>95 %: 0.550 to 0.700</span>" in text
    assert '<b class="line0">median 0.62</b> <b class="line1">low 0.55</b> <b class="line2">high 0.7</b>' in text


def test_a_run_that_has_ended_shows_its_forecasts_as_a_chart_alone(tmp_path):
    text = _with_forecasts(tmp_path / "run", last=15)
    assert "95 %" not in text
    assert text.count("pass@1 at the end, forecast") == 2  # the caption, and the same for who does not see
    assert "pass@1 at the end" not in write_report(_write_run(tmp_path / "other")).read_text()


def test_two_held_out_sets_are_two_lines(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        f"r,rljax,1,{step},0,0,0,{loss},,,,{name},\n" for step in (0, 5) for name, loss in (("a", 0.5), ("b", 0.25))
    ]
    (folder / "curves.csv").write_text(HEADER + "".join(rows))
    text = write_report(folder).read_text()
    assert text.count('class="curve"') == 2
    assert '<b class="line0">a 0.5</b>' in text
    assert '<b class="line1">b 0.75</b>' in text


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0.0, 1.0, False, [0.0, 0.5, 1.0]),
        (0.13, 0.61, False, [0.0, 0.2, 0.4, 0.6, 0.8]),
        (0, 3, True, [0, 1, 2, 3]),
        (0, 1, True, [0, 1]),
        (0.0, 0.0, False, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (100, 500, True, [100, 200, 300, 400, 500]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, whole, expected):
    assert ticks(low, high, whole=whole) == pytest.approx(expected)


def test_thinning_keeps_a_spike_and_the_order():
    points = [(float(step), 1000.0 if step == 4321 else math.sin(step)) for step in range(10_000)]
    thinned = thin(points)
    assert len(thinned) <= 600
    assert (4321.0, 1000.0) in thinned
    assert thinned == sorted(thinned)
