"""What a model costs by arithmetic alone: parameters, FLOPs, bytes. No JAX, no measurement.

Letters as in `config.Architecture`: L layers, D hidden_size, N query heads, K key-value heads, H head_dim, F mlp_size,
V vocab_size. A multiply-add counts 2 FLOPs; norms, rotary embeddings, softmax and the embedding gather count nothing.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rljax.config import NOMINAL_PARAMS, Architecture

BYTES = {"float32": 4, "bfloat16": 2}
"""Per parameter or cache entry."""

TRAIN_STATE_BYTES_PER_PARAM = 12
"""float32 master, first and second moment: what is held between updates. Gradients add 4 during one."""

# --------------------------------------------------------------------------------------------------------- parameters


def matmul_params(arch: Architecture) -> int:
    """Weights of the layers' matmuls, head excluded: L (D N H + 2 D K H + N H D + 3 D F)."""
    attention = 2 * arch.num_heads + 2 * arch.num_kv_heads
    return arch.num_layers * arch.hidden_size * (attention * arch.head_dim + 3 * arch.mlp_size)


def head_params(arch: Architecture) -> int:
    """D V: the output projection, also when it is the embedding table."""
    return arch.hidden_size * arch.vocab_size


def num_non_embedding_params(arch: Architecture) -> int:
    """Everything but embedding table and head.

    matmul_params + L (2 D + (N + 2 K) H if qkv_bias + 2 H if qk_norm) + D: norms, biases, query-key norms, final norm.
    """
    per_layer = 2 * arch.hidden_size
    per_layer += arch.qkv_bias * (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    per_layer += arch.qk_norm * 2 * arch.head_dim
    return matmul_params(arch) + arch.num_layers * per_layer + arch.hidden_size


def num_params(arch: Architecture) -> int:
    """All parameters; a tied table counts once."""
    return num_non_embedding_params(arch) + head_params(arch) * (1 if arch.tied_embeddings else 2)


def scaling_params(arch: Architecture, name: str) -> float:
    """The N of the scaling fits: the nominal size where `name` is one of the paper's models, else the true count."""
    return NOMINAL_PARAMS.get(name, float(num_params(arch)))


# -------------------------------------------------------------------------------------------------------------- FLOPs


def causal_context_sum(lengths: Sequence[int] | np.ndarray) -> int:
    """Keys attended by all tokens of causal sequences of these lengths: the sum of l (l + 1) / 2."""
    lengths = np.asarray(lengths, np.int64)
    return int(np.sum(lengths * (lengths + 1) // 2))


def group_tokens(prompt_lengths: np.ndarray, completion_lengths: np.ndarray) -> tuple[int, int, int]:
    """(tokens, context_sum, logit_tokens) of groups of completions that share one copy of their prompt.

    Args:
      prompt_lengths: [P].
      completion_lengths: [P, G]; a completion of length 0 is not there, nor is the prompt of a group of such.
    """
    lengths = np.asarray(completion_lengths, np.int64)
    prompts = np.asarray(prompt_lengths, np.int64) * lengths.any(axis=1)
    context = causal_context_sum(prompts) + int(np.sum(lengths * prompts[:, None])) + causal_context_sum(lengths)
    return int(prompts.sum() + lengths.sum()), context, int(lengths.sum())


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs of some passes through a model, by what they are spent on."""

    layers: int = 0
    """Matmuls of the layers: 2 `matmul_params` of each token."""
    attention: int = 0
    """Scores and values: what grows with the square of the length."""
    head: int = 0
    """Logits, with the embedding table or a head of its own."""

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(self.layers + other.layers, self.attention + other.attention, self.head + other.head)

    def __mul__(self, passes: int) -> "FlopCount":
        return FlopCount(self.layers * passes, self.attention * passes, self.head * passes)

    @property
    def non_embedding(self) -> int:
        """Without the head: what N stands for where embeddings are not counted."""
        return self.layers + self.attention

    @property
    def total(self) -> int:
        """With the head. The gather of an embedding costs nothing, so an untied table is in neither."""
        return self.layers + self.attention + self.head


def forward_count(arch: Architecture, tokens: int, context_sum: int, logit_tokens: int) -> FlopCount:
    """2 matmul_params tokens, 4 L N H context_sum and 2 D V logit_tokens.

    Args:
      tokens: tokens through the layers.
      context_sum: keys attended, summed over those tokens (`causal_context_sum`); each costs 2 N H for the score and
        2 N H for the value.
      logit_tokens: tokens of which logits are taken.
    """
    return FlopCount(
        layers=2 * matmul_params(arch) * tokens,
        attention=4 * arch.num_layers * arch.num_heads * arch.head_dim * context_sum,
        head=2 * head_params(arch) * logit_tokens,
    )


def forward_flops(arch: Architecture, tokens: int, context_sum: int, logit_tokens: int) -> int:
    """All of `forward_count`."""
    return forward_count(arch, tokens, context_sum, logit_tokens).total


def generation_flops(arch: Architecture, prompt_lengths: np.ndarray, completion_lengths: np.ndarray) -> int:
    """All of `generation_count`."""
    return generation_count(arch, prompt_lengths, completion_lengths).total


def generation_count(arch: Architecture, prompt_lengths: np.ndarray, completion_lengths: np.ndarray) -> FlopCount:
    """Of sampling, forward only: each prompt is prefilled once, then shared by its completions.

    The first token of a completion is drawn from the prompt's last position (one row of logits for the group) and its
    last token is never fed back: a completion of c tokens feeds c - 1, the k-th attending to p + k keys, each with its
    logits.

    Args:
      prompt_lengths: [P].
      completion_lengths: [P, G], or [P * G] grouped by prompt; at least 1 each.
    """
    prompts = np.asarray(prompt_lengths, np.int64)
    fed = np.asarray(completion_lengths, np.int64).reshape(len(prompts), -1) - 1
    context = causal_context_sum(prompts) + int(np.sum(fed * prompts[:, None])) + causal_context_sum(fed)
    tokens = int(prompts.sum() + fed.sum())
    return forward_count(arch, tokens, context, logit_tokens=int(fed.sum()) + len(prompts))


def update_flops(arch: Architecture, tokens: int, context_sum: int, logit_tokens: int, *, remat: str = "none") -> int:
    """Forward and backward: 3 forward, plus the layers' forward once more where remat is "full".

    "none" and "dots" keep the results of the matmuls and recompute none. Model FLOPs, the numerator of MFU, are those
    of "none" whatever was recomputed.
    """
    again = forward_flops(arch, tokens, context_sum, 0) if remat == "full" else 0
    return 3 * forward_flops(arch, tokens, context_sum, logit_tokens) + again


def paper_flops(scaling_params: float, tokens: float) -> float:
    """6 N tokens, the compute axis C of arXiv 2509.25300.

    Args:
      scaling_params: N, of the function of this name.
      tokens: prompt tokens, once per completion, and completion tokens. Sampling, rescoring and evaluation are not
        counted.
    """
    return 6.0 * scaling_params * tokens


PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""bfloat16 FLOP/s without sparsity of one JAX device, by its `device_kind`: the makers' data sheets."""


def flops_utilisation(flops: float, seconds: float, device_kind: str, num_devices: int, dtype: str) -> float | None:
    """MFU: model FLOPs (`update_flops` without recomputation) over what the devices could have done in that time.

    None where the peak is not known: another device, or an arithmetic other than bfloat16.
    """
    peak = PEAK_FLOPS.get(device_kind)
    if peak is None or dtype != "bfloat16":
        return None
    return flops / (seconds * num_devices * peak)


# -------------------------------------------------------------------------------------------------------------- bytes


def weight_bytes(arch: Architecture, dtype: str) -> int:
    """Held by one copy of the parameters."""
    return num_params(arch) * BYTES[dtype]


def kept_bytes_per_token(
    arch: Architecture, dtype: str, remat: str, *, scores: int, tensor: int = 1, split_residual: bool = True
) -> int:
    """What the backward pass of one layer finds of each token, kept by the forward pass under this rung of remat.

    In entries, split over `tensor` devices, the residual stream by positions and the rest by columns, but for the
    inputs of attention and MLP, which each of them has whole:

      full   D, the layer's input
      dots   2 D + N H + 2 K H + 2 F, what the matmuls give that the backward pass needs
      none   6 D + 3 N H + 2 K H + 2 F + N, two of the D whole, two others and the N in float32 (norms, softmax); with
             query-key norms 2 (N + K) H more, half of them in float32; with a whole score matrix two `scores` N more,
             one in float32

    Args:
      scores: keys of each query whose scores are kept: the row length where the whole matrix is, else 0.
      split_residual: as of `layers.decoder_block`; False: each device has the whole residual stream.
    """
    size, width = BYTES[dtype], arch.hidden_size
    heads, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    if remat == "full":
        whole, stream, split = 0, size * width, 0
    elif remat == "dots":
        whole, stream, split = 0, 2 * size * width, size * (heads + 2 * kv + 2 * arch.mlp_size)
    else:
        split = size * (3 * heads + 2 * kv + 2 * arch.mlp_size) + 4 * arch.num_heads
        split += arch.qk_norm * (size + 4) * (heads + kv)
        split += (size + 4) * scores * arch.num_heads
        whole, stream = 2 * size * width, (2 * size + 2 * 4) * width
    return whole + stream // (tensor if split_residual else 1) + split // tensor


def update_parts(
    arch: Architecture,
    dtype: str,
    remat: str,
    *,
    tokens: int,
    scores: int,
    logits: int,
    trained_params: int,
    tensor: int = 1,
    shards: int = 1,
) -> dict[str, int]:
    """Memory of an update on one device beside what it is given: an upper estimate of the compiler's temporary bytes.

      gradients    float32, summed so far
      temporaries  twice that again, a micro-batch's and copies in other layouts; one layer's weights, gathered and
                   cast; and all layers' as cast, of "none" and where columns are split (the TPU compiler does it then
                   once for all micro-batches)
      activations  what the layers keep, and one layer's once more, which is recomputed or being differentiated
      embedding    its gradient and its table as computed with, in whole rows
      loss head    its gradient, its weights as computed with, two chunks of logits

    Args:
      tokens: slots of a micro-batch on the device.
      scores: as in `kept_bytes_per_token`.
      logits: entries of a chunk of them.
      trained_params: of the whole model.
      tensor: devices that split a layer's columns.
      shards: devices that split the parameters, those included.
    """
    kept = kept_bytes_per_token(arch, dtype, remat, scores=scores, tensor=tensor)
    again = kept_bytes_per_token(arch, dtype, "none", scores=scores, tensor=tensor)
    again += 4 * BYTES[dtype] * arch.mlp_size // tensor  # of the gate and what it is multiplied with, not kept
    temporaries = 2 * 4 * trained_params // shards
    temporaries += matmul_params(arch) // arch.num_layers * BYTES[dtype] // tensor
    if dtype != "float32" and (remat == "none" or tensor > 1):
        temporaries += matmul_params(arch) * BYTES[dtype] // shards
    return {
        "gradients": 4 * trained_params // shards,
        "activations": tokens * (arch.num_layers * kept + again),
        "embedding": head_params(arch) * (4 + BYTES[dtype]) // tensor,
        "loss head": head_params(arch) * (4 + BYTES[dtype]) // tensor + 2 * 4 * logits // tensor,
        "temporaries": temporaries,
    }


def update_bytes(arch: Architecture, dtype: str, remat: str, **sizes: int) -> int:
    """All of `update_parts`."""
    return sum(update_parts(arch, dtype, remat, **sizes).values())


def kv_bytes_per_token(arch: Architecture, dtype: str) -> int:
    """2 L K H entries: a key and a value per layer and key-value head."""
    return 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * BYTES[dtype]


def decode_step_bytes(arch: Architecture, rows: int, context_sum: int, dtype: str) -> int:
    """Bytes one decode step must move: the floor of its time is this over the memory bandwidth.

    Every matmul weight and the head once, the cache of every token attended, and rows x V float32 logits in three
    passes (written, read for the maximum, read for the sum). An untied embedding table is gathered, not read.

    Args:
      rows: live rows.
      context_sum: cached tokens attended, summed over the rows; a prompt that rows share and that is read once counts
        once.
    """
    weights = (matmul_params(arch) + head_params(arch)) * BYTES[dtype]
    return weights + context_sum * kv_bytes_per_token(arch, dtype) + 3 * 4 * rows * arch.vocab_size
