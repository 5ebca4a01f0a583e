"""Forward: one query block meets its key blocks one after the other, with an online softmax.

row_max' = max(row_max, max_s logits)        exp = e^(logits - row_max')
row_sum' = row_sum e^(row_max - row_max') + sum_s exp
sum'     = sum     e^(row_max - row_max') + exp . value         context = sum / row_sum
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from flax_mha.attention.blockwise.call import (
    Blocks,
    Plan,
    every,
    loop,
    of_keys,
    product,
    put_queries,
    put_rows,
    scaled_queries,
    tile_biases,
    tile_dropper,
    tile_logits,
    where_needed,
)
from flax_mha.attention.blockwise.tiles import Tile, begin, key_spans
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array
from flax_mha.core.varying import full


class Softmax(NamedTuple):
    """The result: of all queries, in float32 at least."""

    context_BTNV: Array
    row_max_BNT: Array
    row_sum_BNT: Array


class Rows(NamedTuple):
    """What is known of a tile's queries after some of their keys."""

    sum_bkrv: Array
    row_max_bkr: Array
    row_sum_bkr: Array


def forward(plan: Plan, blocks: Blocks) -> Softmax:
    """The context of all queries, and what the softmax divided by."""
    tiling, wide = plan.tiling, wide_dtype(blocks.query_BTNH.dtype)
    B, T, N, _ = blocks.query_BTNH.shape

    def step(index: Array, softmax: Softmax) -> Softmax:
        return _query_block(plan, blocks, begin(tiling, index, tiling.query_blocks), softmax)

    zeros = lambda *shape: full(blocks.query_BTNH, shape, 0, wide)  # noqa: E731
    V = blocks.value_BSKV.shape[-1]
    start = Softmax(zeros(B, T, N, V), zeros(B, N, T), zeros(B, N, T))
    return every(tiling.lanes * tiling.query_blocks, step, start)


def _query_block(
    plan: Plan, blocks: Blocks, at: tuple[Array, Array, Array], softmax: Softmax
) -> Softmax:
    tiling, (b, k, i) = plan.tiling, at
    t = i * tiling.t
    query_bkrh = scaled_queries(plan, blocks, Tile(b, k, t, 0))

    def step(masked: bool, j: Array, rows: Rows) -> Any:
        tile = Tile(b, k, t, j * tiling.s)
        add = lambda: _add_tile(plan, blocks, query_bkrh, tile, masked, rows)  # noqa: E731
        return where_needed(plan, blocks, tile, add, lambda: rows)

    rows = loop(key_spans(tiling, blocks.mask, b, i), step, _nothing(plan, blocks))
    # A query that may attend nowhere has sum 0 and row_sum 0: its context is 0.
    divisor_bkr = jnp.where(rows.row_sum_bkr == 0, 1, rows.row_sum_bkr)
    here = Tile(b, k, t, 0)
    return Softmax(
        put_queries(tiling, softmax.context_BTNV, rows.sum_bkrv / divisor_bkr[..., None], here),
        put_rows(tiling, softmax.row_max_BNT, rows.row_max_bkr, here),
        put_rows(tiling, softmax.row_sum_BNT, rows.row_sum_bkr, here),
    )


def _nothing(plan: Plan, blocks: Blocks) -> Rows:
    tiling, wide = plan.tiling, wide_dtype(blocks.query_BTNH.dtype)
    bkr = (tiling.b, tiling.k, tiling.r)
    of = lambda value, *shape: full(blocks.query_BTNH, shape, value, wide)  # noqa: E731
    return Rows(of(0, *bkr, blocks.value_BSKV.shape[-1]), of(-jnp.inf, *bkr), of(0, *bkr))


def _add_tile(
    plan: Plan, blocks: Blocks, query_bkrh: Array, tile: Tile, masked: bool, rows: Rows
) -> Rows:
    key_bksh = of_keys(plan.tiling, blocks.key_BSKH, tile)
    value_bksv = of_keys(plan.tiling, blocks.value_BSKV, tile)
    biases = tile_biases(plan, blocks, tile)
    logits_bkrs, _ = tile_logits(plan, blocks, query_bkrh, key_bksh, biases, tile, masked)
    row_max_bkr = jnp.maximum(rows.row_max_bkr, logits_bkrs.max(-1))
    # -inf - (-inf) would be NaN: a row that has seen no key yet is shifted by a finite number.
    shift_bkr = jnp.maximum(row_max_bkr, jnp.finfo(row_max_bkr.dtype).min)
    exp_bkrs = jnp.exp(logits_bkrs - shift_bkr[..., None])
    decay_bkr = jnp.exp(rows.row_max_bkr - shift_bkr)
    kept_bkrs = tile_dropper(plan, blocks, tile)(exp_bkrs).astype(value_bksv.dtype)
    added_bkrv = product(plan, "bkrs,bksv->bkrv", kept_bkrs, value_bksv)
    return Rows(
        rows.sum_bkrv * decay_bkr[..., None] + added_bkrv,
        row_max_bkr,
        rows.row_sum_bkr * decay_bkr + exp_bkrs.sum(-1),
    )
