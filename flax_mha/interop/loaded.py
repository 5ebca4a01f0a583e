"""What a loader of whole models gives for each attention layer."""

from typing import Any, NamedTuple

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core.typing import Params


class AttentionLayer(NamedTuple):
    """One attention layer of a model: `multi_head_attention(params, x, x, config=config, **call)`.

    Attributes:
        config: the layer.
        params: its parameters, bit for bit the file's.
        call: what every call must pass besides the inputs and their padding, such as
            `{"use_causal_mask": True}`.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=4)
        >>> params = flax_mha.init_params(jax.random.key(0), config, (1, 8))
        >>> layer = AttentionLayer(config, params, {"use_causal_mask": True})
        >>> x = jax.numpy.ones((1, 3, 8))
        >>> flax_mha.multi_head_attention(
        ...     layer.params, x, x, config=layer.config, **layer.call
        ... ).shape
        (1, 3, 8)
    """

    config: MultiHeadAttentionConfig
    params: Params
    call: dict[str, Any]
