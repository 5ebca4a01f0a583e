"""What goes wrong on the first day: each mistake meets a whole message, or a rule that is kept."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import normal, x64

import flax_mha.nnx
from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    dot_product_attention,
    init_params,
    multi_head_attention,
)
from flax_mha.interop.torch import mask_from_torch

FAQ = pathlib.Path(__file__).parents[1] / "flax_mha" / "guides" / "errors.md"
B, T, S, D, M, C = 2, 5, 7, 32, 24, 16
CONFIG = MultiHeadAttentionConfig(num_heads=4, key_dim=8, dropout=0.1)
LAYER = MultiHeadAttention.from_config(CONFIG)
INIT_KEY = jax.random.key(0)
X, VALUE, KEY = normal(1, B, T, D), normal(2, B, S, M), normal(3, B, S, C)
SELF = init_params(INIT_KEY, CONFIG, X.shape)
CROSS = init_params(INIT_KEY, CONFIG, X.shape, VALUE.shape, KEY.shape)
VARIABLES = {"params": SELF}
LATER = jnp.where(jnp.tril(jnp.ones((T, T), bool)), 0.0, -jnp.inf)  # what others add to logits
MASK_RULE = "`attention_mask` must be boolean (or integer 0/1), True = may attend."


def attend(x=X, params=SELF, config=CONFIG, **call):
    return multi_head_attention(params, x, x, config=config, **call)


def square(batch):
    """A batch of as many sequences as each is long."""
    return attend(normal(4, batch, batch, D), attention_mask=jnp.ones((batch, batch), bool))


MISTAKES = {
    "an additive mask": (
        lambda: attend(attention_mask=LATER),
        TypeError,
        f"{MASK_RULE} Received: attention_mask of dtype float32. An additive float mask (0 and "
        "-inf) goes to `bias=`; a 0.0/1.0 mask must say what it means: pass `mask > 0.5`.",
    ),
    "an additive mask of integers": (
        lambda: attend(attention_mask=jnp.where(jnp.isinf(LATER), -10000, 0)),
        ValueError,
        f"{MASK_RULE} Received: attention_mask of dtype int32 with values [-10000, 0]. "
        "An additive mask goes to `bias=`, as floats.",
    ),
    "a mask of integers under jit": (
        lambda: jax.jit(lambda mask: attend(value_mask=mask))(jnp.ones((B, T), int)),
        TypeError,
        "`value_mask` must be boolean (or integer 0/1), True = may attend. Received: value_mask "
        "of dtype int32, whose values are hidden under jit and vmap. A mask of 0 and 1: pass "
        "`value_mask.astype(bool)`. An additive mask (0 and -10000), which that would invert, "
        "goes to `bias=`, as floats.",
    ),
    "a padding mask as attention_mask": (
        lambda: attend(attention_mask=jnp.ones((B, T), bool)),
        ValueError,
        "`attention_mask` must broadcast to [B, N, T, S] = (2, 4, 5, 5). Received: shape (2, 5). "
        "A [B, S] padding mask is passed as `value_mask=`.",
    ),
    "a mask of rank 2 where B == T": (
        lambda: square(3),
        ValueError,
        "`attention_mask` of rank 2 is ambiguous where B == T: is it [T, S] or [B, S]? Received: "
        "shape (3, 3) with B = T = 3. Pass `attention_mask[None]` for [T, S], or `value_mask=` "
        "for a [B, S] padding mask.",
    ),
    "a function for a mask": (
        lambda: attend(attention_mask=lambda b, n, t, s: s <= t),
        TypeError,
        "`attention_mask` must be a Mask or booleans; a function becomes one: `Mask.function(f)`. "
        "Received: attention_mask of type function.",
    ),
    "a mask in the place of the key": (
        lambda: multi_head_attention(SELF, X, X, jnp.ones((T, T), bool), config=CONFIG),
        TypeError,
        "`key` must be a floating-point array [..., S, C]. Received: key of dtype bool and shape "
        "(5, 5). Is it a mask? Pass it by its name, such as `attention_mask=`.",
    ),
    "a flag under remat": (
        lambda: nn.remat(MultiHeadAttention)(4, 8).apply(VARIABLES, X, X, training=True),
        TypeError,
        "`training` must be True or False when the call is traced, not data. Received: training "
        "as a traced array of shape (). Make it static: `static_argnames='training'` of "
        "`jax.jit`. Under `nn.remat`: `static_argnums=(8, 9, 10)`, and pass the flags by place.",
    ),
    "no dropout key in linen": (
        lambda: LAYER.apply(VARIABLES, X, X, training=True),
        ValueError,
        "`training=True` with dropout > 0 needs a PRNG key. Received: dropout=0.1, no 'dropout' "
        "rng stream. Pass `rngs={'dropout': jax.random.key(0)}` to `apply`, or set `seed`.",
    ),
    "no dropout key in nnx": (
        lambda: flax_mha.nnx.MultiHeadAttention.from_params(SELF, CONFIG)(X, X, training=True),
        ValueError,
        "Training with dropout > 0 needs a PRNG key. Received: dropout=0.1, no `rngs`. Pass "
        "`rngs=nnx.Rngs(dropout=0)` at construction or in the call, or set `seed`.",
    ),
    "a seed for a dropout key": (
        lambda: attend(dropout_key=0),
        TypeError,
        "`dropout_key` must be one JAX PRNG key. Received: dropout_key=0 of type int. Pass "
        "`dropout_key=jax.random.key(0)`, split anew for every step.",
    ),
    "the order query, key, value": (
        lambda: multi_head_attention(CROSS, X, KEY, VALUE, config=CONFIG),
        ValueError,
        "params['key']['kernel'] must be [C, K, H] = (24, 4, 8) for this config and these inputs. "
        "Received: shape (16, 4, 8). Did you swap value and key? The order of arguments is query, "
        "value, key.",
    ),
    "inputs of other sizes": (
        lambda: attend(X[..., :24]),
        ValueError,
        "params['query']['kernel'] must be [D, N, H] = (24, 4, 8) for this config and these "
        "inputs. Received: shape (32, 4, 8). The parameters were made for inputs of 32 features, "
        "these have 24.",
    ),
    "key_dim of all heads": (
        lambda: attend(config=MultiHeadAttentionConfig(num_heads=4, key_dim=32)),
        ValueError,
        "params['query']['kernel'] must be [D, N, H] = (32, 4, 32) for this config and these "
        "inputs. Received: shape (32, 4, 8). `key_dim` is the size of one head, not of all 4 "
        "together.",
    ),
    "key_dim by division": (
        lambda: MultiHeadAttentionConfig(num_heads=8, key_dim=512 / 8),
        TypeError,
        "`key_dim` must be a positive integer. Received: key_dim=64.0 of type float. Pass 64: `/` "
        "gives a float, `//` an int.",
    ),
    "groups that do not divide": (
        lambda: MultiHeadAttentionConfig(num_heads=8, key_dim=64, num_kv_heads=3),
        ValueError,
        "`num_heads` (N) must be a multiple of `num_kv_heads` (K). Received: num_heads=8, "
        "num_kv_heads=3. Choose `num_kv_heads` among [1, 2, 4, 8].",
    ),
    "token ids": (
        lambda: attend(jnp.ones((B, T), int)),
        TypeError,
        "`query` must be a floating-point array [..., T, D]. Received: query of dtype int32 and "
        "shape (2, 5). Embed token ids first, or cast: `query.astype('float32')`.",
    ),
    "ids of 64 bits": (
        lambda: attend(segment_ids=np.full((B, T), 2**32)),
        ValueError,
        "`segment_ids` must fit int32, for jax_enable_x64=False. Received: segment_ids of dtype "
        "int64 with values [4294967296]. Number them anew: "
        "`numpy.unique(ids, return_inverse=True)`.",
    ),
    "arrays for shapes": (
        lambda: init_params(INIT_KEY, CONFIG, X),
        TypeError,
        "`query_shape` must be a shape (..., features). Received: an array of shape (2, 5, 32). "
        "Pass `query.shape`.",
    ),
    "variables for params": (
        lambda: attend(params=VARIABLES),
        ValueError,
        "`params` must hold ['attention_output', 'key', 'query', 'value']. Received: ['params']. "
        "Pass `variables['params']`.",
    ),
    "float64 without x64": (
        lambda: attend(config=CONFIG.replace(dtype="float64")),
        ValueError,
        "`dtype='float64'` needs JAX's 64-bit mode, else JAX computes in float32. Received: "
        "jax_enable_x64=False. Call `jax.config.update('jax_enable_x64', True)` at start-up.",
    ),
    "heads before the length": (
        lambda: dot_product_attention(*[jnp.ones((B, 4, length, 8)) for length in (T, S, S)]),
        ValueError,
        "N = 5 query heads must be a multiple of K = 7 key/value heads. Received: query "
        "(2, 4, 5, 8), key (2, 4, 7, 8), value (2, 4, 7, 8). Heads stand behind the length: "
        "[B, T, N, H].",
    ),
    "no config": (
        lambda: multi_head_attention(SELF, X, X),
        TypeError,
        "multi_head_attention() missing 1 required keyword-only argument: 'config'",
    ),
    "training for the function": (
        lambda: attend(training=True),
        TypeError,
        "multi_head_attention() got an unexpected keyword argument 'training'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_whole_message(mistake):
    run, error, message = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        run()
    assert str(caught.value) == message


# --- mistakes that no shape and no dtype betrays, and what the rule is ---------------------------


def test_a_mask_of_the_other_polarity_leaves_the_padding_alone():
    """PyTorch's True means masked out; `mask_from_torch` turns it, and nothing else can tell."""
    padded = np.arange(T) >= np.array([[T], [3]])
    right = attend(value_mask=jnp.asarray(~padded))
    turned = attend(**mask_from_torch(key_padding_mask=padded))
    np.testing.assert_array_equal(turned, right)
    wrong = attend(value_mask=jnp.asarray(padded))
    zeros = jnp.zeros((1, T, 4, 8))  # no key is left to the first sequence
    output = SELF["attention_output"]
    np.testing.assert_array_equal(wrong[0], zeros[0, ..., 0, 0, None] + output["bias"][None])
    assert np.abs(wrong - right).max() > 0.1


def test_the_additive_mask_as_a_bias_is_the_causal_mask():
    np.testing.assert_allclose(attend(bias=LATER), attend(use_causal_mask=True), atol=1e-6)


def test_no_dropout_key_is_no_dropout():
    still = attend(config=CONFIG.replace(dropout=0.0))
    np.testing.assert_array_equal(attend(), still)
    np.testing.assert_array_equal(LAYER.apply(VARIABLES, X, X), still)
    assert np.abs(attend(dropout_key=jax.random.key(1)) - still).max() > 0.01


def test_the_order_of_equal_sizes_cannot_be_seen():
    """query, value, key as in Keras: what is called in PyTorch's order must be named."""
    value, key = normal(5, B, S, D), normal(6, B, S, D)
    keras_order = multi_head_attention(SELF, X, value, key, config=CONFIG)
    named = multi_head_attention(SELF, query=X, key=key, value=value, config=CONFIG)
    np.testing.assert_array_equal(named, keras_order)
    swapped = multi_head_attention(SELF, X, key, value, config=CONFIG)
    assert np.abs(swapped - keras_order).max() > 0.1


def test_the_order_in_linen_is_refused_with_the_likely_mistake():
    with pytest.raises(ValueError, match=r"\(24, 4, 8\).*\(16, 4, 8\).*swap value and key"):
        LAYER.apply({"params": CROSS}, X, KEY, VALUE)


def test_float64_input_is_float32_as_everywhere_in_jax():
    wide = np.asarray(X, "float64")
    assert attend(wide).dtype == jnp.float32
    np.testing.assert_array_equal(attend(wide), attend())
    with x64():
        assert attend(wide, config=CONFIG.replace(dtype="float64")).dtype == jnp.float64


def test_key_dim_of_all_heads_is_a_layer_of_that_many_times_the_parameters():
    """512 features and 8 heads: key_dim=64. Keras takes 512 too, and so must this."""
    count = lambda config: sum(x.size for x in jax.tree.leaves(init_params(INIT_KEY, config, (D,))))
    one, all_of_them = (MultiHeadAttentionConfig(4, H, use_bias=False) for H in (8, 32))
    assert count(all_of_them) == 4 * count(one)


def test_an_nnx_layer_with_a_stream_needs_no_rngs_in_the_call():
    layer = flax_mha.nnx.MultiHeadAttention.from_params(SELF, CONFIG, rngs=nnx.Rngs(0))
    assert np.abs(layer(X, X, training=True) - layer(X, X)).max() > 0.01


# --- the guide to errors ------------------------------------------------------------------------


def quoted(page):
    """The rows of the table of errors beside the FAQ: mistake -> message."""
    _, _, rest = page.partition("| the mistake | the message |\n|---|---|\n")
    rows = rest.partition("\n\n")[0].splitlines()
    return dict(row.removeprefix("| ").removesuffix(" |").split(" | ", 1) for row in rows)


def test_the_faq_quotes_every_message():
    assert quoted(FAQ.read_text()) == {m: message for m, (_, _, message) in MISTAKES.items()}


def test_a_message_that_the_faq_misquotes_is_found():
    text = FAQ.read_text()
    changed = text.replace("Did you swap value and key?", "Did you swap key and value?")
    assert changed != text
    assert quoted(changed) != quoted(text)
