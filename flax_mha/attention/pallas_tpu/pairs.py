"""Functions of pairs in the kernels: expressions over numbers of rows, of columns and of heads.

What a function knows of each query alone is a row of numbers that is turned to a column of the
tile, what it knows of each key a row of it, what it knows of a head a scalar.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.core.pairs.expression import Expression, mapped
from flax_mha.core.typing import Array, DType


@dataclasses.dataclass(frozen=True)
class Pairs:
    """An expression, and the operands of the kernel that are its inputs but a logit; static."""

    expression: Expression
    inputs: tuple[str, ...]

    @property
    def types(self) -> tuple[str, ...]:
        """The dtypes of these inputs."""
        inputs = self.expression.inputs[len(self.expression.inputs) - len(self.inputs) :]
        return tuple(map(self.expression.type, inputs))


def as_mask(pairs: Pairs) -> Any:
    """The function of its inputs, arrays of one shape."""
    return lambda *values: mapped(pairs.expression, *values)


def as_score(pairs: Pairs) -> Any:
    """The function of float32 logits and its inputs, arrays of one shape."""
    dtype = pairs.expression.type(pairs.expression.inputs[0])

    def score(logits: Array, *values: Array) -> Array:
        x = mapped(pairs.expression, logits.astype(dtype), *values)
        return jnp.broadcast_to(x, logits.shape).astype("float32")

    return score


def with_slope(score: Any, place: int) -> Any:
    """(score, its derivative by the input at this place), entry by entry."""

    def both(*inputs: Array) -> tuple[Array, Array]:
        of = lambda x: score(*inputs[:place], x, *inputs[place + 1 :])  # noqa: E731
        result, pull = jax.vjp(of, inputs[place])
        (slope,) = pull(jnp.ones_like(result))
        return result, slope.astype("float32")

    return both


def stored(x: Array) -> Array:
    """As 32 bits, which a row of lanes and a scalar have."""
    if x.dtype == jnp.uint32:
        return jax.lax.bitcast_convert_type(x, jnp.int32)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype("float32" if is_float else "int32")


def restored(x: Array, dtype: DType) -> Array:
    """The inverse of `stored`."""
    if dtype == "bool":
        return x != 0
    if dtype == "uint32":
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return x.astype(dtype)
