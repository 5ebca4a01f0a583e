"""Equinox's layer and ours: the same numbers from the same weights, and back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import C, D, E, H, M, N, S, T, V, assert_close, booleans, normal, open_rows

from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_shapes
from flax_mha.interop.equinox import from_equinox, to_equinox

eqx = pytest.importorskip("equinox", reason="equinox is absent")

SIZES = {"key_size": C, "value_size": M, "output_size": E, "qk_size": H, "vo_size": V}
BIASES = ["use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"]
QUERY, KEY, VALUE = normal(1, T, D), normal(2, S, C), normal(3, S, M)
MASKS = {"none": None, "TS": booleans(4, T, S), "NTS": booleans(5, N, T, S)}


def module_of(*biases, dtype=None, **arguments):
    """With random weights; the biases that Equinox draws are as large as the weights."""
    arguments = {**SIZES, **dict.fromkeys(biases, True), **arguments}
    return eqx.nn.MultiheadAttention(N, D, **arguments, dtype=dtype, key=jax.random.key(0))


FULL = module_of(*BIASES)
CONFIG, PARAMS = from_equinox(FULL)


def assert_same_module(actual, expected):
    """The same structure, static fields included, and the same bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("biases", [BIASES, [], BIASES[1:3]], ids=["all", "none", "some"])
def test_outputs_are_equinoxs(biases, mask):
    module = module_of(*biases)
    config, params = from_equinox(module)
    mask = None if mask is None else open_rows(mask)
    call = {"config": config, "attention_mask": mask}
    output = multi_head_attention(params, QUERY, VALUE, KEY, **call)
    assert_close(output, module(QUERY, KEY, VALUE, mask=mask), "float32")


def test_defaults_of_equinox():
    """qk_size = vo_size = D // N, and no biases at all."""
    module = eqx.nn.MultiheadAttention(3, 12, key=jax.random.key(0))
    config, params = from_equinox(module)
    x = normal(1, T, 12)
    assert config == MultiHeadAttentionConfig(3, 4, 4, use_bias=False, output_shape=12)
    output = multi_head_attention(params, x, x, config=config)
    assert_close(output, module(x, x, x), "float32")


def test_the_config_says_what_the_module_is():
    module = module_of(*BIASES[:1], dropout_p=0.3, inference=True, dtype=jnp.bfloat16)
    expected = MultiHeadAttentionConfig(
        N, H, V, dropout=0.3, use_bias=("query",), output_shape=E, param_dtype="bfloat16"
    )
    config, params = from_equinox(module)
    assert config == expected
    shapes = param_shapes(config, (T, D), (S, M), (S, C))
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert params["query"]["bias"].any()
    array_rate = eqx.tree_at(lambda m: m.dropout.p, module, jnp.array(0.5))
    assert from_equinox(array_rate)[0].dropout == 0.5


@pytest.mark.parametrize("biases", [BIASES, [], BIASES[:2]], ids=["all", "none", "some"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_round_trip_is_exact(biases, dtype):
    module = module_of(*biases, dtype=dtype, dropout_p=0.25, inference=True)
    config, params = from_equinox(module)
    blank = jax.tree.map(lambda x: x * 0 if eqx.is_array(x) else x, module)
    assert_same_module(to_equinox(params, config, blank), module)
    abstract = eqx.filter_eval_shape(lambda: module)
    assert_same_module(to_equinox(params, config, abstract), module)
    again = from_equinox(to_equinox(params, config, blank))
    assert again[0] == config
    assert_same_module(again[1], params)


def test_what_we_make_computes_what_we_compute():
    params = jax.tree.map(lambda x: 2 * x, PARAMS)
    expected = multi_head_attention(params, QUERY, VALUE, KEY, config=CONFIG)
    made = to_equinox(params, CONFIG, FULL)
    assert_close(made(QUERY, KEY, VALUE), expected, "float32")
    assert np.abs(made(QUERY, KEY, VALUE) - FULL(QUERY, KEY, VALUE)).max() > 0.1


def test_other_modules_are_refused():
    linear = eqx.nn.Linear(D, D, key=jax.random.key(0))
    adapted = eqx.tree_at(lambda m: m.key_proj, FULL, lambda x: x)
    for module, missing in [(linear, "query_proj"), (adapted, "key_proj"), ({}, "query_proj")]:
        for call in (from_equinox, lambda module: to_equinox(PARAMS, CONFIG, module)):
            with pytest.raises(TypeError, match=rf"equinox\.nn\.Mu.*without an array `{missing}"):
                call(module)


def test_stacked_modules_are_refused():
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 2) if eqx.is_array(x) else x, FULL)
    with pytest.raises(ValueError, match=r"`query_proj.weight` must be \[N H, D\]"):
        from_equinox(stacked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_gate": True}, "no `use_gate`: it must be False in the config.*use_gate=True"),
        ({"attention_axes": (1,)}, "no `attention_axes`: it must be None"),
        ({"sliding_window": 2}, "no `sliding_window`"),
        ({"dtype": "bfloat16"}, "no `dtype`"),
        ({"num_kv_heads": 1}, "no `num_kv_heads`: it must be 3.*num_kv_heads=1"),
        ({"output_shape": (E, 1)}, r"`output_shape` must be an int.*\(29, 1\)"),
        ({"num_heads": 1}, "must have the config's {'num_heads': 1.*Received: {'num_heads': 3"),
        ({"key_dim": V}, "'qk_size': 13.*Received: .*'qk_size': 11"),
        ({"value_dim": H}, "'vo_size': 11.*Received: .*'vo_size': 13"),
        ({"dropout": 0.5}, "'dropout.p': 0.5.*Received: .*'dropout.p': 0.0"),
        ({"use_bias": False}, "no biases where.*'query_proj.bias'.*use_query_bias=False"),
    ],
)
def test_configs_that_equinox_does_not_have(changes, message):
    with pytest.raises(ValueError, match=message):
        to_equinox(PARAMS, CONFIG.replace(**changes), FULL)


def test_a_bias_without_a_place_must_be_zero():
    module = module_of(*BIASES[:3])
    with pytest.raises(ValueError, match=r"\['attention_output'\]\['bias'\] has no place"):
        to_equinox(PARAMS, CONFIG, module)
    zero = {**PARAMS, "attention_output": {**PARAMS["attention_output"], "bias": jnp.zeros(E)}}
    made = to_equinox(zero, CONFIG, module)
    assert made.output_proj.bias is None
    assert_same_module(made, module)  # which drew the same numbers from the same key


def test_a_module_s_biases_can_be_trained():
    """Those that it lacks do not come as zeros, which training would move."""
    module = module_of(*BIASES[:1], BIASES[3])
    config, params = from_equinox(module)
    assert config.use_bias == ("query", "attention_output")
    trained = jax.tree.map(lambda x: x + 1, params)
    made = to_equinox(trained, config, module)
    assert_same_module(from_equinox(made)[1], trained)
    with pytest.raises(ValueError, match=r"use_bias=\('query', 'att.*\['key_proj.bias', 'value_p"):
        to_equinox(params, config, FULL)


class Normed(eqx.nn.MultiheadAttention):
    """Somebody's own: what it holds besides is not dropped."""

    scale: jax.Array | None = None


def test_arrays_of_a_derived_class_are_refused_by_name():
    fields = {field: getattr(FULL, field) for field in FULL.__dataclass_fields__}
    module = object.__new__(Normed)
    for name, value in {**fields, "scale": jnp.ones(H)}.items():
        object.__setattr__(module, name, value)
    for call in (from_equinox, lambda module: to_equinox(PARAMS, CONFIG, module)):
        with pytest.raises(ValueError, match=r"must be \['key_proj.bias'.*also has \['scale'\]"):
            call(module)


def test_a_module_of_other_features_is_refused():
    other = eqx.nn.MultiheadAttention(
        N, D + 1, **SIZES, **dict.fromkeys(BIASES, True), key=jax.random.key(0)
    )
    with pytest.raises(ValueError, match=r"`module_like.query_proj.weight` must be \(33, 17\)"):
        to_equinox(PARAMS, CONFIG, other)
