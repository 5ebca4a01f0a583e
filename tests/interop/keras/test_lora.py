"""Keras's own adapters: its files hold them merged, and a live layer says so."""

import keras
import numpy as np
import pytest
from helpers import relaxed

from flax_mha import multi_head_attention
from flax_mha.interop.keras import from_keras_layer, load_keras_file


@pytest.fixture(scope="module")
def trained():
    """A model whose attention was trained by its adapters, of rank 3 for each head."""
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype("float32")
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


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_a_file_holds_the_adapters_merged(trained, name, tmp_path):
    model, _, x, wanted = trained
    path = tmp_path / name
    with relaxed():
        (model.save if name.endswith(".keras") else model.save_weights)(path)
    config, params = load_keras_file(path)
    np.testing.assert_allclose(multi_head_attention(params, x, x, config=config), wanted, atol=1e-6)


def test_a_live_layer_is_refused(trained):
    with relaxed(), pytest.raises(ValueError, match=r"adapters \(LoRA\) not merged"):
        from_keras_layer(trained[1])
