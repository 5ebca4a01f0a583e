"""What a KerasHub layer was made with, read by name: whatever nobody reads is found out.

The rows of the table (classes.py, backbones.py) are functions of an `Arguments`. A row reads what
it understands, so the fields that are set and that no row has read are known without a second list.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax_mha.core import checks

UNSET: tuple[Any, ...] = (None, False, [], {}, "")


class Options(NamedTuple):
    """What the caller adds: the longest text, and the names of fields to pass over."""

    max_length: int | None = None
    ignore: Sequence[str] = ()


NO_OPTIONS = Options()


def checked(max_length: int | None, ignore: Sequence[str]) -> Options:
    if max_length is not None:
        max_length = checks.integer("max_length", max_length, minimum=1)
    return Options(max_length, checks.names("ignore", ignore))


class Arguments:
    """Named values of a layer or model, each of which is noted when it is read.

    `refused` collects, by name, why a value has no counterpart: all of them are told at once, with
    the config that the others make.
    """

    def __init__(self, what: str, get: Callable[[str], Any], names: frozenset[str] = frozenset()):
        self.what, self._get, self._names = what, get, names
        self.read: set[str] = set()
        self.refused: dict[str, str] = {}
        self.given: dict[str, Any] = {}
        self.max_length: int | None = None

    @classmethod
    def of_fields(cls, what: str, fields: Mapping[str, Any]) -> "Arguments":
        """From the config of a layer or model in config.json."""

        def get(name: str) -> Any:
            if name not in fields:
                rule = f"config.json's description of {what} must have the field {name!r}."
                remedy = "Was it written by another KerasHub? Pass `config=`."
                checks.fail(ValueError, rule, f"{sorted(fields)}", remedy)
            return fields[name]

        return cls(what, get, frozenset(n for n, value in fields.items() if value not in UNSET))

    @classmethod
    def of_layer(cls, layer: Any, **given: Any) -> "Arguments":
        """From a live layer's attributes: `get_config()` of several classes fails in 0.32."""
        what = type(layer).__name__

        def get(name: str) -> Any:
            for attribute in (name, f"_{name}"):
                if hasattr(layer, attribute):
                    return getattr(layer, attribute)
            rule = f"A live {what} must have the attribute {name!r}."
            checks.fail(TypeError, rule, f"{layer!r}", "Is it of another KerasHub than 0.32?")

        arguments = cls(what, get)
        arguments.given |= given
        return arguments

    def __getitem__(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        self.read.add(name)
        return self._get(name)

    def only(self, name: str, value: Any, why: str) -> None:
        """Reads a value that is understood only if it is `value`."""
        if self[name] != value:
            self.refused[name] = why

    def unread(self, others: frozenset[str]) -> list[str]:
        """The fields that are set, and neither read nor known to be of something else."""
        return sorted(self._names - self.read - others)
