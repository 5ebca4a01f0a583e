"""One call that works for every public function and class below the layer: attention of arrays,
masks, configs, positions, norms, Keras's objects, pictures, and weights of other frameworks.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax import nnx as flax_nnx
from good_calls import (
    PLAIN,
    SELF,
    SQUARE,
    params_of,
    positive,
    rate,
)
from wrong_calls import (
    SIZES,
    Bools,
    Choice,
    Fields,
    Flag,
    Floats,
    Good,
    Ids,
    Int,
    Key,
    Kind,
    Names,
    Other,
    Real,
    Sizes,
    Tree,
)

import flax_mha
from flax_mha import Mask, MultiHeadAttentionConfig, norms, positions
from flax_mha.attention import DistanceBias, Residuals, merge
from flax_mha.interop import flax as of_flax
from flax_mha.interop import jax_nn, keras, torch
from flax_mha.keras import constraints, initializers, regularizers
from flax_mha.plots import plot_attention, plot_bands, plot_mask

B, T, S, N, K, H, V, D = (SIZES[x] for x in "BTSNKHVD")

# --- attention of arrays ------------------------------------------------------------------------

ARRAYS = dict(query=Floats("BTNH"), key=Floats("BSKH"), value=Floats("BSKV"))
OPTIONS = dict(
    mask=Bools("BNTS"),
    bias=Floats("BNTS"),
    score=Other(lambda logits, b, n, t, s: logits * 0.5),
    distance_bias=Other(DistanceBias(jnp.zeros((N, 3)), first=-1)),
    sinks=Floats("N"),
    soft_cap=positive(5.0),
    scale=Real(0.5),
    is_causal=Flag(False),
    local_window_size=Sizes((2, 2), low=0),
    dropout_rate=rate(0.25),
    dropout_key=Key(),
    broadcast_dropout=Flag(False),
    precision=Choice("highest"),
    implementation=Choice("blockwise"),
    block_sizes=Sizes((8, 8)),
    return_weights=Flag(False),
    return_residuals=Flag(False),
    dropout_start=Kind((0, 0, 0, 0)),
)
RESIDUALS = Residuals(jnp.zeros((B, N, T)), jnp.ones((B, N, T)))


def one_of_merge(context, row_max, row_sum):
    part = jnp.zeros((B, T, N, V)), RESIDUALS
    return merge((context, Residuals(row_max, row_sum)), part)


def in_a_shard(axis_name, strategy, layout):
    attend = functools.partial(
        flax_mha.context_parallel_attention, axis_name=axis_name, strategy=strategy, layout=layout
    )
    mesh = flax_mha_mesh()
    cut = jax.sharding.PartitionSpec(None, "context")
    run = jax.shard_map(attend, mesh=mesh, in_specs=(cut,) * 3, out_specs=cut)
    return run(*(jnp.zeros((2, 4, 2, 4)) for _ in range(3)))


def flax_mha_mesh():
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ("context",), axis_types=auto, devices=jax.devices()[:1])


def block_sizes_mask(f, T, S, B, N, block_size):
    return flax_mha.block_mask(f, T, S, B=B, N=N, block_size=block_size)


def causal(b, n, t, s):
    return s <= t


ATTENTION = [
    Good("dot_product_attention", flax_mha.dot_product_attention, {**ARRAYS, **OPTIONS}),
    Good(
        "explain",
        flax_mha.explain,
        {**ARRAYS, **OPTIONS, "platform": Choice("tpu")},
        like=flax_mha.dot_product_attention,
    ),
    Good(
        "jax_nn.dot_product_attention",
        jax_nn.dot_product_attention,
        dict(
            **ARRAYS,
            bias=Floats("BNTS"),
            mask=Bools("BNTS"),
            scale=Real(0.5),
            is_causal=Flag(False),
            query_seq_lengths=Ids("B", 5),
            key_value_seq_lengths=Ids("B", 5),
            local_window_size=Sizes((2, 2), low=0),
            implementation=Choice("reference"),
            return_residual=Flag(False),
        ),
        also=("return_residuals", "query_seq_lengths"),
    ),
    Good(
        "flax.attention_fn",
        of_flax.attention_fn,
        dict(
            query=Floats("BTNH"),
            key=Floats("BSNH"),
            value=Floats("BSNV"),
            bias=Floats("BNTS"),
            mask=Bools("BNTS"),
            broadcast_dropout=Flag(True),
            dropout_rng=Key(),
            dropout_rate=rate(0.25),
            deterministic=Flag(False),
            dtype=Choice("float32"),
            precision=Choice("highest"),
            is_causal=Flag(False),
            force_fp32_for_softmax=Flag(False),
        ),
    ),
    Good(
        "context_parallel_attention",
        in_a_shard,
        dict(axis_name=Choice("context"), strategy=Choice("ring"), layout=Choice("contiguous")),
        traced=False,
        also=("context_axis",),
    ),
    Good(
        "merge",
        one_of_merge,
        dict(context=Floats("BTNV"), row_max=Floats("BNT"), row_sum=Floats("BNT")),
    ),
    Good("zigzag_order", flax_mha.zigzag_order, dict(T=Int(16, 0, huge=True), n=Int(2))),
    Good("zigzag_inverse", flax_mha.zigzag_inverse, dict(T=Int(16, 0, huge=True), n=Int(2))),
    Good(
        "ContextAxis",
        flax_mha.ContextAxis,
        dict(name=Other("context"), strategy=Choice("ring"), layout=Choice("zigzag")),
    ),
    Good(
        "DistanceBias.check",
        lambda values, query_offset: DistanceBias(values, query_offset).check(B, N),
        dict(values=Floats("NR"), query_offset=Ids("B")),
        like=DistanceBias,
    ),
]

# --- masks --------------------------------------------------------------------------------------

PADDING = Mask.padding(key=jnp.ones((B, S), bool))
MASKS = [
    Good("Mask.causal", Mask.causal, dict(query_offset=Ids("B"))),
    Good("Mask.window", Mask.window, dict(left=Int(2, 0), right=Int(1, 0))),
    Good("Mask.padding", Mask.padding, dict(query=Bools("BT"), key=Bools("BS"))),
    Good("Mask.segments", Mask.segments, dict(query_ids=Ids("BT"), key_ids=Ids("BS"))),
    Good("Mask.dense", Mask.dense, dict(array=Bools("BNTS"))),
    Good("Mask.prefix", Mask.prefix, dict(lengths=Ids("B"))),
    Good("Mask.function", Mask.function, dict(f=Other(causal))),
    Good(
        "Mask.as_array",
        PADDING.as_array,
        dict(T=Int(T, 0), S=Int(S, 0), B=Int(B, 0), N=Int(N, 0)),
    ),
    Good("Mask.take_queries", PADDING.take_queries, dict(rows=Ids("R"), S=Int(S, 0))),
    Good("Mask.check", PADDING.check, dict(B=Int(B, 0), N=Int(N, 0), T=Int(T, 0), S=Int(S, 0))),
    Good("Mask.__and__", lambda mask: PADDING & mask, dict(mask=Other(PADDING)), also=("Mask",)),
    Good("Mask.__or__", lambda mask: PADDING | mask, dict(mask=Other(PADDING)), also=("Mask",)),
    Good(
        "block_mask",
        block_sizes_mask,
        dict(f=Other(causal), T=Int(8, huge=True), S=Int(8), B=Int(2), N=Int(2), block_size=Int(4)),
    ),
    Good(
        "Neighborhood",
        flax_mha.Neighborhood,
        dict(window=Sizes((3, 3)), dilation=Sizes((1, 2)), is_causal=Flag(True)),
    ),
    Good(
        "Neighborhood.function",
        flax_mha.Neighborhood((3, 3)).function,
        dict(shape=Sizes((5, 5), low=0)),
    ),
    Good(
        "Neighborhood.from_dict",
        flax_mha.Neighborhood.from_dict,
        dict(fields=Fields(dict(window=[3, 3], dilation=[1, 1]))),
    ),
]

# --- configs ------------------------------------------------------------------------------------

FIELDS = dict(
    num_heads=Int(N, huge=True),
    key_dim=Int(H),
    value_dim=Int(V),
    dropout=rate(0.25),
    use_bias=Flag(True),
    output_shape=Sizes((5, 3)),
    attention_axes=Sizes((1, 2), low=None),
    sliding_window=Int(3),
    kernel_initializer=Choice("glorot_uniform"),
    bias_initializer=Choice("zeros"),
    kernel_regularizer=Choice("l2"),
    bias_regularizer=Choice("l1"),
    activity_regularizer=Choice("l2"),
    kernel_constraint=Choice("max_norm"),
    bias_constraint=Choice("non_neg"),
    use_gate=Flag(False),
    seed=Int(3, None),
    num_kv_heads=Int(K),
    position=Choice("rotary"),
    qk_norm=Choice("rms"),
    value_norm=Choice("l2"),
    clip_qkv=positive(5.0),
    scale=positive(0.5),
    soft_cap=positive(30.0),
    score=Other(None),
    use_sinks=Flag(False),
    dtype=Choice("bfloat16"),
    param_dtype=Choice("float32"),
    precision=Choice("highest"),
    implementation=Choice("blockwise"),
    context_axis=Other("context"),
)
SHORT = {name: FIELDS[name].good for name in ("num_heads", "key_dim", "dropout")}
LATENT = dict(rank=Int(4, huge=True), shared_dim=Int(2), query_rank=Int(3), norm=Choice("rms"))
KERAS_CONFIG = dict(num_heads=2, key_dim=16, name="attention", dtype="float32", use_bias=True)


def with_latent(**fields):
    return MultiHeadAttentionConfig(2, 8, latent={"rank": 4, "shared_dim": 2, **fields})


def linen_init(**fields):
    x = jnp.ones((2, 3, 4))
    return jax.eval_shape(
        lambda: flax_mha.MultiHeadAttention(**fields).init(jax.random.key(0), x, x)
    )


def nnx_layer(**arguments):
    return flax_nnx.eval_shape(
        lambda: flax_mha.nnx.MultiHeadAttention(2, 4, rngs=flax_nnx.Rngs(0), **arguments)
    )


CONFIGS = [
    Good("MultiHeadAttentionConfig", MultiHeadAttentionConfig, FIELDS, also=("ContextAxis",)),
    Good(
        "config.replace",
        PLAIN.replace,
        FIELDS,
        also=("ContextAxis",),
        like=MultiHeadAttentionConfig,
    ),
    Good(
        "linen.MultiHeadAttention",
        linen_init,
        {
            n: FIELDS[n]
            for n in (
                "num_heads",
                "key_dim",
                "dropout",
                "use_bias",
                "seed",
                "scale",
                "dtype",
                "implementation",
            )
        },
        like=MultiHeadAttentionConfig,
    ),
    Good(
        "nnx.MultiHeadAttention",
        nnx_layer,
        dict(
            query_features=Int(4, 0),
            value_features=Int(3, 0),
            key_features=Int(5, 0),
            dropout=rate(0.5),
            lora=Other(flax_mha.Lora(1)),
        ),
        like=flax_mha.nnx.MultiHeadAttention.__init__,
    ),
    Good("config.from_dict", MultiHeadAttentionConfig.from_dict, dict(fields=Fields(SHORT))),
    Good(
        "config.from_keras_config",
        MultiHeadAttentionConfig.from_keras_config,
        dict(config=Fields(KERAS_CONFIG)),
    ),
    Good("Latent", flax_mha.Latent, LATENT),
    Good("config of a latent dict", with_latent, LATENT, like=flax_mha.Latent),
    Good(
        "Lora",
        flax_mha.Lora,
        dict(
            rank=Int(2),
            alpha=positive(4.0),
            which=Names(("query", "value")),
            dropout=Real(0.5, 0.0, 1.0),
        ),
    ),
]

# --- positions, norms, Keras's objects ----------------------------------------------------------

NUMBER, SEED, AXES = Real(0.5), Int(3, 0), Sizes((0,), low=None)
FANS = dict(seed=SEED, input_axes=AXES, output_axes=Sizes((1,), low=None))
OBJECTS = {
    positions.Alibi: dict(factor=positive(), max_bias=positive()),
    positions.AxialRotary: dict(
        base=positive(100.0),
        dim=Int(4),
        interleaved=Flag(True),
        layout=Choice("whole"),
        unit=positive(1.0),
        sections=Sizes((1, 1)),
    ),
    positions.DynamicScaling: dict(factor=positive(2.0), original_length=Int(8), length=Int(16)),
    positions.GridBias: dict(rows=Int(3), columns=Int(4), class_token=Flag(True)),
    positions.LinearScaling: dict(factor=positive(2.0)),
    positions.Llama3Scaling: dict(
        factor=positive(2.0),
        low_freq_factor=positive(1.0),
        high_freq_factor=positive(4.0),
        original_length=Int(8),
    ),
    positions.LongRopeScaling: dict(
        factors=Sizes((1.0, 2.0)),
        factor=positive(2.0),
        original_length=Int(8),
        attention_factor=positive(1.0),
    ),
    positions.ProportionalScaling: dict(proportion=rate(0.5), factor=positive()),
    positions.QueryGrowth: dict(factor=positive(0.5), interval=Int(4), offset=Int(1, 0)),
    positions.RelativeBias: dict(
        num_buckets=Int(8), max_distance=Int(16), bidirectional=Flag(True)
    ),
    positions.Rotary: dict(
        base=positive(100.0),
        dim=Int(4),
        interleaved=Flag(True),
        scaling=Other(positions.LinearScaling(2.0)),
    ),
    positions.YarnScaling: dict(
        factor=positive(2.0),
        original_length=Int(8),
        beta_fast=positive(32.0),
        beta_slow=positive(1.0),
        attention_factor=positive(1.0),
        truncate=Flag(True),
    ),
    positions.alibi_slopes: dict(num_heads=Int(4, huge=True), max_bias=positive(8.0)),
    norms.L2Norm: dict(epsilon=positive(1e-6)),
    norms.LayerNorm: dict(
        epsilon=positive(1e-6), use_scale=Flag(True), offset=NUMBER, per_head=Flag(True)
    ),
    norms.RMSNorm: dict(
        epsilon=positive(1e-6), use_scale=Flag(True), offset=NUMBER, across_heads=Flag(True)
    ),
    constraints.MaxNorm: dict(max_value=Real(2.0, 0.0), axis=AXES),
    constraints.UnitNorm: dict(axis=AXES),
    constraints.MinMaxNorm: dict(
        min_value=Real(0.0, 0.0), max_value=Real(1.0, 0.0), rate=rate(1.0), axis=AXES
    ),
    initializers.Constant: dict(value=NUMBER),
    initializers.Identity: dict(gain=NUMBER),
    initializers.Orthogonal: dict(gain=NUMBER, seed=SEED),
    initializers.RandomNormal: dict(mean=NUMBER, stddev=Real(0.5, 0.0), seed=SEED),
    initializers.RandomUniform: dict(minval=Real(-0.5), maxval=NUMBER, seed=SEED),
    initializers.TruncatedNormal: dict(mean=NUMBER, stddev=Real(0.5, 0.0), seed=SEED),
    initializers.VarianceScaling: dict(
        scale=positive(1.0), mode=Choice("fan_in"), distribution=Choice("uniform"), **FANS
    ),
    initializers.GlorotUniform: FANS,
    initializers.GlorotNormal: FANS,
    initializers.LecunNormal: FANS,
    initializers.LecunUniform: FANS,
    initializers.HeNormal: FANS,
    initializers.HeUniform: FANS,
    initializers.compute_fans: dict(
        shape=Sizes((3, 4, 5), low=0), input_axes=AXES, output_axes=Sizes((1, 2), low=None)
    ),
    regularizers.L1: dict(l1=Real(0.5, 0.0)),
    regularizers.L2: dict(l2=Real(0.5, 0.0)),
    regularizers.L1L2: dict(l1=Real(0.5, 0.0), l2=Real(0.5, 0.0)),
    regularizers.OrthogonalRegularizer: dict(factor=Real(0.5, 0.0), mode=Choice("rows")),
}


def named(value):
    return f"{value.__module__.removeprefix('flax_mha.')}.{value.__qualname__}"


SMALL = [
    *(Good(named(value), value, kinds) for value, kinds in OBJECTS.items()),
    Good(
        "positions.register",
        positions.register,
        dict(own=Other(positions.Alibi)),
        also=("register",),
    ),
    Good("norms.register", norms.register, dict(own=Other(norms.L2Norm)), also=("register",)),
]

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
