"""What every implementation receives and returns.

An implementation is a module with two functions:

    unsupported(inputs, options, platform) -> str | None
        The reason why it cannot serve a call there, or None. The platform is one of `PLATFORMS`;
        None = the one that the call will be lowered for, which a trace cannot know.
    attend(inputs, options) -> Output
        The attention itself. Lowered for a platform that it does not serve, it must raise.

Both see arrays of canonical rank whose shapes were checked.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flax_mha.attention.allowed import Allowed
from flax_mha.attention.distance import DistanceBias
from flax_mha.core.pairs.separated import Separated
from flax_mha.core.typing import Array
from flax_mha.masks import Mask

NAMES = ("flax_mha_context", "flax_mha_residuals")


class Scales(NamedTuple):
    """Of keys and values that are int8: float32, one factor a key and head."""

    key_BSK: Array
    value_BSK: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """The data of one attention call; `bias_bnts` has 1 or the full size in every axis."""

    query_BTNH: Array
    key_BSKH: Array
    value_BSKV: Array
    mask: Mask
    scales: Scales | None = None  # None = keys and values are what they stand for
    where: tuple[Allowed, ...] = ()  # what the mask says beyond its plain part
    score: Separated | None = None
    bias_bnts: Array | None = None
    distance_bias: DistanceBias | None = None
    sinks_N: Array | None = None  # not for implementations: `with_sinks` joins them to any output
    dropout_word_2: Array | None = None  # what the dropout key comes down to
    dropout_start_4: Array | None = None  # uint32: where this call's (b, n, t, s) = 0 stands


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
    draws_aligned: bool = False  # whether `dropout_start_4` is known to begin a group of queries


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


def shift_of(row_max: Array) -> Array:
    """What a row's logits are shifted by: -inf - (-inf) would be NaN where nothing is attended."""
    return jnp.where(jnp.isneginf(row_max), 0, row_max)


def named(context: Array, residuals: Residuals) -> tuple[Array, Residuals]:
    """The two under names, by which a policy of `jax.checkpoint` may keep or offload them.

    That is `jax.checkpoint_policies.save_only_these_names(*NAMES)`, for one.
    """
    rows = (checkpoint_name(x, NAMES[1]) for x in residuals)
    return checkpoint_name(context, NAMES[0]), Residuals(*rows)


class Output(NamedTuple):
    """`context` always; weights (before dropout) and residuals where they were asked for."""

    context_BTNV: Array
    weights_BNTS: Array | None = None
    residuals: Residuals | None = None
