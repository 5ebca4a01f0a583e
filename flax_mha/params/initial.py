"""The first values of a layer's parameters, each by its own name."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import boxes, checks, tree_checks
from flax_mha.core.typing import Params, PRNGKey, Shape
from flax_mha.keras.initializers import Initializer
from flax_mha.params.tree import INPUT_RANK, LETTERS, letters, letters_of, param_shapes
from flax_mha.positions.scores import init_params_of


def init_params(
    init_key: PRNGKey,
    config: MultiHeadAttentionConfig,
    query_shape: Shape,
    value_shape: Shape | None = None,
    key_shape: Shape | None = None,
) -> Params:
    """Initial parameters: Keras 3.15's distributions, with fans of the true einsum axes.

    Args:
        init_key: one PRNG key. Initializers with a seed of their own draw from that instead, and
            then give the numbers that Keras gives on JAX.
        config: the layer.
        query_shape: as in `param_shapes`.
        value_shape: as in `param_shapes`.
        key_shape: as in `param_shapes`.

    Returns:
        The tree of `param_shapes`, filled. Each array depends on `init_key` and its own name alone.
        Those of an initializer of `nn.with_partitioning` stand in their boxes, as in linen.

    Raises:
        TypeError: `init_key` is not a PRNG key, an array stands in the place of its shape, or an
            initializer is of `nnx.with_partitioning`, whose metadata only nnx's variables hold.
        ValueError: float64 parameters without JAX's 64-bit mode; partition names of an initializer
            that are not one an axis.

    Example:
        >>> import jax
        >>> from flax_mha import MultiHeadAttentionConfig, init_params
        >>> config = MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> params = init_params(jax.random.key(0), config, (8, 32))
        >>> params["attention_output"]["kernel"].shape
        (2, 16, 32)
    """
    checks.prng_key("init_key", init_key)
    shapes = param_shapes(config, query_shape, value_shape, key_shape)
    return {name: init_projection(init_key, name, shapes[name], config) for name in shapes}


def init_projection(
    init_key: PRNGKey,
    name: str,
    shapes: Any,
    config: MultiHeadAttentionConfig,
    owner: str = boxes.LINEN,
) -> dict[str, Any]:
    """Initial values of one projection: `{"kernel": ..., "bias": ...}` of the given shapes.

    An initializer may return an array, or one in a box of `owner`, which stays.
    """
    checks.x64_enabled("param_dtype", config.param_dtype)
    initializers = {"kernel": config.kernel_initializer, "bias": config.bias_initializer}
    name_key = jax.random.fold_in(init_key, list(LETTERS).index(name))
    leaf_keys = dict(zip(("kernel", "bias"), jax.random.split(name_key)))
    if name == "score":
        return init_params_of(config.score, name_key, shapes)
    if name not in INPUT_RANK:
        norm = config.norms.get(name)
        return {
            leaf: jnp.full(struct.shape, 0 if norm is None else norm.initial(leaf), struct.dtype)
            for leaf, struct in shapes.items()
        }
    values = {
        leaf: _draw(initializers[leaf], leaf_keys[leaf], struct, _fans(name, leaf, struct.shape))
        for leaf, struct in shapes.items()
    }
    for leaf, value in values.items():
        where, rank = f"params[{name!r}][{leaf!r}]", len(shapes[leaf].shape)
        boxes.expect(owner, value, where)
        spelled = letters_of(name, leaf, rank, letters(config))
        boxes.one_name_an_axis(value, where, spelled, rank)
    return values


def _fans(name: str, leaf: str, shape: Shape) -> tuple[int, int] | None:
    """(fan_in, fan_out) of a kernel; a bias follows Keras's rule for any array."""
    rank = INPUT_RANK[name]
    return (math.prod(shape[:rank]), math.prod(shape[rank:])) if leaf == "kernel" else None


def _draw(initializer: Callable[..., Any], key: PRNGKey, struct: Any, fans: Any) -> Any:
    """An array of the given shape, or one in a box that names its axes."""
    if isinstance(initializer, Initializer):
        return initializer(key, struct.shape, struct.dtype, fans=fans)
    values = initializer(key, struct.shape, struct.dtype)
    tree_checks.initial_values(boxes.content(values), struct)
    inner = getattr(initializer, "__wrapped__", None)
    if boxes.kind(values) is not None and isinstance(inner, Initializer):
        # Flax's wrappers hand no fans on: without them a named kernel would have other values.
        return boxes.with_content(values, _draw(inner, key, struct, fans))
    return values
