"""ALiBi: attention with linear biases."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.frozen import Positive
from flax_mha.core.typing import Array
from flax_mha.positions.bias import DistanceFunction


@dataclasses.dataclass(frozen=True)
class Alibi(DistanceFunction):
    """Attention with linear biases: without parameters, what is farther counts less.

        bias[n, t, s] = -factor slope_n |t - s|          slope_n: `alibi_slopes`

    Args:
        factor: of all slopes; 1 / sqrt(key_dim) for the first Falcon models (RW), which divide the
            bias as they divide q k.
        max_bias: the slopes fall to 2^-max_bias; alibi_bias_max of an MPT.

    Reference: Press et al., "Train Short, Test Long", https://arxiv.org/abs/2108.12409.

    Example:
        >>> import numpy as np
        >>> from flax_mha.positions import Alibi
        >>> Alibi()(np.array([-2, -1]), num_heads=2).tolist()
        [[-0.125, -0.0625], [-0.0078125, -0.00390625]]
        >>> Alibi(factor=0.5, max_bias=4.0)(np.array([-2, -1]), num_heads=2).tolist()
        [[-0.25, -0.125], [-0.0625, -0.03125]]
    """

    factor: Positive = 1.0
    max_bias: Positive = 8.0

    def __call__(self, distance_L: np.ndarray, num_heads: int, embedding: Any = None) -> Array:
        slopes_N = self.factor * alibi_slopes(num_heads, self.max_bias)
        return jnp.asarray(-slopes_N[:, None] * abs(distance_L), "float32")


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> np.ndarray:
    """The slopes of `Alibi`: 2^(-max_bias n / N) for n = 1..N.

    Where N is no power of two, the slopes of the power P below it come first, then every second
    one of 2 P, as in the paper's code.

    Args:
        num_heads: N, at least 1.
        max_bias: the last slope is 2^-max_bias.

    Returns:
        float64 `[N]`.

    Raises:
        ValueError: N below 1, a largest bias that is not a finite number above 0.

    Example:
        >>> from flax_mha.positions import alibi_slopes
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    num_heads = checks.integer("num_heads", num_heads, minimum=1)
    max_bias = checks.positive("max_bias", max_bias)
    power = 2 ** math.floor(math.log2(num_heads))
    exact = 2.0 ** (-max_bias * np.arange(1, power + 1) / power)
    between = 2.0 ** (-max_bias * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([exact, between[: num_heads - power]])
