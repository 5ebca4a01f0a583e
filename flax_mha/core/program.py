"""A program: a computation that JAX sees as one operation, with derivatives of its own.

JAX would differentiate a loop over tiles by keeping what each tile computed, T x S numbers in all.
A program says instead, as programs again and so to any order, what its transpose and its tangents
are; each of them visits the tiles anew.

A program also learns, when it is lowered, for which platform and for how many devices: a machine
that traces for another one cannot tell, nor what XLA will spread over a mesh.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flax_mha.core.platform import Place
from flax_mha.core.typing import Array


class Program:
    """outputs = run(known, linear), linear in `linear`; static and hashable.

    What it does not define, it needs not: a program without linear arguments has no transpose, and
    what calls it a rule of its own for its tangents.
    """

    @property
    def count(self) -> int:
        """How many outputs there are."""
        raise NotImplementedError

    def run(self, known: list[Array], linear: list[Array], place: Place) -> list[Array]:
        """The outputs, computed as suits the place that it is lowered for."""
        raise NotImplementedError

    def transpose(self) -> "Program":
        """(known, cotangents of the outputs) -> cotangents of `linear`."""
        raise NotImplementedError

    def tangent(self, chosen: tuple[int, ...]) -> "Program":
        """(known + linear, tangents of the chosen known arrays) -> tangents of the outputs."""
        raise NotImplementedError


def apply(program: Program, known: Any, linear: Any = ()) -> list[Array]:
    """Runs a program on lists of arrays, as one operation of JAX."""
    return _program_p.bind(*known, *linear, program=program, split=len(known))


@dataclasses.dataclass(frozen=True)
class Mapped(Program):
    """A program over one more axis, in front: of arrays that have it, `True` in known or linear.

    An output that is not mapped is the sum over the axis: so the transpose of an argument that all
    examples share is again one of these.
    """

    program: Program
    known: tuple[bool, ...]
    linear: tuple[bool, ...]
    outputs: tuple[bool, ...]

    @property
    def count(self) -> int:
        return len(self.outputs)

    def run(self, known: list[Array], linear: list[Array], place: Place) -> list[Array]:
        axes = [[0 if mapped else None for mapped in group] for group in (self.known, self.linear)]
        outputs = jax.vmap(functools.partial(self.program.run, place=place), in_axes=axes)(
            known, linear
        )
        return [x if mapped else x.sum(0) for x, mapped in zip(outputs, self.outputs)]

    def transpose(self) -> "Mapped":
        return Mapped(self.program.transpose(), self.known, self.outputs, self.linear)

    def tangent(self, chosen: tuple[int, ...]) -> "Mapped":
        linear = tuple(self.known[i] for i in chosen)
        known = self.known + self.linear
        return Mapped(self.program.tangent(chosen), known, linear, self.outputs)


# --- the rules that make an operation of it -----------------------------------------------------


@functools.partial(jax.jit, static_argnames=("program", "split", "place"), inline=True)
def _run(*arrays: Array, program: Program, split: int, place: Place) -> list[Array]:
    return program.run(list(arrays[:split]), list(arrays[split:]), place)


@functools.partial(jax.jit, static_argnames=("program", "split"))
def _compiled(*arrays: Array, **call: Any) -> list[Array]:
    return _program_p.bind(*arrays, **call)


def _eager(*arrays: Array, **call: Any) -> list[Array]:
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return _run(*arrays, **call, place=Place.here())
    return _compiled(*arrays, **call)


def _types(*types: Any, **call: Any) -> Any:
    """The outputs' types; those of one place are those of every other."""
    run = functools.partial(_run, **call, place=Place.anywhere())
    return jax.make_jaxpr(run)(*types).out_avals


def _lowered(context: Any, *arrays: Any, platform: str, **call: Any) -> Any:
    run = functools.partial(_run, place=Place.lowered_for(context, platform))
    return mlir.lower_fun(run, multiple_results=True)(context, *arrays, **call)


def _jvp(primals: Any, tangents: Any, *, program: Program, split: int) -> Any:
    outputs = _program_p.bind(*primals, program=program, split=split)
    moves = [not _is_zero(tangent) for tangent in tangents]
    terms = []
    if any(moves[split:]):
        linear = [ad.instantiate_zeros(tangent) for tangent in tangents[split:]]
        terms.append(apply(program, primals[:split], linear))
    chosen = tuple(i for i in range(split) if moves[i])
    if chosen:
        terms.append(apply(program.tangent(chosen), primals, [tangents[i] for i in chosen]))
    return outputs, functools.reduce(lambda a, b: list(map(jnp.add, a, b)), terms)


def _is_zero(tangent: Any) -> bool:
    return type(tangent) is ad.Zero or tangent.dtype == jax.dtypes.float0


def _transpose(cotangents: Any, *arrays: Any, program: Program, split: int) -> Any:
    full = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    results = apply(program.transpose(), arrays[:split], full)
    unknown = [ad.is_undefined_primal(x) for x in arrays[split:]]
    return [None] * split + [x if asked else None for x, asked in zip(results, unknown)]


def _batch(arrays: Any, axes: Any, *, program: Program, split: int) -> Any:
    front = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(arrays, axes)]
    has_axis = tuple(axis is not None for axis in axes)
    mapped = Mapped(program, has_axis[:split], has_axis[split:], (True,) * program.count)
    outputs = apply(mapped, front[:split], front[split:])
    return outputs, [0] * len(outputs)


_program_p = Primitive("flax_mha_program")
_program_p.multiple_results = True
_program_p.def_impl(_eager)
_program_p.def_abstract_eval(_types)
ad.primitive_jvps[_program_p] = _jvp
ad.primitive_transposes[_program_p] = _transpose
batching.primitive_batchers[_program_p] = _batch
# Under JAX's names of platforms; what has none of these is taken for a GPU.
mlir.register_lowering(_program_p, functools.partial(_lowered, platform="gpu"))
for _platform in ("cpu", "tpu"):
    _rule = functools.partial(_lowered, platform=_platform)
    mlir.register_lowering(_program_p, _rule, platform=_platform)
