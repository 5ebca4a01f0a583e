"""Every strategy, feature and mesh of 8 devices: the numbers of one device.

Each mesh meets each strategy, and each strategy each feature. `EVERY_ROW=1 python -m pytest -m ""`
runs the whole product of 477 rows.
"""

import itertools
import os

import jax
import pytest
from context_cases import FEATURES, MESHES, STRATEGIES, along, assert_alike, axis_of, expected
from jax.sharding import AxisType
from kernel_cases import TOLERANCES, compare, unchecked

ZIGZAG = [name for name in FEATURES if name != "ragged"]


def name_of(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def serves(sizes, strategy, feature):
    """On automatic axes the exchange sees all heads."""
    return strategy != "all_to_all" or FEATURES[feature].K % sizes[-1] == 0


def rows_of(*orders, one_in):
    """Of the rows of the product one in so many, by the sum of their entries' numbers."""
    rows = itertools.product(*map(enumerate, orders))
    step = 1 if "EVERY_ROW" in os.environ else one_in
    found = [tuple(x for _, x in row) for row in rows if sum(i for i, _ in row) % step == 0]
    return [row for row in found if serves(*row)]


def few(rows, *quick):
    """The quick ones by default, and all of them as slow tests."""
    rest = [row for row in rows if row not in quick]
    return [*quick, *(pytest.param(*row, marks=pytest.mark.slow) for row in rest)]


@pytest.mark.parametrize(
    ("sizes", "strategy", "feature"),
    few(
        rows_of(MESHES, STRATEGIES, FEATURES, one_in=8),
        ((2, 2, 2), "ring", "segments"),
        ((1, 1, 8), "all_gather", "dropout"),
        ((2, 1, 4), "all_to_all", "ALiBi"),
        ((1, 1, 8), "ring", "window"),  # of fewer hops than devices
        ((1, 1, 8), "ring", "both sides"),
    ),
    ids=name_of,
)
def test_numbers_of_one_device(sizes, strategy, feature):
    assert_alike(sizes, axis_of(strategy), feature)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "strategy", "feature"),
    few(
        rows_of([(2, 1, 4)], STRATEGIES, ZIGZAG, one_in=3),
        ((2, 1, 4), "ring", "dropout"),
        ((2, 1, 4), "all_to_all", "bias"),
        ((2, 1, 4), "all_gather", "dense masks"),
    ),
    ids=name_of,
)
def test_zigzag_order(sizes, strategy, feature):
    assert_alike(sizes, axis_of(strategy, "zigzag"), feature)


@pytest.mark.parametrize(
    ("sizes", "strategy", "feature"),
    few(
        rows_of([(2, 2, 2), (1, 1, 8), (4, 2, 1)], STRATEGIES, FEATURES, one_in=6),
        ((2, 2, 2), "ring", "bias"),
    ),
    ids=name_of,
)
def test_explicit_axes(sizes, strategy, feature):
    """Examples and heads are cut too: a device of two has half of the heads to exchange."""
    K = FEATURES[feature].K // sizes[1]
    if strategy == "all_to_all" and K % sizes[-1]:
        with pytest.raises(
            NotImplementedError, match=rf"as many heads of keys, and there are {K}\."
        ):
            along(sizes, axis_of(strategy), feature, kind=AxisType.Explicit)
    else:
        results = along(sizes, axis_of(strategy), feature, kind=AxisType.Explicit)
        compare(results, expected(feature), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "layout", "feature"),
    [
        ("ring", "zigzag", "segments"),
        ("ring", "contiguous", "ALiBi"),
        ("all_gather", "zigzag", "ALiBi"),
        ("all_to_all", "zigzag", "dropout"),
    ],
)
def test_sixteen_bits(strategy, layout, feature):
    results = along((2, 1, 4), axis_of(strategy, layout), feature, dtype="bfloat16")
    compare(results, expected(feature, "bfloat16"), TOLERANCES["bfloat16"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "layout", "feature"),
    [
        ("ring", "zigzag", "segments"),
        ("ring", "contiguous", "dropout"),
        ("ring", "contiguous", "offsets"),
        ("ring", "contiguous", "cross"),
        ("all_gather", "zigzag", "dropout"),
    ],
)
def test_an_interpreted_kernel(strategy, layout, feature, monkeypatch):
    """Pallas's interpreter does not know types that say what varies over a mesh."""
    monkeypatch.setattr(jax, "shard_map", unchecked(jax.shard_map))
    axis = axis_of(strategy, layout)
    results = along((1, 1, 2), axis, feature, implementation="pallas_interpreted")
    compare(results, expected(feature), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["all_gather", "all_to_all"])
def test_the_reference_by_name(strategy):
    results = along((1, 2, 4), axis_of(strategy), "segments", implementation="reference")
    compare(results, expected("segments"), 1e-5)
