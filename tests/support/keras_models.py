"""Keras layers and models with random weights, and what they answer: the oracle of the file tests.

Every call into Keras is `relaxed`; what comes back are NumPy arrays.
"""

import jax
import keras
import numpy as np
from helpers import D, H, M, N, S, T, V, relaxed

from flax_mha.interop.keras import from_keras_layer

GROUPED = {"head_dim": H, "num_query_heads": 6, "num_key_value_heads": 2}
MHA = {"num_heads": N, "key_dim": H}
ZEROS = {"kernel_initializer": "zeros"}  # quick to make; `randomize` follows
# (class, arguments, cross-attention): what the layer has is written and read in each combination.
VARIANTS = {
    "plain": ("MultiHeadAttention", MHA, False),
    "gated": ("MultiHeadAttention", {**MHA, "use_gate": True, "value_dim": V}, True),
    "bare": ("MultiHeadAttention", {**MHA, "use_bias": False, "output_shape": (2, 29)}, True),
    "dropout": ("MultiHeadAttention", {**MHA, "value_dim": V, "dropout": 0.25}, False),
    "output_shape": ("MultiHeadAttention", {**MHA, "output_shape": (2, 29)}, False),
    "one size out": ("MultiHeadAttention", {**MHA, "output_shape": 29, "use_gate": True}, False),
    "window": ("MultiHeadAttention", {**MHA, "sliding_window": 2, "use_bias": False}, True),
    "grouped": ("GroupQueryAttention", GROUPED, False),
    "grouped bare": ("GroupQueryAttention", {**GROUPED, "use_bias": False, "dropout": 0.25}, True),
    "grouped all": (
        "GroupQueryAttention",
        {**GROUPED, "use_gate": True, "sliding_window": 3},
        True,
    ),
}


def randomize(layer, seed=0):
    """Weights of a size at which a softmax is neither flat nor one-hot, biases not zero."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=w.shape) / np.sqrt(max(w.shape[0], 4)) for w in layer.weights]
    with relaxed():
        layer.set_weights([array.astype("float32") for array in arrays])
    return layer


def built_layer(variant, seed=0):
    """A Keras layer of a variant, built and random; (layer, shapes of query and value)."""
    class_name, arguments, is_cross = VARIANTS[variant]
    shapes = [(2, T, D), (2, S, M) if is_cross else (2, T, D)]
    with relaxed():
        layer = getattr(keras.layers, class_name)(**arguments)
        layer.build(*shapes)
    return randomize(layer, seed), shapes


def ported(layer):
    with relaxed():  # Keras warns in `get_weights`
        return from_keras_layer(layer)


def numbers(layer):
    with relaxed():
        return layer.get_weights()


def same_bits(one, two):
    """Two lists of arrays are equal in shape, dtype and every bit."""
    assert len(one) == len(two)
    for a, b in zip(one, two):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.tobytes() == b.tobytes()


def answers(layer, *inputs, **call):
    """(output, scores) of a Keras layer; asking for scores is the path on which value_dim works."""

    @jax.jit  # one compilation, where Keras's operations one by one would be dozens
    def call_layer(weights, state, inputs, call):
        return layer.stateless_call(weights, state, *inputs, **call, return_attention_scores=True)[
            0
        ]

    with relaxed():
        state = [v.value for v in layer.non_trainable_variables]
        results = call_layer([v.value for v in layer.trainable_variables], state, inputs, call)
        return [np.asarray(result) for result in results]


@keras.saving.register_keras_serializable("flax_mha_tests")
class Described(keras.layers.Layer):
    """A layer of somebody's own that writes its attention layer into its config."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.zz_inner = inner

    def build(self, shape):
        self.zz_inner.build(shape, shape)

    def call(self, x):
        return self.zz_inner(x, x)

    def get_config(self):
        return {**super().get_config(), "inner": keras.saving.serialize_keras_object(self.zz_inner)}


@keras.saving.register_keras_serializable("flax_mha_tests")
class Undescribed(keras.layers.Layer):
    """A layer of somebody's own that makes its attention layer itself."""

    def build(self, shape):
        self.attention = keras.layers.MultiHeadAttention(2, 5, name="hidden", **ZEROS)
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


@keras.saving.register_keras_serializable("flax_mha_tests")
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """Not Keras's, though called like it."""


class Projections(keras.layers.Layer):
    """The maps of 4 query heads and 2 key heads of size 5, as KerasHub's layers hold them."""

    prefix, equation, norms = "", "btd,dnh->btnh", ()
    heads = (4, 2, 2)

    def build(self, shape):
        self.rotary_embedding_layer = keras.layers.Identity()  # no weights: it has a group
        for name, heads in zip(("query", "key", "value"), self.heads):
            self.add_map(f"{name}_dense", self.equation, (None, heads, 5), shape)
            for norm in (f"{self.prefix}{name}_dense_layer_norm", f"{name}_norm"):
                self.add_norm(norm)
        self.add_map("output_dense", "btnh,nhd->btd", (None, shape[-1]), (None, None, 4, 5))

    def add_map(self, name, equation, sizes, shape):
        dense = keras.layers.EinsumDense(equation, sizes, **ZEROS)
        setattr(self, self.prefix + name, dense)
        dense.build(shape)

    def add_norm(self, name):
        if name in self.norms:
            setattr(self, name, keras.layers.RMSNormalization())
            getattr(self, name).build((None, None, 4, 5))

    def call(self, x):
        return x


class LlamaAttention(Projections):
    """KerasHub's Llama, Mistral: nothing but the rotary embedding tells that it is not Keras's."""

    prefix = "_"


class Qwen3Attention(Projections):
    """KerasHub's Qwen 3: two norms beside the maps."""

    prefix, norms = "_", ("_query_dense_layer_norm", "_key_dense_layer_norm")


class GptOssAttention(Projections):
    """KerasHub's gpt-oss: a logit of each head in the layer itself."""

    def build(self, shape):
        super().build(shape)
        self.sinks = self.add_weight(shape=(4,), initializer="zeros", name="sinks")


class GemmaAttention(Projections):
    """KerasHub's Gemma: kernels `[N, D, H]`."""

    equation = "btd,ndh->btnh"


class Gemma3Attention(GemmaAttention):
    """KerasHub's Gemma 3: norms that keep their scales as w - 1."""

    norms = ("query_norm", "key_norm")


class T5Attention(keras.layers.Layer):
    """KerasHub's T5: kernels `[D, N H]`, a table of distances in the layer itself."""

    def build(self, shape):
        for name in ("query", "key", "value", "output"):
            sizes = (20, shape[-1]) if name == "output" else (shape[-1], 20)
            part = keras.layers.Dense(sizes[1], use_bias=False, **ZEROS)
            part.build((None, None, sizes[0]))
            setattr(self, f"{name}_projector", part)
        self.table = self.add_weight(shape=(32, 4), initializer="zeros", name="embeddings")

    def call(self, x):
        return x


class Block(keras.layers.Layer):
    """A decoder block, with an array beside the attention layer that is not of it."""

    def __init__(self, attention, **kwargs):
        super().__init__(**kwargs)
        self.attention, self.norm = attention, keras.layers.LayerNormalization()

    def build(self, shape):
        self.attention.build(shape)
        self.norm.build(shape)

    def call(self, x):
        return x


def saved_block(attention, path, features=D):
    """Writes a model that holds the attention layer in a block; the layer, random."""
    with relaxed():
        x = keras.Input((T, features))
        model = keras.Model(x, Block(attention, name="block")(x))
        randomize(attention)
        model.save_weights(path)
    return attention


def attention(name, **arguments):
    return keras.layers.MultiHeadAttention(name=name, **{**MHA, **ZEROS, **arguments})


def inner_model(name, **arguments):
    x = keras.Input((T, D))
    y = attention("self", use_gate=True, **arguments)(x, x)
    y = keras.layers.LayerNormalization(name="norm")(y + x)
    y = keras.layers.GroupQueryAttention(name="grouped", use_bias=False, **GROUPED, **ZEROS)(y, y)
    return keras.Model(x, y, name=name)


def whole_model():
    """Functional, with everything that decides where a layer lies in the file; names out of order.

    Returns the model, and by the name below which flax_mha knows them its attention layers.
    """
    with relaxed():
        x, memory = keras.Input((T, D), name="x"), keras.Input((S, M), name="memory")
        layers, encoder = {}, inner_model("encoder")
        encoder_2 = inner_model("another", sliding_window=2)
        y = encoder_2(encoder(x)) + x
        layers["zeta"] = attention("zeta", use_bias=False)
        y = layers["zeta"](y, memory)
        layers["alpha"] = attention("alpha", value_dim=V, dropout=0.25, use_gate=True)
        y = layers["alpha"](y, memory) + y
        y = keras.Sequential([encoder, keras.layers.Dense(D, name="dense", **ZEROS)], name="chain")(
            y
        )
        folded = keras.layers.Reshape((1, T, D))(y)
        timed = inner_model("timed")
        y = keras.layers.Reshape((T, D))(keras.layers.TimeDistributed(timed, name="td")(folded))
        layers["described/self"] = attention("self", sliding_window=3)
        y = Described(layers["described/self"], name="described")(y)
        undescribed = Undescribed(name="undescribed")
        y = undescribed(y)
        own = MultiHeadAttention(**MHA, **ZEROS, name="own")
        model = keras.Model([x, memory], own(y, y), name="whole")
        for inner in (encoder, encoder_2):
            for name in ("self", "grouped"):
                layers[f"{inner.name}/{name}"] = inner.get_layer(name)
        layers |= {f"td/timed/{name}": timed.get_layer(name) for name in ("self", "grouped")}
    randomize(model, seed=1)
    custom = {"undescribed/hidden": undescribed.attention, "own": own}
    return model, layers, custom
