"""What a user may write for a position: an object of `flax_mha.positions`, its name, its dict."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from flax_mha.core import checks
from flax_mha.core.frozen import Frozen, arguments
from flax_mha.positions.alibi import Alibi
from flax_mha.positions.axial import AxialRotary
from flax_mha.positions.distance import DistanceFunction
from flax_mha.positions.function import PositionFunction
from flax_mha.positions.growth import QueryGrowth
from flax_mha.positions.relative_bias import RelativeBias
from flax_mha.positions.rotary import Rotary
from flax_mha.positions.scalings import LinearScaling, Llama3Scaling, YarnScaling

PositionEncoding: TypeAlias = PositionFunction | DistanceFunction
CLASSES = {"rotary": Rotary, "alibi": Alibi, "relative_bias": RelativeBias}
SCALINGS = {cls.__name__: cls for cls in (LinearScaling, Llama3Scaling, YarnScaling)}


def resolve_position(name: str, value: Any) -> PositionEncoding | None:
    """A position encoding from itself, its name, or the dict that `serialize_position` writes."""
    if value is None or isinstance(value, PositionEncoding):
        return value
    if isinstance(value, str):
        return CLASSES[checks.one_of(name, value, CLASSES)]()
    if isinstance(value, Mapping):
        named = {cls.__name__: cls for cls in (*CLASSES.values(), AxialRotary, QueryGrowth)}
        return _from_dict(name, value, named)
    rule = f"`{name}` must be None, one of {list(CLASSES)}, or an object of flax_mha.positions."
    checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")


def serialize_position(value: Frozen | None) -> dict[str, Any] | None:
    """The JSON-able dict from which `resolve_position` makes an equal object."""
    if value is None:
        return None
    fields = {name: getattr(value, name) for name in arguments(type(value))}
    config = {k: serialize_position(v) if isinstance(v, Frozen) else v for k, v in fields.items()}
    return {"class_name": type(value).__name__, "config": config}


def _from_dict(name: str, value: Mapping[str, Any], classes: Mapping[str, Any]) -> Any:
    checks.known_names(f"A key of `{name}`", value, ("class_name", "config"))
    cls = classes[checks.one_of(f"{name}['class_name']", value.get("class_name"), classes)]
    config = dict(value.get("config") or {})
    checks.known_names(f"An argument of {cls.__name__}", config, arguments(cls))
    if isinstance(config.get("scaling"), Mapping):
        config["scaling"] = _from_dict(f"{name}.scaling", config["scaling"], SCALINGS)
    if isinstance(config.get("rotary"), Mapping):
        config["rotary"] = _from_dict(f"{name}.rotary", config["rotary"], {"Rotary": Rotary})
    return cls(**config)
