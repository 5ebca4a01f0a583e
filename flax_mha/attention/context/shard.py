"""What a device has of a call, and the call between some of its queries and some of the keys.

A device's `Inputs` hold its queries, its keys, and of the arrays over pairs (`over_pairs`) the rows
of its queries with all keys as they are stored, device by device. Offsets say where in the sequence
the first query stands from the first key, so a mask needs nothing else to know.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha.attention.context.axis import Devices
from flax_mha.attention.context.over_pairs import over_pairs
from flax_mha.attention.contract import Inputs, Options
from flax_mha.attention.dropout import GROUP
from flax_mha.core.typing import Array


class Keys(NamedTuple):
    """Everything of a call that belongs to its keys: a pytree, each array `[B or 1, S, ...]`."""

    key_BSKH: Array
    value_BSKV: Array
    padding_bS: Array | None
    ids_bS: tuple[Array, ...]

    @classmethod
    def of(cls, inputs: Inputs) -> "Keys":
        mask = inputs.mask
        ids = tuple(key for _, key in mask.segment_ids)
        return cls(inputs.key_BSKH, inputs.value_BSKV, mask.key_padding, ids)

    def part(self, start: int, length: int) -> "Keys":
        return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, start, start + length, axis=1), self)


def with_keys(inputs: Inputs, keys: Keys) -> Inputs:
    """The call with these keys in the place of its own."""
    pairs = zip(inputs.mask.segment_ids, keys.ids_bS)
    mask = dataclasses.replace(
        inputs.mask,
        key_padding=keys.padding_bS,
        segment_ids=tuple((query, key) for (query, _), key in pairs),
    )
    return dataclasses.replace(
        inputs, key_BSKH=keys.key_BSKH, value_BSKV=keys.value_BSKV, mask=mask
    )


def of_queries(inputs: Inputs, start: int, length: int) -> Inputs:
    """The call of these queries alone."""
    rows = lambda x, axis: _rows(x, start, length, axis)  # noqa: E731
    inputs = over_pairs(inputs, lambda x: rows(x, 2))
    mask = dataclasses.replace(
        inputs.mask,
        query_padding=rows(inputs.mask.query_padding, 1),
        segment_ids=tuple((rows(query, 1), key) for query, key in inputs.mask.segment_ids),
    )
    return dataclasses.replace(inputs, query_BTNH=rows(inputs.query_BTNH, 1), mask=mask)


def of_columns(inputs: Inputs, start: Array, length: int) -> Inputs:
    """The call whose arrays over pairs are those of `length` stored keys from `start` on."""
    return over_pairs(inputs, lambda x: _columns(x, start, length))


def placed(inputs: Inputs, t: Any, s: Any, n: Any = 0) -> Inputs:
    """The call whose first query, key and head stand at `t`, `s` and `n` of the whole."""
    mask, bias, start_4 = inputs.mask, inputs.distance_bias, inputs.dropout_start_4
    if mask.band != (None, None):
        mask = dataclasses.replace(mask, query_offset=_shifted(mask.query_offset, t - s))
    if bias is not None:
        bias = dataclasses.replace(bias, query_offset=_shifted(bias.query_offset, t - s))
    if inputs.dropout_word_2 is not None:
        here_4 = jnp.stack([jnp.asarray(x).astype("uint32") for x in (0, n, t, s)])
        start_4 = here_4 if start_4 is None else start_4 + here_4
    return dataclasses.replace(inputs, mask=mask, distance_bias=bias, dropout_start_4=start_4)


def aligned(options: Options, inputs: Inputs, devices: Devices) -> Options:
    """The options, with what is known of where the draws of the pieces begin."""
    begins = options.draws_aligned or inputs.dropout_start_4 is None
    length = inputs.query_BTNH.shape[1] // devices.pieces
    known = begins and isinstance(length, int) and length % GROUP == 0
    return dataclasses.replace(options, draws_aligned=known)


def _shifted(offset: Any, by: Any) -> Array:
    return jnp.asarray(by, "int32") if offset is None else jnp.asarray(offset, "int32") + by


def _rows(x: Array | None, start: int, length: int, axis: int) -> Any:
    """Of an array with an axis of queries; one entry stands for all of them."""
    if x is None or x.shape[axis] in (1, length):
        return x
    return jax.lax.slice_in_dim(x, start, start + length, axis=axis)


def _columns(x: Array, start: Array, length: int) -> Array:
    if x.shape[3] == 1:
        return x
    return jax.lax.dynamic_slice_in_dim(x, start, length, axis=3)
