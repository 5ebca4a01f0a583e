"""Position in attention: rotary embedding, ALiBi, T5's relative bias; by name, dict or object.

`Rotary` turns queries and keys; `Alibi` and `RelativeBias` add to the logits a number that depends
on head and distance alone, so that no `[T, S]` array is made.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.frozen import Frozen, arguments
from flax_mha.core.typing import Array
from flax_mha.positions.rotary import SCALINGS, Rotary


class DistanceFunction(Frozen):
    """A bias that depends on head and distance."""

    @abstractmethod
    def __call__(self, distance_L: np.ndarray, num_heads: int, embedding: Any = None) -> Array:
        """The bias `[N, L]` of keys that stand `distance_L` positions after the query."""


@dataclasses.dataclass(frozen=True)
class Alibi(DistanceFunction):
    """Attention with linear biases: without parameters, what is farther counts less.

        bias[n, t, s] = -slope_n |t - s|          slope_n: `alibi_slopes`

    Reference: Press et al., "Train Short, Test Long", https://arxiv.org/abs/2108.12409.

    Example:
        >>> import numpy as np
        >>> from flax_mha.positions import Alibi
        >>> Alibi()(np.array([-2, -1]), num_heads=2).tolist()
        [[-0.125, -0.0625], [-0.0078125, -0.00390625]]
    """

    def __call__(self, distance_L: np.ndarray, num_heads: int, embedding: Any = None) -> Array:
        return jnp.asarray(-alibi_slopes(num_heads)[:, None] * abs(distance_L), "float32")


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slopes of `Alibi`: 2^(-8 n / N) for n = 1..N.

    Where N is no power of two, the slopes of the power P below it come first, then every second
    one of 2 P, as in the paper's code.

    Args:
        num_heads: N, at least 1.

    Returns:
        float64 `[N]`.

    Raises:
        ValueError: N below 1, from `math.log2`.

    Example:
        >>> from flax_mha.positions import alibi_slopes
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** math.floor(math.log2(num_heads))
    exact = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([exact, between[: num_heads - power]])


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
        max_distance: from where on all distances share a bucket.
        bidirectional: half of the buckets for keys after the query; False for causal attention,
            where all of those share bucket 0.

    Reference: Raffel et al., "Exploring the Limits of Transfer Learning",
    https://arxiv.org/abs/1910.10683.

    Example:
        >>> import numpy as np
        >>> from flax_mha.positions import RelativeBias
        >>> RelativeBias().buckets(np.array([0, -1, -8, -128, 1, 500])).tolist()
        [0, 1, 8, 15, 17, 31]
    """

    num_buckets: Annotated[int, _count] = 32
    max_distance: Annotated[int, _count] = 128
    bidirectional: bool = True

    def buckets(self, distance: np.ndarray) -> np.ndarray:
        """The bucket of a key that stands `distance` positions after the query."""
        count = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        after = np.where(distance > 0, count, 0) if self.bidirectional else 0
        apart = abs(distance) if self.bidirectional else np.maximum(-distance, 0)
        exact = count // 2
        # In float32, as T5 does: in float64 some distances on a border change their bucket.
        grown = np.log(np.maximum(apart, 1).astype(np.float32) / np.float32(exact))
        grown = grown / np.float32(math.log(self.max_distance / exact)) * np.float32(count - exact)
        far = np.minimum(exact + np.maximum(grown, 0).astype(int), count - 1)
        return after + np.where(apart < exact, apart, far)

    def __call__(self, distance_L: np.ndarray, num_heads: int, embedding: Any = None) -> Array:
        return embedding[self.buckets(distance_L)].T


PositionEncoding: TypeAlias = Rotary | DistanceFunction
CLASSES = {"rotary": Rotary, "alibi": Alibi, "relative_bias": RelativeBias}


def resolve_position(name: str, value: Any) -> PositionEncoding | None:
    """An object of this module from itself, its name, or the dict that `serialize` writes."""
    if value is None or isinstance(value, PositionEncoding):
        return value
    if isinstance(value, str):
        return CLASSES[checks.one_of(name, value, CLASSES)]()
    if isinstance(value, Mapping):
        named = {cls.__name__: cls for cls in CLASSES.values()}
        return _from_dict(name, value, named)
    rule = f"`{name}` must be None, one of {list(CLASSES)}, or an object of flax_mha.positions."
    checks.fail(TypeError, rule, f"{value!r} of type {type(value).__name__}")


def serialize_position(value: Frozen | None) -> dict[str, Any] | None:
    """The JSON-able dict from which `resolve` makes an equal object."""
    if value is None:
        return None
    fields = {name: getattr(value, name) for name in arguments(type(value))}
    config = {k: serialize_position(v) if isinstance(v, Frozen) else v for k, v in fields.items()}
    return {"class_name": type(value).__name__, "config": config}


def _from_dict(name: str, value: Mapping[str, Any], classes: Mapping[str, Any]) -> Any:
    checks.known_names(f"A key of `{name}`", value, ("class_name", "config"))
    cls = classes[checks.one_of(f"{name}['class_name']", value.get("class_name"), classes)]
    config = dict(value.get("config") or {})
    checks.known_names(f"An argument of {cls.__name__}", config, arguments(cls))
    if isinstance(config.get("scaling"), Mapping):
        config["scaling"] = _from_dict(f"{name}.scaling", config["scaling"], SCALINGS)
    return cls(**config)
