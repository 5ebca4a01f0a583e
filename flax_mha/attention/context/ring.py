"""Ring: keys and values travel around the devices, and each attends to what has arrived.

    hop h: device i has the keys of device i - h, sends them on while it attends to them, and merges

What one hop computes is attention over other keys, so the law of `merge` joins the hops. Backward
the softmax of all keys is known: each hop's part of the gradient is exact by itself, and the
gradients of keys and values travel with them until they are home. Memory O(T / n) a device, in
either direction. A window's hops are those that reach into it.

Derivatives: reverse mode, of any order; from the second on JAX keeps what each hop computed.

References: Liu et al., "Ring Attention with Blockwise Transformers", https://arxiv.org/abs/2310.01889;
Brandon et al., "Striped Attention", https://arxiv.org/abs/2311.09431, of balanced orders.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.blockwise.forward import Softmax
from flax_mha.attention.context.axis import Devices
from flax_mha.attention.context.broken import quarantine_along
from flax_mha.attention.context.groups import by_groups
from flax_mha.attention.context.hop import (
    Moving,
    Ring,
    as_inputs,
    call_gradient,
    merged,
    moving_of,
    pairs,
    piece_of,
    reach,
    softmax_of,
    with_moving,
)
from flax_mha.attention.context.shard import Keys, aligned, with_keys
from flax_mha.attention.contract import Inputs, Options, Output, Residuals, named
from flax_mha.attention.implementations import IMPLEMENTATIONS
from flax_mha.attention.quarantine import poison
from flax_mha.attention.sinks import with_sinks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array
from flax_mha.core.varying import full


def unsupported(
    devices: Devices, implementation: str | None, inputs: Inputs, options: Options
) -> str | None:
    """It needs what runs over tiles, whose parts it can merge and take apart again."""
    if options.return_weights:
        return "it never holds the weights [T, S] that return_weights asks for"
    return no_parts(implementation) if implementation in without_parts() else None


def without_parts() -> list[str]:
    """The implementations that are not made of tiles."""
    return [name for name, module in IMPLEMENTATIONS.items() if not hasattr(module, "engine")]


def no_parts(implementation: str) -> str:
    return f"the ring merges parts of a softmax, and {implementation} has no gradient of a part"


def call_of(devices: Devices, inputs: Inputs) -> Inputs:
    """What a device computes at once, a hop's first call."""
    return pairs(devices, inputs, devices.index())[0][0]


def attend(
    devices: Devices, implementation: str | None, inputs: Inputs, options: Options
) -> Output:
    """The device's part of the attention to all keys."""
    options = aligned(options, inputs, devices)
    sinks_N, inputs = inputs.sinks_N, dataclasses.replace(inputs, sinks_N=None)
    ring = Ring(devices, implementation, options, *reach(inputs, devices))
    safe, broken_BT = quarantine_along(ring, inputs)
    context, *rows = _attend(ring, safe)
    output = Output(context.astype(inputs.value_BSKV.dtype), None, Residuals(*rows))
    output = with_sinks(output, sinks_N)
    return output._replace(context_BTNV=poison(output.context_BTNV, broken_BT))


# --- forward ------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, inputs: Inputs) -> Softmax:
    """The softmax of the device's queries over all keys."""
    devices, index = ring.devices, ring.devices.index()

    def hop(carry: Any, h: Array) -> Any:
        keys, totals = carry
        onward = devices.shift(keys, 1)
        rows = pairs(devices, with_keys(inputs, keys), (index - h) % devices.n)
        met = lambda total, row: functools.reduce(  # noqa: E731
            merged, (softmax_of(ring, call) for call in row), total
        )
        return (onward, list(map(met, totals, rows))), None

    keys = devices.shift(Keys.of(inputs), ring.first)
    (_, totals), _ = jax.lax.scan(hop, (keys, _empty(ring, inputs)), ring.counts)
    return _joined(totals)


def _empty(ring: Ring, inputs: Inputs) -> list[Softmax]:
    """Of each piece, attention to nothing."""
    (B, T, N, _), V = inputs.query_BTNH.shape, inputs.value_BSKV.shape[-1]
    of = lambda *shape, value=0.0: full(  # noqa: E731
        inputs.query_BTNH, shape, value, wide_dtype(inputs.query_BTNH.dtype)
    )
    t = T // ring.devices.pieces
    one = Softmax(of(B, t, N, V), of(B, N, t, value=-jnp.inf), of(B, N, t))
    return [one] * ring.devices.pieces


def _joined(pieces: list[Softmax]) -> Softmax:
    contexts, row_maxs, row_sums = zip(*pieces)
    join = jnp.concatenate
    return Softmax(join(contexts, 1), join(row_maxs, 2), join(row_sums, 2))


# --- backward -----------------------------------------------------------------------------------


def _keep(ring: Ring, inputs: Inputs) -> Any:
    context, *rows = _attend(ring, inputs)
    context, residuals = named(context, Residuals(*rows))
    softmax = Softmax(context, *residuals)
    return softmax, (inputs, softmax)


def _gradient(ring: Ring, kept: Any, cotangents: Softmax) -> tuple[Inputs]:
    """The keys travel again, and what has been found of their gradient with them."""
    inputs, softmax = kept
    d_moving = by_groups(functools.partial(_of_heads, ring), inputs, softmax, cotangents)
    return (as_inputs(inputs, d_moving),)


def _of_heads(ring: Ring, inputs: Inputs, softmax: Softmax, cotangents: Softmax) -> Moving:
    devices, index = ring.devices, ring.devices.index()

    def hop(carry: Any, h: Array) -> Any:
        keys, d_keys, d_own = carry
        onward, arrived = devices.shift(keys, 1), devices.shift(d_keys, 1)
        here, source = with_keys(inputs, keys), (index - h) % devices.n
        d_here = _hop_gradient(ring, here, source, softmax, cotangents)
        d_pair, d_rest = _apart(d_here)
        add = functools.partial(jax.tree.map, jnp.add)
        return (onward, add(arrived, d_pair), add(d_own, d_rest)), None

    keys = devices.shift(Keys.of(inputs), ring.first)
    zeros = jax.tree.map(_zeros, moving_of(inputs))
    (_, d_keys, d_own), _ = jax.lax.scan(hop, (keys, *_apart(zeros)), ring.counts)
    d_key, d_value = devices.shift(d_keys, 1 - ring.first - ring.hops)
    return d_own._replace(key=d_key, value=d_value)


def _apart(moving: Moving) -> tuple[Any, Moving]:
    """What belongs to the keys, and travels, and what stays."""
    return (moving.key, moving.value), moving._replace(key=None, value=None)


def _hop_gradient(
    ring: Ring, inputs: Inputs, source: Array, softmax: Softmax, cotangents: Softmax
) -> Moving:
    """What the keys at hand add to each gradient; it is summed in float32 at least."""
    size, wide = inputs.query_BTNH.shape[1] // ring.devices.pieces, wide_dtype

    def calls(moving: Moving) -> Any:
        rows = pairs(ring.devices, with_moving(inputs, moving), source)
        return [[moving_of(call) for call in row] for row in rows], rows

    _, pull, rows = jax.vjp(calls, moving_of(inputs), has_aux=True)
    d_moved = [
        [
            call_gradient(ring, call, piece_of(softmax, i, size), piece_of(cotangents, i, size))
            for call in row
        ]
        for i, row in enumerate(rows)
    ]
    (d_moving,) = pull(d_moved)
    return jax.tree.map(lambda x: x.astype(wide(x.dtype)), d_moving)


def _zeros(x: Array) -> Array:
    return full(x, x.shape, 0, wide_dtype(x.dtype))


_attend.defvjp(_keep, _gradient)
