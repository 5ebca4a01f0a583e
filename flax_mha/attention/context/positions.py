"""Where in the sequence stand the tokens of a call that is cut along a context axis.

In a `jax.shard_map` over the axis a call has a device's tokens; outside it has all of them, in the
order of the axis's layout.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.attention.context.axis import ContextAxis, Devices, size_of_bound
from flax_mha.attention.context.layout import zigzag_order
from flax_mha.core.typing import Array


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


def order_of(axis: ContextAxis | None, length: int) -> np.ndarray | None:
    """The order in which a call has the whole sequence; None = as it is."""
    if axis is None or axis.layout == "contiguous":
        return None
    n = jax.sharding.get_abstract_mesh().shape[axis.name]
    return zigzag_order(length, n) if n > 1 else None
