"""The stream of prompts: what is served, resuming at any step, processes, and states of other runs."""

import collections
import csv
import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from rljax.config import ConfigError, DataConfig
from rljax.data.pipeline import (
    drop_overlong,
    encode_prompts,
    open_pipeline,
    prompt_slots,
    stack_prompts,
    with_system,
)
from rljax.data.records import read_records
from rljax.data.reuse import ORDERS
from rljax.data.tasks import DIFFICULTY_FIELD
from rljax.types import PromptRecord


class Letters:
    """A tokenizer: code points, and how often it was asked."""

    def __init__(self, offset=0):
        self.calls, self.offset = 0, offset

    def encode_chat(self, messages, add_generation_prompt=True):
        self.calls += 1
        return [ord(c) + self.offset for m in messages for c in m["content"]] + [1] * add_generation_prompt


def texts(count, length=lambda i: 1 + i % 5):
    return [
        PromptRecord(
            ({"role": "user", "content": chr(97 + i % 26) * length(i)},), "test", str(i), extra_info={"index": i}
        )
        for i in range(count)
    ]


DATA = DataConfig(prompts_per_step=6, repeats=3, order="shuffle", max_prompt_tokens=100)


def same(a, b):
    return (
        np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.lengths, b.lengths)
        and np.array_equal(a.positions, b.positions)
        and a.records == b.records
    )


def test_batches_hold_the_plans_records_in_order():
    records = texts(10)
    pipeline = open_pipeline(records, Letters(), DATA)
    batches = list(pipeline)
    assert len(batches) == 5  # 10 x 3 = 30 prompts
    for step, batch in enumerate(batches):
        assert batch.positions.tolist() == list(range(6 * step, 6 * step + 6))
        assert batch.positions.dtype == np.int64 and batch.tokens.dtype == batch.lengths.dtype == np.int32
        for row in range(6):
            record = records[pipeline.plan.record_index(6 * step + row)]
            expected = [ord(c) for c in record.prompt[0]["content"]] + [1]
            assert batch.records[row] == record and batch.lengths[row] == len(expected)
            assert batch.tokens[row].tolist() == expected + [0] * (16 - len(expected))


def test_a_last_part_of_a_batch_is_not_served():
    assert len(list(open_pipeline(texts(7), Letters(), dataclasses.replace(DATA, repeats=2)))) == 2


def test_one_shape_serves_the_run_and_each_record_is_encoded_once():
    tokenizer = Letters()
    records = texts(12, length=lambda i: 40 if i == 11 else 2)
    data = dataclasses.replace(DATA, order="file", repeats=4)
    pipeline = open_pipeline(records, tokenizer, data)
    assert {batch.tokens.shape for batch in pipeline} == {(6, 48)} and pipeline.slots == 48
    assert tokenizer.calls == 12


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_resume_at_any_step_continues_the_same_stream(order):
    records = read_records("task:arithmetic", task_records=10)
    data = dataclasses.replace(DATA, order=order, difficulty_field=DIFFICULTY_FIELD)
    whole = list(open_pipeline(records, Letters(), data))
    for step in range(len(whole) + 1):
        first = open_pipeline(records, Letters(), data)
        for _ in range(step):
            next(first)
        state = json.loads(json.dumps(first.get_state()))
        second = open_pipeline(records, Letters(), data)
        if step % 2:  # wherever the second one stands
            next(second)
        second.set_state(state)
        assert first.is_exhausted == second.is_exhausted == (step == len(whole))
        rest = list(second)
        assert len(rest) == len(whole) - step and all(map(same, rest, whole[step:]))


@pytest.mark.parametrize(
    ("change", "tokenizer", "records", "names"),
    [
        ({"prompts_per_step": 5}, Letters(), texts(10), ["prompts_per_step was 6 and is 5"]),
        ({"repeats": 4}, Letters(), texts(10), ["repeats was 3 and is 4"]),
        ({"seed": 1}, Letters(), texts(10), ["seed was 0 and is 1"]),
        ({"order": "file"}, Letters(), texts(10), ["order was 'shuffle' and is 'file'"]),
        ({"unique": 8}, Letters(), texts(10), ["unique was 10 and is 8", "chosen"]),
        ({"system_prompt": "Be brief."}, Letters(), texts(10), ["texts", "tokens"]),
        ({}, Letters(offset=1), texts(10), ["tokens was"]),
        ({}, Letters(), texts(11), ["records was 10 and is 11", "texts"]),
        ({}, Letters(), texts(10)[::-1], ["texts"]),
        ({}, Letters(), [dataclasses.replace(r, ground_truth="0") for r in texts(10)], ["texts"]),
    ],
)
def test_a_state_of_another_run_is_refused_and_the_difference_named(change, tokenizer, records, names):
    state = open_pipeline(texts(10), Letters(), DATA).get_state()
    other = open_pipeline(records, tokenizer, dataclasses.replace(DATA, **change))
    with pytest.raises(ConfigError) as error:
        other.set_state(state)
    assert all(name in str(error.value) for name in names)
    assert other.get_state()["iterator"] == state["iterator"]  # and nothing was set


def test_a_state_follows_the_pass_rates():
    """Same texts, other pass rates, hence another curriculum."""
    data = dataclasses.replace(DATA, order="curriculum", difficulty_field="rate")
    rated = [[dataclasses.replace(r, extra_info={"rate": f(i)}) for i, r in enumerate(texts(10))]
             for f in (lambda i: i / 10, lambda i: 1 - i / 10)]  # fmt: skip
    state = open_pipeline(rated[0], Letters(), data).get_state()
    with pytest.raises(ConfigError, match="chosen was"):
        open_pipeline(rated[1], Letters(), data).set_state(state)


@pytest.mark.parametrize("processes", [2, 3])
def test_slices_of_the_processes_make_the_global_batch(processes):
    records = texts(10)
    whole = list(open_pipeline(records, Letters(), DATA))
    parts = [open_pipeline(records, Letters(), DATA, process_slice=(i, processes)) for i in range(processes)]
    for batch in whole:
        slices = [next(part) for part in parts]
        assert np.array_equal(np.concatenate([s.tokens for s in slices]), batch.tokens)
        assert np.array_equal(np.concatenate([s.lengths for s in slices]), batch.lengths)
        assert np.array_equal(np.concatenate([s.positions for s in slices]), batch.positions)
        assert sum((s.records for s in slices), ()) == batch.records
        assert len({json.dumps(part.get_state()) for part in parts}) == 1


def test_a_state_restores_onto_another_number_of_processes():
    records = texts(10)
    one = open_pipeline(records, Letters(), DATA)
    two = open_pipeline(records, Letters(), DATA, process_slice=(1, 2))
    next(two), next(two)
    one.set_state(two.get_state())
    assert next(one).positions.tolist() == list(range(12, 18))


def test_overlong_prompts_are_dropped_before_the_plan_and_said(caplog):
    records = texts(10, length=lambda i: 50 if i in (2, 7) else 3)
    with caplog.at_level(logging.WARNING):
        pipeline = open_pipeline(records, Letters(), dataclasses.replace(DATA, max_prompt_tokens=50))
    assert "dropped 2 of 10 prompts longer than max_prompt_tokens = 50: 2 of 10 test\n" in caplog.text
    assert pipeline.dropped == {"test": 2} and pipeline.plan.total == 24 and pipeline.slots == 16
    assert {r.ground_truth for batch in pipeline for r in batch.records} == set("01345689")


def test_overlong_prompts_are_counted_by_data_source(caplog):
    sources = ["a", "b", "b", "c", "b"]
    records = [
        dataclasses.replace(r, data_source=s) for r, s in zip(texts(5, lambda i: 10 * i + 1), sources, strict=True)
    ]
    kept, tokens, dropped = drop_overlong(records, encode_prompts(records, Letters()), 20)
    assert [r.data_source for r in kept] == ["a", "b"] and [len(ids) for ids in tokens] == [2, 12]
    assert dropped == {"b": 2, "c": 1}
    assert "dropped 3 of 5 prompts longer than max_prompt_tokens = 20: 2 of 3 b, 1 of 1 c" in caplog.text


def test_exposures_follow_the_batches_served_through_a_resume(tmp_path):
    records = texts(8)
    first = open_pipeline(records, Letters(), DATA)  # batches of 6 of 24 prompts: a batch straddles two epochs
    seen = collections.Counter()
    for _ in range(3):
        assert first.exposures().tolist() == [seen[i] for i in first.plan.chosen]
        seen.update(int(record.ground_truth) for record in next(first).records)
    second = open_pipeline(records, Letters(), DATA)
    second.set_state(first.get_state())
    assert second.exposures().tolist() == [seen[i] for i in second.plan.chosen] and sum(seen.values()) == 18
    second.write_exposures(tmp_path / "exposures.csv")
    rows = list(csv.DictReader((tmp_path / "exposures.csv").read_text().splitlines()))
    assert [(int(row["record"]), int(row["uses"])) for row in rows] == [(i, seen[i]) for i in range(8)]
    assert rows[3] == {"record": "3", "index": "3", "data_source": "test", "uses": str(seen[3])}
    assert [file.name for file in tmp_path.iterdir()] == ["exposures.csv"]


def test_overlong_is_an_error_where_asked():
    records = texts(10, length=lambda i: {2: 50, 7: 60}.get(i, 3))
    encoded = encode_prompts(records, Letters())
    with pytest.raises(
        ConfigError, match=r"2 of 10 .*max_prompt_tokens = 50 \(2 of 10 test\): record 2 has 51 .*record 7, 61;.*drop"
    ):
        drop_overlong(records, encoded, 50, "error")
    assert not drop_overlong(records, encoded, 61, "error")[2]
    with pytest.raises(ConfigError, match="10 of 10 prompts"):
        drop_overlong(records, encoded, 3, "drop")


def test_impossible_batches_are_refused():
    with pytest.raises(ConfigError, match="prompts_per_step = 6 cannot be split evenly over 4 processes"):
        open_pipeline(texts(10), Letters(), DATA, process_slice=(0, 4))
    with pytest.raises(ConfigError, match=r"'qwen2\.5_7b_pass_rate' is in no record"):
        open_pipeline(texts(10), Letters(), dataclasses.replace(DATA, order="curriculum"))


def test_system_prompt_goes_first_unless_a_record_has_its_own():
    own = PromptRecord(({"role": "system", "content": "own"}, {"role": "user", "content": "q"}), "test", "0")
    plain, kept = with_system([*texts(1), own], "Be brief.")
    assert plain.prompt == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"})
    assert kept == own and with_system([own, *texts(1)], "") == [own, *texts(1)]


def test_prompts_of_an_evaluation_batch_equal_the_pipelines():
    records = texts(6)
    pipeline = open_pipeline(records, Letters(), dataclasses.replace(DATA, order="file", repeats=1))
    encoded = encode_prompts(records, Letters())
    assert same(stack_prompts(records, encoded, np.arange(len(records)), prompt_slots(encoded)), next(pipeline))
    later = stack_prompts(records[2:4], encoded[2:4], np.array([100, 101]), 32)
    assert later.tokens.shape == (2, 32) and later.positions.tolist() == [100, 101]
    assert later.lengths.tolist() == [4, 5] and not later.tokens[0, 4:].any()


def test_a_prompt_of_no_tokens_is_refused():
    class Mute:
        def encode_chat(self, messages, add_generation_prompt=True):
            return []

    with pytest.raises(ConfigError, match="record 0 has a prompt of no tokens"):
        encode_prompts(texts(1), Mute())


def test_published_prompt_lengths(shared_data):
    """Lengths that paper 4.3's table has for the hold-out set, with the real tokenizer and template."""
    from rljax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared_data / "qwen2.5_tokenizer")
    records = read_records(str(shared_data / "guru_math" / "math__full_difficulty_ordered_test_500.parquet"))
    encoded = encode_prompts(records, tokenizer)
    lengths = np.array([len(ids) for ids in encoded])
    assert lengths.max() == 551 and np.median(lengths) == 134 and round(lengths.mean()) == 145
    assert prompt_slots(encoded) == 560
    zebra = read_records(str(shared_data / "guru_math" / "online_eval" / "logic__zebra_puzzle_dataset_200.parquet"))
    assert drop_overlong(zebra, encode_prompts(zebra, tokenizer), 2048)[2] == {"logic__zebra_puzzle_dataset": 52}


EVALUATION_PROMPTS = Path(__file__).resolve().parents[1] / "golden" / "evaluation_prompts.json"


def test_evaluation_prompts_are_token_exact_for_base_and_instruct(shared_data):
    """Two prompts of each of the eight sets, against ids made by hand-written ChatML and the `tokenizers` library."""
    from rljax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(shared_data / "qwen2.5_tokenizer")
    golden = json.loads(EVALUATION_PROMPTS.read_text())
    assert len(golden) == 8
    for name, rows in golden.items():
        records = read_records(str(shared_data / "guru_math" / f"{name}.parquet"))
        records = [records[row["row"]] for row in rows]
        for kind, system_prompt in (("instruct", ""), ("base", "You are a helpful assistant.")):
            for ids, row in zip(encode_prompts(with_system(records, system_prompt), tokenizer), rows, strict=True):
                assert {
                    "sha256": hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
                    "tokens": len(ids),
                    "first": ids[:8].tolist(),
                    "last": ids[-8:].tolist(),
                } == row[kind], (name, row["row"], kind)
