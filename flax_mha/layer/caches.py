"""Keys and values kept between calls: a cache that grows, and one of an encoder's output.

A `KVCache` takes in new tokens and shows a `View`: all keys that the new queries may see. Where the
layer has a sliding window, the cache is a ring of that size: position p stands in slot p % window.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha.attention import DistanceBias
from flax_mha.config import MultiHeadAttentionConfig
from flax_mha.core import checks
from flax_mha.core.folding import Folding
from flax_mha.core.typing import Array, DType
from flax_mha.masks import Mask


class View(NamedTuple):
    """What attention reads: keys and values, who may attend to whom, the biases."""

    key_BSKH: Array
    value_BSKV: Array
    mask: Mask
    bias_bnts: Array | None
    distance_bias: DistanceBias | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Past keys and values of one layer; a pytree, made by `init_cache`.

    Attributes:
        key: `[*batch, K, S, H]`; S slots: the capacity, or the window of a ring.
        value: `[*batch, K, S, V]`.
        length: int32 `[*batch]`, the tokens taken in so far by each example.
        is_ring: whether the oldest token makes room for the newest; static.

    Memory: 2 K S H numbers an example: S the sliding window if there is one, K the key/value heads.

    Example:
        >>> import jax.numpy as jnp, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=4, key_dim=16, num_kv_heads=2)
        >>> cache = flax_mha.init_cache(config, batch_shape=3, capacity=100)
        >>> cache.key.shape, cache.capacity, cache.overflowed.tolist()
        ((3, 2, 100, 16), 100, [False, False, False])
        >>> cache.reorder(jnp.array([0, 0, 2])).length.tolist()
        [0, 0, 0]
    """

    key: Array
    value: Array
    length: Array
    is_ring: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """S, the number of slots."""
        return self.key.shape[-2]

    @property
    def overflowed(self) -> Array:
        """Booleans `[*batch]`: examples that were given more tokens than fit.

        What did not fit was dropped, never written over older tokens; its outputs are NaN.
        """
        full = self.length > self.capacity
        return jnp.zeros_like(full) if self.is_ring else full

    def reorder(self, rows: Array) -> KVCache:
        """The cache whose example i continues the old example `rows[i]`: for beam search.

        Args:
            rows: integers `[B]`, each in [0, B).
        """
        take = lambda x: jnp.take(x, rows, axis=0)  # noqa: E731
        return KVCache(take(self.key), take(self.value), take(self.length), self.is_ring)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CrossCache:
    """An encoder's keys and values, projected once; a pytree, made by `init_cross_cache`.

    Attributes:
        key: `[*batch, K, S, H]`.
        value: `[*batch, K, S, V]`.
        mask: booleans `[*batch, S]`, True = a real key; None = all are.

    Memory: (H + V) K S numbers an example.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=4, key_dim=16)
        >>> encoded = jax.numpy.ones((3, 7, 64))
        >>> params = flax_mha.init_params(jax.random.key(0), config, encoded.shape)
        >>> flax_mha.init_cross_cache(params, encoded, config=config).key.shape
        (3, 4, 7, 16)
    """

    key: Array
    value: Array
    mask: Array | None = None


class News(NamedTuple):
    """The new tokens of one call: heads, how many of each example are real, the causal flag."""

    key_BTKH: Array
    value_BTKV: Array
    count_B: Array
    is_causal: bool
    window: int | None


def extend(cache: KVCache, news: News, bias: DistanceBias | None) -> tuple[KVCache, View]:
    """The cache with the new tokens, and what their queries may see."""
    if not cache.is_ring:
        return _extend_line(cache, news, bias)
    one_token = news.key_BTKH.shape[1] == 1
    return (_step_ring if one_token else _extend_ring)(cache, news, bias)


def _extend_line(cache: KVCache, news: News, bias: DistanceBias | None) -> tuple[KVCache, View]:
    """Slot p holds position p: the band says it all, in every block and with every length."""
    length_B, S = cache.length.reshape(-1), cache.capacity
    cache = _written(cache, news, first=0)
    mask = Mask.causal(length_B)
    if not news.is_causal:
        slot_1S = jnp.arange(S, dtype="int32")[None]
        mask = Mask.padding(key=slot_1S < (length_B + news.count_B)[:, None])
    if bias is not None:
        bias = dataclasses.replace(bias, query_offset=length_B)
    return cache, View(_heads_last(cache.key), _heads_last(cache.value), mask, None, bias)


def _step_ring(cache: KVCache, news: News, bias: DistanceBias | None) -> tuple[KVCache, View]:
    """One token: written first, it takes the slot of the token that has just left the window.

    So all slots in use may be seen, in any order; a bias needs the position that each one holds.
    """
    length_B, S = cache.length.reshape(-1), cache.capacity
    slot_1S = jnp.arange(S, dtype="int32")[None]
    cache = _written(cache, news, first=0)
    mask = Mask.padding(key=slot_1S < (length_B + news.count_B)[:, None])
    dense = None
    if bias is not None:
        distance_BS = -((length_B[:, None] - slot_1S) % S)
        dense = bias.at(distance_BS[:, None])
    return cache, View(_heads_last(cache.key), _heads_last(cache.value), mask, dense, None)


def _extend_ring(cache: KVCache, news: News, bias: DistanceBias | None) -> tuple[KVCache, View]:
    """Many tokens: they see the ring in the order of its positions, and then each other."""
    length_B, S = cache.length.reshape(-1), cache.capacity
    order_BS = (length_B[:, None] + jnp.arange(S, dtype="int32")[None]) % S
    unrolled = lambda x: jnp.take_along_axis(  # noqa: E731
        _heads_last(x), order_BS[:, :, None, None], axis=1
    )
    T = news.key_BTKH.shape[1]
    held_BS = jnp.arange(S, dtype="int32")[None] >= S - length_B[:, None]
    real_BT = jnp.arange(T, dtype="int32")[None] < news.count_B[:, None]
    offset_1 = jnp.full((1,), S, "int32")
    assert news.window is not None
    mask = Mask.causal(offset_1) & Mask.padding(key=jnp.concatenate([held_BS, real_BT], 1))
    mask &= dataclasses.replace(Mask.window(news.window - 1, 0), query_offset=offset_1)
    if bias is not None:
        bias = dataclasses.replace(bias, query_offset=offset_1)
    key_BSKH = jnp.concatenate([unrolled(cache.key), news.key_BTKH], 1)
    value_BSKV = jnp.concatenate([unrolled(cache.value), news.value_BTKV], 1)
    # Of many tokens only the last S stay: none is written that a later one would replace.
    cache = _written(cache, news, first=news.count_B - S)
    return cache, View(key_BSKH, value_BSKV, mask, None, bias)


def _written(cache: KVCache, news: News, first: Any) -> KVCache:
    """The real new tokens from `first` on in their slots; what does not fit is dropped."""
    T, S = news.key_BTKH.shape[1], cache.capacity
    length_B = cache.length.reshape(-1)
    index_1T = jnp.arange(T, dtype="int32")[None]
    slot_BT = length_B[:, None] + index_1T
    slot_BT = slot_BT % S if cache.is_ring else slot_BT
    first_B1 = jnp.reshape(first, (-1, 1))
    stays_BT = (index_1T >= first_B1) & (index_1T < news.count_B[:, None])
    slot_BT = _two_at_least(jnp.where(stays_BT, slot_BT, S), S)
    example_B1 = jnp.arange(len(length_B), dtype="int32")[:, None]

    def write(held: Array, new_BTKF: Array) -> Array:
        held_BKSF = held.reshape(-1, *held.shape[-3:])
        new_BTKF = _two_at_least(new_BTKF, 0)
        held_BKSF = held_BKSF.at[example_B1, :, slot_BT].set(new_BTKF, mode="drop")
        return held_BKSF.reshape(held.shape)

    length = cache.length + news.count_B.reshape(cache.length.shape)
    key, value = write(cache.key, news.key_BTKH), write(cache.value, news.value_BTKV)
    return KVCache(key, value, length, cache.is_ring)


def _two_at_least(x_BT: Array, filler: int) -> Array:
    """A second token, whose slot does not exist, beside the only one.

    XLA makes of a scatter of one row an update in place, and then copies the whole cache four times
    to read it again: a step of one example took 0.5 to 1.4 ms, and takes 0.2.
    """
    if x_BT.shape[0] * x_BT.shape[1] > 1:
        return x_BT
    widths = [(0, 0), (0, 1)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, widths, constant_values=filler)


def _heads_last(x: Array) -> Array:
    """`[*batch, K, S, F]` to `[B, S, K, F]`."""
    return x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2)


def view_of_source(cache: CrossCache, mask: Mask, bias_bnts: Array | None) -> View:
    """An encoder's keys and values, with the call's own mask."""
    if cache.mask is not None:
        mask &= Mask.padding(key=cache.mask.reshape(-1, cache.mask.shape[-1]))
    return View(_heads_last(cache.key), _heads_last(cache.value), mask, bias_bnts, None)


def misplaced(news_mask_BT: Array | None, cache: KVCache, T: int) -> Array:
    """Booleans `[B, T]` of outputs that cannot be right: beyond the capacity, or behind a hole."""
    length_B = cache.length.reshape(-1)
    position_BT = length_B[:, None] + jnp.arange(T, dtype="int32")[None]
    wrong_BT = jnp.zeros_like(position_BT, bool) if cache.is_ring else position_BT >= cache.capacity
    if news_mask_BT is not None:
        holes_B1 = (news_mask_BT[:, 1:] & ~news_mask_BT[:, :-1]).any(1, keepdims=True)
        wrong_BT = (wrong_BT & news_mask_BT) | holes_B1
    return wrong_BT


def check_cache(
    cache: KVCache | CrossCache, folding: Folding, config: MultiHeadAttentionConfig, dtype: DType
) -> None:
    """Refuses a cache that was made for other inputs, another config or another dtype."""
    if folding.attended != (len(folding.batch),):
        rule = "A cache needs inputs [*batch, T, D] of which T alone is attended."
        evidence = f"attended axes {folding.attended}, batch axes {folding.batch}"
        checks.fail(ValueError, rule, evidence, "Set `attention_axes=-2`.")
    _, K, H, V = config.dims
    remedy = "Make it by `init_cache(config, batch_shape, capacity, dtype)` of this config."
    for name, array, features in (("key", cache.key, H), ("value", cache.value, V)):
        expected = (*folding.batch, K, cache.key.shape[-2], features)
        if array.shape != expected:
            rule = f"`cache.{name}` must be [*batch, K, S, {'HV'[name == 'value']}] = {expected}."
            checks.fail(ValueError, rule, f"shape {array.shape}", remedy)
        if array.dtype != dtype:
            rule = f"`cache.{name}` must have the compute dtype {jnp.dtype(dtype).name}."
            checks.fail(TypeError, rule, f"dtype {array.dtype}", remedy)
    if isinstance(cache, KVCache):
        _check_growing(cache, folding, config)


def _check_growing(cache: KVCache, folding: Folding, config: MultiHeadAttentionConfig) -> None:
    if folding.targets != folding.sources:
        rule = "With a KVCache, query and value hold the same new tokens: T == S."
        remedy = "For an encoder's output, use `init_cross_cache`."
        checks.fail(ValueError, rule, f"T={folding.targets}, S={folding.sources}", remedy)
    if cache.is_ring and cache.capacity != config.sliding_window:
        rule = "A ring must have as many slots as the config's sliding_window."
        evidence = f"{cache.capacity} slots, sliding_window={config.sliding_window}"
        checks.fail(ValueError, rule, evidence, "Make it by `init_cache` of this config.")
    window = config.sliding_window
    if not cache.is_ring and window is not None and cache.capacity > window:
        rule = "A layer with a sliding window needs a ring of that size."
        evidence = f"capacity {cache.capacity}, sliding_window={window}"
        checks.fail(ValueError, rule, evidence, "Make it by `init_cache` of this config.")
