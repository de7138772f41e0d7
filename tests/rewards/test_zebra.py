"""The grid verifier on answers judged by hand, in both modes."""

import json
import time

import pytest

from rljax.rewards.answers import Undecidable
from rljax.rewards.zebra import paper_score, score

HEADER = ["Position", "Job", "Pet"]
ROWS = [["1", "cook", "cat"], ["2", "pilot", "dog"]]
TRUTH = json.dumps({"header": HEADER, "rows": ROWS})
RIGHT = json.dumps({"header": HEADER, "rows": ROWS})
HALF = json.dumps({"header": HEADER, "rows": [["1", "cook", "dog"], ["1", "pilot", "cat"]]})
INTEGERS = json.dumps({"rows": [[1, "cook", "cat"], [2, "pilot", "dog"]]})


def tagged(answer):
    return f"<answer>{answer}</answer>"


CASES = [  # response, score, paper_score
    (tagged(RIGHT), 1, 1),
    (tagged(HALF), 1 / 2, 1 / 2),
    (f"thinking {tagged(HALF)} more {tagged(RIGHT)}", 1, 1),
    (f"{tagged(RIGHT)} then {tagged(HALF)}", 1 / 2, 1 / 2),
    (f"{tagged(RIGHT)} {tagged('none')}", 0, 0),
    (f"<answer> <answer>{RIGHT}</answer>", 1, 0),
    (f"in <answer> tags:\n{tagged(RIGHT)}", 1, 1),
    (tagged(f"\n{RIGHT}\n"), 1, 0),
    (tagged(json.dumps(json.loads(RIGHT), indent=1)), 1, 0),
    (f"{tagged(HALF)}{tagged(RIGHT.replace(', ', ',' + chr(10)))}", 1, 1 / 2),
    (tagged(f"```json\n{RIGHT}\n```"), 1, 0),
    (tagged(f"```\n{RIGHT}"), 1, 0),
    (tagged(str(json.loads(RIGHT))), 1, 1),
    (tagged("{'rows': [['1', 'cook', 'cat'], ['2', 'pilot', 'dog']],}"), 1, 1),
    (tagged("{'rows': (('1', 'cook', 'cat'), ('2', 'pilot', 'dog'))}"), 1, 1),
    (tagged(RIGHT.replace('"Pet"', "null")), 1, 1),  # JSON only
    (tagged(INTEGERS), 1, 2 / 3),
    (tagged(INTEGERS.replace("[1,", "[1.0,").replace("[2,", "[true,")), 5 / 6, 2 / 3),
    (tagged(RIGHT.replace('"cook"', '" cook "')), 1, 5 / 6),
    (tagged(RIGHT.replace('"cook"', "1.5")), 5 / 6, 5 / 6),
    (tagged(RIGHT.replace('"cook"', '["cook"]')), 5 / 6, 5 / 6),
    (tagged(RIGHT.replace('"cook"', "1" + "0" * 30)), 5 / 6, 5 / 6),
    (tagged(f"{{'rows': [['1', 'cook', 'cat'], [0x{'f' * 9000}, 'pilot', 'dog']]}}"), 5 / 6, 5 / 6),
    (tagged("{'rows': {0: {0: '1', 1: 'cook', 2: 'cat'}, 1: {0: '2', 1: 'pilot', 2: 'dog'}}}"), 1, 1),
    (tagged('{"rows": {"1": ["1", "cook", "cat"], "2": ["2", "pilot", "dog"]}}'), 1, 0),
    (tagged('{"rows": {"2": ["2", "pilot", "dog"], "1": ["1", "cook", "cat"]}}'), 1, 0),
    (tagged('{"rows": {"1": ["1", "cook", "cat"], "3": ["2", "pilot", "dog"]}}'), 0, 0),
    (tagged("{'rows': {1: ['1', 'cook', 'cat'], '1': ['1', 'cook', 'cat'], 2: ['2', 'pilot', 'dog']}}"), 0, 0),
    (tagged(json.dumps({"rows": [dict(zip(HEADER, row, strict=True)) for row in ROWS]})), 1, 0),
    (tagged(json.dumps({"rows": {str(i + 1): dict(zip(HEADER, ROWS[i], strict=True)) for i in (0, 1)}})), 1, 0),
    (tagged(json.dumps({"rows": [{"Job": "cook", "Pet": "cat"}, {"Job": "pilot", "Pet": "dog"}]})), 0, 0),
    (tagged('{"header": ["Job", "Position", "Pet"], "rows": [["cook", 1, "cat"], ["pilot", 2, "dog"]]}'), 1, 1 / 3),
    (tagged('{"header": ["Job", "Job", "Pet"], "rows": [["cook", 1, "cat"], ["pilot", 2, "dog"]]}'), 1 / 3, 1 / 3),
    (tagged('{"rows": [["1", "cook", "cat", "x"], ["2", "pilot", "dog"], []]}'), 0, 1),  # more than there should be
    (tagged('{"rows": [["1", "cook", "cat", "x"], ["2", "pilot", "dog"]]}'), 0, 1),
    (tagged('{"rows": [["1", "cook", "cat"]]}'), 0, 0),
    (tagged('{"rows": [["1", "cook", "cat"], ["2", "pilot"]]}'), 0, 0),
    (tagged('{"rows": ["1cc", "2pd"]}'), 0, 1 / 3),  # a string is no row
    (tagged('{"rows": null}'), 0, 0),
    (tagged("{}"), 0, 0),
    (tagged("[]"), 0, 0),
    (tagged("7"), 0, 0),
    (tagged(""), 0, 0),
    (tagged("{[]: 1}"), 0, 0),
    (tagged("__import__('os').getcwd()"), 0, 0),
    (tagged('{"rows": "\\d"}'), 0, 0),
    (tagged("1" * 5000), 0, 0),
    (tagged("[" * 50_000), 0, 0),
    (tagged("{'a':" * 15_000), 0, 0),
    (tagged("-" * 90_000 + "1"), 0, 0),
    (tagged("1+" * 40_000 + "1"), 0, 0),
    (tagged(RIGHT + "\0"), 0, 0),
    (tagged(RIGHT.replace("Pet", "\ud800")), 1, 1),
    (RIGHT, 0, 0),
    (f"<answer>{RIGHT}", 0, 0),
    (f"{RIGHT}</answer>", 0, 0),
    ("</answer><answer>", 0, 0),
    ("", 0, 0),
]


@pytest.mark.parametrize("response, fixed, paper", CASES, ids=range(len(CASES)))
def test_both_modes(response, fixed, paper):
    assert score(response, TRUTH, {}) == pytest.approx(fixed, abs=1e-12)
    assert paper_score(response, TRUTH, {}) == pytest.approx(paper, abs=1e-12)


@pytest.mark.parametrize(
    "cell, given, right", [(1.5, 1.5, 1), (1.5, "1.5", 1), (1.5, [], 0), (1.5, None, 0), (True, {}, 0)]
)
def test_what_can_be_no_cell_equals_none(cell, given, right):
    truth = json.dumps({"header": ["a"], "rows": [[cell]]})
    assert score(tagged(json.dumps({"rows": [[given]]})), truth, {}) == right


def test_megabyte_answers():
    with pytest.raises(Undecidable, match="1000000 characters"):
        score(tagged("x" * 1_000_000), TRUTH, {})
    assert paper_score(tagged("x" * 1_000_000), TRUTH, {}) == 0.0


@pytest.mark.parametrize("mode", [score, paper_score])
@pytest.mark.parametrize(
    "response", ["<answer>" * 125_000, "<answer></answer>" * 60_000, tagged("```x \n" + " " * 90_000)], ids=range(3)
)
def test_time_is_linear(mode, response):
    start = time.monotonic()
    assert mode(response, TRUTH, {}) == 0.0
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("mode", [score, paper_score])
@pytest.mark.parametrize(
    "truth",
    [
        "cook",
        "[]",
        "{}",
        '{"header": 1}',
        '{"header": ["a"], "rows": []}',
        '{"header": ["a"], "rows": [1]}',
        '{"header": ["a"], "rows": [["1", "2"]]}',
        '{"header": ["a"], "rows": [[null]]}',
    ],
)
def test_bad_ground_truth(mode, truth):
    with pytest.raises(ValueError, match=r"the ground truth .* must"):
        mode(tagged(RIGHT), truth, {})


def test_data(shared_data):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = shared_data / "guru_math" / "online_eval" / "logic__zebra_puzzle_dataset_200.parquet"
    if not file.exists():
        pytest.skip(f"needs {file}")
    for row in parquet.read_table(file).to_pylist():
        grid = row["reward_model"]["ground_truth"]
        truth = json.dumps(grid)
        for mode in (score, paper_score):
            assert mode(f"so <answer> {truth} </answer>", truth, row["extra_info"]) == 1.0
        for position, cells in enumerate(grid["rows"], start=1):
            cells[0] = position
        assert score(tagged(json.dumps(grid, indent=2)), truth, row["extra_info"]) == 1.0
        assert paper_score(tagged(json.dumps(grid)), truth, row["extra_info"]) == pytest.approx(
            1 - 1 / len(grid["header"])
        )
