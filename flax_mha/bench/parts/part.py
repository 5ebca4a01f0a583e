"""One part of a layer's work, and the program that does nothing else."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.bench.timing import Call
from flax_mha.core.typing import Array, Shape

COPIES = 2  # of every operand, so that no step finds what the last one has left in a register
SHORTEST_PROGRAM = 2e9  # operations: a call's own cost is nothing beside them
FEWEST_STEPS = 4
OF_NUMBER = 20  # operations that a number of a pass is reckoned at


@dataclasses.dataclass(frozen=True)
class Part:
    """What one call of the layer does `times` times: `function` of arrays of these shapes.

    `flops` are those of a product; a pass has none, and `numbers` that it reads.
    """

    name: str
    function: Callable[..., Any]
    shapes: tuple[Shape, ...]
    times: int
    flops: int = 0
    numbers: int = 0

    @property
    def steps(self) -> int:
        """How often the timed program does it: as often as makes it long enough."""
        operations = self.flops or OF_NUMBER * self.numbers
        return max(FEWEST_STEPS, round(SHORTEST_PROGRAM / operations))

    def program(self) -> Call:
        """A loop of `steps`, each on the next copy of the operands."""
        keys = jax.random.split(jax.random.key(0), len(self.shapes))
        arrays = [
            jax.random.uniform(key, (COPIES, *shape)) for key, shape in zip(keys, self.shapes)
        ]
        run = jax.jit(functools.partial(_loop, self.function, self.steps))
        compiled = run.lower(arrays).compile()
        return Call(lambda: jax.block_until_ready(compiled(arrays)))


def _loop(function: Callable[..., Any], steps: int, arrays: Sequence[Array]) -> Any:
    def step(index: Array, _: Any) -> Any:
        here = index % COPIES
        return function(*(jax.lax.dynamic_index_in_dim(x, here, 0, False) for x in arrays))

    shapes = jax.eval_shape(lambda: step(jnp.int32(0), None))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, steps, step, nothing)
