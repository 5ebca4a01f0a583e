"""A decoding step as it is handed to the compilers of accelerators: nothing writes down a cache."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

from flax_mha import MultiHeadAttentionConfig, init_cache, init_params, multi_head_attention

B, S, N, K, H, D = 2, 1024, 8, 2, 64, 32


def largest(step, platform, *args):
    """{dtype: the most entries that an array of the program has}, but of the update's own."""
    text = export.export(jax.jit(step), platforms=[platform])(*args).mlir_module()
    found = {}
    for shape, dtype in re.findall(r"tensor<((?:\d+x)+)(\w+)>", text):
        entries = math.prod(int(n) for n in shape.split("x") if n)
        found[dtype] = max(found.get(dtype, 0), entries)
    return found


def arguments():
    config = MultiHeadAttentionConfig(N, H, num_kv_heads=K, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((B, 1, D), jnp.bfloat16)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config, x.shape))
    return config, params, x, jax.eval_shape(lambda: init_cache(config, B, S, "bfloat16"))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_no_cache_is_repeated_for_its_heads_or_widened(platform):
    config, *args = arguments()

    def step(params, x, cache):
        call = dict(config=config, cache=cache, use_causal_mask=True)
        return multi_head_attention(params, x, x, **call)

    found = largest(step, platform, *args)
    assert found["bf16"] == B * K * S * H  # the cache's own arrays
    assert found["f32"] <= max(B * N * S, N * H * D)  # logits; kernels


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_repeated_and_a_widened_cache_would_show(platform):
    """The control."""
    _, _, _, cache = arguments()
    repeated = lambda cache: jnp.repeat(cache.key, N // K, axis=1)
    widened = lambda cache: cache.key.astype("float32") + 1
    assert largest(repeated, platform, cache)["bf16"] == B * N * S * H
    assert largest(widened, platform, cache)["f32"] == B * K * S * H
