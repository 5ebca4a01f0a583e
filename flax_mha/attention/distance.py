"""A bias that depends on the distance alone: T + S numbers a head instead of T x S.

    bias[b, n, t, s] = values[n, s - t - offset[b] - first]

A tile of it is one stretch of `values`, shifted by one from row to row. `skew` makes the tile of
the stretch by reshaping, without a gather; `unskew`, its transpose, sums a tile's diagonals.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DistanceBias:
    """An additive bias as a function of head and distance; a pytree.

    Attributes:
        values: floats `[N, L]`; entry l belongs to the distance s - p = first + l of a key at s
            from a query at position p = t + query_offset. Beyond either end, the end's value holds.
        query_offset: integers `[B]`, the position of query 0; None = 0.
        first: the distance of entry 0; static.

    Memory: O(N L), in the blockwise implementation too.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha.attention import DistanceBias
        >>> bias = DistanceBias(jnp.array([[-1.0, 0.0, -1.0]]), first=-1)
        >>> bias.as_array(2, 3)[0, 0].tolist()
        [[0.0, -1.0, -1.0], [-1.0, 0.0, -1.0]]
        >>> bias.of_queries(jnp.array([1]), 3)[0, 0].tolist()
        [[-1.0, 0.0, -1.0]]
        >>> bias.at(jnp.array([[[0, 1, 2]]]))[0, 0].tolist()
        [[0.0, -1.0, -1.0]]
        >>> bias.check(B=1, N=1)
    """

    values: Array
    query_offset: Array | None = None
    first: int = dataclasses.field(default=0, metadata={"static": True})

    def as_array(self, T: int, S: int) -> Array:
        """The bias of `T` queries and `S` keys as an array `[b, N, T, S]`, where b is 1 or B."""
        return self.of_queries(jnp.arange(T, dtype="int32"), S)

    def of_queries(self, query_T: Array, S: int) -> Array:
        """The bias of queries at the indices `query_T` and of `S` keys, `[b, N, T, S]`."""
        position_bT = query_T[None].astype("int32")
        if self.query_offset is not None:
            position_bT += jnp.reshape(self.query_offset, (-1, 1)).astype("int32")
        return self.at(jnp.arange(S, dtype="int32")[None, None] - position_bT[..., None])

    def at(self, distance_bTS: Array) -> Array:
        """The bias at the distances `distance_bTS`, `[b, N, T, S]`."""
        entry_bTS = jnp.clip(distance_bTS - self.first, 0, self.values.shape[1] - 1)
        return jnp.moveaxis(jnp.take(self.values, entry_bTS, axis=1), 0, 1)

    def check(self, B: int, N: int) -> None:
        """Refuses values or offsets that do not fit `B` examples and `N` heads.

        Raises:
            ValueError: values that are not `[N, L]`, or offsets that are not `[B]`.
            TypeError: values that are not floats.
        """
        checks.floating_array("distance_bias.values", self.values, "[N, L]")
        if self.values.ndim != 2 or self.values.shape[0] != N or self.values.shape[1] == 0:
            rule = f"`distance_bias.values` must be [N, L] with N = {N} and L > 0."
            checks.fail(ValueError, rule, f"shape {self.values.shape}")
        if self.query_offset is not None:
            checks.integer_ids("distance_bias.query_offset", self.query_offset)
        if self.query_offset is not None and jnp.size(self.query_offset) not in (1, B):
            rule = f"`distance_bias.query_offset` must be [B] = ({B},)."
            checks.fail(ValueError, rule, f"shape {jnp.shape(self.query_offset)}")


def skew(values_nl: Array, t: int, s: int) -> Array:
    """`[n, t + s - 1]` to `[n, t, s]`: entry (row, column) is values[t - 1 - row + column].

    Copies of one more than l entries, read l at a time, slip by one from row to row.
    """
    n, length = values_nl.shape
    copies = jnp.pad(values_nl, ((0, 0), (0, 1)))[:, None]
    flat = jnp.broadcast_to(copies, (n, t, length + 1)).reshape(n, -1)
    return flat[:, t - 1 : t - 1 + t * length].reshape(n, t, length)[..., :s]


def unskew(tile_nts: Array) -> Array:
    """The transpose of `skew`: the sums along the tile's diagonals, `[n, t + s - 1]`."""
    n, t, s = tile_nts.shape
    length = t + s - 1
    flat = jnp.pad(tile_nts, ((0, 0), (0, 0), (0, t - 1))).reshape(n, t * length)
    copies = jnp.pad(flat, ((0, 0), (t - 1, 1))).reshape(n, t, length + 1)
    return copies.sum(1)[:, :length]
