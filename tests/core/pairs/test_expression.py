"""Functions of numbers as expressions: equal where they do the same, taken apart without loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha.core.pairs.function import mask_function, score_function
from flax_mha.core.pairs.separated import separated

B, N, T, S = 2, 3, 5, 7
RNG = np.random.default_rng(1)
IDS = jnp.asarray(RNG.integers(0, 3, (B, S)), "int32")
TABLE = jnp.asarray(RNG.normal(size=(N, 2 * S)), "float32")
FEATURES = jnp.asarray(RNG.normal(size=(S, 4)), "float32")


def document(ids):
    return lambda b, n, t, s: (ids[b, t] == ids[b, s]) & (s <= t)


def places():
    return {x: jnp.arange(n, dtype="int32") for x, n in zip("bnts", (B, N, T, S))}


def test_equal_where_they_do_the_same():
    """Whatever arrays they close over, and though each was made anew."""
    one, other = (mask_function(document(ids)).expression for ids in (IDS, IDS + 1))
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    "other",
    [
        lambda b, n, t, s: (IDS[b, t] == IDS[b, s]) & (s < t),
        lambda b, n, t, s: (IDS[b, s] == IDS[b, t]) & (s <= t) & (s <= t + 1),
        lambda b, n, t, s: (IDS[b, t] == IDS[b, s]) | (s <= t),
        lambda b, n, t, s: (IDS[b, t] == IDS[b, s]) & (s <= t + 1),
        lambda b, n, t, s: (IDS[n, t] == IDS[b, s]) & (s <= t),
        document(IDS[:, 1:]),
        document(IDS.astype("int16")),
    ],
    ids=["<", "more", "|", "+ 1", "n", "shape", "dtype"],
)
def test_different_where_they_do_not(other):
    assert mask_function(document(IDS)).expression != mask_function(other).expression


def test_numbers_tell_apart_and_nan_equals_itself():
    of = lambda number: score_function(lambda x, b, n, t, s: x * number, "float32").expression
    assert of(float("nan")) == of(float("nan"))
    assert of(0.0) != of(-0.0)
    assert of(1.0) != of(2.0)


def test_an_array_stands_once_however_often_it_is_read():
    pair = mask_function(document(IDS))
    assert len(pair.arrays) == 1
    assert pair.arrays[0] is IDS


def test_an_array_that_nothing_reads_is_no_data():
    def of(b, n, t, s):
        _ = IDS[b, t] + 1
        return s <= t

    assert mask_function(of).arrays == ()


def test_jitted_parts_are_steps_like_others():
    """Or nothing could be told of them: jnp's own functions are jitted."""
    inner = jax.jit(lambda t, s: jax.jit(jnp.abs)(t - s))
    one = mask_function(lambda b, n, t, s: inner(t, s) < 3).expression
    other = mask_function(lambda b, n, t, s: abs(t - s) < 3).expression
    assert one == other


SEPARATED = {
    "document": (document(IDS), [(B, 1, T, 1), (B, 1, 1, S), (1, 1, 1, S), (1, 1, T, 1)], 0),
    "of the key": (lambda b, n, t, s: IDS[b, s] > 0, [(B, 1, 1, S)], 0),
    "of the head": (lambda b, n, t, s: TABLE[n, 0] > 0, [(1, N, 1, 1)], 0),
    "of nothing": (lambda b, n, t, s: IDS[0, 0] > 0, [], 1),
    "constant": (lambda b, n, t, s: True, [], 0),
    "distance": (
        lambda b, n, t, s: TABLE[n, s - t + S] > 0,
        [(1, 1, 1, S), (1, 1, T, 1), (1, N, 1, 1)],
        1,
    ),
    "features": (
        lambda b, n, t, s: FEATURES[t] @ FEATURES[s] > 0,
        [(1, 1, T, 1), (1, 1, 1, S)],
        1,
    ),
}


@pytest.mark.parametrize("name", SEPARATED)
def test_what_needs_one_side_is_computed_once(name):
    """The shapes are the memory; the values are those of the function, pair by pair."""
    function, shapes, tables = SEPARATED[name]
    made = separated(mask_function(function), places())
    assert sorted(x.shape for x in made.operands) == sorted(shapes)
    assert len(made.tables) == tables
    whole = np.broadcast_to(made.whole(), (B, N, T, S))
    for place in np.ndindex(B, N, T, S):
        assert whole[place] == bool(function(*map(jnp.int32, place))), place


@pytest.mark.slow
def test_the_logit_is_one_number_at_each_place():
    function = lambda x, b, n, t, s: jax.nn.relu(x) * TABLE[n, s - t + S] - t.astype(x.dtype)
    made = separated(score_function(function, "float32"), places())
    logits = jnp.asarray(RNG.normal(size=(B, N, T, S)), "float32")
    whole = np.asarray(made.whole(logits))
    for place in np.ndindex(B, N, T, S):
        wanted = function(logits[place], *map(jnp.int32, place))
        np.testing.assert_allclose(whole[place], wanted, rtol=1e-6)


@pytest.mark.slow
def test_floats_alone_move():
    """Ids and indices have no derivative; a bfloat16 that was widened is what it was."""
    narrow = TABLE[:, 0].astype("bfloat16")
    function = lambda x, b, n, t, s: x * narrow[n].astype(x.dtype) + FEATURES[t, 0] * IDS[b, s]
    with jax.numpy_dtype_promotion("standard"):
        made = separated(score_function(function, "float32"), places())
        logits = jnp.ones((B, N, T, S))
        wide = {name: x.astype("float32") for name, x in made.moving.items()}
        np.testing.assert_array_equal(made.with_moving(wide).whole(logits), made.whole(logits))
    assert sorted(x.shape for x in made.moving.values()) == [(1, 1, T, 1), (1, N, 1, 1)]


BEYOND = {
    "too few queries": (lambda b, n, t, s: IDS[b, t, None][0] > 0, None),
    "ids of too few keys": (lambda b, n, t, s: IDS[0, :4][s] > 0, r"by `s` needs S.*\(4,\).*S = 7"),
    "too few examples": (lambda b, n, t, s: IDS[:1, 0][b] > 0, r"by `b` needs B.*\(1,\).*B = 2"),
    "too few heads": (lambda b, n, t, s: TABLE[:2][n, s] > 0, r"by `n` needs N.*minimum\(n, 1\)"),
    "clipped on purpose": (lambda b, n, t, s: IDS[0, :4][jnp.minimum(s, 3)] > 0, None),
    "computed": (lambda b, n, t, s: TABLE[n, s - t + S] > 0, None),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_lookup_beyond_the_end_is_refused(name):
    """JAX gives the last entry: of ids of other lengths that would be another mask, silently."""
    function, message = BEYOND[name]
    if message is None:
        separated(mask_function(function), places())
        return
    with pytest.raises(ValueError, match=message):
        separated(mask_function(function), places())
