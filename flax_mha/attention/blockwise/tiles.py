"""The tiles of the `[B, K, T, S]` box: which of them a mask leaves, and what it leaves of each.

One tile holds b examples, k key/value heads with their G query heads each, t queries and s keys,
where b divides B and k divides K. A loop's step computes one tile.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha.core.sizes import as_index, is_known
from flax_mha.core.typing import Array, Shape
from flax_mha.masks import Mask


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of one call and of its tiles; the last block of T and S may reach beyond the end.

    Attributes:
        B: examples, b a tile.
        K: key/value heads, k a tile.
        T: queries, t a tile.
        S: keys, s a tile.
        G: query heads a key/value head.
        queries_last: whether a tile's arrays are turned, see `order`.
        turns_queries: whether its queries are, for the gradients of its keys and values.
    """

    B: int
    K: int
    T: int
    S: int
    b: int
    k: int
    t: int
    s: int
    G: int
    queries_last: bool = False
    turns_queries: bool = False

    @property
    def query_blocks(self) -> int:
        return -(-self.T // self.t)

    @property
    def key_blocks(self) -> int:
        return -(-self.S // self.s)

    @property
    def r(self) -> int:
        """Rows of a tile that meet the keys of one head: its queries of G heads."""
        return self.G * self.t

    @property
    def lanes(self) -> int:
        """How many tiles of examples and heads stand side by side."""
        return (self.B // self.b) * (self.K // self.k)

    @property
    def ragged(self) -> bool:
        """Whether the last key block may hold positions behind the last key."""
        return not is_known(self.S) or self.S % self.s > 0


class Corner(NamedTuple):
    """Where a lane begins: its first example and key/value head."""

    b: Any
    k: Any


class Tile(NamedTuple):
    """Where a tile begins: its first example, key/value head, query and key."""

    b: Any
    k: Any
    t: Any
    s: Any

    def within(self, corner: Corner | None) -> "Tile":
        """The same tile, of arrays that begin at a corner; None = with all examples and heads."""
        if corner is None:
            return self
        return Tile(self.b - corner.b, self.k - corner.k, self.t, self.s)


class Span(NamedTuple):
    """The blocks start <= block < stop; `masked` = their tiles must be masked entry by entry."""

    start: Any
    stop: Any
    masked: bool


def key_spans(tiling: Tiling, mask: Mask, b: Array, i: Array, masked: bool = False) -> list[Span]:
    """The key blocks that query block i may attend to: in part, wholly, in part.

    Where the mask does not say it all, every tile is `masked`.
    """
    left, right = mask.band
    lowest, highest = _offset_range(tiling, mask, b)
    first = i * tiling.t + lowest
    last = i * tiling.t + tiling.t - 1 + highest
    start = None
    if left is not None:  # nothing, where even the first key lies behind the last one
        behind = first - left >= as_index(tiling.S)
        start = jnp.where(behind, as_index(tiling.key_blocks), (first - left) // tiling.s)
    return _spans(
        masked or not is_band(mask),
        start=start,
        whole_start=None if left is None else -((left - last) // tiling.s),
        whole_stop=_minimum(
            None if right is None else (first + right + 1) // tiling.s,
            as_index(tiling.S // tiling.s) if tiling.ragged else None,
        ),
        stop=None if right is None else (last + right) // tiling.s + 1,
        blocks=tiling.key_blocks,
    )


def query_spans(tiling: Tiling, mask: Mask, b: Array, j: Array, masked: bool = False) -> list[Span]:
    """The query blocks that may attend to key block j: in part, wholly, in part."""
    left, right = mask.band
    lowest, highest = _offset_range(tiling, mask, b)
    first = j * tiling.s - highest
    last = jnp.minimum(j * tiling.s + tiling.s, as_index(tiling.S)) - 1 - lowest
    whole_start = None if right is None else -((right - last) // tiling.t)
    if tiling.ragged:  # of the last key block, every tile is masked
        is_last = j == as_index(tiling.key_blocks - 1)
        banded = 0 if whole_start is None else whole_start
        whole_start = jnp.where(is_last, as_index(tiling.query_blocks), banded)
    return _spans(
        masked or not is_band(mask),
        start=None if right is None else (first - right) // tiling.t,
        whole_start=whole_start,
        whole_stop=None if left is None else (first + left + 1) // tiling.t,
        stop=None if left is None else (last + left) // tiling.t + 1,
        blocks=tiling.query_blocks,
    )


def _spans(
    masked: bool, *, start: Any, whole_start: Any, whole_stop: Any, stop: Any, blocks: int
) -> list[Span]:
    """Blocks in part, whole blocks, blocks in part; None = no bound on this side."""
    unbounded = whole_start is None and whole_stop is None
    if blocks == 1:  # no loop: one that may run no step costs more than the step
        return [Span(0, 1, masked=masked or not unbounded)]
    blocks = blocks if is_known(blocks) else as_index(blocks)
    first = 0 if start is None else jnp.clip(start, 0, blocks)
    end = blocks if stop is None else jnp.clip(stop, first, blocks)
    if masked:
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
    meet_b = jnp.ones(1, bool)
    if mask.query_padding is not None:
        meet_b &= _queries(tiling, mask.query_padding, tile).any(1)
    if mask.key_padding is not None:
        meet_b &= _keys(tiling, mask.key_padding, tile).any(1)
    for query_ids, key_ids in mask.segment_ids:
        ids_bt, ids_bs = _queries(tiling, query_ids, tile), _keys(tiling, key_ids, tile)
        meet_b &= (ids_bt.min(1) <= ids_bs.max(1)) & (ids_bs.min(1) <= ids_bt.max(1))
    return meet_b.any()


def allowed(tiling: Tiling, mask: Mask, tile: Tile, repeats: int = 1) -> Array:
    """The tile's part of the mask, `[1 or b, 1 or k, 1 or G, t, s]`.

    With `repeats` = G, `[1 or b, 1 or k, 1, r, s]`: its queries, once for each of G heads.
    """
    offset_b = jnp.reshape(per_example(mask.query_offset, tile.b, tiling), (-1, 1, 1))
    row_t = _repeated(jnp.arange(tiling.t, dtype="int32"), repeats)
    row_bt1 = tile.t + row_t[None, :, None] + offset_b
    column_11s = tile.s + jnp.arange(tiling.s, dtype="int32")[None, None, :]
    left, right = mask.band
    parts = [column_11s < as_index(tiling.S)]
    if left is not None:
        parts.append(column_11s - row_bt1 >= -left)
    if right is not None:
        parts.append(column_11s - row_bt1 <= right)
    if mask.query_padding is not None:
        real_bt = _repeated(_queries(tiling, mask.query_padding, tile), repeats)
        parts.append(real_bt[:, :, None])
    if mask.key_padding is not None:
        parts.append(_keys(tiling, mask.key_padding, tile)[:, None, :])
    for query_ids, key_ids in mask.segment_ids:
        ids_bt, ids_bs = _queries(tiling, query_ids, tile), _keys(tiling, key_ids, tile)
        parts.append(_repeated(ids_bt, repeats)[:, :, None] == ids_bs[:, None, :])
    allowed_bts = jnp.ones((1, repeats * tiling.t, tiling.s), bool)
    for part in parts:
        allowed_bts = allowed_bts & part
    allowed_bkGts = allowed_bts[:, None, None]
    for dense_bnts in mask.dense_masks:
        dense_bkGts = of_scores(tiling, dense_bnts, tile)
        if repeats > 1:
            dense_bkGts = by_rows(tiling, dense_bkGts)
        allowed_bkGts = allowed_bkGts & dense_bkGts
    return allowed_bkGts


def _repeated(x_t: Array, repeats: int) -> Array:
    return x_t if repeats == 1 else jnp.tile(x_t, repeats)


def by_rows(tiling: Tiling, x_bkGts: Array) -> Array:
    """`[b, k, 1, r, s]` of an array that may have size 1 in any axis, and has it in b, k, s."""
    b, k, G, t, s = x_bkGts.shape
    if t == tiling.r or (G, t) == (1, 1):
        return x_bkGts
    full = (b, k, tiling.G, tiling.t, s)
    return jnp.broadcast_to(x_bkGts, full).reshape(b, k, 1, tiling.r, s)


def of_scores(tiling: Tiling, x_bnts: Array, tile: Tile) -> Array:
    """The tile's part of an array over the scores, `[1 or b, 1 or k, 1 or G, 1 or t, 1 or s]`."""
    tile_bnts = slice_at(x_bnts, *scores_place(tiling, x_bnts.shape, tile))
    b, n, t, s = tile_bnts.shape
    heads = (1, 1) if n == 1 else (tiling.k, tiling.G)
    return tile_bnts.reshape(b, *heads, t, s)


def scores_place(tiling: Tiling, shape: Shape, tile: Tile) -> tuple[tuple[Any, ...], Shape]:
    """(start, size) of a tile in an array over the scores; axes of size 1 stay whole."""
    starts = (tile.b, tile.k * tiling.G, tile.t, tile.s)
    sizes = (tiling.b, tiling.k * tiling.G, tiling.t, tiling.s)
    start = tuple(0 if n == 1 else place for n, place in zip(shape, starts))
    return start, tuple(1 if n == 1 else size for n, size in zip(shape, sizes))


def slice_at(x: Array, start: tuple[Any, ...], size: Shape) -> Array:
    """lax.dynamic_slice; its indices must be of one type, which Python's ints are not in x64."""
    return lax.dynamic_slice(x, _indices(start), size)


def put_at(x: Array, part: Array, start: tuple[Any, ...]) -> Array:
    """`x` with `part` at `start`."""
    return lax.dynamic_update_slice(x, part, _indices(start))


def _indices(start: tuple[Any, ...]) -> list[Any]:
    return [np.int32(index) if isinstance(index, int) else index for index in start]


def add_at(x: Array, part: Array, start: tuple[Any, ...]) -> Array:
    """`x` with `part` added at `start`."""
    return put_at(x, slice_at(x, start, part.shape) + part, start)


def per_example(offset: Array | None, b: Array, tiling: Tiling) -> Any:
    """The entries of a tile's examples, `[b]`; one for all is a scalar, and None is 0."""
    if offset is None:
        return 0
    offset_b = jnp.reshape(offset, (-1,)).astype("int32")
    return offset_b[0] if offset_b.shape[0] == 1 else slice_at(offset_b, (b,), (tiling.b,))


def _queries(tiling: Tiling, x_bT: Array, tile: Tile) -> Array:
    return _of_rows(x_bT, tiling.b, tile.b, tiling.t, tile.t)


def _keys(tiling: Tiling, x_bS: Array, tile: Tile) -> Array:
    return _of_rows(x_bS, tiling.b, tile.b, tiling.s, tile.s)


def _of_rows(x_bL: Array, examples: int, b: Any, length: int, start: Any) -> Array:
    """`[1 or b, length]`, where x may hold one row for all examples."""
    if x_bL.shape[0] == 1:
        return slice_at(x_bL, (0, start), (1, length))
    return slice_at(x_bL, (b, start), (examples, length))


def _offset_range(tiling: Tiling, mask: Mask, b: Array) -> tuple[Any, Any]:
    """The least and the greatest position of query 0 among the keys, over the tile's examples."""
    offset = per_example(mask.query_offset, b, tiling)
    return (offset, offset) if jnp.ndim(offset) == 0 else (offset.min(), offset.max())


def _minimum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else jnp.minimum(a, b)
