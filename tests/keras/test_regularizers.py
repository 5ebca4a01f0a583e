"""Regularizers: Keras's penalties, their gradients, and every way to name one."""

import json

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax.core import freeze
from helpers import TOLERANCES, assert_close, normal, relaxed, x64
from keras.src.regularizers import ALL_OBJECTS_DICT

from flax_mha.keras.identifiers import CLASSES, SPELLINGS, resolve, serialize
from flax_mha.keras.regularizers import L1, L1L2, L2, OrthogonalRegularizer, Regularizer

ANY_RANK = [L1(0.3), L2(0.7), L1L2(0.3, 0.7), L1L2()]
MATRIX = [OrthogonalRegularizer(0.3), OrthogonalRegularizer(0.7, "columns")]
ALL = [*ANY_RANK, *MATRIX]
CASES = [(r, shape) for r in ANY_RANK for shape in [(17, 3, 11), (), (0, 3)]]
CASES += [(r, shape) for r in MATRIX for shape in [(17, 11), (3, 5)]]


def keras_penalty(regularizer, x):
    with relaxed():
        return np.asarray(keras.regularizers.get(serialize(regularizer))(x))


def definition(regularizer, x):
    """The same in float64, by loops."""
    x = np.asarray(x).astype(np.float64)
    if not isinstance(regularizer, OrthogonalRegularizer):
        l1, l2 = (getattr(regularizer, name, 0.0) for name in ("l1", "l2"))
        return sum(l1 * abs(entry) + l2 * entry**2 for entry in x.ravel())
    rows = [row / np.linalg.norm(row) for row in (x if regularizer.mode == "rows" else x.T)]
    pairs = [abs(a @ b) for i, a in enumerate(rows) for b in rows[:i]]
    return regularizer.factor * np.mean(pairs)


def test_every_class_is_compared():
    assert {type(r).__name__ for r in ALL} == set(CLASSES["regularizer"])
    assert len(CLASSES["regularizer"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("regularizer", "shape"), CASES, ids=str)
def test_the_penalty(regularizer, shape, dtype):
    x = normal(0, *shape, dtype=dtype)
    penalty = regularizer(x)
    assert (penalty.shape, penalty.dtype) == ((), jnp.float32)
    assert_close(penalty, definition(regularizer, x), "float32")
    expected = keras_penalty(regularizer, x).astype(np.float64)
    np.testing.assert_allclose(penalty, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("regularizer", ALL, ids=str)
def test_float64(regularizer):
    with x64():
        x = normal(0, 17, 11, dtype="float64")
        penalty = regularizer(x)
        assert penalty.dtype == jnp.float64
        assert_close(penalty, definition(regularizer, x), "float64")


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", ALL, ids=str)
def test_jit_vmap_and_grad(regularizer):
    x = normal(0, 3, 5, 7)
    penalties = jax.vmap(regularizer)(x)
    for matrix, penalty in zip(x, penalties, strict=True):
        assert_close(jax.jit(regularizer)(matrix), penalty, "float32")
        assert_close(regularizer(matrix), penalty, "float32")
    with relaxed():
        expected = jax.grad(keras.regularizers.get(serialize(regularizer)))(x[0])
    assert_close(jax.grad(regularizer)(x[0]), expected, "float32")


def test_float16_does_not_overflow():
    x = jnp.full((300,), 300.0, "float16")
    assert float(L2(0.5)(x)) == pytest.approx(0.5 * 300 * 300**2, rel=1e-6)
    assert not np.isfinite(keras_penalty(L2(0.5), x))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rows", "columns"])
def test_orthogonal_without_pairs_or_lengths(mode):
    """Keras gives NaN for a lone vector, and a NaN gradient for a vector of zeros."""
    regularizer = OrthogonalRegularizer(0.5, mode)
    lone = jnp.ones((1, 3) if mode == "rows" else (3, 1))
    assert float(regularizer(lone)) == 0.0
    assert np.isnan(keras_penalty(regularizer, lone))
    zeros = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    zeros = zeros if mode == "rows" else zeros.T
    assert float(regularizer(zeros)) == 0.0
    np.testing.assert_array_equal(jax.grad(regularizer)(zeros), np.zeros((2, 2)))
    with relaxed():
        assert np.isnan(jax.grad(keras.regularizers.get(serialize(regularizer)))(zeros)).any()


def test_orthogonal_extremes():
    assert float(OrthogonalRegularizer(0.5)(jnp.eye(5, 7))) == 0.0
    assert float(OrthogonalRegularizer(0.5)(-jnp.ones((5, 7)))) == pytest.approx(0.5)


# --- values, names and dicts --------------------------------------------------------------------


@pytest.mark.parametrize("regularizer", ALL, ids=str)
def test_values(regularizer):
    written = serialize(regularizer)
    copy = resolve("regularizer", json.loads(json.dumps(written)))
    assert copy == regularizer == resolve("regularizer", freeze(written))
    assert hash(copy) == hash(regularizer)
    assert eval(repr(regularizer)) == regularizer
    with pytest.raises(AttributeError, match="cannot assign"):
        regularizer.l2 = 1


@pytest.mark.parametrize("regularizer", ALL, ids=str)
def test_keras_reads_and_writes_the_same(regularizer):
    twin = keras.regularizers.get(serialize(regularizer))
    rounded = {
        name: value if isinstance(value, str) else pytest.approx(value, rel=2**-24)
        for name, value in serialize(regularizer)["config"].items()
    }  # Keras keeps the factors of L1 and OrthogonalRegularizer in float32
    assert twin.get_config() == rounded
    for identifier in (twin, keras.regularizers.serialize(twin)):
        assert serialize(resolve("regularizer", identifier))["config"] == rounded
    assert resolve("regularizer", type(twin)) == pytest.approx(type(regularizer)())


def test_equality_is_of_class_and_fields():
    assert len({L1(), L1(0.01), L2(), L2(1), L2(1.0), L2(np.float64(1)), L1L2(l2=1)}) == 4


@pytest.mark.parametrize("name", [*sorted(ALL_OBJECTS_DICT), "l1_l2"])
def test_every_name_of_keras(name):
    if name in ("Regularizer", "regularizer"):
        with pytest.raises(ValueError, match=r"must be among \['l1', 'l2', 'l1l2', 'orthogonal_"):
            resolve("regularizer", name)
        return
    expected = ALL_OBJECTS_DICT["l1l2" if name == "l1_l2" else name]
    found = resolve("regularizer", name)
    assert type(found).__name__ == expected.__name__
    assert serialize(found)["config"] == pytest.approx(expected().get_config(), nan_ok=True)


def test_names_of_ours_alone():
    """keras.regularizers.l1_l2 is an attribute, but no identifier, of Keras 3.15."""
    assert set(SPELLINGS["regularizer"]) - set(ALL_OBJECTS_DICT) == {"l1_l2"}
    assert keras.regularizers.l1_l2 is keras.regularizers.L1L2


def test_none_and_callables_pass():
    assert resolve("regularizer", None) is None
    assert resolve("regularizer", jnp.sum) is jnp.sum
    with pytest.raises(TypeError, match=r"can be written to JSON.*Give a Keras name"):
        serialize(jnp.sum)


@pytest.mark.parametrize(
    ("make", "error", "pattern"),
    [
        (lambda: L1(-0.1), ValueError, r"`L1\.l1` must be a finite number >= 0\. Received: -0\.1"),
        (lambda: L2(np.nan), ValueError, r"`L2\.l2` must be a finite number >= 0\. Received: nan"),
        (lambda: L2(None), TypeError, r"`L2\.l2`.*None of type NoneType\. Pass a Python float"),
        (lambda: L2(jnp.ones(())), TypeError, r"`L2\.l2` must be a finite number"),
        (lambda: L1L2(0.0, "1"), TypeError, r"`L1L2\.l2`.*'1' of type str"),
        (lambda: OrthogonalRegularizer(mode="row"), ValueError, r"\['rows', 'columns'\]\..*'row'"),
        (
            lambda: OrthogonalRegularizer()(jnp.ones((2, 3, 4))),
            ValueError,
            r"rank 2.*\(2, 3, 4\).* L1",
        ),
        (lambda: Regularizer(), TypeError, "abstract"),
        (
            lambda: resolve("regularizer", "l1l3"),
            ValueError,
            r"name of a regularizer must .*'l1l3'\. Did you mean 'l1l2'\?",
        ),
        (lambda: resolve("regularizer", "zeros"), ValueError, "'zeros', which is an initializer"),
        (
            lambda: resolve("regularizer", 0.01),
            TypeError,
            r"A regularizer must.*\(x\) -> scalar.*0\.01",
        ),
        (
            lambda: resolve("regularizer", {"class_name": "L2", "l2": 0.1}),
            ValueError,
            "key of the regularizer dict must be among .*'config'.*'l2'",
        ),
        (
            lambda: resolve("regularizer", {"class_name": "L2", "config": {"l1": 0.1}}),
            ValueError,
            r"argument of L2 must be among \['l2'\]\. Received: 'l1'",
        ),
    ],
)
def test_bad_input(make, error, pattern):
    with pytest.raises(error, match=pattern):
        make()
