"""The switches by which people look for a fault of their own: the layer raises none of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, normal
from thinning import half

from flax_mha import (
    Mask,
    MultiHeadAttentionConfig,
    dot_product_attention,
    init_params,
    multi_head_attention,
)

T = 40


def real(T):
    return jnp.arange(T)[None] < jnp.array([[T], [5]])


MASKS = {
    "value_mask": lambda T: {"value_mask": real(T)},
    "query_mask": lambda T: {"query_mask": real(T)},
    "segment_ids": lambda T: {"segment_ids": real(T).astype("int32")},
    "causal": lambda T: {"use_causal_mask": True},
}
FEATURES = {
    "plain": {},
    "norm": {"qk_norm": "rms"},
    "rotary, sinks, gate": {"position": "rotary", "use_sinks": True, "use_gate": True},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("feature", "mask", "size"),
    [
        pytest.param(*row, marks=pytest.mark.slow if row[-1] == 100 else ())
        for row in half(FEATURES, MASKS, (8, 100))
    ],
)
def test_debug_nans_without_jit_finds_nothing_in_finite_numbers(feature, mask, size):
    config = MultiHeadAttentionConfig(num_heads=2, key_dim=4, **FEATURES[feature])
    x = normal(0, 2, size, 8)
    params = init_params(jax.random.key(1), config, x.shape)
    call = MASKS[mask](size)
    loss = lambda params: multi_head_attention(params, x, x, config=config, **call).sum()
    expected = jax.grad(loss)(params)
    with jax.debug_nans(True), jax.disable_jit():
        gradient = jax.grad(loss)(params)
    assert_trees_close(gradient, expected, "float32")


def test_debug_nans_still_finds_a_nan():
    x = normal(0, 2, 16, 8).at[0, 3].set(jnp.nan)
    config = MultiHeadAttentionConfig(num_heads=2, key_dim=4)
    params = init_params(jax.random.key(1), config, x.shape)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        multi_head_attention(params, x, x, config=config)


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": 9},
    "padding": {"mask": Mask.padding(key=np.arange(T)[None] < 21)},
    "bias": {"bias": np.float32(np.arange(T) % 7)[None]},
    "dropout": {"dropout_rate": 0.3, "dropout_key": jax.random.key(5)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_without_jit(name):
    """`jax.disable_jit`: what compiled loops do, Python's do."""
    x = normal(0, 1, T, 2, 4)
    call = {**CALLS[name], "block_sizes": (16, 24), "implementation": "blockwise"}
    loss = lambda x: (dot_product_attention(x, x, x, **call) ** 2).sum()
    expected = jax.value_and_grad(loss)(x)
    with jax.disable_jit():
        result = jax.value_and_grad(loss)(x)
    assert_close(result[0], expected[0], "float32")
    assert_close(result[1], expected[1], "float32")


@pytest.mark.parametrize("size", [16, 128])
def test_debug_key_reuse_finds_one_use_of_a_dropout_key(size):
    config = MultiHeadAttentionConfig(num_heads=2, key_dim=4, dropout=0.1)
    x = normal(0, 2, size, 8)
    params = init_params(jax.random.key(1), config, x.shape)

    def loss(params, dropout_key):
        return multi_head_attention(params, x, x, config=config, dropout_key=dropout_key).sum()

    with jax.debug_key_reuse(True):
        jax.grad(loss)(params, jax.random.key(2))
        key = jax.random.key(3)
        jax.grad(loss)(params, key)
        with pytest.raises(Exception, match=r"consumed|reuse") as refused:
            jax.grad(loss)(params, key)  # a step with the key of the step before
    assert type(refused.value).__name__ == "KeyReuseError"
