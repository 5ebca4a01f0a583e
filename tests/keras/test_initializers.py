"""Initializers: Keras's numbers, their laws, and every way to name one."""

import json

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import scipy.stats
from flax.core import freeze
from helpers import assert_close, relaxed, x64
from keras.src.initializers import ALL_OBJECTS_DICT

from flax_mha.keras import initializers
from flax_mha.keras.identifiers import CLASSES, SPELLINGS, resolve, serialize
from flax_mha.keras.initializers import (
    Constant,
    GlorotNormal,
    GlorotUniform,
    HeNormal,
    HeUniform,
    Identity,
    Initializer,
    LecunNormal,
    LecunUniform,
    Ones,
    Orthogonal,
    RandomNormal,
    RandomUniform,
    TruncatedNormal,
    VarianceScaling,
    Zeros,
    compute_fans,
)

AXES = {"input_axes": (0,), "output_axes": (1, 2)}
FIXED = [Zeros(), Ones(), Constant(-1.5)]
FAN_SCALED = [
    GlorotUniform(seed=1),
    GlorotNormal(seed=2),
    LecunUniform(seed=3),
    LecunNormal(seed=4),
    HeUniform(seed=5),
    HeNormal(seed=6),
    HeNormal(seed=2**32 - 1, **AXES),
    VarianceScaling(0.3, "fan_out", "uniform", 7, **AXES),
    VarianceScaling(2.5, "fan_avg", "untruncated_normal", 8),
    VarianceScaling(distribution="Normal", seed=0),
]
SEEDED = [
    RandomNormal(1.0, 2.0, seed=9),
    TruncatedNormal(-1.0, 0.5, seed=10),
    RandomUniform(-1.0, 3.0, seed=11),
    Orthogonal(1.5, seed=12),
    *FAN_SCALED,
]
UNSEEDED = [RandomNormal(), TruncatedNormal(), RandomUniform(), Orthogonal(), GlorotUniform()]
DEFAULTS = list(CLASSES["initializer"].values())
SHAPES = [(17, 3, 11), (3, 5), ()]


def keras_values(initializer, shape, dtype="float32"):
    with relaxed():
        twin = keras.initializers.get(serialize(initializer))
        return np.asarray(twin(shape, dtype=dtype)).astype(np.float64)


def test_every_class_is_compared_with_keras():
    compared = {type(i).__name__ for i in [*FIXED, *SEEDED, Identity()]}
    assert compared == set(CLASSES["initializer"]) == {c.__name__ for c in DEFAULTS}
    assert len(compared) == 15


def fits(initializer, shape):
    by_axes = getattr(initializer, "input_axes", None) is not None
    return len(shape) >= (3 if by_axes else 2 if isinstance(initializer, Orthogonal) else 0)


@pytest.mark.parametrize("initializer", [*FIXED, *SEEDED], ids=str)
@pytest.mark.slow
def test_a_seed_gives_the_numbers_of_keras(initializer):
    for shape in SHAPES:
        if fits(initializer, shape):
            values = initializer(None, shape, "float32")
            assert (values.shape, values.dtype) == (shape, jnp.float32)
            np.testing.assert_allclose(values, keras_values(initializer, shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (5, 3)])
def test_identity_as_keras(shape):
    values = Identity(2.5)(None, shape, "float32")
    np.testing.assert_array_equal(values, 2.5 * np.eye(*shape))
    np.testing.assert_array_equal(values, keras_values(Identity(2.5), shape))


@pytest.mark.parametrize("initializer", [*FIXED, *SEEDED], ids=str)
@pytest.mark.slow
def test_sixteen_bits(initializer):
    values = initializer(None, (17, 3, 11), "bfloat16")
    assert values.dtype == jnp.bfloat16
    if isinstance(initializer, Orthogonal):  # Keras raises: its QR knows no bfloat16
        with pytest.raises((NotImplementedError, TypeError), match="bfloat16"):
            keras_values(initializer, (17, 3, 11), "bfloat16")
        expected = initializer(None, (17, 3, 11), "float32").astype("bfloat16")
        np.testing.assert_array_equal(values, expected)
    else:
        expected = keras_values(initializer, (17, 3, 11), "bfloat16")
        np.testing.assert_array_equal(np.asarray(values).astype(np.float64), expected)


@pytest.mark.parametrize("initializer", [*FIXED, *SEEDED], ids=str)
@pytest.mark.slow
def test_float64(initializer):
    with x64():
        values = initializer(None, (17, 3, 11), "float64")
        assert values.dtype == jnp.float64
        assert_close(values, keras_values(initializer, (17, 3, 11), "float64"), "float64")


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", SEEDED, ids=str)
def test_a_seed_overrides_the_key(initializer):
    first, second = (initializer(jax.random.key(i), (4, 3, 5), "float32") for i in (0, 1))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("initializer", UNSEEDED, ids=str)
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_without_a_seed_the_key_decides(initializer, make_key):
    first, again, other = (initializer(make_key(i), (4, 3, 5), "float32") for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.isclose(first, other, rtol=0, atol=1e-6).any()
    for no_key in (None, 0):
        with pytest.raises(
            TypeError, match=r"`init_key` must be one JAX PRNG key.*jax\.random\.key"
        ):
            initializer(no_key, (4, 3, 5), "float32")


@pytest.mark.parametrize("initializer", [*FIXED, *UNSEEDED, GlorotUniform(seed=3)], ids=str)
def test_jit_and_vmap(initializer):
    keys = jax.random.split(jax.random.key(0), 3)

    def draw(key):
        return initializer(key, (4, 3, 5), "float32")

    batched = jax.vmap(draw)(keys)
    for key, values in zip(keys, batched, strict=True):
        assert_close(values, draw(key), "float32")
        assert_close(jax.jit(draw)(key), draw(key), "float32")
    struct = jax.eval_shape(draw, keys[0])
    assert (struct.shape, struct.dtype) == ((4, 3, 5), jnp.float32)


# --- laws ---------------------------------------------------------------------------------------

TRUNCATED = scipy.stats.truncnorm(-2, 2, scale=1 / scipy.stats.truncnorm(-2, 2).std())
UNIT_LAWS = {
    "uniform": scipy.stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)),
    "truncated_normal": TRUNCATED,
    "untruncated_normal": scipy.stats.norm(),
}


def distance(values, law):
    """Kolmogorov's: the largest difference between the two distribution functions."""
    return scipy.stats.kstest(np.asarray(values, np.float64).ravel(), law.cdf).statistic


def test_the_unit_laws_are_told_apart():
    """What the bound below is worth: wrong laws of the right variance are farther than it."""
    for name, law in UNIT_LAWS.items():
        draws = law.rvs(2**17, random_state=0)
        for other, other_law in UNIT_LAWS.items():
            assert (distance(draws, other_law) < 2 * 2**-8.5) == (name == other)


@pytest.mark.slow
@pytest.mark.parametrize("fans", [None, (128, 1024)], ids=str)
@pytest.mark.parametrize("initializer", FAN_SCALED[:6] + FAN_SCALED[8:], ids=str)
def test_variance_is_scale_over_n(initializer, fans):
    # By Kolmogorov, 2 / sqrt(2^17) is exceeded with a probability of 2 exp(-8) = 7e-4.
    shape = (128, 8, 128)
    values = initializer(None, shape, "float32", fans=fans)
    fan_in, fan_out = fans or (8 * 128, 128 * 128)
    n = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}
    stddev = np.sqrt(initializer.scale / n[initializer.mode])
    assert distance(values / stddev, UNIT_LAWS[initializer.distribution]) < 2 * 2**-8.5
    assert np.var(values) == pytest.approx(stddev**2, rel=5 * np.sqrt(2 / values.size))


@pytest.mark.parametrize(
    ("initializer", "law"),
    [
        (RandomNormal(1.0, 2.0), scipy.stats.norm(1.0, 2.0)),
        (TruncatedNormal(1.0, 2.0), scipy.stats.truncnorm(-2, 2, loc=1.0, scale=2.0)),
        (RandomUniform(-1.0, 3.0), scipy.stats.uniform(-1.0, 4.0)),
    ],
)
def test_plain_laws(initializer, law):
    values = initializer(jax.random.key(0), (2**17,), "float32")
    assert distance(values, law) < 2 * 2**-8.5
    low, high = law.support()
    assert low <= values.min()
    assert values.max() <= high


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 11, 17), (17, 3), (2, 29)])
def test_orthogonal_rows_or_columns(shape):
    Q = np.asarray(Orthogonal(2.0)(jax.random.key(0), shape, "float32")).reshape(-1, shape[-1])
    Q = Q if Q.shape[0] >= Q.shape[1] else Q.T
    np.testing.assert_allclose(Q.T @ Q, 4.0 * np.eye(Q.shape[1]), atol=1e-5)


@pytest.mark.slow
def test_orthogonal_is_uniform_not_merely_orthogonal():
    """Of uniform Q every entry is as often positive; LAPACK's own Q is mostly negative there."""
    keys = jax.random.split(jax.random.key(0), 400)
    corner = jax.vmap(lambda key: Orthogonal()(key, (3, 3), "float32"))(keys)[:, 0, 0]
    assert abs(float(jnp.mean(jnp.sign(corner)))) < 4 / np.sqrt(400)


# --- fans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 5), (2, 3, 5, 7), (0, 3, 5)])
def test_fans_as_keras(shape):
    keras_fans = keras.src.initializers.random_initializers.compute_fans
    assert compute_fans(shape) == keras_fans(shape)
    if len(shape) > 2:
        axes = {"input_axes": [0, -1], "output_axes": (1,)}
        assert compute_fans(list(shape), **axes) == keras_fans(shape, **axes)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
def test_fans_below_one_count_as_one(mode):
    assert VarianceScaling(mode=mode, seed=1)(None, (0, 0), "float32").shape == (0, 0)
    small, one = (
        VarianceScaling(mode=mode, seed=1)(None, (3, 5), "float32", fans=(n, n)) for n in (0, 1)
    )
    np.testing.assert_array_equal(small, one)


def test_own_axes_win_over_the_callers_fans():
    shape, fans = (17, 3, 11), (1, 1)
    own = GlorotUniform(seed=0, **AXES)
    np.testing.assert_array_equal(
        own(None, shape, "float32", fans=fans), own(None, shape, "float32")
    )
    given = GlorotUniform(seed=0)(None, shape, "float32", fans=(17, 33))
    np.testing.assert_array_equal(given, own(None, shape, "float32"))
    assert not np.allclose(given, GlorotUniform(seed=0)(None, shape, "float32"))


@pytest.mark.parametrize("equation", ["abc,cde->abde", "abcd,cde->abe"])
def test_fans_of_a_keras_layer(equation):
    """Keras 3.15 passes the einsum's own axes: what callers give here as `fans=`."""
    inputs, features, fans = {
        "abc,cde->abde": ((2, 5, 17), (None, 3, 11), (17, 33)),
        "abcd,cde->abe": ((2, 5, 3, 11), (None, 29), (33, 29)),
    }[equation]
    with relaxed():
        twin = keras.initializers.GlorotUniform(seed=4)
        layer = keras.layers.EinsumDense(equation, features, kernel_initializer=twin)
        layer.build(inputs)
        kernel = np.asarray(layer.kernel)
    values = GlorotUniform(seed=4)(None, kernel.shape, "float32", fans=fans)
    np.testing.assert_allclose(values, kernel, rtol=0, atol=1e-6)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "pattern"),
    [
        (lambda: Constant("a"), TypeError, r"`Constant\.value` must be a finite number\. .*'a'"),
        (lambda: Constant(True), TypeError, r"`Constant\.value`.*True of type bool"),
        (lambda: Constant(np.inf), ValueError, r"`Constant\.value` must be a finite number.*inf"),
        (
            lambda: RandomNormal(stddev=-1),
            ValueError,
            r"`RandomNormal\.stddev` must be .* >= 0\..*-1",
        ),
        (
            lambda: RandomUniform(1, 0),
            ValueError,
            r"`RandomUniform\.minval` .*minval=1\.0.*swapped",
        ),
        (lambda: VarianceScaling(0), ValueError, r"`VarianceScaling\.scale` must .* > 0\. .*: 0\."),
        (
            lambda: VarianceScaling(mode="fan"),
            ValueError,
            r"mode` must be one of \['fan_in', .*'fan'",
        ),
        (
            lambda: VarianceScaling(distribution="cauchy"),
            ValueError,
            r"distribution` must be one of .*'untruncated_normal', 'uniform'\].*'cauchy'",
        ),
        (lambda: HeNormal(seed=-1), ValueError, r"`HeNormal\.seed` .* \[0, 2\*\*32\).*4294967295"),
        (lambda: HeNormal(seed=2**32), ValueError, r"seed % 2\*\*32` = 0"),
        (lambda: HeNormal(seed=0.5), TypeError, r"seed` must be None or an integer.*random state"),
        (lambda: HeNormal(seed=True), TypeError, r"seed` must be an integer.*True"),
        (
            lambda: HeNormal(input_axes=(0,)),
            ValueError,
            r"`HeNormal\.input_axes` and `output_axes`",
        ),
        (
            lambda: HeNormal(None, (0, 0), (1,)),
            ValueError,
            r"input_axes` .*different ints.*\(0, 0\)",
        ),
        (lambda: HeNormal(None, "ab", (1,)), TypeError, r"input_axes` must be an int or .*'ab'"),
        (
            lambda: compute_fans((2, 3), (0,)),
            ValueError,
            r"`input_axes` and `output_axes` go together",
        ),
        (lambda: compute_fans((2, 3), (0,), (2,)), ValueError, r"`output_axes`.*rank 2.*\(2, 3\)"),
        (
            lambda: compute_fans((2, 3), (0, -2), (1,)),
            ValueError,
            r"`input_axes` must be different",
        ),
        (
            lambda: Identity()(None, (2, 3, 4), "float32"),
            ValueError,
            r"rank 2.*\(2, 3, 4\).*Orthogonal",
        ),
        (lambda: Orthogonal(seed=1)(None, (7,), "float32"), ValueError, r"rank 2 .*\(7,\).*Zeros"),
        (
            lambda: HeNormal(1, **AXES)(None, (7, 3), "float32"),
            ValueError,
            r"output_axes.*\(7, 3\)",
        ),
        (lambda: HeNormal(1, **AXES)(None, (), "float32"), ValueError, r"input_axes.*rank 0"),
        (lambda: Initializer(), TypeError, "abstract"),
    ],
)
def test_bad_arguments(make, error, pattern):
    with pytest.raises(error, match=pattern):
        make()


# --- values, names and dicts --------------------------------------------------------------------


@pytest.mark.parametrize("initializer", [*FIXED, *SEEDED, Identity(2.0), *UNSEEDED], ids=str)
def test_values(initializer):
    written = serialize(initializer)
    copy = resolve("initializer", json.loads(json.dumps(written)))
    assert copy == initializer
    assert hash(copy) == hash(initializer)
    assert type(copy) is type(initializer)
    assert json.loads(json.dumps(written)) == written
    assert resolve("initializer", freeze(written)) == initializer
    assert eval(repr(initializer), vars(initializers)) == initializer
    with pytest.raises(AttributeError, match="cannot assign"):
        initializer.seed = 1


@pytest.mark.parametrize("initializer", [*FIXED, *SEEDED, Identity(2.0), *UNSEEDED], ids=str)
def test_keras_reads_and_writes_the_same(initializer):
    written = serialize(initializer)
    twin = keras.initializers.get(written)
    if isinstance(initializer, Identity):  # Keras 3.15 forgets the gain when it writes
        assert twin.get_config() == {}
        assert twin.gain == 2.0
    else:
        assert twin.get_config() == written["config"]
        assert resolve("initializer", keras.initializers.serialize(twin)) == initializer
    assert resolve("initializer", twin) == initializer
    assert resolve("initializer", type(twin)) == type(initializer)()


def test_equality_is_of_class_and_fields():
    assert len({HeNormal(), HeNormal(None), HeNormal(seed=0), HeUniform(), LecunNormal()}) == 4
    assert VarianceScaling(distribution="normal") == VarianceScaling()
    assert HeNormal(input_axes=[0], output_axes=[1]) == HeNormal(None, (0,), (1,))
    assert HeNormal(np.int64(3)) == HeNormal(3)
    assert HeNormal() != VarianceScaling(2.0)
    assert isinstance(HeNormal(), VarianceScaling)
    assert Constant(np.float32(0.5)) == Constant(0.5)


REFUSED = {"Initializer", "initializer", "STFT", "stft", "STFTInitializer"}


@pytest.mark.parametrize("name", sorted(ALL_OBJECTS_DICT))
def test_every_name_of_keras(name):
    if name in REFUSED:
        pattern = "Fourier" if "stft" in name.lower() else "must be among.*'glorot_uniform'"
        with pytest.raises(ValueError, match=pattern):
            resolve("initializer", name)
        return
    expected = ALL_OBJECTS_DICT[name].__name__
    for identifier in (name, {"class_name": name}, {"class_name": name, "config": {}}):
        found = resolve("initializer", identifier)
        assert type(found).__name__ == expected
        assert found == resolve("initializer", type(found))


def test_no_name_is_ours_alone():
    assert set(SPELLINGS["initializer"]) == set(ALL_OBJECTS_DICT) - REFUSED


def test_none_and_callables_pass():
    lecun = jax.nn.initializers.lecun_normal()
    assert resolve("initializer", lecun) is lecun
    assert resolve("initializer", None) is None
    assert serialize(None) is None
    with pytest.raises(TypeError, match=r"written to JSON\. Received: <function.*Keras name"):
        serialize(lecun)


class Unhashable:
    __hash__ = None

    def __call__(self, key, shape, dtype):
        raise AssertionError


class MyInitializer(keras.initializers.Initializer):
    pass


def keras_dict(name, **entries):
    return {"module": "keras.initializers", "class_name": name, "config": {}, **entries}


STATEFUL = keras.initializers.serialize(
    keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(3))
)


@pytest.mark.parametrize(
    ("identifier", "error", "pattern"),
    [
        (
            "glorot_unifrom",
            ValueError,
            r"among \[.*Received: 'glorot_unifrom'\. .*'glorot_uniform'\?",
        ),
        ("GLOROT_UNIFORM", ValueError, "Did you mean 'glorot_uniform'"),
        ("max_norm", ValueError, "initializer must be among .*'max_norm', which is a constraint"),
        (keras.initializers.STFT(), ValueError, "'STFT' makes kernels of Fourier transforms"),
        (
            MyInitializer(),
            ValueError,
            r"the custom class 'MyInitializer'\. .*\(key, shape, dtype\)",
        ),
        (MyInitializer, ValueError, "the custom class 'MyInitializer'"),
        (keras_dict("Zeros", module="my.module"), ValueError, "the custom class 'Zeros'"),
        (keras_dict("Zeros", module=None), ValueError, "the custom class 'Zeros'"),
        (keras_dict("Zeros", registered_name="my>Zeros"), ValueError, "the custom class 'Zeros'"),
        (keras_dict("Zeros", config={"value": 0}), ValueError, r"argument of Zeros must.*'value'"),
        (keras_dict("HeNormal", config={"sed": 0}), ValueError, "'sed'. Did you mean 'seed'"),
        (keras_dict("HeNormal", seed=0), ValueError, "key of the initializer dict .*'seed'"),
        (keras_dict("HeNormal", config=[0]), TypeError, r"\"config\": a dict of .*config=\[0\]"),
        ({"config": {}}, TypeError, r"\"class_name\": a name.*class_name=None"),
        (STATEFUL, TypeError, r"seed` must be None or an integer.*pass the integer"),
        (0, TypeError, r"An initializer must be None, .*Received: 0 of type int"),
        (np.ones(3), TypeError, r"or a callable \(key, shape, dtype\).*ndarray"),
        (int, TypeError, r"<class 'int'> of type type"),
        (initializers.Initializer, TypeError, "Initializer"),
        (resolve("regularizer", "l2"), TypeError, r"An initializer must .*L2\(l2=0\.01\)"),
        (Unhashable(), TypeError, r"must be hashable.*Wrap it in a function"),
    ],
)
def test_bad_identifiers(identifier, error, pattern):
    with pytest.raises(error, match=pattern):
        resolve("initializer", identifier)
