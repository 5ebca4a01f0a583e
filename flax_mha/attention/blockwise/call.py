"""What forward and backward of the blockwise implementation share: arrays, logits, dropout.

Tiles are cut out of arrays that keep the caller's layout: query BTNH, key BSKH, value BSKV, with
T and S filled up to whole blocks. The r = G t rows of a tile meet the keys of one key/value head.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha.attention import dropout
from flax_mha.attention.allowed import Allowed
from flax_mha.attention.blockwise.order import KEYS_LAST, Order
from flax_mha.attention.blockwise.pair_tiles import (
    also_allowed,
    moving_of,
    scored,
)
from flax_mha.attention.blockwise.tiles import (
    Corner,
    Tile,
    Tiling,
    allowed,
    of_scores,
    per_example,
    put_at,
    slice_at,
)
from flax_mha.attention.contract import Options, Scales
from flax_mha.attention.distance import DistanceBias, skew
from flax_mha.attention.logits import scaled_product, scales, soft_capped
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.pairs.separated import Separated
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
    where: tuple[Allowed, ...] = ()
    score: Separated | None = None
    needed_bnQJ: Array | None = None  # the tiles in which functions leave anything
    scales: Scales | None = None  # of keys and values that are int8
    queries_from: Corner | None = None  # where queries begin, of a lane that stands apart
    keys_from: Corner | None = None  # where keys, values and their scales do


def of_queries(tiling: Tiling, x_BTNF: Array, tile: Tile) -> Array:
    """The tile's queries, `[b, k, r, F]`."""
    b, k, G, t, F = tiling.b, tiling.k, tiling.G, tiling.t, x_BTNF.shape[3]
    x_btnF = slice_at(x_BTNF, (tile.b, tile.t, tile.k * G, 0), (b, t, k * G, F))
    return x_btnF.swapaxes(1, 2).reshape(b, k, G * t, F)


def scaled_queries(plan: Plan, blocks: Blocks, tile: Tile) -> Array:
    """The tile's queries, times the query's part of the scale."""
    here = tile.within(blocks.queries_from)
    return scaled(plan, of_queries(plan.tiling, blocks.query_BTNH, here))


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


def key_tile(plan: Plan, blocks: Blocks, tile: Tile) -> Array:
    """The tile's keys, in the queries' dtype, whatever they are stored as."""
    scale = None if blocks.scales is None else blocks.scales.key_BSK
    return _as_queries(plan, blocks, blocks.key_BSKH, scale, tile)


def value_tile(plan: Plan, blocks: Blocks, tile: Tile) -> Array:
    """The tile's values likewise."""
    scale = None if blocks.scales is None else blocks.scales.value_BSK
    return _as_queries(plan, blocks, blocks.value_BSKV, scale, tile)


def _as_queries(
    plan: Plan, blocks: Blocks, x_BSKF: Array, scale_BSK: Array | None, tile: Tile
) -> Array:
    here = tile.within(blocks.keys_from)
    x_bksF = of_keys(plan.tiling, x_BSKF, here)
    if scale_BSK is None:
        return x_bksF
    scale_bks1 = of_keys(plan.tiling, scale_BSK[..., None], here)
    return (x_bksF.astype(scale_bks1.dtype) * scale_bks1).astype(blocks.query_BTNH.dtype)


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


class TileTerms(NamedTuple):
    """A tile's part of what makes logits of products, None or nothing where the call has it not."""

    bias_bkGts: Array | None
    values_nl: Array | None  # the stretch of the distance bias
    score: dict[str, Array]  # the floats of the score function


def tile_terms(plan: Plan, blocks: Blocks, tile: Tile) -> TileTerms:
    bias, distances = blocks.bias_bnts, blocks.distance_bias
    return TileTerms(
        None if bias is None else of_scores(plan.tiling, bias, tile),
        None if distances is None else slice_at(distances.values, *stretch(plan, blocks, tile)),
        {} if blocks.score is None else moving_of(plan.tiling, blocks.score, tile),
    )


class TileLogits(NamedTuple):
    """Logits of a tile, -inf where the mask forbids, and the way back from their gradient.

    `pull_score` gives that of the logits before the score and of its floats; None = no score.
    """

    logits_rs: Array
    slope_rs: Array | None  # of the soft cap
    pull_score: Any = None


def tile_logits(
    plan: Plan,
    blocks: Blocks,
    query_bkrh: Array,
    key_bksh: Array,
    terms: TileTerms,
    tile: Tile,
    masked: bool,
    order: Order = KEYS_LAST,
) -> TileLogits:
    """score(cap(scale query . key) + bias) where allowed, of a query with its part of the scale."""
    tiling, options = plan.tiling, plan.options
    multiply = functools.partial(product, plan, order.logits)
    product_rs = scaled_product(multiply, query_bkrh, key_bksh, options)
    logits_rs, slope_rs = soft_capped(product_rs, options), None
    if options.soft_cap is not None:
        slope_rs = 1 - (logits_rs / options.soft_cap) ** 2
    split = order.split(logits_rs, tiling)
    if terms.bias_bkGts is not None:
        split += order.beside(terms.bias_bkGts.astype(split.dtype), tiling)
    if terms.values_nl is not None:
        bias_nts = skew(terms.values_nl, tiling.t, tiling.s).astype(split.dtype)
        bias_bkGts = bias_nts.reshape(1, tiling.k, tiling.G, tiling.t, tiling.s)
        split += order.beside(bias_bkGts, tiling)
    pull, may_attend = None, _allowed(tiling, blocks, tile, order) if masked else None
    if blocks.score is not None:
        of = functools.partial(scored, blocks.score, tiling, order, tile, may_attend)
        split, pull = jax.vjp(of, split, terms.score)
    if may_attend is not None:
        split = jnp.where(may_attend, split, -jnp.inf)
    shape = logits_rs.shape
    return TileLogits(split.reshape(shape), slope_rs, _of_rows(pull, split.shape, shape))


def _allowed(tiling: Tiling, blocks: Blocks, tile: Tile, order: Order) -> Array:
    """What the mask leaves of a tile, beside its logits as `order` split them."""
    repeats = order.repeats(tiling)
    allowed_bkGts = allowed(tiling, blocks.mask, tile, repeats)
    allowed_bkGts = also_allowed(tiling, blocks.where, tile, repeats, allowed_bkGts)
    return order.beside(allowed_bkGts, tiling)


def _of_rows(pull: Any, split: Shape, shape: Shape) -> Any:
    """`pull`, to and from cotangents of the logits of rows."""
    if pull is None:
        return None

    def back(d_logits_rs: Array) -> tuple[Array, dict[str, Array]]:
        d_before, d_score = pull(d_logits_rs.reshape(split))
        return d_before.reshape(shape), d_score

    return back


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
