"""Flags are static booleans: 0 and 1 are taken as such, and a traced one is told what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import D, assert_close, normal, random_params

import flax_mha.nnx
from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    attention_scores,
    dot_product_attention,
    forward,
    multi_head_attention,
    param_shapes,
)

CONFIG = MultiHeadAttentionConfig(num_heads=3, key_dim=4, dropout=0.5, seed=0)
X, HEADS, ROWS = normal(1, 2, 5, D), normal(2, 2, 5, 3, 4), jnp.array([1])
PARAMS = random_params(param_shapes(CONFIG, X.shape))
VARIABLES = {"params": PARAMS}
LINEN = MultiHeadAttention.from_config(CONFIG)
NNX = flax_mha.nnx.MultiHeadAttention.from_params(PARAMS, CONFIG)


def heads(**flags):
    return dot_product_attention(HEADS, HEADS, HEADS, **flags)


FLAGS = {
    "function causal": lambda f: multi_head_attention(
        PARAMS, X, X, config=CONFIG, use_causal_mask=f
    ),
    "function scores": lambda f: multi_head_attention(
        PARAMS, X, X, config=CONFIG, return_attention_scores=f
    ),
    "forward": lambda f: forward(PARAMS, X, X, config=CONFIG, use_causal_mask=f).output,
    "rows": lambda f: attention_scores(
        PARAMS, X, X, config=CONFIG, query_rows=ROWS, use_causal_mask=f
    ),
    "linen causal": lambda f: LINEN.apply(VARIABLES, X, X, use_causal_mask=f),
    "linen scores": lambda f: LINEN.apply(VARIABLES, X, X, return_attention_scores=f),
    "linen training": lambda f: LINEN.apply(VARIABLES, X, X, training=f),
    "nnx causal": lambda f: NNX(X, X, use_causal_mask=f),
    "nnx scores": lambda f: NNX(X, X, return_attention_scores=f),
    "nnx training": lambda f: NNX(X, X, training=f, rngs=nnx.Rngs(0)),
    "heads causal": lambda f: heads(is_causal=f),
    "heads weights": lambda f: heads(return_weights=f),
}


@pytest.mark.parametrize("way", FLAGS)
def test_zero_and_one_are_false_and_true(way):
    run = FLAGS[way]
    for flag, ones in ((False, (0, np.False_, np.int64(0))), (True, (1, np.True_))):
        expected = run(flag)
        for one in ones:
            jax.tree.map(np.testing.assert_array_equal, run(one), expected)
    for wrong, error in ((2, ValueError), (-1, ValueError), ("no", TypeError), (1.0, TypeError),
                         (jnp.array(True), TypeError), (np.array(True), TypeError)):  # fmt: skip
        with pytest.raises(error, match="must be True or False"):
            run(wrong)


def test_fields_of_configs_are_booleans_too():
    ones = MultiHeadAttentionConfig(3, 4, use_bias=0, use_gate=np.True_, use_sinks=1)
    plain = MultiHeadAttentionConfig(3, 4, use_bias=False, use_gate=True, use_sinks=True)
    assert ones == plain
    assert hash(ones) == hash(plain)
    assert (ones.use_bias, ones.use_gate, ones.use_sinks) == (False, True, True)
    assert type(ones.use_bias) is type(ones.use_sinks) is bool


@pytest.mark.parametrize("way", FLAGS)
def test_a_traced_flag_is_named(way):
    message = r"must be True or False when the call is traced.*static_argnames='\w+'` of `jax.jit`"
    with pytest.raises(TypeError, match=message) as caught:
        jax.eval_shape(FLAGS[way], True)
    assert ("static_argnums=(8, 9, 10)" in str(caught.value)) == way.startswith("linen")


FLAG_NAMES = ("return_attention_scores", "training", "use_causal_mask")


def advice():
    """The places that the message of a flag under `nn.remat` names."""
    module = nn.remat(MultiHeadAttention)(3, 4)
    with pytest.raises(TypeError) as caught:
        module.init(jax.random.key(0), X, X, use_causal_mask=True)
    places = str(caught.value).partition("static_argnums=(")[2].partition(")")[0]
    return tuple(int(place) for place in places.split(", "))


@pytest.mark.parametrize("flag", FLAG_NAMES)
def test_the_advice_for_remat_works(flag):
    module = nn.remat(MultiHeadAttention, static_argnums=advice())(3, 4, dropout=0.5, seed=0)
    given = [name == flag for name in FLAG_NAMES]
    results = module.apply(VARIABLES, X, X, None, None, None, None, None, *given)
    expected = LINEN.apply(VARIABLES, X, X, **{flag: True})
    jax.tree.map(lambda ours, plain: assert_close(ours, plain, "float32"), results, expected)


def test_the_advice_for_jit_works():
    run = jax.jit(LINEN.apply, static_argnames=FLAG_NAMES)
    for flag in FLAG_NAMES:
        results, expected = (f(VARIABLES, X, X, **{flag: True}) for f in (run, LINEN.apply))
        jax.tree.map(lambda ours, plain: assert_close(ours, plain, "float32"), results, expected)


def test_nnx_view_takes_a_flag():
    layer = flax_mha.nnx.MultiHeadAttention.from_params(PARAMS, CONFIG)
    layer.set_view(deterministic=0)
    assert layer.deterministic is False
    with pytest.raises(ValueError, match="`deterministic` must be True or False"):
        layer.set_view(deterministic=2)
