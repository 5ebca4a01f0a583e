"""Keras's initializers: `initializer(init_key, shape, dtype, *, fans=None) -> array`.

Each is a frozen value with the signature of a JAX initializer, so that it also serves Flax modules.
One with an integer `seed` ignores `init_key` and gives the numbers that Keras gives on JAX, the
same on every call. `fans=(fan_in, fan_out)` is read by VarianceScaling and its children only.

Differs from Keras: (1) Orthogonal serves 16-bit dtypes too; (2) `input_axes` without `output_axes`
is refused, where Keras ignores it; (3) without a seed the values are those of `init_key`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

from flax_mha.core import checks
from flax_mha.core.frozen import OptionalAxes, Positive, Seed, axes_within, choice
from flax_mha.core.typing import Array, DType, Shape
from flax_mha.keras.distributions import Constant as Constant
from flax_mha.keras.distributions import Fans, Key
from flax_mha.keras.distributions import Identity as Identity
from flax_mha.keras.distributions import Initializer as Initializer
from flax_mha.keras.distributions import Ones as Ones
from flax_mha.keras.distributions import Orthogonal as Orthogonal
from flax_mha.keras.distributions import RandomNormal as RandomNormal
from flax_mha.keras.distributions import RandomUniform as RandomUniform
from flax_mha.keras.distributions import TruncatedNormal as TruncatedNormal
from flax_mha.keras.distributions import Zeros as Zeros

# The standard deviation of a unit normal that is cut off at -2 and 2.
TRUNCATED_STDDEV = 0.87962566103423978


def compute_fans(
    shape: Shape, input_axes: Sequence[int] | None = None, output_axes: Sequence[int] | None = None
) -> tuple[int, int]:
    """(fan_in, fan_out): the products of the sizes along the input and the output axes.

    Without axes the last is the output, the one before it the input, and all others, as those of a
    convolution, count for both. A vector's size is both; a scalar has (1, 1).

    Args:
        shape: of the array to initialize.
        input_axes: the axes that are summed over.
        output_axes: the axes that remain.

    Returns:
        fan_in and fan_out.

    Raises:
        ValueError: one of the two is missing, or names no axis of `shape`.

    Example:
        >>> compute_fans((5, 2, 3)), compute_fans((5, 2, 3), (0,), (1, 2))
        ((10, 15), (5, 6))
    """
    shape = checks.sizes("shape", shape)
    _check_pair("", input_axes, output_axes)
    if input_axes is not None and output_axes is not None:
        fan_in = axes_within("input_axes", checks.axes("input_axes", input_axes), shape)
        fan_out = axes_within("output_axes", checks.axes("output_axes", output_axes), shape)
        return math.prod(shape[a] for a in fan_in), math.prod(shape[a] for a in fan_out)
    if len(shape) < 2:
        return math.prod(shape), math.prod(shape)
    return math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]


def _check_pair(owner: str, input_axes: Any, output_axes: Any) -> None:
    if (input_axes is None) != (output_axes is None):
        rule = f"`{owner}input_axes` and `output_axes` go together."
        evidence = f"input_axes={input_axes}, output_axes={output_axes}"
        checks.fail(ValueError, rule, evidence, "Give both, or neither.")


def _distribution(name: str, value: Any) -> str:
    """Keras reads this name in any case, and "normal" as the truncated one."""
    lower = value.lower() if isinstance(value, str) else value
    value = "truncated_normal" if isinstance(lower, str) and lower == "normal" else lower
    return choice("truncated_normal", "untruncated_normal", "uniform")(name, value)


Mode: TypeAlias = Annotated[str, choice("fan_in", "fan_out", "fan_avg")]
Distribution: TypeAlias = Annotated[str, _distribution]


@dataclass(frozen=True)
class VarianceScaling(Initializer):
    """Mean 0 and variance `scale / max(1, n)`, where n is fan_in, fan_out or their average.

    Args:
        scale: the variance, times n.
        mode: n: "fan_in", "fan_out" or "fan_avg".
        distribution: "truncated_normal" (or "normal"), "untruncated_normal" or "uniform".
        seed: None, or the integer that stands in for `init_key`: then query, key and value of one
            shape get equal numbers, as in Keras; without it they differ.
        input_axes: the axes that make fan_in; None = those of `fans=`, else of `compute_fans`.
        output_axes: the axes that make fan_out; likewise.

    Example:
        >>> values = VarianceScaling(3.0, "fan_out", "uniform", seed=1)(None, (5, 9), "float32")
        >>> bool(abs(values).max() <= 1)
        True
        >>> import jax, flax_mha
        >>> def query_is_key(seed):
        ...     scaling = VarianceScaling(seed=seed)
        ...     config = flax_mha.MultiHeadAttentionConfig(2, 4, kernel_initializer=scaling)
        ...     params = flax_mha.init_params(jax.random.key(0), config, (1, 8))
        ...     return bool((params["query"]["kernel"] == params["key"]["kernel"]).all())
        >>> query_is_key(1), query_is_key(None)
        (True, False)
    """

    scale: Positive = 1.0
    mode: Mode = "fan_in"
    distribution: Distribution = "truncated_normal"
    seed: Seed = None
    input_axes: OptionalAxes = None
    output_axes: OptionalAxes = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pair(f"{type(self).__name__}.", self.input_axes, self.output_axes)

    def _values(self, init_key: Key, shape: Shape, dtype: DType, fans: Fans) -> Array:
        if fans is None or self.input_axes is not None:
            fans = compute_fans(shape, self.input_axes, self.output_axes)
        fan_in, fan_out = fans
        n = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        stddev = math.sqrt(self.scale / max(1.0, n))
        return self._of_stddev(stddev)(init_key, shape, dtype)

    def _of_stddev(self, stddev: float) -> Initializer:
        match self.distribution:
            case "uniform":
                limit = math.sqrt(3.0) * stddev
                return RandomUniform(-limit, limit, self.seed)
            case "untruncated_normal":
                return RandomNormal(0.0, stddev, self.seed)
            case _:
                return TruncatedNormal(0.0, stddev / TRUNCATED_STDDEV, self.seed)


@dataclass(frozen=True)
class GlorotUniform(VarianceScaling):
    """Uniform, variance `2 / (fan_in + fan_out)`.

    Args: those of `keras.initializers.VarianceScaling`, but scale, mode and distribution are fixed.
    With a `seed`, kernels of one shape get equal numbers.

    Reference: Glorot and Bengio, 2010, https://proceedings.mlr.press/v9/glorot10a.html.

    Example:
        >>> GlorotUniform().mode, GlorotUniform().distribution
        ('fan_avg', 'uniform')
    """

    scale: Positive = field(default=1.0, init=False, repr=False)
    mode: Mode = field(default="fan_avg", init=False, repr=False)
    distribution: Distribution = field(default="uniform", init=False, repr=False)


@dataclass(frozen=True)
class GlorotNormal(VarianceScaling):
    """Truncated normal, variance `2 / (fan_in + fan_out)`.

    Args: those of `keras.initializers.VarianceScaling`, but scale, mode and distribution are fixed.
    With a `seed`, kernels of one shape get equal numbers.

    Reference: Glorot and Bengio, 2010, https://proceedings.mlr.press/v9/glorot10a.html.

    Example:
        >>> GlorotNormal().mode, GlorotNormal().distribution
        ('fan_avg', 'truncated_normal')
    """

    scale: Positive = field(default=1.0, init=False, repr=False)
    mode: Mode = field(default="fan_avg", init=False, repr=False)
    distribution: Distribution = field(default="truncated_normal", init=False, repr=False)


@dataclass(frozen=True)
class LecunNormal(VarianceScaling):
    """Truncated normal, variance `1 / fan_in`.

    Args: those of `keras.initializers.VarianceScaling`, but scale, mode and distribution are fixed.
    With a `seed`, kernels of one shape get equal numbers.

    Reference: LeCun et al., 1998, Efficient BackProp.

    Example:
        >>> LecunNormal().mode, LecunNormal().distribution
        ('fan_in', 'truncated_normal')
    """

    scale: Positive = field(default=1.0, init=False, repr=False)
    mode: Mode = field(default="fan_in", init=False, repr=False)
    distribution: Distribution = field(default="truncated_normal", init=False, repr=False)


@dataclass(frozen=True)
class LecunUniform(VarianceScaling):
    """Uniform, variance `1 / fan_in`.

    Args: those of `keras.initializers.VarianceScaling`, but scale, mode and distribution are fixed.
    With a `seed`, kernels of one shape get equal numbers.

    Reference: LeCun et al., 1998, Efficient BackProp.

    Example:
        >>> LecunUniform().mode, LecunUniform().distribution
        ('fan_in', 'uniform')
    """

    scale: Positive = field(default=1.0, init=False, repr=False)
    mode: Mode = field(default="fan_in", init=False, repr=False)
    distribution: Distribution = field(default="uniform", init=False, repr=False)


@dataclass(frozen=True)
class HeNormal(VarianceScaling):
    """Truncated normal, variance `2 / fan_in`.

    Args: those of `keras.initializers.VarianceScaling`, but scale, mode and distribution are fixed.
    With a `seed`, kernels of one shape get equal numbers.

    Reference: He et al., 2015, https://arxiv.org/abs/1502.01852.

    Example:
        >>> HeNormal().mode, HeNormal().distribution
        ('fan_in', 'truncated_normal')
    """

    scale: Positive = field(default=2.0, init=False, repr=False)
    mode: Mode = field(default="fan_in", init=False, repr=False)
    distribution: Distribution = field(default="truncated_normal", init=False, repr=False)


@dataclass(frozen=True)
class HeUniform(VarianceScaling):
    """Uniform, variance `2 / fan_in`.

    Args: those of `keras.initializers.VarianceScaling`, but scale, mode and distribution are fixed.
    With a `seed`, kernels of one shape get equal numbers.

    Reference: He et al., 2015, https://arxiv.org/abs/1502.01852.

    Example:
        >>> HeUniform().mode, HeUniform().distribution
        ('fan_in', 'uniform')
    """

    scale: Positive = field(default=2.0, init=False, repr=False)
    mode: Mode = field(default="fan_in", init=False, repr=False)
    distribution: Distribution = field(default="uniform", init=False, repr=False)
