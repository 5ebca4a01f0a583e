"""Parameters: the tree, Keras's fans and bounds, independence of draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, random_params, relaxed

import flax_mha.nnx
from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    apply_constraints,
    init_params,
    multi_head_attention,
    param_shapes,
    regularization_loss,
)
from flax_mha.params.tree import check_params

QUERY, VALUE, KEY = (2, 5, 17), (2, 7, 23), (2, 7, 19)


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_tree_and_shapes():
    config = MultiHeadAttentionConfig(6, 11, 13, use_gate=True, output_shape=(3, 2), num_kv_heads=2)
    shapes = {
        name: leaf.shape for name, leaf in flat(param_shapes(config, QUERY, VALUE, KEY)).items()
    }
    assert shapes == {
        "query.kernel": (17, 6, 11),
        "query.bias": (6, 11),
        "key.kernel": (19, 2, 11),
        "key.bias": (2, 11),
        "value.kernel": (23, 2, 13),
        "value.bias": (2, 13),
        "gate.kernel": (17, 6, 13),
        "gate.bias": (6, 13),
        "attention_output.kernel": (6, 13, 3, 2),
        "attention_output.bias": (3, 2),
    }


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_init_fills_the_shapes(use_bias, dtype):
    config = MultiHeadAttentionConfig(3, 11, use_bias=use_bias, param_dtype=dtype)
    params = init_params(jax.random.key(0), config, QUERY, VALUE)
    struct = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert struct == param_shapes(config, QUERY, VALUE)
    assert ("query.bias" in flat(params)) == use_bias


INITIALIZERS = [
    "glorot_uniform", "glorot_normal", "lecun_uniform", "lecun_normal", "he_uniform", "he_normal",
    "random_normal", "random_uniform", "truncated_normal", "ones", "zeros", "orthogonal",
    {"class_name": "VarianceScaling", "config": {"scale": 3.0, "mode": "fan_out"}},
    {"class_name": "GlorotUniform", "config": {"input_axes": [0], "output_axes": [2]}},
]  # fmt: skip


def with_seed(initializer, seed):
    """Keras's and our config of one initializer, seeded where it draws."""
    name = initializer if isinstance(initializer, str) else initializer["class_name"]
    config = {} if isinstance(initializer, str) else initializer["config"]
    seeded = {} if name in ("ones", "zeros") else {"seed": seed}
    return {"class_name": name, "config": {**config, **seeded}}


@pytest.mark.parametrize("initializer", INITIALIZERS, ids=str)
@pytest.mark.slow
def test_seeded_initial_values_are_keras_s(initializer):
    """Fans, bounds and distribution at once: the numbers themselves are equal."""
    identifier = with_seed(initializer, 7)
    with relaxed():
        import keras

        layer = keras.layers.MultiHeadAttention(
            3, 11, 13, kernel_initializer=identifier, bias_initializer="ones", use_gate=True
        )
        layer.build(QUERY, VALUE, KEY)
        theirs = layer.get_weights()
    config = MultiHeadAttentionConfig(
        3, 11, 13, kernel_initializer=identifier, bias_initializer="ones", use_gate=True
    )
    ours = init_params(jax.random.key(0), config, QUERY, VALUE, KEY)
    names = itertools.product(
        ["query", "key", "gate", "value", "attention_output"], ["kernel", "bias"]
    )
    for (name, leaf), weight in zip(names, theirs, strict=True):
        np.testing.assert_allclose(ours[name][leaf], weight, rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_glorot_bound_is_that_of_the_true_axes():
    """Keras 3.15 gives 0.08839 for (256, 8, 64), where 3.14 gave 0.01804."""
    config = MultiHeadAttentionConfig(8, 64)
    params = init_params(jax.random.key(0), config, (1, 256))
    for name in ("query", "key", "value", "attention_output"):
        largest = jnp.abs(params[name]["kernel"]).max()
        np.testing.assert_allclose(largest, np.sqrt(6 / (256 + 8 * 64)), rtol=1e-3)


def test_unseeded_arrays_are_independent_and_stable():
    config = MultiHeadAttentionConfig(2, 8)
    params = flat(init_params(jax.random.key(0), config, (4, 16)))
    kernels = [np.ravel(leaf) for name, leaf in params.items() if name.endswith("kernel")]
    for a, b in itertools.combinations(kernels, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.3
    gated = flat(init_params(jax.random.key(0), config.replace(use_gate=True), (4, 16)))
    for name, leaf in params.items():
        np.testing.assert_array_equal(gated[name], leaf)  # a new array does not move the others
    other = flat(init_params(jax.random.key(1), config, (4, 16)))
    assert not np.array_equal(other["query.kernel"], params["query.kernel"])


def test_a_jax_initializer_is_called_as_jax_calls_it():
    config = MultiHeadAttentionConfig(2, 8, kernel_initializer=jax.nn.initializers.constant(0.5))
    params = init_params(jax.random.key(0), config, (4, 16))
    assert (params["query"]["kernel"] == 0.5).all()


@pytest.mark.slow
def test_init_under_jit_and_vmap():
    config = MultiHeadAttentionConfig(2, 8)
    init = lambda init_key: init_params(init_key, config, (4, 16))
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.jit(jax.vmap(init))(keys)
    for i, init_key in enumerate(keys):
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], stacked), init(init_key), "float32")


def test_biases_by_name_are_the_only_ones():
    """No entry: nothing to train, to penalize or to constrain."""
    names = {"use_bias": ("query", "gate"), "use_gate": True}
    config = MultiHeadAttentionConfig(3, 11, bias_initializer="ones", **names)
    params = init_params(jax.random.key(0), config, QUERY, VALUE)
    assert [name for name in flat(params) if "bias" in name] == ["gate.bias", "query.bias"]
    assert params["query"].keys() == {"kernel", "bias"} != params["key"].keys()
    with pytest.raises(ValueError, match=r"params\['key'\]` must hold \['kernel'\]"):
        check_params(
            init_params(jax.random.key(0), config.replace(use_bias=True), QUERY), config, QUERY
        )


@pytest.mark.slow
def test_a_bias_that_is_absent_is_one_of_zeros_in_every_form():
    config = MultiHeadAttentionConfig(3, 11, use_bias=("query", "value"), use_gate=True)
    x = jax.random.normal(jax.random.key(1), QUERY)
    shapes = param_shapes(config, QUERY)
    params = random_params(shapes)
    whole = jax.tree.map(jnp.zeros_like, param_shapes(config.replace(use_bias=True), QUERY))
    zeros = {name: {**whole[name], **params[name]} for name in whole}
    expected = multi_head_attention(zeros, x, x, config=config.replace(use_bias=True))
    module = MultiHeadAttention.from_config(config)
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (shapes, shapes))
    initial = jax.eval_shape(module.init, jax.random.key(0), x, x)["params"]
    layer = flax_mha.nnx.MultiHeadAttention.from_params(params, config)
    trees = (initial, layer.params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), trees) == kinds
    for output in (
        multi_head_attention(params, x, x, config=config),
        module.apply({"params": params}, x, x),
        layer(x, x),
    ):
        np.testing.assert_array_equal(output, expected)


def test_an_absent_bias_costs_nothing():
    """Its penalty and its constraint are not called at all."""
    config = MultiHeadAttentionConfig(
        3, 11, use_bias=("value",), bias_regularizer="l2", bias_constraint="non_neg"
    )
    params = jax.tree.map(lambda x: -jnp.ones(x.shape), param_shapes(config, QUERY))
    np.testing.assert_allclose(regularization_loss(params, config), 0.01 * 33, rtol=1e-6)
    held = apply_constraints(params, config)
    assert jax.tree.structure(held) == jax.tree.structure(params)
    assert not held["value"]["bias"].any()
