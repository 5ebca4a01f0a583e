"""What adds to the logits numbers that depend on where query and key stand.

Two kinds: of the distance alone, T + S numbers a head; and of both places, T S numbers.
"""

from abc import abstractmethod
from typing import Any

import numpy as np

from flax_mha.core.frozen import Frozen
from flax_mha.core.typing import Array


class PositionBias(Frozen):
    """An additive bias that depends on head and positions, perhaps by a learned table."""

    @property
    def table_size(self) -> int | None:
        """X, where the layer's parameters hold a table `[X, N]` for it; None = they do not."""
        return None


class DistanceFunction(PositionBias):
    """A bias that depends on head and distance.

    An own one is a frozen dataclass: see `register`. With a `table_size` X the layer's parameters
    hold `{"relative_bias": {"embedding": [X, N]}}`, handed in as `embedding`.

    Example:
        >>> import dataclasses
        >>> import jax.numpy as jnp, numpy as np
        >>> from flax_mha.positions import DistanceFunction
        >>> @dataclasses.dataclass(frozen=True)
        ... class Fading(DistanceFunction):
        ...     rate: float = 0.5
        ...
        ...     def __call__(self, distance_L, num_heads, embedding=None):
        ...         values_L = jnp.log(jnp.exp(-self.rate * abs(distance_L)))
        ...         return jnp.broadcast_to(values_L[None], (num_heads, len(distance_L)))
        >>> Fading()(np.array([-2, 0]), num_heads=1).tolist(), Fading().table_size
        ([[-1.0, 0.0]], None)
    """

    @abstractmethod
    def __call__(self, distance_L: np.ndarray, num_heads: int, embedding: Any = None) -> Array:
        """The bias `[N, L]` of keys that stand `distance_L` positions after the query."""


class DenseBias(PositionBias):
    """A bias that depends on head, query and key: an array `[N, T, S]`, in each call.

    It costs what a dense `bias=` costs. With caches and along a context axis it is refused.
    `table_size` as in `DistanceFunction`.

    Example:
        >>> import dataclasses
        >>> import jax.numpy as jnp
        >>> from flax_mha.positions import DenseBias
        >>> @dataclasses.dataclass(frozen=True)
        ... class ToTheFirst(DenseBias):
        ...     def __call__(self, T, S, num_heads, embedding=None):
        ...         return jnp.zeros((num_heads, T, S)).at[:, :, 0].set(1.0)
        >>> ToTheFirst()(2, 2, num_heads=1).tolist(), ToTheFirst().table_size
        ([[[1.0, 0.0], [1.0, 0.0]]], None)
    """

    @abstractmethod
    def __call__(self, T: int, S: int, num_heads: int, embedding: Any = None) -> Array:
        """The bias `[N, T, S]` of `T` queries and `S` keys."""
