"""Inside flax's own modules: `attention_fn` for flax.linen and flax.nnx attention layers."""

from flax_mha.interop._flax_attention import attention_fn as attention_fn
