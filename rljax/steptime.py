"""How long a step takes on a slice, by its roofline: arithmetic, memory and links of each phase, and a share of them
that is assumed to be reached. No JAX.

Lengths are log-normal around a mean and cut at the cap. Of a phase, what the devices compute and what parameters cross
the links for (fsdp) overlap, so the longer counts; what splits a layer (tensor) does not. Links are taken at their full
rate; of latencies only those of decoding count, whose messages are small.
"""

import dataclasses
import math
from functools import lru_cache

import numpy as np

from rljax import costs
from rljax.footprint import Footprint, Setting, params_on_device
from rljax.hardware import Slice
from rljax.mesh import SAMPLER_RULES

SPREAD = 0.8
"""Sigma of the logarithm of lengths, as in the benchmarks' realistic ones."""
_HOP_SECONDS = 1e-6
"""From a chip to the next ("How to Scale Your Model", jax-ml/scaling-book); NVLink is of that order."""
_OPTIMIZER_BYTES = 28
"""Of AdamW in float32 per parameter: it and both moments read and written, the gradient read."""


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step by phase, and what it makes."""

    seconds: dict[str, float]
    completion_tokens: float
    """Drawn in a step."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@lru_cache(maxsize=64)
def survival(mean: float, cap: int) -> np.ndarray:
    """[cap] share of completions of at least 1, 2, ... `cap` tokens: log-normal, cut at the cap, of this mean."""
    mean = min(mean, 0.999 * cap)
    steps = np.arange(cap, dtype=np.float64)  # a completion of more than `steps` tokens has one more
    logs = np.log(np.maximum(steps, 1e-9))

    def shares(middle: float) -> np.ndarray:
        tail = np.array([0.5 * math.erfc(z / math.sqrt(2)) for z in (logs - middle) / SPREAD])
        tail[0] = 1.0
        return tail

    low, high = -5.0, math.log(cap) + 10 * SPREAD
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle).sum() < mean else (low, middle)
    return shares(high)


def step_time(setting: Setting, found: Footprint, where: Slice) -> StepTime:
    """Of one step of the run, evaluation included as often as it is due."""
    config = setting.config
    group, prompts, plan = config.algorithm.group_size, config.data.prompts_per_step, config.plan
    live = survival(plan.completion_tokens, setting.max_tokens)
    tokens, context, drawn = _counts(setting, live)
    count = costs.forward_count(setting.arch, round(tokens), round(context), round(drawn))
    forward = _learner_seconds(setting, where, count.total, tokens)
    seconds = rollout_seconds(setting, found, where, live, prompts, group)
    if config.algorithm.kl_coefficient > 0:
        seconds["reference"] = forward
    if config.algorithm.old_logprobs == "recompute":
        seconds["old log-probs"] = forward
    flops = 3 * count.total + (count.non_embedding if found.remat == "full" else 0)
    seconds["update"] = _learner_seconds(setting, where, flops, tokens, backward=True, again=found.remat == "full")
    local = params_on_device(setting.arch, setting.mesh)
    updates = config.algorithm.updates_per_step
    seconds["update"] += updates * _OPTIMIZER_BYTES * local / where.chip.memory_rate / plan.learner_share
    seconds["sync"] = _sync_seconds(setting, where)
    if config.evaluation.data and config.evaluation.every:
        evaluated = config.evaluation.max_prompts or plan.evaluation_prompts
        once = rollout_seconds(setting, found, where, live, evaluated, config.evaluation.samples_per_prompt)
        seconds["evaluation"] = sum(once.values()) / config.evaluation.every
    return StepTime(seconds, drawn)


def _counts(setting: Setting, live: np.ndarray) -> tuple[float, float, float]:
    """(tokens, keys attended, completion tokens) of a step, each prompt once; fractions of tokens, for these are
    means."""
    prompt, group = setting.config.plan.prompt_tokens, setting.config.algorithm.group_size
    prompts, place = setting.config.data.prompts_per_step, np.arange(1, len(live) + 1)
    mean, own = float(live.sum()), float((live * place).sum())
    tokens = prompts * (prompt + group * mean)
    return tokens, prompts * (prompt * (prompt + 1) / 2 + group * (mean * prompt + own)), prompts * group * mean


# ------------------------------------------------------------------------------------------------------------- rollout


def rollout_seconds(
    setting: Setting, found: Footprint, where: Slice, live: np.ndarray, prompts: int, samples: int
) -> dict[str, float]:
    """Of prefill and decoding of `samples` completions of each of `prompts` prompts."""
    config, arch, chip = setting.config, setting.arch, where.chip
    share, tensor, shards = config.plan.sampler_share, setting.mesh.tensor, setting.row_shards
    length = round(config.plan.prompt_tokens)
    once = costs.forward_flops(arch, prompts * length, prompts * costs.causal_context_sum([length]), prompts)
    weights = costs.BYTES[setting.compute_dtype] * params_on_device(setting.sampler_arch, setting.mesh, SAMPLER_RULES)
    prefill = max(once / where.devices / chip.flops, weights / chip.memory_rate)
    rows = max(1.0, prompts * samples / shards)
    at_once = min(rows, float(found.shape.rows))
    place = np.arange(1, len(live) + 1)
    tail = _decode_step(setting, where, at_once * live, place, samples).sum()
    waiting = (rows - at_once) * float(live.sum()) / at_once  # steps in which every row is taken
    mean_age = float((live * place).sum() / live.sum())
    full = _decode_step(setting, where, np.array([at_once]), np.array([mean_age]), samples).sum() * waiting
    links = sampler_link_bytes(setting, prompts / shards * length) / where.rate_between(tensor)
    return {"prefill": prefill / share + links, "decode": float(tail + full)}


def _decode_step(setting: Setting, where: Slice, rows: np.ndarray, age: np.ndarray, samples: int) -> np.ndarray:
    """Seconds of steps at which a shard has so many `rows` live, each with `age` tokens of its own."""
    arch, chip, tensor, plan = setting.arch, where.chip, setting.mesh.tensor, setting.config.plan
    size = costs.BYTES[setting.compute_dtype]
    products = costs.matmul_params(arch) + costs.head_params(arch)
    weights = np.maximum(size * products / chip.memory_rate, 2 * products * rows / chip.flops)
    prompt = plan.prompt_tokens
    read = rows * (age + prompt / min(samples, setting.config.algorithm.group_size))
    keys = 4 * arch.num_layers * arch.num_heads * arch.head_dim * rows * (age + prompt)
    cache = np.maximum(
        read * costs.kv_bytes_per_token(arch, setting.compute_dtype) / chip.memory_rate, keys / chip.flops
    )
    logits = 3 * 4 * rows * arch.vocab_size / chip.memory_rate
    moved = sampler_link_bytes(setting, 1) * rows
    hops = 2 * arch.num_layers * tensor * _HOP_SECONDS * (tensor > 1)
    return (weights + cache + logits) / tensor / plan.sampler_share + moved / where.rate_between(tensor) + hops


def sampler_link_bytes(setting: Setting, tokens: float) -> float:
    """That each device sends while `tokens` of its shard go through the sampler, whose every layer adds up its residual
    stream twice over tensor."""
    arch, size, tensor = setting.arch, costs.BYTES[setting.compute_dtype], setting.mesh.tensor
    return 2 * 2 * arch.num_layers * tokens * arch.hidden_size * size * (tensor - 1) / tensor


# ------------------------------------------------------------------------------------------------------------- learner


def learner_link_bytes(
    setting: Setting, tokens: float, *, backward: bool = False, again: bool = False
) -> tuple[float, float]:
    """(over fsdp and data, over tensor) bytes that each device sends while `tokens` of a step go through the learner.

    Every micro-batch gathers the parameters in the compute dtype, once forward and once backward, and adds up float32
    gradients over the devices that hold rows. Over tensor every layer adds up its residual stream twice in each pass.

    Args:
      backward: the gradient too, not the scores alone.
      again: each layer is computed a second time in the backward pass.
    """
    mesh, arch, size = setting.mesh, setting.arch, costs.BYTES[setting.compute_dtype]
    whole = params_on_device(arch, dataclasses.replace(mesh, fsdp=1))  # as gathered
    updates = setting.config.algorithm.updates_per_step
    microbatches = updates * math.ceil(tokens / updates / (setting.rows.rows * setting.rows.positions))
    each = (1 + backward) * size * whole * (mesh.fsdp - 1) / mesh.fsdp
    each += backward * 4 * whole * (mesh.fsdp - 1) / mesh.fsdp
    each += backward * 2 * 4 * whole / mesh.fsdp * (mesh.data - 1) / mesh.data
    stream = 2 * size * arch.hidden_size * tokens / setting.row_shards * (mesh.tensor - 1) / mesh.tensor
    return microbatches * each, 2 * (1 + backward + again) * arch.num_layers * stream


def _learner_seconds(
    setting: Setting, where: Slice, flops: float, tokens: float, *, backward: bool = False, again: bool = False
) -> float:
    parameters, stream = learner_link_bytes(setting, tokens, backward=backward, again=again)
    compute = flops / where.devices / where.chip.flops / setting.config.plan.learner_share
    return max(compute, parameters / where.rate_between(where.devices)) + stream / where.rate_between(
        setting.mesh.tensor
    )


def sync_link_bytes(setting: Setting, made: float) -> float:
    """That each device sends for `made` of its sampler's parameters: gathered over fsdp, cast before."""
    return costs.BYTES[setting.compute_dtype] * made * (setting.mesh.fsdp - 1) / setting.mesh.fsdp


def _sync_seconds(setting: Setting, where: Slice) -> float:
    """Read, cast, gathered over fsdp, written."""
    mesh, size = setting.mesh, costs.BYTES[setting.compute_dtype]
    local, made = params_on_device(setting.arch, mesh), params_on_device(setting.sampler_arch, mesh, SAMPLER_RULES)
    moved = sync_link_bytes(setting, made) / where.rate_between(mesh.fsdp * mesh.tensor)
    return max((4 * local + size * made) / where.chip.memory_rate, moved)
