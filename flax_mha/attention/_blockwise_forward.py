"""Forward: one query block meets its key blocks one after the other, with an online softmax.

row_max' = max(row_max, max_s logits)        exp = e^(logits - row_max')
row_sum' = row_sum e^(row_max - row_max') + sum_s exp
sum'     = sum     e^(row_max - row_max') + exp . value         context = sum / row_sum
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
    tile_dropper,
    tile_logits,
    where_needed,
)
from flax_mha.attention._tiles import Tile, key_spans


class Softmax(NamedTuple):
    """What is known of a block of queries after some of its keys."""

    sum_Gtv: Array
    row_max_Gt: Array
    row_sum_Gt: Array


def forward(plan: Plan, blocks: Blocks) -> Softmax:
    """(context gGTV, row_max gGT, row_sum gGT) in float32 at least."""
    groups, G, T, _ = blocks.query_gGTH.shape
    count = plan.tiling.query_blocks

    def query_block(index: Array) -> Softmax:
        return _query_block(plan, blocks, index // count, index % count)

    def join(x: Array) -> Array:
        by_head = x.reshape(groups, count, G, plan.tiling.t, *x.shape[3:]).swapaxes(1, 2)
        return by_head.reshape(groups, G, T, *x.shape[3:])

    indices = jnp.arange(groups * count, dtype="int32")
    return jax.tree.map(join, jax.lax.map(query_block, indices))


def _query_block(plan: Plan, blocks: Blocks, g: Array, i: Array) -> Softmax:
    def step(masked: bool, j: Array, softmax: Softmax) -> Any:
        tile = Tile(g, i, j)
        add = lambda: _add_tile(plan, blocks, tile, masked, softmax)  # noqa: E731
        return where_needed(plan, blocks, tile, add, softmax)

    spans = key_spans(plan.tiling, blocks.mask, g, i)
    sum_Gtv, row_max_Gt, row_sum_Gt = loop(spans, step, _nothing(plan, blocks))
    # A query that may attend nowhere has sum 0 and row_sum 0: its context is 0.
    divisor_Gt = jnp.where(row_sum_Gt == 0, 1, row_sum_Gt)
    return Softmax(sum_Gtv / divisor_Gt[..., None], row_max_Gt, row_sum_Gt)


def _nothing(plan: Plan, blocks: Blocks) -> Softmax:
    dtype = wide_dtype(blocks.query_gGTH.dtype)
    Gt = (plan.tiling.G, plan.tiling.t)
    V = blocks.value_gSV.shape[-1]
    return Softmax(jnp.zeros((*Gt, V), dtype), jnp.full(Gt, -jnp.inf, dtype), jnp.zeros(Gt, dtype))


def _add_tile(plan: Plan, blocks: Blocks, tile: Tile, masked: bool, softmax: Softmax) -> Softmax:
    logits_Gts, _ = tile_logits(plan, blocks, tile, masked)
    row_max_Gt = jnp.maximum(softmax.row_max_Gt, logits_Gts.max(-1))
    # -inf - (-inf) would be NaN: a row that has seen no key yet is shifted by 0.
    shift_Gt = jnp.where(jnp.isneginf(row_max_Gt), 0, row_max_Gt)
    exp_Gts = jnp.exp(logits_Gts - shift_Gt[..., None])
    decay_Gt = jnp.exp(softmax.row_max_Gt - shift_Gt)
    value_sv = rows(blocks.value_gSV, tile.g, tile.j, plan.tiling.s)
    kept_Gts = tile_dropper(plan, blocks, tile)(exp_Gts).astype(value_sv.dtype)
    return Softmax(
        softmax.sum_Gtv * decay_Gt[..., None] + product(plan, "Gts,sv->Gtv", kept_Gts, value_sv),
        row_max_Gt,
        softmax.row_sum_Gt * decay_Gt + exp_Gts.sum(-1),
    )
