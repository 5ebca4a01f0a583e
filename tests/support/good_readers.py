"""One call that works for every reader of another framework's live layer."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from damaged_things import Live
from damaged_trees import Tree
from damages import Choice
from flax import linen
from flax import nnx as flax_nnx
from wrong_calls import Good

from flax_mha.interop import equinox, flax, keras, torch

N, H, D = 2, 4, 8


def linear(*shape):
    return types.SimpleNamespace(weight=np.ones(shape, "float32"), bias=None)


EQUINOX = types.SimpleNamespace(
    num_heads=N,
    qk_size=H,
    vo_size=H,
    output_size=D,
    dropout=types.SimpleNamespace(p=0.1),
    query_proj=linear(N * H, D),
    key_proj=linear(N * H, D),
    value_proj=linear(N * H, D),
    output_proj=linear(D, N * H),
)
OF_EQUINOX = dict(
    num_heads="num_heads",
    qk_size="key_dim",
    vo_size="value_dim",
    output_size="output_shape",
    query_proj="query_proj",
    output_proj="output_proj",
)
OF_LIKE = {name: word for name, word in OF_EQUINOX.items() if name != "output_size"}  # not read
CONFIG, PARAMS = equinox.from_equinox(EQUINOX)
NNX = flax_nnx.MultiHeadAttention(N, D, N * H, decode=False, rngs=flax_nnx.Rngs(0))
OF_NNX = dict(
    num_heads="num_heads",
    head_dim="key_dim",
    out_features="output_shape",
    query="query",
    out="out",
    dtype="dtype",
    precision="precision",
)
LINEN = linen.MultiHeadDotProductAttention(num_heads=N, qkv_features=N * H)
VARIABLES = LINEN.init(jax.random.key(0), jnp.ones((2, D)))
OF_LINEN = dict(
    out_features="output_shape",
    use_bias="use_bias",
    dtype="dtype",
    precision="precision",
    normalize_qk="arrays",
)
STATE = {
    "in_proj_weight": np.ones((3 * D, D), "float32"),
    "out_proj.weight": np.ones((D, D), "float32"),
}
TORCH = types.SimpleNamespace(
    embed_dim=D,
    num_heads=N,
    dropout=0.1,
    add_zero_attn=False,
    in_proj_bias=None,
    state_dict=lambda: STATE,
)
OF_TORCH = dict(dropout="dropout", add_zero_attn="add_zero_attn", in_proj_bias="in_proj_bias")


def keras_class(name):
    """A built layer as Keras's: an object with its name, its module, its config and weights."""
    kernel, output = np.ones((D, N, H), "float32"), np.ones((N, H, D), "float32")
    body = dict(
        __module__="keras.layers",
        built=True,
        name="attention",
        config=dict(num_heads=N, key_dim=H, use_bias=False),
        weights=[kernel, kernel, kernel, output],
        get_config=lambda self: self.config,
        get_weights=lambda self: self.weights,
    )
    return type(name, (), body)


def to_equinox(params, module_like):
    return equinox.to_equinox(params, CONFIG, module_like)


class Array(np.ndarray):
    """An array with a name, as Keras's variables are."""

    name = ""


def named_array(name, shape):
    array = np.ones(shape, "float32").view(Array)
    array.name = name
    return array


def with_adapters():
    layer = keras_class("MultiHeadAttention")()
    pair = [named_array("lora_kernel_a", (D, N, 1)), named_array("lora_kernel_b", (1, H))]
    layer.query_dense = types.SimpleNamespace(
        weights=pair, lora_enabled=True, lora_alpha=3, lora_rank=1
    )
    return layer


KERAS = keras_class("MultiHeadAttention")()
OF_KERAS = dict(config="config", weights="weights")


def cloned(module, name, value):
    return module.clone(**{name: value})


LIVE = [
    Good("from_equinox", equinox.from_equinox, dict(module=Live(EQUINOX, OF_EQUINOX)), False),
    Good(
        "to_equinox",
        to_equinox,
        dict(params=Tree(PARAMS), module_like=Live(EQUINOX, OF_LIKE)),
        False,
        ("module", "module_like"),
    ),
    Good("from_nnx_module", flax.from_nnx_module, dict(module=Live(NNX, OF_NNX)), False),
    Good(
        "from_linen_module of a live layer",
        lambda module: flax.from_linen_module(module, VARIABLES["params"]),
        dict(module=Live(LINEN, OF_LINEN, cloned)),
        False,
    ),
    Good(
        "from_torch_module of a live layer",
        torch.from_torch_module,
        dict(module=Live(TORCH, OF_TORCH)),
        False,
    ),
    Good(
        "from_keras_layer",
        keras.from_keras_layer,
        dict(layer=Live(KERAS, OF_KERAS), adapters=Choice("apart")),
        False,
    ),
    Good(
        "from_keras_adapters",
        keras.from_keras_adapters,
        dict(layer=Live(with_adapters(), dict(query_dense="layers"))),
        False,
    ),
]
