"""The products of the four projections, forward and backward."""

from collections.abc import Callable, Iterator

import jax

from flax_mha.bench.cases import Case
from flax_mha.bench.parts.part import Part
from flax_mha.core.typing import Array
from flax_mha.layer.projection import contract

PROJECTIONS = 4  # query, key, value and output: all of one size, for N H = D


def parts_of(case: Case) -> Iterator[Part]:
    """x . W; and where there is a gradient dx and dW, as the layer writes them."""
    x_BTD = (case.batch, case.length, case.features)
    kernel_DNH = (case.features, case.heads, case.head_size)
    y_BTNH = (*x_BTD[:2], *kernel_DNH[1:])
    flops = 2 * case.batch * case.length * case.features**2
    yield Part("x . W", _forward, (x_BTD, kernel_DNH), PROJECTIONS, flops)
    if case.gradient:
        shapes = (x_BTD, kernel_DNH, y_BTNH)
        yield Part("dx = dy . W", _gradient(0), shapes, PROJECTIONS, flops)
        yield Part("dW = x . dy", _gradient(1), shapes, PROJECTIONS, flops)


def _forward(x_BTD: Array, kernel_DNH: Array) -> Array:
    return contract("BTD,DNH->BTNH", x_BTD, kernel_DNH, None)


def _gradient(index: int) -> Callable[..., Array]:
    def gradient(x_BTD: Array, kernel_DNH: Array, dy_BTNH: Array) -> Array:
        return jax.vjp(_forward, x_BTD, kernel_DNH)[1](dy_BTNH)[index]

    return gradient
