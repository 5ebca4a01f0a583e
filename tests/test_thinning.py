"""Of a table that is thinned (`--thin`, see tests/conftest.py) the cases that stay are unlike."""

import itertools
import types

import pytest
from thinning import half, singles, tables, unlike, values_of


def table(*sizes):
    """Every combination of arguments with so many values."""
    names = "abcdef"
    return [
        types.SimpleNamespace(
            path="test_it.py",
            originalname="test_it",
            callspec=types.SimpleNamespace(indices=dict(zip(names, values))),
        )
        for values in itertools.product(*map(range, sizes))
    ]


def values(cases):
    return [tuple(case.callspec.indices.values()) for case in cases]


@pytest.mark.parametrize(
    "sizes", [(3,), (2, 2), (3, 2), (2, 3, 4), (3, 3, 3), (2, 2, 2, 2)], ids=str
)
@pytest.mark.parametrize("n", [2, 3, -2, -3])
def test_one_case_in_n_and_no_two_of_them_alike(sizes, n):
    cases = table(*sizes)
    chosen = values(unlike(cases, n))
    assert len(set(chosen)) == len(chosen) == -(-len(cases) // abs(n))
    assert chosen[0] == values(cases)[0 if n > 0 else -1]


@pytest.mark.parametrize("n", [2, 3, -3])
@pytest.mark.parametrize("sizes", [(2, 3, 4), (3, 3, 3), (2, 2, 8), (8, 2, 2)], ids=str)
def test_every_value_of_every_argument_stays(sizes, n):
    """One in three from the first on would have one value alone of the last of three."""
    cases = table(*sizes)
    for argument, size in enumerate(sizes):
        assert {value[argument] for value in values(unlike(cases, n))} == set(range(size))


def test_every_pair_stays_where_there_is_room():
    chosen = unlike(table(2, 2, 2, 2), 2)
    pairs = {pair for case in chosen for pair in values_of(case)}
    assert pairs == {pair for case in table(2, 2, 2, 2) for pair in values_of(case)}


def test_one_argument_is_thinned_evenly_and_another_way_from_the_end():
    assert [a for (a,) in values(unlike(table(10), 3))] == [0, 3, 6, 9]
    assert [a for (a,) in values(unlike(table(12), -3))] == [11, 8, 5, 2]
    assert values(unlike(table(4), 1)) == values(table(4))


@pytest.mark.parametrize("sizes", [(2, 2), (3, 4, 2), (2, 2, 2, 3, 2)], ids=str)
def test_half_of_a_product_has_each_combination_of_all_axes_but_one(sizes):
    axes = [range(size) for size in sizes]
    rows = half(*axes)
    assert len(rows) == -(-len([*itertools.product(*axes)]) // 2)
    for i in range(len(sizes)):
        without = {row[:i] + row[i + 1 :] for row in rows}
        assert without == {*itertools.product(*axes[:i], *axes[i + 1 :])}


def test_what_does_not_belong_and_functions_of_one_case_are_in_no_table():
    cases = table(5)
    assert tables(cases, lambda case: True) == [cases]
    assert tables(cases, lambda case: case in cases[:2]) == [cases[:2]]
    assert tables(cases, lambda case: case in cases[:1]) == []
    assert tables([types.SimpleNamespace(path="", originalname="test_alone")], bool) == []


def test_singles_are_by_file_what_is_in_no_table():
    cases = table(3)
    one, two, other = (
        types.SimpleNamespace(path=path, originalname=f"test_{path}")
        for path in ("test_it.py", "test_it.py", "test_that.py")
    )
    items = [one, *cases, two, other]
    assert singles(items, lambda case: True) == [[one, two], [other]]
    assert singles(items, lambda case: case is not two) == [[one], [other]]
    belongs = lambda case: case in (cases[0], other)
    assert singles(items, belongs) == [[cases[0]], [other]]
