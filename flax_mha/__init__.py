"""Keras's MultiHeadAttention for JAX and Flax: a pure function and two thin modules.

Start with `MultiHeadAttention` (flax.linen), with `flax_mha.nnx.MultiHeadAttention` (flax.nnx; this
submodule is imported by name), or with `MultiHeadAttentionConfig`, `init_params` and
`multi_head_attention` (pure functions). `explain` says which implementation serves a call, and
`python -m flax_mha` lists everything there is.
"""

from flax_mha.attention import IMPLEMENTATIONS as IMPLEMENTATIONS
from flax_mha.attention import ContextAxis as ContextAxis
from flax_mha.attention import context_parallel_attention as context_parallel_attention
from flax_mha.attention import dot_product_attention as dot_product_attention
from flax_mha.attention import explain as explain
from flax_mha.attention import zigzag_inverse as zigzag_inverse
from flax_mha.attention import zigzag_order as zigzag_order
from flax_mha.config import Latent as Latent
from flax_mha.config import Lora as Lora
from flax_mha.config import MultiHeadAttentionConfig as MultiHeadAttentionConfig
from flax_mha.decoding import init_cache as init_cache
from flax_mha.decoding import init_cross_cache as init_cross_cache
from flax_mha.functional import forward as forward
from flax_mha.functional import multi_head_attention as multi_head_attention
from flax_mha.layer import Activations as Activations
from flax_mha.layer import CrossCache as CrossCache
from flax_mha.layer import KVCache as KVCache
from flax_mha.linen import MultiHeadAttention as MultiHeadAttention
from flax_mha.masks import BlockMask as BlockMask
from flax_mha.masks import Mask as Mask
from flax_mha.masks import Neighborhood as Neighborhood
from flax_mha.masks import block_mask as block_mask
from flax_mha.params import dequantize_params as dequantize_params
from flax_mha.params import init_params as init_params
from flax_mha.params import lora_params as lora_params
from flax_mha.params import merge_lora as merge_lora
from flax_mha.params import param_shapes as param_shapes
from flax_mha.params import quantize_params as quantize_params
from flax_mha.params import split_lora as split_lora
from flax_mha.scores import attention_scores as attention_scores
from flax_mha.sharding import param_axes as param_axes
from flax_mha.sharding import param_specs as param_specs
from flax_mha.training import activity_loss as activity_loss
from flax_mha.training import apply_constraints as apply_constraints
from flax_mha.training import constrain as constrain
from flax_mha.training import regularization_loss as regularization_loss

__version__ = "0.1.0"  # pyproject.toml reads it here, so that a copy of the folder has it too
