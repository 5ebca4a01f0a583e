"""The arrays that a mask is made of, in one form: booleans, and ids that can be compared."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.dtypes import at_least_32_bits
from flax_mha.core.typing import Array

# The fields of a mask that hold any number of parts, all of which must agree.
BEYOND = ("prefix_lengths", "functions", "unions", "complements")
TUPLES = ("segment_ids", "dense_masks", *BEYOND)
OF_INDICES = ("query_padding", "key_padding", "segment_ids", "dense_masks")


def parts_of(mask: Any) -> list[Any]:
    """The mask, and those of which its unions and complements are made, all the way down."""
    inner = (*(part for union in mask.unions for part in union), *mask.complements)
    return [mask, *(deeper for part in inner for deeper in parts_of(part))]


def of_indices(mask: Any) -> dict[str, Any]:
    """A mask's own arrays of queries and keys, by name."""
    return {name: getattr(mask, name) for name in OF_INDICES}


def counts(mask: Any) -> tuple[int, int]:
    """(examples, heads), as many as the arrays of a mask tell of; 1 where they tell of none."""
    parts = parts_of(mask)
    arrays = [x for part in parts for x in jax.tree.leaves(of_indices(part))]
    rows = [x.shape[0] for x in arrays] + [len(x) for part in parts for x in part.prefix_lengths]
    heads = [x.shape[1] for part in parts for x in part.dense_masks]
    return max(rows, default=1), max(heads, default=1)


def padding(name: str, array: Any) -> Array | None:
    """Booleans `[1 or B, length]`."""
    return None if array is None else _rank_two(name, checks.boolean_mask(name, array))


def dense(array: Any) -> Array:
    """Booleans of rank 4, axes aligned from the right."""
    array = checks.boolean_mask("array", array)
    if array.ndim > 4:
        rule = "A dense mask, `array`, must broadcast to [B, N, T, S]."
        checks.fail(ValueError, rule, f"shape {array.shape}")
    return jax.lax.broadcast_to_rank(array, 4)


def segments(query_ids: Any, key_ids: Any) -> tuple[Array, Array]:
    """Ids `[1 or B, length]` of one type that holds both: none is cut, for a cut id is another."""
    named = {"query_ids": query_ids, "key_ids": key_ids}
    query, key = (_ids(name, x) for name, x in named.items())
    common = np.promote_types(query.dtype, key.dtype)
    if not np.issubdtype(common, np.integer) or jax.dtypes.canonicalize_dtype(common) != common:
        rule = "`query_ids` and `key_ids` must have one type, or types that one type holds."
        checks.fail(TypeError, rule, f"{query.dtype} and {key.dtype}", "Cast one of them.")
    return query.astype(common), key.astype(common)


def offset(value: Any) -> Any:
    """A query offset as it was given: two bands share one where it is the same object."""
    if value is not None:
        array = value if checks.is_array(value) else np.asarray(value)
        checks.fits("query_offset", checks.integer_ids("query_offset", array), "int32")
    return value


def lengths(name: str, value: Any) -> Array:
    """Lengths int32 `[1 or B]`, not negative where that can be seen."""
    array = value if checks.is_array(value) else np.asarray(value)
    checks.fits(name, checks.integer_ids(name, array), "int32")
    if len(array.shape) > 1:
        checks.fail(ValueError, f"`{name}` must be an integer or [B].", f"shape {array.shape}")
    if not isinstance(array, jax.core.Tracer) and np.any(np.asarray(array) < 0):
        checks.fail(ValueError, f"`{name}` must not be negative.", f"{name}={value}")
    return jnp.reshape(jnp.asarray(array), (-1,)).astype("int32")


def either(combine: Any, a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else combine(a, b)


def common_offset(a: Any, b: Any) -> Array | None:
    """The offset of an intersection: two bands shifted differently are not a band."""
    banded = [mask for mask in (a, b) if mask.band != (None, None)]
    offsets = [mask.query_offset for mask in banded]
    if len(offsets) == 2 and offsets[0] is not offsets[1]:
        rule = "Two banded masks can be combined only with the same `query_offset`."
        checks.fail(ValueError, rule, f"{offsets[0]} and {offsets[1]}")
    return offsets[0] if offsets else None


def _ids(name: str, ids: Any) -> Array:
    return _rank_two(name, at_least_32_bits(checks.integer_ids(name, ids)))


def _rank_two(name: str, array: Array) -> Array:
    if len(array.shape) not in (1, 2):
        rule = f"`{name}` must have the axes [B, length] or [length]."
        checks.fail(ValueError, rule, f"shape {tuple(array.shape)}")
    return jax.lax.broadcast_to_rank(array, 2)
