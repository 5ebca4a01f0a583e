"""One hop of a ring: the queries of a device and the keys that are there, and their gradient."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha.attention import by_platform
from flax_mha.attention.blockwise.attend import split
from flax_mha.attention.blockwise.engine import Engine
from flax_mha.attention.blockwise.forward import Softmax
from flax_mha.attention.blockwise.programs import Forward, Gradient, Tangent
from flax_mha.attention.blockwise.signature import Signature
from flax_mha.attention.context.axis import Devices
from flax_mha.attention.context.shard import Keys, of_columns, of_queries, placed, with_keys
from flax_mha.attention.contract import Inputs, Options, Residuals
from flax_mha.attention.implementations import chosen
from flax_mha.attention.merge import merge
from flax_mha.core.program import apply
from flax_mha.core.typing import Array
from flax_mha.core.varying import varying_alike


@dataclasses.dataclass(frozen=True)
class Ring:
    """The static half: hop h = first, ..., first + hops - 1 is with the keys of device i - h."""

    devices: Devices
    implementation: str | None
    options: Options
    first: int
    hops: int

    def engine(self, call: Inputs) -> Engine:
        """What computes a hop: of the implementation that is named, or what a platform has."""
        if self.implementation is None:
            return by_platform.engine(call, self.options)
        return chosen(self.implementation, call, self.options).engine(call, self.options)

    @property
    def counts(self) -> Array:
        return jnp.arange(self.first, self.first + self.hops, dtype="int32")


def reach(inputs: Inputs, devices: Devices) -> tuple[int, int]:
    """(first, hops): all devices, or those that a window around equal parts reaches."""
    T, S, n = inputs.query_BTNH.shape[1], inputs.key_BSKH.shape[1], devices.n
    left, right = inputs.mask.band
    if devices.pieces > 1 or T != S or 0 in (T, S) or inputs.mask.query_offset is not None:
        return 0, n
    if left is None or right is None:
        return 0, n
    before, after = ((side + T - 1) // T for side in (left, right))
    return (-after, before + after + 1) if before + after + 1 < n else (0, n)


class Moving(NamedTuple):
    """The arrays of a call that have a gradient."""

    query: Array
    key: Any
    value: Any
    bias: Array | None
    distances: Array | None
    score: dict[str, Array]  # the floats of the score function, by their names


def pairs(devices: Devices, inputs: Inputs, source: Array) -> list[list[Inputs]]:
    """For each piece of the queries, its call with each piece of the keys from device `source`."""
    pieces = devices.pieces
    T, S = inputs.query_BTNH.shape[1], inputs.key_BSKH.shape[1]
    starts_t, starts_s = devices.starts(devices.index(), T), devices.starts(source, S)
    keys, size_t, size_s = Keys.of(inputs), T // pieces, S // pieces
    calls = []
    for i, t in enumerate(starts_t):
        queries = of_queries(inputs, i * size_t, size_t)
        row = []
        for j, s in enumerate(starts_s):
            one = with_keys(queries, keys.part(j * size_s, size_s))
            one = of_columns(one, source * S + j * size_s, size_s)
            row.append(varying_alike(placed(one, t, s)))
        calls.append(row)
    return calls


def softmax_of(ring: Ring, call: Inputs) -> Softmax:
    facts, arrays = split(call, ring.options)
    signature = Signature.of(ring.options, facts, arrays)
    known = [*jax.tree.leaves(facts), *arrays.values()]
    return Softmax(*apply(Forward(ring.engine(call), signature), known))


def merged(first: Softmax, second: Softmax) -> Softmax:
    (a, *rows), (b, *others) = first, second
    context, residuals = merge((a, Residuals(*rows)), (b, Residuals(*others)))
    return Softmax(context, *residuals)


def call_gradient(ring: Ring, call: Inputs, softmax: Softmax, cotangents: Softmax) -> Moving:
    """The gradient of one call's arrays, where `softmax` is that of all keys."""
    of_arrays = lambda moving: split(with_moving(call, moving), ring.options)[::-1]  # noqa: E731
    arrays, pull, facts = jax.vjp(of_arrays, moving_of(call), has_aux=True)
    signature = Signature.of(ring.options, facts, arrays)
    engine, names = ring.engine(call), signature.names
    program = Gradient(Tangent.of(engine, signature, names, all_keys=False))
    known = [*jax.tree.leaves(facts), *arrays.values(), *softmax]
    d_softmax = [cotangents.context_BTNV, cotangents.row_sum_BNT]
    (d_moving,) = pull(dict(zip(arrays, apply(program, known, d_softmax))))
    return d_moving


def piece_of(softmax: Softmax, i: int, size: int) -> Softmax:
    cut = lambda x, axis: jax.lax.slice_in_dim(x, i * size, (i + 1) * size, axis=axis)  # noqa: E731
    context, row_max, row_sum = softmax
    return Softmax(cut(context, 1), cut(row_max, 2), cut(row_sum, 2))


def moving_of(inputs: Inputs) -> Moving:
    bias = inputs.distance_bias
    heads = (inputs.query_BTNH, inputs.key_BSKH, inputs.value_BSKV)
    distances = None if bias is None else bias.values
    floats = {} if inputs.score is None else inputs.score.moving
    return Moving(*heads, inputs.bias_bnts, distances, floats)


def with_moving(inputs: Inputs, moving: Moving) -> Inputs:
    bias = inputs.distance_bias
    if bias is not None and moving.distances is not None:
        bias = dataclasses.replace(bias, values=moving.distances)
    query, key, value, bias_bnts, _, floats = moving
    score = None if inputs.score is None else inputs.score.with_moving(floats)
    return dataclasses.replace(
        inputs,
        query_BTNH=query,
        key_BSKH=key,
        value_BSKV=value,
        bias_bnts=bias_bnts,
        distance_bias=bias,
        score=score,
    )


def as_inputs(inputs: Inputs, gradient: Moving) -> Inputs:
    """The cotangents in the place of the arrays; None for what has none."""
    cast = lambda x, d: d.astype(x.dtype)  # noqa: E731
    gradient = jax.tree.map(cast, moving_of(inputs), gradient)
    none: Any = None
    bias, score = inputs.distance_bias, inputs.score
    if bias is not None:
        bias = dataclasses.replace(bias, query_offset=None)
    if score is not None:
        score = jax.tree.map(lambda _: None, score)
    empty = Inputs(
        query_BTNH=none,
        key_BSKH=none,
        value_BSKV=none,
        mask=none,
        where=none,
        distance_bias=bias,
        score=score,
    )
    return with_moving(empty, gradient)
