"""T5's relative bias: learned, by buckets of distances."""

import dataclasses
import math
from typing import Annotated, Any

import numpy as np

from flax_mha.core import checks
from flax_mha.core.typing import Array
from flax_mha.positions.bias import DistanceFunction


def _count(name: str, value: Any) -> int:
    number = checks.integer(name, value, minimum=1)
    if number < 4:
        checks.fail(ValueError, f"`{name}` must be at least 4.", f"{name}={number}")
    return number


@dataclasses.dataclass(frozen=True)
class RelativeBias(DistanceFunction):
    """T5's bias: one learned number for each bucket of distances and each head.

        bias[n, t, s] = embedding[bucket(s - t), n]

    Half of the buckets hold one distance each, the others grow with the logarithm up to
    max_distance; all that is farther shares the last. The layer's parameters hold
    `{"relative_bias": {"embedding": [num_buckets, N]}}`.

    Args:
        num_buckets: how many buckets.
        max_distance: from where on all distances share a bucket; more than have one of their own,
            which are a quarter of `num_buckets`, or half of it in one direction.
        bidirectional: half of the buckets for keys after the query; False for causal attention,
            where all of those share bucket 0.

    Reference: Raffel et al., "Exploring the Limits of Transfer Learning",
    https://arxiv.org/abs/1910.10683.

    Example:
        >>> import numpy as np
        >>> from flax_mha.positions import RelativeBias
        >>> RelativeBias().buckets(np.array([0, -1, -8, -128, 1, 500])).tolist()
        [0, 1, 8, 15, 17, 31]
        >>> RelativeBias(num_buckets=8).table_size
        8
    """

    num_buckets: Annotated[int, _count] = 32
    max_distance: Annotated[int, _count] = 128
    bidirectional: Annotated[bool, checks.boolean] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_distance <= self._of_one:  # the logarithm below would be 0 or negative
            own = f"the {self._of_one} distances each way that have a bucket of their own"
            evidence = f"max_distance={self.max_distance}, num_buckets={self.num_buckets}"
            checks.fail(ValueError, f"`RelativeBias.max_distance` must be above {own}.", evidence)

    @property
    def _each_way(self) -> int:
        """How many buckets there are for keys before the query, and as many for those after."""
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    @property
    def _of_one(self) -> int:
        """How many of those hold a single distance."""
        return self._each_way // 2

    @property
    def table_size(self) -> int:
        return self.num_buckets

    def buckets(self, distance: np.ndarray) -> np.ndarray:
        """The bucket of a key that stands `distance` positions after the query."""
        count, exact = self._each_way, self._of_one
        after = np.where(distance > 0, count, 0) if self.bidirectional else 0
        apart = abs(distance) if self.bidirectional else np.maximum(-distance, 0)
        # In float32, as T5 does: in float64 some distances on a border change their bucket.
        grown = np.log(np.maximum(apart, 1).astype(np.float32) / np.float32(exact))
        grown = grown / np.float32(math.log(self.max_distance / exact)) * np.float32(count - exact)
        far = np.minimum(exact + np.maximum(grown, 0).astype(int), count - 1)
        return after + np.where(apart < exact, apart, far)

    def __call__(self, distance_L: np.ndarray, num_heads: int, embedding: Any = None) -> Array:
        return embedding[self.buckets(distance_L)].T
