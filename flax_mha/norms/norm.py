"""What a norm is: a frozen function of the heads, and the parameters that it reads."""

from abc import abstractmethod
from collections.abc import Mapping

from flax_mha.core.frozen import Frozen
from flax_mha.core.typing import Array, Shape


class Norm(Frozen):
    """What is done to every head of a projection, before it is turned to its position.

    A subclass is a frozen dataclass: a static argument, equal by its fields.

    Example:
        >>> from flax_mha.norms import Norm
        >>> class Halved(Norm):
        ...     def __call__(self, x_BTNH, params):
        ...         return x_BTNH / 2
        >>> Halved()(4.0, {}), Halved().shapes(heads=3, features=8), Halved().initial("scale")
        (2.0, {}, 0.0)
    """

    def shapes(self, heads: int, features: int) -> dict[str, Shape]:
        """The shapes of its parameters, of `heads` heads of `features` features.

        They may be called "scale" and "bias", `[features]` or `[heads, features]`.
        """
        return {}

    def initial(self, leaf: str) -> float:
        """What every entry of the parameter `leaf` begins with."""
        return 0.0

    @abstractmethod
    def __call__(self, x_BTNH: Array, params: Mapping[str, Array]) -> Array:
        """The heads, at least float32, normalized: `[B, T, N, H]`."""
