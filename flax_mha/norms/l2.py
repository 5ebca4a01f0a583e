"""The norm that makes of a product a cosine."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from flax_mha.core.frozen import Positive
from flax_mha.core.typing import Array
from flax_mha.norms.norm import Norm


@dataclasses.dataclass(frozen=True)
class L2Norm(Norm):
    """Each head divided by its length, times sqrt(H): without parameters.

        y = sqrt(H) x / |x|       so that logits are sqrt(H) cos(query, key)

    Args:
        epsilon: the length up to which a head counts as zero, and stays zero with gradient zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha.norms import L2Norm
        >>> unit = L2Norm()(jnp.array([3.0, 4.0]).reshape(1, 1, 1, 2), {})
        >>> [round(float(x), 4) for x in unit.ravel()]
        [0.8485, 1.1314]
    """

    epsilon: Positive = 1e-12

    def __call__(self, x_BTNH: Array, params: Mapping[str, Array]) -> Array:
        """The largest feature is divided out first: squares of 1e-23 or 1e20 leave float32.

        It needs no gradient, for the result does not depend on it.
        """
        largest = jax.lax.stop_gradient(jnp.abs(x_BTNH).max(-1, keepdims=True))
        safe = x_BTNH / jnp.where(largest > 0, largest, 1)
        square = (safe**2).mean(-1, keepdims=True)
        # A zero has no direction: with |x| <= epsilon no gradient of 1 / epsilon comes back.
        length = largest * jnp.sqrt(jax.lax.stop_gradient(square) * x_BTNH.shape[-1])
        is_zero = length <= self.epsilon
        return jnp.where(is_zero, 0, safe / jnp.sqrt(jnp.where(is_zero, 1, square)))
