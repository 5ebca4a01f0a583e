"""Forward: one query block meets its key blocks one after the other, with an online softmax.

row_max' = max(row_max, max_s logits)        exp = e^(logits - row_max')
row_sum' = row_sum e^(row_max - row_max') + sum_s exp
sum'     = sum     e^(row_max - row_max') + exp . value         context = sum / row_sum

In `order`'s axes, by its equations. Where queries lie last, the values are turned once, and a
16-bit value gets rows of ones: then `row_sum` is one more row of `sum`, for which the product that
is computed anyway sums what it multiplies.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from flax_mha.attention.blockwise.call import (
    Blocks,
    Plan,
    drops,
    key_tile,
    product,
    put_queries,
    put_rows,
    scaled_queries,
    tile_dropper,
    tile_logits,
    tile_terms,
    value_tile,
)
from flax_mha.attention.blockwise.lanes import begin, keys_apart
from flax_mha.attention.blockwise.loops import every, key_loop, where_needed
from flax_mha.attention.blockwise.order import order_of
from flax_mha.attention.blockwise.tiles import Tile, slice_at
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array
from flax_mha.core.varying import full


class Softmax(NamedTuple):
    """The result: of all queries, in float32 at least."""

    context_BTNV: Array
    row_max_BNT: Array
    row_sum_BNT: Array


def alone_of(row_sum: Array) -> Array:
    """The weight of a key that has all of its row: 1 where the row sums up to it, else inf."""
    return jnp.where(row_sum == 1, 1.0, jnp.inf).astype(row_sum.dtype)


class Values(NamedTuple):
    """The values, as the tiles read them, and whether rows of ones stand below their V rows."""

    value: Array
    V: int
    have_ones: bool


class Rows(NamedTuple):
    """What is known of a tile's queries after some of their keys."""

    sum: Array  # [b, k, r, v]; where queries lie last [b, k, v, r]
    row_max_bkr: Array
    row_sum_bkr: Array | None  # None = it is a row of `sum`


ONES = 16  # rows: as many as fill a 16-bit vector of a TPU


def forward(plan: Plan, blocks: Blocks) -> Softmax:
    """The context of all queries, and what the softmax divided by."""
    tiling, wide = plan.tiling, wide_dtype(blocks.query_BTNH.dtype)
    B, T, N, _ = blocks.query_BTNH.shape
    values = _values(plan, blocks)

    def lane(index: Array, softmax: Softmax) -> Softmax:
        corner = begin(tiling, index)
        own = keys_apart(tiling, blocks, corner)
        step = lambda i, softmax: _query_block(  # noqa: E731
            plan, own, values, (*corner, i), softmax
        )
        return every(tiling.query_blocks, step, softmax)

    zeros = lambda *shape: full(blocks.query_BTNH, shape, 0, wide)  # noqa: E731
    start = Softmax(zeros(B, T, N, values.V), zeros(B, N, T), zeros(B, N, T))
    return every(tiling.lanes, lane, start)


def _values(plan: Plan, blocks: Blocks) -> Values:
    value_BSKV, V = blocks.value_BSKV, blocks.value_BSKV.shape[-1]
    if not plan.tiling.queries_last or blocks.scales is not None:
        return Values(value_BSKV, V, False)
    value_BKVS = value_BSKV.transpose(0, 2, 3, 1)
    # What is dropped is not multiplied, and is in the sum; float32 is summed in float32.
    have_ones = not drops(plan, blocks) and value_BSKV.dtype != wide_dtype(value_BSKV.dtype)
    if have_ones:
        B, K, _, S = value_BKVS.shape
        ones_BK1S = full(value_BKVS, (B, K, ONES, S), 1)
        value_BKVS = jnp.concatenate([value_BKVS, ones_BK1S], 2)
    return Values(value_BKVS, V, have_ones)


def _query_block(
    plan: Plan, blocks: Blocks, values: Values, at: tuple[Array, Array, Array], softmax: Softmax
) -> Softmax:
    tiling, (b, k, i) = plan.tiling, at
    t = i * tiling.t
    query_bkrh = scaled_queries(plan, blocks, Tile(b, k, t, 0))

    def step(masked: bool, j: Array, rows: Rows) -> Any:
        tile = Tile(b, k, t, j * tiling.s)
        add = lambda: _add_tile(plan, blocks, values, query_bkrh, tile, masked, rows)  # noqa: E731
        return where_needed(plan, blocks, tile, add, lambda: rows)

    rows = key_loop(plan, blocks, at, step, _nothing(plan, blocks, values))
    context_bkrv, row_sum_bkr = _divided(plan, values, rows)
    here = Tile(b, k, t, 0)
    return Softmax(
        put_queries(tiling, softmax.context_BTNV, context_bkrv, here),
        put_rows(tiling, softmax.row_max_BNT, rows.row_max_bkr, here),
        put_rows(tiling, softmax.row_sum_BNT, row_sum_bkr, here),
    )


def _nothing(plan: Plan, blocks: Blocks, values: Values) -> Rows:
    tiling, wide = plan.tiling, wide_dtype(blocks.query_BTNH.dtype)
    bkr = (tiling.b, tiling.k, tiling.r)
    of = lambda value, *shape: full(blocks.query_BTNH, shape, value, wide)  # noqa: E731
    V = values.V + ONES if values.have_ones else values.V
    sum_bkrv = of(0, *bkr, V)
    if tiling.queries_last:
        sum_bkrv = of(0, tiling.b, tiling.k, V, tiling.r)
    return Rows(sum_bkrv, of(-jnp.inf, *bkr), None if values.have_ones else of(0, *bkr))


def _divided(plan: Plan, values: Values, rows: Rows) -> tuple[Array, Array]:
    """(context, row_sum) of all keys."""
    row_sum_bkr = rows.sum[:, :, values.V] if rows.row_sum_bkr is None else rows.row_sum_bkr
    # A query that may attend nowhere has sum 0 and row_sum 0: its context is 0.
    divisor_bkr = jnp.where(row_sum_bkr == 0, 1, row_sum_bkr)
    if not plan.tiling.queries_last:
        return rows.sum / divisor_bkr[..., None], row_sum_bkr
    context_bkvr = rows.sum[:, :, : values.V] / divisor_bkr[:, :, None]
    return context_bkvr.swapaxes(2, 3), row_sum_bkr


def _of_values(plan: Plan, blocks: Blocks, values: Values, tile: Tile) -> Array:
    tiling = plan.tiling
    if not tiling.queries_last:
        return value_tile(plan, blocks, tile)
    if blocks.scales is not None:
        return value_tile(plan, blocks, tile).swapaxes(2, 3)
    size = (tiling.b, tiling.k, values.value.shape[2], tiling.s)
    return slice_at(values.value, (tile.b, tile.k, 0, tile.s), size)


def _add_tile(
    plan: Plan,
    blocks: Blocks,
    values: Values,
    query_bkrh: Array,
    tile: Tile,
    masked: bool,
    rows: Rows,
) -> Rows:
    order = order_of(plan.tiling)
    key_bksh = key_tile(plan, blocks, tile)
    value = _of_values(plan, blocks, values, tile)
    terms = tile_terms(plan, blocks, tile)
    logits_rs = tile_logits(
        plan, blocks, query_bkrh, key_bksh, terms, tile, masked, order
    ).logits_rs
    row_max_bkr = jnp.maximum(rows.row_max_bkr, logits_rs.max(order.over_keys))
    # -inf - (-inf) would be NaN: a row that has seen no key yet is shifted by a finite number.
    shift_bkr = jnp.maximum(row_max_bkr, jnp.finfo(row_max_bkr.dtype).min)
    exp_rs = jnp.exp(logits_rs - order.along_rows(shift_bkr))
    decay_bkr = jnp.exp(rows.row_max_bkr - shift_bkr)
    kept_rs = tile_dropper(plan, blocks, tile, order)(exp_rs).astype(value.dtype)
    added = product(plan, order.sum, kept_rs, value)
    row_sum_bkr = rows.row_sum_bkr
    if row_sum_bkr is not None:
        row_sum_bkr = row_sum_bkr * decay_bkr + exp_rs.sum(order.over_keys)
    return Rows(rows.sum * order.along_rows(decay_bkr) + added, row_max_bkr, row_sum_bkr)
