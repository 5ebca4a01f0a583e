"""Who can serve a call, and whom None chooses: `explain`."""

import functools
from typing import Any

import jax

from flax_mha.attention.allowed import how_found
from flax_mha.attention.canonical import canonical
from flax_mha.attention.choice import RULE, TILED, preferred
from flax_mha.attention.context import strategies
from flax_mha.attention.context.axis import ContextAxis, Devices
from flax_mha.attention.contract import Inputs, Options, Output, Residuals
from flax_mha.attention.cut import run_cut
from flax_mha.attention.dispatch import bound, how_cut
from flax_mha.attention.implementations import IMPLEMENTATIONS, known, reason
from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.meshes import free_axes, spec, with_auto_axes
from flax_mha.core.platform import PLATFORMS
from flax_mha.core.varying import full

CHOSEN = ", and None chooses it: "


def explain(
    query: Any,
    key: Any,
    value: Any,
    *,
    platform: str | None = None,
    implementation: str | None = None,
    **call: Any,
) -> dict[str, str]:
    """Says for each implementation whether it can serve a call: "ok" or its reason.

    Along a `context_axis` it says so of the strategies too, and of the implementations for what a
    device has to compute; the mesh is that of `jax.set_mesh`, or of a `jax.shard_map` around it.

    Args:
        query: as in `dot_product_attention`; a `jax.ShapeDtypeStruct` does, here and below.
        key: as in `dot_product_attention`.
        value: as in `dot_product_attention`.
        platform: "cpu", "gpu" or "tpu", on which it would run; None = that of this process.
        implementation: checked to be a name, and not used: a call's arguments pass as they are.
        **call: any further argument of `dot_product_attention`.

    Returns:
        `{name: "ok" or the reason}` for every name in `IMPLEMENTATIONS`; to the "ok" of the one
        that `implementation=None` chooses, the rule is added. Before them, along a context axis,
        for every strategy, of which `strategy=None` chooses the first that is "ok".

    Raises:
        As `dot_product_attention`, but no NotImplementedError: what that says is told instead.

    Example:
        >>> import jax, jax.numpy as jnp, flax_mha
        >>> x = jax.ShapeDtypeStruct((2, 5, 3, 8), jnp.float32)
        >>> flax_mha.explain(x, x, x, return_weights=True, platform="tpu")["blockwise"]
        'it never holds the weights [T, S] that return_weights asks for'
    """
    known(implementation)
    where = jax.default_backend() if platform is None else platform
    checks.one_of("platform", where, PLATFORMS)
    data, static, _, axis = bound(query, key, value, call)
    told: dict[str, str] = {}

    def trace(data: Any) -> None:
        how = how_cut(data["query"], data["key"], data["value"], None, axis)
        inputs, options = canonical(**data, **static, axis=how.axis, scales=None)
        if how.along is None:
            told.update(_implementations(inputs, options, where))
        else:
            tell = functools.partial(_along, how.along, where, told)
            run_cut(how.cut, tell, inputs, options)

    automatic = lambda data: with_auto_axes(trace, spec, data)  # noqa: E731
    jax.eval_shape(automatic, data)
    return told


def _implementations(inputs: Inputs, options: Options, platform: str) -> dict[str, str]:
    told = {name: reason(name, inputs, options, platform) or "ok" for name in IMPLEMENTATIONS}
    names = [name for name, text in told.items() if text == "ok"]
    why = RULE if len(names) > 1 else "no other can"
    told[preferred(names, inputs, platform)] += CHOSEN + why
    for name in names:
        if hasattr(IMPLEMENTATIONS[name], "engine") and inputs.where:
            told[name] += f"; {how_found(inputs.where)}"
    return told


def _along(
    axis: ContextAxis, platform: str, told: dict[str, str], inputs: Inputs, options: Options
) -> Output:
    """Tells of the strategies, and of what a device computes; an output of nothing."""
    devices = Devices.on(axis)
    refused = strategies.reasons(devices, None, inputs, options)
    able = [name for name, why in refused.items() if why is None]
    strategy = axis.strategy or able[0]
    told |= {name: why or "ok" for name, why in refused.items()}
    told[able[0]] += CHOSEN + strategies.RULE
    if strategy in able:
        call = strategies.MODULES[strategy].call_of(devices, inputs)
        told |= _on_device(strategy, call, options, platform)
    return _nothing(inputs)


def _on_device(strategy: str, call: Inputs, options: Options, platform: str) -> dict[str, str]:
    """The implementations, of what a device computes at once."""
    told = _implementations(call, options, platform)
    told = {name: text.partition(CHOSEN)[0] for name, text in told.items()}
    if (loose := free_axes()) and told["pallas_tpu"] == "ok":
        told["pallas_tpu"] = f"XLA cannot cut a kernel over {loose}, which are not explicit axes"
    if strategy == "ring":
        for name in strategies.ring.without_parts():
            told[name] = strategies.ring.no_parts(name)
    names = [name for name, text in told.items() if text == "ok"]
    if strategy == "ring":
        first, why = next(name for name in TILED[platform] if name in names), "the ring is of tiles"
    else:
        first, why = preferred(names, call, platform), RULE
    told[first] += CHOSEN + why
    return told


def _nothing(inputs: Inputs) -> Output:
    """Of the shapes that a device's output has."""
    query, (B, T, N, _) = inputs.query_BTNH, inputs.query_BTNH.shape
    S, V = inputs.key_BSKH.shape[1], inputs.value_BSKV.shape[-1]
    row = full(query, (B, N, T), 0, wide_dtype(query.dtype))
    return Output(full(query, (B, T, N, V), 0), full(query, (B, N, T, S), 0), Residuals(row, row))
