"""Backward: one key block meets its query blocks; each tile's weights are computed again.

    weights = e^(logits - lse)                   lse = row_max + log row_sum
    d_weights = drop(d_context . value^T)        delta = sum_v d_context context - d_row_sum row_sum
    d_logits = weights (d_weights - delta)       d_bias = d_logits, d_product = cap' d_logits
    d_query = scale d_product . key    d_key = scale d_product^T . query
    d_value = drop(weights)^T . d_context

d_key and d_value are summed transposed, `[h, s]`: written so, XLA's CPU products run at twice the
rate of those that would transpose the tile.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha._dtypes import wide_dtype
from flax_mha._typing import Array
from flax_mha.attention._blockwise_call import (
    Blocks,
    Plan,
    loop,
    product,
    rows,
    stretch,
    tile_dropper,
    tile_logits,
    where_needed,
)
from flax_mha.attention._blockwise_forward import Softmax
from flax_mha.attention._distance import unskew
from flax_mha.attention._tiles import Tile, add_at, query_spans, scores_place, slice_at


class Rows(NamedTuple):
    """What every tile of a query needs; `T` copies are transposed once, outside the loops."""

    lse_gGT1: Array
    delta_gGT1: Array
    query_gGHT: Array
    d_context_gGTV: Array
    d_context_gGVT: Array


class Biases(NamedTuple):
    """The gradients of the dense bias and of the distance bias, where the call has them."""

    bias_bnts: Array | None
    values_NL: Array | None


class Sums(NamedTuple):
    """The gradients of one group so far; d_key and d_value of one key block."""

    d_query_GTh: Array
    d_key_hs: Array
    d_value_vs: Array
    d_biases: Biases


class TileGradients(NamedTuple):
    """What one tile adds."""

    d_query_Gth: Array
    d_key_hs: Array
    d_value_vs: Array
    d_logits_Gts: Array | None


def backward(
    plan: Plan, blocks: Blocks, softmax: Softmax, cotangent: Softmax
) -> tuple[Array, Array, Array, Biases]:
    """(d_query gGTH, d_key gSH, d_value gSV, d_biases), in float32 at least."""
    saved = _rows(blocks, softmax, cotangent)
    wide = wide_dtype(blocks.query_gGTH.dtype)

    def group(d_biases: Biases, g: Array) -> Any:
        zeros_GTh = jnp.zeros(blocks.query_gGTH.shape[1:], wide)
        step = lambda carry, j: _key_block(plan, blocks, saved, g, j, *carry)  # noqa: E731
        key_blocks = jnp.arange(plan.tiling.key_blocks, dtype="int32")
        start = (zeros_GTh, d_biases)
        (d_query, d_biases), (d_key, d_value) = jax.lax.scan(step, start, key_blocks)
        return d_biases, (d_query, _join(d_key), _join(d_value))

    values = None if blocks.distance_bias is None else blocks.distance_bias.values
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide), Biases(blocks.bias_bnts, values))
    groups = jnp.arange(len(blocks.query_gGTH), dtype="int32")
    d_biases, (d_query, d_key, d_value) = jax.lax.scan(group, zeros, groups)
    return d_query * plan.options.scale, d_key * plan.options.scale, d_value, d_biases


def _rows(blocks: Blocks, softmax: Softmax, cotangent: Softmax) -> Rows:
    context, row_max, row_sum = softmax
    d_context, _, d_row_sum = cotangent
    empty = row_sum == 0
    # +inf where nothing may be attended: e^(logits - lse) is 0 there, for any logits.
    log_sum = jnp.log(jnp.where(empty, 1, row_sum))
    lse = jnp.where(empty, jnp.inf, jnp.where(empty, 0, row_max) + log_sum)
    delta = (d_context * context).sum(-1) - d_row_sum * row_sum
    d_context = d_context.astype(blocks.value_gSV.dtype)
    return Rows(
        lse[..., None],
        delta[..., None],
        blocks.query_gGTH.swapaxes(2, 3),
        d_context,
        d_context.swapaxes(2, 3),
    )


def _key_block(
    plan: Plan, blocks: Blocks, saved: Rows, g: Array, j: Array, d_query: Array, d_biases: Biases
) -> Any:
    wide, s = d_query.dtype, plan.tiling.s
    H, V = blocks.key_gSH.shape[-1], blocks.value_gSV.shape[-1]

    def step(masked: bool, i: Array, sums: Sums) -> Sums:
        tile = Tile(g, i, j)
        compute = lambda: _tile_gradients(plan, blocks, saved, tile, masked)  # noqa: E731
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
        return _add(plan, blocks, sums, tile, where_needed(plan, blocks, tile, compute, nothing))

    sums = Sums(d_query, jnp.zeros((H, s), wide), jnp.zeros((V, s), wide), d_biases)
    sums = loop(query_spans(plan.tiling, blocks.mask, g, j), step, sums)
    return (sums.d_query_GTh, sums.d_biases), (sums.d_key_hs, sums.d_value_vs)


def _tile_gradients(
    plan: Plan, blocks: Blocks, saved: Rows, tile: Tile, masked: bool
) -> TileGradients:
    t, s = plan.tiling.t, plan.tiling.s
    g, i, j = tile
    query_Ght = _columns(saved.query_gGHT, g, i, t)
    d_context_Gvt = _columns(saved.d_context_gGVT, g, i, t)
    key_sh, value_sv = rows(blocks.key_gSH, g, j, s), rows(blocks.value_gSV, g, j, s)
    drop = tile_dropper(plan, blocks, tile)

    logits_Gts, slope_Gts = tile_logits(plan, blocks, tile, masked)
    weights_Gts = jnp.exp(logits_Gts - rows(saved.lse_gGT1, g, i, t))
    d_context_Gtv = rows(saved.d_context_gGTV, g, i, t)
    d_weights_Gts = drop(product(plan, "Gtv,sv->Gts", d_context_Gtv, value_sv))
    d_logits_Gts = weights_Gts * (d_weights_Gts - rows(saved.delta_gGT1, g, i, t))
    d_product_Gts = d_logits_Gts if slope_Gts is None else d_logits_Gts * slope_Gts
    d_product_Gts = d_product_Gts.astype(key_sh.dtype)
    kept_Gts = drop(weights_Gts).astype(value_sv.dtype)
    return TileGradients(
        product(plan, "Gts,sh->Gth", d_product_Gts, key_sh),
        product(plan, "Ght,Gts->hs", query_Ght, d_product_Gts),
        product(plan, "Gvt,Gts->vs", d_context_Gvt, kept_Gts),
        None if blocks.bias_bnts is None and blocks.distance_bias is None else d_logits_Gts,
    )


def _add(plan: Plan, blocks: Blocks, sums: Sums, tile: Tile, added: TileGradients) -> Sums:
    return Sums(
        add_at(sums.d_query_GTh, added.d_query_Gth, (0, tile.i * plan.tiling.t, 0)),
        sums.d_key_hs + added.d_key_hs,
        sums.d_value_vs + added.d_value_vs,
        _add_biases(plan, blocks, sums.d_biases, tile, added.d_logits_Gts),
    )


def _add_biases(plan: Plan, blocks: Blocks, sums: Biases, tile: Tile, d_logits_Gts: Any) -> Biases:
    """Dense: summed over the axes in which it has size 1. Of distances: along the diagonals."""
    bias_bnts, values_NL = sums
    if bias_bnts is not None:
        start, size = scores_place(plan.tiling, bias_bnts.shape, tile)
        summed = tuple(axis for axis, n in enumerate(bias_bnts.shape[1:]) if n == 1)
        part = d_logits_Gts.sum(summed, keepdims=True).reshape(size)
        bias_bnts = add_at(bias_bnts, part, start)
    if values_NL is not None:
        start, _ = stretch(plan, blocks, tile)
        values_NL = add_at(values_NL, unskew(d_logits_Gts), start)
    return Biases(bias_bnts, values_NL)


def _columns(x: Array, g: Array, i: Array, size: int) -> Array:
    """Block i of `[g, G, F, T]` along T, of group g."""
    return slice_at(x, (g, 0, 0, i * size), (1, *x.shape[1:-1], size))[0]


def _join(blocks_jfs: Array) -> Array:
    """Key blocks `[J, f, s]` to `[S, f]`."""
    return blocks_jfs.swapaxes(1, 2).reshape(-1, blocks_jfs.shape[1])
