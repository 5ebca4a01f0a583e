"""Penalties on parameters and activations, as pure functions; Keras's sums exactly."""

from typing import Any

import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import boxes, checks
from flax_mha.core.typing import Array, ParamsLike
from flax_mha.layer import Activations


def regularization_loss(params: ParamsLike, config: MultiHeadAttentionConfig) -> Array:
    """The sum of kernel_regularizer over every kernel and of bias_regularizer over every bias.

    Args:
        params: the layer's parameters.
        config: the layer; without regularizers the loss is 0.

    Returns:
        A scalar in the dtype of the parameters, to be added to the training loss.

    Raises:
        ValueError: an `OrthogonalRegularizer`, which needs a matrix where kernels have rank 3.
        TypeError: parameters in boxes, such as `nn.Partitioned`: pass `nn.meta.unbox(params)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha import MultiHeadAttentionConfig, regularization_loss
        >>> config = MultiHeadAttentionConfig(num_heads=1, key_dim=1, kernel_regularizer="l2")
        >>> ones = {"kernel": jnp.ones((2, 3, 5)), "bias": jnp.ones((3, 5))}
        >>> round(float(regularization_loss({"query": ones}, config)), 6)
        0.3
    """
    checks.mapping("params", params)
    checks.instance("config", config, MultiHeadAttentionConfig)
    boxes.refuse(params, "params")
    checks.floating_params(params)
    regularizers = {"kernel": config.kernel_regularizer, "bias": config.bias_regularizer}
    return _total(
        regularizer(array)
        for projection in params.values()
        for leaf, array in projection.items()
        if (regularizer := regularizers.get(leaf)) is not None
    )


def activity_loss(activations: Activations, config: MultiHeadAttentionConfig) -> Array:
    """activity_regularizer of the projected query, key, value, gate and of the output, each / B.

    Keras regularizes these arrays and not the context, and divides each by the size of its own
    first axis (since 3.14). A call without a batch axis counts as a batch of one.

    Args:
        activations: what `forward` returned.
        config: the layer; without activity_regularizer the loss is 0.

    Returns:
        A scalar, to be added to the training loss.

    Raises:
        ValueError: activations of a call with a cache, which have no projections.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(2, 16, activity_regularizer="l2")
        >>> x = jax.numpy.zeros((4, 8, 32))
        >>> params = flax_mha.init_params(jax.random.key(1), config, x.shape)
        >>> float(flax_mha.activity_loss(flax_mha.forward(params, x, x, config=config), config))
        0.0
    """
    checks.instance("activations", activations, Activations)
    checks.instance("config", config, MultiHeadAttentionConfig)
    regularizer = config.activity_regularizer
    if regularizer is None:
        return _total([])
    if activations.query is None:
        rule = "`activity_loss` needs the projections, which a call with a cache does not return."
        checks.fail(ValueError, rule, "activations.query=None", "Train without a cache.")
    arrays: list[Any] = [activations.query, activations.key, activations.gate, activations.value]
    has_batch = activations.query.ndim > 3
    return _total(
        regularizer(x) / (x.shape[0] if has_batch else 1)
        for x in [*arrays, activations.output]
        if x is not None
    )


def _total(terms: Any) -> Array:
    return sum(terms, start=jnp.zeros((), jnp.result_type(float)))
