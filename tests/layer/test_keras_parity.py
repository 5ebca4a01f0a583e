"""The layer equals the installed Keras: outputs, scores and gradients, for the same weights.

Where Keras 3.15 has two answers (its fused and its scores path), the scores path is the one that
agrees with its documents. `test_fused_path*` say where the fused path agrees, and where not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    B,
    D,
    E,
    H,
    M,
    N,
    S,
    T,
    assert_close,
    assert_trees_close,
    booleans,
    normal,
    open_rows,
    random_params,
)
from keras_bridge import (
    keras_call,
    keras_gradients,
    keras_layer,
    names_of,
    params_from_keras,
    set_weights,
)
from layer_cases import attend, axes_cases, case, mask_cases, product_cases, scalar

from flax_mha import MultiHeadAttentionConfig

LOW_PRECISION = ["bfloat16", "float16"]
ALL_CASES = product_cases() + mask_cases() + axes_cases()


def parametrized(cases):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


def for_keras(call):
    """The same masks in a form that Keras combines rightly.

    Keras combines masks before it gives them full rank, so (B, N, T, S) meets (B, 1, S) one axis
    too early. Beside a mask of rank 4, padding masks are merged into it here, by hand.
    """
    call = dict(call)
    mask = call.get("attention_mask")
    if mask is None or mask.ndim < 4:
        return call
    for name in ("query_mask", "value_mask", "key_mask"):
        padding = call.pop(name, None)
        if padding is not None:
            wide = padding[:, None, :, None] if name == "query_mask" else padding[:, None, None, :]
            mask = np.asarray(mask) & np.asarray(wide)
    return call | {"attention_mask": jnp.asarray(mask)}


def keras_attend(layer, params, inputs, **call):
    query = inputs["query"]
    value, key = inputs.get("value", query), inputs.get("key")
    call = {"return_attention_scores": True, **call}
    return keras_call(layer, params, query, value, key, **call)


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def check_parity(case, dtype="float32", scores=True):
    """Outputs, scores and gradients of one case."""
    layer = keras_layer({**case.arguments, "kernel_initializer": "zeros"}, case.shapes, dtype)
    params = random_params(params_from_keras(layer))
    set_weights(layer, params)
    config = MultiHeadAttentionConfig(**case.arguments, dtype=dtype)
    keras_masks, call = for_keras(case.call), {"return_attention_scores": scores}

    def our_loss(params, inputs):
        results = attend(params, inputs, config, **case.call, **call)
        return scalar(results), results

    def keras_loss(params, inputs):
        results = keras_attend(layer, params, inputs, **keras_masks, **call)
        return scalar(results), results

    arguments = params_from_keras(layer), case.inputs(dtype)
    grads, results = jax.jit(jax.grad(our_loss, (0, 1), has_aux=True))(*arguments)
    compiled = dtype != "float32"  # faster where every operation is new; else it is the other way
    keras_grads, keras_results = keras_gradients(keras_loss, *arguments, compiled=compiled)
    assert dtypes(results) == dtypes(keras_results)
    assert_trees_close(results, keras_results, dtype, "(output, scores)")
    assert_trees_close(grads, keras_grads, dtype, "(params, inputs) gradient ")


@pytest.mark.slow
@parametrized(product_cases())
def test_options(case):
    check_parity(case)


@parametrized(mask_cases())
def test_masks(case):
    check_parity(case)


@pytest.mark.slow
@parametrized(axes_cases())
def test_attention_axes(case):
    check_parity(case)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@parametrized(mask_cases()[1::14] + axes_cases()[1::9])
@pytest.mark.slow
def test_low_precision(case, dtype):
    check_parity(case, dtype)


def check_config(case, dtype):
    layer = keras_layer(case.arguments, None, dtype)
    config = MultiHeadAttentionConfig(**case.arguments, dtype=dtype)
    expected = config.replace(value_dim=config.dims.V)  # Keras writes the resolved size
    converted = MultiHeadAttentionConfig.from_keras_config(layer.get_config())
    assert converted == expected
    assert hash(converted) == hash(expected)


@parametrized(ALL_CASES)
def test_config_from_keras(case):
    check_config(case, "float32")


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_config_from_keras_mixed_policy(dtype):
    check_config(ALL_CASES[-1], dtype)


def fused_cases():
    """Calls that take Keras's fused path: no scores, no dropout, value_dim == key_dim.

    Every query has a key to attend to; where it has none, Keras's two paths differ.
    """
    query, value = (B, T, D), (B, S, M)
    mask, padding = open_rows(booleans(1, B, N, T, S)), open_rows(booleans(2, B, S))
    return [
        case("plain", query, value),
        case("causal", query, value, call={"use_causal_mask": True}, use_gate=True),
        case("mask", query, value, call={"attention_mask": mask}),
        case("padding", query, value, call={"value_mask": padding, "use_causal_mask": True}),
        case("window", query, None, sliding_window=2, output_shape=E),
    ]


@pytest.mark.slow
@parametrized(fused_cases())
def test_fused_path(case):
    check_parity(case, scores=False)


@pytest.mark.slow
def test_fused_path_differs_in_rows_without_keys():
    """Keras's fused path averages the values there; its scores path and ours give the bias."""
    layer = keras_layer({"num_heads": N, "key_dim": H}, [(B, T, D), (B, S, M), (B, S, M)])
    set_weights(layer, random_params(params_from_keras(layer)))
    params, config = params_from_keras(layer), MultiHeadAttentionConfig(N, H)
    inputs = {"query": normal(1, B, T, D), "value": normal(2, B, S, M)}
    mask = jnp.ones((B, T, S), bool).at[0, 3].set(False)
    call = {"attention_mask": mask, "return_attention_scores": False}
    fused = keras_attend(layer, params, inputs, **call)
    output = attend(params, inputs, config, **call)
    assert_close(output[0, 3], params["attention_output"]["bias"], "float32")
    assert np.abs(fused[0, 3] - output[0, 3]).max() > 0.1
    fused, output = (x.at[0, 3].set(0.0) for x in (fused, output))
    assert_close(output, fused, "float32")


@pytest.mark.slow
def test_bridge_notices_a_wrong_order_of_weights():
    """A control of the tests themselves: with the gate and the value exchanged nothing agrees."""
    arguments = {"num_heads": N, "key_dim": H, "use_gate": True}
    layer = keras_layer(arguments, [(B, T, D)] * 3)
    assert [name for name, _ in names_of(layer)][::2] == [
        "query", "key", "gate", "value", "attention_output",
    ]  # fmt: skip
    params = random_params(params_from_keras(layer))
    set_weights(layer, params)
    swapped = {**params, "gate": params["value"], "value": params["gate"]}
    inputs, config = {"query": normal(1, B, T, D)}, MultiHeadAttentionConfig(**arguments)
    keras_output, _ = keras_attend(layer, params_from_keras(layer), inputs)
    assert_close(attend(params, inputs, config)[0], keras_output, "float32")
    assert np.abs(attend(swapped, inputs, config)[0] - keras_output).max() > 0.1
