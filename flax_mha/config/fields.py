"""The rules of the config's fields: each value checked, and brought to the spelling that is kept.

Equal configs must be equal and hash alike, whichever way their fields were written.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_mha.attention import IMPLEMENTATIONS, ContextAxis
from flax_mha.attention.context.axis import context_axis_of
from flax_mha.config.latent import Latent, resolve_latent, serialize_latent
from flax_mha.core import checks
from flax_mha.keras.identifiers import Kind, resolve, serialize
from flax_mha.masks import Neighborhood
from flax_mha.norms import Norm
from flax_mha.norms.identifiers import resolve_norm, serialize_norm
from flax_mha.positions import PositionFunction
from flax_mha.positions.identifiers import (
    resolve_position,
    resolve_score,
    serialize_position,
    serialize_score,
)
from flax_mha.positions.scores import Score


def _size(name: str, value: Any) -> int:
    return checks.integer(name, value, minimum=1)


def _optional(check: Any) -> Any:
    return lambda name, value: None if value is None else check(name, value)


def _output_shape(name: str, value: Any) -> tuple[int, ...] | None:
    """Keras: an int or an iterable of ints; None, 0 and () mean the query's own size."""
    if value is None:
        return None
    is_array = checks.is_array(value) and not isinstance(value, np.integer)
    entries = (value,) if hasattr(value, "__index__") and not is_array else value
    if is_array or isinstance(entries, str | bytes | Mapping) or not hasattr(entries, "__iter__"):
        rule = f"`{name}` must be an int or a tuple of ints."
        checks.fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}")
    sizes = tuple(entries)
    return None if sizes in ((), (0,)) else tuple(_size(name, size) for size in sizes)


def _window(name: str, value: Any) -> int | Neighborhood:
    """An int counts along the raster, as in Keras; a tuple is a window in several axes."""
    if isinstance(value, Neighborhood):
        return value
    if isinstance(value, Mapping):
        return Neighborhood.from_dict(value)
    if isinstance(value, tuple | list):
        return Neighborhood(tuple(_size(name, size) for size in value))
    if not hasattr(value, "__index__"):
        rule = f"`{name}` must be an int, a tuple of one for each attended axis, or a Neighborhood."
        checks.fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}")
    return _size(name, value)


def _use_bias(name: str, value: Any) -> bool | tuple[str, ...]:
    if hasattr(value, "__index__") or isinstance(value, np.bool_):
        return checks.boolean(name, value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        rule = f"`{name}` must be True or False, or a tuple of names of projections."
        remedy = f"Pass `{name}=({value!r},)`." if isinstance(value, str) else ""
        checks.fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}", remedy)
    return tuple(value)


def canonical_biases(use_bias: Any, projections: tuple[str, ...]) -> bool | tuple[str, ...]:
    """All names are True, none are False, some stand in order: equal configs hash alike."""
    if isinstance(use_bias, bool):
        return use_bias
    checks.known_names("A projection of this layer in `use_bias`", use_bias, projections)
    named = tuple(name for name in projections if name in use_bias)
    return named if named and named != projections else bool(named)


def _identifier(kind: Kind) -> Any:
    def check(name: str, value: Any) -> Any:
        try:
            return resolve(kind, value)
        except (TypeError, ValueError) as error:  # it speaks of a kind, of which there are two
            refusal = TypeError if isinstance(error, TypeError) else ValueError
            raise refusal(f"`{name}`: {error}") from None

    return check


def _implementation(name: str, value: Any) -> str:
    return checks.one_of(name, value, IMPLEMENTATIONS)


FIELD_CHECKS: dict[str, Any] = {
    "num_heads": _size,
    "key_dim": _size,
    "value_dim": _optional(_size),
    "dropout": checks.rate,
    "use_bias": _use_bias,
    "output_shape": _output_shape,
    "attention_axes": _optional(checks.axes),
    "sliding_window": _optional(_window),
    "kernel_initializer": _identifier("initializer"),
    "bias_initializer": _identifier("initializer"),
    "kernel_regularizer": _identifier("regularizer"),
    "bias_regularizer": _identifier("regularizer"),
    "activity_regularizer": _identifier("regularizer"),
    "kernel_constraint": _identifier("constraint"),
    "bias_constraint": _identifier("constraint"),
    "use_gate": checks.boolean,
    "seed": _optional(checks.integer),
    "num_kv_heads": _optional(_size),
    "chunk_size": _optional(_size),
    "latent": resolve_latent,
    "position": resolve_position,
    "qk_norm": resolve_norm,
    "value_norm": resolve_norm,
    "clip_qkv": _optional(checks.positive),
    "scale": _optional(checks.positive),
    "soft_cap": _optional(checks.soft_cap),
    "score": resolve_score,
    "use_sinks": checks.boolean,
    "dtype": _optional(checks.floating_dtype),
    "param_dtype": checks.floating_dtype,
    "precision": _optional(checks.one_precision),
    "implementation": _optional(_implementation),
    "context_axis": _optional(lambda name, value: context_axis_of(value)),
}


def check_chunks(config: Any) -> None:
    """A chunk or a window says how far a query sees; chunks count whole positions of one axis."""
    if config.chunk_size is None:
        return
    evidence = f"chunk_size={config.chunk_size}"
    if config.sliding_window is not None:
        rule = "A layer has chunks or a sliding window."
        checks.fail(ValueError, rule, f"{evidence}, sliding_window={config.sliding_window}")
    position = config.position
    if isinstance(position, PositionFunction) and (position.axes > 1 or position.takes_floats):
        rule = "Chunks are counted by whole positions of one axis."
        checks.fail(ValueError, rule, f"{evidence}, position={position}")


def check_window(config: Any) -> None:
    """A window in several axes has one size for each; where no axes are named, the call checks."""
    near, axes = config.sliding_window, config.attention_axes
    if isinstance(near, Neighborhood) and axes is not None and len(near.window) != len(axes):
        rule = "`sliding_window` in several axes must have one size for each of `attention_axes`."
        evidence = f"sliding_window={near.window}, attention_axes={axes}"
        checks.fail(ValueError, rule, evidence, "An int counts along the raster of all of them.")


def plain(name: str, value: Any) -> Any:
    """A field's value as JSON can hold it."""
    if name.endswith(("initializer", "regularizer", "constraint")):
        return serialize(value)
    if name == "position":
        return serialize_position(value)
    if isinstance(value, Score):
        return serialize_score(value)
    if isinstance(value, Norm):
        return serialize_norm(value)
    if isinstance(value, Latent):
        return serialize_latent(value)
    if isinstance(value, Neighborhood):
        return value.to_dict()
    if isinstance(value, ContextAxis):
        return dataclasses.asdict(value)
    if isinstance(value, jax.lax.Precision):
        return value.name.lower()
    return list(value) if isinstance(value, tuple) else value
