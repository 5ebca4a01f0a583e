"""What a user may write for a position or a score: an object of `flax_mha.positions`, its dict."""

from collections.abc import Mapping
from typing import Any, TypeAlias

from flax_mha.core import checks
from flax_mha.core.frozen import Frozen
from flax_mha.positions.alibi import Alibi
from flax_mha.positions.axial import AxialRotary
from flax_mha.positions.bias import PositionBias
from flax_mha.positions.function import PositionFunction
from flax_mha.positions.grid_bias import GridBias
from flax_mha.positions.growth import QueryGrowth
from flax_mha.positions.long_scalings import DynamicScaling, LongRopeScaling, ProportionalScaling
from flax_mha.positions.registry import POSITIONS, SCORES
from flax_mha.positions.relative_bias import RelativeBias
from flax_mha.positions.rotary import Rotary
from flax_mha.positions.scalings import LinearScaling, Llama3Scaling, YarnScaling
from flax_mha.positions.scores import Score

PositionEncoding: TypeAlias = PositionFunction | PositionBias
NAMED = {"rotary": Rotary, "alibi": Alibi, "relative_bias": RelativeBias}
SCALINGS = (
    LinearScaling, Llama3Scaling, YarnScaling, LongRopeScaling, DynamicScaling, ProportionalScaling
)  # fmt: skip
for _cls in (Rotary, AxialRotary, QueryGrowth, Alibi, RelativeBias, GridBias, *SCALINGS):
    POSITIONS.add(_cls)


def resolve_position(name: str, value: Any) -> PositionEncoding | None:
    """A position encoding from itself, its name, or the dict that `serialize_position` writes."""
    if value is None or isinstance(value, PositionEncoding):
        return value
    if isinstance(value, str):
        return NAMED[checks.one_of(name, value, NAMED)]()
    if isinstance(value, Mapping):
        return POSITIONS.from_dict(name, value, (PositionFunction, PositionBias))
    rule = f"`{name}` must be None, one of {list(NAMED)}, or an object of flax_mha.positions."
    checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")


def serialize_position(value: Frozen | None) -> dict[str, Any] | None:
    """The JSON-able dict from which `resolve_position` makes an equal object."""
    return None if value is None else POSITIONS.to_dict(value)


def resolve_score(name: str, value: Any) -> Score | None:
    """A score from itself, or from the dict that `serialize_score` writes."""
    if value is None or isinstance(value, Score):
        return value
    if isinstance(value, Mapping):
        return SCORES.from_dict(name, value)
    rule = f"`{name}` must be None or a flax_mha.positions.Score."
    remedy = "A class is called first: `Own()`." if isinstance(value, type) else ""
    if callable(value) and not remedy:
        remedy = "A config holds no functions: make it `__call__` of a frozen subclass of Score."
    checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}", remedy)


def serialize_score(value: Score | None) -> dict[str, Any] | None:
    """The JSON-able dict from which `resolve_score` makes an equal object."""
    return None if value is None else SCORES.to_dict(value)
