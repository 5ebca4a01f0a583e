"""A lane is the tiles of the same examples and heads; what they read again and again stands apart.

On CPU a tile's [t, F] of an array [T, N, F] is t stretches of F numbers, far from each other: 85 us
for 512 x 64 on a Zen 3, where its product with the keys takes 350. Of a head's own [T, F] it is one
stretch. So a lane of some of the heads copies these out first, once for all of its tiles.
"""

import dataclasses
from typing import Any

import numpy as np
from jax import lax

from flax_mha.attention.blockwise.call import Blocks
from flax_mha.attention.blockwise.tiles import Corner, Tiling, put_at, slice_at
from flax_mha.attention.contract import Scales
from flax_mha.core.sizes import as_index
from flax_mha.core.typing import Array


def begin(tiling: Tiling, lane: Array) -> Corner:
    """Where a lane begins."""
    heads = np.int32(tiling.K // tiling.k)
    first = lax.div(lane, heads) * as_index(tiling.b)
    return Corner(first, lax.rem(lane, heads) * tiling.k)


def keys_apart(tiling: Tiling, blocks: Blocks, corner: Corner) -> Blocks:
    """With a lane's own keys and values, where more than one block of queries reads them."""
    if not _parts_heads(tiling) or tiling.query_blocks == 1:
        return blocks
    scales = blocks.scales
    if scales is not None:
        key_BSK1, value_BSK1 = (of_lane(tiling, x[..., None], corner) for x in scales)
        scales = Scales(key_BSK1[..., 0], value_BSK1[..., 0])
    return dataclasses.replace(
        blocks,
        key_BSKH=of_lane(tiling, blocks.key_BSKH, corner),
        value_BSKV=of_lane(tiling, blocks.value_BSKV, corner),
        scales=scales,
        keys_from=corner,
    )


def queries_apart(tiling: Tiling, blocks: Blocks, corner: Corner) -> Blocks:
    """With a lane's own queries, where more than one block of keys reads them."""
    if not _parts_heads(tiling) or tiling.key_blocks == 1:
        return blocks
    query_bTnH = of_lane(tiling, blocks.query_BTNH, corner)
    return dataclasses.replace(blocks, query_BTNH=query_bTnH, queries_from=corner)


def of_lane(tiling: Tiling, x_BLNF: Array, corner: Corner | None) -> Array:
    """A lane's part of queries or keys, of all their length; all of them where it is not apart."""
    return x_BLNF if corner is None else slice_at(x_BLNF, *_place(tiling, x_BLNF, corner))


def put_lane(tiling: Tiling, x_BLNF: Array, part_bLnF: Array, corner: Corner | None) -> Array:
    """The inverse of `of_lane`."""
    if corner is None:
        return part_bLnF
    return put_at(x_BLNF, part_bLnF, _place(tiling, x_BLNF, corner)[0])


def _place(tiling: Tiling, x_BLNF: Array, corner: Corner) -> tuple[Any, Any]:
    _, L, N, F = x_BLNF.shape
    heads = N // tiling.K  # G of queries, 1 of keys
    return (corner.b, 0, corner.k * heads, 0), (tiling.b, L, tiling.k * heads, F)


def _parts_heads(tiling: Tiling) -> bool:
    """Whether a lane has some of the heads; one that has all finds them side by side."""
    return tiling.k < tiling.K and not tiling.queries_last
