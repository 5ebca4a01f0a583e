"""The layer's equation on canonical arrays; compiled once for each set of shapes and config."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha._call import Restrictions, as_rank, prepare
from flax_mha._folding import Folding
from flax_mha._typing import Array, ParamsLike, PRNGKey, Shape
from flax_mha.attention import dot_product_attention
from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.masks import Mask


class Flags(NamedTuple):
    """The static arguments of one call."""

    use_causal_mask: bool
    return_attention_scores: bool
    return_projections: bool


class Activations(NamedTuple):
    """Every array of one call, each with the leading axes of its own input.

    The projections are None in `multi_head_attention`, `gate` without `use_gate`, and
    `attention_scores` where not asked for.
    """

    query: Array | None  # [..., N, H]
    key: Array | None  # [..., K, H]
    value: Array | None  # [..., K, V]
    gate: Array | None  # [..., N, V]
    output: Array  # [..., *E]
    attention_scores: Array | None  # [*batch, N, *T axes, *S axes]


@functools.partial(jax.jit, static_argnames=("config", "flags"))
def layer(
    params: ParamsLike,
    arrays: tuple[Array, Array, Array],
    restrictions: Restrictions,
    dropout_key: PRNGKey | None,
    *,
    config: MultiHeadAttentionConfig,
    flags: Flags,
) -> Activations:
    """query, key, value -> projections -> attention -> (gate) -> output projection."""
    call = prepare(params, arrays, restrictions, config, flags.use_causal_mask)
    project, folding, mask = call.project, call.folding, call.mask
    query_BTNH = project("BTD,DNH->BTNH", call.query_BTD, params["query"])
    key_BSKH = project("BSC,CKH->BSKH", call.key_BSC, params["key"])
    value_BSKV = project("BSM,MKV->BSKV", call.value_BSM, params["value"])
    attended = dot_product_attention(
        query_BTNH,
        key_BSKH,
        value_BSKV,
        mask=mask,
        bias=call.bias_bnts,
        dropout_rate=config.dropout,
        dropout_key=dropout_key,
        precision=config.precision,
        implementation=config.implementation,
        return_weights=flags.return_attention_scores,
    )
    context_BTNV, weights_BNTS = attended if flags.return_attention_scores else (attended, None)
    gate_BTNV = None
    if config.use_gate:
        gate_BTNV = jax.nn.sigmoid(project("BTD,DNV->BTNV", call.query_BTD, params["gate"]))
        context_BTNV *= _of_real_queries(gate_BTNV, mask)
    output_BTE = project("BTNV,NVE->BTE", context_BTNV, _flat_output(params["attention_output"]))

    output_shape = params["attention_output"]["kernel"].shape[2:]
    unfold = functools.partial(_unfold, folding, flags)
    return Activations(
        query=unfold(query_BTNH, folding.targets),
        key=unfold(key_BSKH, folding.sources),
        value=unfold(value_BSKV, folding.sources),
        gate=unfold(gate_BTNV, folding.targets),
        output=folding.unfold(output_BTE, folding.targets, output_shape),
        attention_scores=None if weights_BNTS is None else folding.unfold_scores(weights_BNTS),
    )


def _of_real_queries(gate_BTNV: Array, mask: Mask) -> Array:
    """The gate with zeros at removed queries, whose NaN times a context of 0 would be NaN."""
    if mask.query_padding is None:
        return gate_BTNV
    return jnp.where(as_rank(mask.query_padding, gate_BTNV.ndim), gate_BTNV, 0)


def _flat_output(projection: Any) -> dict[str, Array]:
    """The output projection with its feature axes merged: NVE and E."""
    N, V, *features = projection["kernel"].shape
    shapes = {"kernel": (N, V, math.prod(features)), "bias": (math.prod(features),)}
    return {leaf: array.reshape(shapes[leaf]) for leaf, array in projection.items()}


def _unfold(folding: Folding, flags: Flags, x: Array | None, lengths: Shape) -> Array | None:
    """A projection with its input's leading axes, where projections were asked for."""
    if x is None or not flags.return_projections:
        return None
    return folding.unfold(x, lengths, x.shape[2:])
