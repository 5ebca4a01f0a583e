"""The mesh that names are checked against, and arrays that are laid along it."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from flax_mha.core import checks
from flax_mha.core.typing import Array


def mesh_sizes(mesh: Any = None) -> Mapping[str, int] | None:
    """The sizes of `mesh`, or else of the mesh of `jax.set_mesh`; None where there is neither.

    Inside `jax.shard_map` arrays are shards, and names of whole arrays are not checked.
    """
    if mesh is not None:
        if not isinstance(mesh, Mesh | AbstractMesh):
            rule = "`mesh` must be a jax.sharding.Mesh or AbstractMesh."
            checks.fail(TypeError, rule, f"{mesh!r} of type {type(mesh).__name__}")
        return dict(mesh.shape)
    ambient = jax.sharding.get_abstract_mesh()
    if ambient.empty or AxisType.Manual in ambient.axis_types:
        return None
    return dict(ambient.shape)


def placed(array: Array, spec: PartitionSpec) -> Array:
    """`array` along the ambient mesh, where that is explicit: there JAX asserts what Flax names.

    On a mesh of automatic axes the compiler places arrays, as it does those of Flax's own layers.
    """
    ambient = jax.sharding.get_abstract_mesh()
    if ambient.empty or set(ambient.axis_types) != {AxisType.Explicit}:
        return array
    return jax.sharding.reshard(array, spec)
