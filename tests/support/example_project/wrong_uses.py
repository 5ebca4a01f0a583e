"""Wrong uses, one a line: each that ends in `# wrong` is a checker's to find, and no other is."""

import jax
import jax.numpy as jnp

import flax_mha
from flax_mha import (
    Lora,
    Mask,
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    init_cache,
    init_params,
    multi_head_attention,
)

CONFIG = MultiHeadAttentionConfig(num_heads=2, key_dim=8)
PARAMS = init_params(jax.random.key(0), CONFIG, (2, 6, 32))
X = jnp.ones((2, 6, 32))

multi_head_attention(PARAMS, X, X, config=CONFIG, use_casual_mask=True)  # wrong
multi_head_attention(PARAMS, X, X)  # wrong
multi_head_attention(PARAMS, X, X, config={"num_heads": 2})  # wrong
multi_head_attention(PARAMS, X, X, config=CONFIG, attention_mask="causal")  # wrong
multi_head_attention(PARAMS, X, X, config=CONFIG, return_attention_scores="yes")  # wrong
MultiHeadAttentionConfig(num_heads="two", key_dim=8)  # wrong
MultiHeadAttentionConfig(num_heads=2, key_dims=8)  # wrong
MultiHeadAttention(num_heads=2, key_dims=8)  # wrong
print(CONFIG.num_head)  # wrong
CONFIG.num_heads = 3  # wrong
init_cache(CONFIG, 2)  # wrong
print(init_cache(CONFIG, 2, capacity=4).lengths)  # wrong
print(Mask.causal() & 3)  # wrong
Lora(rank="large")  # wrong
flax_mha.multi_head_atention(PARAMS, X, X)  # wrong
