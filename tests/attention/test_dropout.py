"""Dropout bits: a function of position, of the right rate, independent where they should be."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close
from jax.extend.random import threefry_2x32
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flax_mha import dot_product_attention, explain
from flax_mha.attention.dropout import keep_mask, start_of, words_of
from flax_mha.attention.threefry import threefry

SHAPE = (2, 3, 40, 52)


def mask(rate=0.25, shape=SHAPE, start=(0, 0, 0, 0), dropout_key=None):
    dropout_key = jax.random.key(3) if dropout_key is None else dropout_key
    return np.asarray(keep_mask(words_of(dropout_key), rate, shape, start))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 7, 5), (1, 2, 8, 16), (2, 1, 40, 3)])
@pytest.mark.parametrize("start", [(0, 0, 0, 0), (0, 1, 32, 5), (1, 0, 32, 0)])
def test_any_tile_holds_the_same_bits(shape, start):
    stop = [a + n for a, n in zip(start, shape)]
    if any(b > n for b, n in zip(stop, SHAPE)):
        stop = [min(b, n) for b, n in zip(stop, SHAPE)]
    whole = mask()[tuple(slice(a, b) for a, b in zip(start, stop))]
    tile = mask(shape=tuple(b - a for a, b in zip(start, stop)), start=start)
    np.testing.assert_array_equal(tile, whole)


@pytest.mark.slow
def test_a_traced_start_gives_the_same_bits():
    word_2 = words_of(jax.random.key(3))
    tile = jax.jit(lambda t, s: keep_mask(word_2, 0.25, (2, 3, 8, 12), (0, 0, t, s)))
    np.testing.assert_array_equal(tile(32, 8), mask()[:, :, 32:, 8:20])


def test_the_draws_are_defined_by_the_words_of_their_place():
    """Said a second time, entry by entry: key -> head -> (group of 32 queries, row) -> draw."""
    words = jax.random.bits(jax.random.key(3), (2,), jnp.uint32)
    kept, (T, S) = mask(0.25, (2, 3, 70, 3)), (70, 3)
    for b, n, t, s in [(1, 2, t, t % S) for t in range(0, T, 3)] + [(0, 1, 69, 2)]:
        head = threefry(tuple(words), jnp.uint32(b), jnp.uint32(n))
        group, draw, row = t // 32, t % 32 // 8, t % 8
        word = int(threefry(head, jnp.uint32(group * 8 + row), jnp.uint32(s))[draw // 2])
        bits = word >> 16 if draw % 2 else word & 0xFFFF
        assert kept[b, n, t, s] == (bits < 0.75 * 2**16), (b, n, t, s)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_rate(rate):
    kept = mask(rate, (4, 4, 128, 128))
    sigma = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) <= 5 * sigma + 2**-17


@pytest.mark.slow
def test_every_position_draws_by_itself():
    """No two rows, columns, heads, examples or neighbours share their bits."""
    kept = mask(0.5, (4, 4, 64, 64)).astype(float) * 2 - 1
    for axis, step in itertools.product(range(4), (1, 2, 3)):
        a = np.take(kept, range(kept.shape[axis] - step), axis)
        b = np.take(kept, range(step, kept.shape[axis]), axis)
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size), (axis, step)


def test_keys_matter_and_repeat():
    assert (mask(0.5) == mask(0.5)).all()
    other = mask(0.5, dropout_key=jax.random.key(4))
    assert 0.4 < (mask(0.5) == other).mean() < 0.6


# Of Random123, the authors' own library: (key, counter) and the words after 13 rounds.
KNOWN = [
    ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0xFD36D048, 0x2D17272C)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xBA3E4725, 0xF27D669E)),
]


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_threefry_is_that_of_its_authors(key, counter, words):
    key, counter = (tuple(map(jnp.uint32, x)) for x in (key, counter))
    assert tuple(int(x) for x in threefry(key, *counter)) == words


def test_with_20_rounds_threefry_is_jax_s(monkeypatch):
    """The words that jax.extend gives for the same key and counters."""
    monkeypatch.setattr("flax_mha.attention.threefry.ROUNDS", 20)
    words = jax.random.bits(jax.random.key(0), (4, 1000), jnp.uint32)
    expected = threefry_2x32(words[:2, 0], words[2:])
    np.testing.assert_array_equal(jnp.stack(threefry(words[:2, 0], *words[2:])), expected)


@pytest.mark.parametrize(
    "make", [jax.random.PRNGKey, jax.random.key, lambda s: jax.random.key(s, impl="rbg")]
)
def test_every_kind_of_key_works(make):
    assert 0.6 < mask(0.3, dropout_key=make(0)).mean() < 0.8


@pytest.mark.slow
def test_vmap_over_keys_is_a_loop():
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(lambda dropout_key: keep_mask(words_of(dropout_key), 0.25, SHAPE))(keys)
    for dropout_key, kept in zip(keys, stacked):
        np.testing.assert_array_equal(kept, mask(dropout_key=dropout_key))


@pytest.mark.slow
def test_kept_weights_are_divided_and_the_weights_returned_are_not():
    query, key = jax.random.normal(jax.random.key(0), (2, *SHAPE[:1], 40, 3, 8))
    one_hot = jnp.broadcast_to(jnp.eye(40)[None, :, None], (2, 40, 3, 40))
    call = dict(query=query, key=key, value=one_hot, dropout_rate=0.25, return_weights=True)
    context, weights = dot_product_attention(**call, dropout_key=jax.random.key(3))
    kept = mask(shape=(2, 3, 40, 40))
    np.testing.assert_allclose(context.swapaxes(1, 2), np.where(kept, weights / 0.75, 0), rtol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


# --- one mask for all examples and heads --------------------------------------------------------


@pytest.mark.slow
def test_a_shared_mask_is_that_of_the_first_example_and_head():
    key = jax.random.key(3)
    shared = np.asarray(keep_mask(words_of(key), 0.25, SHAPE, shared=True))
    np.testing.assert_array_equal(shared, np.broadcast_to(mask()[:1, :1], SHAPE))
    tile = keep_mask(words_of(key), 0.25, (1, 2, 8, 5), (1, 1, 32, 7), shared=True)
    np.testing.assert_array_equal(tile, shared[1:, 1:, 32:, 7:12])


RAGGED = (2, 11, 6, 8)
CALLS = [
    {"implementation": "reference"},
    {"implementation": "blockwise", "block_sizes": (4, 3)},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_implementation_shares_one_mask(call):
    """Grouped heads too; forward and gradient; equal for a batch and under vmap."""
    query = jax.random.normal(jax.random.key(0), RAGGED)
    key, value = jax.random.normal(jax.random.key(1), (2, 2, 13, 2, 8))
    drop = {"dropout_rate": 0.25, "dropout_key": jax.random.key(3), "broadcast_dropout": True}
    attend = lambda *arrays: dot_product_attention(*arrays, **drop, **call)
    keep = mask(shape=(1, 1, 11, 13))

    def expected(query, key, value):
        key, value = (jnp.repeat(x, 3, 2) for x in (key, value))
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8, dtype="float32")
        weights = jnp.where(keep, jax.nn.softmax(logits) / 0.75, 0)
        return jnp.einsum("bnts,bsnh->btnh", weights, value)

    with_gradient = lambda f: jax.jit(
        lambda *arrays: (f(*arrays), jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 2))(*arrays))
    )
    whole = with_gradient(attend)(query, key, value)
    assert_trees_close(whole, with_gradient(expected)(query, key, value), "float32")
    each = jax.jit(jax.vmap(attend))(query, key, value)
    assert_trees_close(each, whole[0], "float32")


@pytest.mark.slow
def test_shared_dropout_without_a_key_or_a_rate_is_none():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    quiet = dot_product_attention(x, x, x)
    for call in ({"dropout_rate": 0.5}, {"dropout_key": jax.random.key(3)}):
        output = dot_product_attention(x, x, x, broadcast_dropout=True, **call)
        np.testing.assert_array_equal(output, quiet)
    with pytest.raises(TypeError, match="`broadcast_dropout` must be True or False"):
        dot_product_attention(x, x, x, broadcast_dropout=None)


# --- a shard of a whole: `dropout_start` --------------------------------------------------------

B, T, S, N = 8, 12, 10, 8
DROP = {"dropout_rate": 0.25, "dropout_key": jax.random.key(3)}
REFERENCE = {"implementation": "reference"}
BLOCKS = {"implementation": "blockwise", "block_sizes": (4, 3)}
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize("start", [(0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 14, 5), (1, 0, 29, 50)])
@pytest.mark.parametrize("traced", [False, True])
def test_an_origin_shifts_a_tile_wherever_it_is(start, traced):
    """Also one whose t is no multiple of the four neighbours that are drawn at once."""
    shape, tile = (1, 1, 7, 2), (0, 0, 4, 0)
    origin = start_of(start)
    draw = lambda origin: keep_mask(words_of(jax.random.key(3)), 0.25, shape, tile, False, origin)
    kept = (jax.jit(draw) if traced else draw)(origin)
    b, n, t, s = start
    np.testing.assert_array_equal(kept, mask()[b : b + 1, n : n + 1, t + 4 : t + 11, s : s + 2])


@pytest.mark.slow
def test_positions_beyond_31_bits_count_on():
    """Two tiles that overlap there; and beyond 2^31 the bits are not those of the beginning."""
    word_2 = words_of(jax.random.key(3))
    at = lambda *start: np.asarray(keep_mask(word_2, 0.5, (3, 3, 8, 8), origin_4=start_of(start)))
    for far in (2**31 - 1, 2**32 - 8):
        whole = at(far, far, far, far)
        np.testing.assert_array_equal(
            at(far + 1, far + 2, far + 3, far + 4)[:2, :1, :5, :4], whole[1:, 2:, 3:, 4:]
        )
        assert (whole != at(0, 0, 0, 0)).any()
    traced = jax.jit(lambda t: at_traced(word_2, t))(jnp.int32(2**31 - 1))
    np.testing.assert_array_equal(traced, at(0, 0, 2**31 - 1, 0))


def at_traced(word_2, t):
    return keep_mask(word_2, 0.5, (3, 3, 8, 8), origin_4=start_of((0, 0, t, 0)))


@pytest.mark.slow
def test_a_shared_mask_looks_at_t_and_s_alone():
    word_2 = words_of(jax.random.key(3))
    tile = keep_mask(word_2, 0.25, (2, 2, 8, 5), (1, 1, 0, 0), True, start_of((7, 9, 13, 7)))
    expected = np.broadcast_to(mask()[:1, :1, 13:21, 7:12], tile.shape)
    np.testing.assert_array_equal(tile, expected)


def arrays():
    query, key = (jax.random.normal(jax.random.key(i), (B, n, N, 8)) for i, n in ((0, T), (1, S)))
    one_hot = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, N, S))
    return query, key, one_hot  # the context is the weights that stay


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize(
    ("call", "check_vma"),
    [(REFERENCE, True), (REFERENCE, False), (BLOCKS, False)],
    ids=["reference", "reference unchecked", "blockwise"],
)
def test_a_shard_map_draws_the_bits_of_the_whole(sizes, call, check_vma):
    """Over batch and heads; bit for bit, and the gradient too."""
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), ("data", "model"))
    spec = P("data", None, "model")

    def shard(query, key, value):
        b, _, n, _ = query.shape
        start = (jax.lax.axis_index("data") * b, jax.lax.axis_index("model") * n, 0, 0)
        return dot_product_attention(query, key, value, dropout_start=start, **DROP, **call)

    whole = lambda *x: dot_product_attention(*x, **DROP, **call)
    of_shards = jax.shard_map(
        shard, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma
    )
    both = lambda f: jax.jit(
        lambda *x: (f(*x), jax.grad(lambda *y: (f(*y) ** 2).sum(), (0, 1, 2))(*x))
    )
    (context, gradients), expected = both(of_shards)(*arrays()), both(whole)(*arrays())
    np.testing.assert_array_equal(context == 0, expected[0] == 0)
    assert_trees_close((context, gradients), expected, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "call", [{"implementation": "reference"}, BLOCKS], ids=["reference", "blockwise"]
)
def test_a_length_that_is_cut_anywhere(call):
    """T = 12 over 4 devices: all shards but the first begin at a t that is no multiple of four."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("length",))
    cut = lambda query, key, value: dot_product_attention(
        query,
        key,
        value,
        dropout_start=(0, 0, jax.lax.axis_index("length") * query.shape[1], 0),
        **DROP,
        **call,
    )
    specs = dict(in_specs=(P(None, "length"), P(), P()), out_specs=P(None, "length"))
    context = jax.jit(jax.shard_map(cut, mesh=mesh, check_vma=False, **specs))(*arrays())
    whole = dot_product_attention(*arrays(), **DROP, **call)
    np.testing.assert_array_equal(context == 0, whole == 0)
    rows = dot_product_attention(
        *(x[:, -5:] if i == 0 else x for i, x in enumerate(arrays())),
        **DROP,
        **call,
        dropout_start=[0, 0, T - 5, 0],
    )
    np.testing.assert_array_equal(rows == 0, whole[:, -5:] == 0)


@pytest.mark.slow
def test_without_a_start_every_shard_draws_the_bits_of_the_first():
    """As the docstring says; a key of its own is the other remedy."""
    cut = [x.reshape(4, 2, *x.shape[1:]) for x in arrays()]
    same = jax.pmap(lambda *x: dot_product_attention(*x, **DROP), axis_name="data")(*cut)
    np.testing.assert_array_equal(same == 0, np.broadcast_to(same[:1] == 0, same.shape))

    def started(query, key, value):
        start = (jax.lax.axis_index("data") * 2, 0, 0, 0)
        return dot_product_attention(query, key, value, dropout_start=start, **DROP)

    whole = dot_product_attention(*arrays(), **DROP)
    mapped = jax.pmap(started, axis_name="data")(*cut)
    np.testing.assert_array_equal(mapped.reshape(whole.shape) == 0, whole == 0)


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (
            3,
            TypeError,
            r"four integers \(b, n, t, s\), each in \[0, 2\^32\)\. Received: dropout_start of 3",
        ),
        ((0, 0, 0), TypeError, r"dropout_start of \(0, 0, 0\)\. Any of them may be traced"),
        (jnp.zeros((2, 4), int), TypeError, r"dropout_start of shape \(2, 4\)"),
        (jnp.zeros(4), TypeError, r"float32 of shape \(\) in dropout_start"),
        ((0, 0, 1.5, 0), TypeError, r"`dropout_start` must be an integer"),
        ((0, True, 0, 0), TypeError, r"`dropout_start` must be an integer"),
        ((0, "n", 0, 0), TypeError, r"`dropout_start` must be an integer"),
        ((0, 0, -4, 0), ValueError, r"Received: -4 in dropout_start"),
        ((2**32, 0, 0, 0), ValueError, r"Received: 4294967296 in dropout_start"),
    ],
    ids=str,
)
def test_a_start_that_is_none_is_refused(start, error, message):
    x = jnp.ones((2, 4, 2, 8))
    for attend in (dot_product_attention, explain):
        with pytest.raises(error, match=message):
            attend(x, x, x, dropout_start=start)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_rate_of_zero_draws_nothing(implementation):
    """Its results would be the same, so the program must show it: nobody reads the key."""
    x = jnp.ones((1, 4, 2, 8))

    def program(rate):
        call = dict(dropout_rate=rate, implementation=implementation)
        attend = lambda key: dot_product_attention(x, x, x, dropout_key=key, **call)
        return str(jax.make_jaxpr(attend)(jax.random.key(0)))

    assert "random_" in program(0.1)
    assert "random_" not in program(0.0)
