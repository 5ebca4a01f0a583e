"""The products and passes of a tile, as often as a call visits one.

The products are those of `order`, in the sizes that the call's own tiling has; the passes are its
equations without the products, as XLA would fuse them.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.attention import dropout
from flax_mha.attention.blockwise.order import order_of
from flax_mha.attention.blockwise.tile_sizes import tiling_of
from flax_mha.attention.blockwise.tiles import Tiling, key_spans
from flax_mha.attention.contract import Inputs
from flax_mha.bench.cases import Case
from flax_mha.bench.parts.part import Part
from flax_mha.core.platform import Place
from flax_mha.core.typing import Array
from flax_mha.masks import Mask


class Visits(NamedTuple):
    """How many tiles a call computes, and how many of them it masks entry by entry."""

    tiles: int
    masked: int


def plan_of(case: Case) -> tuple[Tiling, Visits]:
    """The tiling of a case here, and what its mask leaves of it.

    Example:
        >>> tiling, visits = plan_of(Case(1, 2048, 512, 8, causal=True))
        >>> tiling.t, tiling.s, tiling.k, visits
        (512, 512, 2, Visits(tiles=40, masked=16))
    """
    mask = Mask.causal() if case.causal else Mask()
    if case.window is not None:
        mask &= Mask.window(case.window - 1, case.window - 1)
    heads = (case.batch, case.length, case.heads, case.head_size)
    like = jax.ShapeDtypeStruct(heads, jnp.float32)
    words = np.zeros(2, np.uint32) if case.dropout else None
    inputs: Any = Inputs(
        query_BTNH=like,  # type: ignore[arg-type]
        key_BSKH=like,  # type: ignore[arg-type]
        value_BSKV=like,  # type: ignore[arg-type]
        mask=mask,
        dropout_word_2=words,  # type: ignore[arg-type]
    )
    tiling = tiling_of(inputs, None, Place.here())
    blocks = jnp.arange(tiling.query_blocks, dtype="int32")
    tiles, masked = 0, 0
    for span in key_spans(tiling, mask, jnp.int32(0), blocks):
        count = int(np.broadcast_to(span.stop - span.start, blocks.shape).sum())
        tiles, masked = tiles + count, masked + count * span.masked
    return tiling, Visits(tiling.lanes * tiles, tiling.lanes * masked)


def parts_of(case: Case, tiling: Tiling, visits: Visits) -> Iterator[Part]:
    """Forward, then backward."""
    order, bk = order_of(tiling), (tiling.b, tiling.k)
    rows, keys = (*bk, tiling.r, case.head_size), (*bk, tiling.s, case.head_size)
    tile = jax.eval_shape(_einsum(order.logits), *map(_floats, (rows, keys))).shape
    row, gathered = (*bk, tiling.r), jax.eval_shape(order.of_gathered, _floats(rows)).shape
    numbers, flops = int(np.prod(tile)), 2 * int(np.prod(tile)) * case.head_size

    def product(name: str, equation: str, *shapes: Any) -> Part:
        return Part(name, _einsum(equation), shapes, visits.tiles, flops=flops)

    def apass(name: str, function: Callable, *shapes: Any, times: int = visits.tiles) -> Part:
        return Part(name, function, shapes, times, numbers=numbers)

    def softmax(logits_rs: Array) -> tuple[Array, Array]:
        row_max_bkr = logits_rs.max(order.over_keys)
        exp_rs = jnp.exp(logits_rs - order.along_rows(row_max_bkr))
        return exp_rs, exp_rs.sum(order.over_keys)

    def d_softmax(logits_rs: Array, d_weights_rs: Array, row_bkr: Array) -> tuple[Array, Array]:
        row = order.along_rows(row_bkr)
        weights_rs = jnp.exp(logits_rs - row)
        return weights_rs, weights_rs * (d_weights_rs - row)

    def masked(logits_rs: Array) -> Array:
        row_rs, key_rs = (
            jax.lax.broadcasted_iota("int32", (tiling.r, tiling.s), axis) for axis in (0, 1)
        )
        may_rs = jax.lax.broadcast_to_rank(key_rs <= row_rs, logits_rs.ndim)
        return jnp.where(may_rs, logits_rs, -jnp.inf)

    def drawn(words_2: Array) -> Array:
        size = (*bk, tiling.r, tiling.s)
        return dropout.keep_mask(words_2.view(jnp.uint32), case.dropout, size)

    directions = 1 + case.gradient
    yield product("query . key", order.logits, rows, keys)
    if visits.masked:
        yield apass("mask", masked, tile, times=directions * visits.masked)
    if case.dropout:
        yield apass("dropout's bits", drawn, (2,), times=directions * visits.tiles)
    yield apass("maximum, exp, sum", softmax, tile)
    yield product("weights . value", order.sum, tile, keys)
    if case.gradient:
        yield product("query . key, again", order.logits, rows, keys)
        yield product("d_context . value", order.d_weights, rows, keys)
        yield apass("exp, d_logits", d_softmax, tile, tile, row)
        if order.turns_queries:
            times, read = 2 * visits.tiles, int(np.prod(rows))  # of queries and of d_context
            yield Part("queries turned", order.of_gathered, (rows,), times, numbers=read)
        yield product("d_key", order.d_key, gathered, tile)
        yield product("d_value", order.d_value, gathered, tile)
        yield product("d_query", order.d_query, tile, keys)


def _einsum(equation: str) -> Callable[[Array, Array], Array]:
    return lambda a, b: jnp.einsum(equation, a, b)


def _floats(shape: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
