"""The layer's equation on canonical arrays; compiled once for each set of shapes and config."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha.attention.cut import Cut
from flax_mha.attention.dispatch import attention_cut
from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core.folding import Folding
from flax_mha.core.meshes import with_auto_axes
from flax_mha.core.nans import nan_where
from flax_mha.core.typing import Array, ParamsLike, PRNGKey, Shape
from flax_mha.layer.adapters import LoraCall, adapted
from flax_mha.layer.arguments import Arrays, Restrictions
from flax_mha.layer.caches import CrossCache, KVCache
from flax_mha.layer.call import checked_folding, mask_by_position, prepare
from flax_mha.layer.extend import News, View, extend, misplaced, read_source
from flax_mha.layer.heads import Heads
from flax_mha.layer.making import heads_of
from flax_mha.layer.outputs import (
    attention_axes,
    cache_spec,
    output_spec,
    projection_specs,
    scores_spec,
)
from flax_mha.layer.placement import distance_bias
from flax_mha.layer.projection import as_rank
from flax_mha.layer.scoring import score_of
from flax_mha.layer.stored import stored
from flax_mha.masks import Mask


class Flags(NamedTuple):
    """The static arguments of one call."""

    use_causal_mask: bool
    return_attention_scores: bool
    return_projections: bool


class Activations(NamedTuple):
    """Every array of one call, each with the leading axes of its own input: what `forward` returns.

    Attributes:
        query: the projected query `[B, T, N, H]`; None with a cache, like key, value and gate.
        key: the projected key `[B, S, K, H]`.
        value: the projected value `[B, S, K, V]`.
        gate: sigmoid(query . W_gate + b_gate) `[B, T, N, V]`; None without `use_gate`.
        output: what `multi_head_attention` returns, `[B, T, *E]`.
        attention_scores: the weights before dropout `[B, N, T, S]`; None where not asked for.
        cache: the cache for the next call, with the tokens of this one; None without one.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=16, use_gate=True)
        >>> x = jax.numpy.ones((4, 8, 32))
        >>> params = flax_mha.init_params(jax.random.key(0), config, x.shape)
        >>> activations = flax_mha.forward(params, x, x, config=config)
        >>> activations.gate.shape, activations.output.shape
        ((4, 8, 2, 16), (4, 8, 32))
    """

    query: Array | None
    key: Array | None
    value: Array | None
    gate: Array | None
    output: Array
    attention_scores: Array | None
    cache: KVCache | CrossCache | None = None


@functools.partial(jax.jit, static_argnames=("config", "flags"))
def layer(
    params: ParamsLike,
    arrays: Arrays,
    restrictions: Restrictions,
    dropout_key: PRNGKey | None,
    cache: KVCache | CrossCache | None = None,
    lora: LoraCall | None = None,
    *,
    config: MultiHeadAttentionConfig,
    flags: Flags,
) -> Activations:
    """The equation, with the explicit axes of a mesh made automatic where the arrays have any."""
    data = (params, arrays, restrictions, dropout_key, cache, lora)
    cut = attention_axes(params, arrays, config) if cache is None else None
    run = functools.partial(_equation, config=config, flags=flags, cut=cut)
    return with_auto_axes(run, lambda: _placed(params, arrays, cache, config, flags), *data)


def _placed(
    params: ParamsLike,
    arrays: Arrays,
    cache: KVCache | CrossCache | None,
    config: MultiHeadAttentionConfig,
    flags: Flags,
) -> Activations:
    """Where each result of a call on a mesh with explicit axes is to be: a spec in its place."""
    folding = checked_folding(params, arrays, config, cache)
    with_scores, with_heads = flags.return_attention_scores, flags.return_projections
    heads = projection_specs(params, arrays, folding) if with_heads else {}
    return Activations(
        **{name: heads.get(name) for name in ("query", "key", "value", "gate")},
        output=output_spec(params, arrays, folding),
        attention_scores=scores_spec(params, arrays, cache, folding) if with_scores else None,
        cache=cache_spec(cache),
    )


def _equation(
    params: ParamsLike,
    arrays: Arrays,
    restrictions: Restrictions,
    dropout_key: PRNGKey | None,
    cache: KVCache | CrossCache | None,
    lora: LoraCall | None,
    config: MultiHeadAttentionConfig,
    flags: Flags,
    cut: Cut | None,
) -> Activations:
    """query, key, value -> projections -> attention -> (gate) -> output projection."""
    call = prepare(params, arrays, restrictions, config, flags.use_causal_mask, cache)
    params = adapted(params, lora)
    project, folding = call.project, call.folding
    heads = heads_of(params, call, config, cached=cache is not None)
    query_BTNH = heads.query()
    view, new_cache = _view(heads, flags, cache)
    view = heads.read(view)
    if cache is not None:  # without one it is among the call's other restrictions
        view = view.with_mask(mask_by_position(restrictions))
    attended = attention_cut(
        cut,
        query_BTNH,
        view.key_BSKH,
        view.value_BSKV,
        scales=view.scales,
        mask=view.mask,
        bias=view.bias_bnts,
        score=score_of(params, config, query_BTNH.dtype, view.places),
        distance_bias=view.distance_bias,
        sinks=params["sinks"]["logits"] if "sinks" in params else None,
        scale=heads.scale,
        soft_cap=config.soft_cap,
        dropout_rate=config.dropout,
        dropout_key=dropout_key,
        dropout_start=restrictions.dropout_start,
        precision=config.precision,
        implementation=config.implementation,
        context_axis=config.context_axis if cache is None else None,
        return_weights=flags.return_attention_scores,
    )
    context_BTNV, weights_BNTS = attended if flags.return_attention_scores else (attended, None)
    context_BTNV = heads.context(context_BTNV)
    gate_BTNV = None
    if config.use_gate:
        gate_BTNV = jax.nn.sigmoid(project("BTD,DNV->BTNV", call.query_BTD, params["gate"]))
        context_BTNV *= _of_real_queries(gate_BTNV, call.mask)
    output_BTE = project("BTNV,NVE->BTE", context_BTNV, _flat_output(params["attention_output"]))
    if cache is not None:
        wrong_BT = misplaced(cache, call.mask, folding.T)
        output_BTE = _spoilt(wrong_BT[..., None], output_BTE)
        if weights_BNTS is not None:
            weights_BNTS = _spoilt(wrong_BT[:, None, :, None], weights_BNTS)
    output_shape = params["attention_output"]["kernel"].shape[2:]
    unfold = functools.partial(_unfold, folding, flags)
    return Activations(
        query=unfold(query_BTNH, folding.targets),
        key=unfold(view.key_BSKH, folding.sources),
        value=unfold(view.value_BSKV, folding.sources),
        gate=unfold(gate_BTNV, folding.targets),
        output=folding.unfold(output_BTE, folding.targets, output_shape),
        attention_scores=None if weights_BNTS is None else _unfold_scores(folding, weights_BNTS),
        cache=new_cache,
    )


def _view(heads: Heads, flags: Flags, cache: Any) -> tuple[View, Any]:
    """What the queries may see: this call's keys, a cache that grows by them, or an encoder's."""
    params, call, config = heads.params, heads.call, heads.config
    if isinstance(cache, CrossCache):
        T, S = call.folding.T, cache.key.shape[-2]
        bias = distance_bias(params, config, T, S, reach=(cache.max_queries or T) - T)
        cache, view = read_source(cache, T, call.mask, call.bias_bnts, bias)
        return view, cache
    key_BSKH, value_BSKV = heads.key(), heads.value()
    T, S = call.folding.T, call.folding.S
    if cache is None:
        bias = distance_bias(params, config, T, S)
        return View(key_BSKH, value_BSKV, call.mask, call.bias_bnts, bias), None
    real_bT, causal = call.mask.key_padding, flags.use_causal_mask
    as_stored = stored(key_BSKH, value_BSKV, cache.key_scale is not None)
    news = News(as_stored, real_bT, causal, config.chunk_size)
    bias = distance_bias(params, config, T, cache.capacity + T, reach=cache.capacity)
    cache, view = extend(cache, news, bias)
    return view, cache


def _spoilt(wrong: Array, x: Array) -> Array:
    return jnp.where(wrong, nan_where(wrong, x.dtype), x)


def _unfold_scores(folding: Folding, weights_BNTS: Array | None) -> Array | None:
    """Keras's order; over a cache's slots the keys are one axis."""
    if weights_BNTS is None:
        return None
    if weights_BNTS.shape[-1] == folding.S:
        return folding.unfold_scores(weights_BNTS)
    return weights_BNTS.reshape(*folding.batch, *weights_BNTS.shape[1:])


def _of_real_queries(gate_BTNV: Array, mask: Mask) -> Array:
    """The gate with zeros at removed queries, whose NaN times a context of 0 would be NaN."""
    if mask.query_padding is None:
        return gate_BTNV
    return jnp.where(as_rank(mask.query_padding, gate_BTNV.ndim), gate_BTNV, 0)


def _flat_output(projection: Any) -> dict[str, Any]:
    """The output projection with its feature axes merged: NVE and E."""
    N, V, *features = projection["kernel"].shape
    shapes = {"kernel": (N, V, math.prod(features)), "bias": (math.prod(features),)}
    flat = {leaf: projection[leaf].reshape(shapes[leaf]) for leaf in shapes if leaf in projection}
    return flat | ({"lora": projection["lora"].flat()} if "lora" in projection else {})


def _unfold(folding: Folding, flags: Flags, x: Array | None, lengths: Shape) -> Array | None:
    """A projection with its input's leading axes, where projections were asked for."""
    if x is None or not flags.return_projections:
        return None
    return folding.unfold(x, lengths, x.shape[2:])
