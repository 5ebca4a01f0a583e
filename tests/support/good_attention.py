"""One call that works for every public function of attention of arrays, and of masks."""

import functools

import jax
import jax.numpy as jnp
from damaged_trees import Fields
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
    Other,
    Real,
    Sizes,
)
from good_calls import positive, rate
from wrong_calls import Good

import flax_mha
from flax_mha import Mask
from flax_mha.attention import DistanceBias, Residuals, merge
from flax_mha.interop import flax as of_flax
from flax_mha.interop import jax_nn

B, T, S, N, V = (SIZES[x] for x in "BTSNV")

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
