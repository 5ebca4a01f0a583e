"""Keys and values kept between calls: a cache that grows, and one of an encoder's output.

An example's length says all about it: how many tokens it holds, or how many queries have read it.
Below 0 it is spoiled: what a trace could not refuse has happened to it, and its outputs are NaN.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from flax_mha.core import checks
from flax_mha.core.meshes import axes_of, spec, with_auto_axes
from flax_mha.core.typing import Array
from flax_mha.layer.rows import counts, rows_taken, taken

SPOILED = -1  # a length that no call leaves: it stays, and nothing is counted on from it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Past keys and values of one layer, a decoder's own; a pytree, made by `init_cache`.

    A token sees itself and those before it, with `use_causal_mask=True` or without; a `Mask` of
    positions, as `attention_mask=`, leaves some of these. Each call returns the cache for the next
    one; outside `jax.jit` it reads the lengths back from the device, to refuse what does not fit:
    jit the step, and look at `overflowed` and `spoiled` at its end.

    Attributes:
        key: `[*batch, K, S, H]`; S slots: the capacity, or those of a ring.
        value: `[*batch, K, S, V]`.
        length: int32 `[*batch]`, the tokens taken in so far by each example.
        start: int32 `[*batch]`, the first of them that is still held; 0 except in a ring.
        window: the sliding window that a ring serves, position p in slot p % S; None = no ring.
        is_causal: False = the tokens of a call without `use_causal_mask` see each other; static.
        key_scale: float32 `[*batch, K, S]`, what each key is multiplied by; None unless it is int8.
        value_scale: likewise of each value.

    Of a latent layer the key is `[*batch, 1, S, L + W]`, latents and the shared part of the keys,
    and the value `[*batch, 1, S, 0]`: see `flax_mha.Latent`.

    Memory: 2 K S H numbers an example: S the sliding window if there is one, K the key/value heads;
    of int8 2 K S (H + 4) bytes.

    Example:
        >>> import jax.numpy as jnp, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=4, key_dim=16, num_kv_heads=2)
        >>> cache = flax_mha.init_cache(config, batch_shape=3, capacity=100)
        >>> cache.key.shape, cache.capacity, cache.is_ring, cache.overflowed.tolist()
        ((3, 2, 100, 16), 100, False, [False, False, False])
        >>> cache.reorder(jnp.array([0, 0, 2])).length.tolist()
        [0, 0, 0]
        >>> cache.rewind(0).spoiled.tolist()
        [False, False, False]
    """

    key: Array
    value: Array
    length: Array
    start: Array
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    is_causal: bool = dataclasses.field(default=True, metadata={"static": True})
    key_scale: Array | None = None
    value_scale: Array | None = None

    @property
    def capacity(self) -> int:
        """S, the number of slots."""
        return self.key.shape[-2]

    @property
    def is_ring(self) -> bool:
        """Whether the oldest token makes room for the newest."""
        return self.window is not None

    @property
    def overflowed(self) -> Array:
        """Booleans `[*batch]`: examples that were given more tokens than fit.

        What did not fit was dropped, never written over older tokens; its outputs are NaN.
        """
        full = self.length > self.capacity
        return jnp.zeros_like(full) if self.is_ring else full

    @property
    def spoiled(self) -> Array:
        """Booleans `[*batch]`: examples all of whose outputs are NaN from now on.

        Under `jax.jit` this follows from new tokens that are not padded on the right, from a row of
        `reorder` that does not exist, and from a `rewind` to what is no longer held; `rewind(0)`
        begins such an example anew.
        """
        return jnp.asarray(is_spoiled(self.length, self.start, self.window))

    def reorder(self, rows: Array) -> KVCache:
        """The cache whose example i continues the old example `rows[i]`: for beam search.

        Args:
            rows: integers, each in [0, B), for the first batch axis; as many as the new cache has
                examples. What under `jax.jit` turns out to be outside is `spoiled`.

        Raises:
            ValueError: a row outside [0, B), or a cache without batch axes.
            TypeError: rows that are no integer array.
        """
        return _reordered(self, rows)

    def rewind(self, length: Any) -> KVCache:
        """The cache as it was when each example had `length` tokens: drops drafts.

        A line holds all tokens: any length up to its own will do. A ring of S slots for a window W
        has lost those before `start`, S tokens ago, and the next token needs the W - 1 before it:
        when it has gone round, it goes back by S - W + 1 tokens at most, by one where S = W. Make
        room by `init_cache(..., slack=)`, or keep the cache from before the drafts. What is dropped
        stays in its slot, unseen, until it is written over; only NaN there would still be felt.

        Args:
            length: an int, or integers `[*batch]`. What under `jax.jit` turns out to be no longer
                held, or not yet, is `spoiled`.

        Raises:
            ValueError: a length that cannot be gone back to.
            TypeError: lengths that are no integers.
        """
        length = _rewound(self, length, self.start, self.window)
        start = jnp.minimum(self.start, length.clip(0))
        return dataclasses.replace(self, length=length, start=start)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CrossCache:
    """An encoder's keys and values, projected once; a pytree, made by `init_cross_cache`.

    The queries of a call stand at positions length, length + 1, ... among the keys 0 to S - 1, for
    rotary embedding, biases of distance, windows and causal order. Each call returns the cache with
    its queries counted: pass that one to the next call, as with a `KVCache`. Where the decoder's
    tokens are padded on the right, mark the real ones by `query_mask=`: the padding behind the last
    of them is not counted.

    Attributes:
        key: `[*batch, K, S, H]`.
        value: `[*batch, K, S, V]`.
        length: int32 `[*batch]`, the queries read so far by each example.
        mask: booleans `[*batch, S]`, True = a real key; None = all are.
        max_queries: the most queries that an example may have; static, None = no limit.
        key_scale: float32 `[*batch, K, S]`, as in `KVCache`.
        value_scale: likewise.

    Memory: (H + V) K S numbers an example; of a latent layer, as in `KVCache`, (L + W) S.

    Example:
        >>> import jax, flax_mha
        >>> config = flax_mha.MultiHeadAttentionConfig(num_heads=4, key_dim=16)
        >>> encoded = jax.numpy.ones((3, 7, 64))
        >>> params = flax_mha.init_params(jax.random.key(0), config, encoded.shape)
        >>> cache = flax_mha.init_cross_cache(params, encoded, config=config)
        >>> cache.key.shape, cache.overflowed.tolist(), cache.spoiled.tolist()
        ((3, 4, 7, 16), [False, False, False], [False, False, False])
        >>> query = jax.numpy.ones((3, 2, 64))
        >>> call = dict(config=config, cache=cache)
        >>> _, cache = flax_mha.multi_head_attention(params, query, None, **call)
        >>> cache.length.tolist(), cache.rewind(1).length.tolist()
        ([2, 2, 2], [1, 1, 1])
        >>> cache.reorder(jax.numpy.array([0, 0, 0, 2])).length.tolist()
        [2, 2, 2, 2]
    """

    key: Array
    value: Array
    length: Array
    mask: Array | None = None
    max_queries: int | None = dataclasses.field(default=None, metadata={"static": True})
    key_scale: Array | None = None
    value_scale: Array | None = None

    @property
    def overflowed(self) -> Array:
        """Booleans `[*batch]`: examples with more than `max_queries` queries, whose rest is NaN."""
        if self.max_queries is None:
            return jnp.zeros_like(self.length, bool)
        return self.length > self.max_queries

    @property
    def spoiled(self) -> Array:
        """Booleans `[*batch]`: as `KVCache.spoiled`."""
        return self.length < 0

    def reorder(self, rows: Array) -> CrossCache:
        """As `KVCache.reorder`, by `rows`; an example may become several beams."""
        return _reordered(self, rows)

    def rewind(self, length: Any) -> CrossCache:
        """The cache as it was when each example had read `length` queries, an int or `[*batch]`."""
        return dataclasses.replace(self, length=_rewound(self, length, 0, None))


def is_spoiled(length: Any, start: Any, window: int | None) -> Any:
    """Whether an example of this length lacks what its next token needs; of arrays of any kind."""
    if window is None:
        return length < 0
    first = (length - window + 1).clip(0)
    return (length < 0) | ((first < start) & (first < length))


def _is_held(wanted: Any, length: Any, start: Any, window: int | None) -> Any:
    """Whether an example can go back to a length; to 0 always, for that needs nothing."""
    return (wanted <= length.clip(0)) & ~is_spoiled(wanted, start, window)


def _rewound(cache: Any, length: Any, start: Any, window: int | None) -> Array:
    """The lengths that are gone back to, SPOILED where that cannot be; refused where it is seen."""
    wanted = counts("length", length, cache.length.shape)
    arrays = (wanted, cache.length, start)
    if not any(isinstance(array, jax.core.Tracer) for array in arrays):
        known = [np.asarray(array) for array in arrays]
        held = _is_held(known[0], known[1], known[2], window)
        if not held.all():
            _refuse_rewind(cache, known[0][~held], known[1][~held])
    return jnp.where(_is_held(wanted, cache.length, start, window), wanted, SPOILED)


def _refuse_rewind(cache: Any, wanted: np.ndarray, now: np.ndarray) -> None:
    rule = "`rewind` goes back to a length in [0, length] whose tokens are still held."
    evidence = f"{wanted[:5].tolist()} of examples of length {now[:5].tolist()}"
    if getattr(cache, "window", None) is None:
        checks.fail(ValueError, rule, evidence)
    evidence += f", in a ring of {cache.capacity} slots for a window of {cache.window}"
    remedy = "Keep the cache from before the drafts, or make room by `init_cache(..., slack=)`."
    checks.fail(ValueError, rule, evidence, remedy)


def _reordered(cache: Any, rows: Any) -> Any:
    index, inside = rows_taken(rows, cache.length.shape)

    def move(cache: Any, index: Array, inside: Array) -> Any:
        moved = jax.tree.map(lambda x: taken(x, index), cache)
        inside = inside.reshape(-1, *(1,) * (cache.length.ndim - 1))
        return dataclasses.replace(moved, length=jnp.where(inside, moved.length, SPOILED))

    # On a mesh the beams stay where their examples are; other numbers of rows may not fit there.
    fits = len(inside) % max(len(cache.length), 1) == 0
    place = lambda x: spec(axes_of(x if fits else index)[0], *axes_of(x)[1:])  # noqa: E731
    return with_auto_axes(move, lambda: jax.tree.map(place, cache), cache, index, inside)


# --- leaving the process ------------------------------------------------------------------------


def register_state(register: Callable[..., Any]) -> None:
    """Tells flax's `register_serialization_state` how the arrays of both caches go out and in."""
    for kind in (KVCache, CrossCache):
        register(kind, _state_of, _with_state)


def _state_of(cache: Any) -> dict[str, Any]:
    """The arrays by their names; what is static comes from the cache that is restored into."""
    return {name: getattr(cache, name) for name in _arrays_of(cache)}


def _with_state(cache: Any, state: dict[str, Any]) -> Any:
    names = _arrays_of(cache)
    state = {name: x for name, x in state.items() if x is not None}
    if sorted(state) != sorted(names):
        rule = f"The state of this {type(cache).__name__} has the entries {names}."
        checks.fail(ValueError, rule, f"{sorted(state)}")
    for name in names:
        shapes = [np.shape(x) for x in (getattr(cache, name), state[name])]
        if shapes[0] != shapes[1]:
            rule = (
                f"`{name}` must have the shape of the cache that it is restored into, {shapes[0]}."
            )
            checks.fail(ValueError, rule, f"shape {shapes[1]}")
    return dataclasses.replace(cache, **state)


def _arrays_of(cache: Any) -> list[str]:
    names = [x.name for x in dataclasses.fields(cache) if not x.metadata.get("static")]
    return [name for name in names if getattr(cache, name) is not None]


for _kind in (KVCache, CrossCache):
    export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"flax_mha.{_kind.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=lambda data: tuple(json.loads(bytes(data))),
    )
