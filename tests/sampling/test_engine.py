"""The sampler draws what the learner scores, and a row's draw depends on nothing around it."""

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_prompts

from rljax.models import qwen2
from rljax.models.attention import AttentionLayout
from rljax.rl.logprobs import batch_logprobs
from rljax.rl.packing import pack, train_batch
from rljax.sampling.cache import decode_attention, visible_slots, without_hidden
from rljax.sampling.engine import EngineOptions, Sampler, bucket
from rljax.types import LENGTH, STOP

KEY = jax.random.key(42)
STOPS = (1, 30)


@pytest.fixture(scope="module")
def sampler(tiny, tiny_params, mesh):
    sampler = Sampler(None, tiny, mesh, stop_ids=STOPS, options=EngineOptions(chunk_tokens=8))
    sampler.sync(tiny_params)
    return sampler


def test_a_sync_is_the_whole_layout_by_one_program_for_all_layers(tiny, tiny_params, mesh) -> None:
    sampler = Sampler(tiny_params, tiny, mesh, stop_ids=STOPS)
    expected = jax.jit(lambda params: qwen2.sampler_params(params, tiny, jnp.float32))(tiny_params)
    jax.tree.map(np.testing.assert_array_equal, sampler.params, expected)
    sampler.sync(jax.tree.map(lambda leaf: 2 * leaf, tiny_params))
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, 2 * old), sampler.params, expected)
    assert tiny.num_layers > 1
    assert sampler.layer_to_sampler._cache_size() == sampler.outside_to_sampler._cache_size() == 1


def test_released_parameters_are_freed_and_asked_for(tiny, tiny_params, mesh) -> None:
    sampler = Sampler(tiny_params, tiny, mesh, stop_ids=STOPS)
    generate(sampler, make_prompts([5]), cap=8)
    held = [weakref.ref(leaf) for leaf in jax.tree.leaves(sampler.params)]
    sampler.release()
    assert held and not any(leaf() for leaf in held)
    with pytest.raises(RuntimeError, match="call sync"):
        generate(sampler, make_prompts([5]), cap=8)
    sampler.sync(tiny_params)
    generate(sampler, make_prompts([5]), cap=8)


def generate(sampler, prompts, samples=4, *, temperature=1.0, cap=40):
    return sampler.generate(prompts, samples, key=KEY, temperature=temperature, max_completion_tokens=cap)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_behaviour_logprobs_are_the_learners(sampler, tiny, tiny_params, temperature) -> None:
    rollouts = generate(sampler, make_prompts([5, 16, 1, 9, 12]), temperature=temperature)
    packing = pack(rollouts.prompts.lengths, rollouts.lengths.reshape(5, 4), row_length=128)
    batch = train_batch(rollouts, np.ones((5, 4)), np.ones((5, 4)), packing)
    learner, entropy = batch_logprobs(tiny_params, tiny, batch, temperature=temperature, compute_dtype="float32")
    assert batch.loss_mask.sum() == rollouts.lengths.sum() > 300
    np.testing.assert_allclose(learner, batch.behaviour_logprobs, atol=1e-5)
    assert float(jnp.where(batch.loss_mask, entropy, 1).min()) > 0


def test_greedy_is_the_argmax_of_the_full_forward(sampler, tiny, tiny_params) -> None:
    prompts = make_prompts([6, 11])
    rollouts = generate(sampler, prompts, 1, temperature=0.0, cap=12)
    forward = jax.jit(lambda ids, layout: qwen2.forward(tiny_params, tiny, ids, jnp.arange(24)[None], layout))
    for row in range(2):
        length = int(prompts.lengths[row])
        ids = np.zeros((1, 24), np.int32)
        ids[0, :length] = prompts.tokens[row, :length]
        for token in rollouts.tokens[row, : rollouts.lengths[row]]:
            hidden = forward(jnp.array(ids), AttentionLayout.right_padded(jnp.array([length]), 24))
            assert int(qwen2.logits(tiny_params, tiny, hidden[0, length - 1]).argmax()) == token
            ids[0, length] = token
            length += 1


def test_completions_end_with_their_stop_token(sampler) -> None:
    rollouts = generate(sampler, make_prompts([4] * 8), 8, cap=40)
    assert set(rollouts.stop_reasons) == {STOP, LENGTH}
    for tokens, length, reason, logprobs in zip(
        rollouts.tokens, rollouts.lengths, rollouts.stop_reasons, rollouts.behaviour_logprobs, strict=True
    ):
        stops = np.isin(tokens[:length], STOPS)
        assert not stops[:-1].any()
        assert stops[-1] == (reason == STOP)
        assert reason == STOP or length == 40
        assert not tokens[length:].any() and not logprobs[length:].any()
        assert (logprobs[:length] < 0).all()


def test_vocabulary_padding_is_never_sampled(sampler, tiny, tiny_params, mesh) -> None:
    favoured = {**tiny_params, "embed": tiny_params["embed"].at[37:].set(50.0)}  # logits of the padding rows explode
    adversarial = Sampler(None, tiny, mesh, stop_ids=STOPS, options=EngineOptions(chunk_tokens=8))
    adversarial.sync(favoured)
    assert generate(adversarial, make_prompts([4] * 4), 8).tokens.max() < 37


def test_a_row_does_not_depend_on_the_rows_around_it(sampler, tiny, tiny_params, mesh) -> None:
    prompts = make_prompts([5, 16, 3, 9, 12, 7])
    whole = generate(sampler, prompts)
    for rows in ([3], [5, 1], [4, 0, 2]):
        part = dataclasses.replace(
            prompts,
            tokens=prompts.tokens[rows],
            lengths=prompts.lengths[rows],
            positions=prompts.positions[rows],
            records=tuple(prompts.records[r] for r in rows),
        )
        some = generate(sampler, part)
        expected = whole.tokens.reshape(6, 4, -1)[rows].reshape(some.tokens.shape)
        np.testing.assert_array_equal(some.tokens, expected)
        logprobs = whole.behaviour_logprobs.reshape(6, 4, -1)[rows].reshape(some.tokens.shape)
        np.testing.assert_allclose(some.behaviour_logprobs, logprobs, atol=1e-5)
    for chunk in (1, 5, 64):  # nor on how the loop is cut, nor on padding
        other = Sampler(None, tiny, mesh, stop_ids=STOPS, options=EngineOptions(chunk_tokens=chunk))
        other.sync(tiny_params)
        padded = dataclasses.replace(prompts, tokens=np.pad(prompts.tokens, ((0, 0), (0, 50)), constant_values=1))
        np.testing.assert_array_equal(generate(other, padded).tokens, whole.tokens)


def test_samples_of_a_prompt_differ_and_a_repeat_is_the_same(sampler) -> None:
    prompts = make_prompts([5, 5], slots=8)
    first, again = generate(sampler, prompts, 8), generate(sampler, prompts, 8)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.behaviour_logprobs, again.behaviour_logprobs)
    assert len({tuple(row) for row in first.tokens}) == 16


def test_cap_of_one_token(sampler) -> None:
    rollouts = generate(sampler, make_prompts([4, 6]), 3, cap=1)
    assert rollouts.tokens.shape == (6, 1) and (rollouts.lengths == 1).all()


def test_attention_is_one_softmax_over_prompt_and_own_tokens() -> None:
    """Row by row against plain softmax, with rows of different ages around the ring."""
    rng = np.random.default_rng(0)
    prefix = [jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 2, 8, 6), (2, 2, 6, 8))]
    suffix = [jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((6, 2, 8, 5), (6, 2, 5, 8))]
    q = jnp.asarray(rng.normal(size=(6, 4, 8)), jnp.float32)
    prompt_lengths, lengths, slot = jnp.array([4, 6]), jnp.array([1, 2, 3, 4, 5, 2]), jnp.int32(1)
    in_prompt = jnp.arange(6) < prompt_lengths[:, None]
    visible = visible_slots(lengths, slot, 5)
    hidden = [jnp.where(mask[:, None, :, None], v, 1e9) for mask, v in ((in_prompt, prefix[1]), (visible, suffix[1]))]
    for values in ((prefix[1], suffix[1]), hidden):
        clean = without_hidden(values[0], in_prompt), without_hidden(values[1], visible)
        context = decode_attention(q, (prefix[0], clean[0]), in_prompt, (suffix[0], clean[1]), visible)
        for row in range(6):
            p = row // 3
            own = [(1 - age) % 5 for age in range(int(lengths[row]))]
            k = jnp.concatenate([prefix[0][p, :, :, : prompt_lengths[p]], suffix[0][row][:, :, own]], axis=2)
            v = jnp.concatenate([prefix[1][p, :, : prompt_lengths[p]], suffix[1][row][:, own]], axis=1)
            for head in range(4):
                probs = jax.nn.softmax(q[row, head] @ k[head // 2] / np.sqrt(8))
                np.testing.assert_allclose(context[row, head], probs @ v[head // 2], atol=1e-6)


def test_programs_are_reused(sampler) -> None:
    generate(sampler, make_prompts([5, 9, 3], slots=16))
    before = len(sampler._programs)
    for seed in range(3):
        generate(sampler, make_prompts([4 + seed, 12, 2], seed=seed, slots=16), temperature=0.5 + seed)
    assert len(sampler._programs) == before


def test_buckets_are_few_and_never_too_small() -> None:
    assert all(bucket(n) >= n for n in range(1, 9000))
    assert len({bucket(n) for n in range(1, 4097)}) == 14
