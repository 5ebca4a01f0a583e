"""`keras.layers.MultiHeadAttention` on the JAX backend, through `stateless_call`."""

import os
from typing import Any

import jax

from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data
from flax_mha.bench.peers import jax_layers
from flax_mha.bench.peers.contract import Contender, Unserved
from flax_mha.core.typing import Array

# The order of `layer.trainable_variables`.
_NAMES = [
    (name, leaf)
    for name in ("query", "key", "value", "attention_output")
    for leaf in ("kernel", "bias")
]


def ready() -> Any:
    """Keras, with the backend jax.

    Raises:
        Unserved: it has another.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        raise Unserved(f"KERAS_BACKEND is {keras.backend.backend()!r}: set it to 'jax'")
    return keras


def build(case: Case, data: Data) -> Contender:
    """Keras has an option for every case."""
    keras = ready()
    layer = keras.layers.MultiHeadAttention(
        num_heads=case.heads,
        key_dim=case.head_size,
        dropout=case.dropout,
        sliding_window=case.window,
    )
    layer.build(data.x_BTD.shape, data.x_BTD.shape)

    def apply(weights: Any, x_BTD: Array, dropout_key: Any) -> Array:
        output, _ = layer.stateless_call(
            weights,
            _seed_state(layer, dropout_key),
            x_BTD,
            x_BTD,
            use_causal_mask=case.causal,
            training=dropout_key is not None,
        )
        return output

    convert = lambda params: [params[name][leaf] for name, leaf in _NAMES]  # noqa: E731
    return jax_layers.contender(jax_layers.Layer(apply, convert), case, data)


def _seed_state(layer: Any, dropout_key: Any) -> list[Any]:
    """The state of Keras's seed generator; with dropout, the key's two words."""
    states = [variable.value for variable in layer.non_trainable_variables]
    return states if dropout_key is None else [jax.random.key_data(dropout_key) for _ in states]
