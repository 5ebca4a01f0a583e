"""Queries that grow with the logarithm of their position, so that long texts stay sharp."""

import dataclasses
from typing import Annotated, Any

import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.dtypes import at_least_32_bits, wide_dtype
from flax_mha.core.frozen import Positive
from flax_mha.core.typing import Array
from flax_mha.positions.function import PositionFunction
from flax_mha.positions.rotary import Rotary


def _interval(name: str, value: Any) -> int:
    return checks.integer(name, value, minimum=1)


def _offset(name: str, value: Any) -> int:
    return checks.integer(name, value, minimum=0)


def _rotary(name: str, value: Any) -> Rotary | None:
    if value is not None:
        checks.instance(name, value, Rotary)
        if value.axes != 1:
            rule = f"`{name}` must be of one axis: queries grow with one number."
            checks.fail(ValueError, rule, f"{value}")
    return value


@dataclasses.dataclass(frozen=True)
class QueryGrowth(PositionFunction):
    """Queries that grow with the logarithm of their position, in steps; keys stay.

        q at position p  ->  q (1 + factor log(1 + floor((p + offset) / interval)))

    With more keys a softmax spreads; the growth makes up for it. A position below 0 counts as 0.

    Args:
        factor: `attn_scale` of Llama 4, `llama_4_scaling_beta` of Ministral 3.
        interval: how many positions share a step: `floor_scale` of Llama 4,
            `original_max_position_embeddings` of Ministral 3.
        offset: what is added to the position: 1 in Llama 4, 0 in Ministral 3.
        rotary: a `Rotary` that turns queries and keys as well; None in Llama 4, whose other layers
            turn them.

    Raises:
        ValueError: a factor, interval or offset out of range, a rotary embedding of several axes.
        TypeError: a value of another type.

    Reference: Nakanishi, "Scalable-Softmax Is Superior for Attention",
    https://arxiv.org/abs/2501.19399.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha.positions import QueryGrowth, Rotary
        >>> growth = QueryGrowth(factor=0.1, interval=8192)
        >>> [round(float(x), 4) for x in growth(jnp.array([[0, 8191, 100_000]]))[0]]
        [1.0, 1.0693, 1.2565]
        >>> x, at_1T = jnp.ones((1, 3, 2, 8)), jnp.array([[0, 1, 8191]])
        >>> float(growth.of_query(x, at_1T).max()) > 1, bool((growth.of_key(x, at_1T) == x).all())
        (True, True)
        >>> QueryGrowth(0.1, 16384, offset=0, rotary=Rotary(base=1e6)).turned_features(128)
        128
    """

    factor: Positive
    interval: Annotated[int, _interval]
    offset: Annotated[int, _offset] = 1
    rotary: Annotated[Rotary | None, _rotary] = None

    def __call__(self, position_bT: Array) -> Array:
        """What the queries are multiplied by, float32 `[b, T]`.

        Raises:
            TypeError: positions that are no integers.
            ValueError: positions of another rank.
        """
        position_bT = checks.token_positions("position_bT", position_bT, floats=False)
        if position_bT.ndim != 2:
            rule = "`position_bT` must be one position a token, [b, T]."
            checks.fail(ValueError, rule, f"shape {position_bT.shape}")
        from_zero = jnp.maximum(at_least_32_bits(position_bT), 0)
        # Split, for the sum of the largest position and the offset would wrap.
        rest = (from_zero % self.interval + self.offset) // self.interval
        steps = from_zero // self.interval + rest
        return 1 + self.factor * jnp.log1p(steps.astype("float32"))

    def turned_features(self, H: int) -> int:
        return 0 if self.rotary is None else self.rotary.turned_features(H)

    def of_query(self, x_BTNH: Array, position_bT: Array) -> Array:
        turned = x_BTNH if self.rotary is None else self.rotary.of_query(x_BTNH, position_bT)
        wide = wide_dtype(x_BTNH.dtype)
        growth_bT11 = self(position_bT).astype(wide)[:, :, None, None]
        return (turned.astype(wide) * growth_bT11).astype(x_BTNH.dtype)

    def of_key(self, x_BSKH: Array, position_bS: Array) -> Array:
        return x_BSKH if self.rotary is None else self.rotary.of_key(x_BSKH, position_bS)
