"""Angles of rotary embedding at far positions, against exact rational numbers."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, random_params, x64

from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_shapes
from flax_mha.positions import LinearScaling, Llama3Scaling, Rotary, YarnScaling

TWO_PI = Fraction("6.283185307179586476925286766559005768394338798750")
FAR = [0, 1, 130, 2**20, 10**6, 2**24 + 1, 2**31 - 1, -5, -(2**31)]
# The bound. The largest error found is 2e-7: the rounding of an angle of up to pi.
BOUND = 1e-5


def waves(positions, frequencies):
    """cos and sin of p w, `[positions, pairs, 2]`, from whole turns that are left out exactly."""
    result = np.empty((len(positions), len(frequencies), 2))
    for (t, p), (i, w) in ((x, y) for x in enumerate(positions) for y in enumerate(frequencies)):
        angle = float(Fraction(int(p)) * Fraction(float(w)) % TWO_PI)
        result[t, i] = math.cos(angle), math.sin(angle)
    return result


def turned_units(rotary, positions, H, dtype="float32"):
    """cos and sin as the rotary embedding has them: how it turns the pairs (1, 0)."""
    unit = jnp.concatenate([jnp.ones(H // 2), jnp.zeros(H // 2)]).astype(dtype)
    x = jnp.broadcast_to(unit, (1, len(positions), 1, H))
    turned = rotary(x, jnp.asarray(positions)[None])[0, :, 0]
    return np.stack(np.split(np.asarray(turned, np.float64), 2, -1), -1)


@pytest.mark.slow
@pytest.mark.parametrize("base", [1e4, 5e5, 1e6, 1e7])
def test_angles_are_exact_at_every_position(base):
    rotary, positions = Rotary(base=base), np.array(FAR, np.int32)
    expected = waves(FAR, rotary.frequencies(64))
    error = np.abs(turned_units(rotary, positions, 64) - expected).max()
    assert error < 5e-7 < BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaling",
    [LinearScaling(3.0), Llama3Scaling(), YarnScaling(4.0, 4096, attention_factor=1.0)],
    ids=lambda x: type(x).__name__,
)
def test_angles_are_exact_with_every_scaling(scaling):
    rotary, positions = Rotary(base=5e5, scaling=scaling), np.array(FAR, np.int32)
    expected = waves(FAR, rotary.frequencies(32))
    assert np.abs(turned_units(rotary, positions, 32) - expected).max() < 5e-7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
def test_positions_of_every_integer_dtype(dtype):
    info = np.iinfo(dtype)
    positions = np.array([info.min, 0, 3, info.max], dtype)
    expected = waves(positions, Rotary().frequencies(16))
    assert np.abs(turned_units(Rotary(), positions, 16) - expected).max() < 5e-7


@pytest.mark.slow
def test_positions_of_numpy_s_own_dtype():
    """Outside a layer nothing has made 32 bits of them."""
    positions = np.array([10**6, 2**31 - 1])
    x = jnp.concatenate([jnp.ones((1, 2, 1, 8)), jnp.zeros((1, 2, 1, 8))], -1)
    turned = np.stack(np.split(np.asarray(Rotary()(x, positions[None]))[0, :, 0], 2, -1), -1)
    assert np.abs(turned - waves(positions, Rotary().frequencies(16))).max() < 5e-7


@pytest.mark.slow
def test_positions_near_zero_turn_as_before():
    """As the product of float32 numbers did, to within its own error."""
    frequencies = Rotary().frequencies(64).astype(np.float32)
    positions = np.arange(12, dtype=np.int32)
    angles = (positions.astype(np.float32)[:, None] * frequencies[None]).astype(np.float64)
    before = np.stack([np.cos(angles), np.sin(angles)], -1)
    ours = turned_units(Rotary(), positions, 64)
    np.testing.assert_allclose(ours, before, atol=1e-6)
    assert (ours[0] == [1.0, 0.0]).all()


@pytest.mark.slow
def test_with_x64_angles_are_the_plain_product():
    with x64():
        x = normal(0, 1, 3, 1, 8, dtype="float64")
        positions = np.array([[5, 10**6, -7]])
        expected = waves(positions[0], Rotary().frequencies(8))
        turned = np.asarray(Rotary()(x, jnp.asarray(positions)))[0, :, 0]
        a, b = np.split(np.asarray(x)[0, :, 0], 2, -1)
        cos, sin = expected[..., 0], expected[..., 1]
        both = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        np.testing.assert_allclose(turned, both, atol=1e-9)
        # Positions of 64 bits, of arrays of 32: they are not cut.
        far = np.array([2**40 + 1, -(2**33)])
        expected = waves(far, Rotary(base=100.0).frequencies(8) * 1e-3)
        slow = Rotary(base=100.0, scaling=LinearScaling(1e3))
        assert np.abs(turned_units(slow, far, 8) - expected).max() < 1e-5


@dataclasses.dataclass(frozen=True)
class Own(Rotary):
    """Frequencies above 1 and below 0, and some made by JAX."""

    kind: str = "numpy"

    def frequencies(self, H):
        values = np.array([400.25, -0.3, 0.0, 1e-9])[: H // 2]
        return jnp.asarray(values, "float32") * 1.0 if self.kind == "jax" else values


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_own_frequencies_keep_working(kind):
    rotary, positions = Own(kind=kind), np.array([0, 3, 10**6, -9], np.int32)
    expected = waves(positions, np.asarray(rotary.frequencies(8)))
    assert np.abs(turned_units(rotary, positions, 8) - expected).max() < 5e-7
    compiled = jax.jit(lambda x, p: rotary(x, p))(normal(0, 1, 4, 1, 8), positions[None])
    assert_close(compiled, rotary(normal(0, 1, 4, 1, 8), positions[None]), "float32")


@pytest.mark.slow
def test_far_angles_under_every_transformation():
    rotary, x = Rotary(base=5e5), normal(1, 2, 3, 2, 16)
    positions = jnp.array([[10**6, 2**24 + 1, 7], [-5, 2**31 - 1, 1]], "int32")
    plain = rotary(x, positions)
    assert_close(jax.jit(rotary)(x, positions), plain, "float32")
    one = jax.vmap(lambda x, p: rotary(x[None], p[None])[0])(x, positions)
    assert_close(one, plain, "float32")
    # A rotation keeps lengths, and its transpose turns back.
    back = jax.vjp(lambda x: rotary(x, positions), x)[1](plain)[0]
    assert_close(back, x, "float32")
    assert_close(jax.jvp(lambda x: rotary(x, positions), (x,), (x,))[1], plain, "float32")
    half = rotary(x.astype("bfloat16"), positions)
    assert half.dtype == jnp.bfloat16
    assert_close(half, plain, "bfloat16")
    without = jax.jvp(lambda x: rotary(x, positions), (x,), (jnp.zeros_like(x),))[1]
    assert not np.asarray(without).any()


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_layer_at_a_million_is_the_layer_at_zero(implementation):
    """Only differences count; with angles of float32 the weights were off by 1e-3."""
    config = MultiHeadAttentionConfig(
        2, 32, position=Rotary(base=5e5), implementation=implementation
    )
    x = normal(2, 2, 7, 17)
    params = random_params(param_shapes(config, x.shape))
    near = jnp.arange(7, dtype="int32")[None]
    call = dict(config=config, use_causal_mask=True)
    here = multi_head_attention(params, x, x, positions=near, **call)
    for start in (10**6, 2**31 - 8, -(2**30)):
        there = multi_head_attention(params, x, x, positions=near + start, **call)
        assert_close(there, here, "float32")
