"""Quantized kernels: against NumPy's rounding, in every kind of layer and every implementation."""

import dataclasses

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_mha
import flax_mha.nnx
from flax_mha import MultiHeadAttentionConfig as Config
from flax_mha import (
    dequantize_params,
    init_cache,
    init_cross_cache,
    init_params,
    lora_params,
    merge_lora,
    multi_head_attention,
    quantize_params,
)
from flax_mha.interop.torch import to_torch_state_dict
from flax_mha.layer.projection import project
from flax_mha.params.quantized import QuantizedKernel

B, T, D = 2, 9, 32
X = jax.random.normal(jax.random.key(0), (B, T, D))
LATENT = flax_mha.Latent(rank=12, shared_dim=4, query_rank=10)
LAYERS = {
    "heads": Config(num_heads=4, key_dim=8),
    "shared keys, gate": Config(num_heads=4, key_dim=8, num_kv_heads=2, use_gate=True),
    "no biases": Config(num_heads=4, key_dim=8, use_bias=False),
    "output of two axes": Config(num_heads=4, key_dim=8, output_shape=(3, 5)),
    "latents": Config(num_heads=4, key_dim=8, latent=LATENT),
}
INPUTS = {"attention_output": 2}
MOST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}


def rounded(params, dtype):
    """In NumPy: each output's column as the numbers of `dtype`, by its own largest."""

    def of(name, leaf, x):
        if leaf != "kernel":
            return x
        exact = np.asarray(x, np.float64)
        scale = np.abs(exact).max(tuple(range(INPUTS.get(name, 1))), keepdims=True) / MOST[dtype]
        steps = exact / scale
        if dtype.startswith("int"):
            steps = np.rint(steps)
        else:
            steps = np.asarray(jnp.asarray(steps, "float32").astype(dtype), np.float64)
        return jnp.asarray(steps * scale, x.dtype)

    return {n: {leaf: of(n, leaf, x) for leaf, x in leaves.items()} for n, leaves in params.items()}


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "pallas_interpreted"])
@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("name", LAYERS)
def test_a_call_is_that_of_rounded_kernels(name, dtype, implementation):
    config = LAYERS[name].replace(implementation=implementation)
    params = init_params(jax.random.key(1), config, X.shape)
    small = quantize_params(params, dtype)
    want = multi_head_attention(rounded(params, dtype), X, X, config=config, use_causal_mask=True)
    got = multi_head_attention(small, X, X, config=config, use_causal_mask=True)
    np.testing.assert_allclose(got, want, atol=2e-5)
    chex_equal = jax.tree.map(jnp.allclose, dequantize_params(small), rounded(params, dtype))
    assert all(jax.tree.leaves(chex_equal))


@pytest.mark.slow
def test_the_bytes_are_a_quarter():
    params = init_params(jax.random.key(1), Config(num_heads=8, key_dim=64), (1, 512))
    kernels = lambda tree: sum(
        x.nbytes for leaves in tree.values() for x in jax.tree.leaves(leaves["kernel"])
    )
    assert 0.25 <= kernels(quantize_params(params)) / kernels(params) < 0.253


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_layer_stays_one_and_its_sums_stay_finite(dtype):
    """A sum of 512 numbers of up to 127 would leave float16."""
    config = Config(num_heads=2, key_dim=8, param_dtype=dtype)
    params = init_params(jax.random.key(1), config, (1, 512))
    params = jax.tree.map(lambda x: jnp.abs(x), params)
    small = quantize_params(params)
    assert small["query"]["kernel"]["scale"].dtype == dtype
    x = jnp.full((1, 3, 512), 8, dtype)
    got = multi_head_attention(small, x, x, config=config)
    want = multi_head_attention(params, x, x, config=config)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype("float32"), want.astype("float32"), rtol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-7, 1e-4, 6.506e4])
def test_columns_of_float16_near_its_ends(size):
    """The scale of small ones is no normal number, and 128 times that of large ones none at all."""
    kernel = jnp.linspace(-1, 1, 60).reshape(5, 3, 4) * size
    params = {"query": {"kernel": kernel.astype("float16")}}
    small = quantize_params(params)["query"]["kernel"]
    back = dequantize_params({"query": {"kernel": small}})["query"]["kernel"]
    exact = np.asarray(params["query"]["kernel"], np.float64)
    step = max(1.02 * np.abs(exact).max(0).max() / 127, 2.0**-24)
    assert np.abs(np.asarray(back, np.float64) - exact).max() <= 0.51 * step + 2.0**-25
    x = jnp.full((1, 1, 5), 2.0**-6, "float16")
    assert jnp.isfinite(back).all()
    y = project(
        "BTD,DNH->BTNH",
        x,
        {"kernel": QuantizedKernel(**small)},
        dtype="float16",
        precision=None,
        isolate=False,
    )
    want = np.einsum("btd,dnh->btnh", np.asarray(x, np.float64), np.asarray(back, np.float64))
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=0.01, atol=2.0**-23)


@pytest.mark.slow
def test_caches_scores_and_cross_caches_read_them():
    config = LAYERS["heads"]
    params = init_params(jax.random.key(1), config, X.shape)
    small, same = quantize_params(params), rounded(params, "int8")
    outputs = []
    for tree in (small, same):
        y, cache = multi_head_attention(
            tree, X[:, :7], X[:, :7], config=config, cache=init_cache(config, B, 9)
        )
        step = multi_head_attention(tree, X[:, 7:8], X[:, 7:8], config=config, cache=cache)[0]
        cross = init_cross_cache(tree, X, config=config)
        crossed = multi_head_attention(tree, X[:, :2], None, config=config, cache=cross)[0]
        rows = flax_mha.attention_scores(tree, X, X, config=config, query_rows=jnp.array([3]))
        outputs.append((y, step, crossed, rows))
    for got, want in zip(*outputs):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_adapters_are_trained_beside_them_and_the_kernels_stay():
    config = LAYERS["shared keys, gate"]
    params = init_params(jax.random.key(1), config, X.shape)
    small = quantize_params(params)
    lora = lora_params(jax.random.key(2), config, X.shape, rank=3)
    call = lambda tree, lora: multi_head_attention(tree, X, X, config=config, lora=lora)
    np.testing.assert_array_equal(
        call(small, lora), multi_head_attention(small, X, X, config=config)
    )
    loss = lambda lora, tree: jnp.sum(jnp.sin(call(tree, lora)))
    optimizer = optax.sgd(0.1)
    state = optimizer.init(lora)
    for _ in range(2):
        got, want = (jax.grad(loss)(lora, tree) for tree in (small, rounded(params, "int8")))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
        updates, state = optimizer.update(got, state)
        lora = optax.apply_updates(lora, updates)
    merged = merge_lora(dequantize_params(small), lora)
    want = multi_head_attention(merged, X, X, config=config)
    np.testing.assert_allclose(call(small, lora), want, atol=1e-5)
    assert abs(call(small, lora) - call(small, None)).max() > 1e-3


@pytest.mark.slow
def test_linen_and_nnx_layers_take_them():
    config = LAYERS["heads"]
    layer = flax_mha.MultiHeadAttention.from_config(config, name=None)
    variables = layer.init(jax.random.key(1), X, X)
    small = quantize_params(variables["params"])
    want = multi_head_attention(small, X, X, config=config)
    np.testing.assert_array_equal(layer.apply({"params": small}, X, X), want)
    state = flax.serialization.to_bytes(small)
    back = flax.serialization.from_bytes(small, state)
    np.testing.assert_array_equal(layer.apply({"params": back}, X, X), want)

    other = flax_mha.nnx.MultiHeadAttention(
        4, 8, query_features=D, lora=flax_mha.Lora(rank=2), rngs=nnx.Rngs(0)
    )
    other.set_params(small)
    np.testing.assert_array_equal(other(X, X), want)
    loss = lambda other: other(X, X).sum()
    trained = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(other)
    assert jax.tree.leaves(trained)
    biases = nnx.grad(loss)(other)  # the kernels are no `nnx.Param`s
    assert len(jax.tree.leaves(biases)) == 4 + len(jax.tree.leaves(trained)) == 8
    np.testing.assert_array_equal(nnx.jit(lambda other: other(X, X))(other), want)
    other.set_params(dequantize_params(small))
    np.testing.assert_allclose(other(X, X), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_they_are_cut_as_their_kernels_were(kind):
    config = LAYERS["heads"]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    params = init_params(jax.random.key(1), config, X.shape)
    want = multi_head_attention(quantize_params(params), X, X, config=config)
    specs = flax_mha.param_specs(config, (("heads", "model"),), query_shape=X.shape)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        small = jax.jit(quantize_params)(jax.tree.map(place, params, specs))
        assert small["query"]["kernel"]["value"].sharding.spec[1] == "model"
        x = place(X, P("data"))
        got = jax.jit(lambda small, x: multi_head_attention(small, x, x, config=config))(small, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


@dataclasses.dataclass
class QArray:
    """What qwix makes, by its public fields."""

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    qtype: str = "int8"


jax.tree_util.register_dataclass(
    QArray, data_fields=["qvalue", "scale", "zero_point"], meta_fields=["qtype"]
)


def with_query(params, kernel):
    return {**params, "query": {**params["query"], "kernel": kernel}}


def test_qwix_s_arrays_of_a_scale_an_output_are_taken():
    config = LAYERS["heads"]
    small = quantize_params(init_params(jax.random.key(1), config, X.shape))
    value, scale = (small["query"]["kernel"][x] for x in ("value", "scale"))
    theirs = with_query(small, QArray(value, scale[None]))
    want = multi_head_attention(small, X, X, config=config)
    np.testing.assert_array_equal(multi_head_attention(theirs, X, X, config=config), want)
    jitted = jax.jit(lambda tree: multi_head_attention(tree, X, X, config=config))
    np.testing.assert_allclose(jitted(theirs), want, atol=1e-6)
    with pytest.raises(NotImplementedError, match=r"one scale an output channel.*qwix.dequantize"):
        multi_head_attention(
            with_query(small, QArray(value, jnp.ones((4, 4, 8)))), X, X, config=config
        )
    broken = QArray(value, scale[None], zero_point=scale[None])
    with pytest.raises(NotImplementedError, match="no zero point"):
        multi_head_attention(with_query(small, broken), X, X, config=config)


def test_bad_input():
    config = LAYERS["heads"].replace(kernel_constraint="non_neg", kernel_regularizer="l2")
    params = init_params(jax.random.key(1), config, X.shape)
    small = quantize_params(params)
    value, scale = (small["query"]["kernel"][x] for x in ("value", "scale"))
    call = lambda kernel: multi_head_attention(with_query(small, kernel), X, X, config=config)
    with pytest.raises(ValueError, match=r"`dtype` must be one of \['int8', 'int4', 'float8_e4m"):
        quantize_params(params, "int16")
    with pytest.raises(ValueError, match=r"`dtype` must be one of"):
        quantize_params(params, "no dtype")
    with pytest.raises(TypeError, match=r"params\['query'\]\['kernel'\] must be an array.*dequan"):
        quantize_params(small)
    with pytest.raises(ValueError, match=r"scale of a quantized .*'query'.* must be \[N, H\] = "):
        call({"value": value, "scale": scale[0]})
    with pytest.raises(TypeError, match=r"The value of a quantized .* must be one of int8"):
        call({"value": value.astype("int32"), "scale": scale})
    with pytest.raises(TypeError, match=r"The scale of a quantized .* must be floats"):
        call({"value": value, "scale": scale.astype("int32")})
    with pytest.raises(ValueError, match=r"must hold value and scale.*qvalue"):
        call({"qvalue": value, "scale": scale})
    with pytest.raises(ValueError, match=r"params\['query'\]\['kernel'\] must be \[D, N, H\]"):
        call({"value": value[:5], "scale": scale})
    with pytest.raises(TypeError, match=r"must be an array.*a quantized kernel.*dequantize_params"):
        merge_lora(small, lora_params(jax.random.key(2), config, X.shape))
    with pytest.raises(TypeError, match=r"must be an array.*a quantized kernel"):
        flax_mha.regularization_loss(small, config)
    with pytest.raises(TypeError, match="A quantized kernel has no constraint"):
        flax_mha.apply_constraints(small, config)
    with pytest.raises(TypeError, match=r"must be an array.*a quantized kernel.*dequantize_params"):
        to_torch_state_dict(small, config)
    with pytest.raises(TypeError, match=r"real- or complex-valued inputs|float"):
        jax.grad(lambda tree: multi_head_attention(tree, X, X, config=config).sum())(small)
