"""Flax's own attention layers and ours: the same numbers from the same weights, and back."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import (
    B,
    C,
    D,
    E,
    H,
    M,
    N,
    S,
    T,
    assert_close,
    booleans,
    normal,
    open_rows,
    random_params,
)

from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_shapes
from flax_mha.interop.flax import (
    attention_fn,
    from_flax_params,
    from_linen_module,
    from_nnx_module,
    to_flax_params,
    to_nnx_state,
)
from flax_mha.norms import LayerNorm

CONFIG = MultiHeadAttentionConfig(N, H, output_shape=E)
QUERY, KEY, VALUE = normal(1, B, T, D), normal(2, B, S, C), normal(3, B, S, M)
MASK = open_rows(booleans(4, B, N, T, S))
BIASES = [True, pytest.param(False, marks=pytest.mark.slow)]
ONLY_GROUPED = pytest.mark.skipif(
    "num_kv_heads" not in inspect.signature(nnx.MultiHeadAttention.__init__).parameters,
    reason="this flax.nnx has no grouped heads",
)


def weights(D=D, C=C, M=M, E=E, K=N, bias=True, dtype="float32"):
    """Flax's tree, as flax documents it, of seeded numbers."""
    shapes = {"query": (D, N, H), "key": (C, K, H), "value": (M, K, H), "out": (N, H, E)}
    tree = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        rank = 2 if name == "out" else 1
        values = np.asarray(normal(seed, *shape)) / np.sqrt(np.prod(shape[:rank]), dtype="float32")
        tree[name] = {"kernel": jnp.asarray(values.astype(jnp.dtype(dtype)))}
        if bias:
            tree[name]["bias"] = normal(seed + 9, *shape[rank:], dtype=dtype)
    return tree


def linen(**fields):
    fields = {"num_heads": N, "qkv_features": N * H, "out_features": E, **fields}
    return nn.MultiHeadDotProductAttention(**fields)


def blank(key, shape, dtype, *_):
    return jnp.asarray(np.zeros(shape, dtype))  # what the tree replaces, without a compilation


def nnx_layer(tree=None, **fields):
    fields = {"qkv_features": N * H, "out_features": E, "in_kv_features": C, **fields}
    fields |= {"kernel_init": blank, "bias_init": blank}
    layer = nnx.MultiHeadAttention(N, D, **fields, decode=False, rngs=nnx.Rngs(0))
    nnx.update(layer, tree or {})
    return layer


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert isinstance(ours, jax.Array)
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def ours(config, params, query, key, value, mask):
    call = functools.partial(multi_head_attention, config=config)
    run = jax.jit(lambda *arrays, mask: call(*arrays, attention_mask=mask))
    return run(params, query, value, key, mask=mask)  # Keras's order


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES, ids=["bias", "no_bias"])
def test_linen_cross_attention(bias):
    layer, tree = linen(use_bias=bias), weights(bias=bias)
    config, params = from_linen_module(layer, tree)
    assert config == CONFIG.replace(use_bias=bias)
    run = jax.jit(lambda *inputs, mask: layer.apply({"params": tree}, *inputs, mask=mask))
    expected = run(QUERY, KEY, VALUE, mask=MASK)
    assert_close(ours(config, params, QUERY, KEY, VALUE, MASK), expected, "float32")


@pytest.mark.parametrize(
    "kind",
    [
        nn.MultiHeadDotProductAttention,
        pytest.param(nn.MultiHeadAttention, marks=pytest.mark.slow),
        pytest.param(nn.SelfAttention, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated:DeprecationWarning")
def test_linen_self_attention_with_flax_s_defaults(kind):
    """qkv_features and out_features are those of the input."""
    x, mask = normal(5, B, T, N * H), open_rows(booleans(6, B, 1, T, T))
    layer = kind(num_heads=N, bias_init=nn.initializers.normal())
    expected, variables = jax.jit(layer.init_with_output)(jax.random.key(0), x, mask=mask)
    config, params = from_linen_module(layer, variables["params"])
    assert config == MultiHeadAttentionConfig(N, H)
    assert_close(ours(config, params, x, x, x, mask), expected, "float32")


@pytest.mark.parametrize("bias", BIASES, ids=["bias", "no_bias"])
def test_nnx_cross_attention(bias):
    value, tree = normal(7, B, S, C), weights(M=C, bias=bias)
    layer = nnx_layer(tree, use_bias=bias)
    config, params = from_nnx_module(layer)
    assert config == CONFIG.replace(use_bias=bias)
    expected = nnx.jit(lambda layer, *x: layer(*x, mask=MASK))(layer, QUERY, KEY, value)
    assert_close(ours(config, params, QUERY, KEY, value, MASK), expected, "float32")


@ONLY_GROUPED
def test_nnx_grouped_heads():
    tree = weights(M=C, K=1)
    layer = nnx_layer(tree, num_kv_heads=1)
    config, params = from_nnx_module(layer)
    assert config == CONFIG.replace(num_kv_heads=1)
    expected = nnx.jit(lambda layer, *x: layer(*x, mask=MASK))(layer, QUERY, KEY)
    assert_close(ours(config, params, QUERY, KEY, KEY, MASK), expected, "float32")
    assert_same_bits(to_nnx_state(params, config), tree)


def test_what_we_make_computes_what_we_compute():
    config = CONFIG.replace(output_shape=None)
    params = random_params(param_shapes(config, (T, D)))
    x, mask = QUERY, open_rows(booleans(8, B, N, T, T))
    expected = ours(config, params, x, x, x, mask)
    apply = jax.jit(linen(out_features=None).apply)
    made = apply({"params": to_flax_params(params, config)}, x, mask=mask)
    assert_close(made, expected, "float32")
    layer = nnx_layer(to_nnx_state(params, config), out_features=None, in_kv_features=None)
    assert_close(nnx.jit(lambda layer: layer(x, mask=mask))(layer), expected, "float32")


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trips_are_exact(bias, dtype):
    config = CONFIG.replace(use_bias=bias, param_dtype=dtype)
    tree = weights(bias=bias, dtype=dtype)
    params = from_flax_params(tree, config)
    assert_same_bits(to_flax_params(params, config), tree)
    assert_same_bits(from_flax_params(to_flax_params(params, config), config), params)
    tree = weights(M=C, bias=bias, dtype=dtype)
    again, params = from_nnx_module(nnx_layer(tree, use_bias=bias, param_dtype=dtype))
    assert again == config
    assert_same_bits(to_nnx_state(params, config), tree)
    assert_same_bits(params, from_flax_params(tree, config))


def test_projections_keep_their_names():
    """Key and value have equal shapes in most layers, so names alone tell them apart."""
    tree = weights(M=C)
    params = from_flax_params(tree, CONFIG)
    for name, place in {"query": "query", "key": "key", "value": "value"}.items():
        assert_same_bits(params[name], tree[place])
    assert_same_bits(params["attention_output"], tree["out"])


def test_the_config_says_what_the_module_is():
    fields = {"dtype": jnp.bfloat16, "precision": "highest", "dropout_rate": 0.3}
    fields |= {"broadcast_dropout": False, "deterministic": True, "attention_fn": attention_fn}
    expected = CONFIG.replace(
        dtype="bfloat16", param_dtype="float16", precision="highest", dropout=0.3
    )
    tree = weights(M=C, dtype="float16")
    assert from_linen_module(linen(**fields, decode=True), tree)[0] == expected
    layer = nnx_layer(tree, param_dtype="float16", **fields)
    assert from_nnx_module(layer)[0] == expected
    plain = linen(force_fp32_for_softmax=True, dtype="bfloat16")
    assert from_linen_module(plain, tree)[0].dtype == "bfloat16"


# --- refusals -----------------------------------------------------------------------------------


def changed(**leaves):
    return {**weights(), **leaves}


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        (weights(bias=False), ValueError, r"missing \['key.bias', .*`use_bias`"),
        (weights(K=1), ValueError, r"`key.kernel` must be \[C, K, H\] = \(\?, 3, 11\).*19, 1, 11"),
        (changed(out={"kernel": normal(0, H, N, E), "bias": normal(0, E)}), ValueError,
         r"`out.kernel` must be \[N, V, E\] = \(3, 11, \?\).*\(11, 3, 29\)"),
        (changed(gate={"kernel": QUERY}), ValueError, r"unknown \['gate.kernel'\]"),
        (weights(E=D), ValueError, r"attention_output.*kernel.*\(3, 11, 29\).*\(3, 11, 17\)"),
        ({"params": weights()}, ValueError, r"collections \['params'\]. Pass `variables\['params'"),
        (changed(query_ln={"scale": normal(0, H)}), ValueError,
         r"layer norms of `normalize_qk=True` have one `qk_norm`.*Set .*LayerNorm\(epsilon"),
        ({"query": QUERY}, TypeError, "`params` must be flax's.*a dict"),
        (None, TypeError, "`params` must be flax's.*a NoneType"),
        (changed(key={"kernel": nn.Partitioned(KEY, ("x",))}), TypeError,
         r"`key.kernel` must be an array.*Partitioned.*meta\.unbox"),
        (changed(key={"kernel": normal(0, C, N, H).astype(int), "bias": normal(0, N, H)}),
         TypeError, "`key.kernel` must be a floating-point array"),
    ],
)  # fmt: skip
def test_trees_that_do_not_fit(tree, error, message):
    with pytest.raises(error, match=message):
        from_flax_params(tree, CONFIG)
    with pytest.raises(error):
        from_linen_module(linen(), tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_gate": True}, "no `use_gate`: it must be False in the config.*use_gate=True"),
        ({"attention_axes": (1,)}, "no `attention_axes`: it must be None"),
        ({"sliding_window": 2}, "no `sliding_window`"),
        ({"position": "rotary"}, "no `position`"),
        ({"qk_norm": "rms"}, "no `qk_norm`"),
        ({"soft_cap": 5.0}, "no `soft_cap`"),
        ({"use_sinks": True}, "no `use_sinks`"),
        ({"value_dim": 13}, "no `value_dim`: it must be 11.*value_dim=13"),
        ({"output_shape": (E, 1)}, r"`output_shape` must be an int.*\(29, 1\)"),
    ],
)
def test_configs_that_flax_does_not_have(changes, message):
    config = CONFIG.replace(**changes)
    params = param_shapes(config, (T, D))
    for api, call in {"linen": to_flax_params, "nnx": to_nnx_state}.items():
        with pytest.raises(ValueError, match=rf"layer of flax\.{api} has.*{message}"):
            call(params, config)


def test_shapes_that_one_of_the_two_apis_does_not_have():
    grouped = CONFIG.replace(num_kv_heads=1)
    with pytest.raises(ValueError, match=r"flax.linen has no `num_kv_heads`: it must be 3"):
        to_flax_params(from_flax_params(weights(K=1), grouped), grouped)
    with pytest.raises(ValueError, match=r"`in_kv_features`: C = M\. Received: C = 19, M = 23"):
        to_nnx_state(from_flax_params(weights(), CONFIG), CONFIG)


REFUSED = {
    "attention_fn": ({"attention_fn": nn.dot_product_attention_weights}, "`attention_fn` of the"),
    "dot_general": ({"qkv_dot_general": jax.lax.dot_general}, "`qkv_dot_general` of the module"),
    "dot_general_cls": ({"out_dot_general_cls": object}, "`out_dot_general_cls` of the module"),
    "dropout": ({"dropout_rate": 0.3}, "equal for all.*0.3.*`broadcast_dropout=False`"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_module_does_otherwise_is_refused_by_name(fields, message):
    with pytest.raises(NotImplementedError, match=message):
        from_linen_module(linen(**fields), weights())
    layer = nnx_layer()
    for name, value in fields.items():  # nnx's constructor would call some of them
        setattr(layer, name, value)
    with pytest.raises(NotImplementedError, match=message):
        from_nnx_module(layer)


def test_what_linen_alone_has_is_refused_by_name():
    for name in ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"):
        with pytest.raises(NotImplementedError, match=f"`{name}` of the module"):
            from_linen_module(linen(**{name: lambda: jnp.einsum}), weights())
    layer, tree = linen(force_fp32_for_softmax=True), weights(dtype="bfloat16")
    with pytest.raises(NotImplementedError, match=r"`force_fp32_for_softmax=True`.*bfloat16"):
        from_linen_module(layer, tree)
    assert from_linen_module(layer, weights())[0] == CONFIG
    with pytest.raises(ValueError, match="`precision` must be None or among"):
        from_linen_module(linen(precision=("high", "highest")), weights())


def test_other_modules_are_refused():
    dense = nn.Dense(3)
    with pytest.raises(TypeError, match=r"must be a flax.linen Multi.*Received: Dense"):
        from_linen_module(dense, weights())
    with pytest.raises(TypeError, match=r"must be an nnx.Multi.*Received: MultiHeadDot"):
        from_nnx_module(linen())
    with pytest.raises(TypeError, match=r"must be a flax.linen Multi.*Received: MultiHeadAtt"):
        from_linen_module(nnx_layer(), weights())
    adapted = nnx_layer()
    adapted.key = nnx.LoRALinear(C, H, lora_rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"own LinearGeneral.*`key` is a LoRALinear"):
        from_nnx_module(adapted)


def test_sizes_that_are_not_the_module_s_and_stacked_layers():
    with pytest.raises(ValueError, match=r"`query.kernel` must be .* = \(\?, 1, 33\)"):
        from_linen_module(linen(num_heads=1), weights())
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), weights())
    with pytest.raises(ValueError, match=r"`query.kernel` must be an array.*\(2, 17, 3, 11\)"):
        from_linen_module(linen(), stacked)
    with pytest.raises(ValueError, match=r"`query.kernel` must be an array.*\(2, 17, 3, 11\)"):
        from_nnx_module(nnx_layer(jax.tree.map(lambda x: jnp.stack([x, x]), weights(M=C))))


@pytest.mark.slow
def test_layer_norms_of_queries_and_keys_come_and_go():
    scales = {"query_ln": normal(20, H), "key_ln": normal(21, H)}
    tree = {**weights(), **{name: {"scale": scale} for name, scale in scales.items()}}
    layer = linen(normalize_qk=True)
    expected = jax.jit(layer.apply)({"params": tree}, QUERY, KEY, VALUE, mask=MASK)
    config, params = from_linen_module(layer, tree)
    assert config == CONFIG.replace(qk_norm=LayerNorm(epsilon=1e-6))
    assert_close(ours(config, params, QUERY, KEY, VALUE, MASK), expected, "float32")
    assert_same_bits(to_flax_params(params, config), tree)
    with pytest.raises(ValueError, match=r"have one `qk_norm`.*Received: qk_norm=RMSNorm"):
        from_flax_params(tree, CONFIG.replace(qk_norm="rms"))  # other numbers, of the same shapes
    with pytest.raises(ValueError, match=r"flax.linen has no `qk_norm`.*LayerNorm\(epsilon=0.1"):
        to_flax_params(params, config.replace(qk_norm=LayerNorm(epsilon=0.1)))


@pytest.mark.slow
def test_layer_norms_of_nnx_come_and_go():
    layer = nnx.MultiHeadAttention(N, D, N * H, normalize_qk=True, decode=False, rngs=nnx.Rngs(0))
    for name, seed in (("query_ln", 20), ("key_ln", 21)):
        getattr(layer, name).scale[...] = normal(seed, H)
    config, params = from_nnx_module(layer)
    assert config.qk_norm == LayerNorm(epsilon=1e-6)
    x = normal(1, B, T, D)
    assert_close(multi_head_attention(params, x, x, config=config), layer(x), "float32")
    assert_same_bits(to_nnx_state(params, config), nnx.to_pure_dict(nnx.state(layer, nnx.Param)))


def test_biases_that_flax_s_layer_has_and_ours_lacks_are_zeros():
    config = CONFIG.replace(use_bias=("query", "attention_output"))
    params = random_params(param_shapes(config, (1, D), (1, M), (1, C)))
    tree = to_flax_params(params, config)
    assert not tree["key"]["bias"].any()
    assert not tree["value"]["bias"].any()
    expected = multi_head_attention(params, QUERY, VALUE, KEY, config=config)
    whole = from_flax_params(tree, CONFIG)
    assert_close(multi_head_attention(whole, QUERY, VALUE, KEY, config=CONFIG), expected, "float32")
    assert_same_bits(from_flax_params(tree, config), params)
    del tree["key"]["bias"]
    assert_same_bits(from_flax_params(tree, config), params)
    tree["value"]["bias"] += 1
    with pytest.raises(ValueError, match=r"`value.bias` has no place in the config's `use_bias`"):
        from_flax_params(tree, config)


def test_parameters_of_a_derived_class_are_refused_by_name():
    class Scaled(nnx.MultiHeadAttention):
        pass

    layer = Scaled(N, D, N * H, decode=False, rngs=nnx.Rngs(0))
    assert from_nnx_module(layer)
    layer.temperature = nnx.Param(jnp.ones(N))
    with pytest.raises(ValueError, match=r"Scaled that also has \[\"\['temperature'\]\"\]"):
        from_nnx_module(layer)
