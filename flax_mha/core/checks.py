"""Every error that a user can meet: the rule in axis letters, what was received, what to do."""

import difflib
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core.array_checks import boolean_mask as boolean_mask
from flax_mha.core.array_checks import fits as fits
from flax_mha.core.array_checks import floating_array as floating_array
from flax_mha.core.array_checks import floating_params as floating_params
from flax_mha.core.array_checks import integer_ids as integer_ids
from flax_mha.core.array_checks import is_array as is_array
from flax_mha.core.array_checks import known_dtype as known_dtype
from flax_mha.core.array_checks import positions as positions
from flax_mha.core.array_checks import rows_within as rows_within
from flax_mha.core.array_checks import token_positions as token_positions
from flax_mha.core.errors import fail as fail
from flax_mha.core.typing import DType, Shape

MODULE_FLAGS = ("return_attention_scores", "training", "use_causal_mask")

# --- plain values -------------------------------------------------------------------------------


def integer(name: str, value: Any, *, minimum: int | None = None) -> int:
    """`value` as an int. NumPy integers pass; booleans do not: `True` heads is a mistake."""
    kind = {None: "an integer", 0: "a non-negative integer", 1: "a positive integer"}[minimum]
    rule = f"`{name}` must be {kind}."
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        whole = isinstance(value, float) and value.is_integer()
        remedy = f"Pass {int(value)}: `/` gives a float, `//` an int." if whole else ""
        fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}", remedy)
    number = operator.index(value)
    if minimum is not None and number < minimum:
        fail(ValueError, rule, f"{name}={value!r}")
    return number


def boolean(name: str, value: Any, places: str = "") -> bool:
    """`value` as a bool, 0 and 1 too: Keras's users write them, and True and 1 compile once.

    `places` tells, for a flag that is traced, what else may have to be made static.
    """
    rule = f"`{name}` must be True or False."
    if isinstance(value, jax.core.Tracer):
        rule = f"`{name}` must be True or False when the call is traced, not data."
        remedy = f"Make it static: `static_argnames={name!r}` of `jax.jit`. {places}".rstrip()
        fail(TypeError, rule, f"{name} as a traced array of shape {value.shape}", remedy)
    if not isinstance(value, (int, np.bool_, np.integer)):
        fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}")
    if value not in (0, 1):
        fail(ValueError, rule, f"{name}={value!r}")
    return bool(value)


def module_flags(call: Callable[..., Any], *values: Any) -> tuple[bool, ...]:
    """The flags of a module's `call`, in its order; from it are read the places for `remat`."""
    order = [*inspect.signature(call).parameters]
    numbers = tuple(order.index(name) for name in MODULE_FLAGS)
    places = f"Under `nn.remat`: `static_argnums={numbers}`, and pass the flags by place."
    return tuple(boolean(name, value, places) for name, value in zip(MODULE_FLAGS, values))


def rate(name: str, value: Any) -> float:
    rule = f"`{name}` must be a probability in [0, 1]."
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        fail(ValueError, rule, f"{name}={value!r}")
    return float(value)


def rate_below_one(name: str, value: Any) -> float:
    """A rate after which what is kept can grow by 1 / (1 - rate)."""
    if (found := rate(name, value)) == 1.0:
        fail(ValueError, f"`{name}` must be below 1: nothing would be left.", f"{name}={value!r}")
    return found


def positive(name: str, value: Any) -> float:
    """A finite number above 0, as a Python float: it is static."""
    rule = f"`{name}` must be a finite number > 0."
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}")
    if not 0 < float(value) < math.inf:
        fail(ValueError, rule, f"{name}={value!r}")
    return float(value)


def instance(name: str, value: Any, cls: type) -> None:
    if not isinstance(value, cls):
        fail(TypeError, f"`{name}` must be a {cls.__name__}.", f"{type(value).__name__}")


def one_of(name: str, value: Any, valid: Iterable[Any]) -> Any:
    valid = tuple(valid)
    if value not in valid:
        fail(ValueError, f"`{name}` must be one of {list(valid)}.", f"{name}={value!r}")
    return value


def known_names(what: str, names: Iterable[str], valid: Iterable[str]) -> None:
    valid = tuple(valid)
    for name in names:
        if name not in valid:
            close = difflib.get_close_matches(str(name), valid, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else ""
            fail(ValueError, f"{what} must be among {list(valid)}.", repr(name), hint)


def floating_dtype(name: str, value: DType) -> str:
    """The name of a floating dtype; float64 is refused where JAX would make it float32."""
    rule = f"`{name}` must be a floating-point dtype such as 'float32' or 'bfloat16'."
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        fail(TypeError, rule, f"{name}={value!r}")
    if not jnp.issubdtype(dtype, jnp.floating):
        fail(TypeError, rule, f"{name}={dtype.name!r}")
    return dtype.name


def x64_enabled(name: str, dtype: DType) -> None:
    """Called where arrays are made, for x64 may be switched on after a config was."""
    if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        rule = f"`{name}='float64'` needs JAX's 64-bit mode, else JAX computes in float32."
        remedy = "Call `jax.config.update('jax_enable_x64', True)` at start-up."
        fail(ValueError, rule, "jax_enable_x64=False", remedy)


def axes(name: str, value: Any) -> tuple[int, ...]:
    """An int or a sequence of different ints, as a tuple in the order given."""
    entries = (value,) if hasattr(value, "__index__") else value
    rule = f"`{name}` must be an int or a non-empty sequence of different ints."
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        fail(TypeError, rule, f"{name}={value!r} of type {type(value).__name__}")
    result = tuple(integer(name, entry) for entry in entries)
    if not result or len(set(result)) != len(result):
        fail(ValueError, rule, f"{name}={value!r}")
    return result


# --- arrays: shapes and keys; what an array holds is checked in `array_checks` -----------------


def broadcastable(
    name: str, aligned: Shape, full: Shape, letters: str, remedy: str = "", *, received: Any = None
) -> None:
    """Every size of `aligned` is 1 or that of `full` at the same place, ranks being equal.

    `received` is the shape to report, where the caller's array had fewer axes.
    """
    if len(aligned) != len(full) or any(n not in (1, m) for n, m in zip(aligned, full)):
        rule = f"`{name}` must broadcast to {letters} = {tuple(full)}."
        fail(ValueError, rule, f"shape {tuple(aligned if received is None else received)}", remedy)


def prng_key(name: str, value: Any) -> None:
    rule = f"`{name}` must be one JAX PRNG key."
    remedy = f"Pass `{name}=jax.random.key(0)`, split anew for every step."
    if not is_array(value):
        shown = f"{name}={value!r}" if isinstance(value, int) else name
        fail(TypeError, rule, f"{shown} of type {type(value).__name__}", remedy)
    known_dtype(name, value, rule)
    typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    if not typed and value.dtype != np.uint32:
        fail(TypeError, rule, f"{name} of dtype {value.dtype}", remedy)
    if len(value.shape) != (0 if typed else 1):
        remedy = "For a batch of keys, `jax.vmap` over the call."
        fail(ValueError, rule, f"{name} of shape {tuple(value.shape)}", remedy)


def no_dropout_stream(rate: float, remedy: str) -> NoReturn:
    """Refuses training with dropout where the module was given nothing to draw from."""
    rule = "`training=True` with dropout > 0 needs a PRNG key."
    evidence = f"dropout={rate}, no 'dropout' rng stream"
    fail(ValueError, rule, evidence, f"Pass `{remedy}`, or set `seed`.")


# --- dot_product_attention: arrays by their letters ---------------------------------------------


def attention_arrays(query: Any, key: Any, value: Any) -> None:
    """query [..., T, N, H], key [..., S, K, H], value [..., S, K, V]."""
    for name, x, letters in (
        ("query", query, "[..., T, N, H]"),
        ("key", key, "[..., S, K, H]"),
        ("value", value, "[..., S, K, V]"),
    ):
        floating_array(name, x, letters)
        if len(x.shape) < 3:
            fail(ValueError, f"`{name}` must have the axes {letters}.", f"shape {tuple(x.shape)}")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    _same("batch axes", query.shape[:-3], key.shape[:-3], value.shape[:-3], shapes)
    _same("S, K of key and value", key.shape[-3:-1], value.shape[-3:-1], evidence=shapes)
    _same("H of query and key", query.shape[-1:], key.shape[-1:], evidence=shapes)
    N, K = query.shape[-2], key.shape[-2]
    if K == 0 or N % K:
        rule = f"N = {N} query heads must be a multiple of K = {K} key/value heads."
        fail(ValueError, rule, shapes, "Heads stand behind the length: [B, T, N, H].")
    if not query.dtype == key.dtype == value.dtype:
        dtypes = f"query {query.dtype}, key {key.dtype}, value {value.dtype}"
        fail(TypeError, "query, key and value must have one dtype.", dtypes, "Cast them first.")


def _same(what: str, *parts: Any, evidence: str | None = None) -> None:
    *shapes, last = parts if evidence is None else (*parts, evidence)
    if any(tuple(shape) != tuple(shapes[0]) for shape in shapes):
        fail(ValueError, f"The {what} must be equal.", last)


def block_sizes(value: Any) -> tuple[int, int]:
    """(queries, keys) a block, as ints."""
    rule = "`block_sizes` must be a pair (queries, keys) a block."
    if not isinstance(value, tuple | list) or len(value) != 2:
        fail(TypeError, rule, f"block_sizes={value!r}")
    queries, keys = (integer("block_sizes", size, minimum=1) for size in value)
    return queries, keys


# --- the layer: inputs by their letters --------------------------------------------------------


def layer_inputs(query: Shape, value: Shape, key: Shape) -> None:
    """query [..., T, D], value [..., S, M], key [..., S, C], of one rank of 2 or more."""
    shapes = f"query {tuple(query)}, value {tuple(value)}, key {tuple(key)}"
    if not len(query) == len(value) == len(key) or len(query) < 2:
        rule = "query [..., T, D], value [..., S, M] and key [..., S, C] must have one rank >= 2."
        fail(ValueError, rule, shapes, "A single sequence is [T, D].")
    if value[:-1] != key[:-1]:
        rule = "value [..., S, M] and key [..., S, C] must agree in all axes but the last."
        remedy = "The order of arguments is query, value, key, as in Keras."
        fail(ValueError, rule, shapes, remedy)
