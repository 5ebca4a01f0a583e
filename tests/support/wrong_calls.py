"""Wrong calls made of right ones, and what becomes of them.

Each argument of a good call has a kind, a kind its damages; None is wrong too, but where it is the
default. What is wrong but harmless is listed, with the reason, beside the good calls.
"""

import contextlib
import inspect
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from damaged_trees import Tree, paths
from damages import Damage, Kind

import flax_mha

PACKAGE = flax_mha.__path__[0]
SECONDS = 20
REFUSALS = (ValueError, TypeError, NotImplementedError)
# What JAX, NumPy and Python say of their own inside, which names no argument of ours.
INTERNAL = re.compile(
    r"dot_general requires|Incompatible shapes|Cannot interpret value|inconsistent sizes|"
    r"not a valid JAX|broadcast_shapes|could not broadcast|unhashable|Non-hashable|"
    r"has no attribute|object is not (iterable|callable|subscriptable)|RESOURCE_EXHAUSTED|"
    r"not supported between|cannot reshape|zip\(\)|einsum|Abstract tracer|ConcretizationType"
)
# No call that is refused may have come to these.
COMPUTING = {"dot_general", "exp", "scan", "while", "pallas_call", "custom_vjp_call"}

# --- calls --------------------------------------------------------------------------------------


class Good(NamedTuple):
    """A call that works; `traced` says that its arrays may be traced."""

    name: str
    function: Callable[..., Any]
    kinds: Mapping[str, Kind]
    traced: bool = True
    also: tuple[str, ...] = ()  # other words that name its argument
    like: Any = None  # whose signature says which arguments may be None, where it is another's

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: kind.good for name, kind in self.kinds.items()}


class Wrong(NamedTuple):
    """A good call with one damage."""

    good: Good
    argument: str
    damage: Damage

    @property
    def name(self) -> str:
        return f"{self.good.name}({self.argument}: {self.damage.what})"

    @property
    def arguments(self) -> dict[str, Any]:
        arguments = self.good.arguments
        if self.damage.renamed:
            del arguments[self.argument]
            return {**arguments, self.damage.renamed: self.damage.value}
        return {**arguments, self.argument: self.damage.value}


def wrong_calls(good: Good) -> Iterator[Wrong]:
    """Every damage of every argument."""
    counts = "".join(kind.letters for kind in good.kinds.values())
    optional = optional_arguments(good.like or good.function)
    for argument, kind in good.kinds.items():
        bound = "".join(x for x in set(kind.letters) if counts.count(x) > 1)
        damages = {damage.what: damage for damage in kind.damages(bound)}
        if not good.traced:
            damages.pop("traced", None)
        if argument not in optional:
            damages["None"] = Damage("None", None)
        misspelt = argument[:-1] + ("x" if argument[-1] != "x" else "y")
        damages["misspelt name"] = Damage("misspelt name", kind.good, renamed=misspelt)
        yield from (Wrong(good, argument, damage) for damage in damages.values())


def optional_arguments(function: Any) -> set[str]:
    """Those whose default is None."""
    return {n for n, p in inspect.signature(function).parameters.items() if p.default is None}


# --- what becomes of a call ---------------------------------------------------------------------


class Hang(BaseException):
    """A call took longer than it may."""


@contextlib.contextmanager
def limit(seconds: int = SECONDS) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Outcome(NamedTuple):
    """The error's type, or "accepted"; `fault` says what is wrong with the refusal."""

    kind: str
    fault: str = ""


def outcome(wrong: Wrong) -> Outcome:
    """Runs the call, and, where its arrays can be traced, traces it."""
    arguments = wrong.arguments
    if isinstance(wrong.damage.value, jax.ShapeDtypeStruct):
        return run(wrong, lambda: traced(wrong, {wrong.argument}))
    eager = run(wrong, lambda: wrong.good.function(**arguments))
    if eager.fault or eager.kind == "accepted" or not wrong.good.traced or wrong.damage.values:
        return eager
    arrays = {name for name, value in arguments.items() if is_numeric(value)}
    under = run(wrong, lambda: traced(wrong, arrays))
    return under._replace(kind=eager.kind) if under.fault else eager


def is_numeric(value: Any) -> bool:
    """Whether it is an array that `jax.jit` takes."""
    is_array = isinstance(value, np.ndarray | jax.Array)
    return is_array and getattr(value.dtype, "kind", "") in "fibuVc"


def traced(wrong: Wrong, names: set[str]) -> Any:
    """The call with some arguments hidden by tracing, which may not have come to any sum."""
    arguments = wrong.arguments
    data = {name: arguments.pop(name) for name in names if name in arguments}
    with counted() as bound:
        try:
            result = jax.eval_shape(lambda data: _ran(wrong, arguments, data), data)
        except REFUSALS as error:
            if done := COMPUTING & set(bound):
                raise AssertionError(f"computed {done} before: {error}") from error
            raise
    return result


def _ran(wrong: Wrong, arguments: Mapping[str, Any], data: Mapping[str, Any]) -> int:
    wrong.good.function(**arguments, **data)
    return 0


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The primitives that are bound meanwhile."""
    bound: list[str] = []
    primitive = jax.extend.core.Primitive
    before = primitive.bind

    def bind(self: Any, *args: Any, **params: Any) -> Any:
        bound.append(self.name)
        return before(self, *args, **params)

    primitive.bind = bind
    try:
        yield bound
    finally:
        primitive.bind = before


def run(wrong: Wrong, call: Callable[[], Any]) -> Outcome:
    try:
        with limit():
            call()
    except Hang:
        return Outcome("hang", f"took more than {SECONDS} s")
    except BaseException as error:
        return Outcome(type(error).__name__, fault_of(wrong, error))
    return Outcome("accepted")


def fault_of(wrong: Wrong, error: BaseException) -> str:
    """What the refusal lacks; nothing, where it is as it should be."""
    first = (str(error).splitlines() or [""])[0]
    shown = f"{type(error).__name__}: {first[:300]}"
    if type(error).__module__ == "flax.errors" and wrong.good.name == "linen":
        return ""  # Flax's refusal, before the module is called
    if wrong.good.name == "linen" and wrong.damage.what.endswith("named by a number"):
        return ""  # likewise: Flax sorts the tree
    if type(error) not in REFUSALS and not isinstance(error, OSError):
        return f"is no refusal: {shown}"
    if INTERNAL.search(first):
        return f"is of the inside: {shown}"
    if wrong.damage.renamed:
        named = (wrong.damage.renamed, wrong.argument)
        return "" if any(name in first for name in named) else f"unnamed: {shown}"
    if not any(re.search(rf"\b{re.escape(name)}\b", first) for name in names(wrong)):
        return f"names no {wrong.argument}: {shown}"
    is_operator = "unsupported operand" in first or "does not support ufuncs" in first
    if not is_operator and not (inner := innermost(error)).startswith(PACKAGE):
        return f"comes from {inner}: {shown}"
    return ""


def names(wrong: Wrong) -> set[str]:
    """The argument, its field or file, or an argument that has the letter whose sizes disagree."""
    letter, about = wrong.damage.letter, wrong.damage.about
    others = {n for n, kind in wrong.good.kinds.items() if letter and letter in kind.letters}
    also = {about} if about else set()
    tree = wrong.good.kinds[wrong.argument]
    if isinstance(tree, Tree):  # entries that disagree are named by either
        also |= {name for path in paths(tree.good) for name in (path[-1], ".".join(path))}
    shape = {wrong.argument.removesuffix("_shape")}
    return {wrong.argument, *others, *also, *shape, *wrong.good.also}


def innermost(error: BaseException) -> str:
    return traceback.extract_tb(error.__traceback__)[-1].filename
