"""Every completion lies in one place behind its prompt, rows are nearly full, and what goes in comes back."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY, make_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax.config import ARCHITECTURES
from rljax.rl.packing import Packing, RowShape, filled_rows, microbatches, pack, row_shape, train_batch
from rljax.types import LENGTH, Rollouts, select_prompts


@st.composite
def lengths(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Prompt lengths [P], completion lengths [P, G] and a row length that holds the longest pair."""
    prompts = np.array(draw(st.lists(st.integers(1, 12), max_size=8)), np.int32)
    group = draw(st.integers(1, 6))
    flat = draw(st.lists(st.integers(0, 15), min_size=len(prompts) * group, max_size=len(prompts) * group))
    completions = np.array(flat, np.int32).reshape(len(prompts), group)
    longest = int((prompts + completions.max(axis=1)).max()) if len(prompts) else 1
    return prompts, completions, longest + draw(st.integers(0, 40))


def spans(packing: Packing) -> list[tuple[int, int, int]]:
    """(row, start, end) of every copy of a prompt and every completion."""
    p = packing
    prompts = [
        (row, start, start + p.prompt_lengths[prompt])
        for prompt, row, start in zip(p.copy_prompt, p.copy_row, p.copy_start, strict=True)
    ]
    completions = [
        (p.copy_row[copy], start, start + length)
        for copy, start, length in zip(p.completion_copy, p.completion_start, p.completion_lengths, strict=True)
        if length
    ]
    return prompts + completions


@settings(max_examples=300, deadline=None)
@given(lengths())
def test_every_completion_lies_once_behind_its_prompt(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    prompts, completions, row_length = case
    packing = pack(prompts, completions, row_length)
    taken = np.zeros((packing.num_rows, row_length), int)
    for row, start, end in spans(packing):
        assert 0 <= start < end <= row_length
        taken[row, start:end] += 1
    assert taken.max(initial=0) <= 1
    assert taken.sum() == packing.used == completions.sum() + prompts[packing.copy_prompt].sum()
    assert (taken.any(axis=1)).all()  # no row for nothing
    placed = packing.completion_lengths > 0
    copy = packing.completion_copy[placed]
    assert (packing.copy_prompt[copy] == np.flatnonzero(placed) // completions.shape[1]).all()
    prompt_end = packing.copy_start[copy] + packing.prompt_lengths[packing.copy_prompt[copy]]
    assert (packing.completion_start[placed] >= prompt_end).all()
    for index in range(len(packing.copy_prompt)):
        numbers = packing.completion_number[placed][copy == index]
        assert sorted(numbers) == list(range(1, len(numbers) + 1)) and len(numbers) > 0
    for row in range(packing.num_rows):
        groups = packing.copy_group[packing.copy_row == row]
        assert groups.tolist() == list(range(len(groups)))
        assert len(set(packing.copy_prompt[packing.copy_row == row])) == len(groups)  # a prompt once per row


@settings(max_examples=200, deadline=None)
@given(lengths(), st.randoms())
def test_the_rows_hold_what_was_put_in_and_give_it_back(case, random) -> None:
    prompts, completions, row_length = case
    rng = np.random.default_rng(random.randint(0, 2**32))
    prompt_tokens = [rng.integers(1, 99, n) for n in prompts]
    completion_tokens = [rng.integers(1, 99, n) for n in completions.reshape(-1)]
    packing = pack(prompts, completions, row_length)
    rows = filled_rows(packing, prompt_tokens, np.concatenate([*completion_tokens, np.zeros(0, int)]))
    for c, tokens in enumerate(completion_tokens):
        prompt = prompt_tokens[c // completions.shape[1]]
        sequence = [*prompt, *tokens]
        copy = packing.completion_copy[c]
        for t in range(len(tokens)):
            at = packing.copy_row[copy], packing.completion_start[c] + t
            assert rows["tokens"][at] == tokens[t] and rows["positions"][at] == len(prompt) + t
            assert rows["loss_mask"][at] and rows["completion"][at] == packing.completion_number[c]
            source = at[0], rows["source"][at]
            assert rows["tokens"][source] == sequence[len(prompt) + t - 1]
            assert rows["positions"][source] == len(prompt) + t - 1
            assert rows["group"][source] == rows["group"][at] == packing.copy_group[copy]
            assert rows["completion"][source] in (0, packing.completion_number[c])
    assert rows["loss_mask"].sum() == completions.sum()
    assert (rows["group"] >= 0).sum() == packing.used
    outside = ~rows["loss_mask"]
    assert not rows["source"][outside].any() and not rows["completion"][outside].any()
    assert not rows["tokens"][rows["group"] < 0].any()
    back = packing.by_completion(rows["tokens"], 15)
    for row, tokens in zip(back, completion_tokens, strict=True):
        assert row.tolist() == [*tokens, *[0] * (15 - len(tokens))]


@settings(max_examples=200, deadline=None)
@given(lengths())
def test_the_shape_of_a_run_holds_whatever_the_lengths(case) -> None:
    prompts, completions, _ = case
    if not completions.size:
        return
    for budget in (1, 40, 10**6):
        shape = row_shape(
            TINY, 12, 15, completions.shape[1], completions=completions.size, row_shards=2, microbatch_tokens=budget,
            platform="cpu",
        )  # fmt: skip
        packing = pack(prompts, completions, shape.positions)
        assert packing.num_rows <= shape.num_microbatches * shape.rows


def test_rows_follow_lengths_alone_and_equal_lengths_fill_them() -> None:
    prompts, completions = np.full(4, 10), np.full((4, 8), 30)
    packing = pack(prompts, completions, 130)  # a prompt and four: each group in two full rows
    assert packing.num_rows == 8 and packing.used == 8 * 130
    again = pack(prompts.copy(), completions.copy(), 130)
    for field in dataclasses.fields(Packing):
        np.testing.assert_array_equal(getattr(packing, field.name), getattr(again, field.name))


def log_normal(rng: np.random.Generator, shape: tuple[int, int], mean: float, cap: int) -> np.ndarray:
    """Lengths whose spread within the cap is that of reasoning traces: standard deviation of the logarithm 0.7."""
    draws = rng.lognormal(np.log(mean) - 0.7**2 / 2, 0.7, shape)
    return np.clip(draws.round(), 1, cap).astype(np.int32)


@pytest.mark.parametrize("model", ["tiny", "qwen2.5-0.5b", "qwen2.5-7b"])
@pytest.mark.parametrize(
    ("platform", "prompts", "mean", "cap"),
    # An update of few tokens has few micro-batches on an accelerator, and of them the last is half empty.
    [("cpu", 32, 128, 512), ("cpu", 128, 424, 2048), ("gpu", 128, 424, 2048), ("tpu", 128, 424, 2048)],
)
def test_less_than_four_percent_of_the_slots_are_padding(
    platform: str, prompts: int, mean: int, cap: int, model: str
) -> None:
    shares = []
    for seed in range(10):
        lengths = log_normal(np.random.default_rng(seed), (prompts, 8), mean, cap)
        shape = row_shape(
            ARCHITECTURES[model], 64, cap, 8, completions=lengths.size, row_shards=1, microbatch_tokens=16384,
            platform=platform,
        )  # fmt: skip
        packing = pack(np.full(prompts, 64), lengths, shape.positions)
        in_use = -(-packing.num_rows // shape.rows)
        slots = in_use * shape.rows * shape.positions
        shares.append(1 - packing.used / slots)
        print(model, shape, shares[-1], packing.used / (64 * prompts + lengths.sum()))
    assert np.mean(shares) < 0.04 and max(shares) < 0.06


def made_rollouts(lengths: np.ndarray) -> Rollouts:
    rng = np.random.default_rng(0)
    inside = np.arange(16) < lengths.reshape(-1, 1)
    return Rollouts(
        make_prompts([5, 9, 2]), lengths.shape[1], np.where(inside, rng.integers(2, 37, inside.shape), 0),
        lengths.reshape(-1), np.where(inside, -rng.random(inside.shape), 0).astype(np.float32),
        np.full(lengths.size, LENGTH, np.int8),
    )  # fmt: skip


def test_train_batch_carries_each_number_to_its_tokens() -> None:
    lengths = np.array([[3, 16, 1], [0, 4, 7], [2, 2, 11]], np.int32)
    rollouts = made_rollouts(lengths)
    packing = pack(rollouts.prompts.lengths, lengths, 32)
    advantages, weights = (np.arange(9).reshape(3, 3) + np.float32(shift) for shift in (1, 0.5))
    batch = train_batch(rollouts, advantages, weights, packing)
    inside = np.arange(16) < lengths.reshape(-1, 1)
    for values, expected in (
        (batch.tokens, rollouts.tokens),
        (batch.behaviour_logprobs, rollouts.behaviour_logprobs),
        (batch.old_logprobs, rollouts.behaviour_logprobs),
        (batch.advantages, np.where(inside, advantages.reshape(-1, 1), 0)),
        (batch.weights, np.where(inside, weights.reshape(-1, 1), 0)),
    ):
        np.testing.assert_array_equal(packing.by_completion(np.asarray(values), 16), expected)
    for values in (batch.advantages, batch.weights, batch.behaviour_logprobs, batch.source):
        assert not np.asarray(values)[~np.asarray(batch.loss_mask)].any()


@pytest.mark.parametrize(
    ("shape", "in_use"), [(RowShape(4, 1, 32), 3), (RowShape(2, 4, 32), 1), (RowShape(1, 2, 32), 2)]
)
def test_microbatches_keep_every_row_once(shape: RowShape, in_use: int) -> None:
    lengths = np.array([[3, 16, 1], [6, 4, 7], [2, 2, 11]], np.int32)
    rollouts = made_rollouts(lengths)
    packing = pack(rollouts.prompts.lengths, lengths, shape.positions)
    assert packing.num_rows == 3
    batch = train_batch(rollouts, np.ones((3, 3)), np.ones((3, 3)), packing)
    split, used = microbatches(batch, shape)
    assert used == in_use and split.tokens.shape == (max(in_use, shape.num_microbatches), shape.rows, 32)
    flat = jax.tree.map(lambda x: x.reshape(-1, 32), split)
    np.testing.assert_array_equal(flat.tokens[:3], batch.tokens)
    assert (flat.group[3:] == -1).all() and not flat.weights[3:].any() and not flat.loss_mask[3:].any()


def test_an_update_of_nothing_is_one_microbatch_of_padding() -> None:
    none = select_prompts(made_rollouts(np.ones((3, 4), np.int32)), np.zeros(0, int))
    packing = pack(none.prompts.lengths, none.lengths.reshape(0, 4), 32)
    batch = train_batch(none, np.zeros((0, 4)), np.zeros((0, 4)), packing)
    split, in_use = microbatches(batch, RowShape(3, 2, 32))
    assert in_use == 1 and split.tokens.shape == (3, 2, 32) and (split.group == -1).all()
