"""One call that works for every public function of the layer, each argument as a kind that knows
what would be wrong for it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from damaged_trees import Fields, Tree
from damages import (
    SIZES,
    Bools,
    Choice,
    Flag,
    Floats,
    Ids,
    Int,
    Key,
    Kind,
    Names,
    Other,
    Pair,
    Real,
    Sizes,
)
from wrong_calls import Good

import flax_mha
import flax_mha.nnx
from flax_mha import MultiHeadAttentionConfig

B, T, S, N, K, H, V, D, C, M, E = (SIZES[x] for x in "BTSNKHVDCME")
CONFIG = MultiHeadAttentionConfig(N, H, V, num_kv_heads=K, output_shape=E)
PLAIN = MultiHeadAttentionConfig(N, H)
SQUARE = MultiHeadAttentionConfig(4, H)
ROTARY = CONFIG.replace(position="rotary")
SHAPES = ((B, T, D), (B, S, M), (B, S, C))
SHAPED = {
    f"{name}_shape": Sizes(shape, low=0) for name, shape in zip(("query", "value", "key"), SHAPES)
}


@functools.cache
def params_of(config, *shapes):
    return flax_mha.init_params(jax.random.key(0), config, *shapes)


PARAMS = params_of(ROTARY, *SHAPES)
LORA = flax_mha.lora_params(jax.random.key(0), CONFIG, *SHAPES)
CACHE = flax_mha.init_cache(CONFIG, B, 16)
LETTERS = "DMCNKHVE"  # those that the parameters have
POSITIVE = dict(low=0.0, open=True)


def rate(good=0.0):
    return Real(good, 0.0, 1.0)


def positive(good=1.0):
    return Real(good, **POSITIVE)


def config(value=CONFIG):
    return Other(value)


# --- the layer ----------------------------------------------------------------------------------

PADDINGS = dict(query_mask=Bools("BT"), value_mask=Bools("BS"), key_mask=Bools("BS"))
CALL = dict(
    query=Floats("BTD"),
    value=Floats("BSM"),
    key=Floats("BSC"),
    **PADDINGS,
    attention_mask=Bools("BNTS"),
    bias=Floats("BNTS"),
    segment_ids=Pair(Ids("BT"), Ids("BS")),
    positions=Pair(Ids("BT", 9), Ids("BS", 9)),
    use_causal_mask=Flag(False),
)
FLAGS = dict(return_attention_scores=Flag(False))
LORA_CALL = dict(lora=Tree(LORA), lora_scale=Kind(0.5))
DROPOUT = dict(dropout_key=Key(), lora_dropout=Real(0.25, 0.0, 1.0), lora_dropout_key=Key())
STARTS = dict(dropout_start=Kind((0, 0, 0, 0)))
TRAINED = dict(params=Tree(PARAMS, LETTERS), config=config(ROTARY))


def run_linen(params, **call):
    layer = flax_mha.MultiHeadAttention.from_config(ROTARY)
    rngs = {"dropout": call.pop("rng")} if "rng" in call else None
    return layer.apply({"params": params}, **call, rngs=rngs)


@functools.cache
def nnx_layer():
    return flax_mha.nnx.MultiHeadAttention.from_params(PARAMS, ROTARY)


def run_nnx(**call):
    return nnx_layer()(**call)


def run_nnx_forward(**call):
    return nnx_layer().forward(**call)


class Padding(Bools):
    """Right padding."""

    def array(self, shape):
        return np.arange(shape[-1]) < np.array([[5], [3], [4]])


def merged():
    lora = jax.tree.map(jnp.ones_like, LORA)
    return flax_mha.merge_lora(PARAMS, lora)


nnx_call = flax_mha.nnx.MultiHeadAttention.__call__


def decode(params, x, config, cache, value_mask=None):
    return flax_mha.multi_head_attention(
        params, x, x, config=config, cache=cache, value_mask=value_mask, use_causal_mask=True
    )


def extend(capacity, x):
    cache = flax_mha.init_cache(SQUARE, B, capacity)
    params = params_of(SQUARE, (B, T, D))
    return flax_mha.multi_head_attention(params, x, x, config=SQUARE, cache=cache)


SELF = params_of(SQUARE, (B, T, D))
LAYER = [
    Good(
        "multi_head_attention",
        flax_mha.multi_head_attention,
        {**TRAINED, **CALL, **FLAGS, **LORA_CALL, **DROPOUT, **STARTS},
    ),
    Good(
        "forward",
        flax_mha.forward,
        {**TRAINED, **CALL, **FLAGS, **LORA_CALL, **DROPOUT},
        like=flax_mha.multi_head_attention,
    ),
    Good(
        "attention_scores",
        flax_mha.attention_scores,
        {**TRAINED, **CALL, **LORA_CALL, "query_rows": Ids("R")},
        also=("query_rows",),
        like=flax_mha.multi_head_attention,
    ),
    Good(
        "linen",
        run_linen,
        {"params": TRAINED["params"], **CALL, **FLAGS, "training": Flag(False)},
        like=flax_mha.multi_head_attention,
    ),
    Good("nnx", run_nnx, {**CALL, **FLAGS, "training": Flag(False)}, like=nnx_call),
    Good("nnx.forward", run_nnx_forward, {**CALL, "training": Flag(False)}, like=nnx_call),
    Good(
        "init_params",
        flax_mha.init_params,
        dict(
            init_key=Key(),
            config=config(),
            **SHAPED,
        ),
    ),
    Good(
        "lora_params",
        flax_mha.lora_params,
        dict(
            init_key=Key(),
            config=config(),
            **SHAPED,
            rank=Int(2, huge=True),
            which=Names(("query", "value")),
        ),
    ),
    Good(
        "param_shapes",
        flax_mha.param_shapes,
        dict(
            config=config(),
            query_shape=Sizes(SHAPES[0], low=0),
            value_shape=Sizes(SHAPES[1], low=0),
        ),
    ),
    Good("param_axes", flax_mha.param_axes, dict(config=config())),
    Good(
        "param_specs",
        flax_mha.param_specs,
        dict(
            config=config(),
            rules=Fields({"heads": "model"}),
            query_shape=Sizes(SHAPES[0], low=0),
        ),
        also=("rule",),
    ),
    Good(
        "merge_lora",
        flax_mha.merge_lora,
        dict(params=Tree(PARAMS, LETTERS), lora=Tree(LORA, LETTERS), lora_scale=Kind(0.5)),
        also=("lora", "params"),
    ),
    Good(
        "split_lora",
        flax_mha.split_lora,
        dict(tuned=Tree(merged()), params=Tree(PARAMS), rank=Int(2, huge=True)),
        traced=False,
    ),
    Good(
        "quantize_params", flax_mha.quantize_params, dict(params=Tree(PARAMS), dtype=Choice("int8"))
    ),
    Good(
        "dequantize_params",
        flax_mha.dequantize_params,
        dict(params=Tree(flax_mha.quantize_params(PARAMS))),
    ),
    Good(
        "init_cache",
        flax_mha.init_cache,
        dict(
            config=config(),
            batch_shape=Sizes((2, 3), low=0),
            capacity=Int(8, huge=True),
            dtype=Choice("float32"),
            slack=Int(1, 0),
            is_causal=Flag(True),
        ),
    ),
    Good(
        "init_cross_cache",
        flax_mha.init_cross_cache,
        dict(
            params=Tree(PARAMS, "MKVCH"),
            value=Floats("BSM"),
            key=Floats("BSC"),
            config=config(),
            value_mask=Bools("BS"),
            max_queries=Int(4),
            dtype=Choice("int8"),
        ),
    ),
    Good(
        "decoding",
        decode,
        dict(
            params=Tree(SELF),
            x=Floats("BTD"),
            config=config(SQUARE),
            cache=Other(flax_mha.init_cache(SQUARE, B, 16)),
            value_mask=Padding("BT"),
        ),
        also=("query", "value", "cache", "value_mask"),
    ),
    Good("KVCache.reorder", CACHE.reorder, dict(rows=Ids("B", 2))),
    Good("KVCache.rewind", CACHE.rewind, dict(length=Kind(np.zeros(B, "int32")))),
    Good(
        "regularization_loss",
        flax_mha.regularization_loss,
        dict(params=Tree(PARAMS), config=config(ROTARY.replace(kernel_regularizer="l2"))),
    ),
    Good(
        "apply_constraints",
        flax_mha.apply_constraints,
        dict(params=Tree(PARAMS), config=config(ROTARY.replace(kernel_constraint="max_norm"))),
    ),
    Good("constrain", flax_mha.constrain, dict(config=config(), path=Names(("a", "b")))),
    Good(
        "activity_loss",
        flax_mha.activity_loss,
        dict(
            activations=Other(
                flax_mha.forward(SELF, jnp.ones((B, T, D)), jnp.ones((B, T, D)), config=SQUARE)
            ),
            config=config(SQUARE.replace(activity_regularizer="l2")),
        ),
        traced=False,
    ),
]
