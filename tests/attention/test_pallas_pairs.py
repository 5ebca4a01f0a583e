"""Functions of pairs in the TPU kernel, interpreted: beside the reference, tile by tile.

Each kind of mask and score is a row of `test_pair_functions`; here is what a kernel could get wrong
besides: holes between tiles, rows that begin elsewhere, what else a call has, what is refused.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import booleans, normal
from kernel_cases import QUICKLY, compare, distances

from flax_mha import Mask, block_mask, dot_product_attention, explain
from flax_mha.attention.pallas_tpu import backward, visits
from flax_mha.attention.pallas_tpu.plan import Plan
from flax_mha.attention.pallas_tpu.spans import Tiles

T, S = 400, 520
SMALL = (128, 128)  # of 4 x 5 tiles
KEY = jax.random.key(5)
IDS = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, (2, S)), 1), "int32")
ARRAYS = {
    "query": normal(0, 2, T, 4, 16),
    "key": normal(1, 2, S, 2, 16),
    "value": normal(2, 2, S, 2, 24),
}


def far(x, t, s):
    return jnp.abs(t - s).astype(x.dtype)


def both(arrays, call):
    """(the kernel's, the reference's) {context, every gradient} of `call(arrays)`."""

    def results(implementation, arrays):
        def loss(arrays):
            qkv = [arrays[name] for name in ("query", "key", "value")]
            blocks = None if implementation == "reference" else SMALL
            options = dict(implementation=implementation, return_residuals=True)
            context, residuals = dot_product_attention(
                *qkv, block_sizes=blocks, **options, **call(arrays)
            )
            total = (context.astype("float32") * normal(99, *context.shape)).sum()
            outputs = {"context": context, "row_max": residuals[0], "row_sum": residuals[1]}
            return total + jnp.log1p(residuals[1]).sum(), outputs

        gradients, outputs = jax.grad(loss, has_aux=True)(arrays)
        return outputs | {f"d_{name}": x for name, x in gradients.items()}

    compiled = lambda name, how: jax.jit(
        lambda arrays: results(name, arrays), compiler_options=how
    )(arrays)
    return compiled("pallas_interpreted", QUICKLY), compiled("reference", None)


def assert_same(call, more=None, tolerance=1e-5, arrays=ARRAYS):
    ours, wanted = both(arrays | (more or {}), call)
    compare(ours, wanted, tolerance)


# --- all at once --------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_at_once():
    """A mask, a union, a score with floats of every kind, biases, a cap, dropout in between."""
    more = {
        "bias": normal(6, 1, 4, T, S),
        "slopes": abs(normal(7, 4)),
        "of_query": normal(8, 2, T),
        "of_key": normal(9, 4, S),
        "gain": jnp.float32(1.2),
        "distances": normal(10, 4, 90),
    }

    def call(a):
        def score(x, b, n, t, s):
            x = a["gain"] * x - 0.01 * a["slopes"][n] * far(x, t, s)
            return x + 0.1 * jax.nn.relu(a["of_query"][b, t] - a["of_key"][n, s])

        bias = distances(7, 4, 90, -60, jnp.array([3, 40]))
        mask = Mask.function(lambda b, n, t, s: (t + s) % (n + 2) < 2)
        mask &= (Mask.causal(jnp.array([100, 0])) | Mask.prefix(jnp.array([30, 0]))) & Mask.padding(
            None, jnp.arange(S)[None] < jnp.array([[450], [S]])
        )
        return dict(
            mask=mask & Mask.segments(IDS[:, :T], IDS),
            score=score,
            bias=a["bias"],
            distance_bias=type(bias)(a["distances"], bias.query_offset, bias.first),
            soft_cap=2.0,
            dropout_rate=0.3,
            dropout_key=KEY,
            dropout_start=(1, 2, 37, 11),
        )

    assert_same(call, more)


# --- holes --------------------------------------------------------------------------------------

HOLES = {
    "global and window": lambda b, n, t, s: (jnp.abs(t - s) < 60) | (s < 9) | (t < 5),
    "far apart": lambda b, n, t, s: (s < 50) | (s > 480),
    "of one head": lambda b, n, t, s: jnp.where(n == 1, s > 400, s < 100),
    "of one example": lambda b, n, t, s: jnp.where(b == 0, jnp.abs(t - s) < 9, s > 450),
    "rows that see nobody": lambda b, n, t, s: (s <= t) & ((t < 100) | (t > 300)),
    "columns that nobody sees": lambda b, n, t, s: (s < 90) | (s > 400),
    "nobody": lambda b, n, t, s: s < 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [x if x == "global and window" else pytest.param(x, marks=pytest.mark.slow) for x in HOLES],
)
def test_holes(name):
    mask = Mask.function(HOLES[name])
    assert_same(lambda a: dict(mask=mask, bias=a["bias"]), {"bias": normal(3, 1, 4, 1, S)})


@pytest.mark.slow
def test_a_tile_in_a_hole_is_not_computed():
    """A weight of 0 times NaN is NaN, and the values of keys 128 ... 383 are met by no tile."""
    value = ARRAYS["value"].at[:, 128:384].set(jnp.nan)
    mask = Mask.function(lambda b, n, t, s: (s < 50) | (s > 390))
    call = dict(mask=mask, implementation="pallas_interpreted")
    run = lambda value: dot_product_attention(
        ARRAYS["query"], ARRAYS["key"], value, block_sizes=SMALL, **call
    )
    assert np.isfinite(run(value)).all()
    one_tile = value.at[:, :128].set(ARRAYS["value"][:, :128])
    whole = Mask.function(lambda b, n, t, s: s != 200)  # the control: it meets them
    call["mask"] = whole
    assert np.isnan(run(one_tile)).any()


def plan_of(Q, J):
    sizes = dict(B=1, K=1, G=1, T=128 * Q, S=128 * J, H=8, V=8, t=128, s=128, band=(None, None))
    how = dict(scale=1.0, soft_cap=None, rate=0.0, precision=None, interpret=True)
    return Plan(**sizes, **how)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_lists_hold_each_tile_once(seed):
    Q, J, plan = 4, 7, plan_of(4, 7)
    some = booleans(seed, 2, Q, J, share=0.4)
    some = some.at[0, 1].set(False)
    whole = some & booleans(seed + 10, 2, Q, J)
    codes = visits.codes(Tiles(some, whole))
    rows = np.asarray(visits.by_queries(plan, codes)).reshape(2, Q, 1 + J)
    columns = np.asarray(visits.by_keys(plan, codes, 1, 2)).reshape(2, J, 1 + Q)
    near = np.asarray(visits.nearest(plan, codes)).reshape(2, Q, J)
    for b in range(2):
        for i in range(Q):
            count, listed = rows[b, i, 0], rows[b, i, 1:]
            wanted = [2 * j + int(whole[b, i, j]) for j in np.flatnonzero(some[b, i])]
            assert listed[:count].tolist() == wanted
            found = [j for j in range(J) if near[b, i, j] >> 1 == j]
            assert found == np.flatnonzero(some[b, i]).tolist()
            assert [near[b, i, j] & 1 for j in found] == [x & 1 for x in wanted]
        for j in range(J):
            count, listed = columns[b, j, 0], columns[b, j, 1:]
            wanted = [i for i in (1, 2) if some[b, i, j]]  # of the turn from 1 on, of two blocks
            assert (listed[:count] >> 1).tolist() == wanted
    assert visits.most(visits.by_queries(plan, codes), Q) == some.sum(2).max()


def test_of_nothing_one_step_is_taken():
    """A grid of no steps would write no result."""
    plan, none = plan_of(2, 3), jnp.zeros((1, 2, 3), bool)
    listed = visits.by_queries(plan, visits.codes(Tiles(none, none)))
    assert visits.most(listed, 2) == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["no lists", "turns"])
def test_without_lists_and_in_turns(what, monkeypatch):
    if what == "no lists":
        monkeypatch.setattr(visits, "BYTES", 0)
    else:
        rows = 256  # of the 512 that four tiles have
        monkeypatch.setattr(backward, "BYTES_A_TURN", rows * 128 * 4 * 2)
    mask = Mask.function(lambda b, n, t, s: (jnp.abs(t - s) < 60) | (s < 9) | (t < 3))
    score = lambda a: lambda x, b, n, t, s: x - a["slopes"][n] * far(x, t, s)
    assert_same(
        lambda a: dict(mask=mask, score=score(a), dropout_rate=0.3, dropout_key=KEY),
        {"slopes": 0.01 * abs(normal(7, 4))},
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 37])
def test_blocks_that_were_kept_count_queries_from_0(start):
    """With dropout the tiles begin up to 31 rows earlier, blocks of another size do not."""
    near = lambda b, n, t, s: jnp.abs(t - s) < 20
    mask = Mask.function(near, blocks=block_mask(near, T, S, block_size=64))
    call = dict(dropout_rate=0.3, dropout_key=KEY, dropout_start=(0, 0, start, 0))
    assert_same(lambda a: dict(mask=mask, **call))


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_and_columns_that_are_filled_up_make_no_nan():
    """A filled row's query is 0: there the logarithm has no finite slope."""
    arrays = {name: abs(x) for name, x in ARRAYS.items()}  # no other logit is near 0
    score = lambda a: lambda x, b, n, t, s: jnp.log(x) * a["gain"][n]
    mask = Mask.function(lambda b, n, t, s: s <= t + 100)
    more = {"gain": abs(normal(7, 4))}
    assert_same(lambda a: dict(mask=mask, score=score(a)), more, arrays=arrays)


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [("slopes",), ("of_query", "query"), ("of_key",)])
def test_mapped_gradients(mapped):
    """Whatever is mapped, the result is that of one call after the other."""
    X, size = 3, (1, 150, 2, 8)
    data = {name: normal(i, X, *size) for i, name in enumerate(("query", "key", "value"))}
    data |= dict(slopes=normal(4, X, 2), of_query=normal(5, X, 150), of_key=normal(6, X, 2, 150))
    data = {name: x if name in mapped else x[0] for name, x in data.items()}
    axes = {name: 0 if name in mapped else None for name in data}

    def one(implementation, data):
        def loss(a):
            def score(x, b, n, t, s):
                return x * a["slopes"][n] + a["of_query"][t] * a["of_key"][n, s]

            mask = Mask.function(lambda b, n, t, s: (s <= t) & (a["of_query"][t] < 1))
            options = dict(implementation=implementation, mask=mask, score=score)
            context = dot_product_attention(a["query"], a["key"], a["value"], **options)
            return (context * normal(99, *context.shape)).sum()

        return jax.grad(loss)(data)

    run = lambda name, how: jax.jit(
        jax.vmap(lambda data: one(name, data), in_axes=(axes,)), compiler_options=how
    )(data)
    ours, wanted = run("pallas_interpreted", QUICKLY), run("reference", None)
    for name, x in wanted.items():
        error, scale = abs(ours[name] - x).max(), abs(x).max()
        assert error <= 1e-5 * scale, f"{name}: {error} of {scale}"


@pytest.mark.slow
def test_16_bits():
    arrays = {name: x.astype("bfloat16") for name, x in ARRAYS.items()}
    more = {"slopes": (0.01 * abs(normal(7, 4))).astype("bfloat16")}

    def call(a):
        slopes = a["slopes"]
        score = lambda x, b, n, t, s: x - slopes[n].astype(x.dtype) * far(x, t, s)
        return dict(mask=Mask.function(lambda b, n, t, s: s <= t + 9), score=score)

    ours, wanted = both(arrays | more, call)
    assert ours["d_slopes"].dtype == ours["context"].dtype == "bfloat16"
    ours, wanted = ({n: x.astype("float32") for n, x in y.items()} for y in (ours, wanted))
    compare(ours, wanted, 3e-2)


# --- steps --------------------------------------------------------------------------------------

STEPS = {
    "branches": lambda t, s: jax.lax.cond(s > t, lambda: (t + s) % 3 > 0, lambda: t % 2 == 0),
    "three cases": lambda t, s: jax.lax.switch(
        abs(t - s) % 3, [lambda: t > s, lambda: t < s, lambda: s < 80]
    ),
    "floors": lambda t, s: (t - s) // 7 == -3,
    "signs": lambda t, s: jnp.sign(t - s) * jnp.sign(t + s - 300).astype("int32") >= 0,
    "unsigned": lambda t, s: (
        jnp.clip(
            jnp.maximum((t - s).astype("uint32"), jnp.uint32(9)), jnp.uint32(5), jnp.uint32(90)
        )
        < 90
    ),
    "extremes of booleans": lambda t, s: jnp.maximum(t > s, jnp.minimum(s < 90, t < 9)),
    "bits": lambda t, s: jax.lax.population_count(t ^ s) + jax.lax.clz(t & s) < 30,
    "16 bits": lambda t, s: (t - s).astype("bfloat16") % 5 < jnp.bfloat16(2),
    "logarithms": lambda t, s: jnp.log2((t + s + 1).astype("float32")) < 8,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_steps_that_are_written_in_others(name):
    mask = Mask.function(lambda b, n, t, s: STEPS[name](t, s))
    run = lambda name, blocks: dot_product_attention(
        **ARRAYS, mask=mask, implementation=name, block_sizes=blocks
    )
    np.testing.assert_allclose(run("pallas_interpreted", SMALL), run("reference", None), atol=2e-6)


TABLE = normal(3, T + S)
REFUSED = {
    "a table": (
        dict(score=lambda x, b, n, t, s: x + TABLE[t - s + S]),
        r"score looks up.*gather|score looks up.*dynamic_slice",
    ),
    "a mask's table": (
        dict(mask=Mask.function(lambda b, n, t, s: TABLE[t - s + S] > 0)),
        r"mask looks up an array",
    ),
    "a step": (dict(score=lambda x, b, n, t, s: jnp.expm1(x)), r"score takes a step.*`expm1`"),
    "a step of the derivative": (
        dict(score=lambda x, b, n, t, s: jnp.arctan(x)),
        r"score takes a step.*`atan`",
    ),
    "a loop": (
        dict(mask=Mask.function(lambda b, n, t, s: jnp.gcd(t, s) == 1)),
        r"mask takes a step.*`while`",
    ),
    "small integers": (
        dict(mask=Mask.function(lambda b, n, t, s: (t - s).astype("int8") < 3)),
        r"mask takes a step.*numbers of int8",
    ),
    "unsigned of floats": (
        dict(mask=Mask.function(lambda b, n, t, s: (t + s).astype("float32").astype("uint32") < 3)),
        r"mask takes a step.*between uint32 and floats",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, reason = REFUSED[name]
    with pytest.raises(NotImplementedError, match=reason):
        dot_product_attention(**ARRAYS, implementation="pallas_tpu", **call)
    told = explain(**ARRAYS, platform="tpu", **call)
    assert told["pallas_tpu"] != "ok"
    assert "None chooses it" in told["blockwise"]
