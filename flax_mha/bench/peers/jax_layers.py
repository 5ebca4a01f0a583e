"""What all JAX layers share: a pure function of weights becomes a compiled contender."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data
from flax_mha.bench.memory import temporaries
from flax_mha.bench.peers.contract import Contender
from flax_mha.bench.textbook import Expected
from flax_mha.core.typing import Array


@dataclasses.dataclass(frozen=True)
class Layer:
    """A JAX framework's layer.

    `convert` makes its weights, a pytree of floating arrays, of our parameter tree. It only moves
    numbers, so it turns the textbook's gradients into what the layer's must be, too.
    """

    apply: Callable[[Any, Array, Any], Any]  # (weights, x_BTD, dropout key or None) -> output_BTE
    convert: Callable[[Any], Any]


def contender(layer: Layer, case: Case, data: Data) -> Contender:
    """Compiles F or FB of the layer."""
    weights = layer.convert(data.params)
    dropout_key = data.dropout_key if case.dropout else None
    arguments = (weights, data.x_BTD, dropout_key)
    compiled, seconds = _compile(layer, case, arguments)
    return Contender(
        run=lambda: jax.block_until_ready(compiled(*arguments)),
        exact=lambda: _exact(layer, case, arguments, compiled),
        own_layout=lambda expected: _own_layout(layer, case, expected),
        noisy=lambda: np.asarray(jax.jit(layer.apply)(*arguments)),
        compile=lambda: _compile(layer, case, arguments, fresh=True)[1],
        temp_bytes=temporaries(compiled),
        compile_seconds=seconds,
    )


def _program(layer: Layer, case: Case) -> Callable[..., Any]:
    """F, or the gradient of the output's sum of squares; a new function at every call."""

    def forward(weights: Any, x_BTD: Array, dropout_key: Any) -> Any:
        return layer.apply(weights, x_BTD, dropout_key)

    def loss(weights: Any, x_BTD: Array, dropout_key: Any) -> Array:
        return jnp.square(layer.apply(weights, x_BTD, dropout_key)).sum()

    return jax.grad(loss, argnums=(0, 1)) if case.gradient else forward


def _compile(layer: Layer, case: Case, arguments: Any, fresh: bool = False) -> tuple[Any, float]:
    """(the compiled program, seconds of tracing, lowering and compiling)."""
    if fresh:
        jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(_program(layer, case)).lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def _exact(layer: Layer, case: Case, arguments: Any, compiled: Any) -> list[np.ndarray]:
    """The timed program's own results; with dropout, those of the same without a key."""
    if case.dropout:
        arguments = (*arguments[:2], None)
        compiled, _ = _compile(layer, case, arguments)
    return jax.device_get(jax.tree.leaves(compiled(*arguments)))


def _own_layout(layer: Layer, case: Case, expected: Expected) -> list[np.ndarray]:
    if not case.gradient:
        return [expected.output_BTE]
    weights = layer.convert(expected.params_gradient)
    return [np.asarray(leaf) for leaf in (*jax.tree.leaves(weights), expected.x_gradient_BTD)]
