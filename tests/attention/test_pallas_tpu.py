"""The TPU kernel's arithmetic, interpreted: every feature and gradient beside the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import booleans, normal
from kernel_cases import QUICKLY, arrays_of, assert_beside, compare, distances, with_gradients
from thinning import half

from flax_mha import Mask, dot_product_attention
from flax_mha.attention.dropout import keep_mask, words_of
from flax_mha.attention.pallas_tpu import backward

T = S = 300
KEY = jax.random.key(5)
IDS = jnp.sort(jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, T))), 1).astype("int32")
SHUFFLED = jax.random.permutation(KEY, IDS, axis=1, independent=True)
QUERIES = jnp.arange(T)[None] < jnp.array([[300], [220]])
KEYS = jnp.arange(S)[None] < jnp.array([[130], [257]])
NOBODY = jnp.stack([jnp.ones(S, bool), jnp.zeros(S, bool)])  # all of example 1 is removed
OFFSETS = jnp.array([-170, 50])
SMALL = dict(block_sizes=(128, 128))

# All at once, and what the features do together. These run by default.
TOGETHER = {
    "everything": dict(
        mask=Mask.causal(OFFSETS)
        & Mask.padding(QUERIES, KEYS)
        & Mask.segments(IDS, IDS)
        & Mask.dense(booleans(1, 2, 1, T, S, share=0.9)),
        bias=normal(6, 1, 4, T, S),
        distance_bias=distances(7, 4, 90, -60, jnp.array([3, 40])),
        soft_cap=2.0,
        sinks=normal(8, 4),
        dropout_rate=0.3,
        dropout_key=KEY,
        dropout_start=(1, 2, 37, 11),
        **SMALL,
    ),
    "window, sinks and a bias of keys": dict(
        mask=Mask.window(140, 60), bias=normal(6, 2, 1, 1, S), sinks=normal(8, 4), **SMALL
    ),
}
# One by one.
FEATURES = {
    "plain": {},
    "blocks": dict(block_sizes=(128, 256)),
    "causal": dict(is_causal=True, **SMALL),
    "window of one side": dict(local_window_size=(40, 0), **SMALL),
    "window without an end": dict(mask=Mask.window(None, 50), **SMALL),
    "window of unequal tiles": dict(local_window_size=(20, 30), block_sizes=(256, 128)),
    "offsets": dict(mask=Mask.causal(OFFSETS), **SMALL),
    "offsets beyond both ends": dict(
        mask=Mask(band=(64, 64), query_offset=jnp.array([-1000, 290])), **SMALL
    ),
    "padding": dict(mask=Mask.padding(QUERIES, KEYS), **SMALL),
    "padding of one tile": dict(mask=Mask.padding(QUERIES, KEYS)),
    "nobody": dict(mask=Mask.padding(None, NOBODY) & Mask.causal(), **SMALL),
    "segments": dict(mask=Mask.segments(IDS, IDS) & Mask.causal(), **SMALL),
    "shuffled segments": dict(mask=Mask.segments(SHUFFLED, IDS), **SMALL),
    "segments twice": dict(mask=Mask.segments(IDS, IDS) & Mask.segments(SHUFFLED, IDS), **SMALL),
    "dense of examples": dict(mask=Mask.dense(booleans(1, 2, 1, T, S)), **SMALL),
    "dense of heads": dict(mask=Mask.dense(booleans(1, 1, 4, T, 1)), **SMALL),
    "two dense": dict(
        mask=Mask.dense(booleans(1, 1, 4, T, 1)) & Mask.dense(booleans(2, 2, 1, 1, S)), **SMALL
    ),
    "soft cap": dict(soft_cap=2.0, is_causal=True, **SMALL),
    "sinks": dict(sinks=normal(8, 4), is_causal=True),
    "no sinks": dict(sinks=jnp.array([-jnp.inf, 0.0, 3.0, -1.0])),
    "negative scale": dict(scale=-0.7, is_causal=True, **SMALL),
    "scale of 0": dict(scale=0.0, is_causal=True, **SMALL),
    "dropout of all alike": dict(dropout_rate=0.3, dropout_key=KEY, broadcast_dropout=True),
    "dropout of everything": dict(dropout_rate=1.0, dropout_key=KEY, bias=normal(6, T, S)),
    "distances": dict(distance_bias=distances(7, 4, 700, -350), is_causal=True, **SMALL),
    "distances of one tile": dict(distance_bias=distances(7, 4, 40, -20)),
    "distances with offsets": dict(
        distance_bias=distances(7, 4, 400, -200, jnp.array([3, -140])), is_causal=True, **SMALL
    ),
    "one distance": dict(distance_bias=distances(7, 4, 1, 5), local_window_size=9, **SMALL),
}
BIASES = [(T, S), (1, 4, T, S), (2, 1, T, S), (2, 4, T, 1), (2, 1, 1, S), (1, 4, T, 1), (4, 1, 1)]
SIZES = {
    "K=1": dict(K=1),
    "K=N": dict(K=4, V=16),
    "H=11": dict(H=11, V=13),
    "H=128": dict(N=2, H=128, V=128),
    "H=200": dict(N=2, H=200, V=136),
    "N=1": dict(N=1, K=1, B=3),
}
LENGTHS = (1, 17, 128, 300, 515)


@pytest.mark.parametrize("name", TOGETHER)
def test_features_together(name):
    assert_beside(arrays_of(), **TOGETHER[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_features(name):
    assert_beside(arrays_of(), **FEATURES[name])


@pytest.mark.slow
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_biases(shape):
    assert_beside(arrays_of(), bias=normal(6, *shape), is_causal=len(shape) == 4, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    assert_beside(arrays_of(T=140, **SIZES[name]), is_causal=True, sinks=_sinks(name), **SMALL)


def _sinks(name):
    return normal(8, SIZES[name].get("N", 4))


def call_of_lengths(T, S):
    """Causal, padding, dropout and a bias."""
    lengths = jnp.array([[S], [S // 2 + 1]])
    mask = Mask.causal() & Mask.padding(None, jnp.arange(S)[None] < lengths)
    dropout = dict(dropout_rate=0.3, dropout_key=KEY)
    return dict(mask=mask, bias=normal(6, 1, 4, T, S), **dropout)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["blockwise", "pallas_interpreted"])
@pytest.mark.parametrize(("T", "S"), [(1, 17), (17, 1)])
def test_dropout_of_one_query_or_key(T, S, implementation):
    """No axis of size 1 is one that all share: blocks raised TypeError."""
    assert_beside(arrays_of(T, S), implementation, dropout_rate=0.3, dropout_key=KEY)


@pytest.mark.slow
@pytest.mark.parametrize(("S", "T"), half(LENGTHS, LENGTHS))
def test_lengths(T, S):
    assert_beside(arrays_of(T, S), **call_of_lengths(T, S))


@pytest.mark.slow
@pytest.mark.parametrize("T", LENGTHS)
def test_lengths_in_bfloat16(T):
    S = LENGTHS[-1 - LENGTHS.index(T)]
    assert_beside(arrays_of(T, S, dtype="bfloat16"), **call_of_lengths(T, S))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(soft_cap=3.0),
        {},  # 11^-0.5 stays out of the maximum
        pytest.param(dict(scale=-0.7), marks=pytest.mark.slow),
        pytest.param(dict(scale=0.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bfloat16(options):
    call = dict(is_causal=True, distance_bias=distances(7, 4, 90, -60), **SMALL)
    assert_beside(arrays_of(H=11, dtype="bfloat16"), **call, **options)


def kept(key, start=None, shape=(2, 4, 150, 140), blocks=(128, 128), **call):
    """What dropout keeps: every weight is the same, and the values are the unit vectors."""
    B, N, T, S = shape
    query, key_BSKH = jnp.zeros((B, T, N, 8)), jnp.zeros((B, S, 2, 8))
    value = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, 2, S))
    call |= dict(dropout_rate=0.3, dropout_key=key, dropout_start=start, block_sizes=blocks)
    context = dot_product_attention(
        query, key_BSKH, value, implementation="pallas_interpreted", **call
    )
    return jnp.moveaxis(context, 1, 2) > 0


STARTS = {"none": None, "traced": (1, 2, 45, 11), "far": (7, 0, 2**32 - 40, 2**32 - 3)}


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_dropout_draws_the_bits_of_their_positions(start):
    start_4 = None if STARTS[start] is None else jnp.array(STARTS[start], "uint32")
    run = jax.jit(lambda start: kept(KEY, start), compiler_options=QUICKLY)
    expected = keep_mask(words_of(KEY), 0.3, (2, 4, 150, 140), origin_4=start_4)
    np.testing.assert_array_equal(run(start_4), expected)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [None, (256, 128), (128, 256)])
def test_dropout_is_the_same_for_every_tile(blocks):
    shape = (1, 2, 400, 300)
    run = jax.jit(lambda: kept(KEY, shape=shape, blocks=blocks), compiler_options=QUICKLY)
    np.testing.assert_array_equal(run(), keep_mask(words_of(KEY), 0.3, shape))


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, (3, 5, 50, 7)])
def test_dropout_shared_by_all(start):
    run = jax.jit(lambda start: kept(KEY, start, broadcast_dropout=True), compiler_options=QUICKLY)
    origin_4 = jnp.array(start or (0, 0, 0, 0), "uint32")
    shape = (2, 4, 150, 140)
    expected = keep_mask(words_of(KEY), 0.3, shape, shared=True, origin_4=origin_4)
    np.testing.assert_array_equal(run(None if start is None else origin_4), expected)


@pytest.mark.slow
@pytest.mark.parametrize("starts", [None, [(0, 0, 31, 0), (1, 2, 64, 5), (0, 1, 33, 1)]])
def test_dropout_mapped_over_keys_and_starts(starts):
    keys = jax.random.split(KEY, 3)
    start_34 = None if starts is None else jnp.array(starts, "uint32")
    run = jax.jit(jax.vmap(kept), compiler_options=QUICKLY)
    got = run(keys, start_34) if starts else run(keys)
    for i, key in enumerate(keys):
        origin_4 = None if starts is None else start_34[i]
        expected = keep_mask(words_of(key), 0.3, (2, 4, 150, 140), origin_4=origin_4)
        np.testing.assert_array_equal(got[i], expected)


@pytest.mark.slow
@pytest.mark.parametrize("T", [290, pytest.param(120, marks=pytest.mark.slow)])
def test_the_gradient_in_turns(T, monkeypatch):
    """Of 4 heads a turn takes 1, and 2 of its 3 blocks; or 2 heads whose queries are one block."""
    turns, of = [], backward._turn_of
    spy = lambda *a: turns.append(a[2:4]) or of(*a)
    rows = 256  # of at most 128 features, float32, twice
    monkeypatch.setattr(backward, "BYTES_A_TURN", rows * 128 * 4 * 2)
    monkeypatch.setattr(backward, "_turn_of", spy)
    arrays = arrays_of(T, 260, N=8, H=9, V=10)
    mask = Mask.window(150, 30) & Mask.padding(None, KEYS[:, :260])
    call = dict(bias=normal(6, 1, 8, T, 260), dropout_rate=0.3, dropout_key=KEY)
    assert_beside(arrays, mask=mask, **call, **SMALL)
    assert set(turns) == {(1, 2) if T == 290 else (2, 1)}


AXES = ("query", "key", "value", "bias", "distances", "dropout_key", "padding")


@pytest.mark.slow
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("mapped", [AXES, ("query",), ("bias", "padding"), ("distances", "key")])
def test_mapped_gradients(mapped, B):
    """Whatever is mapped, the result is that of one call after the other."""
    arrays, X, T, N = arrays_of(150, 150, B=3 * B, N=2, K=2), 3, 150, 2
    arrays = {name: x.reshape(X, B, *x.shape[1:]) for name, x in arrays.items()}
    arrays |= dict(bias=normal(3, X, 1, N, T, T), distances=normal(4, X, N, 60))
    keys, pad = jax.random.split(KEY, X), booleans(6, X, B, T)
    data = arrays | dict(dropout_key=keys, padding=pad)
    data = {name: x if name in mapped else x[0] for name, x in data.items()}
    axes = {name: 0 if name in mapped else None for name in data}

    def one(implementation, data):
        data = dict(data)
        pad, key = data.pop("padding"), data.pop("dropout_key")
        mask = Mask.padding(pad, pad) & Mask.causal()
        bias = distances(0, N, 60, -30)
        call = dict(mask=mask, distance_bias=bias, dropout_rate=0.2, dropout_key=key)
        return with_gradients(data, implementation, **call)

    mapped_by = lambda name: jax.jit(
        jax.vmap(lambda x: one(name, x), in_axes=(axes,)), compiler_options=QUICKLY
    )(data)
    got, expected = mapped_by("pallas_interpreted"), mapped_by("reference")
    for i in range(X):
        compare(*({name: x[i] for name, x in y.items()} for y in (got, expected)), 1e-5)
