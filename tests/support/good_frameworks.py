"""One call that works for every picture, and for every carrier of other frameworks' weights."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from damaged_trees import Fields, Tree
from damages import SIZES, Bools, Choice, Floats, Int, Names, Other
from flax import linen
from good_calls import SELF, SQUARE, params_of, rate
from wrong_calls import Good

from flax_mha import Mask, MultiHeadAttentionConfig
from flax_mha.interop import flax as of_flax
from flax_mha.interop import keras, torch
from flax_mha.plots import plot_attention, plot_bands, plot_mask

T, S, N = (SIZES[x] for x in "TSN")

# --- pictures -----------------------------------------------------------------------------------


class Weights(Floats):
    """Weights of heads, which no axis of another argument binds."""

    dtypes = ("complex64",)

    def array(self, shape):
        return np.full(shape, 0.25, "float32")


LABELS = dict(query_labels=Other(list("abcde")), key_labels=Other(list("abcdefg")))
HEADS = dict(head_labels=Other(list("abcdef")), title=Other("title"))
PLOTS = [
    Good(
        "plot_attention",
        plot_attention,
        dict(scores=Weights("NTS"), **LABELS, **HEADS),
        False,
        ("head_labels",),
    ),
    Good(
        "plot_bands",
        plot_bands,
        dict(scores=Weights("NTS"), **LABELS, **HEADS, threshold=rate(0.5)),
        False,
        ("head_labels",),
    ),
    Good(
        "plot_mask",
        plot_mask,
        dict(
            mask=Other(Mask.causal()),
            query_length=Int(T, huge=True),
            key_length=Int(S),
            examples=Int(1),
            heads=Int(1),
            **LABELS,
            title=Other("title"),
        ),
        False,
    ),
]

# --- weights of other frameworks ----------------------------------------------------------------

TORCH = types.SimpleNamespace(
    embed_dim=8,
    num_heads=2,
    dropout=0.1,
    add_zero_attn=False,
    in_proj_bias=None,
    state_dict=lambda: {
        "in_proj_weight": np.ones((24, 8), "float32"),
        "out_proj.weight": np.ones((8, 8), "float32"),
    },
)
NAMES = dict(query="q", key="k", value="v", attention_output="o")
LINEAR = torch.to_linear_layers(SELF, SQUARE, names=NAMES)
STATE = torch.to_torch_state_dict(
    params_of(MultiHeadAttentionConfig(4, 4), (2, 16)), MultiHeadAttentionConfig(4, 4)
)
FLAX = of_flax.to_flax_params(SELF, SQUARE)
OF_SQUARE = dict(params=Tree(SELF), config=Other(SQUARE))
LINEN = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=16)
INTEROP = [
    Good(
        "from_linear_layers",
        torch.from_linear_layers,
        dict(
            state=Tree(LINEAR),
            config=Other(SQUARE),
            names=Fields(NAMES),
            without_bias=Names(()),
            ignore=Names(()),
            prefix=Other(""),
        ),
        False,
        ("arrays", "params"),
    ),
    Good(
        "to_linear_layers",
        torch.to_linear_layers,
        dict(**OF_SQUARE, names=Fields(NAMES), without_bias=Names(()), prefix=Other("")),
        False,
    ),
    Good(
        "from_torch_state_dict",
        torch.from_torch_state_dict,
        dict(
            state=Tree(STATE),
            config=Other(MultiHeadAttentionConfig(4, 4)),
            layout=Choice("torch"),
            prefix=Other(""),
        ),
        False,
        ("arrays", "params"),
    ),
    Good(
        "to_torch_state_dict",
        torch.to_torch_state_dict,
        dict(**OF_SQUARE, layout=Choice("llama"), prefix=Other("")),
        False,
    ),
    Good(
        "mask_from_torch",
        torch.mask_from_torch,
        dict(attn_mask=Bools("WTS"), key_padding_mask=Bools("BS"), num_heads=Int(2)),
        False,
        ("attn_mask",),
    ),
    Good(
        "mask_to_torch",
        torch.mask_to_torch,
        dict(
            attention_mask=Bools("BNTS"),
            value_mask=Bools("BS"),
            bias=Floats("BNTS"),
            num_heads=Int(N),
        ),
        False,
        ("masks", "attn_mask"),
    ),
    Good("from_torch_module", torch.from_torch_module, dict(module=Other(TORCH)), False),
    Good(
        "from_flax_params",
        of_flax.from_flax_params,
        dict(params=Tree(FLAX), config=Other(SQUARE)),
        False,
        ("arrays", "params"),
    ),
    Good("to_flax_params", of_flax.to_flax_params, OF_SQUARE, False),
    Good("to_nnx_state", of_flax.to_nnx_state, OF_SQUARE, False),
    Good(
        "from_linen_module",
        of_flax.from_linen_module,
        dict(
            module=Other(LINEN),
            params=Tree(LINEN.init(jax.random.key(0), jnp.ones((2, 4)))["params"]),
        ),
        False,
        ("param_dtype", "arrays"),
    ),
    Good(
        "from_keras_weights",
        keras.from_keras_weights,
        dict(weights=Other(keras.to_keras_weights(SELF, SQUARE)), config=Other(SQUARE)),
        False,
    ),
    Good("to_keras_weights", keras.to_keras_weights, OF_SQUARE, False),
]
