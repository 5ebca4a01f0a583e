"""Which cases of a table stay where only some of them are run."""

import collections
import itertools


def tables(items, belongs):
    """The cases of each function that has 2 or more that belong."""
    found = {}
    for item in items:
        if hasattr(item, "callspec") and belongs(item):
            found.setdefault((item.path, item.originalname), []).append(item)
    return [cases for cases in found.values() if len(cases) >= 2]


def singles(items, belongs):
    """By file, what is in no table: the functions of one case that belong."""
    inside = {id(case) for cases in tables(items, belongs) for case in cases}
    found = {}
    for item in items:
        if id(item) not in inside and belongs(item):
            found.setdefault(item.path, []).append(item)
    return list(found.values())


def values_of(case):
    """The value of each argument, and of each two, by their places in the table."""
    values = sorted(case.callspec.indices.items())
    return [*values, *itertools.combinations(values, 2)]


def half(*axes):
    """Every other row of a product: each combination of all axes but one still occurs.

    What needs a value of every axis at once may hide in the rows left out, and nothing else.
    """
    rows = itertools.product(*map(enumerate, axes))
    return [tuple(x for _, x in row) for row in rows if sum(i for i, _ in row) % 2 == 0]


def unlike(cases, n):
    """One case in n: each is the first whose values, alone and in pairs, came up the least.

    From the last case on where n is negative, so that two runs can have different ones.
    """
    cases, n = (cases if n > 0 else cases[::-1]), abs(n)
    rest = [case for start in range(n) for case in cases[start::n]]
    seen, chosen = collections.Counter(), []
    while len(chosen) * n < len(cases):
        case = min(rest, key=lambda case: sum(seen[value] for value in values_of(case)))
        rest.remove(case)
        chosen.append(case)
        seen.update(values_of(case))
    return chosen
