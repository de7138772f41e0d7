"""The host's decisions: shapes are few and never too small, and no row is lost on the way."""

import itertools

import numpy as np
import pytest

from rljax.sampling.schedule import (
    FREE,
    LanePrompts,
    Shape,
    Stats,
    fitting_level,
    grown,
    most_prompts,
    pack_rows,
    row_ladder,
    slot_ladder,
)


@pytest.mark.parametrize("chunk", [1, 7, 32])
@pytest.mark.parametrize("max_tokens", [1, 2, 33, 65, 512, 4096])
def test_slot_ladder_ends_where_everything_fits(max_tokens: int, chunk: int) -> None:
    chunk = min(chunk, max(1, max_tokens - 1))
    ladder = slot_ladder(max_tokens, chunk, 1.5)
    assert list(ladder) == sorted(set(ladder))
    assert all(size % chunk == 0 for size in ladder)
    assert max_tokens - 1 <= ladder[-1] < max_tokens - 1 + chunk + (max_tokens == 1)
    assert len(ladder) <= 7
    assert slot_ladder(max_tokens, chunk, 1.0) == ladder[-1:]


def test_slot_ladder_grows_by_half() -> None:
    ladder = slot_ladder(4096, 32, 1.5)
    assert ladder == (384, 544, 832, 1216, 1824, 2752, 4096)
    assert grown(544, 545, ladder) == 832
    assert grown(832, 100, ladder) == 832
    assert grown(544, 9999, ladder) == 4096  # rows that old have ended


def test_no_step_of_the_ladder_is_small() -> None:
    """A program that another one of nearly the same size follows at once is compiled for nothing."""
    for max_tokens in range(2, 3000, 7):
        ladder = slot_ladder(max_tokens, 16, 1.5)
        assert all(after >= 1.5 * before - 16 for before, after in itertools.pairwise(ladder)), max_tokens


@pytest.mark.parametrize(("lanes", "width"), [(32, 8), (256, 1), (3, 6), (128, 16), (1, 1), (5, 7)])
def test_row_ladder_halves_and_keeps_copies_of_the_prompts_few(lanes: int, width: int) -> None:
    levels = row_ladder(lanes, width)
    assert levels[0] == (lanes, width)
    for fewer, narrow in levels[1:]:
        assert fewer <= 2 * lanes
        assert narrow >= 1
    rows = [a * b for a, b in levels]
    assert all(after <= before // 2 + width for before, after in itertools.pairwise(rows))
    assert rows[-1] < 32 or len(levels) == 1


def test_compaction_keeps_every_live_row_and_its_prompt() -> None:
    rng = np.random.default_rng(0)
    for trial in range(200):
        group, prompts = int(rng.integers(1, 9)), int(rng.integers(1, 20))
        levels = row_ladder(prompts, group)
        samples = np.arange(prompts * group)
        live = rng.random(len(samples)) < rng.random()
        counts = [np.unique(samples[live] // group, return_counts=True)[1].tolist()]
        level = fitting_level(counts, levels, 0)
        if level == 0:
            continue
        shape = Shape(*levels[level], 64)
        sources = pack_rows(samples, live, group, shape)
        assert sources.shape == (shape.rows,), trial
        assert sorted(sources[sources != FREE]) == np.flatnonzero(live).tolist()
        for lane in sources.reshape(-1, shape.width):
            taken = lane[lane != FREE]
            assert len(set(samples[taken] // group)) <= 1
            assert (lane[: len(taken)] != FREE).all()  # the first row of a lane that is used is


def test_a_prompt_is_run_once_for_the_lanes_of_a_shard() -> None:
    lanes = np.array([3, 3, 4, FREE, 4, 4, 5, 6])
    prompts = LanePrompts.of(lanes, shards=2, most=3)
    assert prompts.prompts.tolist() == [3, 4, FREE, 4, 5, 6]
    assert prompts.place is not None
    assert prompts.place.tolist() == [0, 0, 1, 0, 0, 0, 1, 2]
    one_each = LanePrompts.of(lanes, shards=2, most=4)
    assert one_each.prompts.tolist() == lanes.tolist()
    assert one_each.place is None


@pytest.mark.parametrize(("lanes", "each"), [(1, 8), (2, 8), (9, 8), (10, 8), (32, 8), (6, 1), (5, 4), (1, 1)])
def test_most_prompts_is_what_successive_lanes_can_be_of(lanes: int, each: int) -> None:
    counts = [len({lane // each for lane in range(start, start + lanes)}) for start in range(each)]
    assert max(counts) == most_prompts(lanes, each)


def test_fitting_level_waits_for_the_fullest_shard() -> None:
    levels = ((8, 4), (16, 1), (8, 1))
    assert fitting_level([[4, 4], [1]], levels, 0) == 2
    assert fitting_level([[4, 4, 1], [1]], levels, 0) == 1
    assert fitting_level([[4, 4, 4, 4, 1], [1]], levels, 0) == 0
    assert fitting_level([[], []], levels, 1) == 2


def test_stats_count_what_a_row_attends_to() -> None:
    stats = Stats()
    stats.count_live(np.array([1, 3]), np.array([4, 3]))  # tokens 1, 2 and 3 attend to 1, 2 and 3 tokens before them
    assert (stats.live_row_steps, stats.suffix_slots_used) == (3, 6)
    stats.count_chunk(Shape(2, 3, 64), shards=2, prefix_slots=16, steps=5)
    assert (stats.row_steps, stats.suffix_slots_read, stats.prefix_slots_read) == (60, 3840, 320)
