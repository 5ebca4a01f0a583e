"""The kinds of arguments: arrays and plain values, each with the ways in which it may be wrong.

A kind holds the right value and knows, from its own rule and not from the package, which other
values are wrong: an axis may have another size only where no other argument has its letter.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIZES = dict(B=3, T=5, S=7, N=6, K=2, H=8, V=13, D=17, C=19, M=23, E=29, R=4, W=6)


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
