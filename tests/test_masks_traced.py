"""Masks whose values tracing hides: nothing is guessed, so an additive one is never inverted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import D, assert_close, normal, random_params

import flax_mha.nnx
from flax_mha import (
    Mask,
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    attention_scores,
    dot_product_attention,
    forward,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
)
from flax_mha.interop import jax_nn
from flax_mha.interop.flax import attention_fn

B, L = 2, 6
CONFIG = MultiHeadAttentionConfig(num_heads=3, key_dim=4)
X, HEADS = normal(1, B, L, D), normal(2, B, L, 3, 4)
PARAMS = random_params(param_shapes(CONFIG, X.shape))
LINEN = MultiHeadAttention.from_config(CONFIG)
NNX = flax_mha.nnx.MultiHeadAttention.from_params(PARAMS, CONFIG)
REAL = jnp.asarray(np.arange(L) < np.array([[L], [4]]))
ROWS = jnp.array([0, 5])


def masked(**parts):
    return dot_product_attention(HEADS, HEADS, HEADS, mask=Mask.padding(**parts))


def over_keys(mask):
    return mask[:, None, None, :]


WAYS = {
    "value_mask": lambda m: multi_head_attention(PARAMS, X, X, config=CONFIG, value_mask=m),
    "key_mask": lambda m: multi_head_attention(PARAMS, X, X, config=CONFIG, key_mask=m),
    "query_mask": lambda m: forward(PARAMS, X, X, config=CONFIG, query_mask=m).output,
    "attention_mask": lambda m: NNX(X, X, attention_mask=m[:, None]),
    "linen": lambda m: LINEN.apply({"params": PARAMS}, X, X, value_mask=m),
    "nnx": lambda m: NNX(X, X, key_mask=m),
    "scores": lambda m: attention_scores(
        PARAMS, X, X, config=CONFIG, query_rows=ROWS, value_mask=m
    ),
    "cross cache": lambda m: init_cross_cache(PARAMS, X, config=CONFIG, value_mask=m).mask,
    "mask": lambda m: dot_product_attention(HEADS, HEADS, HEADS, mask=over_keys(m)),
    "Mask.padding key": lambda m: masked(key=m),
    "Mask.padding query": lambda m: masked(query=m),
    "Mask.dense": lambda m: dot_product_attention(
        HEADS, HEADS, HEADS, mask=Mask.dense(over_keys(m))
    ),
    "attention_fn": lambda m: attention_fn(HEADS, HEADS, HEADS, mask=over_keys(m)),
    "jax_nn": lambda m: jax_nn.dot_product_attention(HEADS, HEADS, HEADS, mask=over_keys(m)),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_integers_with_a_sign_are_refused_where_their_values_are_hidden(way):
    additive = jnp.where(REAL, 0, -10000)
    message = r"must be boolean.*int32, whose values are hidden.*astype\(bool\).*`bias=`"
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(WAYS[way], additive)
    with pytest.raises(ValueError, match=r"values \[-10000, 0\].*`bias=`"):
        WAYS[way](additive)
    expected = WAYS[way](REAL)
    assert_close(WAYS[way](REAL.astype("int32")), expected, "float32")
    remedied = jax.jit(lambda mask: WAYS[way](mask.astype(bool)))
    assert_close(remedied(REAL.astype("int32")), expected, "float32")


def over_heads(mask):
    return WAYS["mask"](mask)


@pytest.mark.parametrize("dtype", ["int4", "int8", "int16", "int32"])
def test_no_width_of_a_signed_integer_is_safe(dtype):
    ones = REAL.astype(dtype)
    assert_close(over_heads(ones), over_heads(REAL), "float32")  # seen: 0 and 1
    with pytest.raises(TypeError, match=rf"dtype {dtype}, whose values are hidden"):
        jax.eval_shape(over_heads, ones)


@pytest.mark.parametrize("dtype", ["bool", "uint4", "uint8", "uint16", "uint32"])
def test_what_holds_no_negative_number_is_taken(dtype):
    ones, run = REAL.astype(dtype), jax.jit(over_heads)
    assert_close(over_heads(ones), over_heads(REAL), "float32")
    assert_close(run(ones), over_heads(REAL), "float32")
    if dtype == "uint8":  # an image's mask: any other number than 0 is True
        assert_close(run(255 * ones), over_heads(REAL), "float32")


def test_lists_of_booleans_are_seen():
    for mask in (REAL.tolist(), REAL.astype(int).tolist()):
        given = multi_head_attention(PARAMS, X, X, config=CONFIG, value_mask=mask)
        assert_close(given, WAYS["value_mask"](REAL), "float32")


def test_other_transformations_hide_values_too():
    ones = REAL.astype("int32")
    for hidden in (
        lambda: jax.vmap(over_heads)(jnp.stack([ones, ones])),
        lambda: jax.lax.map(over_heads, jnp.stack([ones, ones])),
        lambda: nn.remat(MultiHeadAttention)(3, 4).init(jax.random.key(0), X, X, value_mask=ones),
    ):
        with pytest.raises(TypeError, match="values are hidden"):
            hidden()


def test_numpy_is_seen_under_jit_too():
    """A NumPy array inside a compiled function is a constant: its values are checked."""
    ones = np.asarray(REAL).astype(np.int64)
    constant = jax.jit(lambda x: x + WAYS["value_mask"](ones))
    assert_close(constant(0.0), WAYS["value_mask"](REAL), "float32")
    with pytest.raises(ValueError, match=r"values \[-3, 0\]"):
        jax.eval_shape(lambda x: x + WAYS["value_mask"](-3 * ones), 0.0)


@pytest.mark.parametrize("wrong", [1, True, "causal", {"mask": REAL}, jnp.ones((), bool)], ids=str)
def test_what_is_no_mask_is_refused_by_name(wrong):
    """Of rank 0, an array is one answer for all pairs: the layer has no such shape."""
    with pytest.raises((TypeError, ValueError), match=r"`value_mask` must "):
        multi_head_attention(PARAMS, X, X, config=CONFIG, value_mask=wrong)
    if not isinstance(wrong, jax.Array):
        with pytest.raises(TypeError, match=r"`mask` must be boolean"):
            dot_product_attention(HEADS, HEADS, HEADS, mask=wrong)
