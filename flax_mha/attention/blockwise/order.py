"""The order of a tile's axes: which of its rows and keys lie last, where a machine sums fast.

The names of arrays over a tile's rows and keys end in `_rs`, in either order:

    KEYS_LAST       [b, k, r, s]    CPU and GPU: a row's keys stand side by side
    QUERIES_LAST    [b, k, s, r]    TPU: along the lanes of its vectors stand queries, so that the
                                    maximum of a row is one of whole vectors, and what is known of
                                    rows is one vector for all keys

By the TPU compiler's own schedule for v5e, bundles a tile of 512 x 512 and head (splash: 1,186
forward, 3,419 backward), and by the estimates of cycles that it chooses by:

    KEYS_LAST       forward 1,525 to 2,070, backward 3,661       estimates 7,786 to 16,339, 9,517
    QUERIES_LAST    forward 1,327, backward 2,644                estimates 6,944, 7,613
      the row's sum as a row of the product with the values
                    forward 1,113                                estimates 1,849

where backward a tile is bound by its products, 2,560. It can be told to compute e^logits for each
product again (estimates 5,183): that schedule is longer, 2,894.
"""

import dataclasses

import jax
import jax.numpy as jnp

from flax_mha.attention.blockwise.tiles import Tiling, by_rows
from flax_mha.core.typing import Array, Shape


@dataclasses.dataclass(frozen=True)
class Order:
    """The equations of a tile's products; `over_keys` is an axis of its arrays."""

    logits: str  # query, key
    sum: str  # weights, value
    d_weights: str  # d_context, value
    d_query: str  # d_product, key
    d_key: str  # query, d_product
    d_value: str  # d_context, weights
    over_keys: int
    turns_queries: bool = False

    def of_gathered(self, x_bkrF: Array) -> Array:
        """Queries or d_context, as `d_key` and `d_value` take them."""
        if not self.turns_queries:
            return x_bkrF
        return jax.lax.optimization_barrier(x_bkrF.swapaxes(2, 3))  # XLA would fold it away

    def along_rows(self, x_bkr: Array) -> Array:
        """One number a row, beside all of its keys."""
        return jnp.expand_dims(x_bkr, self.over_keys)

    def split(self, x_rs: Array, tiling: Tiling) -> Array:
        """Its rows as G heads' t queries, where G heads can share what stands `beside`."""
        if self.over_keys == 2:
            return x_rs
        return x_rs.reshape(tiling.b, tiling.k, tiling.G, tiling.t, tiling.s)

    def beside(self, x_bkGts: Array, tiling: Tiling) -> Array:
        """`[b, k, G, t, s]`, where any axis may have size 1, to what was `split`."""
        if self.over_keys == 3:
            return x_bkGts
        return by_rows(tiling, x_bkGts)[:, :, 0].swapaxes(2, 3)

    def repeats(self, tiling: Tiling) -> int:
        """How often a mask of queries is written down, for heads that cannot share it."""
        return tiling.G if self.over_keys == 2 else 1

    def of_rows_and_keys(self, x_rs: Array) -> Array:
        """`[b, k, r, s]`."""
        return x_rs.swapaxes(2, 3) if self.over_keys == 2 else x_rs

    def gathered(self, b: int, k: int, s: int, F: int) -> Shape:
        """The shape of what `d_key` and `d_value` give."""
        return (b, k, s, F) if self.over_keys == 2 else (b, k, F, s)

    def of_keys(self, x: Array) -> Array:
        """What has been gathered, `[b, k, s, F]`."""
        return x if self.over_keys == 2 else x.swapaxes(2, 3)


# d_key and d_value are summed transposed, `[h, s]`: written so, XLA's CPU products run at twice the
# rate of those that would transpose the tile.
KEYS_LAST = Order(
    logits="bkrh,bksh->bkrs",
    sum="bkrs,bksv->bkrv",
    d_weights="bkrv,bksv->bkrs",
    d_query="bkrs,bksh->bkrh",
    d_key="bkrh,bkrs->bkhs",
    d_value="bkrv,bkrs->bkvs",
    over_keys=3,
)
# Of long rows the queries are turned first: then a product reads both operands along their rows.
QUERIES_TURNED = dataclasses.replace(
    KEYS_LAST, d_key="bkhr,bkrs->bkhs", d_value="bkvr,bkrs->bkvs", turns_queries=True
)
QUERIES_LAST = Order(
    logits="bkrh,bksh->bksr",
    sum="bksr,bkvs->bkvr",
    d_weights="bkrv,bksv->bksr",
    d_query="bksr,bksh->bkrh",
    d_key="bkrh,bksr->bksh",
    d_value="bkrv,bksr->bksv",
    over_keys=2,
)


def order_of(tiling: Tiling) -> Order:
    """The order that a tiling was made for."""
    if tiling.queries_last:
        return QUERIES_LAST
    return QUERIES_TURNED if tiling.turns_queries else KEYS_LAST
