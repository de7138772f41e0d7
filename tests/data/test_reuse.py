"""Unique against repeats: counts, orders, subsets; the paper's released reuse sets come out to the row."""

import collections
import itertools
import math
from fractions import Fraction

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax.config import ConfigError
from rljax.data.records import difficulties, read_records
from rljax.data.reuse import ORDERS, PAPER_TAUS, SUBSETS, make_plan, paper_sample, steps_for

RATES = [None, *(i / 16 for i in range(17))]


@st.composite
def plans(draw):
    num_records = draw(st.integers(1, 40))
    return make_plan(
        num_records,
        unique=draw(st.integers(0, num_records)),
        repeats=draw(st.integers(1, 6)),
        order=draw(st.sampled_from(sorted(ORDERS))),
        subset=draw(st.sampled_from(sorted(SUBSETS))),
        seed=draw(st.integers(0, 2**40)),
        difficulties=draw(st.lists(st.sampled_from(RATES), min_size=num_records, max_size=num_records)),
    )


def stream(plan, start=0, stop=None):
    return [plan.record_index(i) for i in range(start, plan.total if stop is None else stop)]


@given(plans())
def test_each_unique_record_is_used_exactly_tau_times(plan):
    counts = collections.Counter(stream(plan))
    assert len(counts) == plan.unique and set(counts.values()) == {plan.repeats}
    assert set(counts) == set(plan.chosen) and max(counts) < plan.num_records


@given(plans())
def test_every_epoch_is_a_permutation_and_alike_unless_shuffled(plan):
    everything = stream(plan)
    epochs = [everything[i * plan.unique : (i + 1) * plan.unique] for i in range(plan.repeats)]
    assert all(sorted(epoch) == sorted(plan.chosen) for epoch in epochs)
    assert [plan.epoch(i) for i in range(plan.total)] == [i // plan.unique for i in range(plan.total)]
    if plan.order != "shuffle":
        assert all(epoch == epochs[0] for epoch in epochs)
    if plan.order == "file":
        assert epochs[0] == sorted(epochs[0])


@given(plans(), st.data())
def test_any_suffix_is_that_suffix_of_the_whole(plan, data):
    start = data.draw(st.integers(0, plan.total))
    whole = stream(plan)
    assert stream(plan, start) == whole[start:]
    assert [plan.record_index(i) for i in reversed(range(plan.total))] == whole[::-1]


@settings(max_examples=50)
@given(st.lists(st.sampled_from(RATES), min_size=1, max_size=40), st.data())
def test_curriculum_is_a_stable_sort_from_easy_to_hard(rates, data):
    unique = data.draw(st.integers(1, len(rates)))
    plan = make_plan(len(rates), unique=unique, order="curriculum", difficulties=rates)
    keys = [(-(rates[i] or 0), i) for i in stream(plan)]
    assert keys == sorted(keys) and sorted(plan.chosen) == list(range(unique))


@settings(max_examples=50)
@given(st.lists(st.sampled_from(RATES), min_size=1, max_size=40), st.data())
def test_reverse_is_a_stable_sort_from_hard_to_easy(rates, data):
    unique = data.draw(st.integers(1, len(rates)))
    plan = make_plan(len(rates), unique=unique, order="reverse", difficulties=rates)
    keys = [(rates[i] or 0, i) for i in stream(plan)]
    assert keys == sorted(keys) and sorted(plan.chosen) == list(range(unique))


def test_shuffle_once_is_one_permutation_for_ever():
    plan = make_plan(8, repeats=2, order="shuffle_once", seed=3)
    assert stream(plan) == SHUFFLED_ONCE * 2
    other = make_plan(8, order="shuffle_once", seed=4)
    assert stream(other) != SHUFFLED_ONCE and sorted(stream(other)) == list(range(8))
    few = make_plan(50, unique=8, subset="independent", order="shuffle_once", seed=3)
    assert sorted(few.chosen) == list(make_plan(50, unique=8, subset="independent", seed=3).chosen) != list(few.chosen)


SHUFFLED_ONCE = [1, 7, 0, 2, 4, 5, 6, 3]


@given(plans(), st.data())
def test_exposures_are_the_counts_of_the_stream(plan, data):
    served = data.draw(st.integers(0, plan.total))
    counts = collections.Counter(stream(plan, 0, served))
    assert plan.exposures(served).tolist() == [counts[index] for index in plan.chosen]


def test_shuffle_differs_between_epochs_and_seeds():
    first, second = (stream(make_plan(50, repeats=2, order="shuffle", seed=seed)) for seed in (0, 1))
    assert first[:50] != first[50:] and first != second and first[:50] != list(range(50))


def test_shuffle_is_the_same_for_ever():
    """Resuming an old run needs the old permutations: this one was drawn by numpy 2.4."""
    plan = make_plan(8, repeats=2, order="shuffle", seed=3)
    assert stream(plan) == SHUFFLED


SHUFFLED = [1, 0, 2, 7, 5, 3, 6, 4, 6, 3, 1, 2, 5, 7, 4, 0]


def test_independent_subsets_are_uniform_and_not_nested():
    counts = np.zeros(20)
    for seed in range(2000):
        counts[list(make_plan(20, unique=5, subset="independent", seed=seed).chosen)] += 1
    # Binomial(2000, 1/4): standard deviation 19.4; five of them.
    assert np.abs(counts - 500).max() < 97
    small, large = (set(make_plan(1000, unique=n, subset="independent", seed=0).chosen) for n in (100, 200))
    assert not small <= large


@given(st.lists(st.sampled_from(RATES), min_size=1, max_size=60), st.integers(0, 99), st.data())
def test_difficulty_matched_gives_each_pass_rate_its_share(rates, seed, data):
    """Quotas of largest remainders, by exact fractions."""
    unique = data.draw(st.integers(1, len(rates)))
    plan = make_plan(len(rates), unique=unique, subset="difficulty_matched", seed=seed, difficulties=rates)
    assert list(plan.chosen) == sorted(set(plan.chosen)) and plan.unique == unique
    sizes, took = (collections.Counter(rates[i] or 0 for i in of) for of in (range(len(rates)), plan.chosen))
    shares = {rate: Fraction(size * unique, len(rates)) for rate, size in sizes.items()}
    rest = {rate: share - math.floor(share) for rate, share in shares.items()}
    more = {rate: took[rate] - math.floor(share) for rate, share in shares.items()}
    assert set(more.values()) <= {0, 1} and all(rest[rate] > 0 for rate in more if more[rate])
    given = [rest[rate] for rate in more if more[rate]]
    assert all(rest[rate] <= min(given, default=1) for rate in more if not more[rate])


def test_difficulty_matched_draws_are_uniform_seeded_and_for_ever():
    rates = [0.5] * 4 + [None, 0.0] * 8  # a fifth and four fifths
    counts = np.zeros(20)
    for seed in range(2000):
        counts[list(make_plan(20, unique=5, subset="difficulty_matched", seed=seed, difficulties=rates).chosen)] += 1
    assert counts[:4].sum() == 2000 and np.abs(counts - 500).max() < 97  # five standard deviations
    assert make_plan(20, unique=5, subset="difficulty_matched", seed=3, difficulties=rates).chosen == MATCHED
    small, large = (
        set(make_plan(2000, unique=n, subset="difficulty_matched", difficulties=rates * 100).chosen) for n in (100, 200)
    )
    assert not small <= large


MATCHED = (3, 4, 8, 10, 12)


def test_difficulty_matched_on_the_papers_levels_keeps_all_of_them_in_proportion():
    """512 of the quarter sample's twelve levels (paper 5.1); `paper` matches two classes only."""
    sizes = {.6875: 5, .625: 10, .5625: 486, .5: 541, .4375: 557, .375: 616, .3125: 673, .25: 798, .1875: 949,
             .125: 1228, .0625: 1819, 0.0: 5118}  # fmt: skip
    rates = [rate for rate, size in sizes.items() for _ in range(size)]
    plan = make_plan(12_800, unique=512, subset="difficulty_matched", difficulties=rates)
    took = collections.Counter(rates[i] for i in plan.chosen)
    assert [took[rate] for rate in sizes] == [0, 0, 19, 22, 22, 25, 27, 32, 38, 49, 73, 205]


def test_paper_keeps_the_share_of_easy_records_floored():
    rates = [0.3] * 7 + [0.2999] * 13  # 35 % easy
    plan = make_plan(20, unique=10, subset="paper", difficulties=rates)
    assert plan.unique == 10 and sum(i < 7 for i in plan.chosen) == 3 and list(plan.chosen) == sorted(plan.chosen)
    assert make_plan(20, subset="paper", difficulties=rates).chosen == tuple(range(20))


# 11,554 of the first 51,200 rows are easy: the one number with which the rule gives the released rows.
PAPER_RATES = [0.5] * 11_554 + [0.0] * (53_904 - 11_554)
RELEASED = {4: 12_800, 5: 10_240, 10: 5_120, 20: 2_560, 25: 2_048, 50: 1_024, 100: 512}
EASY = {4: 2888, 5: 2310, 10: 1155, 20: 577, 25: 462, 50: 231, 100: 115}


@pytest.mark.parametrize("tau", RELEASED)
def test_paper_subset_has_the_published_easy_counts_in_100_steps(tau):
    plan = make_plan(53_904, unique=RELEASED[tau], repeats=tau, subset="paper", difficulties=PAPER_RATES)
    assert sum(i < 11_554 for i in plan.chosen) == EASY[tau] and max(plan.chosen) < 51_200
    assert plan.total == 51_200 and steps_for(plan, 512) == 100


def test_paper_subsets_are_nested():
    plans = [make_plan(53_904, unique=n, subset="paper", difficulties=PAPER_RATES) for n in RELEASED.values()]
    assert all(set(small.chosen) < set(large.chosen) for large, small in itertools.pairwise(plans))


@pytest.mark.parametrize("tau", RELEASED)
def test_paper_subset_is_the_released_file_row_for_row(shared_data, tau):
    table = pq.read_table(shared_data / "guru_math" / f"math__sampled_1_{tau}_{RELEASED[tau]}.parquet")
    rows = [int(label) for label in table["__index_level_0__"].to_pylist()]  # in the full easy-to-hard file
    plan = make_plan(53_904, unique=RELEASED[tau], subset="paper", difficulties=PAPER_RATES)
    assert list(plan.chosen) == rows
    easy = [info["qwen2.5_7b_pass_rate"] >= 0.3 for info in table["extra_info"].to_pylist()]
    assert easy == [row < 11_554 for row in rows]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 53_903), st.integers(0, 2**32 - 1))
def test_the_paper_rule_on_files_of_the_full_size(num_easy, seed):
    """Whatever the pass rates of 53,904 rows from easy to hard: shares, nesting, order, and pandas' draws."""
    random = np.random.RandomState(seed)
    rates = np.concatenate([random.randint(5, 17, num_easy), random.randint(0, 5, 53_904 - num_easy)]) / 16
    rates = np.sort(rates)[::-1].tolist()
    easy_in_pool = min(num_easy, 51_200)
    subsets = {}
    for tau in PAPER_TAUS:
        unique = 51_200 // tau
        chosen = np.array(make_plan(53_904, unique=unique, subset="paper", difficulties=rates).chosen)
        assert len(chosen) == unique and (np.diff(chosen) > 0).all() and chosen[-1] < 51_200
        easy = int(unique * (easy_in_pool / 51_200))
        # pandas: df.sample(n, random_state=s) takes RandomState(s).choice(len(df), n, replace=False)
        drawn = np.random.RandomState(42).choice(easy_in_pool, easy, replace=False) if easy else []
        assert sorted(drawn) == chosen[:easy].tolist()
        if unique > easy:
            drawn = np.random.RandomState(43).choice(51_200 - easy_in_pool, unique - easy, replace=False)
            assert sorted(drawn + easy_in_pool) == chosen[easy:].tolist()
        subsets[tau] = set(chosen.tolist())
    assert all(subsets[small] < subsets[large] for large, small in itertools.combinations(PAPER_TAUS, 2))


def test_a_draw_of_the_papers_is_numpys_choice():
    for size, count in ((1, 1), (10, 3), (11_554, 2_888)):
        assert paper_sample(size, count, 42).tolist() == np.random.RandomState(42).choice(size, count, False).tolist()


def released(shared_data, tau):
    """Rows of a released sample: their numbers in the full file, and their columns."""
    table = pq.read_table(shared_data / "guru_math" / f"math__sampled_1_{tau}_{RELEASED[tau]}.parquet")
    return [int(label) for label in table["__index_level_0__"].to_pylist()], table.to_pylist()


def test_released_samples_are_nested_in_all_21_pairs(shared_data):
    samples = {tau: released(shared_data, tau) for tau in RELEASED}
    texts = {row: columns["prompt"] for row, columns in zip(*samples[4], strict=True)}
    for tau, (rows, columns) in samples.items():
        assert len(set(rows)) == RELEASED[tau] and rows == sorted(rows)
        assert [texts[row] for row in rows] == [column["prompt"] for column in columns]
        rates = [column["extra_info"]["qwen2.5_7b_pass_rate"] or 0 for column in columns]
        assert rates == sorted(rates, reverse=True) and sum(rate >= 0.3 for rate in rates) == EASY[tau]
    pairs = list(itertools.combinations(RELEASED, 2))
    assert len(pairs) == 21 and all(set(samples[small][0]) < set(samples[large][0]) for large, small in pairs)


def test_paper_subsets_of_the_full_file_are_the_released_samples(shared_data):
    file = shared_data / "guru_math" / "math__full_difficulty_ordered_train_53904.parquet"
    if not file.is_file():
        pytest.skip(f"needs {file.name}, which is not among the files the paper's repository holds")
    records = read_records(str(file))
    rates = difficulties(records, "qwen2.5_7b_pass_rate")
    for tau, unique in RELEASED.items():
        plan = make_plan(len(records), unique=unique, repeats=tau, subset="paper", difficulties=rates)
        rows, columns = released(shared_data, tau)
        assert list(plan.chosen) == rows
        assert [list(records[row].prompt) for row in rows] == [
            [{"role": m["role"], "content": m["content"]} for m in column["prompt"]] for column in columns
        ]


def test_tau_100_uses_the_same_512_prompts_in_every_step():
    plan = make_plan(512, repeats=100)
    assert all(stream(plan, 512 * s, 512 * (s + 1)) == list(range(512)) for s in range(100))


def test_steps_and_their_description():
    main = make_plan(53_904)
    assert steps_for(main, 512) == 105
    assert (
        main.describe(512, 105) == "53,904 unique x tau 1 = 53,904 prompts = 105 steps x 512, 144 prompts left unused"
    )
    reused = make_plan(512, repeats=100)
    assert steps_for(reused, 512) == steps_for(make_plan(51_200), 512) == 100
    assert reused.describe(512, 100) == "512 unique x tau 100 = 51,200 prompts = 100 steps x 512"
    assert steps_for(main, 512, steps=7) == 7


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_plan(10, unique=11), r"data.unique = 11 .*10 records.*at most 10"),
        (lambda: make_plan(53_904, unique=51_201, subset="paper", difficulties=PAPER_RATES), "at most 51200"),
        (lambda: make_plan(10, subset="paper"), "data.difficulty_field"),
        (lambda: make_plan(10, order="curriculum"), "data.difficulty_field"),
        (lambda: make_plan(10, order="reverse"), "data.difficulty_field.*shuffle_once"),
        (lambda: make_plan(10, subset="difficulty_matched"), "data.difficulty_field"),
        (lambda: make_plan(10, seed=-1), "data.seed = -1"),
        (lambda: steps_for(make_plan(10, repeats=2), 4, steps=6), r"take 24 prompts.*give 20.*at least 3"),
        (lambda: steps_for(make_plan(10), 16), r"take 16 prompts.*give 10"),
    ],
)
def test_impossible_plans_are_refused(call, says):
    with pytest.raises(ConfigError, match=says):
        call()
