"""Names and partition specs of every parameter, made from the letters of `params.LETTERS`."""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.typing import Params, ParamsLike, Shape
from flax_mha.params.tree import letters, letters_of, param_shapes
from flax_mha.sharding.meshes import mesh_sizes
from flax_mha.sharding.resolve import Axis, check_mesh_axes, resolve, with_kv_heads
from flax_mha.sharding.rules import AXIS_NAMES, Rules, checked

# Features that are not given: every mesh axis divides 0, so nothing is refused for them.
_UNKNOWN = (0,)


def param_axes(config: MultiHeadAttentionConfig) -> Params:
    """The names of the parameters' axes, as MaxText and Flax write them.

        D, C, M, E "embed"   N "heads"   K "kv_heads"   H, V, U, W "head_dim"
        L "kv_lora"   Q "q_lora"   X "relpos_buckets"

    Args:
        config: the layer.

    Returns:
        A tree as that of `param_shapes`, of `PartitionSpec`s of names: what `nn.logical_to_mesh`
        and `nn.logical_to_mesh_sharding` of flax.linen take. Of an `output_shape` of several axes
        the first is "embed", the others are None.

    Raises:
        TypeError: what is no config, such as a module: pass its `config`.

    Example:
        >>> from flax_mha import MultiHeadAttentionConfig, param_axes
        >>> axes = param_axes(MultiHeadAttentionConfig(num_heads=2, key_dim=16))
        >>> tuple(axes["query"]["kernel"]), tuple(axes["attention_output"]["bias"])
        (('embed', 'heads', 'head_dim'), ('embed',))
    """
    checks.instance("config", config, MultiHeadAttentionConfig)

    def names(name: str, leaf: str, struct: Any) -> PartitionSpec:
        spelled = [axis.letter for axis in _axes(name, leaf, struct, config)]
        return PartitionSpec(*(AXIS_NAMES.get(letter) for letter in spelled))

    return _over_arrays(names, param_shapes(config, _UNKNOWN))


def param_specs(
    config: MultiHeadAttentionConfig,
    rules: Any,
    *,
    query_shape: Shape | None = None,
    value_shape: Shape | None = None,
    key_shape: Shape | None = None,
    mesh: Any = None,
) -> Params:
    """A `jax.sharding.PartitionSpec` for every parameter, from rules for its axes.

    Args:
        config: the layer.
        rules: from axes to mesh axes, as a mapping, or as Flax's sequence of pairs. A key is a
            letter ("N") or a name: "embed" (D, C, M, E), "heads" (N), "kv_heads" (K), "head_dim"
            (H, V, U, W), "kv_lora" (L), "q_lora" (Q), "relpos_buckets" (X). A value is the name of
            a mesh axis, a tuple of names, or None. An axis without a rule stays whole. In a mapping
            a letter goes before a name. Among pairs the first one whose mesh axes are free in the
            array counts, as in `nn.logical_to_mesh`, and names that no parameter has are another
            layer's.
        query_shape: as in `param_shapes`; None = D is not known, and not checked.
        value_shape: as in `param_shapes`; None = query_shape.
        key_shape: as in `param_shapes`; None = value_shape.
        mesh: the mesh, whose axes must exist and divide the sizes; None = that of `jax.set_mesh`.
            Where there is neither, nothing is checked.

    Returns:
        A tree as that of `param_shapes`. Without a rule of its own, K follows N: where N's mesh
        axes divide it, or, if no mesh is known, where K = N; else the heads of key and value stay
        whole. Of an `output_shape` of several axes the rule for E shards the first.

    Raises:
        ValueError: a mesh axis that does not exist, or does not divide a size; one that stands
            twice in an array; in a mapping, an unknown key.
        TypeError: a config, rules or a mesh of another type.

    Guide: `python -m flax_mha guide sharding`.

    Example:
        >>> from flax_mha import MultiHeadAttentionConfig, param_specs
        >>> config = MultiHeadAttentionConfig(num_heads=8, key_dim=16)
        >>> specs = param_specs(config, {"heads": "model", "embed": "fsdp"})
        >>> tuple(specs["query"]["kernel"]), tuple(specs["attention_output"]["kernel"])
        (('fsdp', 'model', None), ('model', None, 'fsdp'))
    """
    checks.instance("config", config, MultiHeadAttentionConfig)
    query_shape = _UNKNOWN if query_shape is None else query_shape
    shapes: ParamsLike = param_shapes(config, query_shape, value_shape, key_shape)
    sizes = mesh_sizes(mesh)
    pairs = checked(rules)
    return {name: projection_specs(name, shapes[name], config, pairs, sizes) for name in shapes}


def projection_specs(
    name: str,
    shapes: Mapping[str, Any],
    config: MultiHeadAttentionConfig,
    rules: Rules,
    mesh: Mapping[str, int] | None,
) -> dict[str, PartitionSpec]:
    """The specs of one projection's arrays; `mesh` holds sizes, None = unknown."""
    check_mesh_axes(rules, mesh)
    rules = with_kv_heads(rules, config.dims, mesh)
    return {
        leaf: resolve(f"params[{name!r}][{leaf!r}]", _axes(name, leaf, struct, config), rules, mesh)
        for leaf, struct in shapes.items()
    }


def _axes(name: str, leaf: str, struct: Any, config: MultiHeadAttentionConfig) -> list[Axis]:
    """The axes of an array; those of `output_shape` behind its first have no letter to be named."""
    spelled = letters_of(name, leaf, len(struct.shape), letters(config))
    first = [letter if letter not in spelled[:i] else "" for i, letter in enumerate(spelled)]
    return [Axis(*axis) for axis in zip(first, struct.shape)]


def _over_arrays(function: Any, shapes: Any) -> Params:
    return {
        name: {leaf: function(name, leaf, struct) for leaf, struct in leaves.items()}
        for name, leaves in shapes.items()
    }
