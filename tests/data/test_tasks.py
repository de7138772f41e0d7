"""Procedural tasks: right answers, no question twice, no question in both splits."""

import json

import pytest

from rljax.config import ConfigError
from rljax.data.tasks import DIFFICULTY_FIELD, TASKS


def question(record):
    return record.prompt[0]["content"]


def answer_char_count(text):
    target, word = text.split(":")
    return sum(1 for letter in word if letter == target)


def answer_arithmetic(text):
    return sum(map(int, text.split("+")))


def answer_sorting(text):
    return "".join(digit * text.count(digit) for digit in "123456789")


ANSWERS = {"char_count": answer_char_count, "arithmetic": answer_arithmetic, "sorting": answer_sorting}


@pytest.mark.parametrize("name", TASKS)
def test_solutions_are_right(name):
    for record in TASKS[name].records("train", 500, seed=3):
        expected = str(ANSWERS[name](question(record)))
        assert record.ground_truth == expected
        assert record.solution.split("=")[-1] == expected
        assert set(question(record) + record.solution) <= set(TASKS[name].alphabet)
        assert record.data_source == name and len(record.prompt) == 1 and record.prompt[0]["role"] == "user"


def test_worked_steps_of_char_count_are_right():
    for record in TASKS["char_count"].records("eval", 200, seed=0):
        target, word = question(record).split(":")
        steps = "".join(f"{word[i]}{word[: i + 1].count(target)}" for i in range(len(word)))
        assert record.solution == f"{steps}={word.count(target)}"
        assert 6 <= len(word) <= 14


def test_worked_steps_of_arithmetic_are_right():
    for record in TASKS["arithmetic"].records("eval", 200, seed=0):
        *columns, _ = record.solution.split(";")
        total = carry = 0
        for place, column in enumerate(columns):
            terms, result = column.split("=")
            a, b, carried = map(int, terms.split("+"))
            assert carried == carry and a + b + carried == int(result) and len(result) == 2
            carry = int(result) // 10
            total += int(result) % 10 * 10**place
        assert total + carry * 10 ** len(columns) == int(record.ground_truth)


def test_solution_texts():
    assert TASKS["char_count"].solve("b:abcbbcab") == "a0b1c1b2b3c3a3b4=4"
    assert TASKS["arithmetic"].solve("47+385") == "7+5+0=12;4+8+1=13;0+3+1=04;=432"
    assert TASKS["sorting"].solve("31472") == "=12347"


@pytest.mark.parametrize("name", TASKS)
def test_records_depend_on_task_split_seed_and_index_alone(name):
    task = TASKS[name]
    records = task.records("train", 40, seed=7)
    assert records == task.records("train", 60, seed=7)[:40]
    assert records[33] == task.record(33, "train", 7)
    assert [question(r) for r in records] != [question(r) for r in task.records("train", 40, seed=8)]
    json.dumps([r.extra_info for r in records])


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint_and_without_duplicates_for_any_seed(name):
    train = [question(r) for seed in (0, 1) for r in TASKS[name].records("train", 3000, seed)]
    held_out = [question(r) for seed in (0, 5) for r in TASKS[name].records("eval", 3000, seed)]
    assert len(set(train[:3000])) == len(set(held_out[:3000])) == 3000
    assert not set(train) & set(held_out)


def test_a_whole_level_is_covered_once():
    """Arithmetic's smallest level, two digits plus two, is dealt out completely: half to each split."""
    task = TASKS["arithmetic"]
    levels = len(task.level_sizes)
    splits = [
        {question(task.record(i, split, seed)) for i in range(0, task.capacity, levels)}
        for split, seed in (("train", 1), ("eval", 2))
    ]
    assert splits[0] | splits[1] == {f"{a}+{b}" for a in range(10, 100) for b in range(10, 100)}
    assert len(splits[0]) == len(splits[1]) == 4050


@pytest.mark.parametrize("name", TASKS)
def test_longer_questions_are_harder(name):
    records = TASKS[name].records("train", 90, seed=0)
    by_length = {len(question(r)): r.extra_info[DIFFICULTY_FIELD] for r in records}
    rates = [by_length[length] for length in sorted(by_length)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1 and rates[-1] == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: t.records("train", 16_201, 0), "1 to 16200"),
        (lambda t: t.records("train", 0, 0), "0 records"),
        (lambda t: t.record(-1, "train", 0), "record -1"),
        (lambda t: t.record(0, "test", 0), "split = 'test'"),
    ],
)
def test_what_a_task_cannot_give_is_refused(call, says):
    with pytest.raises(ConfigError, match=says):
        call(TASKS["arithmetic"])
