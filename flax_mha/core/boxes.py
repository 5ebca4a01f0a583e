"""Arrays whose axes an initializer has named: flax.linen's boxes, flax.nnx's metadata.

Flax is not imported down here. A linen box (`nn.Partitioned`) is known by its `unbox`, what
`nnx.with_partitioning` returns by its `raw_value`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec

from flax_mha.core.array_checks import entry, is_array
from flax_mha.core.errors import fail

LINEN, NNX = "flax.linen", "flax.nnx"
_OTHER = {LINEN: "`nnx.with_partitioning` is of", NNX: "`nn.with_partitioning` is of"}
_RIGHT = {LINEN: "nn.with_partitioning", NNX: "nnx.with_partitioning"}


def kind(value: Any) -> str | None:
    """Whose box it is; None = no box. Looked up in the class: an array's attributes are slow."""
    if hasattr(type(value), "unbox"):
        return LINEN
    return NNX if "raw_value" in getattr(type(value), "__dataclass_fields__", ()) else None


def content(value: Any) -> Any:
    """What a box holds, without the constraint that its `unbox` would add."""
    if kind(value) == NNX:
        return value.raw_value
    leaves = jax.tree.leaves(value)
    return leaves[0] if kind(value) == LINEN and len(leaves) == 1 else value


def with_content(value: Any, array: Any) -> Any:
    """The same box around another array; what is no box becomes the array."""
    if kind(value) == NNX:
        return dataclasses.replace(value, raw_value=array)
    return jax.tree.map(lambda _: array, value) if kind(value) == LINEN else array


def names(value: Any) -> Any:
    """The names of the axes: a tuple or a `PartitionSpec`; None where the box has none."""
    if kind(value) == LINEN:
        return getattr(value, "names", None)
    sharding = _sharding(value)
    return getattr(sharding, "spec", sharding)


def has_mesh(value: Any) -> bool:
    """Whether a box, or the sharding in its metadata, comes with a mesh."""
    own = value.metadata.get("mesh") if kind(value) == NNX else getattr(value, "mesh", None)
    return own is not None or hasattr(_sharding(value), "mesh")


def _sharding(value: Any) -> Any:
    """nnx's names, a sharding or the sharding of a format: sharding_names is flax 0.11's key."""
    metadata = value.metadata if kind(value) == NNX else {}
    named = metadata.get("out_sharding", metadata.get("sharding_names"))
    return getattr(named, "sharding", named)


def expect(owner: str, value: Any, where: str) -> None:
    """Refuses the box of the other one of Flax's two module systems."""
    if kind(value) not in (None, owner):
        rule = f"Names of axes for {where} must be those of {owner}."
        evidence = f"{type(value).__name__}: {_OTHER[owner]} {kind(value)}"
        fail(TypeError, rule, evidence, f"Use `{_RIGHT[owner]}`, or `partition_rules`.")


def one_name_an_axis(value: Any, where: str, letters: str, rank: int) -> None:
    """As many names as axes; a `PartitionSpec` may be shorter, JAX leaves the rest whole."""
    named = names(value)
    if named is None:
        return
    rule = f"{where} [{', '.join(letters)}], of rank {rank}, must have one partition name an axis."
    if isinstance(named, str):
        fail(TypeError, rule, f"the string {named!r}", "Pass a tuple of names and Nones.")
    shorter = isinstance(named, PartitionSpec) and len(named) < rank
    if len(named) != rank and not shorter:
        remedy = (
            "One initializer makes all kernels, another all biases: where their ranks differ, "
            "name the axes by `partition_rules`, or by `param_specs`; `PartitionSpec()` fits all."
        )
        fail(ValueError, rule, f"{tuple(named)}", remedy)


def refuse(tree: Any, where: str, depth: int = 2) -> None:
    """Refuses a tree of parameters with what is no array, where they are read: by name.

    That is a list, None, a box, or a quantized kernel, of which a call alone knows what it is.
    """
    if hasattr(tree, "qvalue") or (isinstance(tree, Mapping) and set(tree) == {"value", "scale"}):
        remedy = "Pass `flax_mha.dequantize_params(params)`."
        fail(TypeError, f"{where} must be an array.", "a quantized kernel", remedy)
    if isinstance(tree, Mapping) and depth:
        for name, value in tree.items():
            refuse(value, entry(where, name), depth - 1)
    elif kind(tree) is not None:
        remedy = "Pass `nn.meta.unbox(params)`; `nn` is flax.linen."
        fail(TypeError, f"{where} must be an array.", f"a box, {type(tree).__name__}", remedy)
    elif not is_array(tree):
        remedy = "Pass `jnp.asarray(...)` of it."
        fail(TypeError, f"{where} must be an array.", f"{type(tree).__name__}", remedy)
