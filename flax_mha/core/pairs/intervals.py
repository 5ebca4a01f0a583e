"""Interval arithmetic: what an expression can give, told by the least and greatest of its inputs.

    low <= expression(x, ...) <= high       for all x from their low to their high

Of booleans: low = is always True, high = may be True. The bounds may be wide, never wrong: where
integers might wrap around, or floats become NaN, nothing is known. What has no rule is named by
`without_rule`, before anything is computed.

Reference: Moore, Kearfott and Cloud, "Introduction to Interval Analysis", SIAM 2009.
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from flax_mha.core.pairs.expression import Constant, Expression, Step, read
from flax_mha.core.typing import Array


class Interval(NamedTuple):
    """Bounds, both included: arrays, or numbers."""

    low: Any
    high: Any


def without_rule(expression: Expression, points: tuple[int, ...] = ()) -> str | None:
    """An operation of the expression that has no rule, in words; None where all have one.

    `points` are inputs that have one value.
    """
    for step in expression.steps:
        name = step.primitive.name
        if any(expression.shape(x) for x in (*step.variables, *step.outputs)):
            return f"{name} of an array"
        if name not in RULES:
            return name
        divisor = step.inputs[-1]
        is_known = isinstance(divisor, Constant) or divisor in points
        if name in BY_CONSTANT and not is_known:
            return f"{name} by what is no constant"
    return None


def bounds(expression: Expression, *inputs: Interval) -> Interval:
    """The bounds of the result, by bounds of the inputs that broadcast."""
    env = dict(zip(expression.inputs, inputs))
    for step in expression.steps:
        given = (_interval(env, x) for x in step.inputs)
        env[step.outputs[0]] = RULES[step.primitive.name](step, *given)
    return _interval(env, expression.output)


def _interval(env: dict[int, Interval], atom: Any) -> Interval:
    return Interval(*[read({}, atom)] * 2) if isinstance(atom, Constant) else env[atom]


Rule = Callable[..., Interval]


# --- numbers ------------------------------------------------------------------------------------


def _monotone(step: Step, *given: Interval) -> Interval:
    """Of a function that never falls in any argument, nor leaves its type."""
    lows, highs = zip(*given)
    return _number(Interval(_run(step, *lows), _run(step, *highs)))


def _corners(step: Step, *given: Interval) -> Interval:
    """Of a function whose least and greatest values lie at the ends of its arguments."""
    ends = list(itertools.product(*given))
    values = _hull([_run(step, *x) for x in ends])
    if jnp.issubdtype(values.low.dtype, jnp.floating):
        return _number(values)
    floats = _hull([_run(step, *(end.astype("float32") for end in x)) for x in ends])
    return _unless_wrapped(values, floats)


def _run(step: Step, *values: Array) -> Array:
    (result,) = step.run(*jnp.broadcast_arrays(*values))
    return result


def _hull(values: list[Array]) -> Interval:
    return Interval(functools.reduce(jnp.minimum, values), functools.reduce(jnp.maximum, values))


def _number(found: Interval) -> Interval:
    """Of floats a little more, for they are rounded elsewhere in another order; all, for NaN."""
    low, high = found
    if not jnp.issubdtype(low.dtype, jnp.floating):
        return found
    broken = jnp.isnan(low) | jnp.isnan(high)
    little = 8 * float(jnp.finfo(low.dtype).eps)
    low, high = low - little * abs(low), high + little * abs(high)
    return Interval(jnp.where(broken, -jnp.inf, low), jnp.where(broken, jnp.inf, high))


def _unless_wrapped(found: Interval, floats: Interval) -> Interval:
    """Everything that the type holds, where the same in floats comes near its ends."""
    info = jnp.iinfo(found.low.dtype)
    safe = (floats.low > 0.99 * info.min) & (floats.high < 0.99 * info.max)
    if info.min == 0:  # below 0 it wraps at once, and floats do not tell 0 from -1 of large numbers
        safe = jnp.zeros_like(safe)
    return _where(safe, found)


def _where(known: Array, found: Interval) -> Interval:
    """The bounds where they are known, else everything that their type holds."""
    return Interval(*(jnp.where(known, x, end) for x, end in zip(found, _everything(found))))


def _absolute(step: Step, a: Interval) -> Interval:
    magnitude = jnp.maximum(abs(a.low), abs(a.high))
    inside = (a.low <= 0) & (a.high >= 0)
    low = jnp.where(inside, jnp.zeros_like(magnitude), jnp.minimum(abs(a.low), abs(a.high)))
    if jnp.issubdtype(a.low.dtype, jnp.integer):  # |least| is no number of the type
        floats = Interval(*(x.astype("float32") for x in (a.low, a.high)))
        return _unless_wrapped(Interval(low, magnitude), floats)
    return _number(Interval(low, magnitude))


def _power(step: Step, a: Interval) -> Interval:
    exponent = step.params["y"]
    if exponent < 0:
        return _everything(a)
    return _corners(step, a if exponent % 2 else _absolute(step, a))


def _everything(a: Interval) -> Interval:
    """Nothing is known of the result, which has the type of `a`."""
    dtype = a.low.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return Interval(jnp.full_like(a.low, -jnp.inf), jnp.full_like(a.high, jnp.inf))
    if dtype == jnp.bool_:
        return Interval(jnp.zeros_like(a.low), jnp.ones_like(a.high))
    info = jnp.iinfo(dtype)
    ends = (jnp.asarray(end, dtype) for end in (info.min, info.max))
    return Interval(*(jnp.broadcast_to(end, a.low.shape) for end in ends))


def _divided(step: Step, a: Interval, b: Interval) -> Interval:
    """By a constant: towards 0 of integers, which never wraps but for a divisor of 0 or -1."""
    known = _number(_hull([_run(step, x, b.low) for x in a]))
    return _where((b.low != 0) & (b.low != -1), known)


def _remainder(step: Step, a: Interval, b: Interval) -> Interval:
    """By a constant, with the sign of `a`: exact where `a` stays between two multiples."""
    if not jnp.issubdtype(a.low.dtype, jnp.integer):
        return _everything(a)
    one, zero = jnp.ones_like(b.low), jnp.zeros_like(b.low)
    usable = b.low > 0
    divisor = jnp.where(usable, b.low, one)
    of = lambda x: _run(step, x, divisor)  # noqa: E731
    times = lambda x: lax.div(*jnp.broadcast_arrays(x, divisor))  # noqa: E731
    same = (times(a.low) == times(a.high)) & ((a.low < 0) == (a.high < 0))
    low = jnp.where(same, of(a.low), jnp.where(a.low < 0, 1 - divisor, zero))
    high = jnp.where(same, of(a.high), jnp.where(a.high > 0, divisor - one, zero))
    return _where(usable, Interval(low, high))


def _converted(step: Step, a: Interval) -> Interval:
    dtype = step.params["new_dtype"]
    if dtype == jnp.dtype(bool):  # of a number: whether it is not 0
        some = (a.low != 0) | (a.high != 0)
        return Interval((a.low > 0) | (a.high < 0), some)
    found = Interval(a.low.astype(dtype), a.high.astype(dtype))
    if a.low.dtype == bool or jnp.issubdtype(dtype, jnp.floating):
        return _number(found)
    info = jnp.iinfo(dtype)
    fits = (a.low.astype("float32") >= 0.99 * info.min) & (
        a.high.astype("float32") <= 0.99 * info.max
    )
    if info.min == 0:
        fits &= a.low >= 0
    return _where(fits, found)


# --- booleans -----------------------------------------------------------------------------------


def _compared(of: Callable[..., Array], low: Any, high: Any) -> Rule:
    """`low` and `high` say which ends tell that it always holds, and that it may.

    Of floats nothing is sure where an end is infinite: there a NaN may hide.
    """

    def rule(step: Step, a: Interval, b: Interval) -> Interval:
        always, perhaps = (of(a[i], b[j]) for i, j in (low, high))
        if jnp.issubdtype(a.low.dtype, jnp.floating):
            sure = functools.reduce(operator.and_, map(jnp.isfinite, (*a, *b)))
            return Interval(always & sure, perhaps | ~sure)
        return Interval(always, perhaps)

    return rule


def _equal(step: Step, a: Interval, b: Interval) -> Interval:
    if a.low.dtype == bool:
        return _not(step, _xor(step, a, b))
    below, above = RULES["le"](step, a, b), RULES["ge"](step, a, b)
    return Interval(below.low & above.low, below.high & above.high)


def _not(step: Step, a: Interval) -> Interval:
    return Interval(~a.high, ~a.low) if a.low.dtype == bool else _everything(a)


def _logical(of: Callable[..., Array]) -> Rule:
    def rule(step: Step, a: Interval, b: Interval) -> Interval:
        if a.low.dtype != bool:
            return _everything(_hull([_run(step, a.low, b.low)]))
        return Interval(of(a.low, b.low), of(a.high, b.high))

    return rule


def _xor(step: Step, a: Interval, b: Interval) -> Interval:
    if a.low.dtype != bool:
        return _everything(_hull([_run(step, a.low, b.low)]))
    known = (a.low == a.high) & (b.low == b.high)
    differ = a.low != b.low
    return Interval(known & differ, ~known | differ)


def _selected(step: Step, which: Interval, *cases: Interval) -> Interval:
    """Of two cases by a boolean; of any number of them all."""
    if which.low.dtype != bool or len(cases) != 2:
        return _union(cases)
    either = _union(cases)
    of_true = lambda i: jnp.where(which.low, cases[1][i], either[i])  # noqa: E731
    return Interval(*(jnp.where(which.high, of_true(i), cases[0][i]) for i in range(2)))


def _union(cases: Any) -> Interval:
    lows, highs = zip(*cases)
    least, most = (operator.and_, operator.or_) if lows[0].dtype == bool else MINMAX
    return Interval(functools.reduce(least, lows), functools.reduce(most, highs))


def _same(step: Step, a: Interval) -> Interval:
    return a


LOW, HIGH = 0, 1
MINMAX = (jnp.minimum, jnp.maximum)
BY_CONSTANT = ("div", "rem")
RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "mul", "neg"), _corners),
    **dict.fromkeys(("max", "min", "clamp", "sign", "floor", "ceil", "round", "sqrt"), _monotone),
    "square": lambda step, a: _corners(step, _absolute(step, a)),
    "integer_pow": _power,
    "abs": _absolute,
    "div": _divided,
    "rem": _remainder,
    "convert_element_type": _converted,
    "lt": _compared(operator.lt, (HIGH, LOW), (LOW, HIGH)),
    "le": _compared(operator.le, (HIGH, LOW), (LOW, HIGH)),
    "gt": _compared(operator.gt, (LOW, HIGH), (HIGH, LOW)),
    "ge": _compared(operator.ge, (LOW, HIGH), (HIGH, LOW)),
    "eq": _equal,
    "ne": lambda step, a, b: _not(step, _equal(step, a, b)),
    "and": _logical(operator.and_),
    "or": _logical(operator.or_),
    "xor": _xor,
    "not": _not,
    "select_n": _selected,
    "copy": _same,
    "stop_gradient": _same,
    "optimization_barrier": _same,
}
