"""The loss head computes what whole logits would give, loss and gradients, and never holds them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_update import make_rollouts, packed, weights_of

from rljax.config import AlgorithmConfig, Architecture
from rljax.models import qwen2
from rljax.models.attention import AttentionLayout
from rljax.models.scoring import chunk_tokens
from rljax.rl.head import batch_loss
from rljax.rl.losses import grpo_loss, is_by_token
from rljax.rl.packing import train_batch
from rljax.types import TrainBatch

VOCAB = 53
ARCH = Architecture(
    hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, vocab_size=VOCAB,
    tied_embeddings=True, num_tokens=50,
)  # fmt: skip
OPTIONS = {"by_token": True, "train_head": True, "temperature": 0.7, "compute_dtype": "float32", "remat": "none"}


def make_batch() -> TrainBatch:
    """Two groups in two rows with padding; old, behaviour and reference log-probs are made up."""
    rollouts = make_rollouts()
    advantages = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    batch = train_batch(rollouts, advantages, weights_of(rollouts), packed(rollouts, 64))
    noise = np.random.default_rng(2).normal(-4, 0.3, (2, *batch.tokens.shape)).astype(np.float32)
    return dataclasses.replace(batch, old_logprobs=noise[0], reference_logprobs=noise[1])


def loss_of(algorithm: AlgorithmConfig):
    return lambda logprobs, entropies, rows: grpo_loss(logprobs, entropies, rows, algorithm)


def whole_loss(params, arch: Architecture, batch: TrainBatch, algorithm: AlgorithmConfig):
    """The same from all logits at once, differentiated by JAX."""
    layout = AttentionLayout(jnp.asarray(batch.group), jnp.asarray(batch.completion))
    hidden = qwen2.forward(params, arch, batch.tokens, batch.positions, layout)
    predicting = jnp.take_along_axis(hidden, jnp.asarray(batch.source)[..., None], axis=1)
    logprobs = jax.nn.log_softmax(qwen2.logits(params, arch, predicting) / OPTIONS["temperature"], axis=-1)
    entropies = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.asarray(batch.tokens)[..., None], axis=-1)[..., 0]
    mask = batch.loss_mask
    return grpo_loss(jnp.where(mask, chosen, 0.0), jnp.where(mask, entropies, 0.0), batch, algorithm)


@pytest.fixture(params=[True, False], ids=["tied", "untied"], scope="module")
def arch(request) -> Architecture:
    return dataclasses.replace(ARCH, tied_embeddings=request.param)


@pytest.fixture(scope="module")
def params(arch: Architecture):
    return jax.tree.map(lambda x: x * 4, qwen2.init(jax.random.key(3), arch))


@pytest.mark.parametrize("by_token", [True, False], ids=["one pass", "two passes"])
def test_loss_and_gradient_are_those_of_whole_logits(params, arch, by_token, monkeypatch) -> None:
    monkeypatch.setattr("rljax.models.scoring.MAX_CHUNK", 11)  # 52 tokens: four chunks and part of a fifth
    algorithm = AlgorithmConfig(kl_coefficient=0.05, entropy_coefficient=0.1)
    batch = make_batch()
    options = OPTIONS | {"by_token": by_token}
    found = jax.jit(
        jax.value_and_grad(lambda p: batch_loss(loss_of(algorithm), p, arch, batch, **options), has_aux=True)
    )(params)
    expected = jax.jit(jax.value_and_grad(lambda p: whole_loss(p, arch, batch, algorithm), has_aux=True))(params)
    assert float(found[0][0]) == pytest.approx(float(expected[0][0]), rel=1e-5)
    for name, metric in expected[0][1].items():
        assert found[0][1][name].value() == pytest.approx(metric.value(), rel=1e-5, abs=1e-6), name
    for mine, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        scale = float(jnp.abs(theirs).max())
        assert scale > 0
        np.testing.assert_allclose(mine, theirs, atol=2e-6 * max(scale, 1e-3))


@pytest.mark.parametrize("by_token", [True, False], ids=["one pass", "two passes"])
def test_a_frozen_head_changes_no_other_gradient(params, arch, by_token) -> None:
    loss, batch = loss_of(AlgorithmConfig(kl_coefficient=0.05)), make_batch()

    def gradient(train_head: bool):
        options = OPTIONS | {"by_token": by_token, "train_head": train_head}
        return jax.jit(jax.grad(lambda p: batch_loss(loss, p, arch, batch, **options)[0]))(params)

    trained, frozen = gradient(True), gradient(False)
    for mine, theirs in zip(*(jax.tree.leaves(g["layers"]) for g in (trained, frozen)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-8)
    name = "embed" if arch.tied_embeddings else "head"
    assert float(jnp.abs(trained[name] - frozen[name]).max()) > 1e-3


def test_which_losses_are_sums_over_tokens() -> None:
    """Those that are not would lose their completions to the cutting: they differ between the two ways."""
    assert is_by_token(AlgorithmConfig(loss="clip", correction="token_truncate"))
    assert is_by_token(AlgorithmConfig(loss="cispo"))
    assert not is_by_token(AlgorithmConfig(loss="gspo"))
    assert not is_by_token(AlgorithmConfig(off_policy_mask=1e-4))
    for correction in ("sequence_truncate", "sequence_mask", "geometric_mask", "error_mask"):
        assert not is_by_token(AlgorithmConfig(correction=correction))


def test_without_completion_tokens_there_is_no_loss(params, arch) -> None:
    batch = dataclasses.replace(make_batch(), loss_mask=np.zeros((2, 64), bool)[: make_batch().tokens.shape[0]])
    (value, metrics), gradient = jax.jit(
        jax.value_and_grad(
            lambda p: batch_loss(loss_of(AlgorithmConfig(kl_coefficient=0.05)), p, arch, batch, **OPTIONS),
            has_aux=True,
        )
    )(params)
    assert float(value) == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))
    assert all(metric.value() == 0 for metric in metrics.values())


@pytest.mark.parametrize("by_token", [True, False], ids=["one pass", "two passes"])
def test_no_more_logits_than_a_chunk_exist(by_token, monkeypatch) -> None:
    monkeypatch.setattr("rljax.models.scoring.MAX_CHUNK", 11)
    batch, options = make_batch(), OPTIONS | {"by_token": by_token}
    loss = loss_of(AlgorithmConfig(kl_coefficient=0.05))
    params = qwen2.init(jax.random.key(3), ARCH)
    gradient = jax.jit(jax.grad(lambda p: batch_loss(loss, p, ARCH, batch, **options)[0]))
    text = gradient.lower(params).compile().as_text()
    assert text is not None
    shapes = [[int(n) for n in dims.split(",")] for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    logits = [shape for shape in shapes if VOCAB in shape]
    assert [11, VOCAB] in logits
    assert max(np.prod(shape) for shape in logits) == VOCAB * 16  # the head itself; 11 tokens are fewer


def test_a_chunk_is_what_the_platform_works_well_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a CPU's caches; a thousand rows for the matrix units of the others; never more than there is."""
    for platform, of_qwen in (("cpu", 110), ("gpu", 1024), ("tpu", 1024)):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert chunk_tokens(16384, 151936) == of_qwen
        assert chunk_tokens(16384, 512) == 1024
        assert chunk_tokens(100, 151936) == 100
        assert chunk_tokens(16384, 2**30) == (1 if platform == "cpu" else 1024)
