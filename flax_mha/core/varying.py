"""Inside `jax.shard_map`: over which mesh axes an array varies, and arrays that vary alike.

A loop's carry must keep its type, and with `check_vma=True` the axes that a value varies over are
part of it: zeros that vary over none cannot become sums that do. So all arrays of a loop are made
to vary over every axis that one of them varies over, and its zeros are made of one of them. What
was the same on all devices gets a gradient that is summed over them: that is the cast's transpose.
"""

from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.core.typing import Array, DType, Shape


def varying_alike(tree: Any) -> Any:
    """The arrays of a tree, each varying over all axes that one of them varies over."""
    axes = frozenset[str]().union(*(varying_axes(x) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _vary(x, axes - varying_axes(x)), tree) if axes else tree


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes that an array varies over; none outside `shard_map`."""
    kind: Any = jax.typeof(jnp.asarray(x))
    # jax 0.10 moved the set.
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def full(like: Array, shape: Shape, value: Any, dtype: DType | None = None) -> Array:
    """An array of one value that varies as `like` does, of its dtype if there is no other."""
    return jax.lax.full_like(like, value, dtype or like.dtype, shape)


def shaped_like(like: Array, shape: Shape, dtype: DType) -> jax.ShapeDtypeStruct:
    """The type of an array that varies as `like` does: what a kernel must say of its outputs."""
    axes = varying_axes(like)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    kind: Any = jax.typeof(like)
    if hasattr(kind, "manual_axis_type"):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.manual_axis_type)
    return jax.ShapeDtypeStruct(shape, dtype, vma=axes)  # type: ignore[call-arg]


def _vary(x: Any, axes: frozenset[str]) -> Any:
    """The same numbers; of 16 bits, their gradients are summed in 32.

    That is more exact, and XLA's CPU dies of a sum of bfloat16 where some axes are automatic.
    """
    if not axes:
        return x
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4:
        return _cast(x.astype("float32"), axes).astype(x.dtype)
    return _cast(x, axes)


def _cast(x: Any, axes: frozenset[str]) -> Any:
    names = tuple(sorted(axes))
    if hasattr(jax.lax, "pcast"):  # from jax 0.8.2 on
        return jax.lax.pcast(x, names, to="varying")
    return jax.lax.pvary(x, names)  # type: ignore[attr-defined]
