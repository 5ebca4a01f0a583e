"""Keys and values as a cache stores them: as they are, or int8 with a scale a token and head."""

import math
from typing import Any, NamedTuple

import jax

from flax_mha.attention.contract import Scales
from flax_mha.core import checks
from flax_mha.core.quantization import Quantized, quantized
from flax_mha.core.typing import Array
from flax_mha.layer.caches import CrossCache, KVCache


class Stored(NamedTuple):
    """Keys and values with their heads last, and what they are multiplied by if they are int8."""

    key_BSKH: Array
    value_BSKV: Array
    scales: Scales | None = None

    def map(self, function: Any) -> "Stored":
        """`function` of each array `[B, S, K, ...]`."""
        return jax.tree.map(function, self)


def held(cache: KVCache | CrossCache) -> Stored:
    """What a cache holds, of its batch axes as one."""
    scales = None
    if cache.key_scale is not None:
        scales = Scales(*(_heads_last(x[..., None])[..., 0] for x in scales_of(cache)))
    return Stored(_heads_last(cache.key), _heads_last(cache.value), scales)


def stored(key_BSKH: Array, value_BSKV: Array, as_int8: bool) -> Stored:
    """Keys and values as a cache takes them in."""
    if not as_int8:
        return Stored(key_BSKH, value_BSKV)
    key, value = _rounded(key_BSKH), _rounded(value_BSKV)
    return Stored(key.value, value.value, Scales(key.scale, value.scale))


def scales_of(cache: Any) -> tuple[Any, Any]:
    return cache.key_scale, cache.value_scale


def flat(x: Array) -> Array:
    """The batch axes as one; not by -1, for a cache of latents has values of no features."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _heads_last(x: Array) -> Array:
    """`[*batch, K, S, F]` to `[B, S, K, F]`."""
    return flat(x).swapaxes(1, 2)


@jax.custom_jvp
def _rounded(x_BSKF: Array) -> Quantized:
    return quantized(x_BSKF, -1)


def _tangent(primals: Any, tangents: Any) -> Any:
    """Rounding has the slope 0: a gradient through it would be lost in silence."""
    rule = "An int8 cache has no gradient: the keys and values that it takes in are rounded."
    remedy = "Train with a cache of the compute dtype, or without one."
    return checks.fail(NotImplementedError, rule, "a derivative of a call that writes one", remedy)


_rounded.defjvp(_tangent)
