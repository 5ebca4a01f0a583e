"""A function of numbers as what JAX traces of it: steps that can be taken apart, and compared.

Two expressions are equal where they do the same, whatever objects they were made of: so one that is
made anew with other arrays, which are its data, is the same program. A step with a derivative of
its own (`jax.custom_jvp`, as in `jax.nn.relu`) is equal to itself alone.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core.errors import fail
from flax_mha.core.pairs.jaxprs import INLINED, bind, opened
from flax_mha.core.typing import Array, Shape
from flax_mha.core.varying import varying_alike, varying_axes

# What says where a number is, or that it varies: of where it was traced, not of where it is run.
CASTS = ("pvary", "reshard")
SIZE = "dim_as_value"  # that of an array whose size is a symbol: a number of the trace around it


@dataclasses.dataclass(frozen=True)
class Constant:
    """A number that stands in the program."""

    value: Any = dataclasses.field(compare=False)
    bits: tuple[str, bytes]  # by these it is compared: NaN equals itself

    @classmethod
    def of(cls, value: Any, dtype: Any) -> "Constant":
        array = np.asarray(value, dtype)
        return cls(array, (str(array.dtype), array.tobytes()))


Atom = int | Constant  # a variable by its number, or a constant
NO_MESH = jax.sharding.AbstractMesh((), ())


@dataclasses.dataclass(frozen=True)
class Step:
    """outputs = primitive(inputs)."""

    primitive: Any
    params: Any = dataclasses.field(compare=False)
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    kept: Any  # the parameters in a form that is compared

    @property
    def variables(self) -> list[int]:
        return [x for x in self.inputs if isinstance(x, int)]

    @property
    def has_insides(self) -> bool:
        """Whether it is a call of what are no steps: a loop, or a derivative of its own."""
        return any(hasattr(x, "eqns") or hasattr(x, "jaxpr") for x in self.params.values())

    def run(self, *values: Any) -> list[Any]:
        if self.has_insides and any(map(varying_axes, values)):
            name = self.primitive.name
            rule = f"In a `jax.shard_map` a function of pairs must do without {name}."
            given = "a loop, or a derivative of its own, as `jax.nn.relu` has"
            remedy = "Write `jnp.maximum(x, 0)`; or `jax.shard_map(..., check_vma=False)`."
            fail(NotImplementedError, rule, given, remedy)
        # JAX's own functions do so; in a `jax.shard_map` a number that stands here varies nowhere.
        return bind(self.primitive, varying_alike(values), self.params)


@dataclasses.dataclass(frozen=True)
class Expression:
    """output = steps(inputs); the types of its variables are (shape, dtype)."""

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    output: Atom
    types: tuple[tuple[Shape, str], ...]

    def __call__(self, *values: Any) -> Any:
        env = dict(zip(self.inputs, values))
        for step in self.steps:
            env.update(zip(step.outputs, step.run(*(read(env, x) for x in step.inputs))))
        return read(env, self.output)

    @property
    def dtype(self) -> str:
        """The type of what it gives."""
        return self.output.bits[0] if isinstance(self.output, Constant) else self.type(self.output)

    def type(self, variable: int) -> str:
        return self.types[variable][1]

    def shape(self, variable: int) -> Shape:
        return self.types[variable][0]

    @property
    def has_calls(self) -> bool:
        """Whether a step has insides that are no steps."""
        return any(step.has_insides for step in self.steps)

    def reach(self, output: Atom) -> tuple[Step, ...]:
        """The steps that an output needs."""
        needed, steps = {output}, []
        for step in reversed(self.steps):
            if needed & set(step.outputs):
                needed |= set(step.variables)
                steps.append(step)
        return tuple(reversed(steps))

    def like(self) -> "Expression":
        """The same, but that derivatives of its own are taken for equal."""
        blind = lambda kept: tuple((k, None if k in OWN else v) for k, v in kept)  # noqa: E731
        steps = (dataclasses.replace(step, kept=blind(step.kept)) for step in self.steps)
        return dataclasses.replace(self, steps=tuple(steps))


OWN = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees")  # rules of derivatives


def read(env: dict[int, Any], atom: Atom) -> Any:
    return jnp.asarray(atom.value) if isinstance(atom, Constant) else env[atom]


class Traced(NamedTuple):
    """A function as an expression of [*its arguments, *the arrays that it closes over]."""

    expression: Expression
    arrays: list[Array]
    result: Any  # the tree of its results' types
    effects: Any


def traced(function: Callable[..., Any], *types: Any) -> Traced:
    """What the function does with arguments of these types, down to its first result."""
    with _on_no_mesh():
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*types)
    flat = _Flat()
    inner, consts = opened(jaxpr)
    inputs = [flat.variable(x.aval) for x in inner.invars]
    outputs = flat.inline(inner, consts, list(inputs))
    first = outputs[0] if outputs else Constant.of(0, "int32")
    whole = Expression((), tuple(flat.steps), first, tuple(flat.types))
    steps = whole.reach(first)
    used = {x for step in steps for x in step.variables} | {first}
    arrays = {x: array for x, array in flat.arrays.items() if x in used}
    expression = dataclasses.replace(whole, inputs=(*inputs, *arrays), steps=steps)
    return Traced(numbered(expression), list(arrays.values()), shape, inner.effects)


def numbered(expression: Expression) -> Expression:
    """The same with its variables counted in the order in which they appear."""
    order = list(expression.inputs) + [x for step in expression.steps for x in step.outputs]
    number = {x: i for i, x in enumerate(order)}
    atom = lambda x: number[x] if isinstance(x, int) else x  # noqa: E731
    steps = (
        dataclasses.replace(
            step,
            inputs=tuple(map(atom, step.inputs)),
            outputs=tuple(number[x] for x in step.outputs),
        )
        for step in expression.steps
    )
    return Expression(
        tuple(map(atom, expression.inputs)),
        tuple(steps),
        atom(expression.output),
        tuple(expression.types[x] for x in order),
    )


def _on_no_mesh() -> Any:
    """Insides of loops would know the mesh around the trace, and be refused in a cut of it.

    In a `jax.shard_map` there are arrays that vary, which need its mesh.
    """
    kinds = jax.sharding.get_abstract_mesh().axis_types or ()
    manual = jax.sharding.AxisType.Manual in kinds
    return contextlib.nullcontext() if manual else jax.sharding.use_abstract_mesh(NO_MESH)


class _Flat:
    """Steps without calls of functions, in a list that grows."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.types: list[tuple[Shape, str]] = []
        self.arrays: dict[int, Array] = {}

    def variable(self, aval: Any) -> int:
        self.types.append((tuple(aval.shape), str(aval.dtype)))
        return len(self.types) - 1

    def array(self, value: Any, aval: Any) -> int:
        """The variable of an array that is closed over; one for each array."""
        for variable, known in self.arrays.items():
            if known is value:
                return variable
        variable = self.variable(aval)
        self.arrays[variable] = value if isinstance(value, jax.Array) else jnp.asarray(value)
        return variable

    def inline(self, jaxpr: Any, consts: Any, inputs: list[Atom]) -> list[Atom]:
        env: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs))
        env |= {x: self.array(value, x.aval) for x, value in zip(jaxpr.constvars, consts)}
        for eqn in jaxpr.eqns:
            atoms = [self.atom(env, x) for x in eqn.invars]
            name = eqn.primitive.name
            if name in INLINED:
                atoms = self.inline(*opened(eqn.params.get("jaxpr")), atoms)
            elif name == "cond":
                atoms = self.select(eqn.params["branches"], atoms, [x.aval for x in eqn.outvars])
            if name in (*INLINED, *CASTS, "cond"):
                env.update(zip(eqn.outvars, atoms))
                continue
            step = Step(eqn.primitive, eqn.params, tuple(atoms), (), frozen(eqn.params))
            env.update(zip(eqn.outvars, self.results(step, [x.aval for x in eqn.outvars])))
        return [self.atom(env, x) for x in jaxpr.outvars]

    def select(self, branches: Any, atoms: list[Atom], avals: list[Any]) -> list[Atom]:
        """All branches, and of their results those of one: as it is of many numbers at once."""
        which, *inputs = atoms
        found = [self.inline(*opened(branch), inputs) for branch in branches]
        steps = (Step(jax.lax.select_n_p, {}, (which, *cases), (), ()) for cases in zip(*found))
        return [x for step, aval in zip(steps, avals) for x in self.results(step, [aval])]

    def results(self, step: Step, avals: list[Any]) -> tuple[Atom, ...]:
        """Variables; of constants alone constants, so that a divisor is known to be one."""
        if step.primitive.name == SIZE:
            return tuple(map(self.array, step.run(), avals))
        if not step.variables and not any(aval.shape for aval in avals):
            with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(NO_MESH):
                values = step.run(*(read({}, x) for x in step.inputs))
            return tuple(Constant.of(x, aval.dtype) for x, aval in zip(values, avals))
        outputs = tuple(self.variable(aval) for aval in avals)
        self.steps.append(dataclasses.replace(step, outputs=outputs))
        return outputs

    def atom(self, env: dict[Any, Atom], x: Any) -> Atom:
        if not hasattr(x, "val"):
            return env[x]
        if np.ndim(x.val):
            return self.array(x.val, x.aval)
        return Constant.of(x.val, x.aval.dtype)


def frozen(params: dict[str, Any]) -> Any:
    """Parameters as what is compared and hashed: jaxprs by their steps, others by themselves."""
    return tuple((name, _frozen(value)) for name, value in sorted(params.items()))


def _frozen(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_frozen, value))
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        flat, (inner, consts) = _Flat(), opened(value)
        inputs = [flat.variable(x.aval) for x in inner.invars]
        outputs = flat.inline(inner, consts, list(inputs))
        arrays = tuple(id(array) for array in flat.arrays.values())
        return tuple(flat.steps), tuple(outputs), tuple(flat.types), arrays
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


def mapped(function: Callable[..., Any], *values: Any) -> Any:
    """`function` of numbers at every place of arrays of one rank, any axis of which may be 1.

    A value of another rank, marked by `Whole`, is handed over as it is.
    """
    arrays = [x for x in values if not isinstance(x, Whole)]
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    full = [x.value if isinstance(x, Whole) else jnp.broadcast_to(x, shape) for x in values]
    axes = [None if isinstance(x, Whole) else 0 for x in values]
    for _ in shape:
        function = jax.vmap(function, in_axes=axes)
    return function(*full)


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """An array that `mapped` does not take apart."""

    value: Array


def scalars(*dtypes: Any) -> Iterator[jax.ShapeDtypeStruct]:
    """The types of numbers."""
    return (jax.ShapeDtypeStruct((), dtype) for dtype in dtypes)
