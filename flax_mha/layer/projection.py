"""x . kernel + bias, as a product of matrices: XLA's CPU runs and compiles it best so.

The einsum over a kernel of rank 3 makes XLA copy operands and results into other layouts, forward
and backward, and each copy is a loop to compile: 73 ms for one projection's gradients, 47 ms as it
stands here. As a plain product of matrices, XLA turns the kernel's gradient, a sum over B and T,
into one that reads both operands across their rows: 18 ms where 9 are enough (4096 x 512 x 512).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from flax_mha.core.nans import nan_where
from flax_mha.core.platform import Place
from flax_mha.core.program import Program, apply
from flax_mha.core.typing import Array, DType
from flax_mha.params.quantized import QuantizedKernel


def project(
    equation: str, x: Array, projection: Any, *, dtype: DType, precision: Any, isolate: bool
) -> Array:
    """x . kernel + bias in the compute dtype, and what an adapter adds.

    With `isolate`, a position that holds NaN or Inf passes the product as zeros and is NaN behind
    it: its NaN times a zero cotangent would otherwise reach the kernel's gradient.
    """
    kernel, adapter = projection["kernel"], projection.get("lora")

    def linear(x: Array) -> Array:
        x = x.astype(dtype)
        y = _times(equation, x, kernel, precision)
        if adapter is not None:
            y += _through(adapter, equation, x, precision)
        if "bias" in projection:
            y += jax.lax.broadcast_to_rank(projection["bias"].astype(dtype), y.ndim)
        return y

    return isolated(linear, x) if isolate else linear(x)


def _times(equation: str, x: Array, kernel: Any, precision: Any) -> Array:
    """x . kernel; of a quantized one, x . values and then the scale."""
    if not isinstance(kernel, QuantizedKernel):
        return contract(equation, x, kernel.astype(x.dtype), precision)
    return kernel.scaled(contract(equation, x, kernel.values(x.dtype), precision), x.dtype)


def _through(adapter: Any, equation: str, x: Array, precision: Any) -> Array:
    """(drop(x) . a) scale . b, of r numbers a token in between."""
    operands, result = equation.split("->")
    operand, kernel = operands.split(",")
    inputs = "".join(letter for letter in kernel if letter not in result)
    outputs = kernel.removeprefix(inputs)
    a, b, x = adapter.a.astype(x.dtype), adapter.b.astype(x.dtype), adapter.dropped(x)
    y_BTr = contract(f"{operand},{inputs}r->{operand[:2]}r", x, a, precision)
    scaled_BTr = y_BTr * adapter.factor(x.dtype)
    return contract(f"{operand[:2]}r,r{outputs}->{result}", scaled_BTr, b, precision)


def isolated(linear: Callable[[Array], Array], x: Array) -> Array:
    """`linear(x)` of x `[B, T, ...]`, where rows with NaN or Inf pass as zeros and come out NaN."""
    finite_BT = jnp.isfinite(x).all(tuple(range(2, x.ndim)))
    y = linear(jnp.where(as_rank(finite_BT, x.ndim), x, 0))
    finite = as_rank(finite_BT, y.ndim)
    return jnp.where(finite, y, nan_where(~finite, y.dtype))  # no cotangent passes it either


def as_rank(x_BT: Array, rank: int) -> Array:
    return x_BT.reshape(*x_BT.shape, *(1,) * (rank - 2))


def contract(equation: str, x: Array, kernel: Array, precision: Any) -> Array:
    """The einsum `equation` of x `[B, T, ...]` and a kernel, in any derivative.

    Example:
        >>> import jax.numpy as jnp
        >>> contract("BTNV,NVE->BTE", jnp.ones((2, 5, 3, 4)), jnp.ones((3, 4, 7)), None).shape
        (2, 5, 7)
    """
    operand, result = equation.split(",")[0], equation.split("->")[1]
    summed = sum(letter not in result for letter in operand)
    F, G = math.prod(kernel.shape[:summed]), math.prod(kernel.shape[summed:])
    # B and T stay apart: merged, an axis that is sharded over a mesh would have to be gathered.
    y_BTG = _product(precision, x.reshape(*x.shape[:2], F), kernel.reshape(F, G))
    return y_BTG.reshape(*x.shape[:2], *kernel.shape[summed:])


@dataclasses.dataclass(frozen=True)
class _Kept(Program):
    """x as an array of its own on CPU, where XLA would fuse a transposition away."""

    @property
    def count(self) -> int:
        return 1

    def run(self, known: list[Array], linear: list[Array], place: Place) -> list[Array]:
        return [jax.lax.optimization_barrier(x) if place.cpu else x for x in linear]

    def transpose(self) -> "_Kept":
        return self


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(precision: Any, x_BTF: Array, kernel_FG: Array) -> Array:
    return jnp.einsum("BTF,FG->BTG", x_BTF, kernel_FG, precision=precision)


def _tangent(precision: Any, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """d(x . kernel) = dx . kernel + x . dkernel, where dkernel stays transposed."""
    x_BTF, kernel_FG = primals
    dx_BTF, dkernel_FG = tangents
    y_BTG = _product(precision, x_BTF, kernel_FG)
    dy_BTG = jnp.zeros_like(y_BTG)
    if not isinstance(dx_BTF, SymbolicZero):
        dy_BTG = _product(precision, dx_BTF, kernel_FG)
    if not isinstance(dkernel_FG, SymbolicZero):
        (dkernel_GF,) = apply(_Kept(), [], [dkernel_FG.T])
        dy_BTG += jnp.einsum("BTF,GF->BTG", x_BTF, dkernel_GF, precision=precision)
    return y_BTG, dy_BTG


_product.defjvp(_tangent, symbolic_zeros=True)
