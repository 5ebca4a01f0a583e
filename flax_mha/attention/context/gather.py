"""All-gather: each device has all keys and values, and attends with its own queries.

One call a piece of queries, by the implementation that one device would run, with every derivative
that it has. Memory O(S) a device; the gradient of a gathered array is summed back to where it came
from.
"""

import functools

import jax
import jax.numpy as jnp

from flax_mha.attention.context.axis import Devices
from flax_mha.attention.context.over_pairs import over_pairs
from flax_mha.attention.context.shard import Keys, aligned, of_queries, placed, with_keys
from flax_mha.attention.contract import Inputs, Options, Output, Residuals
from flax_mha.attention.implementations import chosen, run


def unsupported(
    devices: Devices, implementation: str | None, inputs: Inputs, options: Options
) -> str | None:
    """It serves every call that the implementation serves."""
    return None


def call_of(devices: Devices, inputs: Inputs) -> Inputs:
    """What a device computes at once."""
    return _calls(devices, inputs)[0]


def attend(
    devices: Devices, implementation: str | None, inputs: Inputs, options: Options
) -> Output:
    """The device's part of the attention to all keys."""
    options = aligned(options, inputs, devices)
    calls = _calls(devices, inputs)
    outputs = [run(chosen(implementation, call, options), call, options) for call in calls]
    return as_stored(devices, joined(outputs))


def _calls(devices: Devices, inputs: Inputs) -> list[Inputs]:
    """Of each piece of the device's queries, the call with all keys."""
    T = inputs.query_BTNH.shape[1]
    inputs, size = with_all_keys(devices, inputs), T // devices.pieces
    starts = enumerate(devices.starts(devices.index(), T))
    return [placed(of_queries(inputs, i * size, size), start, 0) for i, start in starts]


def with_all_keys(devices: Devices, inputs: Inputs) -> Inputs:
    """The call of these queries and all keys, in the sequence's order."""
    gather = functools.partial(devices.gather, axis=1)
    inputs = with_keys(inputs, jax.tree.map(gather, Keys.of(inputs)))
    return over_pairs(inputs, lambda x: x if x.shape[3] == 1 else devices.in_order(x, 3))


def joined(outputs: list[Output]) -> Output:
    """The pieces' outputs as one."""
    contexts, weights, residuals = zip(*outputs)
    return Output(
        jnp.concatenate(contexts, 1),
        None if weights[0] is None else jnp.concatenate(weights, 2),
        None
        if residuals[0] is None
        else Residuals(*(jnp.concatenate(x, 2) for x in zip(*residuals))),
    )


def as_stored(devices: Devices, output: Output) -> Output:
    """The weights' keys device by device, as the caller's biases and masks have them."""
    weights = output.weights_BNTS
    return output._replace(weights_BNTS=None if weights is None else devices.as_stored(weights, 3))
