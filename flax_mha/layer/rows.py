"""Integers that name examples of a cache, or lengths of theirs: checked where they can be seen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.typing import Array, Shape

LARGEST = np.iinfo(np.int32).max


def counts(name: str, value: Any, batch: Shape) -> Array | np.ndarray:
    """An int, or integers `[*batch]`, as int32 `[*batch]`; what int32 cannot hold is no count."""
    if hasattr(value, "__index__") and not checks.is_array(value):
        value = np.asarray(checks.integer(name, value))
    rule = f"`{name}` must be an int or integers [*batch] = {batch}."
    _integers(name, value, rule)
    if np.shape(value) not in ((), batch):
        checks.fail(ValueError, rule, f"shape {np.shape(value)}")
    whole, inside = _within(value, LARGEST)
    if isinstance(whole, np.ndarray):
        kept = np.where(inside, whole, 0).astype("int32")  # uint8 has no -1
        return np.broadcast_to(np.where(inside, kept, np.int32(-1)), batch)
    return jnp.broadcast_to(jnp.where(inside, whole, -1), batch).astype("int32")


def rows_taken(rows: Any, batch: Shape) -> tuple[Array, Array]:
    """int32 `[R]` and whether each was a row of the first of the batch axes; 0 where it was not."""
    if not batch:
        rule = "`reorder` takes rows of the first batch axis."
        checks.fail(ValueError, rule, "a cache of one sequence, without batch axes")
    rule = f"`rows` must be integers [R], each in [0, B) = [0, {batch[0]})."
    _integers("rows", rows, rule)
    if len(rows.shape) != 1:
        checks.fail(ValueError, rule, f"shape {tuple(rows.shape)}")
    whole, inside = _within(rows, batch[0])
    if isinstance(whole, np.ndarray) and not inside.all():
        checks.fail(ValueError, rule, f"{whole[~inside][:5].tolist()}")
    return jnp.where(inside, whole, 0).astype("int32"), jnp.asarray(inside)


def taken(x: Array, index_R: Array) -> Array:
    return jnp.take(x, index_R, axis=0, mode="clip")


def _integers(name: str, value: Any, rule: str) -> None:
    if not checks.is_array(value) or not jnp.issubdtype(value.dtype, jnp.integer):
        evidence = f"{name} of {getattr(value, 'dtype', type(value).__name__)}"
        checks.fail(TypeError, rule, evidence, f"Pass `jnp.array({name})` of integers.")


def _within(value: Any, limit: int) -> tuple[Any, Any]:
    """The integers, and which of them lie in [0, limit): compared before any bit is cut off.

    What can be seen is compared by NumPy; under a trace no integer is narrowed that could wrap.
    """
    if not isinstance(value, jax.core.Tracer):
        whole = np.asarray(value)
        wide = whole.astype(object) if whole.dtype.kind == "u" else whole.astype("int64")
        return whole, np.asarray((wide >= 0) & (wide < limit), bool)
    traced = value if value.dtype.itemsize > 4 else value.astype("int32")
    return traced, (traced >= 0) & (traced < limit)
