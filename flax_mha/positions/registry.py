"""The classes of positions and scores by their names, which a config's dict holds; own ones too."""

import inspect
from typing import TypeVar

from flax_mha.core.frozen import Frozen
from flax_mha.core.registry import Registry
from flax_mha.positions.bias import PositionBias
from flax_mha.positions.function import PositionFunction
from flax_mha.positions.scalings import Scaling
from flax_mha.positions.scores import Score

POSITIONS = Registry(
    "position",
    (PositionFunction, PositionBias, Scaling),
    "Rotary, PositionFunction, Scaling, DistanceFunction, DenseBias or Score",
    "flax_mha.positions.register",
)
SCORES = Registry("score", (Score,), "Score", "flax_mha.positions.register")
Class = TypeVar("Class", bound=type[Frozen])


def register(own: Class) -> Class:
    """Makes an own position, scaling or score known by its name: configs with it can be saved.

    A decorator above `@dataclasses.dataclass(frozen=True)`. `to_dict` writes the class's name and
    its fields, which must be what JSON holds (numbers, strings, tuples of them), or registered
    objects; `from_dict` finds the class where the program that reads has registered it, too.

    Args:
        own: a frozen dataclass, a subclass of `Rotary`, `PositionFunction`, `Scaling`,
            `DistanceFunction`, `DenseBias` or `Score`.

    Returns:
        The class itself.

    Raises:
        TypeError: no such class.
        ValueError: another class of that name is registered. The same class defined anew, by its
            module and its name, takes the place of the old one: a notebook's cell may run twice.

    Example:
        >>> import dataclasses
        >>> from flax_mha import MultiHeadAttentionConfig
        >>> from flax_mha.positions import Rotary, register
        >>> @register
        ... @dataclasses.dataclass(frozen=True)
        ... class Halved(Rotary):
        ...     by: float = 2.0
        ...
        ...     def frequencies(self, H):
        ...         return super().frequencies(H) / self.by
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=8, position=Halved(by=4.0))
        >>> MultiHeadAttentionConfig.from_dict(config.to_dict()).position.frequencies(4).tolist()
        [0.25, 0.0025]
    """
    is_score = inspect.isclass(own) and issubclass(own, Score)
    (SCORES if is_score else POSITIONS).add(own)
    return own
