"""Every error that a user can meet: the rule in axis letters, what was received, what to do."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

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
from flax_mha.core.numbers import as_float as as_float
from flax_mha.core.numbers import finite as finite
from flax_mha.core.numbers import integer as integer
from flax_mha.core.numbers import positive as positive
from flax_mha.core.numbers import rate as rate
from flax_mha.core.numbers import rate_below_one as rate_below_one
from flax_mha.core.numbers import shortened as shortened
from flax_mha.core.typing import DType, Shape

MODULE_FLAGS = ("return_attention_scores", "training", "use_causal_mask")

# --- plain values -------------------------------------------------------------------------------


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


def soft_cap(name: str, value: Any) -> float:
    """A cap by which float32 can divide, and which it can multiply by.

    Beyond 1e30 logits / cap, of logits that matter, is what XLA's CPU takes for 0; a cap beyond
    float32 is inf, and one below it 0, which makes NaN of every logit.
    """
    if not 1e-30 <= (cap := positive(name, value)) <= 1e30:
        rule = f"`{name}` must be a number between 1e-30 and 1e30."
        fail(ValueError, rule, f"{name}={value!r}", "None = no cap.")
    return cap


def instance(name: str, value: Any, cls: type) -> None:
    if not isinstance(value, cls):
        fail(TypeError, f"`{name}` must be a {cls.__name__}.", f"{type(value).__name__}")


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """A shape: a sequence of sizes, each 0 or more."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        rule = f"`{name}` must be a shape, a tuple of ints."
        remedy = f"Pass `{name.removesuffix('_shape')}.shape`." if is_array(value) else ""
        fail(TypeError, rule, f"{name} of type {type(value).__name__}", remedy)
    return tuple(integer(name, size, minimum=0) for size in value)


def known_sizes(**named: Any) -> None:
    """Each is a size, or a symbol of `jax.export`."""
    for name, size in named.items():
        if not export.is_symbolic_dim(size):
            integer(name, size, minimum=0)


def mapping(name: str, value: Any) -> None:
    """A dict, or what is read as one; its keys are names."""
    rule = f"`{name}` must be a mapping from names."
    if not isinstance(value, Mapping):
        fail(TypeError, rule, f"{type(value).__name__}")
    if others := [key for key in value if not isinstance(key, str)]:
        fail(TypeError, rule, f"the key {others[0]!r} of type {type(others[0]).__name__}")


def names(name: str, value: Any) -> tuple[str, ...]:
    """Several names; one string is no collection of its letters."""
    rule = f"`{name}` must be a list of names."
    if isinstance(value, str | bytes) or not isinstance(value, Iterable) or is_array(value):
        remedy = f"Write `({value!r},)`." if isinstance(value, str) else ""
        fail(TypeError, rule, f"{name} of type {type(value).__name__}", remedy)
    given = tuple(value)
    if others := [x for x in given if not isinstance(x, str)]:
        fail(TypeError, rule, f"{others[0]!r} of type {type(others[0]).__name__}")
    return given


def one_of(name: str, value: Any, valid: Iterable[Any]) -> Any:
    valid = tuple(valid)
    is_name = isinstance(value, str) or not is_array(value)  # NumPy's strings are both
    if not is_name or value not in valid:
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
    if not isinstance(value, str | np.dtype | type) and not hasattr(value, "__jax_dtype__"):
        # NumPy makes one dtype of a tuple of two, and of what holds one
        fail(TypeError, rule, f"{name}={value!r}")
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


def precision(name: str, value: Any) -> Any:
    """A name of `jax.lax.Precision`, a pair of them, or what JAX calls an algorithm; as given."""
    algorithms = tuple(vars(jax.lax)[x] for x in ("DotAlgorithm", "DotAlgorithmPreset"))
    if value is None or isinstance(value, algorithms):
        return value
    for one in value if isinstance(value, tuple) and len(value) == 2 else (value,):
        one_precision(name, one)
    return value


def one_precision(name: str, value: Any) -> jax.lax.Precision:
    """In the one spelling that hashes alike."""
    try:
        return jax.lax.Precision(value)
    except (TypeError, ValueError):  # of what has no hash, too
        valid = [precision.name.lower() for precision in jax.lax.Precision]
        fail(ValueError, f"`{name}` must be None or among {valid}.", f"{name}={value!r}")


def axes(name: str, value: Any) -> tuple[int, ...]:
    """An int or a sequence of different ints, as a tuple in the order given."""
    entries = (value,) if hasattr(value, "__index__") else value
    rule = f"`{name}` must be an int or a non-empty sequence of different ints."
    if isinstance(entries, str | bytes) or not isinstance(entries, Sequence):
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
    words = None if typed else _words(getattr(jax.config, "jax_default_prng_impl"))  # noqa: B009
    if words is not None and value.shape[0] != words:
        rule = f"{rule[:-1]}; a raw one has {words} words."
        fail(ValueError, rule, f"{name} of shape {tuple(value.shape)}", remedy)


@functools.cache
def _words(implementation: str) -> int:
    """How many numbers a raw key has."""
    make = lambda: jax.random.key_data(jax.random.key(0, impl=implementation))  # noqa: E731
    return jax.eval_shape(make).shape[0]


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
