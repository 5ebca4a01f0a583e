"""The norms of the heads, the clamp and the scale: against formulas written out, head by head."""

import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import B, D, H, N, S, T, V, assert_close, normal, random_params, x64

from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    attention_scores,
    init_cache,
    init_cross_cache,
    init_params,
    multi_head_attention,
    param_axes,
    param_shapes,
)
from flax_mha import nnx as mha_nnx
from flax_mha.norms import L2Norm, LayerNorm, Norm, RMSNorm
from flax_mha.positions import Rotary

K = 1  # one head of keys and values for all N, so that a norm per head is [N, H] and [K, H]
NORMS = [
    RMSNorm(0.03),
    RMSNorm(0.03, use_scale=False),
    RMSNorm(0.03, offset=1.0),
    RMSNorm(0.03, per_head=True),
    RMSNorm(0.03, per_head=True, offset=1.0),
    RMSNorm(0.03, across_heads=True),
    RMSNorm(0.03, use_scale=False, across_heads=True),
    LayerNorm(0.03),
    LayerNorm(0.03, use_bias=True),
    LayerNorm(0.03, use_scale=False, use_bias=True),
    LayerNorm(0.03, per_head=True, use_bias=True),
    LayerNorm(0.03, across_heads=True, offset=1.0),
    L2Norm(),
]


def normalized(norm, heads_NH, params):
    """One position's heads, in float64 and plain loops; what the docstrings of the norms say."""
    result = np.zeros_like(heads_NH)
    across = getattr(norm, "across_heads", False)
    for n, head_H in enumerate(heads_NH):
        group = heads_NH.ravel() if across else head_H
        if isinstance(norm, L2Norm):
            result[n] = np.sqrt(len(head_H)) * head_H / np.sqrt(sum(group**2))
            continue
        mean = sum(group) / len(group) if isinstance(norm, LayerNorm) else 0.0
        square = sum((group - mean) ** 2) / len(group)
        result[n] = (head_H - mean) / np.sqrt(square + norm.epsilon)
        own = {leaf: array if array.ndim == 1 else array[n] for leaf, array in params.items()}
        if "scale" in own:
            result[n] *= norm.offset + own["scale"]
        result[n] += own.get("bias", 0.0)
    return result


def expected(params, x, config):
    """Output of self-attention in float64: projections, clamp, norms, softmax, output."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)
    heads = {}
    for name in ("query", "key", "value"):
        y = np.einsum("btd,dnh->btnh", x, params[name]["kernel"]) + params[name]["bias"]
        if config.clip_qkv is not None:
            y = np.minimum(np.maximum(y, -config.clip_qkv), config.clip_qkv)
        norm = config.norms.get(f"{name}_norm")
        for b, t in itertools.product(range(len(y)), range(y.shape[1])) if norm else ():
            y[b, t] = normalized(norm, y[b, t], params.get(f"{name}_norm", {}))
        heads[name] = np.repeat(y, N // y.shape[2], 2)
    scale = 1 / np.sqrt(H) if config.scale is None else config.scale
    powers = np.exp(scale * np.einsum("btnh,bsnh->bnts", heads["query"], heads["key"]))
    weights = powers / powers.sum(-1, keepdims=True)
    context = np.einsum("bnts,bsnv->btnv", weights, heads["value"])
    output = params["attention_output"]
    return np.einsum("btnv,nve->bte", context, output["kernel"]) + output["bias"]


def layer(x=None, **fields):
    x = normal(5, B, T, D) if x is None else x
    config = MultiHeadAttentionConfig(N, H, V, num_kv_heads=K, **fields)
    return config, random_params(param_shapes(config, x.shape)), x


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_norms_are_their_formulas(norm, implementation):
    fields = {"qk_norm": norm, "value_norm": norm, "implementation": implementation}
    config, params, x = layer(**fields)
    assert_close(
        multi_head_attention(params, x, x, config=config), expected(params, x, config), "float32"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{"clip_qkv": 0.3}, {"scale": 0.9}, {"scale": 0.9, "clip_qkv": 0.3, "qk_norm": "rms"}],
    ids=str,
)
def test_the_clamp_and_the_scale_are_their_formulas(fields):
    config, params, x = layer(**fields)
    output = multi_head_attention(params, x, x, config=config)
    assert_close(output, expected(params, x, config), "float32")
    without = multi_head_attention(params, x, x, config=layer(qk_norm=config.qk_norm)[0])
    assert np.abs(output - without).max() > 1e-3
    rows = jnp.array([1, T - 1])
    _, scores = multi_head_attention(params, x, x, config=config, return_attention_scores=True)
    some = attention_scores(params, x, x, config=config, query_rows=rows)
    assert_close(some, scores[:, :, rows], "float32")


@pytest.mark.parametrize("norm", [NORMS[3], NORMS[5], NORMS[10]], ids=str)
def test_norms_of_caches_are_those_of_the_whole_call(norm):
    """A cache holds heads that were normalized, values too."""
    config, params, x = layer(qk_norm=norm, value_norm=norm, clip_qkv=0.8, scale=0.4)
    whole = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    cache, outputs = init_cache(config, B, T), []
    for t in range(T):
        step = x[:, t : t + 1]
        output, cache = multi_head_attention(params, step, step, config=config, cache=cache)
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), whole, "float32")
    encoded = normal(6, B, S, D)
    cross = init_cross_cache(params, encoded, config=config)
    output, _ = multi_head_attention(params, x, None, config=config, cache=cross)
    assert_close(output, multi_head_attention(params, x, encoded, config=config), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("norm", [NORMS[0], NORMS[5], NORMS[8], NORMS[11]], ids=str)
def test_heads_of_any_size_have_a_norm(norm):
    """Squares of 1e25 leave float32: the norm of a head so large is that of the head itself."""
    small, params = normal(7, 1, 2, N, H), norm.shapes(N, H)
    params = {leaf: normal(8, *shape) for leaf, shape in params.items()}
    tiny = dataclasses.replace(norm, epsilon=1e-12)
    huge, plain = tiny(1e25 * small, params), tiny(small, params)
    assert_close(huge, plain, "float32")
    slope = lambda size: jax.grad(lambda x: (tiny(size * x, params) ** 3).sum())(small)
    assert_close(slope(1e25), slope(1.0), "float32", scale=np.abs(slope(1.0)).max())


@pytest.mark.slow
def test_shapes_initial_values_and_names_of_axes():
    norm = LayerNorm(per_head=True, use_bias=True, offset=1.0)
    config, params, x = layer(qk_norm=norm, value_norm=RMSNorm())
    shapes = {n: {k: v.shape for k, v in params[n].items()} for n in params if n.endswith("norm")}
    assert shapes == {
        "query_norm": {"scale": (N, H), "bias": (N, H)},
        "key_norm": {"scale": (K, H), "bias": (K, H)},
        "value_norm": {"scale": (V,)},
    }
    initial = init_params(jax.random.key(0), config, x.shape)
    assert not initial["query_norm"]["scale"].any()
    assert (initial["value_norm"]["scale"] == 1).all()
    axes = param_axes(config)
    assert tuple(axes["query_norm"]["scale"]) == ("heads", "head_dim")
    assert tuple(axes["key_norm"]["bias"]) == ("kv_heads", "head_dim")
    assert tuple(axes["value_norm"]["scale"]) == ("head_dim",)


def test_both_modules_hold_the_norms():
    config, _, x = layer(qk_norm=NORMS[8], value_norm=NORMS[3], clip_qkv=2.0, scale=0.5)
    module = MultiHeadAttention.from_config(config)
    params = module.init(jax.random.key(0), x, x)["params"]
    output = module.apply({"params": params}, x, x)
    assert_close(output, multi_head_attention(params, x, x, config=config), "float32")
    chex.assert_trees_all_equal(
        mha_nnx.MultiHeadAttention.from_params(params, config)(x, x), output
    )


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_norms_go_to_json_and_back(norm):
    config = MultiHeadAttentionConfig(N, H, qk_norm=norm, value_norm=norm, scale=0.25, clip_qkv=8)
    back = MultiHeadAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)


def test_a_name_is_its_object():
    assert MultiHeadAttentionConfig(N, H, qk_norm="rms").qk_norm == RMSNorm()
    assert MultiHeadAttentionConfig(N, H, qk_norm="l2") == MultiHeadAttentionConfig(
        N, H, qk_norm=L2Norm()
    )


def test_a_norm_of_one_s_own():
    class Halves(Norm):
        def __call__(self, x_BTNH, params):
            return x_BTNH / 2

    config, params, x = layer(value_norm=Halves())
    doubled = dict(params, value=jax.tree.map(lambda leaf: 2 * leaf, params["value"]))
    plain = multi_head_attention(params, x, x, config=config.replace(value_norm=None))
    assert_close(multi_head_attention(doubled, x, x, config=config), plain, "float32")
    with pytest.raises(TypeError, match=r"Register it: `@flax_mha.norms.register`"):
        config.to_dict()


@pytest.mark.parametrize("shapes", [{"gain": (H,)}, {"scale": (N, 1)}, {"scale": ()}], ids=str)
def test_parameters_of_an_own_norm_have_letters(shapes):
    class Odd(Norm):
        def shapes(self, heads, features):
            return shapes

        def __call__(self, x_BTNH, params):
            return x_BTNH

    with pytest.raises(ValueError, match=r"A norm's parameters are `scale` and `bias`.*Odd"):
        param_shapes(MultiHeadAttentionConfig(N, H, qk_norm=Odd()), (T, D))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"qk_norm": "layer"}, ValueError, r"`qk_norm` must be one of \['rms', 'l2'\]"),
        ({"value_norm": 3}, TypeError, "an object of flax_mha.norms"),
        ({"qk_norm": {"class_name": "RMS"}}, ValueError, "'L2Norm', 'LayerNorm', 'RMSNorm'"),
        ({"qk_norm": {"class_name": "RMSNorm", "config": {"eps": 1}}}, ValueError, "epsilon"),
        ({"scale": 0}, ValueError, "`scale` must be a finite number > 0"),
        ({"scale": jnp.ones(())}, TypeError, "must be a finite number > 0"),
        ({"clip_qkv": -1.0}, ValueError, "`clip_qkv` must be a finite number > 0"),
    ],
)
def test_bad_norms(fields, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttentionConfig(N, H, **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RMSNorm(epsilon=0), "must be a finite number > 0"),
        (lambda: RMSNorm(use_scale=False, offset=1.0), "`offset` says how the scale is kept"),
        (lambda: LayerNorm(use_scale=False, per_head=True), "`per_head` says how the scale"),
        (lambda: RMSNorm(per_head=True, across_heads=True), "has a scale for each of them already"),
    ],
)
def test_bad_arguments_of_norms(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scales_of_another_layout_are_refused_with_their_letters():
    _, params, x = layer(qk_norm=RMSNorm(per_head=True))
    config, *_ = layer(qk_norm=RMSNorm())
    with pytest.raises(ValueError, match=r"\['query_norm'\]\['scale'\] must be \[H\] = "):
        multi_head_attention(params, x, x, config=config)


def test_qk_norms_and_sinks_from_their_formulas():
    x = normal(5, B, T, D)
    config = MultiHeadAttentionConfig(N, H, qk_norm="rms", use_sinks=True)
    params = random_params(param_shapes(config, x.shape))

    def project(name):
        kernel, bias = (np.asarray(params[name][leaf]) for leaf in ("kernel", "bias"))
        return np.einsum("btd,dnh->btnh", np.asarray(x), kernel) + bias

    unit = lambda y: y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    query, key = (
        unit(project(name)) * np.asarray(params[f"{name}_norm"]["scale"])
        for name in ("query", "key")
    )
    powers = np.exp(np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(H))
    sink = np.exp(np.asarray(params["sinks"]["logits"]))[None, :, None, None]
    expected = powers / (powers.sum(-1, keepdims=True) + sink)
    _, scores = multi_head_attention(params, x, x, config=config, return_attention_scores=True)
    assert_close(scores, expected, "float32")
    cosines = MultiHeadAttentionConfig(N, H, qk_norm="l2")
    plain = {n: p for n, p in params.items() if n in param_shapes(cosines, x.shape)}
    _, scores = multi_head_attention(plain, x, x, config=cosines, return_attention_scores=True)
    query, key = (
        y / np.linalg.norm(y, axis=-1, keepdims=True) for y in map(project, ("query", "key"))
    )
    powers = np.exp(np.sqrt(H) * np.einsum("btnh,bsnh->bnts", query, key))
    assert_close(scores, powers / powers.sum(-1, keepdims=True), "float32")


def cosine_layer(x, dtype="float32", **fields):
    """(config, params, the weights of sqrt(H) cos(query, key) in float64)."""
    config = MultiHeadAttentionConfig(N, H, qk_norm="l2", use_bias=False, **fields)
    params = random_params(param_shapes(config, x.shape), dtype=dtype)
    query, key = (
        np.einsum("btd,dnh->btnh", *(np.asarray(y, np.float64) for y in (x, params[n]["kernel"])))
        for n in ("query", "key")
    )
    query, key = (y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (query, key))
    powers = np.exp(np.sqrt(H) * np.einsum("btnh,bsnh->bnts", query, key))
    return config, params, powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("size", [1e25, 1.0, 1e-3, 1e-6, 1e-10])
def test_l2_is_a_cosine_at_every_size(size):
    """Squares of 1e25 and of 1e-23 leave float32; the cosine does not depend on the size."""
    x = normal(5, B, T, D)
    config, params, expected = cosine_layer(x)
    _, scores = multi_head_attention(
        params, size * x, size * x, config=config, return_attention_scores=True
    )
    assert_close(scores, expected, "float32")


def test_l2_in_16_bits_is_the_cosine_of_the_rounded_heads():
    x = normal(5, B, T, D).astype("bfloat16")
    config, params, expected = cosine_layer(x, "bfloat16")
    small = (x * 2.0**-20, x * 2.0**-20)
    _, scores = multi_head_attention(params, *small, config=config, return_attention_scores=True)
    assert_close(scores, expected, "bfloat16")


@pytest.mark.slow
def test_a_head_of_zeros_has_no_direction_and_no_gradient():
    config, params, _ = cosine_layer(normal(5, B, T, D))
    x, value = normal(5, B, T, D).at[0, 2].set(0.0), normal(6, B, T, D)
    _, scores = multi_head_attention(params, x, x, config=config, return_attention_scores=True)
    assert_close(scores[0, :, 2], np.full((N, T), 1 / T), "float32")  # cos = 0 with every key
    loss = lambda x: (multi_head_attention(params, x, value, config=config) ** 2).sum()
    gradient = jax.grad(loss)(x)
    assert np.isfinite(gradient).all()
    assert not gradient[0, 2].any()
    assert np.abs(gradient[0, 3]).max() > 1e-3
    curvature = jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),))[1]
    assert np.isfinite(curvature).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_l2_hides_no_nan(broken):
    x = normal(5, B, T, D)
    config, params, _ = cosine_layer(x)
    output = np.asarray(multi_head_attention(params, x.at[0, 2, 3].set(broken), x, config=config))
    assert np.isnan(output[0, 2]).all()
    assert np.isfinite(output[1]).all()


@pytest.mark.slow
def test_l2_s_gradient_is_that_of_the_quotient():
    """The largest feature that is divided out carries no gradient, and none is missing."""
    with x64():
        x = normal(5, 1, 3, D, dtype="float64")
        config = MultiHeadAttentionConfig(N, H, qk_norm="l2", param_dtype="float64")
        params = random_params(param_shapes(config, x.shape), dtype="float64")
        loss = lambda x: (multi_head_attention(params, x, x, config=config) ** 2).sum()
        direction = normal(6, 1, 3, D, dtype="float64")
        slope = float((jax.grad(loss)(x) * direction).sum())
        step = 1e-5
        differences = float(loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert slope == pytest.approx(differences, rel=1e-7)


@pytest.mark.slow
def test_the_epsilon_of_the_norms():
    x = normal(5, B, T, D)
    scores = lambda **fields: multi_head_attention(
        params, x, x, config=config.replace(**fields), return_attention_scores=True
    )[1]
    config = MultiHeadAttentionConfig(N, H, qk_norm="rms")
    params = random_params(param_shapes(config, x.shape))
    np.testing.assert_array_equal(scores(qk_norm=RMSNorm(epsilon=1e-6)), scores())
    assert np.abs(scores(qk_norm=RMSNorm(epsilon=1.0)) - scores()).max() > 3e-3
    config, params, _ = cosine_layer(x)
    flat = np.full((B, N, T, T), 1 / T)
    assert_close(scores(qk_norm=L2Norm(epsilon=1e6)), flat, "float32")


@pytest.mark.slow
def test_nan_in_padding_reaches_no_gradient_of_the_norms():
    config = MultiHeadAttentionConfig(N, H, qk_norm="rms", use_sinks=True, position=Rotary(dim=4))
    x = normal(6, B, T, D).at[0, 5:].set(jnp.nan)
    real = jnp.isfinite(x).all(-1)
    params = random_params(param_shapes(config, x.shape))

    def loss(params):
        output = multi_head_attention(params, x, x, config=config, query_mask=real, value_mask=real)
        return (jnp.where(real[..., None], output, 0) ** 2).sum()

    gradients = jax.grad(loss)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.abs(gradients["query_norm"]["scale"]).max() > 0
    assert np.abs(gradients["sinks"]["logits"]).max() > 0
