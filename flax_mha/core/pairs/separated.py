"""A function of pairs, separated into what rows know, what columns know, and what needs both.

    f(b, n, t, s) = rest(u(b, n, t), ..., v(b, n, s), ..., tables)

What depends on the query alone, or on the key alone, is computed once for all of them: operands
`[b, n, t, s]` with a size of 1 in every axis that they do not depend on, indices among them. Any
block of pairs is `rest` of slices of these, wherever the block stands and whatever the order of
queries and keys is. What `rest` looks up itself, by query and key at once, are its tables.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.core.pairs.expression import Atom, Expression, Step, Whole, mapped, numbered
from flax_mha.core.pairs.function import PairFunction
from flax_mha.core.pairs.lookups import LETTERS, check_lookups
from flax_mha.core.typing import Array

Depends = frozenset[str]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Separated:
    """The function `rest` with its operands and tables; a pytree, whose expression is static.

    Attributes:
        operands: arrays `[b, n, t, s]`, any axis of which may have size 1.
        tables: arrays that are looked up, or numbers.
        expression: `rest`, of a logit if the function takes one, the operands and the tables.
        still: the names of floats that are made of indices and integers: they have no derivative.
    """

    operands: tuple[Array, ...]
    tables: tuple[Array, ...]
    expression: Expression = dataclasses.field(metadata={"static": True})
    still: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def at(self, operands: Any, tables: Any, *logits: Array) -> Array:
        """Its values at the places of some operands, arrays of any one rank."""
        # As they were when it was traced: a derivative may have widened them.
        values = [*logits, *operands, *map(Whole, tables)]
        types = map(self.expression.type, self.expression.inputs)
        cast = [
            Whole(x.value.astype(type)) if isinstance(x, Whole) else x.astype(type)
            for x, type in zip(values, types)
        ]
        return mapped(self.expression, *cast)

    def whole(self, *logits: Array) -> Array:
        """Its values at all places, `[b, n, t, s]`, where an axis it does not depend on is 1."""
        values = self.at(self.operands, self.tables, *logits)
        return values if values.ndim else values.reshape(1, 1, 1, 1)

    @property
    def moving(self) -> dict[str, Array]:
        """The floats among operands and tables, which have derivatives, by their names."""
        named = [*_named("operand", self.operands), *_named("table", self.tables)]
        return {name: x for name, x in named if _is_float(x) and name not in self.still}

    def with_moving(self, moving: dict[str, Any]) -> Separated:
        """The same with others in their places; None where they are to be given later."""
        put = lambda kind, xs: tuple(moving.get(name, x) for name, x in _named(kind, xs))  # noqa: E731
        return dataclasses.replace(
            self, operands=put("operand", self.operands), tables=put("table", self.tables)
        )

    @property
    def table_inputs(self) -> tuple[int, ...]:
        """The variables of the tables."""
        count = len(self.tables)
        return self.expression.inputs[len(self.expression.inputs) - count :]

    @property
    def looks_up(self) -> bool:
        """Whether it reads an array by query and key at once, or a row of one."""
        return any(table.ndim for table in self.tables) or any(
            self.expression.shape(x) for step in self.expression.steps for x in step.outputs
        )


def _named(kind: str, arrays: tuple[Any, ...]) -> list[tuple[str, Any]]:
    return [(f"{kind}{i}", x) for i, x in enumerate(arrays)]


def _is_float(x: Any) -> bool:
    return x is not None and jnp.issubdtype(x.dtype, jnp.floating)


def separated(
    function: PairFunction, places: dict[str, Array], sizes: Sequence[int] | None = None
) -> Separated:
    """The function over the pairs of these indices, int32 `[size]` by letter.

    `sizes` are those of all pairs, B, N, T and S, of which these may be some; None = these are all.
    """
    expression, takes = function.expression, function.indices
    logits, indices = expression.inputs[: takes - 4], expression.inputs[takes - 4 : takes]
    letters = dict(zip(indices, LETTERS))
    sizes = [places[letter].shape[0] for letter in LETTERS] if sizes is None else sizes
    check_lookups(expression, letters, dict(zip(LETTERS, sizes)))
    depends = _dependencies(expression, letters, logits)
    inner = _inner_steps(expression, depends)
    made = {x for step in inner for x in step.outputs}
    read = [*(x for step in inner for x in step.variables), expression.output]
    frontier = [x for x in dict.fromkeys(read) if isinstance(x, int) and x not in made]
    frontier = [x for x in frontier if x not in logits]
    is_operand = lambda x: bool(depends[x])  # noqa: E731
    operands = tuple(filter(is_operand, frontier))
    tables = tuple(x for x in frontier if not is_operand(x))
    rest = Expression(
        (*logits, *operands, *tables), tuple(inner), expression.output, expression.types
    )
    value = functools.partial(_value, expression, indices, function.arrays, places)
    floats = {x for x, array in zip(expression.inputs[takes:], function.arrays) if _is_float(array)}
    named = [*_named("operand", operands), *_named("table", tables)]
    still = tuple(name for name, x in named if not floats & _read_by(expression, x))
    return Separated(
        tuple(value(x, depends[x]) for x in operands),
        tuple(value(x, depends[x]) for x in tables),
        numbered(rest),
        still,
    )


def _read_by(expression: Expression, variable: int) -> set[int]:
    """The variables of which one is made, itself among them."""
    return {variable}.union(*(step.variables for step in expression.reach(variable)))


def _dependencies(
    expression: Expression, letters: dict[int, str], logits: tuple[int, ...]
) -> dict[int, Depends]:
    """Of which indices each variable is a function; a logit depends on all."""
    depends: dict[int, Depends] = dict.fromkeys(expression.inputs, frozenset())
    depends |= {x: frozenset(letter) for x, letter in letters.items()}
    depends |= dict.fromkeys(logits, frozenset(LETTERS))
    for step in expression.steps:
        of_step = frozenset().union(*(depends[x] for x in step.variables))
        depends |= dict.fromkeys(step.outputs, of_step)
    return depends


def _inner_steps(expression: Expression, depends: dict[int, Depends]) -> list[Step]:
    """The steps that need query and key, and those whose rows of numbers such a step reads."""
    inner: list[Step] = []
    rows: set[Atom] = set()
    for step in reversed(expression.steps):
        of_both = any({"t", "s"} <= depends[x] for x in step.outputs)
        if of_both or rows & set(step.outputs):
            inner.append(step)
            rows |= {x for x in step.variables if expression.shape(x) and depends[x]}
    return inner[::-1]


def _value(
    expression: Expression,
    indices: tuple[int, ...],
    arrays: tuple[Array, ...],
    places: dict[str, Array],
    variable: int,
    depends: Depends,
) -> Array:
    """A variable at all places of the indices it depends on, `[b, n, t, s]`; of none, as it is."""
    closed = dict(zip(expression.inputs[len(expression.inputs) - len(arrays) :], arrays))
    letters = [letter for letter in LETTERS if letter in depends]
    steps = expression.reach(variable)
    part = Expression((*indices, *closed), steps, variable, expression.types)

    def of(*numbers: Array) -> Array:
        given = dict(zip(letters, numbers))
        return part(*(given.get(letter, jnp.int32(0)) for letter in LETTERS), *closed.values())

    for i in reversed(range(len(letters))):
        of = jax.vmap(of, in_axes=[0 if j == i else None for j in range(len(letters))])
    x = of(*(places[letter] for letter in letters))
    if not letters:
        return x
    return x.reshape([places[y].shape[0] if y in letters else 1 for y in LETTERS])
