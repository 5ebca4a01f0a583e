"""Wrong calls made of right ones: each argument of a good call has a kind, a kind its damages.

A kind holds the right value and knows, from its own rule and not from the package, which other
values are wrong: an axis may have another size only where no other argument has its letter, None
may be passed only where it is the default. What is wrong but harmless is listed, with the reason,
beside the good calls.
"""

import contextlib
import inspect
import math
import re
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flax_mha

SIZES = dict(B=3, T=5, S=7, N=6, K=2, H=8, V=13, D=17, C=19, M=23, E=29, R=4, W=6)
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


class Junk:
    """What nothing takes."""

    def __repr__(self) -> str:
        return "Junk()"


class Damage(NamedTuple):
    """A wrong value; `values` says that it is wrong by its numbers, which tracing hides."""

    what: str
    value: Any
    letter: str = ""
    values: bool = False
    renamed: str = ""
    about: str = ""


class Kind:
    """The right value of an argument."""

    static = False

    def __init__(self, good: Any) -> None:
        self.good = good

    letters = ""

    def damages(self, bound: str) -> Iterator[Damage]:
        """Those of every kind."""
        yield Damage("junk", Junk())
        yield Damage("complex number", 1 + 2j)
        if not isinstance(self.good, str | tuple | dict):
            yield Damage("a string", "0.5")
        if not isinstance(self.good, bytes):
            yield Damage("bytes", b"\x00\xff")


# --- arrays -------------------------------------------------------------------------------------


class Floats(Kind):
    """An array of floats by its letters; those of `free` may have any size in this call."""

    dtypes = ("int32", "bool", "complex64")

    def __init__(self, letters: str, dtype: str = "float32") -> None:
        self.letters = letters
        super().__init__(self.array(tuple(SIZES[x] for x in letters)).astype(dtype))

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng(0).normal(size=shape).astype("float32")

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        good = self.good
        yield Damage("nested list", good.tolist())
        yield Damage("objects", good.astype(object))
        yield Damage("strings", good.astype(str))
        for dtype in self.dtypes:
            yield Damage(f"dtype {dtype}", jnp.asarray(good.astype(dtype)))
        yield Damage("PRNG keys", jax.random.split(jax.random.key(0), good.shape[:1]))
        if good.ndim:
            yield Damage("a rank less", jnp.asarray(good[0]))
        yield Damage("two ranks more", jnp.asarray(good[None, None]))
        yield from self.sizes(bound)

    def sizes(self, bound: str) -> Iterator[Damage]:
        for axis, letter in enumerate(self.letters):
            if letter in bound:
                head = (slice(None),) * axis
                one = np.concatenate([self.good, self.good[(*head, slice(1))]], axis)
                yield Damage(f"{letter} one more", jnp.asarray(one), letter)
                yield Damage(f"{letter} zero", jnp.asarray(self.good[(*head, slice(0))]), letter)


class Bools(Floats):
    """A mask, True = may attend."""

    dtypes = ("float32", "complex64", "bfloat16")

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.arange(math.prod(shape)).reshape(shape) % 3 != 1

    def __init__(self, letters: str) -> None:
        super().__init__(letters, "bool")

    def damages(self, bound: str) -> Iterator[Damage]:
        for damage in super().damages(bound):
            if damage.what != "nested list":  # Keras's users write them
                yield damage
        yield Damage("0 and -10000", jnp.where(self.good, 0, -10000), values=True)


class Ids(Floats):
    """Integers below a bound."""

    dtypes = ("float32", "bool", "complex64")

    def __init__(self, letters: str, high: int = 3) -> None:
        self.high = high
        super().__init__(letters, "int32")

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.sort(np.arange(math.prod(shape)).reshape(shape) % self.high, -1)


class Pair(Kind):
    """Two arrays, `([B, T], [B, S])`."""

    def __init__(self, first: Floats, second: Floats) -> None:
        self.first, self.second = first, second
        self.letters = first.letters + second.letters
        super().__init__((first.good, second.good))

    def damages(self, bound: str) -> Iterator[Damage]:
        one, two = self.good
        yield from super().damages(bound)
        yield Damage("three of them", (one, two, two))
        yield Damage("none of them", ())
        yield Damage("one of them None", (one, None))
        for side, other in ((self.first, two), (self.second, one)):
            for damage in side.damages(bound):
                pair = (damage.value, other) if side is self.first else (other, damage.value)
                yield damage._replace(what=f"{side.letters}: {damage.what}", value=pair)


class Key(Kind):
    """One PRNG key."""

    def __init__(self) -> None:
        super().__init__(jax.random.key(0))

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        yield Damage("an int", 0)
        yield Damage("a batch of keys", jax.random.split(self.good))
        yield Damage("a batch of raw keys", jnp.zeros((3, 2), "uint32"))
        yield Damage("floats", jnp.zeros(2))
        yield Damage("signed ints", jnp.zeros(2, "int32"))
        yield Damage("a raw key of 3 words", jnp.zeros(3, "uint32"))


# --- plain values, static -----------------------------------------------------------------------


class Static(Kind):
    """What must be known when a call is traced."""

    static = True

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        yield Damage("an array of 2", np.array([1, 2]))
        yield Damage("a list", [[1], [2]])
        yield Damage("traced", jax.ShapeDtypeStruct((), "float32"))


class Real(Static):
    """A finite number within bounds."""

    def __init__(
        self, good: float, low: float = -math.inf, high: float = math.inf, *, open: bool = False
    ) -> None:
        super().__init__(good)
        self.low, self.high, self.open = low, high, open

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        yield Damage("True", True)
        for value in (math.nan, math.inf, -math.inf):
            yield Damage(str(value), value)
        if self.low > -math.inf:
            yield Damage("below", self.low - 0.5)
        if self.high < math.inf:
            yield Damage("above", self.high + 0.5)
        if self.open:
            yield Damage("at the bound", self.low if self.low > -math.inf else self.high)
        yield Damage("a huge int", 10**400)


class Int(Static):
    """A whole number within bounds; `huge` is more than any memory holds."""

    def __init__(self, good: int, low: int | None = 1, *, huge: bool = False) -> None:
        super().__init__(good)
        self.low, self.huge = low, huge

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        for what, value in (("half", self.good + 0.5), ("a float", float(self.good))):
            yield Damage(what, value)
        yield from (Damage("True", True), Damage("NaN", math.nan), Damage("inf", math.inf))
        if self.low is not None:
            yield Damage("below", self.low - 1)
            yield Damage("far below", -(2**70))
        if self.huge:
            yield from (Damage("2**40", 2**40), Damage("2**62", 2**62), Damage("2**70", 2**70))


class Flag(Static):
    """True or False."""

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        yield from (Damage("2", 2), Damage("-1", -1), Damage("a float", 1.0))
        yield from (Damage("'False'", "False"), Damage("NaN", math.nan))


class Choice(Static):
    """One of some names."""

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        good = str(self.good)
        yield from (Damage("misspelt", good[1:] + "x"), Damage("empty", ""), Damage("7", 7))
        yield from (Damage("in capitals", good.upper() + "!"), Damage("a tuple", (good, good)))
        yield from (Damage("NUL", good + "\x00"), Damage("a set", {good}))


class Sizes(Static):
    """A shape or axes: a tuple of ints."""

    def __init__(self, good: tuple[int, ...], *, low: int | None = 1) -> None:
        super().__init__(good)
        self.low = low

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        last = lambda x: (*self.good[:-1], x)
        yield from (Damage("a string", "abc"), Damage("a float", 2.5), Damage("a dict", {1: 2}))
        yield from (Damage("with a half", last(2.5)), Damage("with None", last(None)))
        yield from (Damage("with a string", last("3")), Damage("with True", last(True)))
        yield from (Damage("nested", last((3,))), Damage("with NaN", last(math.nan)))
        if self.low is not None:
            yield Damage("below", last(self.low - 1))


class Names(Static):
    """Several names."""

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        yield from (Damage("a string", "query"), Damage("7", 7), Damage("of ints", (1, 2)))
        yield from (Damage("nested", ((*self.good,),)), Damage("with None", (*self.good, None)))


class Other(Static):
    """An object, a function or a name that is free: only the types are wrong."""

    def damages(self, bound: str) -> Iterator[Damage]:
        for damage in super().damages(bound):
            if damage.what not in ("a list", "bytes") or not isinstance(self.good, str):
                yield damage
        yield from (Damage("7", 7), Damage("a class", Junk), Damage("a dict", {"no": "such"}))


# --- trees --------------------------------------------------------------------------------------


class Tree(Kind):
    """Nested dicts of arrays."""

    def __init__(self, good: Any, letters: str = "") -> None:
        super().__init__(good)
        self.letters = letters

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        for what, value in (("a list", [1]), ("empty", {}), ("7", 7), ("an array", np.zeros(3))):
            yield Damage(what, value)
        yield Damage("under 'params'", {"params": self.good})
        yield Damage("of strings", dict.fromkeys(self.good, "no"))
        yield Damage("of None", dict.fromkeys(self.good))
        for path in list(paths(self.good))[::3]:
            for what, change in ENTRY.items():
                wrong = changed(self.good, path, change)
                yield Damage(f"{'.'.join(path)} {what}", wrong, about=path[-1])


class Fields(Kind):
    """A dict of plain values, as JSON holds it."""

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        for what, value in (("a list", [1]), ("7", 7), ("an array", np.zeros(3))):
            yield Damage(what, value)
        for name, value in self.good.items():
            rest = {key: x for key, x in self.good.items() if key != name}
            misspelt = name[1:] + "x"
            yield Damage(f"{name} misspelt", {**rest, misspelt: value}, about=misspelt)
            for wrong in (Junk(), 1 + 2j, {"no": "such"}, b"\xff", math.nan):
                yield Damage(f"{name}={wrong!r}", {**rest, name: wrong}, about=name)
        yield Damage("named by a number", {**self.good, 7: 7}, about="7")


def paths(tree: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        yield from (
            paths(value, (*before, name)) if isinstance(value, Mapping) else [(*before, name)]
        )


def changed(tree: Any, path: tuple[str, ...], change: Callable[[dict, str], None]) -> Any:
    """A copy of the dicts in which one entry was changed."""
    head, *rest = path
    copy = dict(tree)
    if rest:
        copy[head] = changed(tree[head], tuple(rest), change)
    else:
        change(copy, head)
    return copy


def becomes(make: Callable[[Any], Any]) -> Callable[[dict, str], None]:
    def change(leaves: dict, name: str) -> None:
        leaves[name] = make(np.asarray(leaves[name]))

    return change


ENTRY: dict[str, Callable[[dict, str], None]] = {
    "missing": lambda leaves, name: leaves.pop(name),
    "misspelt": lambda leaves, name: leaves.update({name[1:]: leaves.pop(name)}),
    "beside another": lambda leaves, name: leaves.update({name + "2": leaves[name]}),
    "named by a number": lambda leaves, name: leaves.update({7: leaves[name]}),
    "of a rank less": becomes(lambda x: x.reshape(-1)[0] if x.ndim < 2 else x[0]),
    "of a rank more": becomes(lambda x: x[None]),
    "one more": becomes(lambda x: np.concatenate([x, x[:1]])),
    "cut": becomes(lambda x: x[..., :-1]),
    "empty": becomes(lambda x: x[:0]),
    "of ints": becomes(lambda x: x.astype("int32")),
    "of bools": becomes(lambda x: x > 0),
    "complex": becomes(lambda x: x.astype("complex64")),
    "of objects": becomes(lambda x: x.astype(object)),
    "of strings": becomes(lambda x: x.astype(str)),
    "a list": becomes(lambda x: x.tolist()),
    "None": becomes(lambda x: None),
    "a string": becomes(lambda x: "zeros"),
    "a number": becomes(lambda x: 0.5),
    "a dict": becomes(lambda x: {"kernel": x}),
}


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
