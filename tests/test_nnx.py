"""The nnx module: the functional params, the same numbers, nnx's streams, modes and transforms."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    B,
    C,
    D,
    E,
    H,
    M,
    N,
    S,
    T,
    V,
    assert_close,
    assert_trees_close,
    booleans,
    normal,
    random_params,
)  # fmt: skip

import flax_mha
from flax_mha import MultiHeadAttentionConfig, init_params, multi_head_attention, param_shapes
from flax_mha.keras.initializers import Constant
from flax_mha.nnx import MultiHeadAttention

QUERY, VALUE, KEY = normal(1, B, T, D), normal(2, B, S, M), normal(3, B, S, C)
CALL = {"attention_mask": booleans(4, B, T, S), "query_mask": booleans(5, B, T)}
CONFIGS = {
    "default": MultiHeadAttentionConfig(N, H),
    "all": MultiHeadAttentionConfig(N, H, V, use_gate=True, output_shape=(E, 2), sliding_window=3),
    "grouped": MultiHeadAttentionConfig(6, H, num_kv_heads=3, use_bias=False),
    "bfloat16": MultiHeadAttentionConfig(N, H, dtype="bfloat16", param_dtype="bfloat16"),
}
SLOW = pytest.mark.slow
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Constant kernels compile in no time; which values go where, random ones show in the other tests.
DROPOUT = MultiHeadAttentionConfig(N, H, dropout=0.5, kernel_initializer=Constant(0.1))
SIZES = {"query_features": D, "value_features": M}


def built(config=DROPOUT, *, rngs=None, **sizes):
    """From the constructor, with initial values."""
    return MultiHeadAttention.from_config(config, **(sizes or SIZES), rngs=rngs or nnx.Rngs(0))


def filled(config, query=(T, D), value=(S, M), key=None, seed=0):
    """Around random parameters, biases included."""
    params = random_params(param_shapes(config, query, value, key), seed, config.param_dtype)
    return MultiHeadAttention.from_params(params, config)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def model(rngs):
    """A layer for self-attention, whose output fits its input."""
    return built(rngs=rngs, query_features=D)


# --- parameters ---------------------------------------------------------------------------------


def of_its_key(key, shape, dtype):
    """An initializer that compiles fast: one number, another for every key."""
    return jnp.full(shape, jax.random.key_data(key)[1] % 97, dtype)


@pytest.mark.parametrize("initializer", [of_its_key, pytest.param("he_normal", marks=SLOW)])
def test_initial_params_are_the_functional_ones_from_the_same_key(initializer):
    config = CONFIGS["all"].replace(kernel_initializer=initializer, bias_initializer=of_its_key)
    layer = built(config, rngs=nnx.Rngs(params=7), **SIZES, key_features=C)
    expected = init_params(nnx.Rngs(params=7).params(), config, (T, D), (S, M), (S, C))
    assert shapes(layer.params) == shapes(expected)
    jax.tree.map(np.testing.assert_array_equal, layer.params, expected)
    leaves = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    assert {path for path, _ in leaves} == {(a, b) for a in expected for b in expected[a]}
    np.testing.assert_array_equal(layer.query.kernel[...], expected["query"]["kernel"])
    assert len({float(leaf.ravel()[0]) for leaf in jax.tree.leaves(expected)}) == len(leaves)


@EVERY_CONFIG
@pytest.mark.parametrize("key_features", [None, C], ids=["shared", "own-key"])
def test_shapes_of_params(config, key_features):
    layer = nnx.eval_shape(lambda: built(config, **SIZES, key_features=key_features))
    key_shape = None if key_features is None else (S, key_features)
    assert layer.params == param_shapes(config, (T, D), (S, M), key_shape)


def test_self_attention_needs_one_size():
    layer = nnx.eval_shape(lambda: MultiHeadAttention(N, H, query_features=D, rngs=nnx.Rngs(0)))
    assert layer.params == param_shapes(layer.config, (T, D))


def test_params_are_replaced_as_a_whole():
    layer, other = filled(DROPOUT), filled(DROPOUT, seed=1)
    graph = nnx.graphdef(layer)
    layer.set_params(other.params)
    assert nnx.graphdef(layer) == graph
    np.testing.assert_array_equal(layer(QUERY, VALUE), other(QUERY, VALUE))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (filled(DROPOUT.replace(use_bias=False)).params, r"`params\['query'\]` must hold"),
        (filled(DROPOUT.replace(num_heads=1)).params, r"\['query'\]\['kernel'\] must be \[D, N, H"),
        ({"params": filled(DROPOUT).params}, "`params` must hold .*Received: .*'params'"),
        (jnp.ones(3), "`params` must be a mapping"),
    ],
)
def test_params_that_do_not_fit(params, message):
    layer = filled(DROPOUT)
    before = layer.params
    with pytest.raises((ValueError, TypeError), match=message):
        layer.set_params(params)
    with pytest.raises((ValueError, TypeError), match=message):
        MultiHeadAttention.from_params(params, DROPOUT)
    jax.tree.map(np.testing.assert_array_equal, layer.params, before)


def test_params_of_other_features():
    layer = filled(DROPOUT)
    with pytest.raises(ValueError, match=r"params\['key'\]\['kernel'\] must be \[C, K, H\]"):
        layer.set_params(filled(DROPOUT, key=(S, C)).params)


@EVERY_CONFIG
def test_from_params_is_the_layer_that_the_constructor_makes(config):
    config = config.replace(kernel_initializer=Constant(0.1))
    layer = built(config, **SIZES, key_features=C)
    params = jax.tree.map(np.asarray, layer.params)
    again = MultiHeadAttention.from_params(params, config)
    assert nnx.graphdef(again) == nnx.graphdef(layer)
    jax.tree.map(np.testing.assert_array_equal, again.params, layer.params)


# --- the same numbers ---------------------------------------------------------------------------


@EVERY_CONFIG
def test_call_equals_the_function_and_the_linen_module(config):
    layer = filled(config)
    results = layer(QUERY, VALUE, **CALL, return_attention_scores=True)
    call = {**CALL, "return_attention_scores": True}
    expected = multi_head_attention(layer.params, QUERY, VALUE, config=config, **call)
    assert_trees_close(results, expected, config.dtype or "float32")
    linen = flax_mha.MultiHeadAttention.from_config(config)
    output = linen.apply({"params": layer.params}, QUERY, VALUE, **CALL)
    assert_close(results[0], output, config.dtype or "float32")


@pytest.mark.slow
def test_every_call_argument_reaches_the_function():
    config = CONFIGS["default"]
    layer = filled(config, key=(S, C))
    plain = layer(QUERY, VALUE, KEY)
    for name, value in {
        "query_mask": booleans(1, B, T),
        "value_mask": booleans(2, B, S),
        "key_mask": booleans(3, B, S),
        "attention_mask": booleans(4, B, T, S),
        "use_causal_mask": True,
        "bias": normal(5, B, N, T, S),
        "segment_ids": (jnp.arange(B * T).reshape(B, T) % 2, jnp.arange(B * S).reshape(B, S) % 2),
    }.items():
        output = layer(QUERY, VALUE, KEY, **{name: value})
        assert np.abs(output - plain).max() > 1e-2, name
        call = {"config": config, name: value}
        expected = flax_mha.forward(layer.params, QUERY, VALUE, KEY, **call).output
        assert_close(output, expected, "float32", name)


def test_several_attended_axes():
    config = MultiHeadAttentionConfig(N, H, attention_axes=(-3, -2))
    layer = filled(config, value=None)
    grid = normal(1, B, 5, 4, D)
    expected = multi_head_attention(layer.params, grid, grid, config=config, use_causal_mask=True)
    assert_close(layer(grid, grid, use_causal_mask=True), expected, "float32")


@SLOW
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_equal_the_functions(dropout):
    config, dropout_key = DROPOUT.replace(dropout=dropout), jax.random.key(3)
    layer = filled(config)

    def loss(layer):
        return (layer(QUERY, VALUE, training=True, rngs=dropout_key) ** 2).sum()

    def expected(params):
        call = {"config": config, "dropout_key": dropout_key}
        return (multi_head_attention(params, QUERY, VALUE, **call) ** 2).sum()

    value, gradients = nnx.value_and_grad(loss)(layer)
    assert_close(value, expected(layer.params), "float32")
    gradients = nnx.to_pure_dict(gradients)
    assert_trees_close(gradients, jax.grad(expected)(layer.params), "float32")


def test_losses_are_the_functions():
    config = CONFIGS["default"].replace(kernel_regularizer="l2", activity_regularizer="l1")
    layer = filled(config)
    assert layer.regularization_loss() == flax_mha.regularization_loss(layer.params, config) > 0
    activations = layer.forward(QUERY, VALUE, **CALL)
    expected = flax_mha.forward(layer.params, QUERY, VALUE, config=config, **CALL)
    assert_trees_close(activations, expected, "float32")
    assert flax_mha.activity_loss(activations, config) > 0
    with pytest.raises(TypeError, match="Received: the argument mask"):
        layer.forward(QUERY, VALUE, mask=None)


# --- dropout ------------------------------------------------------------------------------------


def with_key(layer, dropout_key):
    """By the function that compiles what the layer compiles, flags included: compiled once."""
    call = {"config": layer.config, "dropout_key": dropout_key}
    return flax_mha.forward(layer.params, QUERY, VALUE, **call).output


def test_the_calls_rngs_are_a_key_a_stream_or_rngs():
    layer = built()
    expected = with_key(layer, nnx.Rngs(dropout=5).dropout())
    assert np.abs(expected - layer(QUERY, VALUE)).max() > 0.1
    for rngs in (
        nnx.Rngs(dropout=5),
        nnx.Rngs(5, params=9),
        nnx.Rngs(dropout=5).dropout,
        nnx.Rngs(dropout=5).dropout(),
    ):
        output = layer(QUERY, VALUE, training=True, rngs=rngs)
        np.testing.assert_array_equal(output, with_key(layer, nnx.Rngs(dropout=5).dropout()))


def test_the_held_stream_is_a_fork_and_moves_on():
    layer = built(rngs=nnx.Rngs(0, dropout=5))
    stream = nnx.Rngs(dropout=5).dropout.fork()
    for _ in range(2):
        np.testing.assert_array_equal(layer(QUERY, VALUE, training=True), with_key(layer, stream()))
    count = int(layer.rngs.count[...])
    layer(QUERY, VALUE)
    layer(QUERY, VALUE, training=True, rngs=jax.random.key(0))
    assert int(layer.rngs.count[...]) == count == 2, "only its own draws move it"


def test_seed_starts_the_held_stream():
    for rngs in (nnx.Rngs(0, dropout=5), nnx.Rngs(params=0)):
        layer = built(DROPOUT.replace(seed=3), rngs=rngs)
        stream = nnx.Rngs(dropout=3).dropout
        for _ in range(2):
            np.testing.assert_array_equal(
                layer(QUERY, VALUE, training=True), with_key(layer, stream())
            )
    again = MultiHeadAttention.from_params(layer.params, layer.config)
    expected = with_key(layer, nnx.Rngs(dropout=3).dropout())
    np.testing.assert_array_equal(again(QUERY, VALUE, training=True), expected)


def test_training_without_a_key_says_what_to_pass():
    for layer in (built(rngs=nnx.Rngs(params=0)), filled(DROPOUT)):
        assert layer.rngs is None
        with pytest.raises(ValueError, match=r"dropout=0\.5.*rngs=nnx\.Rngs\(dropout=0\).*`seed`"):
            layer(QUERY, VALUE, training=True)
        layer(QUERY, VALUE)
        layer(QUERY, VALUE, training=True, rngs=nnx.Rngs(dropout=0))


def test_no_dropout_holds_no_stream_and_draws_no_key():
    layer = built(DROPOUT.replace(dropout=0.0))
    assert not jax.tree.leaves(nnx.state(layer, nnx.RngState))
    rngs = nnx.Rngs(dropout=0)
    output = layer(QUERY, VALUE, training=True, rngs=rngs)
    np.testing.assert_array_equal(output, layer(QUERY, VALUE))
    assert int(rngs.dropout.count[...]) == 0


def test_modes():
    """`train()`, `eval()` reach the layer inside a model; `training=` goes before the mode."""

    class Block(nnx.Module):
        def __init__(self):
            self.attention = built()

    block, key = Block(), jax.random.key(1)
    layer = block.attention
    noisy, plain = with_key(layer, key), with_key(layer, None)
    assert np.abs(noisy - plain).max() > 0.1
    for training, expected in [(None, plain), (True, noisy), (False, plain)]:
        output = layer(QUERY, VALUE, training=training, rngs=key)
        np.testing.assert_array_equal(output, expected)
    block.train()
    np.testing.assert_array_equal(layer(QUERY, VALUE, rngs=key), noisy)
    np.testing.assert_array_equal(layer(QUERY, VALUE, training=False), plain)
    block.eval()
    np.testing.assert_array_equal(layer(QUERY, VALUE, rngs=key), plain)
    if hasattr(nnx, "view"):
        viewed = nnx.view(block, deterministic=False).attention
        np.testing.assert_array_equal(viewed(QUERY, VALUE, rngs=key), noisy)
        np.testing.assert_array_equal(layer(QUERY, VALUE), plain)


# --- transforms ---------------------------------------------------------------------------------


def test_traced_once_whatever_the_data():
    traces = []

    @nnx.jit
    def step(layer, mask):
        traces.append(mask)
        return layer(QUERY, VALUE, attention_mask=mask, training=True)

    layers = [built(rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    outputs = [step(layer, CALL["attention_mask"] ^ bool(i)) for i in range(2) for layer in layers]
    assert len(traces) == 1
    assert [int(layer.rngs.count[...]) for layer in layers] == [2, 2]
    assert all(np.abs(outputs[i] - outputs[j]).max() > 0.1 for i in range(4) for j in range(i))


def test_split_and_merge():
    layer = model(nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    assert jax.tree.structure(nnx.to_pure_dict(params)) == jax.tree.structure(layer.params)
    merged = nnx.merge(graph, jax.tree.map(lambda x: 2 * x, params), rest)
    assert merged.config == layer.config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), merged.params, layer.params)
    x = normal(1, B, T, D)
    expected = multi_head_attention(merged.params, x, x, config=layer.config)
    assert_close(merged(x, x), expected, "float32")


@pytest.mark.slow
def test_one_step_of_an_optimizer():
    layer = filled(CONFIGS["default"])
    before, transformation = layer.params, optax.sgd(0.1)

    def loss(layer):
        return (layer(QUERY, VALUE) ** 2).mean()

    @nnx.jit
    def step(layer, optimizer):
        gradients = nnx.grad(loss)(layer)
        optimizer.update(layer, gradients)

    first = loss(layer)
    step(layer, nnx.Optimizer(layer, transformation, wrt=nnx.Param))

    def pure(params):
        return (multi_head_attention(params, QUERY, VALUE, config=layer.config) ** 2).mean()

    gradient = jax.grad(pure)(before)
    updates, _ = transformation.update(gradient, transformation.init(before))
    expected = optax.apply_updates(before, updates)
    assert_trees_close(layer.params, expected, "float32")
    assert loss(layer) < first


@SLOW
def test_layers_stacked_by_vmap_and_run_by_scan():
    """Three layers in one module: each with numbers and dropout bits of its own."""
    layers = 3

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return model(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x, x, training=True)

    stacked, x = stack(nnx.Rngs(0)), normal(1, B, T, D)
    params = stacked.params
    assert params["query"]["kernel"].shape == (layers, D, N, H)
    keys = [key for key in stacked.rngs.key[...]]
    expected, config = x, stacked.config
    for i, key in enumerate(keys):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        key = jax.random.fold_in(key, 0)
        expected = multi_head_attention(own, expected, expected, config=config, dropout_key=key)
    assert_close(run(stacked, x), expected, "float32")
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == layers
    assert stacked.rngs.count[...].tolist() == [1] * layers


def test_vmap_over_the_batch():
    layer = filled(CONFIGS["default"])
    mapped = nnx.vmap(lambda layer, query, value: layer(query, value), in_axes=(None, 0, 0))
    assert_close(mapped(layer, QUERY, VALUE), layer(QUERY, VALUE), "float32")


@SLOW
def test_bridge_to_linen():
    linen = nnx.bridge.to_linen(MultiHeadAttention, N, H, query_features=D, value_features=M)
    variables = linen.init(jax.random.key(0), QUERY, VALUE)
    params = jax.tree.map(jnp.asarray, nnx.bridge.module.meta.unbox(variables["params"]))
    config = MultiHeadAttentionConfig(N, H)
    expected = multi_head_attention(params, QUERY, VALUE, config=config)
    assert_close(linen.apply(variables, QUERY, VALUE), expected, "float32")


# --- the constructor ----------------------------------------------------------------------------


def test_help_shows_the_configs_arguments():
    shown = list(inspect.signature(MultiHeadAttention.__init__).parameters.values())
    config = list(inspect.signature(MultiHeadAttentionConfig).parameters.values())
    assert shown[0].name == "self"
    assert shown[1 : len(config) + 1] == config
    own = ["query_features", "value_features", "key_features", "rngs", "lora"]
    own += ["partition_rules"]
    assert [parameter.name for parameter in shown[len(config) + 1 :]] == own


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"in_features": D}, ValueError, "A field of MultiHeadAttention .*'in_features'"),
        ({"droput": 0.1}, ValueError, "'droput'.*Did you mean 'dropout'"),
        ({"dropout": 2}, ValueError, r"`dropout` must be a probability"),
        ({"query_features": 0}, ValueError, "`query_features` must be a positive integer"),
        ({"value_features": 2.0}, TypeError, "`value_features` must be a positive integer"),
        ({"key_features": True}, TypeError, "`key_features` must be a positive integer"),
        ({"rngs": jax.random.key(0)}, TypeError, r"`rngs` must be an nnx.Rngs.*nnx\.Rngs\(0\)"),
        ({"rngs": nnx.Rngs(dropout=0)}, ValueError, r"stream 'params'.*streams \['dropout'\]"),
    ],
)
def test_constructor_errors(fields, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttention(**{"num_heads": N, "key_dim": H, "query_features": D,
                              "rngs": nnx.Rngs(0), **fields})  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"training": 2}, ValueError, "`training` must be True or False"),
        ({"training": True, "rngs": 0}, TypeError, "`rngs` must be an nnx.Rngs.*type int"),
        ({"training": True, "rngs": nnx.Rngs(params=0)}, ValueError, "stream 'dropout'"),
        ({"training": True, "rngs": jnp.ones(2)}, TypeError, "`dropout_key`.*PRNG key"),
        ({"attention_mask": normal(1, B, T, S)}, TypeError, "`attention_mask` must be boolean"),
    ],
)
def test_call_errors(call, error, message):
    with pytest.raises(error, match=message):
        built()(QUERY, VALUE, **call)


def test_inputs_of_other_sizes_are_refused_by_letters():
    with pytest.raises(ValueError, match=r"params\['value'\]\['kernel'\] must be \[M, K, V\]"):
        built()(QUERY, KEY, VALUE)


@SLOW
def test_the_package_does_not_import_nnx():
    code = "import sys, flax_mha; sys.exit('flax.nnx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
