"""Attention scores of chosen queries, without the matrix of all."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention import dot_product_attention
from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.folding import Folding
from flax_mha.core.meshes import with_auto_axes
from flax_mha.core.nans import nan_where
from flax_mha.core.typing import Array, ParamsLike
from flax_mha.layer.adapters import LoraCall, adapted, checked_lora
from flax_mha.layer.arguments import Restrictions, check_arrays, check_source, checked_restrictions
from flax_mha.layer.call import checked_folding, prepare
from flax_mha.layer.extend import Places
from flax_mha.layer.making import heads_of
from flax_mha.layer.outputs import scores_spec
from flax_mha.layer.placement import distance_bias
from flax_mha.layer.scoring import score_of
from flax_mha.params.quantized import read_kernels


def attention_scores(
    params: ParamsLike,
    query: Array,
    value: Array,
    key: Array | None = None,
    *,
    config: MultiHeadAttentionConfig,
    query_rows: Array,
    use_causal_mask: bool = False,
    lora: ParamsLike | None = None,
    lora_scale: Any = 1.0,
    **restrictions: Any,
) -> Array:
    """The rows `query_rows` of what `return_attention_scores=True` would return.

    Args:
        params: as in `multi_head_attention`, and so are all others.
        query: `[B, T, D]`.
        value: `[B, S, M]`; read only where `key` is None.
        key: `[B, S, C]`; None = value.
        config: the layer's static description; its `implementation` is not used.
        query_rows: integers `[R]`, each in [0, T): positions in raster order of the attended axes.
        use_causal_mask: no key after the query, which keeps its own position.
        lora: low-rank adapters of the projections.
        lora_scale: the factor of what they add.
        **restrictions: query_mask, value_mask, key_mask, attention_mask, bias, segment_ids,
            positions.

    Returns:
        The weights before dropout, `[*batch, N, R, *S axes]`. A row that under `jax.jit` turns out
        to be outside [0, T) is NaN.

    Raises:
        ValueError: a row outside [0, T); otherwise as `multi_head_attention`.
        TypeError: rows that are no integers.

    Memory: O(B N R S) and the projections; the `[T, S]` matrix never exists.

    Guide: `python -m flax_mha guide long_context`.

    Example:
        >>> import jax, jax.numpy as jnp, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=2, key_dim=16)
        >>> x = jax.random.normal(jax.random.key(0), (1, 100, 32))
        >>> params = flax_mha.init_params(jax.random.key(1), config, x.shape)
        >>> rows = jnp.array([3, 99])
        >>> flax_mha.attention_scores(params, x, x, config=config, query_rows=rows).shape
        (1, 2, 2, 100)
    """
    arrays = (query, value, value if key is None else key)
    check_arrays(arrays)
    check_source(config, arrays)
    params = read_kernels(params)
    if restrictions.get("dropout_start") is not None:
        rule = "`attention_scores` are the weights before dropout: it takes no `dropout_start`."
        checks.fail(TypeError, rule, "dropout_start")
    checked = checked_restrictions(config, Restrictions(**restrictions))
    if config.context_axis is not None:
        rule = "`attention_scores` are of whole sequences, in their order."
        remedy = "Call with `config.replace(context_axis=None)`, after `zigzag_inverse` if need be."
        evidence = f"context_axis={config.context_axis}"
        checks.fail(NotImplementedError, rule, evidence, remedy)
    causal = checks.boolean("use_causal_mask", use_causal_mask)
    rows = checks.positions("query_rows", query_rows)
    checks.rows_within("query_rows", rows, _length(query, config))
    adapters = checked_lora(LoraCall(lora, lora_scale))
    data = (params, arrays, checked, rows, adapters)
    return _scores(*data, config=config, use_causal_mask=causal)


def _length(query: Array, config: MultiHeadAttentionConfig) -> int:
    return Folding.of(query.shape, query.shape, config.attention_axes).T


@functools.partial(jax.jit, static_argnames=("config", "use_causal_mask"))
def _scores(
    params: ParamsLike,
    arrays: tuple[Array, Array, Array],
    restrictions: Restrictions,
    rows: Array,
    lora: LoraCall | None,
    *,
    config: MultiHeadAttentionConfig,
    use_causal_mask: bool,
) -> Array:
    """The rows, with the explicit axes of a mesh made automatic where the arrays have any."""
    run = functools.partial(_of_rows, config=config, use_causal_mask=use_causal_mask)
    placed = lambda: scores_spec(  # noqa: E731
        params, arrays, None, checked_folding(params, arrays, config), rows
    )
    return with_auto_axes(run, placed, params, arrays, restrictions, rows, lora)


def _of_rows(
    params: ParamsLike,
    arrays: tuple[Array, Array, Array],
    restrictions: Restrictions,
    rows: Array,
    lora: LoraCall | None,
    config: MultiHeadAttentionConfig,
    use_causal_mask: bool,
) -> Array:
    call = prepare(params, arrays, restrictions, config, use_causal_mask)
    params = adapted(params, lora)
    folding, bias = call.folding, call.bias_bnts
    take = lambda x, axis: x if x is None or x.shape[axis] == 1 else jnp.take(x, rows, axis)  # noqa: E731
    bias = take(bias, 2)
    distances = distance_bias(params, config, folding.T, folding.S)
    if distances is not None:
        dense = distances.of_queries(rows, folding.S)
        bias = dense if bias is None else bias + dense
    position_bR = take(call.query_position_bT, -1)
    of_rows = call._replace(query_BTD=call.query_BTD[:, rows], query_position_bT=position_bR)
    key_BSKH = heads_of(params, call, config).key()
    query_BRNH = heads_of(params, of_rows, config).query()
    places = Places(rows.astype("int32")[None], jnp.arange(folding.S, dtype="int32")[None])
    _, weights_BNRS = dot_product_attention(
        query_BRNH,
        key_BSKH,
        key_BSKH,  # the context is not wanted, so any values do
        mask=call.mask.take_queries(rows, folding.S),
        bias=bias,
        score=score_of(params, config, query_BRNH.dtype, places),
        sinks=params["sinks"]["logits"] if "sinks" in params else None,
        scale=config.scale,
        soft_cap=config.soft_cap,
        precision=config.precision,
        implementation="reference",
        return_weights=True,
    )
    inside_R1 = ((rows >= 0) & (rows < folding.T))[:, None]
    weights_BNRS += nan_where(~inside_R1[None, None], weights_BNRS.dtype)
    return weights_BNRS.reshape(*folding.batch, config.num_heads, len(rows), *folding.sources)
