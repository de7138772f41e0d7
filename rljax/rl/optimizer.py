"""The optimizer: AdamW or Muon, its learning rate, how moments are stored, and one step of it on a gradient.

Letters: L layers, D width, N query or key/value heads, H head dim, F MLP width.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from rljax.config import OptimizerConfig
from rljax.metrics import Metric, Sum, WeightedMean
from rljax.models.qwen2 import Params
from rljax.types import TrainState

# ------------------------------------------------------------------------------------------------------ learning rate

SCHEDULES: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    "constant": lambda peak, fraction, updates: optax.constant_schedule(peak),
    "linear": lambda peak, fraction, updates: optax.linear_schedule(peak, peak * fraction, updates),
    "cosine": lambda peak, fraction, updates: optax.cosine_decay_schedule(peak, updates, fraction),
}
"""From the highest rate to `fraction` of it in so many updates, and that from then on."""


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ... of those that were not skipped.

      n < warmup_updates       learning_rate (n + 1) / warmup_updates
      warmup_updates           learning_rate
      decay_updates and after  learning_rate x final_learning_rate_fraction, unless constant

    The first update learns already, as in nanochat (scripts/base_train.py). transformers' n / warmup, which verl and
    TRL take, gives it a rate of 0: a whole step's rollouts for nothing.
    """
    peak, warmup = config.learning_rate, config.warmup_updates
    after = SCHEDULES[config.schedule](peak, config.final_learning_rate_fraction, config.decay_updates - warmup)
    if not warmup:
        return after
    ramp = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([lambda count: ramp(count + 1), after], [warmup])


# -------------------------------------------------------------------------------------------------------------- rules


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Torch's: bias correction, eps outside the root, decoupled decay on every parameter."""
    rate = learning_rate_schedule(config)
    return optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)


MUON_MATRICES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "layers.q": ((1,), (2, 3)),  # [L, D, N, H] is L matrices [D, N H]
    "layers.k": ((1,), (2, 3)),
    "layers.v": ((1,), (2, 3)),
    "layers.o": ((1, 2), (3,)),  # [L, N, H, D] is L matrices [N H, D]
    "layers.gate": ((1,), (2,)),
    "layers.up": ((1,), (2,)),
    "layers.down": ((1,), (2,)),
}
"""Parameters that Muon moves, and which dims of each are a matrix's input and output. By name, not by rank: biases are
[L, N, H], norms [L, D], and the embedding is a table of vectors, not a map of them."""

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2
"""Root mean square of an update before the learning rate, about AdamW's, so that one rate and one decay serve both
(arXiv:2502.16982, section 2.2)."""


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon on each layer's matrices, AdamW on everything else.

    From `contrib.scale_by_muon`, because the AdamW inside `contrib.muon` has Nesterov momentum and torch's has not.
    """

    def name(path: Any) -> str:
        return jax.tree_util.keystr(path, simple=True, separator=".")

    def kinds(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "muon" if name(path) in MUON_MATRICES else "adamw", params)

    def matrices(updates: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: contrib.MuonDimensionNumbers(*MUON_MATRICES[name(path)]), updates)

    def rescaled(path: Any, update: jax.Array) -> jax.Array:
        # Orthogonal [m, n] has root mean square 1 / sqrt(max(m, n)).
        sides = [math.prod(update.shape[dim] for dim in dims) for dims in MUON_MATRICES[name(path)]]
        return update * (MUON_RMS * math.sqrt(max(sides)))

    muon = optax.chain(
        contrib.scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=matrices),
        optax.stateless(lambda updates, _: jax.tree.map_with_path(rescaled, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )
    return optax.partition({"muon": muon, "adamw": _adamw(config)}, kinds)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {"adamw": _adamw, "muon": _muon}


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The rule and its moments' dtype; clipping, and what is refused, are in `apply_gradients`."""
    optimizer = OPTIMIZERS[config.name](config)
    return moments_in_bfloat16(optimizer) if config.moments_dtype == "bfloat16" else optimizer


# ------------------------------------------------------------------------------------------------------------ moments


class RoundedState(NamedTuple):
    """State of `moments_in_bfloat16`."""

    count: jax.Array  # [] int32, updates so far
    inner: optax.OptState  # its moments in bfloat16


def moments_in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, computing in float32 and keeping what it has per parameter in bfloat16: 2 bytes a moment for 4.

    Rounding is stochastic. To the nearest, a second moment with b2 = 0.999 would never shrink: an update changes it by
    less than 0.1 %, and the nearest other bfloat16 is 0.4 % away.
    """

    def init(params: Any) -> RoundedState:
        narrow = optax.tree_map_params(inner, lambda moment: moment.astype(jnp.bfloat16), inner.init(params))
        return RoundedState(jnp.zeros((), jnp.int32), narrow)

    def update(grads: Any, state: RoundedState, params: Any = None) -> tuple[Any, RoundedState]:
        wide = optax.tree_map_params(inner, lambda moment: moment.astype(jnp.float32), state.inner)
        changes, wide = inner.update(grads, wide, params)
        stream = itertools.count()  # a number per moment: no two share their noise
        narrow = optax.tree_map_params(inner, lambda moment: round_randomly(moment, state.count, next(stream)), wide)
        return changes, RoundedState(state.count + 1, narrow)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def round_randomly(values: jax.Array, update: jax.Array, stream: int) -> jax.Array:
    """float32 `values` as bfloat16, each to one of its two neighbours, so that the mean over updates is the value.

    The 16 bits that bfloat16 lacks are added to 16 random ones; a carry is the step away from zero. What bfloat16 holds
    stays as it is, 0 and infinities too. The random bits are a hash of (update, stream, place), the same for every
    sharding, because threefry costs more time than bfloat16 saves.
    """
    key = _mixed(_mixed(jnp.asarray(update, jnp.uint32)) ^ np.uint32(stream))
    place = jnp.zeros(values.shape, jnp.uint32)  # beyond 2**32 places they repeat, which does no harm
    for axis, size in enumerate(values.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, values.shape, axis)
    noise = _mixed(place ^ key) >> 16
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _mixed(bits: jax.Array) -> jax.Array:
    """The finisher of MurmurHash3 on uint32: a bijection in which every bit in moves every bit out."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return bits ^ (bits >> 16)


# --------------------------------------------------------------------------------------------------------------- step


@partial(jax.jit, static_argnames="config")
def init_state(params: Params, config: OptimizerConfig) -> TrainState:
    """Fresh moments around a copy of `params`."""
    copy = jax.tree.map(jnp.copy, params)
    # Two counters, two buffers: the state is donated, and a buffer can be given away once.
    return TrainState(copy, make_optimizer(config).init(copy), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def apply_gradients(
    state: TrainState, grads: Params, config: OptimizerConfig, num_tokens: jax.Array
) -> tuple[TrainState, dict[str, Metric]]:
    """Clips by global norm and steps. A gradient that is not finite, or of no token at all, changes nothing but the
    counters: of no token it is 0, but weight decay and old momentum would move the parameters all the same.

    The finite check comes before clipping, which would turn one infinity into zeros everywhere else, and is not
    `optax.apply_if_finite`, which lets the gradient in after some refusals in a row. Torch's clip:
    scale = min(1, max_norm / (norm + 1e-6)).

    Args:
      num_tokens: [] int32, tokens of the loss.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    if config.max_grad_norm > 0:
        scale = jnp.minimum(1.0, config.max_grad_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * scale, grads)
    changes, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    stepped = (optax.apply_updates(state.params, changes), opt_state)
    taken = finite & (num_tokens > 0)
    params, opt_state = jax.tree.map(partial(jnp.where, taken), stepped, (state.params, state.opt_state))
    skipped = (~taken).astype(jnp.int32)
    rate = jnp.asarray(learning_rate_schedule(config)(state.updates - state.skipped), jnp.float32)
    metrics: dict[str, Metric] = {
        "policy/grad_norm": WeightedMean(jnp.where(finite, norm, 0.0), finite.astype(jnp.float32)),
        "policy/learning_rate": WeightedMean(rate, jnp.ones((), jnp.float32)),
        "policy/skipped_updates": Sum(skipped.astype(jnp.float32)),
        "policy/nonfinite_updates": Sum((~finite).astype(jnp.float32)),
    }
    return TrainState(params, opt_state, state.updates + 1, state.skipped + skipped), metrics
