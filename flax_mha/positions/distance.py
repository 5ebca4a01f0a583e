"""What adds to the logits a number that depends on head and distance alone: no `[T, S]` array."""

from abc import abstractmethod
from typing import Any

import numpy as np

from flax_mha.core.frozen import Frozen
from flax_mha.core.typing import Array


class DistanceFunction(Frozen):
    """A bias that depends on head and distance."""

    @abstractmethod
    def __call__(self, distance_L: np.ndarray, num_heads: int, embedding: Any = None) -> Array:
        """The bias `[N, L]` of keys that stand `distance_L` positions after the query."""
