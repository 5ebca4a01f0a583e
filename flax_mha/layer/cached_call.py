"""What a call with a cache may hold: shapes and types, and values before tracing hides them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.folding import Folding
from flax_mha.core.typing import DType
from flax_mha.layer.arguments import Arrays, Restrictions
from flax_mha.layer.caches import CrossCache, KVCache, is_spoiled
from flax_mha.masks import Mask, Neighborhood
from flax_mha.masks.placed import parts_of_indices
from flax_mha.positions import DistanceFunction

# A growing cache holds real tokens alone, in order: that is what its masks are made of.
_READ_WITH_KV_CACHE = ("value_mask", "positions", "dropout_start")


def check_cached_call(cache: Any, arrays: Arrays, restrictions: Restrictions) -> None:
    """Refuses arguments that a cache cannot honour, a full cache, and padding that has holes."""
    by_position = isinstance(restrictions.attention_mask, Mask)
    if by_position:
        _check_has_positions(restrictions.attention_mask)
    if isinstance(cache, CrossCache):
        _check_source(arrays)
        return _check_reads(cache, arrays, restrictions.query_mask)
    checks.instance("cache", cache, KVCache)
    if arrays[1] is None:
        checks.fail(TypeError, "A KVCache needs `value`, the new tokens.", "value=None")
    read = (*_READ_WITH_KV_CACHE, *(["attention_mask"] if by_position else []))
    for name, given in restrictions._asdict().items():
        if given is not None and name not in read:
            rule = f"With a KVCache, `{name}` cannot be honoured."
            remedy = "Mark the real new tokens by `value_mask=` [B, T], padded on the right."
            if name == "attention_mask":
                remedy += " A rule by positions is a Mask: `Mask.function(f)`."
            checks.fail(NotImplementedError, rule, f"{name} and a cache", remedy)
    _check_room(cache, arrays, restrictions.value_mask)


def _check_has_positions(mask: Mask) -> None:
    """With a cache, t and s are positions in a sequence whose length no array has to show."""
    if parts := parts_of_indices(mask):
        rule = "With a cache, a Mask is asked by positions: of functions and bands, no arrays."
        remedy = "Look it up: `Mask.function(lambda b, n, t, s: array[b, t, s])`."
        checks.fail(NotImplementedError, rule, f"a Mask with {', '.join(parts)}", remedy)


def _check_source(arrays: Arrays) -> None:
    if arrays[1] is not None or arrays[2] is not None:
        rule = "A CrossCache stands in for value and key: pass `value=None`."
        checks.fail(ValueError, rule, "value or key, and a CrossCache")


def _hidden(*arrays: Any) -> bool:
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def _check_reads(cache: CrossCache, arrays: Arrays, query_mask: Any) -> None:
    """Under jit the values are hidden: `CrossCache.overflowed` tells, and the outputs are NaN."""
    if _hidden(cache.length):
        return
    length = np.asarray(cache.length)
    _check_whole(is_spoiled(length, 0, None))
    if cache.max_queries is None or _hidden(query_mask):
        return
    T = arrays[0].shape[-2]
    real = np.ones(T, bool) if query_mask is None else _fitting("query_mask", query_mask, arrays[0])
    last = np.where(real, np.arange(1, T + 1), 0).max(-1, initial=0)
    after = length + last
    if (after > cache.max_queries).any():
        rule = f"The cache serves at most max_queries={cache.max_queries} queries an example."
        evidence = f"{int(after.max())} queries with those of this call"
        remedy = "Make it by `init_cross_cache(..., max_queries=)` for more."
        checks.fail(ValueError, rule, evidence, remedy)


def _check_room(cache: KVCache, arrays: Arrays, value_mask: Any) -> None:
    """Under jit the values are hidden: the cache tells by `overflowed` or `spoiled`, as NaN."""
    count = np.asarray(arrays[0].shape[-2])
    if value_mask is not None and not _hidden(value_mask):
        real = _fitting("value_mask", value_mask, arrays[0])
        if (real[..., 1:] & ~real[..., :-1]).any():
            rule = "With a KVCache, `value_mask` must be True first, then False: right padding."
            remedy = (
                "Roll each row to its front: `x[b] = jnp.roll(x[b], -padded, axis=0)`, masks too."
            )
            checks.fail(ValueError, rule, "real tokens behind a padded one", remedy)
        count = real.sum(-1)
    if _hidden(value_mask, cache.length, cache.start):
        return
    length = np.asarray(cache.length)
    _check_whole(is_spoiled(length, np.asarray(cache.start), cache.window))
    after = length + count
    if not cache.is_ring and (after > cache.capacity).any():
        rule = f"The cache is full: it holds {cache.capacity} tokens an example."
        evidence = f"{int(after.max())} tokens with those of this call"
        remedy = "Make a larger one by `init_cache(config, batch_shape, capacity)`."
        checks.fail(ValueError, rule, evidence, remedy)


def _fitting(name: str, mask: Any, query: Any) -> np.ndarray:
    """The mask of the new tokens, counted here before the layer checks its shape."""
    sizes, whole = np.shape(mask)[::-1], tuple(query.shape[:-1])
    if len(sizes) > len(whole) or any(n not in (1, m) for n, m in zip(sizes, whole[::-1])):
        rule = f"`{name}` must have the shape [*batch, T] = {whole} of the new tokens."
        checks.fail(ValueError, rule, f"shape {sizes[::-1]}")
    return np.asarray(mask)


def _check_whole(spoiled: np.ndarray) -> None:
    if spoiled.any():
        rule = "An example that is `spoiled` gives NaN alone."
        evidence = f"cache.spoiled at {np.argwhere(spoiled)[:5].tolist()}"
        remedy = (
            "It comes of padding that is not on the right, or of rows and lengths out of range."
        )
        checks.fail(ValueError, rule, evidence, f"{remedy} Begin anew: `cache.rewind(0)`.")


# --- shapes, dtypes and what is static ----------------------------------------------------------


def check_cache(
    cache: KVCache | CrossCache, folding: Folding, config: MultiHeadAttentionConfig, dtype: DType
) -> None:
    """Refuses a cache that was made for other inputs, another config or another dtype."""
    if config.context_axis is not None:
        rule = "A cache holds all keys on each device, which a context axis would cut."
        evidence = f"a cache, and context_axis={config.context_axis.name!r}"
        checks.fail(
            NotImplementedError, rule, evidence, "Call with `config.replace(context_axis=None)`."
        )
    check_no_grid(config)
    if folding.attended != (len(folding.batch),):
        rule = "A cache needs inputs [*batch, T, D] of which T alone is attended."
        evidence = f"attended axes {folding.attended}, batch axes {folding.batch}"
        checks.fail(ValueError, rule, evidence, "Set `attention_axes=-2`.")
    if isinstance(cache, CrossCache):
        check_no_chunks(config)
    _check_arrays(cache, folding, config, dtype)
    if isinstance(cache, KVCache):
        _check_growing(cache, folding, config)
    else:
        check_limit(cache.max_queries, config)
        if cache.max_queries is not None and cache.max_queries < folding.T:
            rule = f"The cache serves at most max_queries={cache.max_queries} queries an example."
            checks.fail(ValueError, rule, f"T={folding.T}")


def _check_arrays(
    cache: KVCache | CrossCache, folding: Folding, config: MultiHeadAttentionConfig, dtype: DType
) -> None:
    _, K, H, V = config.cache_dims
    name_of_dtype = jnp.dtype(dtype).name
    for name, array, features in (("key", cache.key, H), ("value", cache.value, V)):
        expected = (*folding.batch, K, cache.key.shape[-2], features)
        if array.shape != expected:
            rule = f"`cache.{name}` must be [*batch, K, S, {'HV'[name == 'value']}] = {expected}."
            remedy = "Make it by `init_cache(config, batch_shape, capacity, dtype)` of this config."
            checks.fail(ValueError, rule, f"shape {array.shape}", remedy)
        scale = getattr(cache, f"{name}_scale")
        if scale is not None:
            _check_int8(name, array, scale)
        elif array.dtype != dtype:
            rule = f"`cache.{name}` must have the compute dtype {name_of_dtype}."
            remedy = f"Pass `dtype='{name_of_dtype}'` to `init_cache`, or set the config's `dtype`."
            checks.fail(TypeError, rule, f"dtype {array.dtype}", remedy)
    if (cache.key_scale is None) != (cache.value_scale is None):
        rule = "A cache is int8 as a whole: keys and values have scales, or none has."
        checks.fail(ValueError, rule, "one of `key_scale` and `value_scale`")
    if cache.length.shape != folding.batch or cache.length.dtype != jnp.int32:
        rule = f"`cache.length` must be int32 [*batch] = {folding.batch}."
        checks.fail(ValueError, rule, f"{cache.length.dtype} of shape {cache.length.shape}")


def _check_int8(name: str, array: Any, scale: Any) -> None:
    """What `init_cache(..., dtype="int8")` makes, and no floats put in its place."""
    remedy = "Pass the cache that the last call returned."
    if array.dtype != jnp.int8:
        rule = f"`cache.{name}` must be int8, for the cache has a `{name}_scale`."
        checks.fail(TypeError, rule, f"dtype {array.dtype}", remedy)
    if scale.shape != array.shape[:-1] or scale.dtype != jnp.float32:
        rule = f"`cache.{name}_scale` must be float32 [*batch, K, S] = {array.shape[:-1]}."
        checks.fail(ValueError, rule, f"{scale.dtype} of shape {scale.shape}", remedy)


def check_no_grid(config: MultiHeadAttentionConfig) -> None:
    """A grid is whole from the start; the ends of a cache move, and windows with them."""
    if isinstance(config.sliding_window, Neighborhood):
        rule = "A cache has no window in several axes: `sliding_window` must be an int or None."
        evidence = f"a cache, and sliding_window={config.sliding_window}"
        checks.fail(NotImplementedError, rule, evidence, "Call without a cache.")


def check_no_chunks(config: MultiHeadAttentionConfig) -> None:
    """Chunks are those of one sequence, which sees itself."""
    if config.chunk_size is not None:
        rule = "A CrossCache has no chunks: a decoder sees all that its encoder wrote."
        checks.fail(NotImplementedError, rule, f"chunk_size={config.chunk_size}")


def check_limit(max_queries: int | None, config: MultiHeadAttentionConfig) -> None:
    """A bias of distance is a table of all distances, whose end must be known."""
    if max_queries is None and isinstance(config.position, DistanceFunction):
        rule = "A bias of distance needs to know how far the queries of a CrossCache go."
        evidence = f"position={config.position} in the config, max_queries=None"
        remedy = "Pass `max_queries=` to `init_cross_cache`: the most queries of an example."
        checks.fail(ValueError, rule, evidence, remedy)


def _check_growing(cache: KVCache, folding: Folding, config: MultiHeadAttentionConfig) -> None:
    if folding.targets != folding.sources:
        rule = "With a KVCache, query and value hold the same new tokens: T == S."
        remedy = "For an encoder's output, use `init_cross_cache`."
        checks.fail(ValueError, rule, f"T={folding.targets}, S={folding.sources}", remedy)
    window = config.sliding_window
    if cache.is_ring and cache.window != window:
        rule = "A ring must serve the window that is the config's sliding_window."
        evidence = f"a ring for {cache.window}, sliding_window={window}"
        checks.fail(ValueError, rule, evidence, "Make it by `init_cache` of this config.")
    if not cache.is_ring and window is not None and cache.capacity > window:
        rule = "A layer with a sliding window needs a ring of that size."
        evidence = f"capacity {cache.capacity}, sliding_window={window}"
        checks.fail(ValueError, rule, evidence, "Make it by `init_cache` of this config.")
    check_order(cache.is_causal, config)


def check_order(is_causal: bool, config: MultiHeadAttentionConfig) -> None:
    """A window that looks back alone is causal."""
    if not is_causal and config.sliding_window is not None:
        rule = "A cache with a sliding window is causal."
        evidence = f"is_causal=False, sliding_window={config.sliding_window}"
        checks.fail(ValueError, rule, evidence)
