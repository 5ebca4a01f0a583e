"""Masks that keep their structure: who may attend to whom, without a `[T, S]` array."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.core import checks, mask_parts
from flax_mha.core.typing import Array

Band = tuple[int | None, int | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """Which query may attend to which key. True always means "may attend".

    A query at position p attends to a key at s where every part that is set agrees:

        p - left <= s <= p + right   band = (left, right), None = without bound; p = t + offset
        query_padding[b, t]          False removes a query
        key_padding[b, s]            False removes a key
        query_ids[b, t] == key_ids[b, s]   for each pair of segment ids
        dense[b, n, t, s]            for each dense array, any axis of which may be 1

    Masks are made by `causal`, `window`, `padding`, `segments` and `dense`. `mask_a & mask_b` is
    their intersection and stays structured. Masks are pytrees: their arrays are data under
    `jax.jit`, the band is static.

    Attributes:
        band: (left, right), how many keys before and after the query; None = without bound.
        query_offset: the position of query 0, an integer or integers `[B]`; None = 0.
        query_padding: booleans `[B or 1, T]`, True = a real query.
        key_padding: booleans `[B or 1, S]`, True = a real key.
        segment_ids: pairs of integers `([B or 1, T], [B or 1, S])`.
        dense_masks: booleans of rank 4, each axis 1 or that of `[B, N, T, S]`.

    Memory: what the arrays hold. Only `as_array` makes T x S booleans.

    Guide: `python -m flax_mha guide masks`.

    Differs from boolean arrays: (1) no `[T, S]`; (2) queries and keys that padding or segments
    remove may hold NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha import Mask
        >>> print((Mask.causal() & Mask.window(1, 0)).as_array(3, 4)[0, 0].astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [0 1 1 0]]
        >>> Mask().is_empty, Mask.padding(key=jnp.array([True, False])).removes_positions
        (True, True)
        >>> Mask.causal().check(B=2, N=3, T=5, S=7)
    """

    band: Band = dataclasses.field(default=(None, None), metadata={"static": True})
    query_offset: Array | None = None
    query_padding: Array | None = None
    key_padding: Array | None = None
    segment_ids: tuple[tuple[Array, Array], ...] = ()
    dense_masks: tuple[Array, ...] = ()

    @classmethod
    def causal(cls, query_offset: Any = None) -> Mask:
        """No key after the query: s <= t + query_offset.

        Args:
            query_offset: the position of query 0 among the keys, an integer or integers `[B]`;
                None = 0, aligned top-left as in Keras.

        Raises:
            TypeError: an offset that is no integer.
            ValueError: one that needs 64 bits.

        Example:
            >>> print(Mask.causal(jnp.array(1)).as_array(2, 3)[0, 0].astype(int))
            [[1 1 0]
             [1 1 1]]
        """
        return cls(band=(None, 0), query_offset=mask_parts.offset(query_offset))

    @classmethod
    def window(cls, left: int | None, right: int | None) -> Mask:
        """A band around the query: t - left <= s <= t + right.

        Args:
            left: how many keys before the query, itself besides; None = all.
            right: how many after it; None = all.

        Raises:
            ValueError: a negative bound.
            TypeError: a bound that is no integer.

        Differs from Keras: its `sliding_window=w` is `window(w - 1, w - 1)`.

        Example:
            >>> print(Mask.window(0, 1).as_array(3, 3)[0, 0].astype(int))
            [[1 1 0]
             [0 1 1]
             [0 0 1]]
        """
        for name, bound in (("left", left), ("right", right)):
            if bound is not None:
                checks.integer(name, bound, minimum=0)
        return cls(band=(left, right))

    @classmethod
    def padding(cls, query: Any = None, key: Any = None) -> Mask:
        """Only real queries attend, and only to real keys.

        Args:
            query: booleans `[B, T]` or `[T]`, True = a real query; None = all are.
            key: booleans `[B, S]` or `[S]`, True = a real key; None = all are.

        Raises:
            TypeError: floats; an additive mask is a bias. Under `jit` or `vmap` signed integers,
                where an additive mask could not be told from 0 and 1.
            ValueError: integers other than 0 and 1, or another rank.

        Example:
            >>> lengths = jnp.array([3, 1])
            >>> mask = Mask.padding(key=jnp.arange(3)[None] < lengths[:, None])
            >>> mask.as_array(1, 3)[:, 0, 0].astype(int).tolist()
            [[1, 1, 1], [1, 0, 0]]
        """
        return cls(
            query_padding=mask_parts.padding("query", query),
            key_padding=mask_parts.padding("key", key),
        )

    @classmethod
    def segments(cls, query_ids: Any, key_ids: Any) -> Mask:
        """Attention stays within equal ids: sequences packed into one, one after the other.

        An id that comes back is the same sequence, wherever it stands.

        Args:
            query_ids: integers `[B, T]` or `[T]`.
            key_ids: integers `[B, S]` or `[S]`.

        Raises:
            TypeError: ids that are not integers, or of two types that no third one holds.
            ValueError: another rank; without x64, ids that need 64 bits.

        Example:
            >>> ids = jnp.array([7, 7, 9])
            >>> print(Mask.segments(ids, ids).as_array(3, 3)[0, 0].astype(int))
            [[1 1 0]
             [1 1 0]
             [0 0 1]]
        """
        return cls(segment_ids=(mask_parts.segments(query_ids, key_ids),))

    @classmethod
    def dense(cls, array: Any) -> Mask:
        """What no other part can say: an array for each query and key.

        Args:
            array: booleans that broadcast to `[B, N, T, S]`, axes aligned from the right; True =
                may attend.

        Raises:
            TypeError: floats; an additive mask is a bias. Under `jit` or `vmap` signed integers,
                where an additive mask could not be told from 0 and 1.
            ValueError: integers other than 0 and 1, or more than four axes.

        Memory: the array's own, B N T S booleans at most.

        Example:
            >>> Mask.dense(jnp.eye(3, dtype=bool)).dense_masks[0].shape
            (1, 1, 3, 3)
        """
        return cls(dense_masks=(mask_parts.dense(array),))

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(
            band=tuple(_either(min, a, b) for a, b in zip(self.band, other.band)),
            query_offset=_common_offset(self, other),
            query_padding=_either(operator.and_, self.query_padding, other.query_padding),
            key_padding=_either(operator.and_, self.key_padding, other.key_padding),
            segment_ids=self.segment_ids + other.segment_ids,
            dense_masks=self.dense_masks + other.dense_masks,
        )

    @property
    def is_empty(self) -> bool:
        """Whether every query may attend to every key."""
        return self.band == (None, None) and not jax.tree.leaves(
            (self.query_padding, self.key_padding, self.segment_ids, self.dense_masks)
        )

    @property
    def removes_positions(self) -> bool:
        """Whether padding or segments hide positions, whose content is then arbitrary."""
        return bool(jax.tree.leaves((self.query_padding, self.key_padding, self.segment_ids)))

    def as_array(self, T: int, S: int) -> Array:
        """The mask of `T` queries and `S` keys: booleans `[b, n, T, S]`, b and n 1 or full."""
        parts = [_band(self, jnp.arange(T, dtype="int32"), S), *self.dense_masks]
        if self.query_padding is not None:
            parts.append(self.query_padding[:, None, :, None])
        if self.key_padding is not None:
            parts.append(self.key_padding[:, None, None, :])
        parts += [_same_segment(*ids)[:, None] for ids in self.segment_ids]
        allowed = functools.reduce(jnp.logical_and, parts)
        return jnp.broadcast_to(allowed, (*allowed.shape[:2], T, S))

    def take_queries(self, rows: Array, S: int) -> Mask:
        """The mask of the queries at the positions `rows` [R] alone; makes R x `S` booleans.

        Example:
            >>> mask = Mask.causal().take_queries(jnp.array([2, 0]), S=3)
            >>> mask.as_array(2, 3)[0, 0].astype(int).tolist()
            [[1, 1, 1], [1, 0, 0]]
        """
        take = lambda x, axis: x if x.shape[axis] == 1 else jnp.take(x, rows, axis)  # noqa: E731
        band = _band(self, rows.astype("int32"), S)
        padding = self.query_padding
        return dataclasses.replace(
            self,
            band=(None, None),
            query_offset=None,
            query_padding=None if padding is None else jnp.take(padding, rows, 1),
            segment_ids=tuple((jnp.take(q, rows, 1), k) for q, k in self.segment_ids),
            dense_masks=(band, *(take(dense, 2) for dense in self.dense_masks)),
        )

    def check(self, B: int, N: int, T: int, S: int) -> None:
        """Refuses arrays that do not fit `B` examples, `N` heads, `T` queries and `S` keys.

        Raises:
            ValueError: with the letters and sizes that were expected, and the shape received.
        """
        for name, array, full, letters in (
            ("mask.query_padding", self.query_padding, (B, T), "[B, T]"),
            ("mask.key_padding", self.key_padding, (B, S), "[B, S]"),
            *(("mask.segment_ids[0]", q, (B, T), "[B, T]") for q, _ in self.segment_ids),
            *(("mask.segment_ids[1]", k, (B, S), "[B, S]") for _, k in self.segment_ids),
        ):
            if array is not None:
                # T and S of 1 would broadcast: one length of padding for all is never meant.
                checks.broadcastable(name, array.shape[:1], full[:1], letters)
                if array.shape[1] != full[1]:
                    rule = f"`{name}` must be {letters} = {full}."
                    checks.fail(ValueError, rule, f"shape {array.shape}")
        for array in self.dense_masks:
            swapped = array.shape[-2:] == (S, T) and S != T
            remedy = "Did you swap T and S?" if swapped else ""
            checks.broadcastable("mask", array.shape, (B, N, T, S), "[B, N, T, S]", remedy)


def _either(combine: Any, a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else combine(a, b)


def _common_offset(a: Mask, b: Mask) -> Array | None:
    """The offset of an intersection: two bands shifted differently are not a band."""
    banded = [mask for mask in (a, b) if mask.band != (None, None)]
    offsets = [mask.query_offset for mask in banded]
    if len(offsets) == 2 and offsets[0] is not offsets[1]:
        rule = "Two banded masks can be combined only with the same `query_offset`."
        checks.fail(ValueError, rule, f"{offsets[0]} and {offsets[1]}")
    return offsets[0] if offsets else None


def _band(mask: Mask, query_T: Array, S: int) -> Array:
    """The band's part `[b, 1, T, S]` for queries at these positions."""
    left, right = mask.band
    position_bT = query_T[None]
    if mask.query_offset is not None:
        position_bT += jnp.reshape(mask.query_offset, (-1, 1)).astype("int32")
    distance_bTS = jnp.arange(S, dtype="int32")[None, None] - position_bT[..., None]
    allowed_bTS = jnp.ones((1, 1, 1), bool)
    if left is not None:
        allowed_bTS = distance_bTS >= -left
    if right is not None:
        allowed_bTS = allowed_bTS & (distance_bTS <= right)
    return allowed_bTS[:, None]


def _same_segment(query_ids_bT: Array, key_ids_bS: Array) -> Array:
    return query_ids_bT[:, :, None] == key_ids_bS[:, None, :]
