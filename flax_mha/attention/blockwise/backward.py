"""Backward: one key block meets its query blocks; each tile's weights are computed again.

    weights = e^(logits - row_max) / row_sum
    d_weights = drop(d_context . value^T)        delta = sum_v d_context context - d_row_sum row_sum
    d_logits = weights (d_weights - delta)       d_bias = d_logits, d_product = cap' d_logits
    d_query = scale d_product . key    d_key = d_product^T . scale query
    d_value = drop(weights)^T . d_context

Of a key that has all of its row, d_logits is d_row_sum row_sum: d_weights and delta are equal, and
what is left of their rounding would be multiplied by a key of 1e15, or the query beside it. In 16
bits it is left there: what a GPU's compiler makes of it needs more memory.

float32 and wider: 1 / row_sum stands in d_context and delta instead of in the weights.

In `order`'s axes, by its equations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flax_mha.attention.blockwise.call import (
    Blocks,
    Plan,
    key_tile,
    of_queries,
    of_rows,
    product,
    put_keys,
    put_queries,
    scaled_queries,
    stretch,
    tile_dropper,
    tile_logits,
    tile_terms,
    value_tile,
)
from flax_mha.attention.blockwise.forward import Softmax, alone_of
from flax_mha.attention.blockwise.lanes import begin, of_lane, put_lane, queries_apart
from flax_mha.attention.blockwise.loops import every, query_loop, where_needed
from flax_mha.attention.blockwise.order import order_of
from flax_mha.attention.blockwise.pair_tiles import add_moving
from flax_mha.attention.blockwise.tiles import Tile, add_at, scores_place
from flax_mha.attention.distance import unskew
from flax_mha.attention.logits import scales
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array
from flax_mha.core.varying import full


class Saved(NamedTuple):
    """What every tile of a query needs.

    Not lse = row_max + log(row_sum): beside a row_max of 1e8 that is row_max.
    """

    row_max_BNT: Array  # inf where nothing may be attended: e^(logits - inf) is 0
    share_BNT: Array | None  # 1 / row_sum; None where delta and d_context were multiplied by it
    delta_BNT: Array
    alone_BNT: Array | None  # the weight of a key that has all of its row, else inf
    d_alone_BNT: Array | None  # None in 16 bits
    d_context_BTNV: Array


class Terms(NamedTuple):
    """The gradients of the biases and of a score function's floats, where the call has them."""

    bias_bnts: Array | None
    values_NL: Array | None
    score: dict[str, Array]


class Gradients(NamedTuple):
    """The gradients so far, in float32 at least."""

    d_query_BTNH: Array
    d_key_BSKH: Array
    d_value_BSKV: Array
    d_terms: Terms


class Sums(NamedTuple):
    """What one key block has gathered: its own gradients, and those that all blocks share."""

    d_key: Array  # as `order` gathers them
    d_value: Array
    d_query_BTNH: Array
    d_terms: Terms


class TileGradients(NamedTuple):
    """What one tile adds."""

    d_key: Array
    d_value: Array
    d_query_bkrh: Array
    d_logits_bkrs: Array | None  # before the score function
    d_score: dict[str, Array]


def backward(
    plan: Plan, blocks: Blocks, softmax: Softmax, cotangents: tuple[Array, Array]
) -> Gradients:
    """The gradients of query, key, value and biases, of those of context and row_sum."""
    tiling, saved = plan.tiling, _saved(blocks, softmax, *cotangents)

    def lane(index: Array, gradients: Gradients) -> Gradients:
        corner = begin(tiling, index)
        own = queries_apart(tiling, blocks, corner)
        cut = lambda x_BTNF: of_lane(tiling, x_BTNF, own.queries_from)  # noqa: E731
        own_saved = saved._replace(d_context_BTNV=cut(saved.d_context_BTNV))
        sums = gradients._replace(d_query_BTNH=cut(gradients.d_query_BTNH))
        step = lambda j, sums: _key_block(plan, own, own_saved, (*corner, j), sums)  # noqa: E731
        sums = every(tiling.key_blocks, step, sums)
        whole = (gradients.d_query_BTNH, sums.d_query_BTNH, own.queries_from)
        return sums._replace(d_query_BTNH=put_lane(tiling, *whole))

    wide = wide_dtype(blocks.query_BTNH.dtype)
    values = None if blocks.distance_bias is None else blocks.distance_bias.values
    terms = Terms(blocks.bias_bnts, values, {} if blocks.score is None else blocks.score.moving)
    like = Gradients(blocks.query_BTNH, blocks.key_BSKH, blocks.value_BSKV, terms)
    start = jax.tree.map(lambda x: full(blocks.query_BTNH, x.shape, 0, wide), like)
    return every(tiling.lanes, lane, start)


def _saved(blocks: Blocks, softmax: Softmax, d_context: Array, d_row_sum: Array) -> Saved:
    context, row_max, row_sum = softmax
    nowhere = row_sum == 0
    row_max, share = jnp.where(nowhere, jnp.inf, row_max), 1 / jnp.where(nowhere, 1, row_sum)
    d_alone = d_row_sum * row_sum
    delta = (d_context * context).sum(-1).swapaxes(1, 2) - d_alone
    dtype = blocks.query_BTNH.dtype
    if dtype != wide_dtype(dtype):  # in float16 a small d_context times a small share is 0
        return Saved(row_max, share, delta, None, None, d_context.astype(dtype))
    # Once a query and not once a pair: XLA's CPU makes one more array of a tile's weights for it.
    d_context *= share.swapaxes(1, 2)[..., None]
    return Saved(row_max, None, delta * share, alone_of(row_sum), d_alone, d_context)


def _key_block(
    plan: Plan,
    blocks: Blocks,
    saved: Saved,
    at: tuple[Array, Array, Array],
    gradients: Gradients,
) -> Gradients:
    tiling, (b, k, j) = plan.tiling, at
    s = j * tiling.s
    here = Tile(b, k, 0, s)
    key_bksh, value_bksv = key_tile(plan, blocks, here), value_tile(plan, blocks, here)

    def step(masked: bool, i: Array, sums: Sums) -> Sums:
        tile = Tile(b, k, i * tiling.t, s)
        compute = lambda: _tile_gradients(  # noqa: E731
            plan, blocks, saved, key_bksh, value_bksv, tile, masked
        )
        nothing = lambda: jax.tree.map(  # noqa: E731
            lambda x: full(blocks.query_BTNH, x.shape, 0, x.dtype), jax.eval_shape(compute)
        )
        return _add(plan, blocks, sums, tile, where_needed(plan, blocks, tile, compute, nothing))

    sums = _nothing(plan, gradients)
    sums = query_loop(plan, blocks, at, step, sums)
    _, of_product = scales(plan.options, blocks.query_BTNH.dtype)
    order = order_of(tiling)
    d_key_bksh = order.of_keys(sums.d_key) * of_product
    return Gradients(
        sums.d_query_BTNH,
        put_keys(gradients.d_key_BSKH, d_key_bksh, here),
        put_keys(gradients.d_value_BSKV, order.of_keys(sums.d_value), here),
        sums.d_terms,
    )


def _nothing(plan: Plan, gradients: Gradients) -> Sums:
    d_query, d_key, d_value, d_terms = gradients
    sizes = (plan.tiling.b, plan.tiling.k, plan.tiling.s)
    shape = lambda x_BSKF: order_of(plan.tiling).gathered(*sizes, x_BSKF.shape[-1])  # noqa: E731
    zeros = lambda x_BSKF: full(x_BSKF, shape(x_BSKF), 0)  # noqa: E731
    return Sums(zeros(d_key), zeros(d_value), d_query, d_terms)


def _tile_gradients(
    plan: Plan,
    blocks: Blocks,
    saved: Saved,
    key_bksh: Array,
    value_bksv: Array,
    tile: Tile,
    masked: bool,
) -> TileGradients:
    tiling, order = plan.tiling, order_of(plan.tiling)
    drop = tile_dropper(plan, blocks, tile, order)
    query_bkrh = scaled_queries(plan, blocks, tile)
    d_context_bkrv = of_queries(tiling, saved.d_context_BTNV, tile.within(blocks.queries_from))
    along = lambda x_BNT: order.along_rows(of_rows(tiling, x_BNT, tile))  # noqa: E731

    terms = tile_terms(plan, blocks, tile)
    logits_rs, slope_rs, pull = tile_logits(
        plan, blocks, query_bkrh, key_bksh, terms, tile, masked, order
    )
    weights_rs = jnp.exp(logits_rs - along(saved.row_max_BNT))
    if saved.share_BNT is not None:
        weights_rs *= along(saved.share_BNT)
    d_weights_rs = drop(product(plan, order.d_weights, d_context_bkrv, value_bksv))
    d_logits_rs = weights_rs * (d_weights_rs - along(saved.delta_BNT))
    if saved.alone_BNT is not None:
        is_alone_rs = weights_rs >= along(saved.alone_BNT)  # of NaN not
        d_logits_rs = jnp.where(is_alone_rs, along(saved.d_alone_BNT), d_logits_rs)
    d_score: dict[str, Array] = {}
    if pull is not None:
        d_logits_rs, d_score = pull(d_logits_rs)
    d_product_rs = d_logits_rs if slope_rs is None else d_logits_rs * slope_rs
    d_product_rs = d_product_rs.astype(key_bksh.dtype)
    kept_rs = drop(weights_rs).astype(value_bksv.dtype)
    has_bias = blocks.bias_bnts is not None or blocks.distance_bias is not None
    return TileGradients(
        product(plan, order.d_key, order.of_gathered(query_bkrh), d_product_rs),
        product(plan, order.d_value, order.of_gathered(d_context_bkrv), kept_rs),
        product(plan, order.d_query, d_product_rs, key_bksh) * plan.options.scale,
        order.of_rows_and_keys(d_logits_rs) if has_bias else None,
        d_score,
    )


def _add(plan: Plan, blocks: Blocks, sums: Sums, tile: Tile, added: TileGradients) -> Sums:
    here = tile.within(blocks.queries_from)
    d_query_bkrh = of_queries(plan.tiling, sums.d_query_BTNH, here) + added.d_query_bkrh
    return Sums(
        sums.d_key + added.d_key,
        sums.d_value + added.d_value,
        put_queries(plan.tiling, sums.d_query_BTNH, d_query_bkrh, here),
        _add_terms(plan, blocks, sums.d_terms, tile, added),
    )


def _add_terms(plan: Plan, blocks: Blocks, sums: Terms, tile: Tile, added: TileGradients) -> Terms:
    """Dense: summed over the axes in which it has size 1. Of distances: along the diagonals."""
    bias_bnts, values_NL, score = sums
    tiling, d_logits_bkrs = plan.tiling, added.d_logits_bkrs
    if d_logits_bkrs is not None:
        heads = tiling.k * tiling.G
        d_logits_bnts = d_logits_bkrs.reshape(tiling.b, heads, tiling.t, tiling.s)
    if bias_bnts is not None:
        start, _ = scores_place(tiling, bias_bnts.shape, tile)
        summed = tuple(axis for axis, n in enumerate(bias_bnts.shape) if n == 1)
        bias_bnts = add_at(bias_bnts, d_logits_bnts.sum(summed, keepdims=True), start)
    if values_NL is not None:
        start, _ = stretch(plan, blocks, tile)
        values_NL = add_at(values_NL, unskew(d_logits_bnts.sum(0)), start)
    score = {
        name: add_moving(tiling, name, x, added.d_score[name], tile) for name, x in score.items()
    }
    return Terms(bias_bnts, values_NL, score)
