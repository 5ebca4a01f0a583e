"""The operands of functions of pairs: `row`, `column` and `number`, by what they depend on.

They are filled up to whole tiles with what stands at their ends: a function might make a NaN of
zeros, and rows of nobody should make no tile mixed.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from flax_mha.attention.allowed import Allowed
from flax_mha.attention.pallas_tpu.pairs import Pairs, stored
from flax_mha.attention.pallas_tpu.plan import Plan
from flax_mha.core.pairs.blocks import Blocks, Grid, both
from flax_mha.core.pairs.separated import Separated
from flax_mha.core.typing import Array


class Functions(NamedTuple):
    """All functions of a call: what masks and the score are, and their operands by name.

    `left` = the blocks that the masks leave; None where there are none.
    """

    where: tuple[Pairs, ...]
    score: Pairs | None
    operands: dict[str, Array]
    left: Blocks | None


def functions(
    plan: Plan, first: Any, where: tuple[Allowed, ...], score: Separated | None
) -> Functions:
    """Of a call whose queries begin at row `first`."""
    operands: dict[str, Array] = {}

    def named(pairs: Separated) -> Pairs:
        names = []
        for x in (*pairs.operands, *pairs.tables):
            kind, laid = _laid(plan, x)
            names.append(f"{kind}{len(operands)}")
            operands[names[-1]] = stored(laid)
        return Pairs(pairs.expression, tuple(names))

    filled = lambda pairs: _of_tiles(pairs, plan, first)  # noqa: E731
    where = tuple(dataclasses.replace(one, pairs=filled(one.pairs)) for one in where)
    found = [_left(one, plan, first) for one in where]
    return Functions(
        tuple(named(one.pairs) for one in where),
        None if score is None else named(filled(score)),
        operands,
        functools.reduce(both, found) if found else None,
    )


def _left(one: Allowed, plan: Plan, first: Any) -> Blocks:
    """The tiles that a filled function leaves."""
    found = one.over(Grid(plan.T, plan.S, plan.t, plan.s))
    if one.blocks is None or isinstance(first, int):
        return found
    # Blocks that were found before count the queries from 0: a tile reaches into the one before.
    some, whole = (jnp.concatenate([x[:, :, :1], x[:, :, :-1]], 2) for x in found)
    return Blocks(found.some | some, found.whole & whole)


def _of_tiles(pairs: Separated, plan: Plan, first: Any) -> Separated:
    """The function over whole tiles, of types as it was traced."""
    arrays = [*(_edged(x, plan, first) for x in pairs.operands), *pairs.tables]
    expression, split = pairs.expression, len(pairs.operands)
    inputs = expression.inputs[len(expression.inputs) - len(arrays) :]
    cast = tuple(x.astype(expression.type(i)) for x, i in zip(arrays, inputs))
    return Separated(cast[:split], cast[split:], expression)


def _edged(x_bnts: Array, plan: Plan, first: Any) -> Array:
    if x_bnts.shape[2] > 1:
        x_bnts = edged(x_bnts, 2, plan.T, first)
    return edged(x_bnts, 3, plan.S, 0) if x_bnts.shape[3] > 1 else x_bnts


def edged(x: Array, axis: int, size: int, first: Any) -> Array:
    """`x` from `first` on, which may be traced; around it the values of its ends."""
    index = jnp.clip(jnp.arange(size, dtype="int32") - first, 0, x.shape[axis] - 1)
    return jnp.take(x, index, axis=axis)


def _laid(plan: Plan, x: Array) -> tuple[str, Array]:
    """(kind, array) of an operand `[b, n, t, s]` or a table."""
    if not x.ndim:
        return "number", x.reshape(1, 1)
    b, n, t, s = x.shape
    if t == s == 1:
        return "number", x.reshape(b, n)
    assert 1 in (t, s), "what needs query and key is no operand"
    heads = (1, 1) if n == 1 else (plan.K, plan.G)
    return ("row" if t > 1 else "column"), x.reshape(b, *heads, 1, t * s)
