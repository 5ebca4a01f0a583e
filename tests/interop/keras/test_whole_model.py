"""A Transformer that Keras trained, ported whole to flax.linen through its `.keras` file."""

import pathlib

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import linen as nn
from helpers import assert_close, relaxed

from flax_mha import MultiHeadAttention
from flax_mha.interop.keras import load_keras_file, read_keras_arrays

LENGTH, WIDTH, HEADS = 32, 24, 3
# A gate in one block, grouped heads in another, a window and a narrow value in the third.
ATTENTION = [
    lambda: keras.layers.MultiHeadAttention(HEADS, 8, use_gate=True, name="attention_0"),
    lambda: keras.layers.GroupQueryAttention(8, 4, 2, dropout=0.1, name="attention_1"),
    lambda: keras.layers.MultiHeadAttention(
        HEADS, 8, value_dim=5, sliding_window=7, dropout=0.1, use_bias=False, name="attention_2"
    ),
]


def keras_block(x, i):
    y = keras.layers.LayerNormalization(name=f"norm_{i}a")(x)
    x = x + ATTENTION[i]()(y, y, use_causal_mask=True)
    y = keras.layers.LayerNormalization(name=f"norm_{i}b")(x)
    y = keras.layers.Dense(2 * WIDTH, activation="relu", name=f"up_{i}")(y)
    return x + keras.layers.Dense(WIDTH, name=f"down_{i}")(y)


def keras_model():
    tokens = keras.Input((LENGTH,), dtype="int32")
    places = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    x = keras.layers.Embedding(256, WIDTH, name="bytes")(tokens)
    x = x + keras.layers.Embedding(LENGTH, WIDTH, name="places")(places)
    inner_x = keras.Input((LENGTH, WIDTH))
    inner = keras.Model(inner_x, keras_block(keras_block(inner_x, 0), 1), name="lower")
    x = keras_block(inner(x), 2)
    return keras.Model(tokens, keras.layers.Dense(256, name="logits")(x))


class Ported(nn.Module):
    """The same model, in flax; the attention configs come from the file."""

    configs: tuple

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, WIDTH, name="bytes")(tokens)
        x = x + nn.Embed(LENGTH, WIDTH, name="places")(jnp.arange(LENGTH))[None]
        for i, config in enumerate(self.configs):
            y = nn.LayerNorm(epsilon=1e-3, name=f"norm_{i}a")(x)
            attention = MultiHeadAttention.from_config(config, name=f"attention_{i}")
            x = x + attention(y, y, use_causal_mask=True)
            y = nn.LayerNorm(epsilon=1e-3, name=f"norm_{i}b")(x)
            x = x + nn.Dense(WIDTH, name=f"down_{i}")(
                nn.relu(nn.Dense(2 * WIDTH, name=f"up_{i}")(y))
            )
        return nn.Dense(256, name="logits")(x)


# Flax's names of what Keras numbers.
LEAVES = {"Embed": ["embedding"], "LayerNorm": ["scale", "bias"], "Dense": ["kernel", "bias"]}


def ported(path):
    """(module, variables) of the model in the file."""
    layers = [load_keras_file(path, f"attention_{i}") for i in range(len(ATTENTION))]
    params = {f"attention_{i}": params for i, (_, params) in enumerate(layers)}
    kinds = {"bytes": "Embed", "places": "Embed", "logits": "Dense"}
    for i in range(len(ATTENTION)):
        kinds |= {f"norm_{i}{x}": "LayerNorm" for x in "ab"}
        kinds |= {f"up_{i}": "Dense", f"down_{i}": "Dense"}
    for name, kind in kinds.items():
        arrays = read_keras_arrays(path, name)
        params[name] = dict(zip(LEAVES[kind], arrays.values(), strict=True))
    return Ported(tuple(config for config, _ in layers)), {"params": params}


def library_bytes():
    """(inputs, next bytes): Python's own source of `argparse`, in windows."""
    import argparse

    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8).astype("int32")
    windows = np.lib.stride_tricks.sliding_window_view(text, LENGTH + 1)[::LENGTH][:512]
    return windows[:, :-1], windows[:, 1:]


def loss_of(logits, targets):
    log_probabilities = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)
    return -float(jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1).mean())


@pytest.mark.slow
def test_the_trained_model_predicts_the_same(tmp_path):
    inputs, targets = library_bytes()
    train, test = slice(0, 448), slice(448, 512)
    with relaxed():
        keras.utils.set_random_seed(0)
        model = keras_model()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
        model.fit(inputs[train], targets[train], batch_size=64, epochs=8, verbose=0)
        model.save(tmp_path / "model.keras")
        expected = np.asarray(model(inputs[test], training=False))
    module, variables = ported(tmp_path / "model.keras")
    logits = module.apply(variables, jnp.asarray(inputs[test]))
    assert_close(logits, expected, "float32", "logits")
    assert loss_of(logits, targets[test]) < 0.65 * np.log(256)  # it has learnt something
    untrained = module.init(jax.random.key(0), jnp.asarray(inputs[:1]))
    assert jax.tree.map(jnp.shape, untrained) == jax.tree.map(jnp.shape, variables)
    assert loss_of(module.apply(untrained, jnp.asarray(inputs[test])), targets[test]) > 5
