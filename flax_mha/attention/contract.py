"""What every implementation receives and returns.

An implementation is a module with two functions:

    unsupported(inputs, options) -> str | None   the reason why it cannot serve a call, or None
    attend(inputs, options) -> Output            the attention itself

Both see arrays of canonical rank whose shapes were checked.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha.attention.distance import DistanceBias
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.typing import Array, DType, PRNGKey
from flax_mha.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The data of one attention call; `bias_bnts` has 1 or the full size in every axis."""

    query_BTNH: Array
    key_BSKH: Array
    value_BSKV: Array
    mask: Mask
    bias_bnts: Array | None = None
    distance_bias: DistanceBias | None = None
    sinks_N: Array | None = None  # not for implementations: `_sinks` adds them to any output
    dropout_key: PRNGKey | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The static half of one attention call; `dropout_rate` is 0 where there is no key."""

    scale: float
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False
    precision: Any = None
    return_weights: bool = False
    return_residuals: bool = False
    block_sizes: tuple[int, int] | None = None

    def scales(self, dtype: DType) -> tuple[float, float]:
        """(factor of the query, factor of the product), whose product is `scale`.

        Scaling the query makes the product final: where XLA fuses a factor into what follows, it
        rounds once for the maximum and once for the exponent, and beyond 2^24 they differ by more
        than 1. A 16-bit query would be rounded once more, which doubles the error of the context.
        """
        return (self.scale, 1.0) if dtype == wide_dtype(dtype) else (1.0, self.scale)


class Residuals(NamedTuple):
    """The softmax's float32 remainders, enough to merge partial results over keys.

        weights = exp(logits - row_max) / row_sum

    Attributes:
        row_max_BNT: the largest logit of each query; -inf where it may attend nowhere.
        row_sum_BNT: the sum of exp(logits - row_max); 0 where it may attend nowhere.

    Example:
        >>> import jax, flax_mha
        >>> x = jax.numpy.zeros((2, 6, 3, 8))
        >>> _, residuals = flax_mha.dot_product_attention(x, x, x, return_residuals=True)
        >>> residuals.row_sum_BNT.shape, float(residuals.row_sum_BNT[0, 0, 0])
        ((2, 3, 6), 6.0)
    """

    row_max_BNT: Array
    row_sum_BNT: Array


class Output(NamedTuple):
    """`context` always; weights (before dropout) and residuals where they were asked for."""

    context_BTNV: Array
    weights_BNTS: Array | None = None
    residuals: Residuals | None = None


def soft_capped(logits: Array, options: Options) -> Array:
    """cap tanh(logits / cap), which stays within (-cap, cap); the logits where there is no cap."""
    cap = options.soft_cap
    return logits if cap is None else cap * jnp.tanh(logits / cap)
