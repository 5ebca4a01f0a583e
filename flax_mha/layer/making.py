"""Which way a layer makes its heads."""

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core.typing import ParamsLike
from flax_mha.layer.call import Call
from flax_mha.layer.heads import Heads
from flax_mha.layer.latent import AbsorbedHeads, LatentHeads


def heads_of(
    params: ParamsLike, call: Call, config: MultiHeadAttentionConfig, *, cached: bool = False
) -> Heads:
    """The heads of one call; `cached` are those whose keys a cache takes in, or shows."""
    if config.latent is None:
        return Heads(params, call, config)
    return (AbsorbedHeads if cached else LatentHeads)(params, call, config)
