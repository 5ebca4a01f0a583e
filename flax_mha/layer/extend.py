"""What a cache does in one call: it takes in the new tokens, and shows what their queries may see.

A `KVCache` that is a line holds position p in slot p; one that is a ring, in slot p % S. The
encoder's keys of a `CrossCache` stay as they are; its queries are counted.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_mha.attention import DistanceBias
from flax_mha.attention.contract import Scales
from flax_mha.core.typing import Array
from flax_mha.layer.caches import SPOILED, CrossCache, KVCache, is_spoiled
from flax_mha.layer.chunks import chunk_mask
from flax_mha.layer.stored import Stored, flat, held, scales_of
from flax_mha.masks import Mask
from flax_mha.masks.placed import placed_mask


class Places(NamedTuple):
    """The positions of queries and keys in the whole sequence, int32, b 1 or B.

    A slot that was never written is hidden, and given a position that exists: 0.
    """

    query_bT: Array
    key_bS: Array


class View(NamedTuple):
    """What attention reads: keys and values, who may attend to whom, the biases."""

    key_BSKH: Array
    value_BSKV: Array
    mask: Mask
    bias_bnts: Array | None
    distance_bias: DistanceBias | None
    places: Places | None = None  # where queries and keys stand; None = where their indices say
    scales: Scales | None = None  # of keys and values that are int8

    @classmethod
    def of(
        cls, stored: Stored, mask: Mask, bias_bnts: Any, distance_bias: Any, places: Places
    ) -> "View":
        """Of keys and values as they are stored."""
        key, value, scales = stored
        return cls(key, value, mask, bias_bnts, distance_bias, places, scales)

    def with_mask(self, mask: Mask | None) -> "View":
        """Further restricted by a mask whose t and s are positions."""
        if mask is None:
            return self
        if self.places is not None:
            mask = placed_mask(mask, *self.places)
        return self._replace(mask=self.mask & mask)


class News(NamedTuple):
    """The new tokens of one call: heads as they are stored, which are real, who sees whom."""

    stored: Stored
    real_bT: Array | None
    is_causal: bool
    chunk_size: int | None = None

    @property
    def count_B(self) -> Array:
        B, T = self.stored.key_BSKH.shape[:2]
        if self.real_bT is None:
            return jnp.full(B, T, "int32")
        return jnp.broadcast_to(self.real_bT.sum(1, dtype="int32"), B)

    @property
    def T(self) -> int:
        return self.stored.key_BSKH.shape[1]


def extend(cache: KVCache, news: News, bias: DistanceBias | None) -> tuple[KVCache, View]:
    """The cache with the new tokens, and what their queries may see."""
    if not cache.is_ring:
        return _extend_line(cache, news, bias)
    one_token = news.T == 1
    return (_step_ring if one_token else _extend_ring)(cache, news, bias)


def _extend_line(cache: KVCache, news: News, bias: DistanceBias | None) -> tuple[KVCache, View]:
    """Slot p holds position p: the band says it all, in every block and with every length."""
    length_B, S, T = cache.length.reshape(-1), cache.capacity, news.T
    slot_1S = _index(S)
    places = Places(length_B[:, None] + _index(T), slot_1S)
    mask = Mask.causal(length_B)
    if not (news.is_causal or cache.is_causal):
        mask = Mask.padding(key=slot_1S < (length_B + news.count_B)[:, None])
    if news.chunk_size is not None:
        mask &= chunk_mask(news.chunk_size, *places, query_offset=length_B)
    cache = _written(cache, news, first=0)
    if bias is not None:
        bias = dataclasses.replace(bias, query_offset=length_B)
    return cache, View.of(held(cache), mask, None, bias, places)


def _step_ring(cache: KVCache, news: News, bias: DistanceBias | None) -> tuple[KVCache, View]:
    """One token: written first, it takes the slot of one that has left the window.

    So the slots may be seen in any order: each holds the youngest position that belongs there, and
    its age tells whether that is in the window, and whether it was ever written.
    """
    length_B1, S = cache.length.reshape(-1, 1), cache.capacity
    assert cache.window is not None
    age_BS = (length_B1 - _index(S)) % S
    seen_BS = (age_BS < cache.window) & (age_BS <= length_B1)
    dense = None if bias is None else bias.at(-age_BS[:, None])
    cache = _written(cache, news, first=0)
    mask, places = Mask.padding(key=seen_BS), Places(length_B1, (length_B1 - age_BS).clip(0))
    return cache, View.of(held(cache), mask, dense, None, places)


def _extend_ring(cache: KVCache, news: News, bias: DistanceBias | None) -> tuple[KVCache, View]:
    """Many tokens: they see the ring in the order of its positions, and then each other."""
    length_B, S = cache.length.reshape(-1), cache.capacity
    order_BS = (length_B[:, None] + _index(S)) % S
    unrolled = held(cache).map(
        lambda x: jnp.take_along_axis(x, order_BS.reshape(*order_BS.shape, *(1,) * (x.ndim - 2)), 1)
    )
    T = news.T
    key_position_BS = (length_B[:, None] - S + _index(S + T)).clip(0)
    places = Places(length_B[:, None] + _index(T), key_position_BS)
    held_BS = _index(S) >= S - length_B[:, None]
    real_BT = _index(T) < news.count_B[:, None]
    offset_1 = jnp.full((1,), S, "int32")
    assert cache.window is not None
    mask = Mask.causal(offset_1) & Mask.padding(key=jnp.concatenate([held_BS, real_BT], 1))
    mask &= dataclasses.replace(Mask.window(cache.window - 1, 0), query_offset=offset_1)
    if bias is not None:
        bias = dataclasses.replace(bias, query_offset=offset_1)
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), unrolled, news.stored)
    # Of many tokens only the last S stay: none is written that a later one would replace.
    cache = _written(cache, news, first=news.count_B - S)
    return cache, View.of(both, mask, None, bias, places)


def _index(length: int) -> Array:
    return jnp.arange(length, dtype="int32")[None]


def _written(cache: KVCache, news: News, first: Any) -> KVCache:
    """The real new tokens from `first` on in their slots; what does not fit is dropped."""
    T, S = news.T, cache.capacity
    length_B = cache.length.reshape(-1)
    index_1T = _index(T)
    slot_BT = length_B[:, None] + index_1T
    slot_BT = slot_BT % S if cache.is_ring else slot_BT
    first_B1 = jnp.reshape(first, (-1, 1))
    stays_BT = (index_1T >= first_B1) & (index_1T < news.count_B[:, None])
    slot_BT = jnp.where(stays_BT, slot_BT, S)

    def write(held: Array, new_BTKF: Array) -> Array:
        held_BKSF = flat(held)
        arrays = (held_BKSF, new_BTKF, slot_BT)
        held_BKSF = lax.platform_dependent(*arrays, tpu=_scattered, default=_scattered_two)
        return held_BKSF.reshape(held.shape)

    def write_scale(held: Array, new_BTK: Array) -> Array:
        return write(held[..., None], new_BTK[..., None])[..., 0]

    key, value, scales = news.stored
    changed: dict[str, Any] = {"key": write(cache.key, key), "value": write(cache.value, value)}
    if scales is not None:
        pairs = zip(("key_scale", "value_scale"), scales_of(cache), scales)
        changed |= {name: write_scale(old, new) for name, old, new in pairs}
    length, start = _counted(cache, news)
    return dataclasses.replace(cache, **changed, length=length, start=start)


def _counted(cache: KVCache, news: News) -> tuple[Array, Array]:
    """The new length and start. An example that has gone wrong never recovers by itself."""
    wrong_B = _spoiled(cache) | _has_holes(news.real_bT)
    length_B = jnp.where(wrong_B, SPOILED, cache.length.reshape(-1) + news.count_B)
    start_B = cache.start.reshape(-1)
    if cache.is_ring:
        start_B = jnp.maximum(start_B, length_B - cache.capacity)
    shape = cache.length.shape
    return length_B.reshape(shape), start_B.reshape(shape)


def _scattered(held_BKSF: Array, new_BTKF: Array, slot_BT: Array) -> Array:
    """The new tokens in their slots; what has a slot that does not exist is dropped."""
    example_B1 = jnp.arange(held_BKSF.shape[0], dtype="int32")[:, None]
    return held_BKSF.at[example_B1, :, slot_BT].set(new_BTKF, mode="drop")


def _scattered_two(held_BKSF: Array, new_BTKF: Array, slot_BT: Array) -> Array:
    slot_BT = _two_at_least(slot_BT, held_BKSF.shape[2])
    return _scattered(held_BKSF, _two_at_least(new_BTKF, 0), slot_BT)


def _two_at_least(x_BT: Array, filler: int) -> Array:
    """A second token, whose slot does not exist, beside the only one.

    XLA's CPU makes of a scatter of one row an update in place, and then copies the whole cache four
    times to read it again: a step of one example took 0.5 to 1.4 ms, and takes 0.2. A TPU's
    compiler reads it where it lies, and of two rows would turn the whole cache, and back.
    """
    if x_BT.shape[0] * x_BT.shape[1] > 1:
        return x_BT
    widths = [(0, 0), (0, 1)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, widths, constant_values=filler)


def read_source(
    cache: CrossCache, T: int, mask: Mask, bias_bnts: Array | None, bias: DistanceBias | None
) -> tuple[CrossCache, View]:
    """The cache with T queries more, and what they see: an encoder's keys, by the call's mask."""
    if cache.mask is not None:
        mask &= Mask.padding(key=cache.mask.reshape(-1, cache.mask.shape[-1]))
    if bias is not None:
        bias = dataclasses.replace(bias, query_offset=cache.length.reshape(-1))
    places = Places(cache.length.reshape(-1, 1) + _index(T), _index(cache.key.shape[-2]))
    view = View.of(held(cache), mask, bias_bnts, bias, places)
    length_B = cache.length.reshape(-1) + reached(mask.query_padding, T)
    length_B = jnp.where(_spoiled(cache), SPOILED, length_B)
    return dataclasses.replace(cache, length=length_B.reshape(cache.length.shape)), view


def reached(real_bT: Array | None, T: int) -> Array:
    """How far a call goes, int32 `[b]`: to its last real query, for padding stands behind it."""
    if real_bT is None:
        return jnp.full(1, T, "int32")
    place_1T = jnp.arange(1, T + 1, dtype="int32")[None]
    return jnp.where(real_bT, place_1T, 0).max(1, initial=0)


def misplaced(cache: KVCache | CrossCache, mask: Mask, T: int) -> Array:
    """Booleans `[B, T]` of outputs that cannot be right: beyond the limit, or of a lost example."""
    wrong_B = _spoiled(cache)
    if isinstance(cache, CrossCache):
        limit, real_bT = cache.max_queries, mask.query_padding
    else:
        limit, real_bT = None if cache.is_ring else cache.capacity, mask.key_padding
        wrong_B |= _has_holes(real_bT)
    position_BT = cache.length.reshape(-1, 1) + _index(T)
    beyond_BT = jnp.zeros_like(position_BT, bool) if limit is None else position_BT >= limit
    return wrong_B[:, None] | (beyond_BT if real_bT is None else beyond_BT & real_bT)


def _spoiled(cache: KVCache | CrossCache) -> Array:
    if isinstance(cache, CrossCache):
        return cache.length.reshape(-1) < 0
    return is_spoiled(cache.length.reshape(-1), cache.start.reshape(-1), cache.window)


def _has_holes(real_bT: Array | None) -> Array:
    """Booleans `[b]`: whether a real token stands behind a padded one."""
    if real_bT is None:
        return jnp.zeros(1, bool)
    return (real_bT[:, 1:] & ~real_bT[:, :-1]).any(1)
