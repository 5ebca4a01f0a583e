"""Where in the sequence stand the tokens of a call that is cut along a context axis.

In a `jax.shard_map` over the axis a call has a device's tokens; outside it has all of them, in the
order of the axis's layout.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.attention.context.axis import ContextAxis, Devices, size_of_bound
from flax_mha.attention.context.layout import zigzag_order
from flax_mha.core.typing import Array
from flax_mha.masks import Mask


def is_shard(axis: ContextAxis | None) -> bool:
    """Whether a call has the tokens of one device."""
    return axis is not None and size_of_bound(axis.name) is not None


def whole_length(axis: ContextAxis | None, length: int) -> int:
    """The length of the sequence of which a call has so many tokens."""
    return length * Devices.on(axis).n if axis is not None and is_shard(axis) else length


def positions(axis: ContextAxis | None, length: int) -> Array:
    """The positions `[length]` of a call's tokens."""
    index = jnp.arange(length, dtype="int32")
    if axis is None:
        return index
    if not is_shard(axis):
        order = order_of(axis, length)
        return index if order is None else jnp.asarray(order)
    devices = Devices.on(axis)
    devices.check_lengths(length, length)
    starts = devices.starts(devices.index(), length)
    return jnp.concatenate([start + index[: length // devices.pieces] for start in starts])


def stored_positions(axis: ContextAxis | None, length: int) -> Array:
    """The positions of all tokens that devices share, as they are stored; or of a call's own."""
    if axis is None or not is_shard(axis):
        return positions(axis, length)
    n = Devices.on(axis).n
    if axis.layout == "zigzag" and n > 1:
        return jnp.asarray(zigzag_order(length * n, n))
    return jnp.arange(length * n, dtype="int32")


def order_of(axis: ContextAxis | None, length: int) -> np.ndarray | None:
    """The order in which a call has the whole sequence; None = as it is."""
    if axis is None or axis.layout == "contiguous":
        return None
    n = jax.sharding.get_abstract_mesh().shape[axis.name]
    return zigzag_order(length, n) if n > 1 else None


def by_position(axis: ContextAxis | None, mask: Mask, T: int) -> Mask:
    """The mask whose unions and complements are asked by positions, not by places in a store.

    Their padding, ids and dense arrays stand as the call's T queries and the keys do. What a device
    asks of them it asks of all keys: so they are gathered, and put into the sequence's order.
    """
    if axis is None:
        return mask
    of = lambda part: _in_order(axis, part, T)  # noqa: E731
    unions = tuple(tuple(map(of, union)) for union in mask.unions)
    return dataclasses.replace(mask, unions=unions, complements=tuple(map(of, mask.complements)))


def _in_order(axis: ContextAxis, mask: Mask, T: int) -> Mask:
    def tokens(x: Any) -> Any:
        return None if x is None else _gathered(axis, x, 1)

    def dense(x: Array) -> Array:
        rows = _gathered(axis, x, 2) if x.shape[2] == T else x
        return _ordered(axis, rows, 3)

    mask = dataclasses.replace(
        mask,
        query_padding=tokens(mask.query_padding),
        key_padding=tokens(mask.key_padding),
        segment_ids=tuple((tokens(query), tokens(key)) for query, key in mask.segment_ids),
        dense_masks=tuple(map(dense, mask.dense_masks)),
    )
    return by_position(axis, mask, T)


def _gathered(axis: ContextAxis, x: Array, dimension: int) -> Array:
    """Of a call's own tokens all devices' ones, in the sequence's order."""
    if is_shard(axis):
        return Devices.on(axis).gather(x, dimension)
    return _ordered(axis, x, dimension)


def _ordered(axis: ContextAxis, x: Array, dimension: int) -> Array:
    """What stands as all devices' tokens are stored, in the sequence's order; one is for all."""
    length = x.shape[dimension]
    if length == 1:
        return x
    if is_shard(axis):
        return Devices.on(axis).in_order(x, dimension)
    order = order_of(axis, length)
    return x if order is None else jnp.take(x, np.argsort(order), dimension)
