"""What a user may write for a norm: an object of `flax_mha.norms`, its name, its dict."""

from collections.abc import Mapping
from typing import Any

from flax_mha.core import checks
from flax_mha.norms.l2 import L2Norm
from flax_mha.norms.norm import Norm
from flax_mha.norms.registry import NORMS
from flax_mha.norms.scaled import LayerNorm, RMSNorm

NAMED = {"rms": RMSNorm, "l2": L2Norm}
for _cls in (RMSNorm, LayerNorm, L2Norm):
    NORMS.add(_cls)


def resolve_norm(name: str, value: Any) -> Norm | None:
    """A norm from itself, its name, or the dict that `serialize_norm` writes."""
    if value is None or isinstance(value, Norm):
        return value
    if isinstance(value, str):
        return NAMED[checks.one_of(name, value, NAMED)]()
    if isinstance(value, Mapping):
        return NORMS.from_dict(name, value)
    rule = f"`{name}` must be None, one of {list(NAMED)}, or an object of flax_mha.norms."
    checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")


def serialize_norm(value: Norm | None) -> dict[str, Any] | None:
    """The JSON-able dict from which `resolve_norm` makes an equal object."""
    return None if value is None else NORMS.to_dict(value)
