"""Functions of pairs under transformations: what is closed over is data, and is never retraced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal
from jax import export
from pair_examples import CASES, MASKS, PLAIN, SCORES, closed
from pair_oracles import attend, expected, floating, probe_of

from flax_mha import Mask, block_mask, dot_product_attention, explain

X = {name: jnp.asarray(x) for name, x in MASKS["causal"].all_arrays().items()}
QKV = [X["query"], X["key"], X["value"]]
Z = MASKS["causal"].sizes()
DISTANCE = np.arange(Z.S) - np.arange(Z.T)[:, None]


@pytest.mark.slow
@PLAIN
@pytest.mark.parametrize("name", ["score, relative table", "score, learned cap", "mask, document"])
def test_vmap_over_what_is_closed_over(name, implementation, blocks):
    """Three tables at once are three calls, in value and in gradient."""
    example = CASES[name]
    sizes = example.sizes()
    arrays = {name: jnp.asarray(x) for name, x in example.all_arrays().items()}
    qkv = {name: arrays.pop(name) for name in ("query", "key", "value")}
    stacked = {name: jnp.stack([x, x[::-1], -x]) for name, x in arrays.items()}
    if example.kind == "score":
        stacked = {name: abs(x) + 0.5 for name, x in stacked.items()}

    def one(arrays):
        call = {"implementation": implementation, "block_sizes": blocks}
        function = lambda arrays: attend(example, sizes, qkv | arrays, **call)
        moving, fixed = floating(arrays)
        loss = lambda moving: (function(moving | fixed) ** 2).sum()
        return function(arrays), jax.grad(loss)(moving)

    together = jax.jit(jax.vmap(one))(stacked)
    for i in range(3):
        alone = jax.jit(one)({name: x[i] for name, x in stacked.items()})
        for ours, wanted in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert_close(ours[i], wanted, "float32", name)


@pytest.mark.slow
@PLAIN
@pytest.mark.parametrize("symbols", ["b", "b, t"])
def test_export_leaves_sizes_open(symbols, implementation, blocks):
    """Of what is closed over too: an index that is looked up may then be below 0."""
    open_sizes = dict(zip(symbols.split(", "), export.symbolic_shape(symbols)))
    B, T = (open_sizes.get(letter, size) for letter, size in (("b", 2), ("t", 30)))
    types = [jax.ShapeDtypeStruct(x, "float32") for x in ((B, T, 2, 8), (2, T))]
    options = {"implementation": implementation, "block_sizes": blocks}

    def loss(x, decay, ids):
        mask = Mask.function(lambda b, n, t, s: (ids[b, t] == ids[b, s]) & (s <= t))
        score = lambda x, b, n, t, s: x + decay[n, t] - decay[n, s]
        return (dot_product_attention(x, x, x, mask=mask, score=score, **options) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    program = export.export(gradient)(*types, jax.ShapeDtypeStruct((B, T), "int32"))
    arrays = normal(0, 2, 30, 2, 8), normal(1, 2, 30), jnp.arange(60).reshape(2, 30) // 11
    for ours, wanted in zip(program.call(*arrays), gradient(*arrays), strict=True):
        assert_close(ours, wanted, "float32", symbols)


@pytest.mark.slow
@PLAIN
def test_vmap_over_the_examples(implementation, blocks):
    """The ids of one example, under vmap, are the ids of all with `b`."""
    ids = closed("mask, document")
    options = {"implementation": implementation, "block_sizes": blocks}

    def one(query, key, value, query_ids, key_ids):
        mask = Mask.function(lambda b, n, t, s: query_ids[t] == key_ids[s])
        return dot_product_attention(query, key, value, mask=mask, **options)

    result = jax.vmap(one)(*QKV, ids["query_ids"], ids["key_ids"])
    assert_close(result, expected(MASKS["document"])["context"], "float32")


@pytest.mark.slow
@PLAIN
def test_the_gradient_as_a_user_takes_it(implementation, blocks):
    def loss(table):
        context = dot_product_attention(
            *QKV,
            score=lambda x, b, n, t, s: x + table[n, s - t + Z.T - 1],
            implementation=implementation,
            block_sizes=blocks,
        )
        return (context * probe_of(Z).astype("float32")).sum()

    table = closed("score, relative table")["table"]
    wanted = expected(SCORES["relative table"])["d_table"]
    assert_close(jax.grad(loss)(table), wanted, "float32")
    assert_close(jax.jit(jax.grad(loss))(table), wanted, "float32", "jit")


@PLAIN
def test_as_a_user_of_plain_jax_writes_it(implementation, blocks):
    """Without strict promotion an integer times a float is a float, and 0.1 is of any dtype."""
    slopes = closed("score, ALiBi")["slopes"]
    options = {"implementation": implementation, "block_sizes": blocks}
    with jax.numpy_dtype_promotion("standard"):
        score = lambda x, b, n, t, s: x - slopes[n] * abs(t - s)
        result = dot_product_attention(*QKV, score=score, **options)
    assert_close(result, expected(SCORES["ALiBi"])["context"], "float32")


@PLAIN
def test_the_implementation_keeps_a_mask_of_numbers_apart(implementation, blocks):
    """Two functions of one code and other numbers: no program of the first serves the second."""
    for width in (2, 6):
        mask = Mask.function(lambda b, n, t, s, width=width: abs(t - s) < width)
        options = {"implementation": implementation, "block_sizes": blocks}
        result = dot_product_attention(*QKV, mask=mask, **options)
        wanted = dot_product_attention(*QKV, mask=abs(DISTANCE) < width, implementation="reference")
        assert_close(result, wanted, "float32", str(width))


class Window:
    def __init__(self, width):
        self.width = width

    def mask(self, b, n, t, s):
        return abs(t - s) < self.width

    def score(self, x, b, n, t, s):
        return jnp.where(abs(t - s) < self.width, x, -jnp.inf)


@PLAIN
@pytest.mark.parametrize("kind", ["mask", "score"])
def test_what_is_remembered_of_a_function_is_not_its_name(kind, implementation, blocks):
    """JAX keeps the program of a function by its identity; a number that it reads may change.

    Of a mask that was made before the change, the old number holds.
    """
    window = Window(2)
    options = {"implementation": implementation, "block_sizes": blocks}

    def assert_of(width, call):
        dense = abs(DISTANCE) < width
        wanted = dot_product_attention(*QKV, mask=dense, implementation="reference")
        result = dot_product_attention(*QKV, **call, **options)
        assert_close(result, wanted, "float32", f"{width}")

    call = lambda: (
        {"score": window.score} if kind == "score" else {"mask": Mask.function(window.mask)}
    )
    before = call()
    assert_of(2, before)
    window.width = 6
    assert_of(6, call())
    assert_of(6 if kind == "score" else 2, before)


def documents(ids):
    return Mask.function(lambda b, n, t, s: ids[b, t] == ids[b, s])


def three_ids():
    return [
        jnp.asarray(np.sort(np.random.default_rng(i).integers(0, 4, (2, 19)))) for i in range(3)
    ]


def dense_documents(ids):
    return (ids[:, None, :, None] == ids[:, None, None, :]) & np.ones((1, 4, 1, 1), bool)


@pytest.mark.slow
@PLAIN
@pytest.mark.parametrize(
    "join",
    [lambda m: m, lambda m: Mask.causal() & ~m, lambda m: m | Mask.window(2, 2)],
    ids=["alone", "complement", "union"],
)
def test_one_trace_while_a_mask_s_arrays_change(join, implementation, blocks):
    """A mask is a pytree: its arrays are data, and what its function does is the same program."""
    traces = []
    query = QKV[0]

    @jax.jit
    def run(query, mask):
        traces.append(mask)
        options = {"implementation": implementation, "block_sizes": blocks}
        return dot_product_attention(query, query, query, mask=mask, **options)

    for ids in three_ids():
        dense = join(Mask.dense(dense_documents(ids)))
        wanted = dot_product_attention(query, query, query, mask=dense, implementation="reference")
        assert_close(run(query, join(documents(ids))), wanted, "float32")
    assert len(traces) == 1
    run(query, join(Mask.function(lambda b, n, t, s: ids[b, t] >= ids[b, s])))
    assert len(traces) == 2  # another function is another program


@PLAIN
def test_one_trace_of_functions_made_within_jit(implementation, blocks):
    traces = []
    query = QKV[0]

    @jax.jit
    def run(query, ids, slopes):
        traces.append(ids)
        options = {"implementation": implementation, "block_sizes": blocks}
        score = lambda x, b, n, t, s: x - slopes[n] * abs(t - s).astype(x.dtype)
        return dot_product_attention(
            query, query, query, mask=documents(ids), score=score, **options
        )

    for i, ids in enumerate(three_ids()):
        slopes = normal(i, 4)
        distance = abs(np.arange(19) - np.arange(19)[:, None]).astype("float32")
        bias = -np.asarray(slopes)[:, None, None] * distance
        call = {"mask": dense_documents(ids), "bias": jnp.asarray(bias)}
        wanted = dot_product_attention(query, query, query, implementation="reference", **call)
        assert_close(run(query, ids, slopes), wanted, "float32")
    assert len(traces) == 1


def test_the_tree_of_a_mask_holds_its_arrays():
    """They are leaves, of which `jax.tree.map` makes the mask of others."""
    one, other, _ = three_ids()
    mask = documents(one)
    leaves, structure = jax.tree.flatten(mask)
    assert any(leaf is one or leaf.shape == one.shape for leaf in leaves)
    assert structure == jax.tree.structure(documents(other))
    assert hash(structure) == hash(jax.tree.structure(documents(other)))
    shown = documents(other).as_array(19, 19, B=2)
    again = jax.tree.unflatten(structure, jax.tree.leaves(documents(other)))
    np.testing.assert_array_equal(again.as_array(19, 19, B=2), shown)


# --- what is asked for, and memory --------------------------------------------------------------


def test_explain_takes_functions():
    """And says how it will find the blocks: a user who waits for them can see why."""
    causal, score, table = lambda b, n, t, s: s <= t, lambda x, b, n, t, s: x, jnp.ones((19, 23))
    looked_up = Mask.function(lambda b, n, t, s: table[t, s] > 0)
    kept = Mask.function(causal, blocks=block_mask(causal, 19, 23))
    for mask, how in (
        (Mask.causal() | Mask.window(3, 3), "by intervals"),
        (looked_up, "by asking for every pair (dynamic_slice of an array)"),
        (kept, "as given"),
        (kept & looked_up, "as given and by asking"),
    ):
        reasons = explain(*QKV, mask=mask, score=score)
        assert reasons["reference"].startswith("ok")
        assert f"blocks of mask functions {how}" in reasons["blockwise"]


LONG = 16384
MATRIX = 4 * LONG**2  # bytes of one [T, S] of floats


def temporaries(implementation):
    """Bytes of the gradient to a table that a score looks up by distance; compiled, not run."""

    def loss(table, x):
        score = lambda logit, b, n, t, s: logit + table[n, s - t + LONG - 1]
        call = {"score": score, "is_causal": True, "implementation": implementation}
        return (dot_product_attention(x, x, x, **call) ** 2).sum()

    x = jax.ShapeDtypeStruct((1, LONG, 1, 32), jnp.float32)
    table = jax.ShapeDtypeStruct((1, 2 * LONG - 1), jnp.float32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(table, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_a_table_s_gradient_needs_no_matrix():
    assert temporaries("blockwise") < MATRIX / 16


@pytest.mark.slow
def test_the_reference_s_does():
    """The control: what is measured is the matrix."""
    assert temporaries("reference") >= MATRIX
