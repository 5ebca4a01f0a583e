"""What a function of pairs does, as steps that a kernel can take: elementwise, of 32 bits.

The function is traced over arrays, with its derivatives, and its steps are run one by one: what
Mosaic cannot lower, or only where it sees the chip, is written in steps that it can. What is left
is refused by name, before anything is lowered. `SERVED` was compiled for v5e, step by step
(`tests/attention/test_pallas_tpu_ahead_of_time.py`).
"""

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_mha.core.pairs.jaxprs import INLINED, bind, opened
from flax_mha.core.typing import Array

CALLS = (*INLINED, "custom_jvp_call", "custom_vjp_call")
NAMES = """
    abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp clz convert_element_type
    copy cos div eq erf_inv exp exp2 floor ge gt integer_pow is_finite le log log1p logistic lt max
    min mul ne neg not or population_count pow rem reshape round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sin sqrt square squeeze sub tan tanh xor
"""
SERVED = frozenset(NAMES.split())
LEAST = np.int32(np.iinfo("int32").min)
DTYPES = frozenset(("bool", "int32", "uint32", "float32", "bfloat16"))


def unserved(function: Callable[..., Any], *types: Any) -> str | None:
    """The step of a function of arrays of these types that no kernel takes, in words."""
    jaxpr = jax.make_jaxpr(function)(*types)
    variables = [*jaxpr.jaxpr.invars]
    for eqn in _steps(jaxpr.jaxpr):
        name = eqn.primitive.name
        if name not in SERVED and name not in REPLACED:
            return f"`{name}`"
        if name == "convert_element_type" and _is_between_unsigned_and_float(eqn):
            return "between uint32 and floats"
        variables += eqn.outvars
    wrong = [str(x.aval.dtype) for x in variables if str(x.aval.dtype) not in DTYPES]
    return f"numbers of {wrong[0]}" if wrong else None


def stepwise(function: Callable[..., Any], *arrays: Array) -> list[Array]:
    """The results of a function of arrays, by steps that a kernel takes."""
    jaxpr = jax.make_jaxpr(function)(*arrays)
    return _run(jaxpr.jaxpr, jaxpr.consts, arrays)


def _steps(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        inner = _inner(eqn)
        if inner is None:
            yield eqn
        else:
            yield from _steps(inner[0])


def _is_between_unsigned_and_float(eqn: Any) -> bool:
    """Which older versions do not lower."""
    dtypes = (eqn.invars[0].aval.dtype, eqn.params["new_dtype"])
    return jnp.uint32 in dtypes and any(jnp.issubdtype(x, jnp.floating) for x in dtypes)


def _inner(eqn: Any) -> tuple[Any, Any] | None:
    """The jaxpr that an equation calls, and its constants."""
    if eqn.primitive.name not in CALLS:
        return None
    called = next(eqn.params[x] for x in ("jaxpr", "call_jaxpr", "fun_jaxpr") if x in eqn.params)
    return opened(called)


def _run(jaxpr: Any, consts: Any, arrays: Any) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arrays]))
    read = lambda x: x.val if hasattr(x, "val") else env[x]  # noqa: E731
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _step(eqn, [read(x) for x in eqn.invars])))
    return [read(x) for x in jaxpr.outvars]


def _step(eqn: Any, values: list[Any]) -> list[Any]:
    inner = _inner(eqn)
    if inner is not None:
        return _run(*inner, values)
    rule = REPLACED.get(eqn.primitive.name)
    replaced = None if rule is None else rule(*values)
    if replaced is not None:
        return [replaced]
    return bind(eqn.primitive, values, eqn.params)


# --- what Mosaic lowers otherwise, if at all; None = as it is -------------------------------------


def _sign(x: Array) -> Array:
    """Mosaic asks for the chip, which a program for another machine does not have."""
    if x.dtype == jnp.uint32:
        return (x > 0).astype(x.dtype)
    below, same, above = (lax.full_like(x, i) for i in (-1, 0, 1))
    sign = jnp.where(x > 0, above, jnp.where(x < 0, below, same))
    return sign if x.dtype == jnp.int32 else jnp.where(x == x, sign, x)  # NaN as it is


def _select(which: Array, *cases: Array) -> Array | None:
    """Of booleans by logic, of more than two cases one after the other."""
    if len(cases) > 2:
        return _chosen(which, cases)
    if which.dtype != bool:
        which = which != 0
    first, second = cases
    if first.dtype == bool:
        return (which & second) | (~which & first)
    return lax.select_n(which, first, second)


def _chosen(which: Array, cases: Any) -> Array:
    result = cases[0]
    for i, case in enumerate(cases[1:], 1):
        chosen = _select(which >= i, result, case)
        assert chosen is not None
        result = chosen
    return result


def _extreme(of: Callable[..., Any], of_booleans: Callable[..., Any]) -> Any:
    """`max` or `min`; of unsigned numbers by signed ones in the same order."""

    def rule(x: Any, y: Any) -> Array | None:
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jnp.bool_):
            return of_booleans(x, y)
        return _turned(of(_turned(x), _turned(y))) if dtype == jnp.uint32 else None

    return rule


def _compared(of: Callable[..., Any]) -> Any:
    """Likewise: of a choice between two unsigned numbers by their order Mosaic makes a `max`."""

    def rule(x: Any, y: Any) -> Array | None:
        is_unsigned = jnp.result_type(x) == jnp.uint32
        return of(_turned(x), _turned(y)) if is_unsigned else None

    return rule


def _turned(x: Any) -> Any:
    """uint32 as int32 in the same order, and back."""
    if not isinstance(x, jax.core.Tracer):  # a constant, which Mosaic does not take apart
        x = np.asarray(x)
        return (x.view("int32") ^ LEAST)[()]
    if x.dtype == jnp.int32:
        return lax.bitcast_convert_type(x ^ LEAST, jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.int32) ^ LEAST


def _clamp(low: Any, x: Any, high: Any) -> Array | None:
    if x.dtype != jnp.uint32:
        return None
    result: Array = REPLACED["min"](REPLACED["max"](x, low), high)
    return result


def _widened(of: Callable[..., Any]) -> Any:
    """Of bfloat16 in float32."""

    def rule(*values: Any) -> Array | None:
        if jnp.result_type(values[0]) != jnp.bfloat16:
            return None
        result = of(*(jnp.asarray(x, "float32") for x in values))
        return result if result.dtype == bool else result.astype("bfloat16")

    return rule


def _log2(x: Array) -> Array:
    return jnp.log(x) * np.array(1 / math.log(2), x.dtype)


def _one_minus_square(x: Array) -> Array:
    return 1 - x * x


def _same(x: Array) -> Array:
    return x


REPLACED: dict[str, Any] = {
    "sign": _sign,
    "select_n": _select,
    "max": _extreme(lax.max, operator.or_),
    "min": _extreme(lax.min, operator.and_),
    "lt": _compared(lax.lt),
    "le": _compared(lax.le),
    "gt": _compared(lax.gt),
    "ge": _compared(lax.ge),
    "clamp": _clamp,
    "log2": _log2,
    "is_finite": _widened(lax.is_finite),
    "logistic": _widened(lax.logistic),
    "erf_inv": _widened(lax.erf_inv),
    "rem": _widened(lax.rem),
    "one_minus_square": _one_minus_square,
    "copy": _same,
    "device_put": _same,  # of constants, before JAX 0.8
    **dict.fromkeys(("pcast", "pvary", "reshard", "sharding_constraint"), _same),  # of a mesh
    "stop_gradient": _same,
    "optimization_barrier": _same,
}
