"""Rotary embedding: queries and keys turn by angles that grow with their position.

    features (a, b) of pair i at position p  ->  (a cos - b sin, b cos + a sin),  angle = p w_i
    w_i = base^(-2 i / dim)

so that a product of query and key depends on the difference of their positions alone.

Reference: Su et al., "RoFormer", https://arxiv.org/abs/2104.09864.
"""

import dataclasses
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.frozen import Positive
from flax_mha.core.nans import nan_where
from flax_mha.core.typing import Array
from flax_mha.positions import rules
from flax_mha.positions.angles import angles, concrete
from flax_mha.positions.function import PositionFunction
from flax_mha.positions.scalings import Scaling


def _scaling(name: str, value: Any) -> Scaling | None:
    if value is not None:
        checks.instance(name, value, Scaling)
    return value


@dataclasses.dataclass(frozen=True)
class Rotary(PositionFunction):
    """Rotary embedding of queries and keys: their product depends on the difference of positions.

        (a, b) -> (a cos(p w) - b sin(p w), b cos(p w) + a sin(p w))       w_i = base^(-2 i / dim)

    Args:
        base: the longest wave is about 2 pi base.
        dim: how many of a head's first features turn; None = all.
        interleaved: pairs are neighbours (2 i, 2 i + 1); otherwise halves (i, i + dim / 2), as in
            Llama checkpoints of the transformers library.
        scaling: a `Scaling`, such as `Llama3Scaling` or `YarnScaling`; None = as trained.

    Reference: Su et al., "RoFormer", https://arxiv.org/abs/2104.09864.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha.positions import Rotary
        >>> x = jnp.ones((1, 3, 2, 8))
        >>> turned = Rotary()(x, jnp.arange(3)[None])
        >>> bool((turned[:, 0] == 1).all()), round(float(turned[0, 1, 0, 0]), 4)
        (True, -0.3012)
        >>> Rotary(base=100.0).frequencies(4).tolist(), Rotary().axes
        ([1.0, 0.1], 1)
        >>> rotary, at_1T = Rotary(dim=4), jnp.arange(3)[None]
        >>> rotary.turned_features(8)
        4
        >>> bool((rotary.of_query(x, at_1T) == rotary.of_key(x, at_1T)).all())  # both are turned
        True
    """

    _ranks: ClassVar[tuple[int, ...]] = (2,)  # of positions

    base: Positive = 10000.0
    dim: Annotated[int | None, rules.even] = None
    interleaved: Annotated[bool, checks.boolean] = False
    scaling: Annotated[Scaling | None, _scaling] = None

    def frequencies(self, H: int) -> np.ndarray:
        """w_i, float64 `[dim / 2]`, for heads of size `H`.

        Raises:
            ValueError: an odd number of features, or more than a head has.
        """
        return self._scaled(self._dim_of(H))

    def turned_features(self, H: int) -> int:
        return 2 * len(self.frequencies(H))

    def of_query(self, x_BTNH: Array, position_bT: Array) -> Array:
        return self(x_BTNH, position_bT)

    def of_key(self, x_BSKH: Array, position_bS: Array) -> Array:
        return self(x_BSKH, position_bS)

    def _dim_of(self, H: int) -> int:
        """How many features of a head turn."""
        H = checks.integer("H", H, minimum=1)
        dim = H if self.dim is None else self.dim
        if dim > H or dim % 2:
            rule = "Rotary embedding needs an even number of features, at most key_dim."
            checks.fail(ValueError, rule, f"dim={self.dim}, key_dim={H}", "Set `dim`.")
        return dim

    def _scaled(self, dim: int) -> np.ndarray:
        """base^(-2 i / dim), rescaled."""
        plain = self.base ** (-np.arange(0, dim, 2) / dim)
        return plain if self.scaling is None else self.scaling(plain, self.base)

    def __call__(self, x_BTNH: Array, position_bT: Array) -> Array:
        """The heads turned, `[B, T, N, H]`; positions `[B or 1, T]`. At least float32 inside.

        Angles are exact at every integer position, a million and beyond.

        Raises:
            TypeError: heads that are no floats, positions that are no numbers.
            ValueError: heads of another rank, or positions that are not one a token.
        """
        checks.floating_array("x_BTNH", x_BTNH, "[B, T, N, H]")
        position_bT = checks.token_positions("position_bT", position_bT, floats=True)
        self._check_heads(x_BTNH, position_bT)
        if jnp.issubdtype(position_bT.dtype, jnp.integer):
            return self._turned(x_BTNH, position_bT)
        # Where padding has NaN for a position, NaN times a zero cotangent would reach the kernels.
        finite_bT = jnp.isfinite(position_bT)
        turned = self._turned(x_BTNH, jnp.where(finite_bT, position_bT, 0))
        wrong = ~finite_bT.reshape(-1, *finite_bT.shape[-2:]).all(0)[..., None, None]
        return jnp.where(wrong, nan_where(wrong, turned.dtype), turned)

    def _turned(self, x_BTNH: Array, position_bT: Array) -> Array:
        wide = wide_dtype(x_BTNH.dtype)
        frequencies = concrete(lambda: self.frequencies(x_BTNH.shape[-1]))
        angle_bTi = angles(self._of_pairs(position_bT), frequencies, wide)
        factor = 1.0 if self.scaling is None else self.scaling.magnitude()
        cos, sin = (factor * wave(angle_bTi)[:, :, None] for wave in (jnp.cos, jnp.sin))
        turning, rest = jnp.split(x_BTNH, [2 * len(frequencies)], -1)
        a, b = self._pairs(turning.astype(wide))
        turned = self._joined(a * cos - b * sin, b * cos + a * sin)
        return jnp.concatenate([turned.astype(x_BTNH.dtype), rest], -1)

    def _of_pairs(self, position_bT: Array) -> Array:
        """The position that each pair turns by, `[b, T, i]`, or `[b, T, 1]` of all pairs."""
        return position_bT[..., None]

    def _pairs(self, x: Array) -> tuple[Array, Array]:
        if self.interleaved:
            return x[..., ::2], x[..., 1::2]
        first, second = jnp.split(x, 2, -1)
        return first, second

    def _joined(self, a: Array, b: Array) -> Array:
        if self.interleaved:
            return jnp.stack([a, b], -1).reshape(*a.shape[:-1], -1)
        return jnp.concatenate([a, b], -1)

    def _check_heads(self, x_BTNH: Array, position_bT: Array) -> None:
        """Heads of rank 4, and a position a token, of one axis or of all."""
        tokens = x_BTNH.shape[:2]
        one_each = position_bT.shape[-2:] in (tokens, (1, *tokens[1:]))
        if x_BTNH.ndim != 4 or position_bT.ndim not in self._ranks or not one_each:
            rule = "`x_BTNH` must be heads [B, T, N, H], `position_bT` positions [B, T] or [1, T]."
            evidence = f"shapes {x_BTNH.shape} and {position_bT.shape}"
            checks.fail(ValueError, rule, evidence)
