"""Interval arithmetic never says too little: against every pair, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha.core.pairs.blocks import Grid, by_evaluation, by_intervals, reason_to_evaluate
from flax_mha.core.pairs.function import mask_function
from flax_mha.core.pairs.intervals import RULES
from flax_mha.core.pairs.separated import separated

B, N, T, S = 2, 3, 26, 35
RNG = np.random.default_rng(0)
IDS = jnp.asarray(np.sort(RNG.integers(0, 5, (B, S))), "int32")
WIDTHS = jnp.array([1, 6, 20])
FLOATS = jnp.asarray(RNG.normal(size=S), "float32")
BROKEN = FLOATS.at[3].set(jnp.nan).at[20].set(jnp.inf)
BIG = jnp.asarray(2**31 - 1 - np.arange(S), "int32")
FLAGS = jnp.asarray(RNG.random(S) < 0.3)
PERIOD = jnp.int32(7)


def real(x):
    return x.astype("float32")


EXACT = {
    "causal": lambda b, n, t, s: s <= t,
    "window": lambda b, n, t, s: (s <= t) & (t - s < 5),
    "document": lambda b, n, t, s: IDS[b, t] == IDS[b, s],
    "widths of heads": lambda b, n, t, s: jnp.abs(t - s) < WIDTHS[n],
    "not, differs, either": lambda b, n, t, s: ~((IDS[b, t] != IDS[b, s]) ^ (s > t)),
    "select": lambda b, n, t, s: jnp.where(t < 9, s < 4, s > t),
    "square": lambda b, n, t, s: (t - s) ** 2 < 10,
    "cube": lambda b, n, t, s: (t - s) ** 3 < -10,
    "maximum, quotient": lambda b, n, t, s: jax.lax.div(jnp.maximum(t, s), jnp.int32(4)) < 2,
    "clip": lambda b, n, t, s: jnp.clip(s - t, -3, 3) == 3,
    "floats": lambda b, n, t, s: (0.1 * real(t) + 0.3 * real(s)) ** 2 < 3.3,
    "negative": lambda b, n, t, s: -(t - s) < 5,
    "either": lambda b, n, t, s: (s > t + 3) | (t > s + 3),
    "squared": lambda b, n, t, s: jnp.square(t - s) > 20,
    "clamped": lambda b, n, t, s: jax.lax.clamp(jnp.int32(-2), t - s, jnp.int32(4)) == 4,
    "constant": lambda b, n, t, s: True,
    "never": lambda b, n, t, s: s < 0,
    "of the key": lambda b, n, t, s: FLAGS[s],
}
SOUND = {
    "dilated": lambda b, n, t, s: ((t - s) % 5 == 0) & (s <= t),
    "neighbourhood": lambda b, n, t, s: (abs(t // 6 - s // 6) <= 1) & (abs(t % 6 - s % 6) <= 1),
    "truncated remainder": lambda b, n, t, s: jax.lax.rem(t - s, jnp.int32(5)) == -2,
    "a period that is data": lambda b, n, t, s: (t + s) % PERIOD < 2,
    "a period of zero": lambda b, n, t, s: jax.lax.rem(t - s, PERIOD - 7) == t - s,
    "products": lambda b, n, t, s: FLOATS[t] * FLOATS[s] > 0.7,
    "wraps around": lambda b, n, t, s: t * 1103515245 + s * 12345 < 0,
    "at the end of int32": lambda b, n, t, s: BIG[t] + s < 0,
    "least int32": lambda b, n, t, s: abs(-BIG[t] - 1 - s) < 0,
    "unsigned": lambda b, n, t, s: t.astype("uint32") - s.astype("uint32") < 5,
    "narrow": lambda b, n, t, s: (40 * (t - s)).astype("int8") > 0,
    "NaN and Inf": lambda b, n, t, s: ~(BROKEN[t] * real(s) > 0),
    "NaN by Inf": lambda b, n, t, s: ~(BROKEN[t] - BROKEN[s] <= 1e9),
    "root of a negative": lambda b, n, t, s: ~(jnp.sqrt(FLOATS[t] + FLOATS[s]) >= 0),
    "rounded": lambda b, n, t, s: jnp.round(0.3 * real(t) - 0.2 * real(s)) == 1,
    "floor, ceil, sign": lambda b, n, t, s: (
        jnp.floor(0.3 * real(t - s)) + jnp.ceil(0.1 * real(t + s)) * jnp.sign(real(t - s)) < 3
    ),
    "of a boolean": lambda b, n, t, s: (s <= t).astype("int32") + FLAGS[t].astype("int32") > 1,
    "a number as boolean": lambda b, n, t, s: (t - s).astype(bool),
    "bits": lambda b, n, t, s: (t ^ s) & 1 == 0,
    "two booleans": lambda b, n, t, s: FLAGS[t] == FLAGS[s],
}
# What it names as beyond it.
WITHOUT_RULE = {
    "exp": lambda b, n, t, s: jnp.exp(0.1 * real(t - s)) > 2,
    "dynamic_slice of an array": lambda b, n, t, s: FLAGS[abs(t - s)],
    "rem by what is no constant": lambda b, n, t, s: jax.lax.rem(t, s + 1) == 0,
}
GRIDS = [(4, 4), (5, 7), (26, 35), (1, 1), (40, 3)]


def separate(function):
    places = {x: jnp.arange(n, dtype="int32") for x, n in zip("bnts", (B, N, T, S))}
    return separated(mask_function(function), places)


def asked(function, grid):
    """(some, whole) of each block, by every pair."""
    b, n, t, s = np.meshgrid(*map(np.arange, (B, N, T, S)), indexing="ij")
    index = [jnp.asarray(x, "int32") for x in (b, n, t, s)]
    for _ in range(4):
        function = jax.vmap(function)
    allowed = np.asarray(jnp.broadcast_to(jnp.asarray(function(*index)), b.shape))
    Q, J = grid.shape
    some, whole = np.zeros((2, B, N, Q, J), bool)
    for i in range(Q):
        for j in range(J):
            rows, columns = slice(i * grid.t, (i + 1) * grid.t), slice(j * grid.s, (j + 1) * grid.s)
            block = allowed[:, :, rows, columns]
            some[:, :, i, j], whole[:, :, i, j] = block.any((2, 3)), block.all((2, 3))
    return some, whole


@pytest.mark.parametrize("block", GRIDS, ids=str)
@pytest.mark.parametrize("name", [*EXACT, *SOUND])
def test_no_block_that_is_needed_is_left_out(name, block):
    function, grid = (EXACT | SOUND)[name], Grid(T, S, *block)
    some, whole = asked(function, grid)
    told = by_intervals(separate(function), grid)
    assert not np.any(some & ~np.asarray(told.some)), "a pair that may attend is left out"
    assert not np.any(np.asarray(told.whole) & ~whole), "a pair that may not attend is let in"


@pytest.mark.parametrize("block", GRIDS[:2], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_where_query_and_key_stand_once_nothing_is_lost(name, block):
    """Else a mask would be walked as if it allowed everything, and nobody would see it."""
    function, grid = EXACT[name], Grid(T, S, *block)
    some, whole = asked(function, grid)
    told = by_intervals(separate(function), grid)
    np.testing.assert_array_equal(np.broadcast_to(told.some, some.shape), some)
    # Of comparisons of one number with another, equality alone cannot tell that all are equal.
    if name not in ("not, differs, either", "select", "floats"):
        np.testing.assert_array_equal(np.broadcast_to(told.whole, whole.shape), whole)


@pytest.mark.slow
@pytest.mark.parametrize("block", GRIDS, ids=str)
@pytest.mark.parametrize("name", [*WITHOUT_RULE, "document", "NaN and Inf", "of the key", "never"])
def test_asking_every_pair_is_exact(name, block):
    function, grid = (EXACT | SOUND | WITHOUT_RULE)[name], Grid(T, S, *block)
    for told, wanted in zip(by_evaluation(separate(function), grid), asked(function, grid)):
        np.testing.assert_array_equal(np.broadcast_to(told, wanted.shape), wanted)


@pytest.mark.parametrize("reason", WITHOUT_RULE)
def test_what_has_no_rule_is_named(reason):
    assert reason_to_evaluate(separate(WITHOUT_RULE[reason])) == reason


@pytest.mark.parametrize("name", [*EXACT, *SOUND])
def test_what_has_rules_is_not_asked_for(name):
    assert reason_to_evaluate(separate((EXACT | SOUND)[name])) is None


@pytest.mark.slow
def test_every_rule_is_tried():
    """By one of the functions above, or it could be wrong and no test would see it."""
    pairs = [separate(function) for function in (EXACT | SOUND).values()]
    tried = {step.primitive.name for pair in pairs for step in pair.expression.steps}
    assert set(RULES) - tried <= {"copy", "stop_gradient", "optimization_barrier"}
