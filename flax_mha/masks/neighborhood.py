"""Windows in several axes: neighbourhood attention, as NATTEN defines it."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha.core import checks
from flax_mha.core.sizes import is_known
from flax_mha.core.typing import Array, Shape
from flax_mha.masks.function import function_of

PairFunction = Callable[[Array, Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Neighborhood:
    """A window by row and by column, and along any further axes: NATTEN's neighbourhood.

    Along each axis a query sees `window` keys in all: itself in the middle, of an even window 2 r
    the r before it and the r - 1 behind. At a border the window moves inwards and keeps its size.

        first = clip(p - window // 2, 0, length - window),  keys first ... first + window - 1
        first = p - window + 1, no less than 0,             keys first ... p    (causal)

    A dilated axis falls into `dilation` groups, the places p % dilation; each is an axis of its
    own, in which p // dilation counts. A query sees a key that it sees along every axis.

    Given as `sliding_window=` of a layer, it counts otherwise than an int does, which is Keras's:
    `sliding_window=w` are the keys less than w places away in raster order, 2 w - 1 in the middle
    and fewer at the ends, and `sliding_window=(w,)` are w keys at every place.

    Args:
        window: the sizes, one for each axis.
        dilation: how far apart the keys are, for all axes or one for each.
        is_causal: whether no key is behind the query, for all axes or one for each.

    Raises:
        ValueError: no axis at all, a size below 1, another number of values than of axes.
        TypeError: values of other types; an int as the window.

    Differs from NATTEN: (1) any number of axes, and windows of size 1; (2) no `stride`.

    Reference: Hassani et al., "Neighborhood Attention Transformer",
    https://arxiv.org/abs/2204.07143, and "Dilated Neighborhood Attention Transformer",
    https://arxiv.org/abs/2209.15001.

    Example:
        >>> from flax_mha import Mask, Neighborhood, block_mask
        >>> near = Neighborhood((7, 7))
        >>> near
        Neighborhood(window=(7, 7), dilation=(1, 1), is_causal=(False, False))
        >>> Neighborhood.from_dict(near.to_dict()) == near
        True
        >>> block_mask(near.function((32, 32)), 1024, 1024, block_size=32).visited  # 7 of 32 rows
        0.21875
        >>> block_mask(Mask.neighborhood((32, 32), (7, 7)), 1024, 1024, block_size=32).visited
        0.21875
    """

    window: Sequence[int]
    dilation: Any = 1
    is_causal: Any = False

    def __post_init__(self) -> None:
        window = _sizes("Neighborhood.window", self.window)
        dilation = _for_each_axis("dilation", self.dilation, len(window), _size)
        is_causal = _for_each_axis("is_causal", self.is_causal, len(window), checks.boolean)
        for name, value in (("window", window), ("dilation", dilation), ("is_causal", is_causal)):
            object.__setattr__(self, name, value)

    def function(self, shape: Sequence[int]) -> PairFunction:
        """The mask function of tokens in raster order: a part for functions of your own.

        Args:
            shape: the grid: how many places each axis has.

        Raises:
            ValueError: another number of axes; an axis shorter than window * dilation.

        Example:
            >>> from flax_mha import Mask
            >>> near = Neighborhood((3, 3)).function((14, 14))
            >>> with_class_token = Mask.function(  # it stands before the 196 others
            ...     lambda b, n, t, s: (t == 0) | (s == 0) | near(b, n, t - 1, s - 1)
            ... )
        """
        axes = self._axes(shape)

        def function(b: Array, n: Array, t: Array, s: Array) -> Array:
            return functools.reduce(operator.and_, (axis.sees(t, s) for axis in axes))

        return function

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, the inverse of `from_dict`."""
        return {field.name: list(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Neighborhood:
        """The object whose `fields` `to_dict` wrote.

        Raises:
            ValueError: an unknown field, with the valid ones; otherwise as the constructor.
        """
        valid = [field.name for field in dataclasses.fields(cls)]
        checks.mapping("fields", fields)
        checks.known_names("A field of Neighborhood", fields, valid)
        return cls(**{"window": None, **fields})

    def _axes(self, shape: Sequence[int]) -> list[Axis]:
        sizes = _grid(shape)
        if len(sizes) != len(self.window):
            rule = "A window must have a size for each axis of the grid."
            checks.fail(ValueError, rule, f"window={self.window}, the grid {sizes}")
        _check_lengths(self, sizes)
        apart = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        rules = zip(sizes, apart, self.window, self.dilation, self.is_causal)
        return [Axis(i > 0, *rule) for i, rule in enumerate(rules)]


class Axis(NamedTuple):
    """One axis of a grid and its window; `apart` is how far its neighbours stand in the raster."""

    repeats: bool  # whether its places come again and again: all but the first
    length: int
    apart: int
    window: int
    dilation: int
    is_causal: bool

    def sees(self, t: Array, s: Array) -> Array:
        """Whether a query sees a key along this axis: what is left to a tile is the last line."""
        query, key = self._place(t), self._place(s)
        first, last = self._span(query)
        key_group, key_at = _remainder(key, self.dilation), _quotient(key, self.dilation)
        near = (first <= key_at) & (key_at <= last)
        same = self.dilation == 1 or _remainder(query, self.dilation) == key_group
        return near if same is True else near & same

    def _place(self, token: Array) -> Array:
        place = _quotient(token, self.apart)
        return _remainder(place, self.length) if self.repeats else place

    def _span(self, query: Array) -> tuple[Array, Array]:
        """The first and the last key of a query, counted within its group."""
        at = _quotient(query, self.dilation)
        if self.is_causal:
            return at - (self.window - 1), at
        group = _remainder(query, self.dilation)
        members = _quotient(self.length - 1 - group, self.dilation) + 1
        first = jnp.clip(at - self.window // 2, 0, members - self.window)
        return first, first + (self.window - 1)


# Of places, which are never negative: the rounding of `//` and the sign of `%` need not be asked
# for, of which intervals know less.


def _quotient(x: Array, divisor: int) -> Array:
    return x if divisor == 1 else lax.div(x, np.int32(divisor))


def _remainder(x: Array, divisor: int) -> Array:
    return lax.rem(x, np.int32(divisor))


class OfGrids:
    """What makes a `Mask` of tokens that stand in a grid."""

    @classmethod
    def neighborhood(
        cls,
        shape: Sequence[int],
        window: Sequence[int],
        *,
        dilation: Any = 1,
        is_causal: Any = False,
    ) -> Self:
        """Neighbourhood attention among tokens in raster order, last axis fastest.

        Blocks far from the window are left out: of the first axis all, of the others as far as a
        block is shorter than a row.

        Args:
            shape: the grid: how many places each axis has; T and S of the call are their product.
            window: how many keys a query sees along each axis.
            dilation: as in `Neighborhood`.
            is_causal: as in `Neighborhood`.

        Raises:
            ValueError: as `Neighborhood`; an axis shorter than window * dilation.
            TypeError: as `Neighborhood`.

        Example:
            >>> from flax_mha import Mask
            >>> mask = Mask.neighborhood((4, 4), (3, 3))
            >>> mask.as_array(16, 16)[0, 0, 0].reshape(4, 4).astype(int).tolist()  # a corner
            [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
        """
        traced = function_of(Neighborhood(window, dilation, is_causal).function(shape))
        made: Any = cls
        return made(functions=(dataclasses.replace(traced, tokens=math.prod(shape)),))


# --- checks -------------------------------------------------------------------------------------


def _size(name: str, value: Any) -> int:
    return checks.integer(name, value, minimum=1)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    if not _is_sequence(value):
        rule = f"`{name}` must be a tuple of one size for each axis, such as (7, 7)."
        checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")
    if not len(value):
        checks.fail(ValueError, f"`{name}` must have one size for each axis.", f"{name}={value!r}")
    return tuple(_size(name, size) for size in value)


def _for_each_axis(name: str, value: Any, axes: int, check: Callable) -> tuple[Any, ...]:
    name = f"Neighborhood.{name}"
    if not _is_sequence(value):
        return (check(name, value),) * axes
    if len(value) != axes:
        rule = f"`{name}` must be one value for all axes or one for each of the {axes} axes."
        checks.fail(ValueError, rule, f"{name}={value!r}")
    return tuple(check(name, entry) for entry in value)


def _grid(shape: Any) -> Shape:
    if not _is_sequence(shape):
        rule = "`shape` must be a tuple of one length for each axis."
        checks.fail(TypeError, rule, f"{shape!r} of type {type(shape).__name__}")
    if not is_known(*shape):
        rule = "The lengths of a grid must be known when a neighbourhood is traced."
        checks.fail(NotImplementedError, rule, f"shape={tuple(shape)}", "Export with numbers.")
    return tuple(checks.integer("shape", size, minimum=0) for size in shape)


def _check_lengths(near: Neighborhood, sizes: Shape) -> None:
    for axis, (length, window, dilation) in enumerate(zip(sizes, near.window, near.dilation)):
        if window * dilation <= length:
            continue
        where = f"axis {axis} of {sizes}"
        if dilation == 1:
            rule = "A window must be at most as long as the axis it moves along."
            evidence, remedy = f"window {window} on {where}", f"Set it to at most {length}."
        else:
            rule = "`window * dilation` must be at most as long as the axis."
            evidence = f"{window} * {dilation} = {window * dilation} on {where}"
            remedy = f"Set a window of at most {length // dilation}, or a dilation of at most "
            remedy += f"{length // window}."
        checks.fail(ValueError, rule, evidence, remedy)
