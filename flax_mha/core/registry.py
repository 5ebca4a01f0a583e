"""Classes of frozen objects by their names: what a saved config may name, own classes too."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, get_origin

from flax_mha.core import checks
from flax_mha.core.frozen import Frozen, arguments


class Registry:
    """The classes of some kinds, and their objects as dicts that JSON can hold.

    Args:
        what: the kind of an object, for messages: "position".
        kinds: the classes whose subclasses may be added.
        public: those of them that users derive from, for messages.
        decorator: the public name of what adds a class.
    """

    def __init__(
        self, what: str, kinds: tuple[type[Frozen], ...], public: str, decorator: str
    ) -> None:
        self.what, self.kinds = what, kinds
        self.public, self.decorator = public, decorator
        self.classes: dict[str, type[Frozen]] = {}

    def add(self, own: Any) -> None:
        """Makes a class known by its name; the same class defined anew replaces the old one."""
        self._check(own)
        known = self.classes.get(own.__name__, own)
        if _path(known) != _path(own):
            rule = f"A {self.what} is known by its class's name, and {own.__name__!r} is another's."
            evidence = f"{_path(own)}, registered: {_path(known)}"
            checks.fail(ValueError, rule, evidence, "Rename it.")
        self.classes[own.__name__] = own

    def _check(self, cls: Any) -> None:  # Any: what a caller may have decorated
        rule = f"`register` takes a class, a subclass of {self.public}."
        if not inspect.isclass(cls):
            checks.fail(TypeError, rule, f"{cls!r} of type {type(cls).__name__}")
        if not issubclass(cls, self.kinds):
            checks.fail(TypeError, rule, f"the class {_path(cls)}")
        # Without the decorator the fields of a subclass are no fields: neither equal nor written.
        known = arguments(cls)
        lost = [name for name in _annotations(cls) if name not in known]
        if lost and "__dataclass_fields__" not in vars(cls):
            rule = f"`{cls.__name__}` has fields, and must be a frozen dataclass."
            remedy = "Decorate it: `@register`, and below it `@dataclasses.dataclass(frozen=True)`."
            checks.fail(TypeError, rule, f"the annotations {lost}", remedy)

    def to_dict(self, value: Frozen) -> dict[str, Any]:
        """The dict from which `from_dict` makes an equal object."""
        cls = type(value)
        if self.classes.get(cls.__name__) is not cls:
            rule = f"A config can be written whose {self.what} is of a class known by its name."
            remedy = f"Register it: `@{self.decorator}` above the class."
            checks.fail(TypeError, rule, f"{value} of {_path(cls)}", remedy)
        fields = {name: self._plain(getattr(value, name)) for name in arguments(cls)}
        return {"class_name": cls.__name__, "config": fields}

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Frozen):
            return self.to_dict(value)
        return [self._plain(x) for x in value] if isinstance(value, tuple) else value

    def from_dict(
        self, name: str, value: Mapping[str, Any], kinds: tuple[type, ...] | None = None
    ) -> Any:
        """The object whose dict the argument `name` was given, of one of some kinds."""
        checks.known_names(f"A key of `{name}`", value, ("class_name", "config"))
        cls = self._named(name, value.get("class_name"), self.kinds if kinds is None else kinds)
        config = dict(value.get("config") or {})
        checks.known_names(f"An argument of {cls.__name__}", config, arguments(cls))
        return cls(**{field: self._made(f"{name}.{field}", x) for field, x in config.items()})

    def _made(self, name: str, value: Any) -> Any:
        """A field from what JSON made of it: tuples are lists there, and objects dicts."""
        if isinstance(value, list):
            return tuple(self._made(name, x) for x in value)
        return self.from_dict(name, value) if isinstance(value, Mapping) else value

    def _named(self, name: str, class_name: Any, kinds: tuple[type, ...]) -> type[Frozen]:
        known = {key: cls for key, cls in self.classes.items() if issubclass(cls, kinds)}
        if class_name not in known:
            rule = f"`{name}['class_name']` must be one of {sorted(known)}."
            remedy = (
                "An own class is known once it is registered: decorate it by "
                f"`@{self.decorator}`, and import its module before."
            )
            checks.fail(ValueError, rule, f"{class_name!r}", remedy)
        return known[class_name]


def _annotations(cls: type) -> list[str]:
    """The class's own ones, without those of class variables."""
    own = inspect.get_annotations(cls)
    return [n for n, x in own.items() if x is not ClassVar and get_origin(x) is not ClassVar]


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
