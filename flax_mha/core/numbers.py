"""What numbers a user may write: sizes, rates, factors."""

import math
import operator
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core.errors import fail

# An axis of JAX has fewer: what counts along one is an int32.
SIZES_BELOW = 2**31


def integer(name: str, value: Any, *, minimum: int | None = None) -> int:
    """`value` as an int. NumPy integers pass; booleans do not: `True` heads is a mistake.

    What has a minimum is a size, and below 2^31: no memory is asked for one that no axis can have.
    """
    kind = {None: "an integer", 0: "a non-negative integer", 1: "a positive integer"}[minimum]
    rule = f"`{name}` must be {kind}."
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        whole = isinstance(value, float) and value.is_integer()
        remedy = f"Pass {int(value)}: `/` gives a float, `//` an int." if whole else ""
        fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}", remedy)
    try:
        number = operator.index(value)
    except TypeError:  # an array of several, or one that is traced
        evidence = f"{name} as an array of shape {getattr(value, 'shape', '?')}"
        fail(TypeError, rule, evidence, "It is static: pass a Python int.")
    if minimum is not None and not minimum <= number < SIZES_BELOW:
        rule = rule if number < minimum else f"{rule[:-1]} below 2**31."
        fail(ValueError, rule, f"{name}={value!r}")
    return number


def rate(name: str, value: Any) -> float:
    rule = f"`{name}` must be a probability in [0, 1]."
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        fail(ValueError, rule, f"{name}={shortened(value)}")
    return float(value)


def rate_below_one(name: str, value: Any) -> float:
    """A rate after which what is kept can grow by 1 / (1 - rate)."""
    if (found := rate(name, value)) == 1.0:
        fail(ValueError, f"`{name}` must be below 1: nothing would be left.", f"{name}={value!r}")
    return found


def positive(name: str, value: Any) -> float:
    """A finite number above 0, as a Python float: it is static."""
    rule = f"`{name}` must be a finite number > 0."
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}")
    if not 0 < as_float(value) < math.inf:
        fail(ValueError, rule, f"{name}={shortened(value)}")
    return float(value)


def finite(name: str, value: Any) -> float:
    """A finite number of either sign, as a Python float: it is static."""
    rule = f"`{name}` must be a finite number."
    is_number = isinstance(value, Real) or _is_real_scalar(value)
    if isinstance(value, bool) or not is_number or isinstance(value, jax.core.Tracer):
        fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}")
    if not math.isfinite(as_float(value)):
        fail(ValueError, rule, f"{name}={shortened(value)}")
    return float(value)


def _is_real_scalar(value: Any) -> bool:
    """Of NumPy or JAX; their text of a number and their complex numbers are none."""
    dtype = getattr(value, "dtype", None)
    real = dtype is not None and any(jnp.issubdtype(dtype, x) for x in (jnp.floating, jnp.integer))
    return real and value.shape == ()


def as_float(value: Any) -> float:
    """A real number as a float; an int that is too large for one is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def shortened(value: Any) -> str:
    """How a message shows a number: Python itself refuses to write ints of thousands of digits."""
    is_long = isinstance(value, int) and value.bit_length() > 256
    return f"an int of {value.bit_length()} bits" if is_long else repr(value)
