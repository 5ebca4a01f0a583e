"""One call that works for every config and small object: of modules, positions, norms, and Keras's
constraints, initializers and regularizers.
"""

import jax
import jax.numpy as jnp
from damaged_trees import Fields
from damages import SIZES, Choice, Flag, Int, Names, Other, Real, Sizes
from flax import nnx as flax_nnx
from good_calls import PLAIN, positive, rate
from wrong_calls import Good

import flax_mha
from flax_mha import MultiHeadAttentionConfig, norms, positions
from flax_mha.keras import constraints, initializers, regularizers

N, K, H, V = (SIZES[x] for x in "NKHV")

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
