"""Own classes of positions: in a call, in saved configs, in both modules."""

import dataclasses
import json
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from helpers import assert_close, normal, random_params

import flax_mha
from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_shapes
from flax_mha.nnx import MultiHeadAttention
from flax_mha.positions import (
    DenseBias,
    DistanceFunction,
    LinearScaling,
    Rotary,
    Scaling,
    register,
)
from flax_mha.positions.registry import POSITIONS

B, T, N, H, D = 2, 7, 3, 8, 17


@register
@dataclasses.dataclass(frozen=True)
class Tuned(Rotary):
    """Frequencies of its own, a tuple, which JSON makes a list of."""

    values: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    other: Scaling | None = None

    def frequencies(self, H):
        values = np.array(self.values)
        return values if self.other is None else self.other(values, self.base)


@register
@dataclasses.dataclass(frozen=True)
class Squared(Scaling):
    def __call__(self, frequencies, base):
        return frequencies**2


@register
@dataclasses.dataclass(frozen=True)
class Steps(DistanceFunction):
    step: float = 0.5

    def __call__(self, distance_L, num_heads, embedding=None):
        values = jnp.asarray(-self.step * np.minimum(abs(distance_L), 3), "float32")
        return jnp.broadcast_to(values[None], (num_heads, len(distance_L)))


@register
@dataclasses.dataclass(frozen=True)
class Even(DenseBias):
    def __call__(self, T, S, num_heads, embedding=None):
        even = (np.arange(T)[:, None] + np.arange(S)) % 2 == 0
        return jnp.broadcast_to(jnp.asarray(even, "float32")[None], (num_heads, T, S))


OWN = [
    Tuned(values=(0.5, 0.25, 0.1, 0.3)),
    Tuned(other=LinearScaling(2.0)),
    Tuned(other=Squared()),
    Rotary(scaling=Squared()),
    Steps(0.25),
    Even(),
]


@pytest.mark.slow
@pytest.mark.parametrize("position", OWN, ids=lambda x: type(x).__name__)
def test_own_positions_are_saved(position):
    config = MultiHeadAttentionConfig(N, H, position=position)
    back = MultiHeadAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)
    x = normal(1, B, T, D)
    params = random_params(param_shapes(config, x.shape))
    expected = multi_head_attention(params, x, x, config=config)
    assert (multi_head_attention(params, x, x, config=back) == expected).all()
    plain = multi_head_attention(params, x, x, config=config.replace(position=None))
    assert np.abs(np.asarray(expected - plain)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("position", OWN, ids=lambda x: type(x).__name__)
def test_own_positions_in_modules_that_are_restored(position):
    x = normal(1, B, T, D)
    module = flax_mha.MultiHeadAttention(num_heads=N, key_dim=H, position=position)
    variables = module.init(jax.random.key(0), x, x)
    expected = module.apply(variables, x, x)
    data, fields = serialization.to_bytes(variables), json.dumps(module.config.to_dict())
    # Another process: the fields as JSON, the arrays as bytes.
    config = MultiHeadAttentionConfig.from_dict(json.loads(fields))
    again = flax_mha.MultiHeadAttention(num_heads=N, key_dim=H, position=config.position)
    empty = jax.tree.map(jnp.zeros_like, variables)
    restored = serialization.from_bytes(empty, data)
    assert_close(again.apply(restored, x, x), expected, "float32")
    layer = MultiHeadAttention.from_params(variables["params"], config)
    assert_close(layer(x, x), expected, "float32")


@dataclasses.dataclass(frozen=True)
class Unknown(Rotary):
    pass


def test_what_is_not_registered_is_refused_by_name():
    config = MultiHeadAttentionConfig(N, H, position=Unknown())
    with pytest.raises(TypeError, match=r"known by its name.*Unknown.*positions\.register"):
        config.to_dict()
    with pytest.raises(TypeError, match=r"Hidden.*positions\.register"):
        config.replace(position=Rotary(scaling=hidden()())).to_dict()
    for written in (
        {"class_name": "Unknown", "config": {}},
        {"class_name": "Rotary", "config": {"scaling": {"class_name": "Gone", "config": {}}}},
    ):
        with pytest.raises(ValueError, match=r"one of \[.*'.*@flax_mha\.positions\.register"):
            MultiHeadAttentionConfig(N, H, position=written)
    # A scaling is no position, nor a position a scaling.
    with pytest.raises(ValueError, match=r"`position\['class_name'\]` must be one of"):
        MultiHeadAttentionConfig(N, H, position={"class_name": "Squared"})
    with pytest.raises(TypeError, match="must be a Scaling"):
        Rotary(scaling=Steps())


def hidden():
    @dataclasses.dataclass(frozen=True)
    class Hidden(Scaling):
        def __call__(self, frequencies, base):
            return frequencies

    return Hidden


def test_a_class_that_takes_a_known_name_is_written_as_no_other():
    """Not registered, but called Rotary: it would come back as the package's."""
    other = dataclasses.dataclass(frozen=True)(type("Rotary", (Rotary,), {}))
    with pytest.raises(TypeError, match="register"):
        MultiHeadAttentionConfig(N, H, position=other()).to_dict()
    with pytest.raises(ValueError, match=r"'Rotary' is another's.*Rename it"):
        register(other)


def test_a_name_is_given_once_and_a_class_may_be_defined_anew(monkeypatch):
    monkeypatch.setattr(POSITIONS, "classes", dict(POSITIONS.classes))
    assert register(Tuned) is Tuned
    first, second = hidden(), hidden()  # a notebook's cell that runs twice
    register(first)
    register(second)
    assert POSITIONS.classes["Hidden"] is second
    elsewhere = type("Hidden", (Scaling,), {"__call__": first.__call__})
    with pytest.raises(ValueError, match=r"known by its class's name, and 'Hidden' is another's"):
        register(elsewhere)


def lost_fields():
    class Lost(Rotary):
        limit: ClassVar[int] = 3
        speed: Annotated[float, "a field that is none"] = 2.0

    return Lost


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: 3, "`register` takes a class"),
        (lambda: Steps(), "`register` takes a class"),
        (
            lambda: dict,
            "a subclass of Rotary, PositionFunction, .*, DenseBias or Score",
        ),
        (lost_fields, r"must be a frozen dataclass.*\['speed'\].*Decorate it"),
    ],
)
def test_bad_classes(make, message):
    with pytest.raises(TypeError, match=message):
        register(make())


def test_a_subclass_without_fields_needs_no_decorator_of_its_own(monkeypatch):
    monkeypatch.setattr(POSITIONS, "classes", dict(POSITIONS.classes))

    @register
    class Plain(Rotary):
        limit: ClassVar[int] = 3

        def frequencies(self, H):
            return super().frequencies(H) / self.limit

    config = MultiHeadAttentionConfig(N, H, position=Plain(base=100.0))
    assert MultiHeadAttentionConfig.from_dict(config.to_dict()) == config
    assert config.position.frequencies(2).tolist() == [1 / 3]
