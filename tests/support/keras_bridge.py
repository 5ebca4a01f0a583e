"""The installed Keras layer as a function of the same parameter tree."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
from helpers import relaxed
from keras.src import backend

POLICIES = {
    "float32": "float32",
    "bfloat16": "mixed_bfloat16",
    "float16": "mixed_float16",
}


def keras_layer(arguments, shapes, dtype="float32"):
    """The installed Keras layer of these constructor arguments, built for (query, value, key)."""
    with relaxed():
        layer = keras.layers.MultiHeadAttention(**arguments, dtype=POLICIES[dtype])
        if shapes is not None:
            layer.build(*shapes)
    return layer


def names_of(layer):
    """(map, entry) of every weight in `get_weights()` order: the gate stands before the value."""
    gate = ["gate"] if layer.get_config()["use_gate"] else []
    entries = ["kernel", "bias"] if layer.use_bias else ["kernel"]
    maps = ["query", "key", *gate, "value", "attention_output"]
    return [(name, entry) for name in maps for entry in entries]


def tree_of(layer, leaves):
    """Arrays in `get_weights()` order as a parameter tree."""
    tree = {}
    for (name, entry), leaf in zip(names_of(layer), leaves, strict=True):
        tree.setdefault(name, {})[entry] = leaf
    return tree


def list_of(layer, tree):
    """A parameter tree in `get_weights()` order."""
    return [tree[name][entry] for name, entry in names_of(layer)]


def params_from_keras(layer):
    """The weights of a built Keras layer as a parameter tree of JAX arrays."""
    with relaxed():
        return tree_of(layer, [jnp.asarray(leaf) for leaf in layer.get_weights()])


def set_weights(layer, tree):
    """Put a parameter tree into a built Keras layer."""
    with relaxed():
        layer.set_weights([np.asarray(leaf) for leaf in list_of(layer, tree)])


def keras_call(layer, params, query, value, key=None, *, query_mask=None, **call):
    """Keras's layer as a pure function of `params`; (output, scores) if scores are asked for.

    Keras 3.15 ignores an explicit `query_mask=`; it takes the one that the tensor carries.
    """
    with relaxed():
        if query_mask is not None:
            query = query + 0  # a tensor of our own: the caller's must not carry a mask afterwards
            backend.set_keras_mask(query, query_mask)
        result, _ = layer.stateless_call(
            list_of(layer, params),
            [v.value for v in layer.non_trainable_variables],
            query,
            value,
            **({} if key is None else {"key": key}),
            training=False,
            **call,
        )
    return result


def keras_gradients(loss, *arguments, compiled=False):
    """Gradients of a loss that calls Keras and returns (scalar, results), and the results."""
    gradient = jax.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True)
    with relaxed():
        return (jax.jit(gradient) if compiled else gradient)(*arguments)
