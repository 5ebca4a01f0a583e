"""The layer equals a float64 oracle written as loops, forward and backward, in every dtype.

The oracle shares nothing with the package or with Keras. What Keras cannot do is here too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import (
    TOLERANCES,
    B,
    D,
    M,
    N,
    S,
    T,
    V,
    assert_close,
    booleans,
    normal,
    random_params,
    x64,
)
from layer_cases import (
    ACROSS_FREE,
    ACROSS_GRID,
    FREE,
    GRID,
    GRID_S,
    GRID_T,
    F,
    attend,
    axes_cases,
    case,
    mask_cases,
)

from flax_mha import MultiHeadAttentionConfig, dot_product_attention, param_shapes

CAUSAL = {"use_causal_mask": True}
QUERY, VALUE = (B, T, D), (B, S, M)


def ids(seed, *shape, count=3):
    """Seeded segment ids 0 ... count - 1."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, count, shape), "int32")


def beyond_keras():
    """What Keras has no right answer for, or no argument."""
    pair = (ids(1, B, T), ids(2, B, S))
    grid_pair = (ids(1, B, *GRID_T), ids(2, B, *GRID_S))
    dark = booleans(1, B, T, S).at[0, 2].set(False).at[1].set(False)
    masks = {"value_mask": booleans(1, B, S), "query_mask": booleans(2, B, T)}
    grouped = {"num_heads": 6, "num_kv_heads": 3}
    return [
        case("causal-grid", GRID, ACROSS_GRID, call=CAUSAL),
        case("causal-grid-turned", GRID, None, call=CAUSAL, attention_axes=(2, 1)),
        case("causal-free-axis", FREE, ACROSS_FREE, call=CAUSAL, attention_axes=2),
        case("window-grid", GRID, None, sliding_window=3),
        case("window-free-axis", FREE, None, call=CAUSAL, attention_axes=2, sliding_window=2),
        case("padding-grid", GRID, ACROSS_GRID, call={
            "query_mask": booleans(1, B, *GRID_T), "key_mask": booleans(2, B, *GRID_S)}),
        case("padding-free-axis", FREE, ACROSS_FREE, attention_axes=2, call={
            "query_mask": booleans(1, B, F, T), "value_mask": booleans(2, 1, F, S)}),
        case("segments", QUERY, None, call={"segment_ids": ids(1, B, T)}),
        case("segments-pair", QUERY, VALUE, call={"segment_ids": pair, **CAUSAL}),
        case("segments-grid", GRID, ACROSS_GRID, call={"segment_ids": grid_pair}),
        case("bias", QUERY, VALUE, call={"bias": normal(7, B, N, T, S)}),
        case("bias-TS-masked", QUERY, VALUE, call={
            "bias": normal(7, T, S), "key_mask": booleans(8, B, S)}),
        case("bias-free-axis", FREE, None, attention_axes=2, call={
            "bias": normal(7, B, F, N, T, T)}),
        case("bias-grid", GRID, ACROSS_GRID, call={"bias": normal(7, B, 1, *GRID_T, *GRID_S)}),
        case("grouped", QUERY, VALUE, **grouped, value_dim=V, use_gate=True),
        case("grouped-masked", QUERY, VALUE, **grouped, call={
            "attention_mask": booleans(3, B, 6, T, S), **masks}),
        case("one-key-head", QUERY, VALUE, num_heads=6, num_kv_heads=1, use_bias=False),
        case("fully-masked-rows", QUERY, VALUE, call={"attention_mask": dark}, use_gate=True),
        case("integer-mask", QUERY, VALUE, call={"attention_mask": dark.astype("int32")}),
        case("no-queries", (B, 0, D), VALUE),
        case("no-keys", QUERY, (B, 0, M)),
        case("no-keys-masked", QUERY, (B, 0, M), call={"value_mask": booleans(0, B, 0), **CAUSAL}),
        case("no-batch", (T, D), (S, M), call={"value_mask": booleans(1, S), **CAUSAL}),
        case("no-batch-mask", (T, D), (S, M), call={"attention_mask": booleans(1, N, T, S)}),
        case("empty-batch", (0, T, D), (0, S, M)),
        case("batch-of-one", (1, T, D), (1, S, M), call=CAUSAL),
        case("two-batch-axes", FREE, ACROSS_FREE, attention_axes=-2, call={
            "attention_mask": booleans(1, B, F, N, T, S), "value_mask": booleans(2, B, F, S)}),
        case("more-queries-than-keys", VALUE, QUERY, call=CAUSAL, value_dim=V),
        case("all-masks", QUERY, VALUE, sliding_window=3, use_gate=True, call={
            "attention_mask": booleans(3, B, N, T, S, share=0.9), **CAUSAL, **masks}),
    ]  # fmt: skip


ALL_CASES = beyond_keras() + mask_cases()[::3] + axes_cases()[::3]
GRADIENT_CASES = beyond_keras() + mask_cases()[1::6] + axes_cases()[3::5]
LOW_CASES = beyond_keras()[::4] + mask_cases()[2::8]


def parametrized(cases):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


def problem(case, dtype):
    """(config, {"params", "inputs", ["bias"]}, the other call arguments), rounded to `dtype`."""
    config = MultiHeadAttentionConfig(**case.arguments, param_dtype=dtype)
    params = random_params(param_shapes(config, *case.shapes), dtype=dtype)
    tree = {"params": params, "inputs": case.inputs(dtype)}
    call = dict(case.call)
    if "bias" in call:
        tree["bias"] = call.pop("bias").astype(dtype)
    return config, tree, call


def layer(tree, config, call):
    bias = {"bias": tree["bias"]} if "bias" in tree else {}
    return attend(tree["params"], tree["inputs"], config, **call, **bias)


def oracle(tree, case, call):
    inputs = tree["inputs"]
    value, key = inputs.get("value", inputs["query"]), inputs.get("key")
    static = {name: case.arguments.get(name) for name in ("attention_axes", "sliding_window")}
    bias = tree.get("bias")
    return oracles.layer(
        tree["params"], inputs["query"], value, key, **static, **call, bias=oracles.float64(bias)
    )


def check_forward(case, dtype):
    config, tree, call = problem(case, dtype)
    output, scores = layer(tree, config, call)
    expected, expected_scores = oracle(tree, case, call)
    assert output.dtype == scores.dtype == jnp.dtype(dtype)
    assert_close(output, expected, dtype, "output")
    assert_close(scores, expected_scores, dtype, "attention_scores")


def check_slopes(case, dtype):
    """The gradient along one random direction of every leaf, by the oracle's differences."""
    config, tree, call = problem(case, dtype)
    weights = [normal(90 + i, *x.shape) for i, x in enumerate(layer(tree, config, call))]

    def loss(tree):
        results = layer(tree, config, call)
        products = (x.astype(sum_dtype) * w.astype(sum_dtype) for x, w in zip(results, weights))
        return sum(product.sum() for product in products)

    def oracle_loss(tree):
        weighted = zip(oracle(tree, case, call), weights, strict=True)
        return sum((x * np.asarray(w).astype(np.float64)).sum() for x, w in weighted)

    sum_dtype = "float64" if dtype == "float64" else "float32"
    gradient = jax.jit(jax.grad(loss))(tree)
    rng = np.random.default_rng(5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        where = jax.tree_util.keystr(path)
        leaf = np.asarray(leaf).astype(np.float64)
        assert np.isfinite(leaf).all(), where
        direction = rng.normal(size=leaf.shape)
        slope = oracles.slope(oracle_loss, tree, only(path, direction))
        tolerance = TOLERANCES["slope" if dtype == "float64" else dtype]
        bound = tolerance * max(1.0, size_of(gradient, path))
        assert abs((leaf * direction).sum() - slope) <= bound, where


def only(path, direction):
    """A tree that names one leaf."""
    for entry in reversed(path):
        direction = {entry.key: direction}
    return direction


def size_of(gradient, path):
    """The norm of a leaf and its neighbours: the key bias's gradient is their rounding error."""
    for entry in path[:-1]:
        gradient = gradient[entry.key]
    leaves = jax.tree.leaves(gradient)
    return float(np.sqrt(sum((np.asarray(x).astype(np.float64) ** 2).sum() for x in leaves)))


@pytest.mark.slow
@parametrized(ALL_CASES)
def test_forward(case):
    check_forward(case, "float32")


@parametrized(ALL_CASES[::2])
def test_forward_float64(case):
    with x64():
        check_forward(case, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@parametrized(LOW_CASES)
def test_forward_low_precision(case, dtype):
    check_forward(case, dtype)


@parametrized(GRADIENT_CASES)
def test_gradient_float64(case):
    with x64():
        check_slopes(case, "float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@parametrized(LOW_CASES[::3])
@pytest.mark.slow
def test_gradient(case, dtype):
    check_slopes(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_softmax_is_in_float32(dtype):
    """Logits 3840 and 3840.875 are one number in 16 bits; their weights are 0.29 and 0.71."""
    query = jnp.array([[60.0, 1.0]], dtype)
    key = jnp.array([[64.0, 0.0], [64.0, 0.875]], dtype)
    value = jnp.eye(2, dtype=dtype)
    arrays = (x[:, None] for x in (query, key, value))  # one head
    context, weights = dot_product_attention(*arrays, scale=1.0, return_weights=True)
    expected, expected_weights = oracles.attention(
        *map(oracles.float64, (query, key, value)),
        allowed=np.ones((1, 2), bool),
        bias=np.zeros((1, 2)),
        scale=1.0,
        keep=np.ones((1, 2), bool),
        rate=0.0,
    )
    assert_close(context[:, 0], expected, dtype, "context")
    assert_close(weights[0], expected_weights, dtype, "weights")
