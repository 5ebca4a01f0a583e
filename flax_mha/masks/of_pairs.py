"""A mask as functions of one pair: whether query t of example b and head n may attend to key s."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from flax_mha.core.pairs.placed import entry
from flax_mha.core.typing import Array


def at(mask: Any, b: Array, n: Array, t: Array, s: Array) -> Array:
    """Whether the pair may attend, of numbers."""
    return _all([*_plain(mask, b, n, t, s), *(f(b, n, t, s) for f in beyond(mask))])


def beyond(mask: Any) -> list[Callable[..., Array]]:
    """The functions of what is not plain, all of which must agree; its own functions first."""
    functions: list[Any] = [function.pair for function in mask.functions]
    functions += [functools.partial(_before, length_b) for length_b in mask.prefix_lengths]
    functions += [functools.partial(_any, union) for union in mask.unions]
    return functions + [functools.partial(_not, part) for part in mask.complements]


def _before(length_b: Array, b: Array, n: Array, t: Array, s: Array) -> Array:
    return s < entry(length_b, b)


def _any(union: Any, *pair: Array) -> Array:
    return functools.reduce(operator.or_, (at(part, *pair) for part in union))


def _not(part: Any, *pair: Array) -> Array:
    return ~at(part, *pair)


def _all(parts: list[Array]) -> Array:
    return functools.reduce(operator.and_, parts, jnp.bool_(True))


def _plain(mask: Any, b: Array, n: Array, t: Array, s: Array) -> list[Array]:
    of_row = lambda x_bL, place: entry(x_bL, b, place)  # noqa: E731
    return [
        *_band(mask, b, t, s),
        *(of_row(x, t) for x in (mask.query_padding,) if x is not None),
        *(of_row(x, s) for x in (mask.key_padding,) if x is not None),
        *(of_row(query, t) == of_row(key, s) for query, key in mask.segment_ids),
        *(entry(dense, b, n, t, s) for dense in mask.dense_masks),
    ]


def _band(mask: Any, b: Array, t: Array, s: Array) -> list[Array]:
    left, right = mask.band
    if mask.query_offset is not None:
        t = t + entry(jnp.reshape(mask.query_offset, (-1,)).astype("int32"), b)
    before = [] if left is None else [t - s <= left]
    return before if right is None else [*before, s - t <= right]
