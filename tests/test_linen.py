"""The linen module: the functional params, the same numbers, Flax's streams and collections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import B, D, E, H, M, N, S, T, V, assert_close, assert_trees_close, booleans, normal

from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    activity_loss,
    forward,
    multi_head_attention,
    param_shapes,
    regularization_loss,
)

QUERY, VALUE, KEY = normal(1, B, T, D), normal(2, B, S, M), normal(3, B, S, D)
CALL = {"attention_mask": booleans(4, B, T, S), "query_mask": booleans(5, B, T)}
CONFIGS = {
    "default": MultiHeadAttentionConfig(N, H),
    "all": MultiHeadAttentionConfig(N, H, V, use_gate=True, output_shape=(E, 2), sliding_window=3),
    "grouped": MultiHeadAttentionConfig(6, H, num_kv_heads=3, use_bias=False),
    "bfloat16": MultiHeadAttentionConfig(N, H, dtype="bfloat16"),
}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def initialized(config, key=None, **fields):
    """(module, variables)."""
    module = MultiHeadAttention.from_config(config, **fields)
    return module, module.init(jax.random.key(0), QUERY, VALUE, key)


def dropout_module(**fields):
    module = MultiHeadAttention(N, H, dropout=0.5, **fields)
    return module, module.init(jax.random.key(0), QUERY, VALUE)


@EVERY_CONFIG
@pytest.mark.parametrize("key", [None, KEY], ids=["shared", "own-key"])
def test_params_are_the_functional_params(config, key):
    _, variables = initialized(config, key)
    assert set(variables) == {"params"}
    shapes = param_shapes(config, QUERY.shape, VALUE.shape, None if key is None else key.shape)
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables["params"])
    assert kinds == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)


@pytest.mark.slow
@EVERY_CONFIG
@pytest.mark.parametrize("key", [None, KEY], ids=["shared", "own-key"])
def test_apply_equals_the_function(config, key):
    module, variables = initialized(config, key)
    results = module.apply(variables, QUERY, VALUE, key, **CALL, return_attention_scores=True)
    expected = multi_head_attention(
        variables["params"],
        QUERY,
        VALUE,
        key,
        config=config,
        **CALL,
        return_attention_scores=True,
    )
    assert_trees_close(results, expected, config.dtype or "float32")


def test_every_call_argument_reaches_the_function():
    """Each one changes the output, and as the function has it."""
    config = CONFIGS["default"]
    module, variables = initialized(config)
    plain = module.apply(variables, QUERY, VALUE)
    for name, value in {
        "query_mask": booleans(1, B, T),
        "value_mask": booleans(2, B, S),
        "key_mask": booleans(3, B, S),
        "attention_mask": booleans(4, B, T, S),
        "use_causal_mask": True,
        "bias": normal(5, B, N, T, S),
        "segment_ids": (jnp.arange(B * T).reshape(B, T) % 2, jnp.arange(B * S).reshape(B, S) % 2),
    }.items():
        output = module.apply(variables, QUERY, VALUE, **{name: value})
        assert np.abs(output - plain).max() > 1e-2, name
        expected = multi_head_attention(
            variables["params"], QUERY, VALUE, config=config, **{name: value}
        )
        assert_close(output, expected, "float32", name)


@EVERY_CONFIG
def test_from_config_and_fields_are_one(config):
    module = MultiHeadAttention.from_config(config, name="mine")
    assert module.config == config
    assert module.name == "mine"
    by_fields = MultiHeadAttention(**config.to_dict())
    assert by_fields.config == config
    assert MultiHeadAttention.from_config(config) == MultiHeadAttention.from_config(config)


def test_scores_are_sown_when_asked_for_twice():
    config = CONFIGS["default"]
    module, variables = initialized(config, sow_attention_scores=True)
    output, state = module.apply(variables, QUERY, VALUE, mutable=["intermediates"])
    (scores,) = state["intermediates"]["attention_scores"]
    expected = module.apply(variables, QUERY, VALUE, return_attention_scores=True)
    assert_trees_close((output, scores), expected, "float32")
    assert not jnp.iscomplexobj(module.apply(variables, QUERY, VALUE))  # immutable: no state
    silent = MultiHeadAttention.from_config(config)
    _, state = silent.apply(variables, QUERY, VALUE, mutable=["intermediates"])
    assert not jax.tree.leaves(state)


def test_losses_collection():
    config = MultiHeadAttentionConfig(
        N, H, kernel_regularizer="l2", bias_regularizer="l1", activity_regularizer="l2",
        bias_initializer="ones",
    )  # fmt: skip
    module, variables = initialized(config)
    assert set(variables) == {"params"}
    _, state = module.apply(variables, QUERY, VALUE, mutable=["losses"])
    activations = forward(variables["params"], QUERY, VALUE, config=config)
    expected = regularization_loss(variables["params"], config), activity_loss(activations, config)
    assert all(loss > 0 for loss in expected)
    assert_close(sum(jax.tree.leaves(state["losses"])), sum(expected), "float32")
    assert len(jax.tree.leaves(state["losses"])) == 2


def test_training_without_a_key_says_what_to_pass():
    module, variables = dropout_module()
    with pytest.raises(ValueError, match=r"rngs=\{'dropout': jax\.random\.key"):
        module.apply(variables, QUERY, VALUE, training=True)
    module.apply(variables, QUERY, VALUE)  # not training: nothing to pass


def test_training_needs_no_key_without_dropout():
    module, variables = initialized(CONFIGS["default"])
    trained = module.apply(variables, QUERY, VALUE, training=True)
    assert_close(trained, module.apply(variables, QUERY, VALUE), "float32")


@pytest.mark.slow
def test_dropout_stream():
    module, variables = dropout_module()

    def train(seed, **call):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(variables, QUERY, VALUE, rngs=rngs, **call)

    np.testing.assert_array_equal(train(0, training=True), train(0, training=True))
    assert np.abs(train(0, training=True) - train(1, training=True)).max() > 0.1
    plain = module.apply(variables, QUERY, VALUE)
    np.testing.assert_array_equal(train(0), plain)
    assert np.abs(train(0, training=True) - plain).max() > 0.1


def test_seed_serves_where_no_stream_is_given():
    module, variables = dropout_module(seed=3)
    other = MultiHeadAttention(N, H, dropout=0.5, seed=4)
    seeded = module.apply(variables, QUERY, VALUE, training=True)
    expected = multi_head_attention(
        variables["params"], QUERY, VALUE, config=module.config, dropout_key=jax.random.key(3)
    )
    assert_close(seeded, expected, "float32")
    assert np.abs(seeded - other.apply(variables, QUERY, VALUE, training=True)).max() > 0.1
    rngs = {"dropout": jax.random.key(9)}
    streamed = [m.apply(variables, QUERY, VALUE, training=True, rngs=rngs) for m in (module, other)]
    assert_close(streamed[0], streamed[1], "float32", "a stream goes before the seed")
    assert np.abs(streamed[0] - seeded).max() > 0.1


def test_two_layers_in_a_model_draw_different_masks():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, training):
            ones = {"kernel_initializer": "ones", "dropout": 0.5}
            first, second = (MultiHeadAttention(N, H, **ones, name=name) for name in "ab")
            return first(x, x, training=training), second(x, x, training=training)

    model = Twice()
    variables = model.init(jax.random.key(0), QUERY, False)
    assert set(variables["params"]) == {"a", "b"}
    rngs = {"dropout": jax.random.key(1)}
    first, second = model.apply(variables, QUERY, True, rngs=rngs)
    assert np.abs(first - second).max() > 0.1


def test_transformed_modules():
    """nn.vmap over the batch with shared params, and nn.remat, are the plain module."""
    module, variables = initialized(CONFIGS["default"])
    expected = module.apply(variables, QUERY, VALUE)
    mapped = nn.vmap(
        MultiHeadAttention, in_axes=0, variable_axes={"params": None}, split_rngs={"params": False}
    )
    assert_close(mapped(N, H).apply(variables, QUERY, VALUE), expected, "float32")
    saved = nn.remat(MultiHeadAttention)
    assert_close(saved(N, H).apply(variables, QUERY, VALUE), expected, "float32")
