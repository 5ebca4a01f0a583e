"""A learned bias by row and column, of Swin and BEiT."""

import dataclasses
from typing import Annotated, Any

import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.typing import Array
from flax_mha.positions import rules
from flax_mha.positions.bias import DenseBias

# The last entries of a table with a class token: of it as a query, as a key, as both.
FROM_CLASS, TO_CLASS, CLASS_TO_CLASS = -3, -2, -1


@dataclasses.dataclass(frozen=True)
class GridBias(DenseBias):
    """One learned number for each head and each difference of rows and of columns.

        bias[n, t, s] = embedding[(r_t - r_s + R - 1) (2 C - 1) + (c_t - c_s + C - 1), n]

    for tokens in raster order, that of a picture whose axes are attended together. The layer's
    parameters hold `{"relative_bias": {"embedding": [X, N]}}`, relative_position_bias_table of Swin
    and BEiT, X = (2 R - 1) (2 C - 1), and 3 more with a class token.

    Args:
        rows: R, of a window or of a picture.
        columns: C.
        class_token: whether a token stands before them; the table's last three numbers are those of
            it as a query, as a key, and as both.

    Memory: N T S numbers; with caches and along a context axis it is refused.

    Reference: Liu et al., "Swin Transformer", https://arxiv.org/abs/2103.14030; Bao et al., "BEiT",
    https://arxiv.org/abs/2106.08254.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha.positions import GridBias
        >>> line = GridBias(rows=1, columns=3)
        >>> line.index(3, 3).tolist(), line.table_size
        ([[2, 1, 0], [3, 2, 1], [4, 3, 2]], 5)
        >>> line(3, 3, num_heads=1, embedding=jnp.arange(5.0)[:, None])[0, 0].tolist()
        [2.0, 1.0, 0.0]
        >>> GridBias(1, 2, class_token=True).index(3, 3).tolist()
        [[5, 3, 3], [4, 1, 0], [4, 2, 1]]
    """

    rows: Annotated[int, rules.size]
    columns: Annotated[int, rules.size]
    class_token: Annotated[bool, checks.boolean] = False

    @property
    def table_size(self) -> int:
        differences = (2 * self.rows - 1) * (2 * self.columns - 1)
        return differences + 3 if self.class_token else differences

    def index(self, T: int, S: int) -> Array:
        """The entry of each pair of `T` queries and `S` keys, integers `[T, S]`.

        Raises:
            ValueError: other tokens than those of the grid.
        """
        tokens = self.rows * self.columns + self.class_token
        if (tokens, tokens) != (T, S):
            rule = "GridBias is of one grid: T = S = rows * columns, and 1 more of a class token."
            checks.fail(ValueError, rule, f"T={T}, S={S}, {self} of {tokens} tokens")
        # Made of vectors on the device: a [T, S] constant would stand in the program.
        place_T = jnp.arange(tokens, dtype="int32") - int(self.class_token)
        row_T, column_T = place_T // self.columns, place_T % self.columns
        apart_TS = row_T[:, None] - row_T[None] + self.rows - 1
        aside_TS = column_T[:, None] - column_T[None] + self.columns - 1
        index_TS = apart_TS * (2 * self.columns - 1) + aside_TS
        return self._with_class(index_TS) if self.class_token else index_TS

    def _with_class(self, index_TS: Array) -> Array:
        X = self.table_size
        index_TS = index_TS.at[0].set(X + FROM_CLASS).at[:, 0].set(X + TO_CLASS)
        return index_TS.at[0, 0].set(X + CLASS_TO_CLASS)

    def __call__(self, T: int, S: int, num_heads: int, embedding: Any = None) -> Array:
        return jnp.moveaxis(jnp.take(embedding, self.index(T, S), axis=0), -1, 0)
