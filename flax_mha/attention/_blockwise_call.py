"""What forward and backward of the blockwise implementation share: arrays, logits, dropout.

Arrays are in groups g of one key/value head and its G query heads: query gGTH, key gSH, value gSV,
with T and S filled up to whole blocks.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha import _dropout
from flax_mha._dtypes import wide_dtype
from flax_mha._typing import Array, PRNGKey, Shape
from flax_mha.attention._contract import Options, soft_capped
from flax_mha.attention._distance import DistanceBias, skew
from flax_mha.attention._tiles import (
    Tile,
    Tiling,
    allowed,
    is_band,
    may_meet,
    of_scores,
    per_example,
    slice_at,
)
from flax_mha.masks import Mask


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static half of a call."""

    tiling: Tiling
    options: Options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """The data of a call, grouped and filled up."""

    query_gGTH: Array
    key_gSH: Array
    value_gSV: Array
    bias_bnts: Array | None
    distance_bias: DistanceBias | None
    mask: Mask
    dropout_key: PRNGKey | None


def rows(x: Array, g: Array, i: Array, size: int) -> Array:
    """Block i of `[g, ..., L, F]` along L, of group g."""
    start = (g, *[0] * (x.ndim - 3), i * size, 0)
    return slice_at(x, start, (1, *x.shape[1:-2], size, x.shape[-1]))[0]


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


class TileLogits(NamedTuple):
    """Logits of a tile, -inf where the mask forbids; the soft cap's slope, where there is one."""

    logits_Gts: Array
    slope_Gts: Array | None


def tile_logits(plan: Plan, blocks: Blocks, tile: Tile, masked: bool) -> TileLogits:
    """cap(scale query . key) + bias: `[G, t, s]`."""
    tiling, options = plan.tiling, plan.options
    query_Gth = rows(blocks.query_gGTH, tile.g, tile.i, tiling.t)
    key_sh = rows(blocks.key_gSH, tile.g, tile.j, tiling.s)
    product_Gts = product(plan, "Gth,sh->Gts", query_Gth, key_sh) * options.scale
    logits_Gts, slope_Gts = soft_capped(product_Gts, options), None
    if options.soft_cap is not None:
        slope_Gts = 1 - (logits_Gts / options.soft_cap) ** 2
    if blocks.bias_bnts is not None:
        logits_Gts += of_scores(tiling, blocks.bias_bnts, tile).astype(logits_Gts.dtype)
    if blocks.distance_bias is not None:
        values_Gl = slice_at(blocks.distance_bias.values, *stretch(plan, blocks, tile))
        logits_Gts += skew(values_Gl, tiling.t, tiling.s).astype(logits_Gts.dtype)
    if masked:
        logits_Gts = jnp.where(allowed(tiling, blocks.mask, tile), logits_Gts, -jnp.inf)
    return TileLogits(logits_Gts, slope_Gts)


def stretch(plan: Plan, blocks: Blocks, tile: Tile) -> tuple[Any, Shape]:
    """(start, size) of a tile's stretch of the distance bias, from its last row's first key on."""
    tiling, bias = plan.tiling, blocks.distance_bias
    assert bias is not None
    nearest = tile.j * tiling.s - (tile.i * tiling.t + tiling.t - 1)
    entry = nearest - per_example(bias.query_offset, tile.g, tiling) - bias.first
    # Beyond an end, where all values are equal, lax clips on the right and wraps on the left.
    start = (tile.g % tiling.K * tiling.G, jnp.maximum(entry, 0))
    return start, (tiling.G, tiling.t + tiling.s - 1)


def tile_dropper(plan: Plan, blocks: Blocks, tile: Tile) -> Any:
    """The function that drops entries of this tile: the same ones at every call."""
    rate, tiling = plan.options.dropout_rate, plan.tiling
    if rate == 0.0 or blocks.dropout_key is None:
        return lambda x_Gts: x_Gts
    start = (
        tile.g // tiling.K,
        tile.g % tiling.K * tiling.G,
        tile.i * tiling.t,
        tile.j * tiling.s,
    )
    shape = (1, tiling.G, tiling.t, tiling.s)
    keep_Gts = _dropout.keep_mask(blocks.dropout_key, rate, shape, start)[0]
    return lambda x_Gts: _dropout.drop(x_Gts, keep_Gts, rate)


def where_needed(plan: Plan, blocks: Blocks, tile: Tile, compute: Any, otherwise: Any) -> Any:
    """`compute()`, or `otherwise` where padding and segments leave nothing of the tile."""
    if is_band(blocks.mask) or not blocks.mask.removes_positions:
        return compute()
    needed = may_meet(plan.tiling, blocks.mask, tile)
    return jax.lax.cond(needed, compute, lambda: otherwise)


def loop(spans: Any, step: Any, carry: Any) -> Any:
    """`carry = step(masked, block, carry)` over the blocks of all spans."""
    for span in spans:
        body = lambda block, carry, masked=span.masked: step(masked, block, carry)  # noqa: E731
        carry = jax.lax.fori_loop(span.start, span.stop, body, carry)
    return carry
