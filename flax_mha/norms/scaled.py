"""Norms by the size of the features, with a learned scale.

    y = x / size(x) * (offset + scale) + bias

where `size` is taken over one head's features, or over those of all heads together.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, TypeAlias

import jax
import jax.numpy as jnp

from flax_mha.core import checks
from flax_mha.core.frozen import Number, Positive
from flax_mha.core.typing import Array, Shape
from flax_mha.norms.norm import Norm

Flag: TypeAlias = Annotated[bool, checks.boolean]


@dataclasses.dataclass(frozen=True)
class Scaled(Norm):
    """A norm with a learned scale, `[H]`, or `[N, H]` where heads have their own."""

    epsilon: Positive = 1e-6
    use_scale: Flag = True
    offset: Number = 0.0
    per_head: Flag = False
    across_heads: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        read = {"offset": self.offset != 0, "per_head": self.per_head}
        for name in (name for name, is_set in read.items() if is_set and not self.use_scale):
            rule = f"`{name}` says how the scale is kept."
            evidence = f"{name}={getattr(self, name)}, use_scale=False"
            checks.fail(ValueError, rule, evidence)
        if self.per_head and self.across_heads:
            rule = "A norm across heads has a scale for each of them already."
            checks.fail(ValueError, rule, "per_head=True, across_heads=True")

    def shapes(self, heads: int, features: int) -> dict[str, Shape]:
        own = self.per_head or self.across_heads
        shape = (heads, features) if own else (features,)
        return {leaf: shape for leaf in self._leaves()}

    def initial(self, leaf: str) -> float:
        return 1 - self.offset if leaf == "scale" else 0.0

    def __call__(self, x_BTNH: Array, params: Mapping[str, Array]) -> Array:
        axes = (-2, -1) if self.across_heads else (-1,)
        # Squares of 1e20 leave float32. The result does not depend on what is divided out.
        largest = jax.lax.stop_gradient(jnp.abs(x_BTNH).max(axes, keepdims=True))
        down = jnp.maximum(largest, 1)
        y_BTNH = self._of_size_one(x_BTNH / down, self.epsilon / down / down, axes)
        parts = {leaf: _as_heads(params[leaf], y_BTNH) for leaf in self._leaves()}
        if "scale" in parts:
            y_BTNH *= parts["scale"] + self.offset if self.offset else parts["scale"]
        return y_BTNH + parts["bias"] if "bias" in parts else y_BTNH

    def _leaves(self) -> tuple[str, ...]:
        return ("scale",) if self.use_scale else ()

    @abstractmethod
    def _of_size_one(self, x: Array, epsilon: Array, axes: tuple[int, ...]) -> Array:
        """x / size(x), where the size is taken over `axes`; epsilon is in the units of x^2."""


@dataclasses.dataclass(frozen=True)
class RMSNorm(Scaled):
    """Each head divided by its root mean square, times a learned scale.

        y = x / sqrt(mean(x^2) + epsilon) * (offset + scale)

    Args:
        epsilon: added to the mean square.
        use_scale: whether there is a scale.
        offset: what is added to the scale; 1.0 for Gemma 3, whose files keep w of 1 + w.
        per_head: whether each head has a scale of its own, `[N, H]`; otherwise all share `[H]`.
        across_heads: whether the mean is over all heads' features together, as in OLMo 2; the scale
            is then `[N, H]`.

    Raises:
        ValueError: a way to keep the scale where there is none, or two.

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization",
    https://arxiv.org/abs/1910.07467.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha.norms import RMSNorm
        >>> RMSNorm().shapes(heads=4, features=16), RMSNorm(per_head=True).shapes(4, 16)
        ({'scale': (16,)}, {'scale': (4, 16)})
        >>> RMSNorm().initial("scale"), RMSNorm(offset=1.0).initial("scale")
        (1.0, 0.0)
        >>> x = jnp.array([3.0, 4.0]).reshape(1, 1, 1, 2)
        >>> [round(float(y), 4) for y in RMSNorm()(x, {"scale": jnp.ones(2)}).ravel()]
        [0.8485, 1.1314]
    """

    def _of_size_one(self, x: Array, epsilon: Array, axes: tuple[int, ...]) -> Array:
        return x / jnp.sqrt((x**2).mean(axes, keepdims=True) + epsilon)


@dataclasses.dataclass(frozen=True)
class LayerNorm(Scaled):
    """Each head less its mean, divided by its standard deviation, times a learned scale.

        y = (x - mean(x)) / sqrt(var(x) + epsilon) * (offset + scale) + bias

    Args:
        epsilon: added to the variance.
        use_scale: whether there is a scale.
        offset: what is added to the scale.
        per_head: whether each head has a scale and bias of its own, `[N, H]`, as in Cohere's models
            and StableLM; otherwise all share `[H]`.
        across_heads: whether mean and variance are over all heads' features together.
        use_bias: whether there is a bias, of the scale's shape.

    Raises:
        ValueError: a way to keep the scale where there is none, or two.

    Reference: Ba et al., "Layer Normalization", https://arxiv.org/abs/1607.06450.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax_mha.norms import LayerNorm
        >>> LayerNorm(use_bias=True).shapes(heads=4, features=16)
        {'scale': (16,), 'bias': (16,)}
        >>> x = jnp.array([3.0, 5.0]).reshape(1, 1, 1, 2)
        >>> [round(float(y), 3) for y in LayerNorm()(x, {"scale": jnp.ones(2)}).ravel()]
        [-1.0, 1.0]
    """

    epsilon: Positive = 1e-5
    use_bias: Flag = False

    def _leaves(self) -> tuple[str, ...]:
        return (*super()._leaves(), *(("bias",) if self.use_bias else ()))

    def _of_size_one(self, x: Array, epsilon: Array, axes: tuple[int, ...]) -> Array:
        centred = x - x.mean(axes, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(axes, keepdims=True) + epsilon)


def _as_heads(leaf: Array, x_BTNH: Array) -> Array:
    """`[H]` or `[N, H]` at the rank of the heads, in their dtype."""
    leaf = leaf.astype(x_BTNH.dtype)
    return leaf.reshape(*(1,) * (x_BTNH.ndim - leaf.ndim), *leaf.shape)
