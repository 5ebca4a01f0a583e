"""The implementations by name, which of them can serve a call, and how one is run."""

import dataclasses
from typing import Any

from flax_mha.attention import (
    blockwise,
    by_platform,
    cudnn,
    pallas_interpreted,
    pallas_tpu,
    reference,
)
from flax_mha.attention.choice import prefers_tiles
from flax_mha.attention.contract import Inputs, Options, Output
from flax_mha.attention.quarantine import poison, quarantine
from flax_mha.attention.sinks import with_sinks
from flax_mha.core import checks

IMPLEMENTATIONS: dict[str, Any] = {
    "reference": reference,
    "blockwise": blockwise,
    "pallas_tpu": pallas_tpu,
    "pallas_interpreted": pallas_interpreted,
    "cudnn": cudnn,
}


def reason(name: str, inputs: Inputs, options: Options, platform: str | None) -> str | None:
    """Why the implementation cannot serve the call on a platform; None where it can."""
    return IMPLEMENTATIONS[name].unsupported(inputs, options, platform)


def able(inputs: Inputs, options: Options) -> list[str]:
    """The names of the implementations that can serve the call, each where it can run."""
    return [name for name in IMPLEMENTATIONS if reason(name, inputs, options, None) is None]


def chosen(implementation: str | None, inputs: Inputs, options: Options) -> Any:
    """The named implementation or an error; only None chooses, by `choice`'s rule."""
    names = able(inputs, options)
    if implementation is None:
        return by_platform if prefers_tiles(names, inputs) else reference
    known(implementation)
    if implementation not in names:
        why = reason(implementation, inputs, options, None)
        rule = f"implementation={implementation!r} cannot serve this call: {why}."
        evidence = _described(inputs, options)
        checks.fail(NotImplementedError, rule, evidence, f"Those that can: {names}.")
    return IMPLEMENTATIONS[implementation]


def _described(inputs: Inputs, options: Options) -> str:
    """A call in short: its shapes, and the options that are not at their defaults."""
    arrays = (("query", inputs.query_BTNH), ("key", inputs.key_BSKH))
    shapes = [f"{name} {list(x.shape)}" for name, x in arrays]
    fields = [field for field in dataclasses.fields(options) if field.name != "scale"]
    values = {field: getattr(options, field.name) for field in fields}
    given = [f"{field.name}={x!r}" for field, x in values.items() if x != field.default]
    return ", ".join([*shapes, *given])


def run(implementation: Any, inputs: Inputs, options: Options) -> Output:
    """Runs one on inputs from which removed positions are kept away."""
    safe, broken_BT = quarantine(inputs)
    output = with_sinks(implementation.attend(safe, options), inputs.sinks_N)
    return output._replace(context_BTNV=poison(output.context_BTNV, broken_BT))


def known(implementation: str | None) -> None:
    """Refuses a name that is none."""
    if implementation is not None:
        checks.one_of("implementation", implementation, IMPLEMENTATIONS)
