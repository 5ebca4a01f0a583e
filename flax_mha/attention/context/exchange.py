"""All-to-all: the devices exchange lengths for heads, and each has all of some heads.

    [B, T / n, N, H] -> [B, T, N / n, H] -> attention -> [B, T / n, N, V]

One call by the implementation that one device would run, with every derivative that it has. Memory
O(T) a device, of N / n heads; the devices must divide the heads of keys.

Reference: Jacobs et al., "DeepSpeed Ulysses", https://arxiv.org/abs/2309.14509.
"""

import dataclasses
from typing import Any

import jax

from flax_mha.attention.context.axis import Devices
from flax_mha.attention.context.gather import as_stored
from flax_mha.attention.context.over_pairs import over_pairs
from flax_mha.attention.context.shard import aligned, placed
from flax_mha.attention.contract import Inputs, Options, Output, Residuals
from flax_mha.attention.implementations import chosen, run
from flax_mha.core.typing import Array
from flax_mha.masks import Mask


def unsupported(
    devices: Devices, implementation: str | None, inputs: Inputs, options: Options
) -> str | None:
    """It needs as many heads of keys as there are devices, or a multiple."""
    K = inputs.key_BSKH.shape[2]
    if K % devices.n:
        axis = f"the {devices.n} devices of {devices.name!r}"
        return f"it gives each of {axis} as many heads of keys, and there are {K}"
    return None


def attend(
    devices: Devices, implementation: str | None, inputs: Inputs, options: Options
) -> Output:
    """The device's heads of the whole sequence, and back."""
    options, call = aligned(options, inputs, devices), call_of(devices, inputs)
    output = run(chosen(implementation, call, options), call, options)
    context, weights, residuals = as_stored(devices, output)
    rows = lambda x: _to_lengths(devices, x, 2, 1)  # noqa: E731
    return Output(
        _to_lengths(devices, context, 1, 2),
        None if weights is None else rows(weights),
        None if residuals is None else Residuals(*map(rows, residuals)),
    )


def call_of(devices: Devices, inputs: Inputs) -> Inputs:
    """The call of the device's heads, over the whole sequence."""
    to_heads = lambda x: _to_heads(devices, x, 1, 2)  # noqa: E731
    bias, N = inputs.distance_bias, inputs.query_BTNH.shape[2]
    if bias is not None:
        bias = dataclasses.replace(bias, values=_heads(devices, bias.values))
    whole = dataclasses.replace(
        _over_pairs(devices, inputs),
        query_BTNH=to_heads(inputs.query_BTNH),
        key_BSKH=to_heads(inputs.key_BSKH),
        value_BSKV=to_heads(inputs.value_BSKV),
        distance_bias=bias,
        sinks_N=_heads(devices, inputs.sinks_N),
    )
    whole = dataclasses.replace(whole, mask=_mask(devices, whole.mask))
    return placed(whole, 0, 0, n=devices.index() * (N // devices.n))


def _to_heads(devices: Devices, x: Array, length: int, heads: int) -> Array:
    x = jax.lax.all_to_all(x, devices.name, heads, length, tiled=True)
    return devices.in_order(x, length)


def _to_lengths(devices: Devices, x: Array, length: int, heads: int) -> Array:
    x = devices.as_stored(x, length)
    return jax.lax.all_to_all(x, devices.name, length, heads, tiled=True)


def _heads(devices: Devices, x: Array | None, axis: int = 0) -> Any:
    """The device's heads of an array that all devices have."""
    if x is None:
        return None
    size = x.shape[axis] // devices.n
    return jax.lax.dynamic_slice_in_dim(x, devices.index() * size, size, axis=axis)


def _mask(devices: Devices, mask: Mask) -> Mask:
    all_of = lambda x: devices.gather(x, 1)  # noqa: E731
    gather = lambda x: None if x is None else all_of(x)  # noqa: E731
    return dataclasses.replace(
        mask,
        query_padding=gather(mask.query_padding),
        key_padding=gather(mask.key_padding),
        segment_ids=tuple((all_of(query), all_of(key)) for query, key in mask.segment_ids),
    )


def _over_pairs(devices: Devices, inputs: Inputs) -> Inputs:
    """The call whose arrays over pairs are those of the device's heads; so are a mask's blocks."""
    heads = lambda x: x if x.shape[1] == 1 else _heads(devices, x, axis=1)  # noqa: E731
    blocks = (jax.tree.map(heads, one.blocks) for one in inputs.where)
    T = inputs.query_BTNH.shape[1]
    inputs = over_pairs(inputs, lambda x: _scores(devices, x, T))
    where = tuple(dataclasses.replace(one, blocks=x) for one, x in zip(inputs.where, blocks))
    return dataclasses.replace(inputs, where=where)


def _scores(devices: Devices, x: Array, T: int) -> Array:
    """Of an array over pairs, of a device's T rows or one for all: all rows, of its heads."""
    if x.shape[3] > 1:
        x = devices.in_order(x, 3)
    own = x.shape[1] > 1
    rows = x.shape[2] == T  # where a device has one row, one for all is gathered like it
    if own and rows:
        return _to_heads(devices, x, 2, 1)
    if own:
        return _heads(devices, x, axis=1)
    return devices.gather(x, 2) if rows else x
