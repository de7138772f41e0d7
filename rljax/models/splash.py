"""Splash attention, JAX's Pallas kernels for TPUs, under the mask of packed rows that share prompts.

The kernels take their mask as an array: tiles that nobody sees are skipped, forward and backward, and only of those
that are seen in part is the mask looked at.
"""

from functools import partial
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from rljax.models.attention import AttentionLayout

TILE = 512
"""Positions of a tile of queries, and of what is computed at once of one of keys. In larger ones the products are
larger, in smaller ones less is computed that nobody sees; the mask comes in 4 bytes for every pair, of which squares of
1,024 are too many for the 16 MiB that a kernel may use on v5e and v5p."""


def key_tile_for(length: int) -> int:
    """Two tiles if that divides rows of `length`, rounded up to one: the fewer the addends of the gradient of q."""
    return TILE if -(-length // TILE) % 2 else 2 * TILE


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layout: "AttentionLayout",
    *,
    tiles: tuple[int, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention that holds no scores, but the mask: a bool [T, T] of every row, an int32 of the one in work.

    q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]. Scores and softmax in float32, sums of the gradient of q in
    its dtype, one addend for every tile of keys.

    Args:
      tiles: positions of one of queries, a multiple of 128, the lanes of a TPU's vector unit, and of one of keys, a
        multiple of that; None: `TILE` and `key_tile_for`.
      interpret: as JAX would compute it, anywhere and slowly, for tests.
    """
    length = q.shape[1]
    tiles = tiles or (TILE, key_tile_for(length))
    fill = -length % tiles[1]
    mask = jnp.pad(layout.mask(), ((0, 0), (0, fill), (0, fill)))
    # Padding sees itself: the kernels divide by what a query sees.
    mask |= jnp.eye(mask.shape[1], dtype=bool)
    q = q * q.shape[-1] ** -0.5
    q, k, v = (jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    context = jax.lax.map(partial(_attend_row, tiles=tiles, interpret=interpret), (q, k, v, mask))
    return context.swapaxes(1, 2)[:, :length]


def _attend_row(row: tuple[jax.Array, ...], tiles: tuple[int, int], interpret: bool) -> jax.Array:
    """[N, T, H] of q [N, T, H], k and v [K, T, H] and the mask [T, T]."""
    # Imported where they are used: it takes a second, and only TPUs want them.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

    q, k, v, mask = row
    queries, keys = tiles
    sizes = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=queries,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=queries,
        use_fused_bwd_kernel=True,
    )
    # `make_splash_mha` would make an array of the flag in `MaskInfo`, and ask it while it is traced.
    kernel = splash.SplashAttentionKernel(
        info.process_dynamic_mask(mask[None], tiles)[0],
        None,
        info.process_dynamic_mask_dkv(mask[None], tiles)[0],
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=interpret,
    )
    return cast(jax.Array, kernel(q, k, v))  # alone, for residuals are not asked for
