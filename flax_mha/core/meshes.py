"""Meshes with explicit axes, where an array's type says how it is sharded.

`jax.make_mesh` makes them by default. There each operation must tell how its result is sharded, and
loops over tiles, reshapes and contractions of sharded axes cannot. So a function as a whole runs
with these axes made automatic, for XLA to propagate, and its results are told from its operands.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha.core.errors import fail


def with_auto_axes(f: Callable[..., Any], placed: Callable[[], Any], *args: Any) -> Any:
    """`f(*args)`; where the types of the arrays in `args` name explicit axes, with these automatic.

    `placed()` is then a tree like the result's, a `PartitionSpec` for each array and None for None.
    Axes that are manual, of a `jax.shard_map` around the call, stay manual. Without explicit axes
    nothing is done: `placed` is not called.

    Example:
        >>> import jax
        >>> with_auto_axes(lambda x: x + 1, lambda: spec(None), jax.numpy.zeros(2)).tolist()
        [1.0, 1.0]
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return f(*args)
    names = tuple(n for n, kind in zip(mesh.axis_names, mesh.axis_types) if _is_explicit(kind))
    shardings = jax.tree.map(lambda axes: NamedSharding(mesh, axes), placed())
    automatic = jax.sharding.auto_axes(f, axes=names, out_sharding=shardings)
    if AxisType.Manual in mesh.axis_types:
        # What f would keep for its gradient has automatic axes, with which no array may leave a
        # shard_map that leaves the others explicit: the arguments are kept, and f runs again.
        automatic = jax.checkpoint(automatic)
    return automatic(*args)


def explicit_mesh(tree: Any) -> Any:
    """The abstract mesh of the arrays in `tree`, if one of its axes is explicit; None otherwise."""
    meshes = []
    for x in jax.tree.leaves(tree):
        mesh = jax.typeof(x).sharding.mesh if isinstance(x, jax.Array) else None
        if mesh is not None and any(_is_explicit(kind) for kind in mesh.axis_types or ()):
            meshes += [] if mesh in meshes else [mesh]
    if len(meshes) > 1:
        rule = "Arrays of one call must be on one mesh."
        remedy = "Move them by `jax.device_put(x, NamedSharding(mesh, spec))`."
        fail(ValueError, rule, " and ".join(map(str, meshes)), remedy)
    return meshes[0] if meshes else None


def axes_of(x: Any) -> tuple[Any, ...]:
    """For each axis of an array the mesh axes that its type names: None, a name or a tuple."""
    return tuple(jax.typeof(x).sharding.spec) if isinstance(x, jax.Array) else (None,) * x.ndim


def free_axes() -> list[str]:
    """The axes of the mesh around a trace over which XLA has still to cut: of more than one device.

    Example:
        >>> free_axes()
        []
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types or ())
    return [name for name, kind in kinds if kind != AxisType.Manual and mesh.shape[name] > 1]


def spec_of(x: Any) -> P:
    """How an array's type says that it is sharded."""
    return P(*axes_of(x))


def spec(*axes: Any) -> P:
    """The spec of these axes; of several that name one mesh axis, the first keeps it.

    Example:
        >>> tuple(spec("data", None, ("data", "model"), "model"))
        ('data', None, 'model', None)
    """
    used: set[str] = set()
    kept = []
    for names in axes:
        free = [name for name in _names(names) if name not in used]
        used.update(free)
        kept.append(free[0] if len(free) == 1 else tuple(free) or None)
    return P(*kept)


def _names(axes: Any) -> Iterable[str]:
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)


def _is_explicit(kind: Any) -> bool:
    return kind == AxisType.Explicit
