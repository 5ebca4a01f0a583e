"""Keeps NaN and Inf of removed positions away from results: 0 x NaN is NaN, so zero the NaN too.

Positions removed by padding become zeros. Under segment ids, every non-finite row becomes zeros
as well, and NaN is added to the context of those queries alone that may attend to such a row; so
a broken example in a packed batch breaks itself and no neighbour, forward and backward.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.contract import Inputs, Scales
from flax_mha.core.nans import nan_where
from flax_mha.core.sizes import at_least, is_known
from flax_mha.core.typing import Array
from flax_mha.masks import Mask

MANY, ROWS = 1024, 128  # queries from which on they are looked at in parts, and those of a part


def quarantine(inputs: Inputs) -> tuple[Inputs, Array | None]:
    """Safe inputs, and `[B, T]` booleans of the queries whose context must become NaN."""
    inputs = without_padding(inputs)
    if not inputs.mask.segment_ids:
        return inputs, None
    query_ok_BT, key_ok_BS = finite_rows(inputs)
    met_BT = meets_broken_key(inputs.mask, key_ok_BS, query_ok_BT.shape[1])
    return without_positions(inputs, query_ok_BT, key_ok_BS), ~query_ok_BT | met_BT


def poison(context_BTNV: Array, broken_BT: Array | None) -> Array:
    """Adds NaN: a sum, so that no NaN enters the gradient of healthy rows."""
    if broken_BT is None:
        return context_BTNV
    return context_BTNV + nan_where(broken_BT, context_BTNV.dtype)[..., None, None]


def without_padding(inputs: Inputs) -> Inputs:
    return without_positions(inputs, inputs.mask.query_padding, inputs.mask.key_padding)


def without_positions(inputs: Inputs, query_BT: Array | None, key_BS: Array | None) -> Inputs:
    """Zeros for the queries and keys that do not stay."""
    inputs = dataclasses.replace(inputs, query_BTNH=_rows(inputs.query_BTNH, query_BT))
    if inputs.scales is not None:
        scales = (
            x if key_BS is None else jnp.where(key_BS[..., None], x, 0) for x in inputs.scales
        )
        return dataclasses.replace(inputs, scales=Scales(*scales))
    return dataclasses.replace(
        inputs,
        key_BSKH=_rows(inputs.key_BSKH, key_BS),
        value_BSKV=_rows(inputs.value_BSKV, key_BS),
    )


def finite_rows(inputs: Inputs) -> tuple[Array, Array]:
    """Which queries, and which keys and values, hold neither NaN nor Inf."""
    query_BTNH, key_BSKH, value_BSKV = inputs.query_BTNH, inputs.key_BSKH, inputs.value_BSKV
    if inputs.scales is not None:
        key_BSKH, value_BSKV = (x[..., None] for x in inputs.scales)
    return _finite(query_BTNH), _finite(key_BSKH) & _finite(value_BSKV)


def meets_broken_key(mask: Mask, key_ok_BS: Array, T: Any) -> Array:
    """Whether a query may attend to a broken key by structure; dense masks may be per head.

    Of some queries at a time: XLA's CPU would write down the `[T, S]` booleans.
    """
    structure, S = dataclasses.replace(mask, dense_masks=()), key_ok_BS.shape[1]

    def of_queries(mask: Mask, T: Any) -> Array:
        return (mask.as_array(T, S)[:, 0] & ~key_ok_BS[:, None, :]).any(-1)

    if at_least(T, MANY) is not True or not is_known(T):
        return of_queries(structure, T)
    one = lambda t: of_queries(structure.take_queries(t[None], S), 1)[:, 0]  # noqa: E731
    return jax.lax.map(one, jnp.arange(T, dtype="int32"), batch_size=ROWS).swapaxes(0, 1)


def _rows(x: Array, stay: Array | None) -> Array:
    return x if stay is None else jnp.where(stay[..., None, None], x, 0)


def _finite(x: Array) -> Array:
    return jnp.isfinite(x).all((-2, -1))
