"""Costs against counts from published tables and against values worked by hand."""

from functools import partial

import numpy as np
import pytest

from rljax import costs
from rljax.config import ARCHITECTURES, Architecture

# D 4, L 2, N 2, K 1, H 2, F 3, V 5, untied, with biases.
#   q 4*2*2 = 16, k 4*2 = 8, v 8, o 16, gate, up, down 3*4*3 = 36: 84 per layer, 168 in all; head 4*5 = 20
#   other: per layer norms 8, biases (2 + 2) * 2 = 8; final norm 4: 2 * 16 + 4 = 36
SMALL = Architecture(4, 2, 2, 1, 2, 3, 5, tied_embeddings=False)


@pytest.mark.parametrize(
    ("name", "non_embedding", "total"),
    [
        ("qwen2.5-0.5b", 357_898_112, 494_032_768),
        ("qwen2.5-1.5b", 1_310_340_608, 1_543_714_304),
        ("qwen2.5-3b", 2_774_773_760, 3_085_938_688),
        ("qwen2.5-7b", 6_525_621_760, 7_615_616_512),
        ("qwen2.5-14b", 13_212_898_304, 14_770_033_664),
        ("qwen2.5-32b", 31_206_740_992, 32_763_876_352),
        ("qwen2.5-72b", 70_214_787_072, 72_706_203_648),
    ],
)
def test_parameter_counts_of_the_paper(name, non_embedding, total):
    assert costs.num_non_embedding_params(ARCHITECTURES[name]) == non_embedding
    assert costs.num_params(ARCHITECTURES[name]) == total


@pytest.mark.parametrize(("name", "total"), [("smollm2-135m", 134_515_008), ("qwen3-0.6b", 596_049_920)])
def test_parameter_counts_without_bias_and_with_query_key_norms(name, total):
    assert costs.num_params(ARCHITECTURES[name]) == total


def test_parameters_by_hand():
    assert costs.matmul_params(SMALL) == 168
    assert costs.head_params(SMALL) == 20
    assert costs.num_non_embedding_params(SMALL) == 168 + 36
    assert costs.num_params(SMALL) == 168 + 36 + 2 * 20


def test_scaling_params_are_nominal_where_the_paper_has_them():
    assert costs.scaling_params(ARCHITECTURES["qwen2.5-7b"], "qwen2.5-7b") == 7e9
    assert costs.scaling_params(SMALL, "small") == 244.0


def test_forward_flops_by_hand():
    # Sequences of 3 and 2 tokens: 1+2+3 + 1+2 = 9 keys; 4*2*2*2 = 32 FLOPs per key; logits of 2 tokens.
    assert costs.causal_context_sum([3, 2]) == 9
    assert costs.forward_flops(SMALL, 5, 9, 2) == 2 * 168 * 5 + 32 * 9 + 2 * 20 * 2


def test_forward_flops_per_token_of_the_paper_models():
    # GFLOP per token with logits, attention left out: 2 (matmul + head), to the digits published
    for name, expected in (("qwen2.5-0.5b", "0.99"), ("qwen2.5-7b", "14.14"), ("qwen2.5-72b", "142.9")):
        digits = len(expected.split(".")[1])
        assert f"{costs.forward_flops(ARCHITECTURES[name], 1, 0, 1) / 1e9:.{digits}f}" == expected


def test_generation_is_a_prefill_and_single_steps():
    prompts, completions = np.array([3, 2]), np.array([[4, 1], [2, 5]])
    expected = 0
    for prompt, group in zip(prompts, completions, strict=True):
        expected += costs.forward_flops(SMALL, int(prompt), costs.causal_context_sum([prompt]), 1)
        for length in group:
            for fed in range(1, length):  # token k of the completion attends to the prompt and k of its own
                expected += costs.forward_flops(SMALL, 1, int(prompt) + fed, 1)
    assert costs.generation_flops(SMALL, prompts, completions) == expected
    assert costs.generation_flops(SMALL, prompts, completions.reshape(-1)) == expected


def test_flops_by_what_they_are_spent_on():
    count = costs.forward_count(SMALL, 5, 9, 2)
    assert (count.layers, count.attention, count.head) == (2 * 168 * 5, 32 * 9, 2 * 20 * 2)
    assert count.non_embedding == 2 * 168 * 5 + 32 * 9 and count.total == count.non_embedding + 80
    assert count * 3 + costs.FlopCount(head=1) == costs.FlopCount(3 * 1680, 3 * 288, 241)
    # A prompt of 3, completions of 4 and 1: 3 + 3 tokens fed, 6 + (3 * 3 + 1 + 2 + 3) keys, 1 + 3 rows of logits.
    assert costs.generation_count(SMALL, np.array([3]), np.array([[4, 1]])) == costs.forward_count(SMALL, 6, 21, 4)


def test_the_full_count_of_the_paper_is_about_twice_its_own():
    """2 N to sample, 2 N for the old, 2 N for the reference log-prob and 6 N to train: 12 N a token, by the layers."""
    arch, tokens = ARCHITECTURES["qwen2.5-7b"], 4_000_000
    forward = costs.forward_count(arch, tokens, 0, tokens)
    full = forward + forward * 2 + forward * 3
    assert full.layers == pytest.approx(12 * costs.num_non_embedding_params(arch) * tokens, rel=1e-4)
    assert full.total == pytest.approx(2 * costs.paper_flops(7e9, tokens), rel=0.02)


def test_kept_activations_by_hand():
    # D 4, N H 4, K H 2, F 3, N 2, bfloat16
    assert costs.kept_bytes_per_token(SMALL, "bfloat16", "full", scores=0) == 2 * 4
    assert costs.kept_bytes_per_token(SMALL, "bfloat16", "dots", scores=0) == 2 * (8 + 4 + 4 + 6)
    none = 2 * (16 + 12 + 4 + 6) + 4 * (8 + 2)
    assert costs.kept_bytes_per_token(SMALL, "bfloat16", "none", scores=0) == none
    assert costs.kept_bytes_per_token(SMALL, "bfloat16", "none", scores=7) == none + (2 + 4) * 7 * 2
    # What is split over two devices is all but what attention and MLP take, or all but the residual stream.
    kept = partial(costs.kept_bytes_per_token, SMALL, "bfloat16", scores=0, tensor=2)
    assert kept("full") == 2 * 2 and kept("full", split_residual=False) == 2 * 4
    assert kept("dots") == 2 * (4 + 7) and kept("dots", split_residual=False) == 2 * (8 + 7)
    assert kept("none") == 16 + (none - 16) // 2 and kept("none", split_residual=False) == 64 + (none - 64) // 2


def test_update_flops_by_hand():
    forward = 2 * 168 * 5 + 32 * 9
    assert costs.update_flops(SMALL, 5, 9, 2) == 3 * (forward + 80)
    assert costs.update_flops(SMALL, 5, 9, 2, remat="dots") == 3 * (forward + 80)
    assert costs.update_flops(SMALL, 5, 9, 2, remat="full") == 4 * forward + 3 * 80


def test_a_group_shares_its_prompt():
    # Prompt 3 with completions 2 and 1: context 6 + (3 * 2 + 3) + (3 * 1 + 1) = 19. The second group is not there.
    counts = costs.group_tokens(np.array([3, 9]), np.array([[2, 1], [0, 0]]))
    assert counts == (3 + 2 + 1, 19, 3)
    assert costs.group_tokens(np.array([4]), np.array([[5]])) == (9, costs.causal_context_sum([9]), 5)


def test_flops_utilisation_is_of_known_devices_in_bfloat16():
    assert costs.flops_utilisation(4 * 989e12, 2.0, "NVIDIA H200", 8, "bfloat16") == 0.25
    assert costs.flops_utilisation(1e15, 2.0, "cpu", 1, "bfloat16") is None
    assert costs.flops_utilisation(1e15, 2.0, "NVIDIA H200", 1, "float32") is None


def test_paper_compute():
    # One step of the 0.5B base run: 4.20 M tokens.
    assert costs.paper_flops(0.5e9, 4.2e6) == 1.26e16


def test_bytes():
    published = {
        "qwen2.5-0.5b": 12_288,
        "qwen2.5-1.5b": 28_672,
        "qwen2.5-3b": 36_864,
        "qwen2.5-7b": 57_344,
        "qwen2.5-14b": 196_608,
        "qwen2.5-32b": 262_144,
        "qwen2.5-72b": 327_680,
    }
    for name, expected in published.items():
        assert costs.kv_bytes_per_token(ARCHITECTURES[name], "bfloat16") == expected
    assert costs.weight_bytes(SMALL, "float32") == 4 * 244
    # weights 2 * 188; 7 cached tokens of 2 * 2 * 1 * 2 * 2 = 16 bytes; 3 rows of 5 logits, 4 bytes, three passes
    assert costs.decode_step_bytes(SMALL, 3, 7, "bfloat16") == 376 + 112 + 180
