"""What the arrays of a call may hold: numbers of the right kind, masks, ids, rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core.errors import fail
from flax_mha.core.typing import Array


def is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def floating_array(name: str, value: Any, letters: str) -> None:
    rule = f"`{name}` must be a floating-point array {letters}."
    if not is_array(value):
        evidence = f"{name} of type {type(value).__name__}"
        fail(TypeError, rule, evidence, f"Pass `jnp.asarray({name})`.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        evidence = f"{name} of dtype {value.dtype} and shape {tuple(value.shape)}"
        remedy = f"Embed token ids first, or cast: `{name}.astype('float32')`."
        if value.dtype == np.bool_:
            remedy = "Is it a mask? Pass it by its name, such as `attention_mask=`."
        fail(TypeError, rule, evidence, remedy)


def boolean_mask(name: str, value: Any) -> Array:
    """`value` as booleans, True = may attend. Integers must be 0 or 1; floats are refused."""
    rule = f"`{name}` must be boolean (or integer 0/1), True = may attend."
    if not is_array(value):
        value = _from_sequence(name, value, rule)
    if jnp.issubdtype(value.dtype, jnp.floating):
        remedy = (
            "An additive float mask (0 and -inf) goes to `bias=`; "
            "a 0.0/1.0 mask must say what it means: pass `mask > 0.5`."
        )
        fail(TypeError, rule, f"{name} of dtype {value.dtype}", remedy)
    if not (jnp.issubdtype(value.dtype, jnp.integer) or value.dtype == np.bool_):
        fail(TypeError, rule, f"{name} of dtype {value.dtype}")
    if value.dtype != np.bool_ and not isinstance(value, jax.core.Tracer):
        _zeros_and_ones(name, np.asarray(value), rule)
    return jnp.asarray(value).astype(bool)


def _from_sequence(name: str, value: Any, rule: str) -> np.ndarray:
    if not isinstance(value, (list, tuple)):
        remedy = "Pass `mask.as_array(T, S)`." if hasattr(value, "as_array") else ""
        fail(TypeError, rule, f"{name} of type {type(value).__name__}", remedy)
    return np.asarray(value)


def _zeros_and_ones(name: str, values: np.ndarray, rule: str) -> None:
    if values.size and not np.isin(values, (0, 1)).all():
        evidence = f"{name} of dtype {values.dtype} with values {np.unique(values)[:5].tolist()}"
        fail(ValueError, rule, evidence, "An additive mask goes to `bias=`, as floats.")


def integer_ids(name: str, value: Any) -> Array:
    if not is_array(value) or not jnp.issubdtype(value.dtype, jnp.integer):
        evidence = f"{name} of {getattr(value, 'dtype', type(value).__name__)}"
        fail(TypeError, f"`{name}` must be an integer array, one id a position.", evidence)
    return jnp.asarray(value)


def positions(name: str, value: Any) -> Array:
    """Integers `[R]`."""
    rule = f"`{name}` must be integers [R], each in [0, T)."
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        fail(TypeError, rule, f"{name} of dtype {value.dtype}")
    if value.ndim != 1:
        fail(ValueError, rule, f"{name} of shape {value.shape}")
    return value


def rows_within(name: str, rows: Array, length: int) -> None:
    """Every row in [0, length), where the values can be seen."""
    if isinstance(rows, jax.core.Tracer):
        return
    outside = [int(row) for row in np.asarray(rows) if not 0 <= row < length]
    if outside:
        rule = f"`{name}` must be integers [R], each in [0, T) = [0, {length})."
        fail(ValueError, rule, f"{outside[:5]}", "Count from the front: T - 1 is the last row.")
