"""Which tiles a call visits, and which of them hold no pair that a mask forbids.

Told outside of the kernels, from the band, from the least and the greatest id of each block, and
with B Q J booleans. A kernel reads four numbers a block of its own: it visits start <= j < stop,
and looks at the mask only outside of whole_start <= j < whole_stop.
"""

from typing import NamedTuple

import jax.numpy as jnp

from flax_mha.attention.pallas_tpu.plan import Plan
from flax_mha.core.pairs.blocks import Blocks
from flax_mha.core.typing import Array

NUMBERS = 4


class Tiles(NamedTuple):
    """Booleans `[b, Q, J]`: tiles in which a pair may attend, and those in which all may."""

    some_bQJ: Array
    all_bQJ: Array


def tiles(
    plan: Plan,
    offset_b: Array,
    ids: list[tuple[Array, Array]],
    dense: bool,
    remaining: Blocks | None = None,
) -> Tiles:
    """Of a band around the diagonal that begins at `offset_b`, and of pairs of equal ids.

    `remaining` = the blocks that functions of pairs leave, in any head.
    """
    left, right = plan.band
    Q, J = plan.query_blocks, plan.key_blocks
    first_bQ1 = offset_b[:, None, None] + jnp.arange(Q, dtype="int32")[None, :, None] * plan.t
    last_bQ1 = first_bQ1 + (plan.t - 1)
    first_11J = jnp.arange(J, dtype="int32")[None, None, :] * plan.s
    last_11J = first_11J + (plan.s - 1)
    some_bQJ = jnp.ones((1, Q, J), bool)
    all_bQJ = jnp.full((1, Q, J), not dense)
    if right is not None:
        some_bQJ = some_bQJ & (first_11J <= last_bQ1 + right)
        all_bQJ = all_bQJ & (last_11J <= first_bQ1 + right)
    if left is not None:
        some_bQJ = some_bQJ & (last_11J >= first_bQ1 - left)
        all_bQJ = all_bQJ & (first_11J >= last_bQ1 - left)
    for query_bT, key_bS in ids:
        low_bQ1, high_bQ1 = (x[..., None] for x in _range(query_bT, plan.t))
        low_b1J, high_b1J = (x[:, None] for x in _range(key_bS, plan.s))
        some_bQJ = some_bQJ & (low_bQ1 <= high_b1J) & (low_b1J <= high_bQ1)
        same_bQJ = (low_bQ1 == high_b1J) & (low_b1J == high_bQ1) & (low_bQ1 == low_b1J)
        all_bQJ = all_bQJ & same_bQJ
    if remaining is not None:
        some_bQJ = some_bQJ & remaining.some.any(1)
        all_bQJ = all_bQJ & remaining.whole.all(1)
    return Tiles(some_bQJ, all_bQJ & some_bQJ)


def key_spans(tiles: Tiles) -> Array:
    """For each example and query block the key blocks, int32 `[b, Q 4]`."""
    return _spans(*tiles)


def query_spans(tiles: Tiles) -> Array:
    """For each example and key block the query blocks, int32 `[b, J 4]`."""
    return _spans(tiles.some_bQJ.swapaxes(1, 2), tiles.all_bQJ.swapaxes(1, 2))


def _range(ids_bL: Array, block: int) -> tuple[Array, Array]:
    blocks = ids_bL.reshape(ids_bL.shape[0], -1, block)
    return blocks.min(2), blocks.max(2)


def _spans(some: Array, whole: Array) -> Array:
    some, whole = jnp.broadcast_arrays(some, whole)
    blocks = some.shape[2]
    nothing = ~some.any(2)
    start = jnp.where(nothing, 0, jnp.argmax(some, 2))
    stop = jnp.where(nothing, 0, blocks - jnp.argmax(some[..., ::-1], 2))
    whole_start = jnp.where(whole.any(2), jnp.argmax(whole, 2), blocks)
    behind = jnp.arange(blocks)[None, None] > whole_start[..., None]
    after = behind & ~whole
    whole_stop = jnp.where(after.any(2), jnp.argmax(after, 2), blocks)
    numbers = jnp.stack([start, whole_start, whole_stop, stop], -1).astype("int32")
    return numbers.reshape(numbers.shape[0], -1)
