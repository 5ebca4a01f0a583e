"""NaN and Inf of removed positions, where keys travel: which of them are finite goes first."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.context.hop import Ring, pairs
from flax_mha.attention.context.shard import Keys, with_keys
from flax_mha.attention.contract import Inputs
from flax_mha.attention.quarantine import (
    finite_rows,
    meets_broken_key,
    without_padding,
    without_positions,
)
from flax_mha.core.typing import Array


def quarantine_along(ring: Ring, inputs: Inputs) -> tuple[Inputs, Array | None]:
    """As `quarantine`, of keys that travel: what is finite of them goes around first."""
    inputs = without_padding(inputs)
    if not inputs.mask.segment_ids:
        return inputs, None
    query_ok_BT, key_ok_BS = finite_rows(inputs)
    devices, index = ring.devices, ring.devices.index()
    safe = without_positions(inputs, query_ok_BT, key_ok_BS)
    flags = Keys.of(inputs)._replace(key_BSKH=key_ok_BS, value_BSKV=key_ok_BS)

    def hop(carry: Any, h: Array) -> Any:
        flags, broken_BT = carry
        onward = devices.shift(flags, 1)
        rows = pairs(ring.devices, with_keys(inputs, flags), (index - h) % devices.n)
        met = [functools.reduce(jnp.logical_or, map(_meets, row)) for row in rows]
        return (onward, broken_BT | jnp.concatenate(met, 1)), None

    start = (devices.shift(flags, ring.first), ~query_ok_BT)
    (_, broken_BT), _ = jax.lax.scan(hop, start, ring.counts)
    return safe, broken_BT


def _meets(call: Inputs) -> Array:
    return meets_broken_key(call.mask, call.key_BSKH, call.query_BTNH.shape[1])
