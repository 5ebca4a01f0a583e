"""Under `jax.vmap` the mapped axis joins the examples: one larger call, not one after the other.

Pallas would map a kernel with scalars of its own by a loop.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.pallas_tpu.plan import Plan
from flax_mha.core.typing import Array

Kernel = Callable[[Plan, dict[str, Array]], Any]


def joins_examples(kernel: Kernel, summed: tuple[str, ...] = ()) -> Kernel:
    """`kernel(plan, operands)`, whose operands and results begin with the axis of examples.

    Of the operands `summed` the results have the shape: where all examples share one, the examples
    of each element of the mapped axis are added up.
    """

    @functools.wraps(kernel)
    def run(plan: Plan, operands: dict[str, Array]) -> Any:
        names = tuple(operands)

        @jax.custom_batching.custom_vmap
        def call(*arrays: Array) -> Any:
            return kernel(plan, dict(zip(names, arrays)))

        @call.def_vmap
        def _(size: int, mapped: Any, *arrays: Array) -> Any:
            joined = {
                n: _joined(x, is_mapped, size, plan.B, n in summed)
                for n, x, is_mapped in zip(names, arrays, mapped)
            }
            shapes = tuple((n, joined[n].shape) for n in plan.names)
            results = run(dataclasses.replace(plan, B=size * plan.B, shapes=shapes), joined)
            share = any(n in summed and plan.shape(n)[0] < plan.B for n in plan.names)
            results = jax.tree.map(lambda x: _apart(x, size, plan.B, share), results)
            return results, jax.tree.map(lambda _: True, results)

        return call(*operands.values())

    return run


def _joined(x: Array, is_mapped: bool, size: int, B: int, full: bool) -> Array:
    """`[size, b, ...]` or `[b, ...]` to `[size B, ...]`, or `[1, ...]` where all share it."""
    own = x.shape[1:] if is_mapped else x.shape
    if own[0] == 1 and not is_mapped and not full:
        return x
    x = x if is_mapped else x[None]
    return jnp.broadcast_to(x, (size, B, *own[1:])).reshape(size * B, *own[1:])


def _apart(x: Array, size: int, B: int, share: bool) -> Array:
    x = x.reshape(size, B, *x.shape[1:])
    return x.sum(1, keepdims=True) if share else x
