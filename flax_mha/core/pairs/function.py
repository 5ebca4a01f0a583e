"""What a caller says of a pair of query and key: a function of numbers, with its arrays as data."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core import checks
from flax_mha.core.pairs.expression import Expression, Traced, scalars, traced
from flax_mha.core.typing import Array, DType

INDICES = ("int32",) * 4  # b, n, t, s
# What JAX raises where Python asks for a number that is traced.
UNKNOWN = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PairFunction:
    """A function of the indices (b, n, t, s), perhaps of a logit before them; a pytree.

    It is traced once, of numbers: an array that it closes over is data, what else it reads stands
    in the program.

    Attributes:
        arrays: what the function closes over.
        expression: what it does with them; static.
    """

    arrays: tuple[Array, ...]
    expression: Expression = dataclasses.field(metadata={"static": True})

    def __call__(self, *numbers: Any) -> Any:
        """Its value for one pair, of numbers."""
        return self.expression(*numbers, *self.arrays)

    @property
    def indices(self) -> int:
        """How many numbers it takes."""
        return len(self.expression.inputs) - len(self.arrays)

    def reads(self, letters: str) -> list[str]:
        """Those of the letters b, n, t and s that it looks at."""
        expression, count = self.expression, self.indices
        index = dict(zip("bnts", expression.inputs[count - 4 : count]))
        read = {x for step in expression.steps for x in step.variables} | {expression.output}
        return [letter for letter in letters if index[letter] in read]


class Kind(NamedTuple):
    """What a function is called, its form, what it must give, and what else might be meant."""

    name: str
    form: str
    gives: str
    instead: str


MASK = Kind(
    "f",
    "f(b, n, t, s) -> bool",
    "a boolean, True = may attend",
    "What adds to the logits is `bias=` or `score=`; booleans of all pairs are `Mask.dense`.",
)
SCORE = Kind(
    "score",
    "score(logits, b, n, t, s) -> logits",
    "a logit, a float",
    "What forbids a pair is a mask, `Mask.function`; an array that is added is `bias=`.",
)


def mask_function(function: Any) -> PairFunction:
    """`f(b, n, t, s) -> bool`, True = may attend.

    Raises:
        TypeError: what is no function of four numbers, gives no boolean, or asks Python about one.
        ValueError: another shape than that of a number, or another function each time.
    """
    pair = _pair_function(MASK, function, INDICES)
    if pair.expression.dtype != "bool":
        _fail_result(MASK, pair.expression.dtype)
    return pair


def score_function(function: Any, dtype: DType) -> PairFunction:
    """`score(logits, b, n, t, s) -> logits`, of one logit of this dtype.

    Raises:
        TypeError: what is no function of five numbers, gives no logit, or asks Python about one.
        ValueError: another shape than that of a number, or another function each time.
    """
    own = str(jnp.dtype(dtype))
    pair = _pair_function(SCORE, function, (own, *INDICES))
    if not jnp.issubdtype(pair.expression.dtype, jnp.floating):
        _fail_result(SCORE, pair.expression.dtype)
    return pair if pair.expression.dtype == own else _cast(function, dtype)


def _cast(score: Callable[..., Any], dtype: DType) -> PairFunction:
    """The score of another float, of a table in float64 or a cast of its own, as a logit."""
    cast = lambda logits, *indices: jnp.asarray(score(logits, *indices)).astype(dtype)  # noqa: E731
    return score_function(cast, dtype)


def _fail_result(kind: Kind, received: str) -> NoReturn:
    rule = f"`{kind.name}` must give {kind.gives}: {kind.form}."
    checks.fail(TypeError, rule, f"a result of {received}", kind.instead)


def _pair_function(kind: Kind, function: Any, dtypes: tuple[str, ...]) -> PairFunction:
    _check_callable(kind, function, len(dtypes))
    found, again = (_traced(kind, function, dtypes) for _ in range(2))
    if found.result.shape != ():
        rule = f"`{kind.name}` sees one pair of query and key, and must give one number for it."
        remedy = f"It is called with numbers: {kind.form}. It cannot sum over keys or heads."
        checks.fail(ValueError, rule, f"shape {found.result.shape}", remedy)
    if found.expression.like() != again.expression.like():
        rule = f"`{kind.name}` must be the same function each time, for it is traced once."
        remedy = "Let it close over arrays, and make random numbers outside, with a key."
        checks.fail(ValueError, rule, "another program when it was called twice", remedy)
    if found.effects:
        rule = f"`{kind.name}` must only compute: what it does besides would be left out."
        checks.fail(ValueError, rule, f"effects {sorted(map(str, found.effects))}")
    return PairFunction(tuple(found.arrays), found.expression)


def _check_callable(kind: Kind, function: Any, count: int) -> None:
    if not callable(function):
        rule = f"`{kind.name}` must be a function, {kind.form}."
        evidence = f"{kind.name} of type {type(function).__name__}"
        checks.fail(TypeError, rule, evidence, kind.instead)
    signature = inspect.signature(function)
    try:
        signature.bind(*range(count))
    except TypeError:
        rule = f"`{kind.name}` must take {count} numbers by position: {kind.form}."
        evidence = f"a function of {len(signature.parameters)} arguments, {signature}"
        checks.fail(TypeError, rule, evidence)


def _traced(kind: Kind, function: Callable[..., Any], dtypes: tuple[str, ...]) -> Traced:
    def called(*numbers: Any) -> Any:
        """Under a name of its own: JAX keeps what it traced of a function, and its arrays then."""
        result = function(*numbers)
        if not isinstance(result, jax.Array | np.ndarray | np.generic | bool | int | float):
            _fail_result(kind, type(result).__name__)
        return result

    try:
        return traced(called, *scalars(*dtypes))
    except UNKNOWN as error:
        rule = f"`{kind.name}` is traced, so Python cannot ask for the value of its arguments."
        remedy = (
            "Write `&`, `|`, `~` and `jnp.where` for `and`, `or`, `not` and `if`, `jnp` for `np`, "
            "and look up `jnp.asarray(x)`, not lists or NumPy's arrays."
        )
        checks.fail(TypeError, rule, str(error).split("\n")[0].rstrip("."), remedy)
