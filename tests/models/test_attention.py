"""Every way of computing attention gives what the definition gives, forward and backward, whatever lies in padding.

cuDNN itself does not run here: `cudnn_attention` is tested with XLA in its place.
"""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import attention as module
from rljax.models.attention import AttentionLayout, attention, cudnn_attention, dense_attention
from rljax.models.blockwise import blockwise_attention, list_blocks
from rljax.models.splash import key_tile_for, splash_attention

Row = list[tuple[int, list[int]]]
"""Groups of a row: tokens of the prompt, tokens of each completion."""


def packed(rows: list[Row], length: int) -> AttentionLayout:
    """[prompt | completion 1 | ... | next group | ... | padding] of `length` positions."""
    group, completion = np.full((len(rows), length), -1, np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        groups = [g for g, (prompt, own) in enumerate(row) for _ in range(prompt + sum(own))]
        owns = [c for prompt, own in row for c, n in enumerate([prompt, *own]) for _ in range(n)]
        group[i, : len(groups)], completion[i, : len(owns)] = groups, owns
    return AttentionLayout(jnp.asarray(group), jnp.asarray(completion))


SHARED: list[Row] = [[(20, [13, 1, 30]), (7, [9, 9])], [(3, [5] * 4), (40, []), (11, [2, 8])]]
CASES: dict[str, tuple[AttentionLayout, tuple[int, int, int]]] = {
    "right-padded": (AttentionLayout.right_padded(jnp.array([48, 17]), 48), (2, 2, 64)),
    "independent": (packed([[(20, []), (1, []), (29, [])], [(33, []), (10, [])]], 50), (4, 2, 64)),
    "shared prompts": (packed(SHARED, 100), (7, 1, 64)),
    "a row of padding": (packed([SHARED[0], []], 90), (2, 1, 128)),
}
"""Layout and (N, K, H)."""

BACKENDS: dict[str, module.Backend] = {
    "dense": dense_attention,
    "blockwise": partial(blockwise_attention, block=16),
    "cudnn's arguments": partial(cudnn_attention, implementation="xla"),
    "splash": partial(splash_attention, tiles=(128, 128), interpret=True),
}


def arrays(layout: AttentionLayout, shape: tuple[int, int, int]) -> list[np.ndarray]:
    """q, k, v and the gradient of the context, normal(1)."""
    rng = np.random.default_rng(0)
    heads, kv_heads, head_dim = shape
    leading = layout.group.shape
    return [rng.normal(size=(*leading, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)]


@partial(jax.jit, static_argnames="backend")
def with_gradients(backend: str, layout: AttentionLayout, q: Any, k: Any, v: Any, d: Any) -> tuple[Any, ...]:
    """Context, and the gradients of q, k and v where that of the context is `d`."""
    context, pull = jax.vjp(partial(attention, layout=layout, backend=backend), q, k, v)
    return context, *pull(d)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_the_definition(backend: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.BACKENDS, backend, BACKENDS[backend])
    layout, shape = CASES[case]
    real = np.asarray(layout.group >= 0)
    clean = arrays(layout, shape)
    poisoned = [
        np.where(real[..., None, None], x, bad) for x, bad in zip(clean, (np.nan, np.inf, np.nan, -np.inf), strict=True)
    ]
    for name, got, expected in zip(
        "oqkv", with_gradients(backend, layout, *poisoned), definition(layout, *clean), strict=True
    ):
        assert np.all(np.asarray(got)[~real] == 0), name
        # float32 sums of up to 128 products of size 1, added up over up to 100 positions and 7 heads
        np.testing.assert_allclose(np.asarray(got)[real], expected[real], rtol=1e-5, atol=2e-5, err_msg=name)


def definition(layout: AttentionLayout, *given: np.ndarray) -> list[np.ndarray]:
    """Context and gradients as `with_gradients`, in float64 and by the rule of `AttentionLayout`, query by query."""
    group, completion = np.asarray(layout.group), np.asarray(layout.completion)
    q, k, v, d = (x.astype(np.float64) for x in given)
    scale, shared = q.shape[-1] ** -0.5, q.shape[2] // k.shape[2]
    context, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for row, query in zip(*np.nonzero(group >= 0), strict=True):
        seen = [
            key
            for key in range(query + 1)
            if group[row, key] == group[row, query] and completion[row, key] in (0, completion[row, query])
        ]
        for head in range(q.shape[2]):
            at, own, to = (row, query, head), (row, seen, head // shared), d[row, query, head]
            weights = np.exp(scale * k[own] @ q[at])
            weights /= weights.sum()
            context[at] = weights @ v[own]
            d_scores = weights * (v[own] @ to - context[at] @ to)
            dq[at] = scale * d_scores @ k[own]
            dk[own] += scale * np.outer(d_scores, q[at])
            dv[own] += np.outer(weights, to)
    return [context, dq, dk, dv]


@pytest.mark.parametrize("tiles", [(128, 128), (128, 256)])
def test_splash_skips_and_masks_tile_by_tile(tiles: tuple[int, int]) -> None:
    """Six tiles of a row: seen in full, in part and not at all."""
    layout = packed([[(150, [300, 20]), (40, [90])], [(130, [130, 130, 100])]], 700)
    given = arrays(layout, (4, 2, 64))
    real = np.asarray(layout.group >= 0)
    attend = partial(splash_attention, tiles=tiles, interpret=True)

    @jax.jit
    def run(q: Any, k: Any, v: Any, d: Any) -> tuple[Any, ...]:
        context, pull = jax.vjp(partial(attend, layout=layout), q, k, v)
        return context, *pull(jnp.where(real[..., None, None], d, 0))

    for name, got, expected in zip("oqkv", run(*given), definition(layout, *given), strict=True):
        np.testing.assert_allclose(np.asarray(got)[real], expected[real], rtol=1e-5, atol=2e-5, err_msg=name)


def test_tiles_of_keys_divide_rows_of_whole_tiles() -> None:
    lengths = (128, 513, 1024, 1025, 2176, 6144)
    assert [key_tile_for(length) for length in lengths] == [512, 1024, 1024, 512, 512, 1024]


@pytest.mark.parametrize(
    ("kind", "length", "dtype", "expected"),
    [
        ("tpu", 512, jnp.bfloat16, "dense"),
        ("tpu", 513, jnp.bfloat16, "splash"),
        ("tpu", 2048, jnp.float32, "blockwise"),  # the kernels' products of float32 are rounded
        ("cpu", 2048, jnp.bfloat16, "blockwise"),
    ],
)
def test_a_backend_is_chosen_by_platform(
    kind: str, length: int, dtype: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "platform", lambda: kind)
    assert module.choose_backend(length, 64, dtype) == expected


# ------------------------------------------------------------------------------------------------------------- blocks


def blocks_with_a_visible_pair(layout: AttentionLayout, block: int) -> np.ndarray:
    """[B, n, n] bool, from the mask."""
    mask = np.asarray(layout.mask())
    rows, length, _ = mask.shape
    return mask.reshape(rows, length // block, block, -1, block).any(axis=(2, 4))


def visited(layout: AttentionLayout, block: int) -> np.ndarray:
    """[B, n, n] bool, from the list that the loops run over; each pair at most once."""
    blocks = jax.jit(partial(list_blocks, block=block))(layout)
    rows, count = layout.group.shape[0], layout.group.shape[1] // block
    seen = np.zeros((rows, count, rows, count), int)
    for query, (keys, visits) in enumerate(zip(np.asarray(blocks.keys), np.asarray(blocks.visits), strict=True)):
        for key in keys[:visits]:
            seen[*divmod(query, count), *divmod(key, count)] += 1
    assert seen.max() <= 1
    assert sum(seen[i, :, i].sum() for i in range(rows)) == seen.sum()  # no row sees another
    return np.stack([seen[i, :, i] for i in range(rows)]).astype(bool)


def test_packed_rows_visit_exactly_the_visible_blocks() -> None:
    rng = np.random.default_rng(1)
    rows: list[Row] = [
        [(int(rng.integers(20, 200)), rng.integers(1, 250, 8).tolist()) for _ in range(3)],
        [(int(n), []) for n in rng.integers(1, 400, 9)],
        [(600, [500] * 6)],
        [(5, [40, 700])],
        [],
    ]
    layout = packed(rows, 4096)
    needed = blocks_with_a_visible_pair(layout, 64)
    np.testing.assert_array_equal(visited(layout, 64), needed)
    assert needed.sum() < 0.3 * len(rows) * (4096 // 64) ** 2


def test_no_visible_block_is_left_out_in_any_order() -> None:
    rng = np.random.default_rng(2)
    group, completion = rng.integers(-1, 5, (6, 128)), rng.integers(0, 4, (6, 128))
    group[3:] = np.repeat(rng.integers(-1, 40, (3, 16)), 8, axis=1)
    layout = AttentionLayout(jnp.asarray(group, jnp.int32), jnp.asarray(completion, jnp.int32))
    missed = blocks_with_a_visible_pair(layout, 8) & ~visited(layout, 8)
    assert not missed.any()


def compiled_text(backend: str, layout: AttentionLayout, shape: tuple[int, int, int]) -> str:
    return with_gradients.lower(backend, layout, *arrays(layout, shape)).compile().as_text() or ""


def sizes(text: str, pattern: str = r"\w+") -> list[int]:
    """Numbers of elements of the results of the operations of a compiled program."""
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* {pattern}\(", text)
    return [math.prod(int(n) for n in dims.split(",") if n) for dims in found]


def test_blockwise_holds_no_score_matrix() -> None:
    length = 1024
    layout = AttentionLayout.right_padded(jnp.array([length]), length)
    assert max(sizes(compiled_text("dense", layout, (2, 1, 16)))) >= length**2
    text = compiled_text("blockwise", layout, (2, 1, 16))
    assert max(sizes(text)) < length**2 / 4
    # The sums of dk and dv are carried by loops, which would copy them at every step if written carelessly.
    assert max(sizes(text, "dynamic-update-slice|fusion|scatter"), default=0) > 0
