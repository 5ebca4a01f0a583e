"""Parameters: the tree, Keras's fans and bounds, independence of draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, relaxed

from flax_mha import MultiHeadAttentionConfig, init_params, param_shapes

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


def test_init_under_jit_and_vmap():
    config = MultiHeadAttentionConfig(2, 8)
    init = lambda init_key: init_params(init_key, config, (4, 16))
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.jit(jax.vmap(init))(keys)
    for i, init_key in enumerate(keys):
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], stacked), init(init_key), "float32")
