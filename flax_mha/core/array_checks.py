"""What the arrays of a call may hold: numbers of the right kind, masks, ids, rows."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core.errors import fail
from flax_mha.core.typing import Array

# How an array of another framework becomes one that JAX reads, by the framework's name.
_TO_NUMPY = {"torch": "detach().cpu().numpy()", "tensorflow": "numpy()"}


def is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def floating_array(name: str, value: Any, letters: str) -> None:
    rule = f"`{name}` must be a floating-point array {letters}."
    if value is None:
        fail(TypeError, rule, f"{name}=None")
    if not is_array(value):
        evidence = f"{name} of type {type(value).__name__}"
        fail(TypeError, rule, evidence, f"Pass `jnp.asarray({name})`.")
    known_dtype(name, value, rule)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        evidence = f"{name} of dtype {value.dtype} and shape {tuple(value.shape)}"
        fail(TypeError, rule, evidence, _to_floats(name, value.dtype))


def _to_floats(name: str, dtype: Any) -> str:
    """What is likely to be meant by an array that is not floating."""
    if dtype == np.bool_:
        return "Is it a mask? Pass it by its name, such as `attention_mask=`."
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return f"Pass real numbers: `jnp.concatenate([{name}.real, {name}.imag], -1)`."
    ids = "Embed token ids first, or cast" if name in ("query", "value", "key") else "Cast it"
    return f"{ids}: `{name}.astype('float32')`."


def floating_params(params: Any, owner: str = "params") -> None:
    """Every array of the tree is floating; one look at each dtype, for this runs at every call."""
    try:
        leaves = jax.tree.leaves(params)
    except ValueError:  # names that cannot be sorted
        _names_are_strings(params, owner)
        raise
    for dtype in {getattr(leaf, "dtype", None) for leaf in leaves}:
        if not isinstance(dtype, np.dtype) or not jnp.issubdtype(dtype, jnp.floating):
            _not_floating(params, dtype, owner)


def _names_are_strings(tree: Any, where: str) -> None:
    for name, leaves in tree.items() if isinstance(tree, Mapping) else ():
        _names_are_strings(leaves, entry(where, name))


def entry(where: str, name: Any) -> str:
    """What an entry of a tree is called; its name must be a string."""
    if not isinstance(name, str):
        rule = f"`{where}` must hold arrays by their names."
        fail(TypeError, rule, f"{name!r} of type {type(name).__name__}")
    return f"{where}[{name!r}]"


def _not_floating(params: Any, dtype: Any, owner: str) -> None:
    """Names the first array of this dtype; what has no dtype is left to the checks of shapes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if dtype is not None and getattr(leaf, "dtype", None) == dtype:
            name = f"{owner}{jax.tree_util.keystr(path)}"
            rule = f"{name} must be floating-point numbers."
            known_dtype(name, leaf, rule)
            is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
            remedy = "Weights are real." if is_complex else _to_floats(name, dtype)
            fail(TypeError, rule, f"dtype {dtype} and shape {tuple(leaf.shape)}", remedy)


def boolean_mask(name: str, value: Any) -> Array:
    """`value` as booleans, True = may attend. Integers must be 0 or 1; floats are refused.

    Where tracing hides the values, integers with a sign are refused: they may be an additive mask
    (0 and -10000), which a cast would invert.
    """
    rule = f"`{name}` must be boolean (or integer 0/1), True = may attend."
    if not is_array(value):
        value = _from_sequence(name, value, rule)
    known_dtype(name, value, rule)
    if jnp.issubdtype(value.dtype, jnp.floating):
        remedy = (
            "An additive float mask (0 and -inf) goes to `bias=`; "
            "a 0.0/1.0 mask must say what it means: pass `mask > 0.5`."
        )
        fail(TypeError, rule, f"{name} of dtype {value.dtype}", remedy)
    if not (jnp.issubdtype(value.dtype, jnp.integer) or value.dtype == np.bool_):
        fail(TypeError, rule, f"{name} of dtype {value.dtype}")
    if value.dtype != np.bool_:
        check = _unsigned if isinstance(value, jax.core.Tracer) else _zeros_and_ones
        check(name, value, rule)
    return jnp.asarray(value).astype(bool)


def _from_sequence(name: str, value: Any, rule: str) -> np.ndarray:
    if not isinstance(value, (list, tuple)):
        remedy = "Pass `mask.as_array(T, S)`." if hasattr(value, "as_array") else ""
        fail(TypeError, rule, f"{name} of type {type(value).__name__}", remedy)
    return np.asarray(value)


def _zeros_and_ones(name: str, value: Any, rule: str) -> None:
    values = np.asarray(value)
    if values.size and not np.isin(values, (0, 1)).all():
        evidence = f"{name} of dtype {values.dtype} with values {np.unique(values)[:5].tolist()}"
        fail(ValueError, rule, evidence, "An additive mask goes to `bias=`, as floats.")


def _unsigned(name: str, value: Any, rule: str) -> None:
    if not jnp.issubdtype(value.dtype, jnp.unsignedinteger):
        evidence = f"{name} of dtype {value.dtype}, whose values are hidden under jit and vmap"
        remedy = (
            f"A mask of 0 and 1: pass `{name}.astype(bool)`. An additive mask (0 and -10000), "
            "which that would invert, goes to `bias=`, as floats."
        )
        fail(TypeError, rule, evidence, remedy)


def integer_ids(name: str, value: Any) -> Array:
    rule = f"`{name}` must be an integer array, one id a position."
    if is_array(value):
        known_dtype(name, value, rule)
    if not is_array(value) or not jnp.issubdtype(value.dtype, jnp.integer):
        evidence = f"{name} of {getattr(value, 'dtype', type(value).__name__)}"
        fail(TypeError, rule, evidence)
    fits(name, value)
    return jnp.asarray(value)


def token_positions(name: str, value: Any, *, floats: bool) -> Array:
    """Where tokens stand: integers, or floats too where the config's position reads such."""
    kind = "integers or floats" if floats else "integers"
    rule = f"`{name}` must be an array of {kind}, one a token (and axis)."
    if not is_array(value):
        fail(TypeError, rule, f"{name} of type {type(value).__name__}", "Pass `jnp.asarray(...)`.")
    known_dtype(name, value, rule)
    if jnp.issubdtype(value.dtype, jnp.floating):
        if not floats:
            remedy = "Cast them, or set `position=AxialRotary(...)`, which reads coordinates."
            fail(TypeError, rule, f"{name} of dtype {value.dtype}", remedy)
        return jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        fail(TypeError, rule, f"{name} of dtype {value.dtype}")
    fits(name, value)
    return jnp.asarray(value)


def positions(name: str, value: Any) -> Array:
    """Integers `[R]`, of 32 bits or more."""
    rule = f"`{name}` must be integers [R], each in [0, T)."
    value = value if is_array(value) else np.asarray(value)
    known_dtype(name, value, rule)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        fail(TypeError, rule, f"{name} of dtype {value.dtype}")
    if value.ndim != 1:
        fail(ValueError, rule, f"{name} of shape {value.shape}")
    fits(name, value)
    value = jnp.asarray(value)
    return value if value.dtype.itemsize >= 4 else value.astype("int32")


def rows_within(name: str, rows: Array, length: int) -> None:
    """Every row in [0, length), where the values can be seen."""
    if isinstance(rows, jax.core.Tracer):
        return
    outside = [int(row) for row in np.asarray(rows) if not 0 <= row < length]
    if outside:
        rule = f"`{name}` must be integers [R], each in [0, T) = [0, {length})."
        fail(ValueError, rule, f"{outside[:5]}", "Count from the front: T - 1 is the last row.")


def fits(name: str, value: Any, dtype: Any = None) -> None:
    """Refuses integers that a cast to `dtype` would cut; None = to what JAX makes of them.

    Without x64 JAX keeps the lower 32 bits of wider ones: ids 0 and 2^32 would be one.
    """
    kept = jnp.dtype(jax.dtypes.canonicalize_dtype(value.dtype) if dtype is None else dtype)
    if kept == value.dtype or isinstance(value, jax.core.Tracer):
        return
    values, limits = np.asarray(value), np.iinfo(kept)
    outside = [int(x) for x in values.ravel() if not limits.min <= x <= limits.max]
    if outside:
        why = ", for jax_enable_x64=False" if dtype is None else ""
        evidence = f"{name} of dtype {value.dtype} with values {sorted(set(outside))[:5]}"
        anew = "Number them anew: `numpy.unique(ids, return_inverse=True)`."
        remedy = anew if name.endswith("ids") else ""
        fail(ValueError, f"`{name}` must fit {kept.name}{why}.", evidence, remedy)


def known_dtype(name: str, value: Any, rule: str) -> None:
    """Refuses an array of another framework, whose dtype means nothing to JAX."""
    try:
        jnp.issubdtype(value.dtype, np.generic)
    except TypeError:
        kind = type(value)
        framework = kind.__module__.partition(".")[0]
        steps = _TO_NUMPY.get(framework)
        if str(value.dtype) == "torch.bfloat16":  # NumPy has none
            steps = "detach().cpu().float().numpy()"
        remedy = f"Pass `{name}.{steps}`." if steps else f"Pass `numpy.asarray({name})`."
        fail(TypeError, rule, f"{name} of type {framework}.{kind.__name__}", remedy)
