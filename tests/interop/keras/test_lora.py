"""Keras's own adapters: its files hold them merged, a live layer gives them apart or merged."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from helpers import relaxed

from flax_mha import merge_lora, multi_head_attention
from flax_mha.interop.keras import from_keras_adapters, from_keras_layer, load_keras_file

DENSE = {"query": "_query_dense", "value": "_value_dense", "attention_output": "_output_dense"}
ALONE = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
LAYERS = {
    "plain": ("MultiHeadAttention", {"num_heads": 2, "key_dim": 8}),
    "several axes out": (
        "MultiHeadAttention",
        {"num_heads": 3, "key_dim": 4, "output_shape": (2, 5)},
    ),
    "grouped": (
        "GroupQueryAttention",
        {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2},
    ),
}
INPUTS = np.random.default_rng(0).standard_normal((2, 5, 16)).astype("float32")


@pytest.fixture(scope="module")
def trained():
    """A model whose attention was trained by its adapters, of rank 3 for each head."""
    x = INPUTS
    tokens, layer = keras.Input((5, 16)), keras.layers.MultiHeadAttention(2, 8, name="attention")
    with relaxed():
        model = keras.Model(tokens, layer(tokens, tokens))
        before = model.predict(x, verbose=0)
        for dense in (layer._query_dense, layer._value_dense, layer._output_dense):
            dense.enable_lora(3, lora_alpha=6)
        model.compile("sgd", "mse")
        model.fit(x, np.ones_like(x), epochs=5, verbose=0)
        after = model.predict(x, verbose=0)
    assert abs(after - before).max() > 1e-3
    return model, layer, x, after


def adapted(kind, alphas=(3, 3, 3), rank=2, mode=None):
    """A built layer of random adapters, and its answer."""
    class_name, arguments = LAYERS[kind]
    rng = np.random.default_rng(1)
    with relaxed():
        layer = getattr(keras.layers, class_name)(**arguments)
        layer.build(INPUTS.shape, INPUTS.shape)
        for name in (*DENSE.values(), "_key_dense"):
            if mode is not None:
                getattr(layer, name).quantize(config=mode)
        for name, alpha in zip(DENSE.values(), alphas, strict=True):
            dense = getattr(layer, name)
            dense.enable_lora(rank, lora_alpha=alpha)
            dense.lora_kernel_b.assign(rng.standard_normal(dense.lora_kernel_b.shape) / 4)
        return layer, np.asarray(layer(INPUTS, INPUTS))


def ours(config, params, **call):
    return multi_head_attention(params, INPUTS, INPUTS, config=config, **call)


def beside(layer):
    config, params = from_keras_layer(layer, adapters="apart")
    lora, scale = from_keras_adapters(layer)
    return ours(config, params, lora=lora, lora_scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_a_file_holds_the_adapters_merged(trained, name, tmp_path):
    model, _, x, wanted = trained
    path = tmp_path / name
    with relaxed():
        (model.save if name.endswith(".keras") else model.save_weights)(path)
    config, params = load_keras_file(path)
    np.testing.assert_allclose(multi_head_attention(params, x, x, config=config), wanted, atol=1e-6)


def test_a_live_layer_must_say_what_becomes_of_its_adapters(trained):
    with pytest.raises(
        ValueError, match=r"'apart' or 'merged'.*\['query', 'value', 'attention_out"
    ):
        from_keras_layer(trained[1])
    with pytest.raises(ValueError, match=r"`adapters` must be one of.*'apart'.*'besides'"):
        from_keras_layer(trained[1], adapters="besides")


def test_a_trained_layer_live(trained):
    _, layer, _, wanted = trained
    np.testing.assert_allclose(beside(layer), wanted, atol=1e-5)
    config, params = from_keras_layer(layer, adapters="merged")
    np.testing.assert_allclose(ours(config, params), wanted, atol=1e-5)
    with relaxed():
        kernels = {name: np.asarray(getattr(layer, x).kernel) for name, x in DENSE.items()}
    for name, kernel in kernels.items():
        np.testing.assert_allclose(params[name]["kernel"], kernel, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("alphas", [(3, 3, 3), (1, 4, 8), (5, 3, 7)])
def test_apart_and_merged_are_keras_s_numbers(kind, alphas):
    layer, wanted = adapted(kind, alphas)
    config, params = from_keras_layer(layer, adapters="apart")
    lora, scale = from_keras_adapters(layer)
    assert scale == max(alphas) / 2
    close = {"atol": 1e-5 * max(1, abs(wanted).max())}
    np.testing.assert_allclose(ours(config, params, lora=lora, lora_scale=scale), wanted, **close)
    merged = from_keras_layer(layer, adapters="merged")[1]
    again = merge_lora(params, lora, scale)
    for name, leaves in merged.items():
        np.testing.assert_allclose(leaves["kernel"], again[name]["kernel"], atol=1e-6)
    np.testing.assert_allclose(ours(config, merged), wanted, **close)
    assert abs(ours(config, params) - wanted).max() > 0.1  # the adapters matter


@pytest.mark.parametrize("kind", LAYERS)
def test_the_arrays_are_keras_s_bit_for_bit(kind):
    """All blocks hold Keras's b, and nothing stands between them."""
    layer, _ = adapted(kind)
    lora, _ = from_keras_adapters(layer)
    for name, attribute in DENSE.items():
        with relaxed():
            dense = getattr(layer, attribute)
            a, b = np.asarray(dense.lora_kernel_a), np.asarray(dense.lora_kernel_b)
        pair, last = jax.tree.map(np.asarray, lora[name]), b.shape[-1]
        heads = pair["a"].shape[-1] // 2
        np.testing.assert_array_equal(pair["a"].ravel(), a.ravel())
        blocks = pair["b"].reshape(heads, 2, heads, last)
        for n in range(heads):
            for m in range(heads):
                np.testing.assert_array_equal(blocks[n, :, m], b if n == m else np.zeros_like(b))


@pytest.mark.slow
def test_they_are_trained_on():
    layer, _ = adapted("plain")
    config, params = from_keras_layer(layer, adapters="apart")
    lora, scale = from_keras_adapters(layer)

    def loss(lora):
        return ((ours(config, params, lora=lora, lora_scale=scale) - 1) ** 2).mean()

    first = loss(lora)
    for _ in range(5):
        lora = jax.tree.map(lambda x, d: x - 0.1 * d, lora, jax.grad(loss)(lora))
    assert loss(lora) < 0.9 * first


@pytest.mark.slow
def test_adapters_beside_int8():
    layer, wanted = adapted("plain", mode=ALONE)
    params = from_keras_layer(layer, adapters="apart")[1]
    assert params["query"]["kernel"]["value"].dtype == jnp.int8
    np.testing.assert_allclose(beside(layer), wanted, atol=1e-5)
    with pytest.raises(ValueError, match=r"quantized layer must stay apart.*'merged'"):
        from_keras_layer(layer, adapters="merged")


@pytest.mark.slow
def test_a_rank_that_a_kernel_has_not_is_merged_or_refused():
    layer, wanted = adapted("plain", rank=9)  # of two heads, 18 of 16 features
    with pytest.raises(ValueError, match=r"'query' must be at most 8.*rank 9.*adapters='merged'"):
        from_keras_adapters(layer)
    config, params = from_keras_layer(layer, adapters="merged")
    np.testing.assert_allclose(ours(config, params), wanted, atol=1e-5 * abs(wanted).max())
    layer, wanted = adapted("plain", rank=8)
    np.testing.assert_allclose(beside(layer), wanted, atol=1e-5 * abs(wanted).max())


def test_what_is_no_adapted_layer():
    with relaxed():
        layer = keras.layers.MultiHeadAttention(2, 8, name="bare")
    with pytest.raises(ValueError, match=r"must be built.*'bare'"):
        from_keras_adapters(layer)
    with relaxed():
        layer.build(INPUTS.shape, INPUTS.shape)
    with pytest.raises(ValueError, match=r"of layers that have adapters.*'bare', which has none"):
        from_keras_adapters(layer)
    with relaxed():  # Keras warns in `get_weights`
        config, params = from_keras_layer(layer, adapters="merged")
        wanted = np.asarray(layer(INPUTS, INPUTS))
    np.testing.assert_allclose(ours(config, params), wanted, atol=1e-5)
    with pytest.raises(TypeError, match=r"keras.*Dense"):
        from_keras_adapters(keras.layers.Dense(3))
