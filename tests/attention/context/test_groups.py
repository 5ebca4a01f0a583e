"""A ring's gradient of some heads at a time: the numbers of all at once."""

import dataclasses

import jax
import pytest
from context_cases import FEATURES, assert_alike, axis_of
from helpers import normal
from jax.sharding import AxisType

from flax_mha import Mask
from flax_mha.attention.context import groups
from flax_mha.attention.contract import Inputs

SERVED = ["segments", "grouped heads", "ALiBi", "offsets", "dropout", "broadcast dropout", "sinks"]
WHOLE = ["bias", "dense masks"]
QUICK = ["grouped heads", "ALiBi", "dropout"]


def few(rows, quick):
    rest = [row for row in rows if row not in quick]
    return [*quick, *(pytest.param(row, marks=pytest.mark.slow) for row in rest)]


@pytest.fixture
def counted(monkeypatch):
    """Each head by itself; how many groups each gradient had."""
    seen, groups_of = [], groups.groups_of

    def count(inputs):
        seen.append(groups_of(inputs))
        return seen[-1]

    monkeypatch.setattr(groups, "GROUP", 0)
    monkeypatch.setattr(groups, "groups_of", count)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("feature", few([*SERVED, *WHOLE], QUICK))
def test_numbers_of_one_device(feature, counted):
    layout = "zigzag" if feature in ("segments", "dropout") else "contiguous"
    assert_alike((1, 1, 8), axis_of("ring", layout), feature)
    assert set(counted) == {1 if feature in WHOLE else FEATURES[feature].K}


@pytest.mark.slow
def test_heads_that_xla_may_have_cut_stay_together(counted):
    """On automatic axes; on explicit ones each device has groups of its own heads."""
    assert_alike((1, 2, 4), axis_of("ring"), "dropout")
    assert counted == [1]
    assert_alike((1, 2, 4), axis_of("ring"), "dropout", kind=AxisType.Explicit)
    assert counted == [1, 4]


@pytest.mark.parametrize(
    ("B", "S", "K", "expected"),
    [(1, 1024, 8, 1), (1, 2048, 8, 2), (4, 8192, 8, 8), (1, 8192, 2, 2), (1, 4096, 6, 3)],
)
def test_a_group_has_a_bounded_gradient(B, S, K, expected):
    """As few as hold 4 MiB of float32 each; a group has one head at least."""
    of = lambda *sizes: jax.ShapeDtypeStruct(sizes, "bfloat16")
    heads = dict(query_BTNH=of(B, S, 12, 128), key_BSKH=of(B, S, K, 128))
    inputs = Inputs(**heads, value_BSKV=of(B, S, K, 128), mask=Mask())
    assert groups.groups_of(inputs) == expected
    dense = dataclasses.replace(inputs, bias_bnts=normal(0, 1, 1, 2, 2))
    assert groups.groups_of(dense) == 1
