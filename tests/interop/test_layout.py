"""The layout tables: split, merge, transpose; what does not fit is named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import C, D, E, H, M, N, V, random_params

from flax_mha import MultiHeadAttentionConfig, param_shapes
from flax_mha.interop.layout import Entry, from_table, to_table

CONFIG = MultiHeadAttentionConfig(num_heads=N, key_dim=H, value_dim=V, output_shape=E)
PARAMS = random_params(param_shapes(CONFIG, (1, D), (1, M), (1, C)))
TABLE = [
    Entry(("query", "kernel"), "q.weight", "(N H) D"),
    Entry(("query", "bias"), "q.bias", "(N H)"),
    Entry(("key", "kernel"), "k.weight", "C (H K)"),
    Entry(("key", "bias"), "k.bias", "H K"),
    Entry(("value", "kernel"), "v.weight", "V K M"),
    Entry(("value", "bias"), "v.bias", "(K V)"),
    Entry(("attention_output", "kernel"), "o.weight", "E (N V)"),
    Entry(("attention_output", "bias"), "o.bias", "E"),
]


def arrays():
    return to_table(TABLE, PARAMS, CONFIG)


def test_axes_are_merged_and_put_in_order():
    their = arrays()
    kernel = np.asarray(PARAMS["query"]["kernel"])
    for n in range(N):
        for h in range(H):
            assert (their["q.weight"][n * H + h] == kernel[:, n, h]).all()
    kernel = np.asarray(PARAMS["key"]["kernel"])
    for n in range(N):
        for h in range(H):
            assert (their["k.weight"][:, h * N + n] == kernel[:, n, h]).all()
    assert their["v.weight"].shape == (V, N, M)
    assert (their["v.weight"][1, 2] == PARAMS["value"]["kernel"][:, 2, 1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_round_trip_is_exact(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype).at[0].set(jnp.nan), PARAMS)
    config = CONFIG.replace(param_dtype=dtype)
    back = from_table(TABLE, to_table(TABLE, params, config), config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(params)):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_what_the_framework_lacks_is_zero_or_refused():
    table = [*TABLE[:-1], Entry(("attention_output", "bias"), None)]
    with pytest.raises(ValueError, match=r"\['attention_output'\]\['bias'\] has no place .* up to"):
        to_table(table, PARAMS, CONFIG)
    their = {name: array for name, array in arrays().items() if name != "o.bias"}
    params = from_table(table, their, CONFIG)
    assert params["attention_output"]["bias"].shape == (E,)
    assert not params["attention_output"]["bias"].any()
    assert to_table(table, params, CONFIG).keys() == their.keys()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("o.weight", np.transpose, r"`o.weight` must be \[E, N V\] = \(\?, 39\).*transposed\?"),
        ("q.weight", lambda x: np.tile(x, (3, 1)), r"\[N H, D\] = \(33, \?\).*\(99, 17\).*packed"),
        ("q.weight", lambda x: np.ones((99, 33), "float32"), "packed"),  # though transposed fits
        ("q.weight", lambda x: x[:-H], r"\[N H, D\] = \(33, \?\).*shape \(22, 17\).*num_heads"),
        ("q.weight", lambda x: x[0], r"\[N H, D\] = \(33, \?\).*shape \(17,\).*num_heads"),
        ("o.bias", lambda x: x[1:], r"`o.bias` must be \[E\] = \(29\).*shape \(28,\)"),
        ("q.bias", lambda x: x.astype(int), "floating-point array"),
        ("q.bias", lambda x: x.astype("float64"), "float64, which needs JAX's 64-bit mode"),
    ],
)
def test_arrays_that_do_not_fit(name, change, message):
    their = arrays()
    with pytest.raises((ValueError, TypeError), match=message):
        from_table(TABLE, {**their, name: change(their[name])}, CONFIG)


def test_missing_and_unknown_names():
    their = arrays()
    del their["q.bias"]
    message = re.escape("missing ['q.bias'], unknown ['q_bias']")
    with pytest.raises(ValueError, match=message):
        from_table(TABLE, {**their, "q_bias": 0}, CONFIG)
