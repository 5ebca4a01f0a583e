"""What a call with a cache may hold, as far as it can be seen before tracing hides the values."""

from typing import Any

import jax
import numpy as np

from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.layer.arguments import Arrays, Restrictions
from flax_mha.layer.caches import CrossCache, KVCache

# A growing cache holds real tokens alone, in order: that is what its masks are made of.
_READ_WITH_KV_CACHE = ("value_mask", "positions")


def check_cached_call(
    cache: Any,
    arrays: Arrays,
    restrictions: Restrictions,
    config: MultiHeadAttentionConfig,
    use_causal_mask: bool,
) -> None:
    """Refuses arguments that a cache cannot honour, a full cache, and padding that has holes."""
    if isinstance(cache, CrossCache):
        return _check_cross(arrays)
    checks.instance("cache", cache, KVCache)
    if arrays[1] is None:
        checks.fail(TypeError, "A KVCache needs `value`, the new tokens.", "value=None")
    for name, given in restrictions._asdict().items():
        if given is not None and name not in _READ_WITH_KV_CACHE:
            rule = f"With a KVCache, `{name}` cannot be honoured."
            remedy = "Mark the real new tokens by `value_mask=` [B, T], padded on the right."
            checks.fail(NotImplementedError, rule, f"{name} and a cache", remedy)
    if config.sliding_window is not None and not use_causal_mask:
        rule = "A cache with a sliding window needs `use_causal_mask=True`."
        checks.fail(ValueError, rule, f"sliding_window={config.sliding_window}, no causal order")
    _check_room(cache, arrays, restrictions.value_mask)


def _check_cross(arrays: Arrays) -> None:
    if arrays[1] is not None or arrays[2] is not None:
        rule = "A CrossCache stands in for value and key: pass `value=None`."
        checks.fail(ValueError, rule, "value or key, and a CrossCache")


def _check_room(cache: KVCache, arrays: Arrays, value_mask: Any) -> None:
    """Under jit the values are hidden: `KVCache.overflowed` tells, and the outputs are NaN."""
    if isinstance(cache.length, jax.core.Tracer) or isinstance(value_mask, jax.core.Tracer):
        return
    count = np.asarray(arrays[0].shape[-2])
    if value_mask is not None:
        real = np.asarray(value_mask)
        if (real[..., 1:] & ~real[..., :-1]).any():
            rule = "With a KVCache, `value_mask` must be True first, then False: right padding."
            checks.fail(ValueError, rule, "real tokens behind a padded one")
        count = real.sum(-1)
    after = np.asarray(cache.length) + count
    if not cache.is_ring and (after > cache.capacity).any():
        rule = f"The cache is full: it holds {cache.capacity} tokens an example."
        evidence = f"{int(after.max())} tokens with those of this call"
        remedy = "Make a larger one by `init_cache(config, batch_shape, capacity)`."
        checks.fail(ValueError, rule, evidence, remedy)
