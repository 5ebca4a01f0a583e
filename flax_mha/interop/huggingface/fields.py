"""config.json's fields, read by name: each is checked, and it is noted that it was read."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from flax_mha.core import checks

_LARGEST = 2**40  # of a size; a larger one is no model's


class Fields:
    """The fields of one object of config.json.

    A field that is absent has the default of its family; one that is null stays None, for that is
    how a checkpoint says that it goes without.

    Args:
        values: the object.
        defaults: what a family has where a field is absent.
        names: other names of fields, as `{"num_attention_heads": "n_head"}`.
        path: where the object stands, such as "text_config.".
        max_length: the longest text that will be given, or None.
        ignore: paths of fields that a caller says to pass over.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        names: Mapping[str, str] | None = None,
        path: str = "",
        max_length: int | None = None,
        ignore: Sequence[str] = (),
    ) -> None:
        self.values, self.defaults = values, defaults or {}
        self.names, self.path = names or {}, path
        self.max_length, self.ignore = max_length, ignore
        self.seen: set[str] = set()

    def get(self, name: str) -> Any:
        """The field as it stands, its family's default where it is absent, or None."""
        for spelled in (self.names.get(name, name), name):
            self.seen.add(spelled)
            if spelled in self.values:
                return self.values[spelled]
        return self.defaults.get(name)

    def has(self, name: str) -> bool:
        return self.get(name) is not None

    def is_ignored(self, name: str) -> bool:
        return f"{self.path}{self.names.get(name, name)}" in self.ignore

    def inner(self, name: str) -> "Fields":
        """The fields of an object within; none where it is null or absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            self.fail(name, "an object", value)
        path = f"{self.path}{name}."
        return Fields(value or {}, None, None, path, self.max_length, self.ignore)

    def size(self, name: str) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _LARGEST:
            self.fail(name, "a positive integer", value)
        return value

    def optional_size(self, name: str) -> int | None:
        return self.size(name) if self.has(name) else None

    def number(self, name: str) -> float:
        value = self.get(name)
        kind = int | float
        if isinstance(value, bool) or not isinstance(value, kind) or abs(value) > 1e30:
            self.fail(name, "a number", value)
        if not math.isfinite(value):
            self.fail(name, "a finite number", value)
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return self.number(name) if self.has(name) else None

    def flag(self, name: str) -> bool:
        """True or False; null is False."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return bool(value)

    def entries(self, name: str) -> list[Any] | None:
        """A list, or None."""
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            self.fail(name, "a list", value)
        return value

    def entry(self, name: str, layer: int) -> Any:
        """What a list says of one layer, or None where there is no list."""
        values = self.entries(name)
        if values is not None and layer >= len(values):
            self.fail(name, f"a list with an entry for layer {layer}", values)
        return None if values is None else values[layer]

    def unread(self) -> list[str]:
        """The fields that are set and were not asked for."""
        set_ = (name for name, value in self.values.items() if value is not None)
        return sorted(name for name in set_ if name not in self.seen)

    def expect_read(self, known: Collection[str] = ()) -> None:
        """Refuses what is set, was not asked for and is not known."""
        for name in self.unread():
            if name not in known and not self.is_ignored(name):
                self.refuse(name, "it is not known here", self.values[name])

    def fail(self, name: str, kind: str, value: Any) -> NoReturn:
        spelled = self.names.get(name, name)
        rule = f"config.json's `{self.path}{spelled}` must be {kind}."
        checks.fail(ValueError, rule, _shown(value))

    def refuse(self, name: str, reason: str, value: Any = None) -> NoReturn:
        """This field asks for something that a layer here cannot do."""
        spelled = self.names.get(name, name)
        rule = f"config.json's `{self.path}{spelled}` is not supported: {reason}."
        checks.fail(ValueError, rule, _shown(self.get(name) if value is None else value))


def _shown(value: Any) -> str:
    """A value in an error, of which there may be megabytes."""
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
