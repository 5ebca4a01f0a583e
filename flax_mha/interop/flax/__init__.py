"""Inside flax's own modules (`attention_fn`), and the weights of its attention layers, in and out.

attention_fn                       for attention_fn= of flax.linen's and flax.nnx's modules
from_flax_params, to_flax_params   a parameter dict of flax.linen (from_: of flax.nnx too)
from_linen_module                  config and parameters of a flax.linen attention layer
from_nnx_module, to_nnx_state      config and parameters of an nnx.MultiHeadAttention

Guides: `python -m flax_mha guide drop_ins` and `porting`.
"""

from flax_mha.interop.flax.attention import attention_fn as attention_fn
from flax_mha.interop.flax.modules import from_linen_module as from_linen_module
from flax_mha.interop.flax.modules import from_nnx_module as from_nnx_module
from flax_mha.interop.flax.weights import from_flax_params as from_flax_params
from flax_mha.interop.flax.weights import to_flax_params as to_flax_params
from flax_mha.interop.flax.weights import to_nnx_state as to_nnx_state
