"""Calls by hand of what the layer calls: initializers that draw, rotary embedding's waves."""

import functools

from damages import Int, Key
from wrong_calls import Good

from flax_mha.keras import initializers
from flax_mha.positions import LinearScaling, Rotary

DRAWN = [
    Good(
        f"initializers.{type(value).__name__}()",
        functools.partial(value, shape=(3, 4), dtype="float32"),
        dict(init_key=Key()),
    )
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

ROTARY = Rotary(scaling=LinearScaling(2.0))
TURNED = [
    Good("Rotary.frequencies", ROTARY.frequencies, dict(H=Int(8))),
    Good("Rotary.turned_features", ROTARY.turned_features, dict(H=Int(8))),
]
