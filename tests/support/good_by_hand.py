"""Calls by hand of what the layer calls: initializers, penalties, projections, rotary embedding."""

import functools

from damages import Choice, Floats, Ids, Int, Key, Sizes
from wrong_calls import Good

from flax_mha.keras import constraints, initializers, regularizers
from flax_mha.positions import LinearScaling, QueryGrowth, Rotary

FANS = Sizes((3, 4), low=0)
PLACE = dict(shape=Sizes((3, 4), low=0), dtype=Choice("float32"), fans=FANS)
RANDOM = [
    Good(f"initializers.{type(value).__name__}()", value, dict(init_key=Key(), **PLACE))
    for value in (
        initializers.Orthogonal(),
        initializers.RandomNormal(),
        initializers.RandomUniform(),
        initializers.TruncatedNormal(),
        initializers.VarianceScaling(),
        initializers.GlorotUniform(),
        initializers.GlorotNormal(),
        initializers.LecunNormal(),
        initializers.LecunUniform(),
        initializers.HeNormal(),
        initializers.HeUniform(),
    )
]
FIXED = [
    Good(f"initializers.{type(value).__name__}()", functools.partial(value, None), PLACE)
    for value in (
        initializers.Zeros(),
        initializers.Ones(),
        initializers.Constant(2.0),
        initializers.Identity(),
    )
]
PENALTIES = [
    Good(f"regularizers.{type(value).__name__}()", value, dict(x=Floats("DH")))
    for value in (
        regularizers.L1(),
        regularizers.L2(),
        regularizers.L1L2(),
        regularizers.OrthogonalRegularizer(),
    )
]
PROJECTIONS = [
    Good(f"constraints.{type(value).__name__}()", value, dict(w=Floats("DNH")), also=("axis",))
    for value in (
        constraints.NonNeg(),
        constraints.MaxNorm(axis=(0, 2)),
        constraints.UnitNorm(axis=(0, 2)),
        constraints.MinMaxNorm(axis=(0, 2)),
    )
]

ROTARY = Rotary(scaling=LinearScaling(2.0))
GROWTH = QueryGrowth(factor=0.1, interval=2, rotary=ROTARY)
HEADS = dict(x_BTNH=Floats("BTNH"), position_bT=Ids("BT", 9))
TURNED = [
    Good("Rotary.frequencies", ROTARY.frequencies, dict(H=Int(8))),
    Good("Rotary.turned_features", ROTARY.turned_features, dict(H=Int(8))),
    Good("Rotary()", ROTARY, HEADS),
    Good(
        "Rotary.of_key",
        ROTARY.of_key,
        dict(x_BSKH=Floats("BTNH"), position_bS=Ids("BT", 9)),
        also=tuple(HEADS),
    ),
    Good("QueryGrowth()", GROWTH, dict(position_bT=Ids("BT", 9))),
    Good("QueryGrowth.of_query", GROWTH.of_query, HEADS),
]
