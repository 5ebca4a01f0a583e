"""What a flax.linen module sows of a call: the attention scores, and the penalties."""

from typing import Any

import jax.numpy as jnp

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core.typing import ParamsLike
from flax_mha.layer import Activations
from flax_mha.training.losses import activity_loss, regularization_loss


def sow(
    module: Any,
    params: ParamsLike,
    activations: Activations,
    config: MultiHeadAttentionConfig,
    with_scores: bool,
) -> None:
    """The scores go to "intermediates", the penalties, where wanted, to "losses"."""
    if with_scores:
        module.sow("intermediates", "attention_scores", activations.attention_scores)
    if not module.is_initializing() and module.is_mutable_collection("losses"):
        _losses(module, params, activations, config)


def _losses(
    module: Any, params: ParamsLike, activations: Activations, config: MultiHeadAttentionConfig
) -> None:
    """Scalars; parameters shared by two calls count once, activations once a call."""
    if config.kernel_regularizer is not None or config.bias_regularizer is not None:
        penalty = regularization_loss(params, config)
        module.sow("losses", "regularization", penalty, reduce_fn=lambda _, new: new)
    if config.activity_regularizer is not None:
        total: Any = dict(reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(()))
        module.sow("losses", "activity", activity_loss(activations, config), **total)
