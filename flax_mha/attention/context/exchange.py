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
        inputs,
        query_BTNH=to_heads(inputs.query_BTNH),
        key_BSKH=to_heads(inputs.key_BSKH),
        value_BSKV=to_heads(inputs.value_BSKV),
        mask=_mask(devices, inputs.mask),
        bias_bnts=_scores(devices, inputs.bias_bnts),
        distance_bias=bias,
        sinks_N=_heads(devices, inputs.sinks_N),
    )
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
        dense_masks=tuple(_scores(devices, x) for x in mask.dense_masks),
    )


def _scores(devices: Devices, x: Array | None) -> Any:
    """Of a bias or a dense mask: all rows, of the device's heads where they have their own."""
    if x is None:
        return None
    if x.shape[3] > 1:
        x = devices.in_order(x, 3)
    if x.shape[1] > 1 and x.shape[2] > 1:
        return _to_heads(devices, x, 2, 1)
    if x.shape[1] > 1:
        return _heads(devices, x, axis=1)
    return devices.gather(x, 2) if x.shape[2] > 1 else x
