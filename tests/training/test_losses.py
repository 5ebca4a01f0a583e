"""Penalties of the whole layer are the sums that Keras collects in `layer.losses`."""

import jax
import jax.numpy as jnp
import pytest
from helpers import B, C, D, H, M, N, S, T, V, assert_close, normal, random_params, relaxed
from keras_bridge import keras_layer, set_weights

from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    activity_loss,
    forward,
    init_cache,
    param_shapes,
    regularization_loss,
)

SHAPES = ((B, T, D), (B, S, M), (B, S, C))
L1 = {"class_name": "L1", "config": {"l1": 0.25}}
L1L2 = {"class_name": "L1L2", "config": {"l1": 0.5, "l2": 0.25}}


def pair(**arguments):
    """Our config, Keras's layer and the parameters of both."""
    arguments = {"num_heads": N, "key_dim": H, "value_dim": V, **arguments}
    config = MultiHeadAttentionConfig(**arguments)
    params = random_params(param_shapes(config, *SHAPES))
    layer = keras_layer(arguments, SHAPES)
    set_weights(layer, params)
    return config, layer, params, [normal(i, *shape) for i, shape in enumerate(SHAPES)]


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    "regularizers",
    [
        {"kernel_regularizer": "l2"},
        {"bias_regularizer": L1},
        {"kernel_regularizer": L1L2, "bias_regularizer": "l2", "use_gate": True},
    ],
    ids=str,
)
def test_regularization_is_keras_s_sum(regularizers, use_bias):
    config, layer, params, _ = pair(use_bias=use_bias, **regularizers)
    with relaxed():
        expected = sum(layer.losses, start=0.0)
    assert (expected > 0) == (use_bias or "kernel_regularizer" in regularizers)
    assert_close(regularization_loss(params, config), expected, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"use_gate": True}, {"output_shape": (3, 2)}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_activity_is_keras_s_sum(arguments, masked):
    config, layer, params, (query, value, key) = pair(activity_regularizer=L1, **arguments)
    masks = {"value_mask": jnp.arange(S)[None] < jnp.array([[3], [7]])} if masked else {}
    with relaxed():
        layer(query, value, key, return_attention_scores=True, **masks)
        losses = layer.losses
    assert len(losses) == (5 if config.use_gate else 4)
    activations = forward(params, query, value, key, config=config, **masks)
    assert_close(activity_loss(activations, config), sum(losses), "float32")


@pytest.mark.slow
def test_a_sequence_without_batch_counts_as_a_batch_of_one():
    config, _, params, (query, value, key) = pair(activity_regularizer=L1)
    single = forward(params, query[0], value[0], key[0], config=config)
    batched = forward(params, query[:1], value[:1], key[:1], config=config)
    assert_close(activity_loss(single, config), activity_loss(batched, config), "float32")


def test_without_regularizers_losses_are_zero():
    config, _, params, (query, value, key) = pair()
    assert regularization_loss(params, config) == 0
    assert activity_loss(forward(params, query, value, key, config=config), config) == 0


def test_a_call_with_a_cache_has_no_activity_loss():
    config, _, params, (_, value, key) = pair(activity_regularizer="l2")
    call = dict(config=config, cache=init_cache(config, B, 10))
    activations = forward(params, value[:, :T, :D], value[:, :T], key[:, :T], **call)
    assert activations.query is None
    with pytest.raises(ValueError, match="which a call with a cache does not return"):
        activity_loss(activations, config)


def test_forward_fills_what_it_promises():
    config, _, params, (query, value, key) = pair(use_gate=True)
    activations = forward(params, query, value, key, config=config, return_attention_scores=True)
    assert activations.cache is None
    assert {name: x.shape for name, x in activations._asdict().items() if name != "cache"} == {
        "query": (B, T, N, H),
        "key": (B, S, N, H),
        "value": (B, S, N, V),
        "gate": (B, T, N, V),
        "output": (B, T, D),
        "attention_scores": (B, N, T, S),
    }
    with pytest.raises(TypeError, match="value_maks"):
        forward(params, query, value, key, config=config, value_maks=None)


@pytest.mark.slow
def test_linen_collects_losses_once_a_parameter_and_once_a_call():
    config, _, params, (query, value, key) = pair(
        kernel_regularizer="l2", bias_regularizer=L1, activity_regularizer=L1
    )
    layer = MultiHeadAttention.from_config(config)

    def twice(module, *arrays):
        return module(*arrays), module(*arrays)

    variables = {"params": params}
    _, state = layer.apply(variables, query, value, key, mutable=["losses"], method=twice)
    activity = activity_loss(forward(params, query, value, key, config=config), config)
    assert_close(state["losses"]["regularization"], regularization_loss(params, config), "float32")
    assert_close(state["losses"]["activity"], 2 * activity, "float32")
    assert "losses" not in layer.init(jax.random.key(0), query, value, key)
