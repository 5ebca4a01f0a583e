"""The classes of positions by their names: what a config's dict may name, own classes too."""

import dataclasses
import inspect
from typing import Any, ClassVar, TypeVar, get_origin

from flax_mha.core import checks
from flax_mha.core.frozen import Frozen
from flax_mha.positions.bias import PositionBias
from flax_mha.positions.function import PositionFunction
from flax_mha.positions.scalings import Scaling

KINDS = (PositionFunction, PositionBias, Scaling)
CLASSES: dict[str, type[Frozen]] = {}
Class = TypeVar("Class", bound=type[Frozen])


def register(own: Class) -> Class:
    """Makes an own position or scaling known by its name, so that configs with it can be saved.

    A decorator above `@dataclasses.dataclass(frozen=True)`. `to_dict` writes the class's name and
    its fields, which must be what JSON holds (numbers, strings, tuples of them), or registered
    objects; `from_dict` finds the class where the program that reads has registered it, too.

    Args:
        own: a frozen dataclass, a subclass of `Rotary`, `PositionFunction`, `Scaling`,
            `DistanceFunction` or `DenseBias`.

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
    _check_class(own)
    known = CLASSES.get(own.__name__, own)
    if _path(known) != _path(own):
        rule = f"A position is known by its class's name, and {own.__name__!r} is another's."
        checks.fail(ValueError, rule, f"{_path(own)}, registered: {_path(known)}", "Rename it.")
    CLASSES[own.__name__] = own
    return own


def _check_class(cls: Any) -> None:
    kinds = "Rotary, PositionFunction, Scaling, DistanceFunction or DenseBias"
    rule = f"`register` takes a class, a subclass of {kinds}."
    if not inspect.isclass(cls):
        checks.fail(TypeError, rule, f"{cls!r} of type {type(cls).__name__}")
    if not issubclass(cls, KINDS):
        checks.fail(TypeError, rule, f"the class {_path(cls)}")
    # Without the decorator the fields of a subclass are no fields: neither equal nor written.
    known = {field.name for field in dataclasses.fields(cls)}
    lost = [name for name, kind in _annotations(cls).items() if name not in known]
    if lost and "__dataclass_fields__" not in vars(cls):
        rule = f"`{cls.__name__}` has fields, and must be a frozen dataclass."
        remedy = "Decorate it: `@register`, and below it `@dataclasses.dataclass(frozen=True)`."
        checks.fail(TypeError, rule, f"the annotations {lost}", remedy)


def _annotations(cls: type) -> dict[str, Any]:
    """The class's own ones, without those of class variables."""
    own = inspect.get_annotations(cls)
    return {n: x for n, x in own.items() if x is not ClassVar and get_origin(x) is not ClassVar}


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_registered(cls: type) -> bool:
    return CLASSES.get(cls.__name__) is cls


def named(name: str, class_name: Any, kinds: tuple[type, ...]) -> type[Frozen]:
    """The class of a name, among those of some kinds."""
    known = {key: cls for key, cls in CLASSES.items() if issubclass(cls, kinds)}
    if class_name not in known:
        rule = f"`{name}['class_name']` must be one of {sorted(known)}."
        remedy = (
            "An own class is known once it is registered: decorate it by "
            "`@flax_mha.positions.register`, and import its module before."
        )
        checks.fail(ValueError, rule, f"{class_name!r}", remedy)
    return known[class_name]
