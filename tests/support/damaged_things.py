"""Kinds of what lives outside of a call: objects that are read by their attributes, and paths."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from damages import Damage, Junk, Kind


def with_attribute(thing: Any, name: str, value: Any) -> Any:
    """A copy of an object with another attribute."""
    changed = copy.copy(thing)
    setattr(changed, name, value)
    return changed


class Live(Kind):
    """An object of another framework, of which these attributes are read.

    `words` name what an attribute became here; `changed` makes a copy where copy.copy cannot.
    """

    def __init__(
        self,
        good: Any,
        words: dict[str, str],
        changed: Callable[[Any, str, Any], Any] = with_attribute,
    ) -> None:
        super().__init__(good)
        self.words, self.changed = words, changed

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        yield from (Damage("7", 7), Damage("a class", type(self.good)), Damage("a dict", {}))
        yield from (Damage("an array", np.zeros(3)), Damage("a list of it", [self.good]))
        for name, word in self.words.items():
            for wrong in (Junk(), 1 + 2j, b"\xff", math.nan, -1, "0.5", [[1]]):
                thing = self.changed(self.good, name, wrong)
                yield Damage(f"{name}={wrong!r}", thing, about=word or name)


class Place(Kind):
    """The path of a file or folder, in a folder of its own; of one to write another is `taken`."""

    def __init__(self, good: str, taken: str | None = None) -> None:
        super().__init__(good)
        self.taken = taken

    def damages(self, bound: str) -> Iterator[Damage]:
        yield Damage("junk", Junk())
        yield Damage("complex number", 1 + 2j)
        yield from (Damage("7", 7), Damage("True", True), Damage("NaN", math.nan))
        yield from (Damage("a list", [self.good]), Damage("an array", np.zeros(3)))
        yield from (Damage("empty", ""), Damage("NUL", "a\x00" + self.good))
        yield from (Damage("bytes", self.good.encode()), Damage("a dict", {self.good: 1}))
        if self.taken is not None:
            yield Damage("taken", self.taken)
            yield Damage("below a file", f"file/{self.good}")


class Layers(Kind):
    """A dict of things by their names."""

    def damages(self, bound: str) -> Iterator[Damage]:
        yield from super().damages(bound)
        (name, value), *_ = self.good.items()
        for what, wrong in (("a list", [value]), ("7", 7), ("an array", np.zeros(3))):
            yield Damage(what, wrong)
        yield Damage("pairs", list(self.good.items()))
        yield Damage("the value alone", value)
        yield Damage("named by a number", {7: value})
        yield Damage("named by nothing", {"": value})
        for wrong in (None, Junk(), 7, "x", b"\xff", {"no": "such"}, (), [], (value,)):
            yield Damage(f"of {wrong!r:.20}", {name: wrong}, about=name)
