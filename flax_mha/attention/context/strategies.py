"""The strategies by name, which of them serves a call, and how one runs on its device.

A strategy is a module with three functions; its name stands in `axis.STRATEGIES` too:

    unsupported(devices, implementation, inputs, options) -> str | None
    attend(devices, implementation, inputs, options) -> Output
    call_of(devices, inputs) -> Inputs: what a device computes at once, for `explain`

The inputs are a device's, as `shard` says; the implementation is a name, or None.
"""

from typing import Any

from flax_mha.attention.context import exchange, gather, ring
from flax_mha.attention.context.axis import ContextAxis, Devices
from flax_mha.attention.contract import Inputs, Options, Output
from flax_mha.attention.implementations import chosen, known, run
from flax_mha.core import checks
from flax_mha.core.varying import varying_alike

MODULES: dict[str, Any] = {"ring": ring, "all_gather": gather, "all_to_all": exchange}
RULE = "the first that can"


def reasons(
    devices: Devices, implementation: str | None, inputs: Inputs, options: Options
) -> dict[str, str | None]:
    """For each strategy why it cannot serve the call; None where it can."""
    given = (devices, implementation, inputs, options)
    return {name: module.unsupported(*given) for name, module in MODULES.items()}


def run_context(
    axis: ContextAxis, implementation: str | None, inputs: Inputs, options: Options
) -> Output:
    """The device's part of a call, by the strategy that is named, or the first that can."""
    known(implementation)
    devices = Devices.on(axis)
    devices.check_lengths(inputs.query_BTNH.shape[1], inputs.key_BSKH.shape[1])
    refused = reasons(devices, implementation, inputs, options)
    able = [name for name, why in refused.items() if why is None]
    name = axis.strategy or able[0]
    if name not in able:
        rule = f"strategy={name!r} cannot serve this call: {refused[name]}."
        shapes = f"query {inputs.query_BTNH.shape}, key {inputs.key_BSKH.shape} on a device"
        checks.fail(NotImplementedError, rule, shapes, f"Those that can: {able}.")
    if 0 in (*inputs.query_BTNH.shape[:3], inputs.key_BSKH.shape[1]):  # there is nothing to send
        return run(chosen(implementation, inputs, options), inputs, options)
    return MODULES[name].attend(devices, implementation, varying_alike(inputs), options)
