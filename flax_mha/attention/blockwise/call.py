"""What forward and backward of the blockwise implementation share: arrays, logits, dropout.

Tiles are cut out of arrays that keep the caller's layout: query BTNH, key BSKH, value BSKV, with
T and S filled up to whole blocks. The r = G t rows of a tile meet the keys of one key/value head.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.attention import dropout
from flax_mha.attention.blockwise.order import KEYS_LAST, Order
from flax_mha.attention.blockwise.tiles import (
    Tile,
    Tiling,
    allowed,
    may_meet,
    of_scores,
    per_example,
    put_at,
    slice_at,
)
from flax_mha.attention.contract import Options
from flax_mha.attention.distance import DistanceBias, skew
from flax_mha.attention.logits import scaled_product, scales, soft_capped
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.sizes import as_index, is_known
from flax_mha.core.typing import Array, Shape
from flax_mha.masks import Mask


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a call; `skips` = tiles of which padding leaves nothing are left out.

    Not where devices share a tile: they would have to ask each other, for each of them.
    """

    tiling: Tiling
    options: Options
    skips: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """The data of a call, filled up to whole blocks."""

    query_BTNH: Array
    key_BSKH: Array
    value_BSKV: Array
    bias_bnts: Array | None
    distance_bias: DistanceBias | None
    mask: Mask
    dropout_word_2: Array | None
    dropout_start_4: Array | None = None


def of_queries(tiling: Tiling, x_BTNF: Array, tile: Tile) -> Array:
    """The tile's queries, `[b, k, r, F]`."""
    b, k, G, t, F = tiling.b, tiling.k, tiling.G, tiling.t, x_BTNF.shape[3]
    x_btnF = slice_at(x_BTNF, (tile.b, tile.t, tile.k * G, 0), (b, t, k * G, F))
    return x_btnF.swapaxes(1, 2).reshape(b, k, G * t, F)


def scaled_queries(plan: Plan, blocks: Blocks, tile: Tile) -> Array:
    """The tile's queries, times the query's part of the scale."""
    return scaled(plan, of_queries(plan.tiling, blocks.query_BTNH, tile))


def scaled(plan: Plan, query_bkrh: Array) -> Array:
    of_query, _ = scales(plan.options, query_bkrh.dtype)
    return query_bkrh * of_query


def put_queries(tiling: Tiling, x_BTNF: Array, part_bkrF: Array, tile: Tile) -> Array:
    """The inverse of `of_queries`: the array with this part in place."""
    b, k, G, t, F = tiling.b, tiling.k, tiling.G, tiling.t, x_BTNF.shape[3]
    part_btnF = part_bkrF.reshape(b, k * G, t, F).swapaxes(1, 2)
    return put_at(x_BTNF, part_btnF, (tile.b, tile.t, tile.k * G, 0))


def of_keys(tiling: Tiling, x_BSKF: Array, tile: Tile) -> Array:
    """The tile's keys or values, `[b, k, s, F]`."""
    size = (tiling.b, tiling.s, tiling.k, x_BSKF.shape[3])
    return slice_at(x_BSKF, (tile.b, tile.s, tile.k, 0), size).swapaxes(1, 2)


def put_keys(x_BSKF: Array, part_bksF: Array, tile: Tile) -> Array:
    """The inverse of `of_keys`."""
    return put_at(x_BSKF, part_bksF.swapaxes(1, 2), (tile.b, tile.s, tile.k, 0))


def of_rows(tiling: Tiling, x_BNT: Array, tile: Tile) -> Array:
    """The tile's part of one number a query and head, `[b, k, r]`."""
    b, k, G, t = tiling.b, tiling.k, tiling.G, tiling.t
    return slice_at(x_BNT, (tile.b, tile.k * G, tile.t), (b, k * G, t)).reshape(b, k, G * t)


def put_rows(tiling: Tiling, x_BNT: Array, part_bkr: Array, tile: Tile) -> Array:
    """The inverse of `of_rows`."""
    part_bnt = part_bkr.reshape(tiling.b, tiling.k * tiling.G, tiling.t)
    return put_at(x_BNT, part_bnt, (tile.b, tile.k * tiling.G, tile.t))


def product(plan: Plan, equation: str, a: Array, b: Array) -> Array:
    """An einsum that sums in float32 at least."""
    wide, precision = wide_dtype(a.dtype), plan.options.precision

    def native(a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=wide)

    def widened(a: Array, b: Array) -> Array:
        return native(a.astype(wide), b.astype(wide))

    if a.dtype == wide:
        return native(a, b)
    # The same numbers; XLA's CPU of jax 0.7 cannot multiply bfloat16 into float32 inside a loop.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=native)


class TileBiases(NamedTuple):
    """A tile's part of the dense bias, and its stretch of the distance bias; None = has none."""

    bias_bkGts: Array | None
    values_nl: Array | None


def tile_biases(plan: Plan, blocks: Blocks, tile: Tile) -> TileBiases:
    bias, distances = blocks.bias_bnts, blocks.distance_bias
    return TileBiases(
        None if bias is None else of_scores(plan.tiling, bias, tile),
        None if distances is None else slice_at(distances.values, *stretch(plan, blocks, tile)),
    )


class TileLogits(NamedTuple):
    """Logits of a tile, -inf where the mask forbids; the soft cap's slope, where there is one."""

    logits_rs: Array
    slope_rs: Array | None


def tile_logits(
    plan: Plan,
    blocks: Blocks,
    query_bkrh: Array,
    key_bksh: Array,
    biases: TileBiases,
    tile: Tile,
    masked: bool,
    order: Order = KEYS_LAST,
) -> TileLogits:
    """cap(scale query . key) + bias, where allowed, of a query that has its part of the scale."""
    tiling, options = plan.tiling, plan.options
    multiply = functools.partial(product, plan, order.logits)
    product_rs = scaled_product(multiply, query_bkrh, key_bksh, options)
    logits_rs, slope_rs = soft_capped(product_rs, options), None
    if options.soft_cap is not None:
        slope_rs = 1 - (logits_rs / options.soft_cap) ** 2
    split = order.split(logits_rs, tiling)
    if biases.bias_bkGts is not None:
        split += order.beside(biases.bias_bkGts.astype(split.dtype), tiling)
    if biases.values_nl is not None:
        bias_nts = skew(biases.values_nl, tiling.t, tiling.s).astype(split.dtype)
        bias_bkGts = bias_nts.reshape(1, tiling.k, tiling.G, tiling.t, tiling.s)
        split += order.beside(bias_bkGts, tiling)
    if masked:
        allowed_bkGts = allowed(tiling, blocks.mask, tile, order.repeats(tiling))
        split = jnp.where(order.beside(allowed_bkGts, tiling), split, -jnp.inf)
    return TileLogits(split.reshape(logits_rs.shape), slope_rs)


def stretch(plan: Plan, blocks: Blocks, tile: Tile) -> tuple[Any, Shape]:
    """(start, size) of a tile's stretch of the distance bias, from its last row's first key on."""
    tiling, bias = plan.tiling, blocks.distance_bias
    assert bias is not None
    offset = jnp.reshape(per_example(bias.query_offset, tile.b, tiling), (-1,))
    assert offset.size == 1, "examples with stretches of their own are taken one by one"
    entry = tile.s - (tile.t + tiling.t - 1) - offset[0] - bias.first
    # Beyond an end, where all values are equal, lax clips on the right and wraps on the left.
    start = (tile.k * tiling.G, jnp.maximum(entry, 0))
    return start, (tiling.k * tiling.G, tiling.t + tiling.s - 1)


def drops(plan: Plan, blocks: Blocks) -> bool:
    """Whether a tile drops any of its entries."""
    return plan.options.dropout_rate > 0.0 and blocks.dropout_word_2 is not None


def tile_dropper(plan: Plan, blocks: Blocks, tile: Tile, order: Order = KEYS_LAST) -> Any:
    """The function that drops entries of this tile: the same ones at every call."""
    rate, tiling = plan.options.dropout_rate, plan.tiling
    if not drops(plan, blocks):
        return lambda x_rs: x_rs
    assert blocks.dropout_word_2 is not None
    # Not `scores_place`: there is no axis of size 1 that all share, one query fills a tile as well.
    start = (tile.b, tile.k * tiling.G, tile.t, tile.s)
    size = (tiling.b, tiling.k * tiling.G, tiling.t, tiling.s)
    shared = plan.options.broadcast_dropout
    origin_4 = blocks.dropout_start_4
    if origin_4 is None and tiling.t % dropout.GROUP:  # a tile begins within a group of queries
        origin_4 = jnp.zeros(4, "uint32")
    keep_bnts = dropout.keep_mask(blocks.dropout_word_2, rate, size, start, shared, origin_4)
    keep_bkrs = keep_bnts.reshape(tiling.b, tiling.k, tiling.r, tiling.s)
    keep_rs = order.of_rows_and_keys(keep_bkrs)
    return lambda x_rs: dropout.drop(x_rs, keep_rs, rate)


def where_needed(plan: Plan, blocks: Blocks, tile: Tile, compute: Any, otherwise: Any) -> Any:
    """`compute()`, or `otherwise()` where padding and segments leave nothing of the tile."""
    if not plan.skips or not blocks.mask.removes_positions:
        return compute()
    needed = may_meet(plan.tiling, blocks.mask, tile)
    return jax.lax.cond(needed, compute, otherwise)


def every(steps: int, step: Any, carry: Any) -> Any:
    """`carry = step(index, carry)` for index = 0, 1, ... steps - 1."""
    steps = steps if is_known(steps) else as_index(steps)
    # In x64 the loop counts in 64 bits, however its bounds are given; without jit, in Python ints.
    body = lambda index, carry: step(jnp.asarray(index, "int32"), carry)  # noqa: E731
    return jax.lax.fori_loop(0, steps, body, carry)


def loop(spans: Any, step: Any, carry: Any) -> Any:
    """`carry = step(masked, block, carry)` over the blocks of all spans."""
    for start, stop, masked in spans:
        body = lambda block, carry, masked=masked: step(  # noqa: E731
            masked, jnp.asarray(block, "int32"), carry
        )
        if isinstance(start, int) and isinstance(stop, int) and stop - start == 1:
            carry = body(np.int32(start), carry)
        else:
            carry = jax.lax.fori_loop(start, stop, body, carry)
    return carry
