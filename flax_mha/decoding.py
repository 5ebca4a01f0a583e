"""Caches for generation: of a decoder's own tokens, and of an encoder's output.

Prefill and steps are one call, `multi_head_attention(..., cache=cache)`, with any number of tokens.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import boxes, checks
from flax_mha.core.meshes import with_auto_axes
from flax_mha.core.typing import Array, ParamsLike
from flax_mha.layer import CrossCache, KVCache
from flax_mha.layer.adapters import LoraCall, adapted, checked_lora
from flax_mha.layer.arguments import Restrictions, check_source
from flax_mha.layer.cached_call import (
    check_limit,
    check_no_chunks,
    check_no_grid,
    check_order,
)
from flax_mha.layer.call import checked_folding, prepare
from flax_mha.layer.making import heads_of
from flax_mha.layer.outputs import cross_cache_spec
from flax_mha.layer.stored import stored
from flax_mha.params.quantized import read_kernels
from flax_mha.params.tree import features_of


def init_cache(
    config: MultiHeadAttentionConfig,
    batch_shape: int | Sequence[int],
    capacity: int,
    dtype: Any = None,
    *,
    slack: int = 0,
    is_causal: bool = True,
) -> KVCache:
    """An empty cache for one layer.

    Args:
        config: the layer; its `num_kv_heads` and `sliding_window` make the cache small.
        batch_shape: the batch axes of the inputs, an int or a tuple; () for one sequence `[T, D]`.
        capacity: the most tokens that an example may have, prompt included. With a sliding window
            of at most that size, the cache is a ring of the window's size, and never full.
        dtype: the compute dtype; None = the config's `dtype`, or else its `param_dtype`. Parameters
            and inputs of different dtypes compute in what they promote to: name that. "int8" stores
            each token's heads as int8 and a scale, whatever is computed in: an entry is off by
            1/254 of the head's largest at most.
        slack: further slots of a ring. It can then be rewound by slack + 1 tokens however often it
            went round, as speculative decoding needs; a cache that is no ring needs none.
        is_causal: False = the new tokens of one call see each other as well as the past, unless the
            call has `use_causal_mask=True`: for the prompt of a prefix language model.

    Returns:
        A `KVCache` of zeros with length 0.

    Raises:
        ValueError: a capacity below 1, a negative slack, a window without causal order.
        TypeError: a dtype that is neither floating nor int8.

    Memory: 2 K S H numbers an example, S = capacity or, of a ring, sliding_window + slack; of a
    latent layer (rank + shared_dim) S. Of int8 H + 4 bytes stand for H numbers.

    Guide: `python -m flax_mha guide decoding`.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=4, key_dim=16, num_kv_heads=2)
        >>> x = jax.random.normal(jax.random.key(0), (3, 7, 64))
        >>> params = flax_mha.init_params(jax.random.key(1), config, x.shape)
        >>> attend = lambda x, cache: flax_mha.multi_head_attention(
        ...     params, x, x, config=config, cache=cache, use_causal_mask=True
        ... )
        >>> cache = flax_mha.init_cache(config, 3, capacity=100)
        >>> prompt, cache = attend(x[:, :5], cache)
        >>> step, cache = attend(x[:, 5:6], cache)
        >>> step.shape, cache.length.tolist()
        ((3, 1, 64), [6, 6, 6])
    """
    checks.instance("config", config, MultiHeadAttentionConfig)
    check_no_grid(config)
    slots = checks.integer("capacity", capacity, minimum=1)
    window = config.sliding_window
    is_ring = window is not None and window <= slots
    slack = checks.integer("slack", slack, minimum=0)
    slots = window + slack if window is not None and is_ring else slots
    check_order(checks.boolean("is_causal", is_causal), config)
    is_one = hasattr(batch_shape, "__index__") and not checks.is_array(batch_shape)
    batch = checks.sizes("batch_shape", (batch_shape,) if is_one else batch_shape)
    as_int8 = _is_int8(dtype)
    given = [x for x in (dtype, config.dtype, config.param_dtype) if x is not None]
    name = "int8" if as_int8 else given[0]
    if not as_int8:
        checks.x64_enabled("dtype", checks.floating_dtype("dtype", name))
    _, K, H, V = config.cache_dims
    scale = lambda: jnp.zeros((*batch, K, slots), "float32") if as_int8 else None  # noqa: E731
    return KVCache(
        jnp.zeros((*batch, K, slots, H), name),
        jnp.zeros((*batch, K, slots, V), name),
        length=jnp.zeros(batch, "int32"),
        start=jnp.zeros(batch, "int32"),
        window=window if is_ring else None,
        is_causal=is_causal,
        key_scale=scale(),  # arrays of their own: a step may be given both to write into
        value_scale=scale(),
    )


def _is_int8(dtype: Any) -> bool:
    """Whether it names int8; what names no dtype at all is refused elsewhere."""
    try:
        one = isinstance(dtype, str | np.dtype | type) or hasattr(dtype, "dtype")
        return one and not checks.is_array(dtype) and bool(jnp.dtype(dtype) == jnp.int8)
    except TypeError:
        return False


def init_cross_cache(
    params: ParamsLike,
    value: Array,
    key: Array | None = None,
    *,
    config: MultiHeadAttentionConfig,
    value_mask: Array | None = None,
    max_queries: int | None = None,
    dtype: Any = None,
    lora: ParamsLike | None = None,
    lora_scale: Any = 1.0,
) -> CrossCache:
    """An encoder's keys and values, projected once for all steps of a decoder.

    Args:
        params: the layer's parameters.
        value: the encoder's output `[B, S, M]`.
        key: `[B, S, C]`; None = value.
        config: the layer.
        value_mask: booleans `[B, S]`, True = real.
        max_queries: the most queries that an example will have, all calls together; None = no
            limit. ALiBi and relative biases need it: they are tables of all distances.
        dtype: "int8", as in `init_cache`; None = the compute dtype.
        lora: low-rank adapters, those of the calls that will read the cache.
        lora_scale: the factor of what they add.

    Returns:
        A `CrossCache`: pass it as `cache=`, with `value=None`, and the one that comes back to the
        next call. It counts the queries: they stand at 0, 1, 2, ... beside the keys.

    Raises:
        ValueError: a bias of distance without `max_queries`; another dtype than these; and as
            `multi_head_attention`.

    Memory: O(B S (H + V) K).

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=4, key_dim=16)
        >>> encoded = jax.random.normal(jax.random.key(0), (3, 7, 64))
        >>> params = flax_mha.init_params(jax.random.key(1), config, encoded.shape)
        >>> cache = flax_mha.init_cross_cache(params, encoded, config=config)
        >>> query = jax.random.normal(jax.random.key(2), (3, 1, 64))
        >>> flax_mha.multi_head_attention(params, query, None, config=config, cache=cache)[0].shape
        (3, 1, 64)
    """
    checks.instance("config", config, MultiHeadAttentionConfig)
    checks.floating_array("value", value, "[B, S, M]")
    mask = None if value_mask is None else checks.boolean_mask("value_mask", value_mask)
    if max_queries is not None:
        checks.integer("max_queries", max_queries, minimum=1)
    check_limit(max_queries, config)
    check_no_chunks(config)
    check_no_grid(config)
    if key is not None:
        checks.floating_array("key", key, "[B, S, C]")
    key = value if key is None else key
    check_source(config, (None, value, key))
    adapters = checked_lora(LoraCall(lora, lora_scale))
    as_int8 = _is_int8(dtype)
    if dtype is not None and not as_int8:
        rule = '`dtype` must be "int8", or None for the compute dtype.'
        checks.fail(ValueError, rule, f"dtype={dtype!r}", "Set the config's `dtype`.")
    params = read_kernels(params)
    cache = _project_source(params, value, key, mask, adapters, config=config, as_int8=as_int8)
    return dataclasses.replace(cache, max_queries=max_queries)


@functools.partial(jax.jit, static_argnames=("config", "as_int8"))
def _project_source(
    params: ParamsLike,
    value: Array,
    key: Array,
    mask: Array | None,
    lora: LoraCall | None,
    *,
    config: MultiHeadAttentionConfig,
    as_int8: bool,
) -> CrossCache:
    """The cache, with the explicit axes of a mesh made automatic where the arrays have any."""
    boxes.refuse(params, "params")
    run = functools.partial(_projected, config=config, as_int8=as_int8)

    def placed() -> CrossCache:
        checked_folding(params, (_no_query(params, value), value, key), config)
        return cross_cache_spec(params, value, key, mask, as_int8)

    return with_auto_axes(run, placed, params, value, key, mask, lora)


def _no_query(params: ParamsLike, value: Array) -> jax.ShapeDtypeStruct:
    """Queries are not needed, only their shape."""
    D = features_of(params)["query_features"]
    return jax.ShapeDtypeStruct((*value.shape[:-1], D), value.dtype)


def _projected(
    params: ParamsLike,
    value: Array,
    key: Array,
    mask: Array | None,
    lora: LoraCall | None,
    config: MultiHeadAttentionConfig,
    as_int8: bool,
) -> CrossCache:
    query = _no_query(params, value)
    nobody = jnp.zeros(query.shape, query.dtype)
    call = prepare(params, (nobody, value, key), Restrictions(value_mask=mask), config, False)
    batch, heads = call.folding.batch, heads_of(adapted(params, lora), call, config, cached=True)
    fold = lambda x: x.swapaxes(1, 2).reshape(*batch, *x.shape[2:3], x.shape[1], *x.shape[3:])  # noqa: E731
    source = stored(heads.key(), heads.value(), as_int8)
    key_scale, value_scale = source.scales or (None, None)
    return CrossCache(
        fold(source.key_BSKH),
        fold(source.value_BSKV),
        length=jnp.zeros(batch, "int32"),
        mask=None if mask is None else jnp.broadcast_to(mask, (*batch, mask.shape[-1])),
        key_scale=None if key_scale is None else fold(key_scale),
        value_scale=None if value_scale is None else fold(value_scale),
    )
