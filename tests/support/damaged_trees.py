"""Kinds of nested arguments: trees of arrays, and dicts of plain values, with what may be wrong."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from damages import Damage, Junk, Kind


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
