"""What is done to the heads of queries and keys by where they stand."""

from abc import abstractmethod
from typing import ClassVar

from flax_mha.core.frozen import Frozen
from flax_mha.core.typing import Array


class PositionFunction(Frozen):
    """What a head becomes at its position: turned, or grown.

    A subclass is a frozen dataclass: a static argument, equal by its fields.

    Example:
        >>> from flax_mha.positions import PositionFunction, Rotary
        >>> isinstance(Rotary(), PositionFunction), Rotary().axes
        (True, 1)
        >>> Rotary(dim=4).turned_features(16)
        4
        >>> import jax.numpy as jnp
        >>> x, position = jnp.ones((1, 3, 2, 8)), jnp.arange(3)[None]
        >>> bool((Rotary().of_query(x, position) == Rotary().of_key(x, position)).all())
        True
    """

    takes_floats: ClassVar[bool] = False  # whether positions may be floats

    @property
    def axes(self) -> int:
        """How many numbers say where a token stands."""
        return 1

    @abstractmethod
    def turned_features(self, H: int) -> int:
        """How many features of a head of size `H`, its first, a key's position changes."""

    @abstractmethod
    def of_query(self, x_BTNH: Array, position_bT: Array) -> Array:
        """The queries `x_BTNH` at the positions `position_bT`, or `[axes, b, T]`."""

    @abstractmethod
    def of_key(self, x_BSKH: Array, position_bS: Array) -> Array:
        """The keys `x_BSKH` at the positions `position_bS`."""
