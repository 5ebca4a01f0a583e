"""What a user may write for a norm: an object of `flax_mha.norms`, its name, its dict."""

from collections.abc import Mapping
from typing import Any

from flax_mha.core import checks
from flax_mha.core.frozen import arguments
from flax_mha.norms.l2 import L2Norm
from flax_mha.norms.norm import Norm
from flax_mha.norms.scaled import LayerNorm, RMSNorm

NAMED = {"rms": RMSNorm, "l2": L2Norm}
_CLASSES: dict[str, type[Norm]] = {cls.__name__: cls for cls in (RMSNorm, LayerNorm, L2Norm)}


def resolve_norm(name: str, value: Any) -> Norm | None:
    """A norm from itself, its name, or the dict that `serialize_norm` writes."""
    if value is None or isinstance(value, Norm):
        return value
    if isinstance(value, str):
        return NAMED[checks.one_of(name, value, NAMED)]()
    if not isinstance(value, Mapping):
        rule = f"`{name}` must be None, one of {list(NAMED)}, or an object of flax_mha.norms."
        checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")
    checks.known_names(f"A key of `{name}`", value, ("class_name", "config"))
    cls = _CLASSES[checks.one_of(f"{name}['class_name']", value.get("class_name"), _CLASSES)]
    fields = dict(value.get("config") or {})
    checks.known_names(f"An argument of {cls.__name__}", fields, arguments(cls))
    return cls(**fields)


def serialize_norm(value: Norm | None) -> dict[str, Any] | None:
    """The JSON-able dict from which `resolve_norm` makes an equal object."""
    if value is None:
        return None
    fields = {name: getattr(value, name) for name in arguments(type(value))}
    return {"class_name": type(value).__name__, "config": fields}
