"""Masks and scores as functions of pairs: every implementation equals the dense form.

`EVERY_ROW=1 python -m pytest -m ""` runs each case with each size of blocks of each of them.
The examples are those of `pair_examples`; what they must give is said twice in `pair_oracles`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCES, assert_close, normal, x64
from pair_examples import (
    CASES,
    EVERY_ROW,
    MASKS,
    PLAIN,
    SCORES,
    assert_all_close,
    in_turns,
    run,
    served,
)
from pair_oracles import (
    Sizes,
    allowed_by_loops,
    attend,
    attention_by_loops,
    attention_by_vmap,
    expected,
    floating,
    logits_by_loops,
    namespace,
    over_pairs,
    probe_of,
    split,
    wide,
    with_gradients,
)  # fmt: skip

# --- the examples themselves --------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("joined")])
def test_the_function_says_what_the_loops_say(name):
    """Pair by pair, not only in what the softmax makes of it."""
    example = CASES[name]
    sizes = example.sizes()
    with x64():
        arrays = {name: jnp.asarray(x) for name, x in wide(example.all_arrays()).items()}
        function = example.function(namespace(sizes, split(arrays)[1]))
        if example.kind == "mask function":
            allowed = allowed_by_loops(example, sizes, split(wide(arrays))[1])
            np.testing.assert_array_equal(over_pairs(function, sizes), allowed, name)
            return
        same = MASKS["causal"]  # of no score: the products as they are
        products = jnp.asarray(logits_by_loops(same, sizes, wide(arrays)))
        ours = over_pairs(function, sizes, products)
    np.testing.assert_allclose(
        ours, logits_by_loops(example, sizes, wide(arrays)), 1e-12, 1e-12, err_msg=name
    )


@pytest.mark.parametrize("name", CASES if EVERY_ROW else [*CASES][::3])
@pytest.mark.slow
def test_the_gradients_of_the_vmap_are_the_slopes_of_the_loops(name):
    example = CASES[name]
    sizes, arrays, wanted = example.sizes(), wide(example.all_arrays()), expected(example)
    probe = probe_of(sizes)
    loss = lambda arrays: (attention_by_loops(example, sizes, arrays)[0] * probe).sum()
    moving = floating(arrays)[0]
    if example.kind != "score":
        moving = {x: moving[x] for x in ("query", "key", "value")}
    for seed, (name, x) in enumerate(moving.items()):
        direction, step = np.random.default_rng(seed).normal(size=x.shape), 1e-5
        slope = loss(arrays | {name: x + step * direction})
        slope = (slope - loss(arrays | {name: x - step * direction})) / (2 * step)
        gradient = (wanted[f"d_{name}"] * direction).sum()
        np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-7, err_msg=name)


def test_no_two_masks_are_the_same():
    """A case that says what another one says would test nothing; these five do so on purpose."""
    seen = {}
    for name, example in MASKS.items():
        closed = split(wide(example.all_arrays()))[1]
        allowed = allowed_by_loops(example, example.sizes(), closed)
        seen.setdefault(allowed.tobytes(), []).append(name)
    same = {tuple(names) for names in seen.values() if len(names) > 1}
    assert same == {("everybody", "one answer for all"), ("sliding window", "unsigned")}


# --- every implementation -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "implementation", "scale", "blocks"), in_turns())
def test_context_and_gradients_are_the_dense_form_s(name, implementation, scale, blocks):
    with served(name, implementation):
        results = run(CASES[name], implementation, blocks, scale)
        assert_all_close(results, expected(CASES[name], scale), "float32", name)


@pytest.mark.slow
@PLAIN
@pytest.mark.parametrize(
    "name",
    [
        "mask, document, causal",
        "mask, times",
        "joined, nested",
        "score, ALiBi",
        "score, relative table",
        "score, learned cap",
    ],
)
def test_float64(name, implementation, blocks):
    """With everything in float64, no number of the function has passed through 32 bits."""
    example = CASES[name]
    sizes = example.sizes()
    arrays = wide(example.all_arrays(dtype="float64"))
    with x64():
        given = {name: jnp.asarray(x) for name, x in arrays.items()}
        function = lambda arrays: attend(
            example, sizes, arrays, implementation=implementation, block_sizes=blocks
        )
        results = with_gradients(function, given, probe_of(sizes))
        assert_all_close(results, expected(example, dtype="float64"), "float64", name)


@pytest.mark.slow
@PLAIN
@pytest.mark.parametrize(
    "name", ["mask, prefix-LM", "joined, far and causal", "score, ALiBi", "score, relative table"]
)
def test_16_bits(name, implementation, blocks):
    """The logit that a score receives has 32 bits, whatever the query has."""
    example = CASES[name]
    results = run(example, implementation, blocks, dtype="bfloat16")
    wanted = expected(example, dtype="bfloat16")
    assert results["context"].dtype == results["d_query"].dtype == "bfloat16"
    for name, x in wanted.items():
        assert_close(results[name].astype("float32"), x, "bfloat16", name)


SECOND = [
    "mask, document, causal",
    "mask, nobody",
    "joined, nested",
    "score, ALiBi",
    "score, relative table",
    "score, learned cap",
    "score, cubic",
    "score, query gains",
    "score, forbids",
    "score, softmax of a ReLU",
]


def hessian_product(function, moving, tangents):
    """The derivative of the gradient along `tangents`: of the value, and of what is closed over."""
    loss = lambda moving: (function(moving) ** 2).sum()
    return jax.jvp(jax.grad(loss), (moving,), (tangents,))[1]


@pytest.mark.parametrize(
    ("name", "implementation", "blocks"),
    [
        (x, *row)
        for i, x in enumerate(SECOND)
        for row in [("blockwise", (8, 4)), ("reference", None)][: 2 - i % 2]
    ],
)
@pytest.mark.slow
def test_second_derivatives(name, implementation, blocks):
    example = CASES[name]
    sizes = example.sizes()
    arrays = wide(example.all_arrays())
    allowed = allowed_by_loops(example, sizes, split(arrays)[1])
    options = {"implementation": implementation, "block_sizes": blocks}
    with x64():
        moving, fixed = floating({name: jnp.asarray(x) for name, x in arrays.items()})
        tangents = {
            x: normal(30 + i, *moving[x].shape, dtype="float64") for i, x in enumerate(moving)
        }
        ours = lambda moving: attend(example, sizes, moving | fixed, **options)
        dense = lambda moving: attention_by_vmap(example, sizes, moving | fixed, allowed)[0]
        results, wanted = (
            jax.jit(functools.partial(hessian_product, function))(moving, tangents)
            for function in (ours, dense)
        )
        for x in wanted:
            scale = float(abs(wanted[x]).max())
            np.testing.assert_allclose(results[x], wanted[x], rtol=0, atol=1e-10 * (1 + scale))


# --- no queries, one query, no keys -------------------------------------------------------------

LENGTHS = [(1, 23), (19, 1), (1, 1), (0, 23), (19, 0), (0, 0)]
# What looks up nothing by the key or the query: of an empty array there is nothing to look up.
ANY_LENGTH = [
    "mask, causal",
    "mask, prefix-LM",
    "mask, widths of heads",
    "mask, heads of two kinds",
    "joined, prefix-LM",
    "joined, far",
    "joined, window or global",
    "score, ALiBi",
    "score, learned cap",
    "score, decay by example",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "T", "S", "implementation", "blocks"),
    [
        (*case, *row)
        for i, case in enumerate((name, T, S) for name in ANY_LENGTH for T, S in LENGTHS)
        for row in ([("reference", None)] if i % 7 == 0 else [("blockwise", (8, 4))])
        if i % 2 == 0 or EVERY_ROW
    ],
)
def test_any_length(name, T, S, implementation, blocks):
    sizes = Sizes(T, S)
    results = run(CASES[name], implementation, blocks, sizes=sizes)
    # Of one key every weight is 1 and the gradient of a rate 0: roundings, times distances.
    scale = float(T) if (name, S) == ("score, decay by example", 1) else 0.0
    assert_all_close(results, expected(CASES[name], sizes=sizes), "float32", name, scale)


def test_the_tolerances_can_be_missed():
    """Each score is far from none, by more than any tolerance here."""
    for name, example in SCORES.items():
        arrays, sizes = example.all_arrays(), example.sizes()
        as_it_is = dataclasses.replace(example, loops=lambda a, x, b, n, t, s: x)
        results = (attention_by_loops(x, sizes, arrays)[0] for x in (example, as_it_is))
        error = abs(np.subtract(*results)).max()
        assert name == "the same" or error > 1000 * TOLERANCES["float32"], f"{name}: {error}"
