"""From the arrays of a call to a kernel's plan and operands; and its results back.

The heads come first and lengths are whole tiles. What removes positions becomes pairs of ids: of a
removed query -1, of a removed key 1, which meet neither each other nor a 0. With dropout the
queries begin where four rows of draws begin, that is up to 31 rows further on.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.blockwise.signature import Signature
from flax_mha.attention.distance import DistanceBias, skew
from flax_mha.attention.dropout import DRAWS, GROUP, head_words
from flax_mha.attention.logits import scales
from flax_mha.attention.pallas_tpu.pair_operands import edged, functions
from flax_mha.attention.pallas_tpu.plan import LANES, Plan
from flax_mha.attention.pallas_tpu.sizes import tile_sizes
from flax_mha.attention.pallas_tpu.spans import Tiles, tiles
from flax_mha.attention.pallas_tpu.visits import codes
from flax_mha.core.typing import Array, DType, Shape
from flax_mha.masks import Mask


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A call as its kernels see it; `first` = the row at which the queries begin."""

    plan: Plan
    operands: dict[str, Array]
    tiles: Tiles
    first: Any
    T: int
    S: int

    def rows(self, x_BTNF: Array, fill: float = 0.0) -> Array:
        """`[B, T, N, F]` to `[B, K, G, T', F]`."""
        return _queries(self.plan, x_BTNF, self.first, fill)

    def row(self, x_BNT: Array, fill: float = 0.0) -> Array:
        """`[B, N, T]` to `[B, K, G, 1, T']`."""
        x = x_BNT.reshape(self.plan.B, self.plan.K, self.plan.G, 1, self.T)
        return _placed(x, 4, self.plan.T, self.first, fill)

    def back_rows(self, x_BKGTF: Array) -> Array:
        """The inverse of `rows`."""
        x = self._cut(x_BKGTF, 3)
        B, K, G, T, F = x.shape
        return jnp.moveaxis(x, 3, 1).reshape(B, T, K * G, F)

    def back_row(self, x_BKG1T: Array) -> Array:
        """The inverse of `row`."""
        x = self._cut(x_BKG1T, 4)
        B, K, G, _, T = x.shape
        return x.reshape(B, K * G, T)

    def back_keys(self, x_BKSF: Array) -> Array:
        return x_BKSF[:, :, : self.S].swapaxes(1, 2)

    def back_scores(self, x_bkgts: Array, shape: Shape) -> Array:
        """To `[b, n, t, s]`, of an array over the scores."""
        t, s = shape[2:]
        x = self._cut(x_bkgts, 3) if t > 1 else x_bkgts
        return x[..., :s].reshape(shape)

    def back_operand(self, x_bkg11: Array, shape: Shape) -> Array:
        """To `[b, n, t, s]` or to a number, of a row, a column or a number."""
        if shape[2:3] and shape[2] > 1:
            x_bkg11 = self._cut(x_bkg11, 4)
        elif shape[3:] and shape[3] > 1:
            x_bkg11 = x_bkg11[..., : self.S]
        return x_bkg11.reshape(shape)

    def _cut(self, x: Array, axis: int) -> Array:
        if isinstance(self.first, int):
            return jax.lax.slice_in_dim(x, self.first, self.first + self.T, axis=axis)
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.T, axis=axis)


def prepare(signature: Signature, known: list[Array], interpret: bool) -> Prepared:
    """The plan and the operands that all kernels of a call share, but the spans."""
    blocks = signature.blocks(known)
    (B, T, N, H), (_, S, K, V) = blocks.query_BTNH.shape, blocks.value_BSKV.shape
    options = signature.options
    t, s = tile_sizes(blocks, options.block_sizes)
    first, more = _first_row(None if options.draws_aligned else blocks.dropout_start_4)
    of_query, of_product = _scales(options, blocks.query_BTNH.dtype)
    plan = Plan(
        B=B,
        K=K,
        G=N // K,
        T=-(-(T + more) // t) * t,
        S=-(-S // s) * s,
        H=H,
        V=V,
        t=t,
        s=s,
        band=blocks.mask.band,
        scale=of_product,
        soft_cap=options.soft_cap,
        rate=options.dropout_rate,
        precision=options.precision,
        interpret=interpret,
    )
    offset_b = _offset(blocks.mask.query_offset) - first
    ids = _ids(plan, blocks.mask, first, T, S)
    pairs = functions(plan, first, blocks.where, blocks.score)
    visited = tiles(plan, offset_b, ids, bool(blocks.mask.dense_masks), pairs.left)
    operands = {
        "offset": offset_b[:, None],
        **_dropout(blocks, options, first),
        "query": _queries(plan, blocks.query_BTNH * of_query, first),
        "key": _keys(plan, blocks.key_BSKH),
        "value": _keys(plan, blocks.value_BSKV),
    }
    if ids:
        sides = zip(*ids)
        operands |= dict(zip(("query_ids", "key_ids"), (_stacked(side) for side in sides)))
    for n, dense_bnts in enumerate(blocks.mask.dense_masks):
        operands[f"dense{n}"] = _scores(plan, dense_bnts.astype("int8"), first)
    if blocks.bias_bnts is not None:
        operands["bias"] = _scores(plan, blocks.bias_bnts, first)
    if blocks.distance_bias is not None:
        operands["distances"] = skewed(plan, blocks.distance_bias, first)
    operands |= pairs.operands
    if pairs.left is not None and (numbers_bX := codes(visited)) is not None:
        operands["codes"] = numbers_bX
    plan, _ = dataclasses.replace(plan, where=pairs.where, score=pairs.score).of(operands)
    if "distances" in operands:
        operands["distances"] = operands["distances"] / plan.late
    return Prepared(plan, operands, visited, first, T, S)


def with_spans(prepared: Prepared, spans: Array, **more: Array) -> tuple[Plan, dict[str, Array]]:
    """The plan and the operands of one kernel, which walks by these spans."""
    turn = jnp.zeros((1, 2), "int32")
    return prepared.plan.of({**prepared.operands, "spans": spans, "turn": turn, **more})


def skewed(plan: Plan, bias: DistanceBias, first: Any) -> Array:
    """`[b, K, G, 128, T + S]`: entry (r, u) is the bias at the distance u - T - r.

    So the bias of a tile's rows 128 a + r is a slice of it, 128 entries earlier for every a.
    """
    size = plan.T + plan.S
    distance_L = jnp.arange(size + LANES - 1, dtype="int32") - (plan.T + LANES - 1)
    offset_b = _offset(bias.query_offset) - first
    entry_bL = jnp.clip(
        distance_L[None] - offset_b[:, None] - bias.first, 0, bias.values.shape[1] - 1
    )
    values_bNL = jnp.moveaxis(jnp.take(bias.values, entry_bL, axis=1), 0, 1)
    tile = jax.vmap(lambda x: skew(x, LANES, size))(values_bNL).astype("float32")
    return tile.reshape(tile.shape[0], plan.K, plan.G, LANES, size)


def _scales(options: Any, dtype: DType) -> tuple[float, float]:
    """`scales`, whose power of two goes to the query: it changes no digit.

    So the product's factor is from 1 to 2, and no distance bias that is divided by it overflows.
    """
    of_query, of_product = scales(options, dtype)
    fraction, exponent = math.frexp(of_product)
    return math.ldexp(of_query, exponent - 1), 2 * fraction


def _first_row(start_4: Array | None) -> tuple[Any, int]:
    """(where the queries begin, rows that this may add); a start is not known in a trace."""
    if start_4 is None:
        return 0, 0
    return (start_4[2] % GROUP).astype("int32"), GROUP - 1


def _dropout(blocks: Any, options: Any, first: Any) -> dict[str, Array]:
    """The words of each head `[b, N 2]`, and the draws' first row and column."""
    B, N = blocks.query_BTNH.shape[0], blocks.query_BTNH.shape[2]
    if blocks.dropout_word_2 is None:
        return {"words": jnp.zeros((1, 2), "uint32"), "start": jnp.zeros((1, 2), "int32")}
    start = jnp.zeros(4, "uint32") if blocks.dropout_start_4 is None else blocks.dropout_start_4
    size, at = ((1, 1), (0, 0)) if options.broadcast_dropout else ((B, N), (start[0], start[1]))
    words_bx = jnp.stack(head_words(blocks.dropout_word_2, size, at), -1).reshape(size[0], -1)
    draws = jnp.stack([(start[2] - jnp.uint32(first)) // DRAWS, start[3]])
    return {"words": words_bx, "start": jax.lax.bitcast_convert_type(draws, "int32")[None]}


def _offset(offset: Any) -> Array:
    return jnp.zeros(1, "int32") if offset is None else jnp.reshape(offset, (-1,)).astype("int32")


def _ids(plan: Plan, mask: Mask, first: Any, T: int, S: int) -> list[tuple[Array, Array]]:
    """Pairs of ids `([b, T'], [b, S'])` that must be equal; one of them says who is removed."""
    pairs = []
    if mask.query_padding is not None or mask.key_padding is not None or plan.S > S:
        query, key = mask.query_padding, mask.key_padding
        query_bT = jnp.zeros((1, T), "int32") if query is None else query.astype("int32") - 1
        key_bS = jnp.zeros((1, S), "int32") if key is None else 1 - key.astype("int32")
        pairs.append((query_bT, _filled(key_bS, 1, plan.S, 1)))
    for query_ids, key_ids in mask.segment_ids:
        sides = zip(_as_int32(query_ids), _as_int32(key_ids))
        pairs += [(query, _edge(key, plan.S)) for query, key in sides]
    return [(edged(query, 1, plan.T, first), key) for query, key in pairs]


def _as_int32(ids: Array) -> list[Array]:
    """The same bits: one array, or the two halves of 64 bits, which are equal where both are."""
    if ids.dtype.itemsize == 8:
        return list(jnp.moveaxis(jax.lax.bitcast_convert_type(ids, "int32"), -1, 0))
    return [jax.lax.bitcast_convert_type(ids, "int32")]


def _stacked(side: tuple[Array, ...]) -> Array:
    return jnp.stack(jnp.broadcast_arrays(*side), 1)


def _queries(plan: Plan, x_BTNF: Array, first: Any, fill: float = 0.0) -> Array:
    B, T, _, F = x_BTNF.shape
    x = jnp.moveaxis(x_BTNF.reshape(B, T, plan.K, plan.G, F), 1, 3)
    return _placed(x, 3, plan.T, first, fill)


def _keys(plan: Plan, x_BSKF: Array) -> Array:
    return _filled(x_BSKF.swapaxes(1, 2), 2, plan.S, 0)


def _scores(plan: Plan, x_bnts: Array, first: Any) -> Array:
    b, n, t, s = x_bnts.shape
    heads = (1, 1) if n == 1 else (plan.K, plan.G)
    x = x_bnts.reshape(b, *heads, t, s)
    x = _placed(x, 3, plan.T, first, 0) if t > 1 else x
    return _filled(x, 4, plan.S, 0) if s > 1 else x


def _placed(x: Array, axis: int, size: int, first: Any, fill: float) -> Array:
    """`x` from `first` on, which may be traced; `fill` around it."""
    if isinstance(first, int):
        return _filled(x, axis, size, fill)
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    around = jax.lax.full_like(x, fill, shape=shape)
    return jax.lax.dynamic_update_slice_in_dim(around, x, first, axis)


def _edge(x_bS: Array, size: int) -> Array:
    return jnp.pad(x_bS, ((0, 0), (0, size - x_bS.shape[1])), mode="edge")


def _filled(x: Array, axis: int, size: int, value: float) -> Array:
    more = [(0, 0)] * x.ndim
    more[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, more, constant_values=value) if more[axis][1] else x
