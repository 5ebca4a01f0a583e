"""What functions of pairs say of a tile: who may attend, what a score makes of the logits."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from flax_mha.attention.allowed import Allowed
from flax_mha.attention.blockwise.order import Order
from flax_mha.attention.blockwise.tiles import (
    Span,
    Tile,
    Tiling,
    add_at,
    by_rows,
    of_scores,
    scores_place,
    slice_at,
)
from flax_mha.attention.logits import unforbidden
from flax_mha.core.pairs.separated import Separated
from flax_mha.core.typing import Array


def also_allowed(
    tiling: Tiling, where: tuple[Allowed, ...], tile: Tile, repeats: int, allowed_bkGts: Array
) -> Array:
    """What is allowed and agrees with all functions; `repeats` as in `tiles.allowed`."""
    for one in where:
        pairs = one.pairs
        operands = [of_scores(tiling, x, tile) for x in pairs.operands]
        agrees = pairs.at(operands, pairs.tables)
        agrees = agrees if agrees.ndim else agrees.reshape((1,) * 5)
        allowed_bkGts = allowed_bkGts & (by_rows(tiling, agrees) if repeats > 1 else agrees)
    return allowed_bkGts


def scored(
    score: Separated,
    tiling: Tiling,
    order: Order,
    tile: Tile,
    allowed: Array | None,
    split: Array,
    moving: Any,
) -> Array:
    """score(logits), of logits that `order` split; `moving` are its floats' parts of the tile."""
    taken = tuple(of_scores(tiling, x, tile) for x in score.operands)
    whole = dataclasses.replace(score, operands=taken).with_moving(moving)
    operands = [order.beside(x, tiling) for x in whole.operands]
    return whole.at(operands, whole.tables, unforbidden(split, allowed))


def moving_of(tiling: Tiling, score: Separated, tile: Tile) -> dict[str, Array]:
    """The tile's part of the floats of a score; a table is whole."""
    is_table = lambda name: name.startswith("table")  # noqa: E731
    return {
        name: x if is_table(name) else of_scores(tiling, x, tile)
        for name, x in score.moving.items()
    }


def add_moving(tiling: Tiling, name: str, x: Array, part: Array, tile: Tile) -> Array:
    """One of them, or its gradient, with the tile's part added."""
    if name.startswith("table"):
        return x + part.astype(x.dtype)
    start, size = scores_place(tiling, x.shape, tile)
    return add_at(x, part.reshape(size), start)


def is_needed(tiling: Tiling, needed_bnQJ: Array, tile: Tile) -> Array:
    """Whether functions leave anything of a tile."""
    b, n, _, _ = needed_bnQJ.shape
    place = (tile.b, tile.k * tiling.G, tile.t // tiling.t, tile.s // tiling.s)
    start = tuple(0 if size == 1 else x for size, x in zip((b, n, 0, 0), place))
    size = (1 if b == 1 else tiling.b, 1 if n == 1 else tiling.k * tiling.G, 1, 1)
    return slice_at(needed_bnQJ, start, size).any()


def narrowed(spans: list[Span], needed_L: Array) -> list[Span]:
    """The spans from the first block that is needed to the last one."""
    (L,) = needed_L.shape  # perhaps a symbol
    if L == 1:
        return spans
    blocks = jnp.asarray(L, "int32")
    first = jnp.argmax(needed_L).astype("int32")
    stop = jnp.where(needed_L.any(), blocks - jnp.argmax(needed_L[::-1]).astype("int32"), 0)
    return [
        Span(jnp.maximum(span.start, first), jnp.minimum(span.stop, stop), span.masked)
        for span in spans
    ]


def lanes_need(tiling: Tiling, needed_bnQJ: Array, b: Array, k: Array) -> Array:
    """`[Q, J]`: whether an example or head of these lanes needs a tile."""
    B, n, Q, J = needed_bnQJ.shape
    start = (0 if B == 1 else b, 0 if n == 1 else k * tiling.G, 0, 0)
    size = (1 if B == 1 else tiling.b, 1 if n == 1 else tiling.k * tiling.G, Q, J)
    return slice_at(needed_bnQJ, start, size).any((0, 1))
