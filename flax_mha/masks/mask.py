"""Masks that keep their structure: who may attend to whom, without a `[T, S]` array."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, NoReturn

import jax

from flax_mha.core import checks
from flax_mha.core.typing import Array
from flax_mha.masks import dense_form, fits, neighborhood, parts
from flax_mha.masks.blocks import BlockMask
from flax_mha.masks.function import MaskFunction, function_of

Band = tuple[int | None, int | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mask(neighborhood.OfGrids):
    """Which query may attend to which key. True always means "may attend".

    A query at position p attends to a key at s where every part that is set agrees:

        p - left <= s <= p + right   band = (left, right), None = without bound; p = t + offset
        query_padding[b, t]          False removes a query
        key_padding[b, s]            False removes a key
        query_ids[b, t] == key_ids[b, s]   for each pair of segment ids
        dense[b, n, t, s]            for each dense array, any axis of which may be 1
        s < length[b]                for each prefix
        f(b, n, t, s)                for each function
        a(b, n, t, s) or ...         for each union of masks
        not a(b, n, t, s)            for each complement of a mask

    Masks are made by `causal`, `window`, `neighborhood`, `prefix`, `padding`, `segments`, `dense`
    and `function`, and joined by `&`, `|` and `~`. Masks are pytrees: arrays, also those that
    functions close over, are data under `jax.jit`; the band and the functions are static.

    Attributes:
        band: (left, right), how many keys before and after the query; None = without bound.
        query_offset: the position of query 0, an integer or integers `[B]`; None = 0.
        query_padding: booleans `[B or 1, T]`, True = a real query.
        key_padding: booleans `[B or 1, S]`, True = a real key.
        segment_ids: pairs of integers `([B or 1, T], [B or 1, S])`.
        dense_masks: booleans of rank 4, each axis 1 or that of `[B, N, T, S]`.
        prefix_lengths: integers `[1 or B]`, what `prefix` made.
        functions: what `function` made.
        unions: masks, of each tuple of which one must agree.
        complements: masks that must not.

    Memory: what the arrays hold. Only `as_array` makes T x S booleans.

    Guide: `python -m flax_mha guide masks`, and of functions `guide pair_functions`.

    Differs from boolean arrays: (1) no `[T, S]`; (2) queries and keys that padding or segments
    remove may hold NaN; inside of a union or complement these only forbid, and remove nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha import Mask
        >>> print((Mask.causal() & Mask.window(1, 0)).as_array(3, 4)[0, 0].astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [0 1 1 0]]
        >>> Mask().is_empty, Mask.padding(key=jnp.array([True, False])).removes_positions
        (True, True)
        >>> Mask.causal().is_plain, (~Mask.causal()).is_plain
        (True, False)
        >>> Mask.causal().check(B=2, N=3, T=5, S=7)
    """

    band: Band = dataclasses.field(default=(None, None), metadata={"static": True})
    query_offset: Array | None = None
    query_padding: Array | None = None
    key_padding: Array | None = None
    segment_ids: tuple[tuple[Array, Array], ...] = ()
    dense_masks: tuple[Array, ...] = ()
    prefix_lengths: tuple[Array, ...] = ()
    functions: tuple[MaskFunction, ...] = ()
    unions: tuple[tuple[Mask, ...], ...] = ()
    complements: tuple[Mask, ...] = ()

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
            >>> print(Mask.causal(jax.numpy.array(1)).as_array(2, 3)[0, 0].astype(int))
            [[1 1 0]
             [1 1 1]]
        """
        return cls(band=(None, 0), query_offset=parts.offset(query_offset))

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
            >>> lengths = jax.numpy.array([3, 1])
            >>> mask = Mask.padding(key=jax.numpy.arange(3)[None] < lengths[:, None])
            >>> mask.as_array(1, 3)[:, 0, 0].astype(int).tolist()
            [[1, 1, 1], [1, 0, 0]]
        """
        return cls(
            query_padding=parts.padding("query", query),
            key_padding=parts.padding("key", key),
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
            >>> ids = jax.numpy.array([7, 7, 9])
            >>> print(Mask.segments(ids, ids).as_array(3, 3)[0, 0].astype(int))
            [[1 1 0]
             [1 1 0]
             [0 0 1]]
        """
        return cls(segment_ids=(parts.segments(query_ids, key_ids),))

    @classmethod
    def dense(cls, array: Any) -> Mask:
        """What no other part can say: an array for each query and key.

        Args:
            array: booleans that broadcast to `[B, N, T, S]`, axes aligned from the right; True =
                may attend.

        Raises:
            TypeError, ValueError: as `padding`, and more than four axes.

        Memory: the array's own, B N T S booleans at most.

        Example:
            >>> Mask.dense(jax.numpy.eye(3, dtype=bool)).dense_masks[0].shape
            (1, 1, 3, 3)
        """
        return cls(dense_masks=(parts.dense(array),))

    @classmethod
    def prefix(cls, lengths: Any) -> Mask:
        """The first keys: s < lengths, for every query; a prefix-LM is `causal() | prefix(n)`.

        Args:
            lengths: an integer or integers `[B]`.

        Raises:
            TypeError, ValueError: lengths that are no such integers, or negative.

        Example:
            >>> (Mask.causal() | Mask.prefix(2)).as_array(3, 3)[0, 0].astype(int).tolist()
            [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
        """
        return cls(prefix_lengths=(parts.lengths("lengths", lengths),))

    @classmethod
    def function(cls, f: Any, blocks: BlockMask | None = None) -> Mask:
        """Any rule: `f(b, n, t, s)` says whether query t of example b and head n may attend to s.

        It is traced once: write `&`, `|`, `~` and `jnp.where`, and look up arrays that it closes
        over, which stay data. Blocks of pairs in which it allows nothing are left out: they are
        found by interval arithmetic or, where it looks up an array by query and key at once, by
        asking it for every pair once a call.

        Args:
            f: `f(b, n, t, s) -> bool` of int32 numbers. b counts all batch axes as one.
            blocks: what `block_mask(f, T, S)` found before, to spare the search.

        Raises:
            TypeError: no such function, one without a boolean, or that asks Python for a number.
            ValueError: more than one result, or a function that is another one each time.

        Example:
            >>> ids = jax.numpy.array([[7, 7, 9]])
            >>> mask = Mask.function(lambda b, n, t, s: (ids[b, t] == ids[b, s]) & (s <= t))
            >>> mask.as_array(3, 3, B=1)[0, 0].astype(int).tolist()
            [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
        """
        return cls(functions=(function_of(f, blocks),))

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(
            band=tuple(parts.either(min, a, b) for a, b in zip(self.band, other.band)),
            query_offset=parts.common_offset(self, other),
            query_padding=parts.either(operator.and_, self.query_padding, other.query_padding),
            key_padding=parts.either(operator.and_, self.key_padding, other.key_padding),
            **{name: getattr(self, name) + getattr(other, name) for name in parts.TUPLES},
        )

    def __or__(self, other: Mask) -> Mask:
        return Mask(unions=((self, other),)) if isinstance(other, Mask) else NotImplemented

    def __bool__(self) -> NoReturn:
        rule = "A Mask is not True or False: masks are joined by `&`, `|` and `~`."
        checks.fail(TypeError, rule, "`and`, `or`, `not` or `if` of a Mask")

    __array_ufunc__ = None  # an array on the left is no mask either: wrap it by `Mask.dense`

    def __invert__(self) -> Mask:
        return Mask(complements=(self,))

    @property
    def is_plain(self) -> bool:
        """Whether it is without prefixes, functions, unions and complements."""
        return not (self.prefix_lengths or self.functions or self.unions or self.complements)

    @property
    def is_empty(self) -> bool:
        """Whether every query may attend to every key, as far as its parts tell."""
        arrays = (self.query_padding, self.key_padding, self.segment_ids, self.dense_masks)
        return self.is_plain and self.band == (None, None) and not jax.tree.leaves(arrays)

    @property
    def removes_positions(self) -> bool:
        """Whether padding or segments hide positions, whose content is then arbitrary."""
        return bool(jax.tree.leaves((self.query_padding, self.key_padding, self.segment_ids)))

    def as_array(self, T: int, S: int, B: int | None = None, N: int | None = None) -> Array:
        """The mask of `T` queries and `S` keys: booleans `[b, n, T, S]`, b and n 1 or full.

        `B` and `N` are needed, or else a ValueError, by functions that look at example or head.
        """
        checks.known_sizes(T=T, S=S, B=1 if B is None else B, N=1 if N is None else N)
        return dense_form.of(self, {"b": B, "n": N, "t": T, "s": S})

    def take_queries(self, rows: Array, S: int) -> Mask:
        """The mask of the queries at the positions `rows` [R] alone; makes R x `S` booleans.

        Example:
            >>> mask = Mask.causal().take_queries(jax.numpy.array([2, 0]), S=3)
            >>> mask.as_array(2, 3)[0, 0].astype(int).tolist()
            [[1, 1, 1], [1, 0, 0]]
        """
        checks.known_sizes(S=S)
        return dense_form.taken(self, checks.positions("rows", rows), S)

    def check(self, B: int, N: int, T: int, S: int) -> None:
        """Refuses arrays that do not fit `B` examples, `N` heads, `T` queries and `S` keys.

        Raises:
            ValueError: with the letters and sizes that were expected, and the shape received.
        """
        fits.check(self, B, N, T, S)
