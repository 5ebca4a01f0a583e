"""What a user may write for a position: an object of `flax_mha.positions`, its name, its dict."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from flax_mha.core import checks
from flax_mha.core.frozen import Frozen, arguments
from flax_mha.positions.alibi import Alibi
from flax_mha.positions.axial import AxialRotary
from flax_mha.positions.bias import PositionBias
from flax_mha.positions.function import PositionFunction
from flax_mha.positions.grid_bias import GridBias
from flax_mha.positions.growth import QueryGrowth
from flax_mha.positions.long_scalings import DynamicScaling, LongRopeScaling, ProportionalScaling
from flax_mha.positions.registry import KINDS, is_registered, named, register
from flax_mha.positions.relative_bias import RelativeBias
from flax_mha.positions.rotary import Rotary
from flax_mha.positions.scalings import LinearScaling, Llama3Scaling, YarnScaling

PositionEncoding: TypeAlias = PositionFunction | PositionBias
NAMED = {"rotary": Rotary, "alibi": Alibi, "relative_bias": RelativeBias}
SCALINGS = (
    LinearScaling, Llama3Scaling, YarnScaling, LongRopeScaling, DynamicScaling, ProportionalScaling
)  # fmt: skip
for _cls in (Rotary, AxialRotary, QueryGrowth, Alibi, RelativeBias, GridBias, *SCALINGS):
    register(_cls)


def resolve_position(name: str, value: Any) -> PositionEncoding | None:
    """A position encoding from itself, its name, or the dict that `serialize_position` writes."""
    if value is None or isinstance(value, PositionEncoding):
        return value
    if isinstance(value, str):
        return NAMED[checks.one_of(name, value, NAMED)]()
    if isinstance(value, Mapping):
        return _from_dict(name, value, (PositionFunction, PositionBias))
    rule = f"`{name}` must be None, one of {list(NAMED)}, or an object of flax_mha.positions."
    checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")


def serialize_position(value: Frozen | None) -> dict[str, Any] | None:
    """The JSON-able dict from which `resolve_position` makes an equal object."""
    if value is None:
        return None
    cls = type(value)
    if not is_registered(cls):
        rule = "A config can be written whose position is of a class that is known by its name."
        remedy = "Register it: `@flax_mha.positions.register` above the class."
        checks.fail(TypeError, rule, f"{value} of {cls.__module__}.{cls.__qualname__}", remedy)
    fields = {name: _plain(getattr(value, name)) for name in arguments(cls)}
    return {"class_name": cls.__name__, "config": fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Frozen):
        return serialize_position(value)
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def _from_dict(name: str, value: Mapping[str, Any], kinds: tuple[type, ...]) -> Any:
    checks.known_names(f"A key of `{name}`", value, ("class_name", "config"))
    cls = named(name, value.get("class_name"), kinds)
    config = dict(value.get("config") or {})
    checks.known_names(f"An argument of {cls.__name__}", config, arguments(cls))
    return cls(**{field: _made(f"{name}.{field}", x) for field, x in config.items()})


def _made(name: str, value: Any) -> Any:
    """A field from what JSON made of it: tuples are lists there, and objects dicts."""
    if isinstance(value, list):
        return tuple(_made(name, x) for x in value)
    return _from_dict(name, value, KINDS) if isinstance(value, Mapping) else value
