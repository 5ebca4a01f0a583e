"""Initial values in boxes that name their axes, as a module of Flax keeps them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import boxes, checks
from flax_mha.core.typing import PRNGKey
from flax_mha.params.initial import init_projection
from flax_mha.sharding.meshes import mesh_sizes, placed
from flax_mha.sharding.rules import Rules, checked
from flax_mha.sharding.specs import projection_specs


class Boxes(NamedTuple):
    """What a module system of Flax has: its name, `box(array, names)`, and names to mesh axes."""

    owner: str
    box: Callable[[Any, Any], Any]
    mesh_axes: Callable[[Any, Any], Any] | None = None


def rules_of_a_field(rules: Any) -> Rules | None:
    """The rules of a module, checked when it is made, and hashable, for linen hashes its fields."""
    return None if rules is None else checked(rules)


def init_boxed(
    init_key: PRNGKey,
    name: str,
    shapes: Mapping[str, Any],
    config: MultiHeadAttentionConfig,
    rules: Any,
    of: Boxes,
) -> dict[str, Any]:
    """`init_projection`, each array in a box by the rules; without rules as initializers made it.

    What a box names lies there on an explicit mesh: Flax's `unbox` asserts it.
    """
    values = init_projection(init_key, name, shapes, config, of.owner)
    if rules is None:
        return {leaf: _placed_box(value, of) for leaf, value in values.items()}
    specs = projection_specs(name, shapes, config, checked(rules), mesh_sizes())
    for leaf, value in values.items():
        _named_once(f"params[{name!r}][{leaf!r}]", value)
    return {leaf: of.box(placed(values[leaf], specs[leaf]), tuple(specs[leaf])) for leaf in values}


def _placed_box(value: Any, of: Boxes) -> Any:
    """A box of an initializer, its array where the names say; nnx's places its own."""
    if of.mesh_axes is None or boxes.names(value) is None:
        return value
    # Logical names become mesh axes by the rules of the box, or by those in force.
    is_logical = hasattr(value, "rules")
    spec = of.mesh_axes(value.names, value.rules) if is_logical else value.get_partition_spec()
    return boxes.with_content(value, placed(boxes.content(value), spec))


def _named_once(where: str, value: Any) -> None:
    if boxes.kind(value) is not None:
        rule = f"The axes of {where} must be named once."
        evidence = f"`partition_rules`, and an initializer that names {boxes.names(value)}"
        remedy = "Leave the names of the initializer out: the rules know each array's axes."
        checks.fail(ValueError, rule, evidence, remedy)


def places_nowhere(value: Any) -> bool:
    """Whether nnx's metadata name axes and there is no mesh, theirs or an ambient one."""
    ambient = jax.sharding.get_abstract_mesh()
    return boxes.kind(value) == boxes.NNX and ambient.empty and not boxes.has_mesh(value)
