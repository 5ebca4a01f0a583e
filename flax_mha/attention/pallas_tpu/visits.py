"""Which tiles a kernel visits where functions of pairs leave holes between them.

A call's tiles are numbers `[b, Q J]`: 0 = nothing may attend, 1 = some pairs may, 3 = all of them.
Of these a kernel that walks along one side reads, for each block of its own, how many tiles it
visits, and which: twice the number of the block, and 1 more where it needs no mask. A kernel that
walks over all tiles reads, of each, the nearest one that is visited: that is the tile itself, or
one whose blocks lie there already.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.pallas_tpu.plan import Plan
from flax_mha.attention.pallas_tpu.spans import Tiles
from flax_mha.core.typing import Array

SOME, WHOLE = 1, 2
BYTES = 512 << 10  # of 1 MiB of SMEM; where they are more, spans must do


def codes(tiles: Tiles) -> Array | None:
    """The tiles as numbers; None where they are too many to be read before a kernel begins."""
    some, whole = jnp.broadcast_arrays(*tiles)
    b, Q, J = some.shape
    if 4 * b * (Q * J + max(Q, J)) > BYTES:
        return None
    numbers = SOME * some.astype("int32") + WHOLE * whole.astype("int32")
    return numbers.reshape(b, Q * J)


def by_queries(plan: Plan, codes_bX: Array) -> Array:
    """`[b, Q (1 + J)]`: of each query block the number of its tiles, and their key blocks."""
    return _listed(codes_bX.reshape(-1, plan.query_blocks, plan.key_blocks))


def by_keys(plan: Plan, codes_bX: Array, first: Any, blocks: int) -> Array:
    """`[b, J (1 + Q)]`: of each key block likewise, of query blocks from `first` on."""
    i = jnp.arange(plan.query_blocks, dtype="int32")
    turn = (i >= first) & (i < first + blocks)
    codes_bJQ = codes_bX.reshape(-1, plan.query_blocks, plan.key_blocks).swapaxes(1, 2)
    return _listed(jnp.where(turn, codes_bJQ, 0))


def most(visits: Array, blocks: int) -> Array:
    """The greatest number of tiles that a block visits; at least 1, in which nothing is added."""
    counts = visits.reshape(visits.shape[0], blocks, -1)[..., 0]
    return jnp.maximum(counts.max(), 1)


def _listed(codes_bXY: Array) -> Array:
    order = jnp.argsort(codes_bXY == 0, axis=2, stable=True).astype("int32")
    whole = jnp.take_along_axis(codes_bXY, order, axis=2) // WHOLE
    count = (codes_bXY > 0).sum(2, keepdims=True, dtype="int32")
    return jnp.concatenate([count, 2 * order + whole], 2).reshape(len(codes_bXY), -1)


def nearest(plan: Plan, codes_bX: Array) -> Array:
    """`[b, Q J]`: of each tile the key block of the nearest one of its row, as in the lists."""
    codes_bQJ = codes_bX.reshape(-1, plan.query_blocks, plan.key_blocks)
    J = plan.key_blocks
    j, some = jnp.arange(J, dtype="int32"), codes_bQJ > 0
    before = jax.lax.cummax(jnp.where(some, j, -1), axis=2)
    first = jnp.where(some.any(2), jnp.argmax(some, 2).astype("int32"), J)
    block = jnp.where(before < 0, first[..., None], before)
    return (2 * block + codes_bQJ // WHOLE).reshape(codes_bX.shape)


def with_visits(plan: Plan, operands: dict[str, Array], of: Any) -> tuple[Plan, dict[str, Array]]:
    """The operands with what `of(codes)` makes of the tiles in place of these, where they are."""
    if "codes" not in operands:
        return plan, operands
    others = {name: x for name, x in operands.items() if name != "codes"}
    return plan.of({**others, "visits": of(operands["codes"])})
