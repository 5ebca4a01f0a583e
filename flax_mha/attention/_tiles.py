"""The tiles of the `[T, S]` plane: which of them a mask leaves, and what it leaves of each.

Block i of the queries meets block j of the keys in one tile of t x s entries. A group g is one
example's key/value head with its G query heads: g = b K + k.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from flax_mha._typing import Array, Shape
from flax_mha.masks import Mask


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of one call; the last block of an axis may reach beyond its length.

    Attributes:
        T: queries.
        S: keys.
        t: queries a block.
        s: keys a block.
        K: key/value heads an example.
        G: query heads a key/value head.
    """

    T: int
    S: int
    t: int
    s: int
    K: int
    G: int

    @property
    def query_blocks(self) -> int:
        return -(-self.T // self.t)

    @property
    def key_blocks(self) -> int:
        return -(-self.S // self.s)

    @property
    def ragged(self) -> bool:
        """Whether the last key block holds positions behind the last key."""
        return self.S % self.s > 0


class Tile(NamedTuple):
    """Where a tile stands: its group, its query block, its key block."""

    g: Any
    i: Any
    j: Any


class Span(NamedTuple):
    """The blocks start <= block < stop; `masked` = their tiles must be masked entry by entry."""

    start: Any
    stop: Any
    masked: bool


def key_spans(tiling: Tiling, mask: Mask, g: Array, i: Array) -> list[Span]:
    """The key blocks that query block i may attend to: in part, wholly, in part."""
    left, right = mask.band
    first = i * tiling.t + _offset(tiling, mask, g)
    last = first + tiling.t - 1
    start = None
    if left is not None:  # nothing, where even the first key lies behind the last one
        start = jnp.where(first - left < tiling.S, (first - left) // tiling.s, tiling.key_blocks)
    return _spans(
        mask,
        start=start,
        whole_start=None if left is None else -((left - last) // tiling.s),
        whole_stop=_minimum(
            None if right is None else (first + right + 1) // tiling.s,
            tiling.S // tiling.s if tiling.ragged else None,
        ),
        stop=None if right is None else (last + right) // tiling.s + 1,
        blocks=tiling.key_blocks,
    )


def query_spans(tiling: Tiling, mask: Mask, g: Array, j: Array) -> list[Span]:
    """The query blocks that may attend to key block j: in part, wholly, in part."""
    left, right = mask.band
    offset = _offset(tiling, mask, g)
    first = j * tiling.s - offset
    last = jnp.minimum(j * tiling.s + tiling.s, tiling.S) - 1 - offset
    whole_start = None if right is None else -((right - last) // tiling.t)
    if tiling.ragged:  # of the last key block, every tile is masked
        is_last = j == tiling.key_blocks - 1
        banded = 0 if whole_start is None else whole_start
        whole_start = jnp.where(is_last, tiling.query_blocks, banded)
    return _spans(
        mask,
        start=None if right is None else (first - right) // tiling.t,
        whole_start=whole_start,
        whole_stop=None if left is None else (first + left + 1) // tiling.t,
        stop=None if left is None else (last + left) // tiling.t + 1,
        blocks=tiling.query_blocks,
    )


def _spans(
    mask: Mask, *, start: Any, whole_start: Any, whole_stop: Any, stop: Any, blocks: int
) -> list[Span]:
    """Blocks in part, whole blocks, blocks in part; None = no bound on this side."""
    first = jnp.int32(0) if start is None else jnp.clip(start, 0, blocks)
    end = jnp.int32(blocks) if stop is None else jnp.clip(stop, first, blocks)
    if not is_band(mask):
        return [Span(first, end, masked=True)]
    middle = first if whole_start is None else jnp.clip(whole_start, first, end)
    middle_end = end if whole_stop is None else jnp.clip(whole_stop, middle, end)
    before = [] if whole_start is None else [Span(first, middle, masked=True)]
    after = [] if whole_stop is None else [Span(middle_end, end, masked=True)]
    return [*before, Span(middle, middle_end, masked=False), *after]


def is_band(mask: Mask) -> bool:
    """Whether the band says it all, so that whole blocks need no look at the mask."""
    return not (mask.removes_positions or mask.dense_masks)


def may_meet(tiling: Tiling, mask: Mask, tile: Tile) -> Array:
    """Whether padding and segments leave anything of a tile; True where they might."""
    b, row, column = tile.g // tiling.K, tile.i * tiling.t, tile.j * tiling.s
    meet = jnp.array(True)
    if mask.query_padding is not None:
        meet &= _row(mask.query_padding, b, row, tiling.t).any()
    if mask.key_padding is not None:
        meet &= _row(mask.key_padding, b, column, tiling.s).any()
    for query_ids, key_ids in mask.segment_ids:
        ids_t, ids_s = _row(query_ids, b, row, tiling.t), _row(key_ids, b, column, tiling.s)
        meet &= (ids_t.min() <= ids_s.max()) & (ids_s.min() <= ids_t.max())
    return meet


def allowed(tiling: Tiling, mask: Mask, tile: Tile) -> Array:
    """The tile's part of the mask, `[1 or G, t, s]`."""
    b, row, column = tile.g // tiling.K, tile.i * tiling.t, tile.j * tiling.s
    row_t1 = row + jnp.arange(tiling.t, dtype="int32")[:, None]
    column_1s = column + jnp.arange(tiling.s, dtype="int32")[None, :]
    distance_ts = column_1s - row_t1 - _offset(tiling, mask, tile.g)
    left, right = mask.band
    parts = [column_1s < tiling.S]
    if left is not None:
        parts.append(distance_ts >= -left)
    if right is not None:
        parts.append(distance_ts <= right)
    if mask.query_padding is not None:
        parts.append(_row(mask.query_padding, b, row, tiling.t)[:, None])
    if mask.key_padding is not None:
        parts.append(_row(mask.key_padding, b, column, tiling.s)[None, :])
    for query_ids, key_ids in mask.segment_ids:
        ids_t, ids_s = _row(query_ids, b, row, tiling.t), _row(key_ids, b, column, tiling.s)
        parts.append(ids_t[:, None] == ids_s[None, :])
    result_Gts = jnp.ones((1, tiling.t, tiling.s), bool)
    for part in parts:
        result_Gts &= part[None]
    for dense_bnts in mask.dense_masks:
        result_Gts = result_Gts & of_scores(tiling, dense_bnts, tile)
    return result_Gts


def of_scores(tiling: Tiling, x_bnts: Array, tile: Tile) -> Array:
    """The tile's part of an array over the scores, `[1 or G, 1 or t, 1 or s]`."""
    start, size = scores_place(tiling, x_bnts.shape, tile)
    return slice_at(x_bnts, start, size)[0]


def scores_place(tiling: Tiling, shape: Shape, tile: Tile) -> tuple[tuple[Any, ...], Shape]:
    """(start, size) of a tile in an array over the scores; axes of size 1 stay whole."""
    starts = (
        tile.g // tiling.K,
        tile.g % tiling.K * tiling.G,
        tile.i * tiling.t,
        tile.j * tiling.s,
    )
    sizes = (1, tiling.G, tiling.t, tiling.s)
    start = tuple(0 if n == 1 else place for n, place in zip(shape, starts))
    return start, tuple(1 if n == 1 else size for n, size in zip(shape, sizes))


def slice_at(x: Array, start: tuple[Any, ...], size: Shape) -> Array:
    """lax.dynamic_slice; its indices must be of one type, which Python's ints are not in x64."""
    return lax.dynamic_slice(x, [jnp.int32(index) for index in start], size)


def add_at(x: Array, part: Array, start: tuple[Any, ...]) -> Array:
    """`x` with `part` added at `start`."""
    indices = [jnp.int32(index) for index in start]
    return lax.dynamic_update_slice(x, slice_at(x, start, part.shape) + part, indices)


def _row(x_bL: Array, b: Array, start: Any, size: int) -> Array:
    return slice_at(x_bL, (0 if x_bL.shape[0] == 1 else b, start), (1, size))[0]


def _offset(tiling: Tiling, mask: Mask, g: Array) -> Any:
    """The position of query 0 among the keys, in the group's example."""
    return per_example(mask.query_offset, g, tiling)


def per_example(offset: Array | None, g: Array, tiling: Tiling) -> Any:
    """The entry of group g's example; one for all examples does, and None is 0."""
    if offset is None:
        return 0
    offset_b = jnp.reshape(offset, (-1,)).astype("int32")
    return offset_b[0] if offset_b.shape[0] == 1 else offset_b[g // tiling.K]


def _minimum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else jnp.minimum(a, b)
