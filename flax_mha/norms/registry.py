"""The classes of norms by their names: what a config's dict may name, own classes too."""

from typing import TypeVar

from flax_mha.core.registry import Registry
from flax_mha.norms.norm import Norm

NORMS = Registry("norm", (Norm,), "Norm", "flax_mha.norms.register")
Class = TypeVar("Class", bound=type[Norm])


def register(own: Class) -> Class:
    """Makes an own norm known by its name, so that configs with it can be saved.

    A decorator above `@dataclasses.dataclass(frozen=True)`, as `flax_mha.positions.register`.

    Args:
        own: a frozen dataclass, a subclass of `Norm`.

    Returns:
        The class itself.

    Raises:
        TypeError: no such class.
        ValueError: another class of that name is registered.

    Example:
        >>> import dataclasses
        >>> from flax_mha import MultiHeadAttentionConfig
        >>> from flax_mha.norms import Norm, register
        >>> @register
        ... @dataclasses.dataclass(frozen=True)
        ... class Divided(Norm):
        ...     by: float = 2.0
        ...
        ...     def __call__(self, x_BTNH, params):
        ...         return x_BTNH / self.by
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=8, value_norm=Divided(by=4.0))
        >>> MultiHeadAttentionConfig.from_dict(config.to_dict()) == config
        True
    """
    NORMS.add(own)
    return own
