"""Weights and built layers of the installed Keras: the same answers, the same bits both ways."""

import re

import jax
import keras
import numpy as np
import pytest
from helpers import (
    D,
    H,
    N,
    S,
    T,
    V,
    assert_close,
    booleans,
    normal,
    open_rows,
    random_params,
    relaxed,
)
from keras_models import (
    MHA,
    VARIANTS,
    MultiHeadAttention,
    answers,
    built_layer,
    numbers,
    ported,
    same_bits,
)

from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_shapes
from flax_mha.interop.keras import from_keras_weights, to_keras_weights

CONFIG = MultiHeadAttentionConfig(num_heads=N, key_dim=H)


# Compiling is what costs: one call of each of Keras's classes by default, and one without biases.
FIRST = ("gated", "bare", "grouped all")
CALLS = [v if v in FIRST else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]


@pytest.mark.slow
@pytest.mark.parametrize("variant", CALLS)
def test_the_layer_gives_the_same_numbers(variant):
    layer, shapes = built_layer(variant)
    query, value = (normal(i, *shape) for i, shape in enumerate(shapes))
    mask = open_rows(booleans(5, 2, T, value.shape[1]))
    config, params = ported(layer)
    ours = multi_head_attention(
        params, query, value, config=config, attention_mask=mask, return_attention_scores=True
    )
    for actual, expected in zip(ours, answers(layer, query, value, attention_mask=mask)):
        assert_close(actual, expected, "float32", variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_round_trip_is_exact_both_ways(variant):
    layer, _ = built_layer(variant)
    other, _ = built_layer(variant, seed=1)
    weights = numbers(layer)
    config, params = ported(layer)
    back = to_keras_weights(params, config)
    same_bits(back, weights)
    with relaxed():
        other.set_weights(back)
    same_bits(numbers(other), weights)
    same_bits(*map(jax.tree.leaves, (ported(other)[1], params)))


@pytest.mark.slow
def test_separate_key_features():
    with relaxed():
        layer = keras.layers.MultiHeadAttention(**MHA, value_dim=V, dropout=0.1, use_gate=True)
        layer.build((2, T, D), (2, S, 19), (2, S, 23))
    query, value, key = normal(0, 2, T, D), normal(1, 2, S, 19), normal(2, 2, S, 23)
    config, params = ported(layer)
    assert params["key"]["kernel"].shape == (23, N, H)
    ours = multi_head_attention(params, query, value, key, config=config)
    assert_close(ours, answers(layer, query, value, key)[0], "float32")


@pytest.mark.slow
def test_the_config_is_the_layers():
    with relaxed():
        layer = keras.layers.MultiHeadAttention(
            **MHA, dropout=0.25, sliding_window=2, kernel_regularizer="l2", dtype="mixed_bfloat16"
        )
        layer.build((2, T, D), (2, S, D))
    config, params = ported(layer)
    expected = CONFIG.replace(
        value_dim=H, dropout=0.25, sliding_window=2, kernel_regularizer="l2", dtype="bfloat16"
    )
    assert config == expected.replace(attention_axes=1)
    assert params["query"]["kernel"].dtype == np.float32
    grouped, _ = built_layer("grouped bare")
    expected = MultiHeadAttentionConfig(6, H, use_bias=False, dropout=0.25)
    expected = expected.replace(num_kv_heads=2, dtype="float32")
    assert ported(grouped)[0] == expected


def test_the_gate_stands_between_key_and_value():
    config = CONFIG.replace(use_gate=True, use_bias=False)
    params = random_params(param_shapes(config, (1, D)), dtype=config.param_dtype)
    names = ["query", "key", "gate", "value", "attention_output"]
    for name, array in zip(names, to_keras_weights(params, config), strict=True):
        assert (array == np.asarray(params[name]["kernel"])).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_kept(dtype):
    config = CONFIG.replace(param_dtype=dtype)
    weights = to_keras_weights(
        random_params(param_shapes(config, (1, D)), dtype=config.param_dtype), config
    )
    same_bits(to_keras_weights(from_keras_weights(weights, config), config), weights)
    assert {str(array.dtype) for array in weights} == {dtype}


def weights_of(**changes):
    config = CONFIG.replace(**changes)
    return to_keras_weights(
        random_params(param_shapes(config, (1, D)), dtype=config.param_dtype), config
    )


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (weights_of(use_bias=False), ValueError, "must be 8 arrays.*'query/kernel'.* 4 arrays"),
        (weights_of(use_gate=True), ValueError, "10 arrays of shapes.*use_gate.*LoRA"),
        (
            weights_of()[::-1],
            ValueError,
            r"\['query'\]\['kernel'\] must be \[D, N, H\] = \(29|\(17",
        ),
        (weights_of(num_heads=2), ValueError, r"\['kernel'\] must be \[D, N, H\] = \(17, 3, 11\)"),
        (
            [np.float32(0)] * 8,
            ValueError,
            r"\['query'\]\['kernel'\] must be \[D, N, H\] = \(0, 3, 11",
        ),
        ([x.astype("int8") for x in weights_of()], TypeError, "`query/kernel`.*int8.*quantized"),
        ([x.astype("float64") for x in weights_of()], ValueError, "needs JAX's 64-bit mode"),
    ],
)
def test_weights_that_do_not_fit(weights, error, message):
    with pytest.raises(error, match=message):
        from_keras_weights(weights, CONFIG)


def test_parameters_that_do_not_fit():
    params = random_params(param_shapes(CONFIG, (1, D)))
    with pytest.raises(ValueError, match=r"`params` must hold .*'gate'"):
        to_keras_weights(params, CONFIG.replace(use_gate=True))
    for nothing in ({}, {"query": None}, {"query": {"kernel": 1}}):
        with pytest.raises(ValueError, match="`params` must hold"):
            to_keras_weights(nothing, CONFIG)
    with pytest.raises(TypeError, match="`params` must be a mapping"):
        to_keras_weights(None, CONFIG)
    with pytest.raises(TypeError, match="`config` must be a MultiHeadAttentionConfig"):
        to_keras_weights(params, {"num_heads": N})


def refused_layer(kind):
    with relaxed():
        if kind == "not built":
            return keras.layers.MultiHeadAttention(**MHA, name="raw")
        if kind == "derived":
            return MultiHeadAttention(**MHA)
        if kind == "activity":
            arguments = VARIANTS["grouped"][1]
            layer = keras.layers.GroupQueryAttention(**arguments, activity_regularizer="l2")
        else:
            layer = keras.layers.MultiHeadAttention(**MHA)
        layer.build((2, T, D), (2, T, D))
        if kind == "adapters":
            layer.query_dense.enable_lora(2)
        if kind == "quantized":
            layer.query_dense.quantize("float8")
    return layer


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("not built", ValueError, "must be built.*'raw'.*layer.build"),
        ("derived", TypeError, re.escape("keras_models.MultiHeadAttention. A derived class may")),
        ("activity", ValueError, "GroupQueryAttention counts the `activity_regularizer`.*twice"),
        ("adapters", ValueError, "'apart' or 'merged'.*adapters of .'query'"),
        ("quantized", ValueError, "a mode that is known: int8, int4.*'float8'"),
    ],
)
def test_layers_that_are_refused(kind, error, message):
    layer = refused_layer(kind)
    with pytest.raises(error, match=message):
        ported(layer)


def test_another_layer_is_refused():
    with pytest.raises(TypeError, match=r"GroupQueryAttention\. Received: keras.*Dense"):
        ported(keras.layers.Dense(3))
