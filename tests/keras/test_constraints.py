"""Constraints: Keras's projections, what they guarantee, and every way to name one."""

import json

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax.core import freeze
from helpers import TOLERANCES, assert_close, normal, relaxed, x64
from keras.src.constraints import ALL_OBJECTS_DICT

from flax_mha.keras.constraints import Constraint, MaxNorm, MinMaxNorm, NonNeg, UnitNorm
from flax_mha.keras.identifiers import CLASSES, SPELLINGS, resolve, serialize

AXES = [0, (0, -1), None]
ONE_EACH = [NonNeg(), MaxNorm(1.5, -1), UnitNorm([2, 0]), MinMaxNorm(1.0, 1.5, 0.7, 1)]
ALL = [*ONE_EACH, MaxNorm(0.0), MaxNorm(100.0), MinMaxNorm(2.0, 2.0), MinMaxNorm(rate=0.0)]
for _axis in AXES:
    ALL += [MaxNorm(1.5, _axis), UnitNorm(_axis), MinMaxNorm(1.0, 1.5, 0.7, _axis)]


def keras_projection(constraint, w):
    with relaxed():
        return np.asarray(keras.constraints.get(serialize(constraint))(w)).astype(np.float64)


def norms(w, axis):
    """The norms along `axis`, in float64."""
    axis = tuple(range(w.ndim)) if axis is None else axis
    return np.sqrt(np.sum(np.square(np.asarray(w).astype(np.float64)), axis=axis))


def test_every_class_is_compared():
    assert {type(c).__name__ for c in ONE_EACH} == set(CLASSES["constraint"])
    assert len(CLASSES["constraint"]) == 4


@pytest.mark.parametrize(
    ("constraint", "dtype"),
    [(c, "float32") for c in ALL] + [(c, d) for c in ONE_EACH for d in ("bfloat16", "float16")],
    ids=str,
)
def test_the_projection_of_keras(constraint, dtype):
    w = normal(0, 5, 3, 7, dtype=dtype)
    projected = constraint(w)
    assert (projected.shape, projected.dtype) == (w.shape, w.dtype)
    assert_close(projected, keras_projection(constraint, w), dtype)


@pytest.mark.parametrize("constraint", ONE_EACH, ids=str)
def test_float64(constraint):
    with x64():
        w = normal(0, 5, 3, 7, dtype="float64")
        assert constraint(w).dtype == jnp.float64
        assert_close(constraint(w), keras_projection(constraint, w), "float64")


@pytest.mark.parametrize("constraint", ONE_EACH, ids=str)
def test_jit_and_vmap(constraint):
    w = normal(0, 2, 5, 3, 7)
    for kernel, projected in zip(w, jax.vmap(constraint)(w), strict=True):
        assert_close(jax.jit(constraint)(kernel), projected, "float32")
        assert_close(constraint(kernel), projected, "float32")


# --- guarantees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_norms_keep_their_bounds(axis, dtype):
    w = normal(0, 5, 3, 7, dtype=dtype)
    before, slack = norms(w, axis), 1 + TOLERANCES[dtype]
    assert before.min() * slack < 3.0 * before.max()
    low, high = 0.5 * before.min() + 0.5 * before.max(), 1.1 * before.max()
    assert norms(MaxNorm(low, axis)(w), axis).max() <= low * slack
    assert norms(MinMaxNorm(low, high, axis=axis)(w), axis).min() >= low / slack
    np.testing.assert_allclose(norms(UnitNorm(axis)(w), axis), 1.0, rtol=slack - 1)
    half = norms(MinMaxNorm(2 * high, 3 * high, 0.5, axis)(w), axis)
    np.testing.assert_allclose(half, 0.5 * before + high, rtol=slack - 1)


def test_within_the_bounds_nothing_changes():
    w = normal(0, 5, 3)
    assert norms(w, 0).min() > 0.1
    for constraint in (MaxNorm(100.0), MinMaxNorm(0.1, 100.0), MinMaxNorm(rate=0.0)):
        np.testing.assert_allclose(constraint(w), w, rtol=2e-6)
    np.testing.assert_array_equal(NonNeg()(jnp.abs(w)), jnp.abs(w))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("constraint", [MaxNorm(), UnitNorm(), MinMaxNorm(1.0, 2.0)], ids=str)
def test_zeros_stay_zeros(constraint, dtype):
    np.testing.assert_array_equal(constraint(jnp.zeros((3, 2), dtype)), np.zeros((3, 2)))


def test_float16_does_not_overflow():
    w = jnp.full((4, 1), 300.0, "float16")
    np.testing.assert_array_equal(UnitNorm()(w), np.full((4, 1), 0.5))
    assert not np.allclose(keras_projection(UnitNorm(), w), 0.5)


def test_non_negative():
    projected = NonNeg()(jnp.array([-2.0, -0.0, 3.0]))
    np.testing.assert_array_equal(projected, [0.0, 0.0, 3.0])


# --- values, names and dicts --------------------------------------------------------------------


@pytest.mark.parametrize("constraint", ALL, ids=str)
def test_values(constraint):
    written = serialize(constraint)
    copy = resolve("constraint", json.loads(json.dumps(written)))
    assert copy == constraint == resolve("constraint", freeze(written))
    assert hash(copy) == hash(constraint)
    assert eval(repr(constraint)) == constraint
    with pytest.raises(AttributeError, match="cannot assign"):
        constraint.axis = 1


@pytest.mark.parametrize("constraint", ALL, ids=str)
def test_keras_reads_and_writes_the_same(constraint):
    twin = keras.constraints.get(serialize(constraint))
    assert twin.get_config() == serialize(constraint)["config"]
    assert resolve("constraint", twin) == constraint
    assert resolve("constraint", keras.constraints.serialize(twin)) == constraint
    assert resolve("constraint", type(twin)) == type(constraint)()


def test_equality_is_of_class_and_fields():
    assert UnitNorm([0, 1]) == UnitNorm((0, 1)) == UnitNorm((np.int64(0), 1))
    assert len({UnitNorm(), UnitNorm(0), UnitNorm((0,)), MaxNorm(2), MaxNorm(2.0), NonNeg()}) == 4


@pytest.mark.parametrize("name", sorted(ALL_OBJECTS_DICT))
def test_every_name_of_keras(name):
    if name in ("Constraint", "constraint"):
        with pytest.raises(ValueError, match=r"must be among \['non_neg', 'max_norm', 'unit_norm'"):
            resolve("constraint", name)
        return
    found, expected = resolve("constraint", name), ALL_OBJECTS_DICT[name]
    assert type(found).__name__ == expected.__name__
    assert serialize(found)["config"] == expected().get_config()
    assert name in SPELLINGS["constraint"]


def test_no_name_is_ours_alone():
    assert set(SPELLINGS["constraint"]) < set(ALL_OBJECTS_DICT)


def test_none_and_callables_pass():
    assert resolve("constraint", None) is None
    assert resolve("constraint", jnp.abs) is jnp.abs


@pytest.mark.parametrize(
    ("make", "error", "pattern"),
    [
        (lambda: MaxNorm(-1), ValueError, r"`MaxNorm\.max_value` must be .* >= 0\. Received: -1"),
        (lambda: MaxNorm("2"), TypeError, r"`MaxNorm\.max_value` must be a finite number.*'2'"),
        (
            lambda: MinMaxNorm(2, 1),
            ValueError,
            r"min_value=2\.0, max_value=1\.0\. Are the two swap",
        ),
        (lambda: MinMaxNorm(rate=1.5), ValueError, r"`MinMaxNorm\.rate` .* in \[0, 1\]\..* 1\.5"),
        (lambda: UnitNorm("0"), TypeError, r"`UnitNorm\.axis` must be an int or .*'0' of type str"),
        (lambda: UnitNorm(()), ValueError, r"`UnitNorm\.axis` must be .* non-empty .*\(\)"),
        (lambda: UnitNorm([0, 0]), ValueError, r"different ints.*\[0, 0\]"),
        (lambda: UnitNorm(True), TypeError, r"`UnitNorm\.axis` must be an integer.*True"),
        (lambda: UnitNorm(0.5), TypeError, r"`UnitNorm\.axis` must be an int or.*0\.5"),
        (lambda: UnitNorm(2)(jnp.ones((3, 4))), ValueError, r"of rank 2\..*axis=\(2,\).*\(3, 4\)"),
        (lambda: UnitNorm((0, -2))(jnp.ones((3, 4))), ValueError, r"different axes.*\(0, -2\)"),
        (lambda: Constraint(), TypeError, "abstract"),
        (
            lambda: resolve("constraint", "maxnorm"),
            ValueError,
            "'maxnorm'. Did you mean 'max_norm'",
        ),
        (lambda: resolve("constraint", "l2"), ValueError, "'l2', which is a regularizer"),
        (
            lambda: resolve("constraint", 2),
            TypeError,
            r"A constraint must.*\(w\) -> w\..* 2 of type",
        ),
    ],
)
def test_bad_input(make, error, pattern):
    with pytest.raises(error, match=pattern):
        make()
