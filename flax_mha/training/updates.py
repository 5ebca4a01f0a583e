"""Constraints on a layer's parameters: after each optimizer step, by hand or inside optax."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import boxes, checks
from flax_mha.core.quantization import DTYPES
from flax_mha.core.typing import Array, ParamsLike


def apply_constraints(params: ParamsLike, config: MultiHeadAttentionConfig) -> Any:
    """kernel_constraint of every kernel and bias_constraint of every bias.

    Args:
        params: the layer's parameters.
        config: the layer; without constraints the parameters return as they came.

    Returns:
        The tree of `params`, constrained; boxes (`nn.Partitioned`) and nnx's variables stay.

    Raises:
        TypeError: parameters that are no floating-point arrays, or quantized.
        ValueError: a constraint whose `axis` an array does not have.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(2, 16, kernel_constraint="non_neg")
        >>> params = flax_mha.init_params(jax.random.key(0), config, (8, 32))
        >>> float(flax_mha.apply_constraints(params, config)["query"]["kernel"].min())
        0.0
    """
    checks.instance("config", config, MultiHeadAttentionConfig)
    try:
        leaves = jax.tree_util.tree_leaves_with_path(params)
    except ValueError:  # names that cannot be sorted
        boxes.refuse(params, "params")
        raise
    for path, leaf in leaves:
        if not checks.is_array(leaf):
            rule = f"params{jax.tree_util.keystr(path)} must be an array of floats."
            checks.fail(TypeError, rule, f"{type(leaf).__name__}")
    if any(map(_is_quantized, leaves)):
        rule = "A quantized kernel has no constraint: it is not trained."
        checks.fail(TypeError, rule, "quantized parameters", "Constrain them, then quantize.")
    checks.floating_params(params)
    return jax.tree_util.tree_map_with_path(
        lambda path, array: _constraint(config, path)(array), params
    )


def constrain(
    config: MultiHeadAttentionConfig, path: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """An optax transformation after whose update the layer's constraints hold.

    Chain it last: it replaces the updates u of the layer by constraint(params + u) - params.

    Args:
        config: the layer.
        path: the keys that lead from the model's parameters to the layer's; () = they are these.

    Returns:
        A stateless `optax.GradientTransformation`; its update needs `params`.

    Raises:
        ValueError: at update, if `params` is not passed or `path` is not in its tree.

    Example:
        >>> import optax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(2, 16, kernel_constraint="max_norm")
        >>> optimizer = optax.chain(optax.adam(1e-3), flax_mha.constrain(config, ("attention",)))
    """
    checks.instance("config", config, MultiHeadAttentionConfig)
    path = checks.names("path", path)

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> Any:
        if params is None:
            rule = "`constrain` needs the parameters in `optimizer.update(grads, state, params)`."
            checks.fail(ValueError, rule, "params=None")
        _path_exists(params, path)

        def held(key_path: Any, update: Array, array: Array) -> Array:
            if _names(key_path)[: len(path)] != path:
                return update
            return _constraint(config, key_path)(array + update) - array

        return jax.tree_util.tree_map_with_path(held, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _constraint(config: MultiHeadAttentionConfig, key_path: Any) -> Callable[[Array], Array]:
    """What constrains the leaf at the end of a path: a kernel or a bias, in a box too."""
    constraints = {"kernel": config.kernel_constraint, "bias": config.bias_constraint}
    # A box (`nn.Partitioned`, an `nnx.Param`) adds a name, its content's, behind the array's own.
    found = [constraints[name] for name in _names(key_path)[-2:] if name in constraints]
    return (found and found[-1]) or (lambda array: array)


def _is_quantized(leaf: tuple[Any, Array]) -> bool:
    """Whether it is the numbers of a quantized kernel: no kernel in a box has that dtype."""
    path, array = leaf
    return "kernel" in _names(path)[-2:] and array.dtype.name in DTYPES


def _names(key_path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in key_path)


def _path_exists(tree: Any, path: tuple[str, ...]) -> None:
    for depth, name in enumerate(path):
        if name not in tree:
            rule = f"path={path} must lead to the layer's parameters."
            checks.fail(ValueError, rule, f"{sorted(tree)} below {path[:depth]}")
        tree = tree[name]
