"""What the table of cases cannot show: memory, skipped tiles, garbage, the default of None."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, normal
from implementations import rows

from flax_mha import (
    Mask,
    MultiHeadAttentionConfig,
    dot_product_attention,
    explain,
    init_params,
    multi_head_attention,
)

N, H = 2, 16


def temporaries(implementation, T, rate):
    """Bytes that XLA allocates for forward and backward besides arguments and results."""
    x = jax.ShapeDtypeStruct((1, T, N, H), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def loss(q, k, v, dropout_key):
        call = dict(is_causal=True, dropout_rate=rate, dropout_key=dropout_key)
        return dot_product_attention(q, k, v, implementation=implementation, **call).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, key).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_memory_is_linear_where_the_reference_is_quadratic(rate):
    growth = {
        name: temporaries(name, 8192, rate) / temporaries(name, 2048, rate)
        for name in ("reference", "blockwise")
    }
    assert growth["reference"] > 12  # the control: 16 is quadratic
    assert growth["blockwise"] < 4.5  # 4 is linear


@pytest.mark.slow
def test_memory_target_of_16384_tokens():
    """Forward and backward with 8 heads of 64: at most 256 MB of temporaries."""
    x = jax.ShapeDtypeStruct((1, 16384, 8, 64), jnp.float32)
    loss = lambda q, k, v: dot_product_attention(q, k, v, is_causal=True).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 256e6


@pytest.mark.slow
def test_memory_of_packed_sequences_is_linear():
    """Which queries meet NaN of a token in their own segment is found without `[T, S]`."""

    def temporaries(T):
        x, ids = jax.ShapeDtypeStruct((1, T, N, H), jnp.float32), jnp.zeros((1, T), "int32")
        attend = lambda x, ids: dot_product_attention(x, x, x, mask=Mask.segments(ids, ids))
        compiled = jax.jit(attend).lower(x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(4096), temporaries(16384)
    assert many < 4.5 * few
    assert many < 16384**2 / 10


@pytest.mark.slow
@pytest.mark.parametrize("T", [1100, 1280])
def test_a_broken_token_of_a_long_packed_sequence(T):
    """Of many queries, looked at in parts: all of the segment are NaN, and no other."""
    ids = jnp.arange(T)[None] // 300
    x = normal(0, 1, T, N, H)
    call = dict(mask=Mask.segments(ids, ids), implementation="blockwise", is_causal=True)
    context = dot_product_attention(x, x.at[0, 650].set(jnp.nan), x, **call)
    expected = (jnp.arange(T) >= 650) & (jnp.arange(T) < 900)
    np.testing.assert_array_equal(jnp.isnan(context).any((0, 2, 3)), expected)


def test_tiles_without_a_common_segment_are_skipped():
    """NaN in skipped tiles' keys cannot show it, so the program must: a branch in the loop."""
    ids = jnp.repeat(jnp.arange(4), 16)[None]
    x = normal(0, 1, 64, N, H)
    call = dict(implementation="blockwise", block_sizes=(16, 16))
    packed = lambda x: dot_product_attention(x, x, x, mask=Mask.segments(ids, ids), **call)
    plain = lambda x: dot_product_attention(x, x, x, is_causal=True, **call)
    assert "stablehlo.case" in jax.jit(packed).lower(x).as_text()
    assert "stablehlo.case" not in jax.jit(plain).lower(x).as_text()


@pytest.mark.parametrize("implementation", rows())
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["padding", "segments"])
def test_garbage_reaches_nothing(implementation, garbage, kind):
    T, good = 40, 24
    arrays = [normal(seed, 2, T, N, H) for seed in range(3)]
    ids = (jnp.arange(T)[None] >= good).astype(int).repeat(2, axis=0)
    real = ids == 0
    masks = {"padding": Mask.padding(real, real), "segments": Mask.segments(ids, ids)}
    mask = masks[kind] & Mask.causal()

    def loss(arrays):
        context = dot_product_attention(*arrays, mask=mask, implementation=implementation)
        return (context[:, :good] ** 2).sum(), context

    broken = [x.at[:, good:].set(garbage) for x in arrays]
    (_, context), gradients = jax.value_and_grad(loss, has_aux=True)(broken)
    (_, clean), expected = jax.value_and_grad(loss, has_aux=True)(arrays)
    assert_close(context[:, :good], clean[:, :good], "float32")
    for gradient, slope in zip(gradients, expected):
        assert_close(gradient, slope, "float32")
    assert bool(jnp.isnan(context[:, good:]).all()) == (kind == "segments")


def test_none_chooses_by_size_and_says_so():
    call = lambda T: [jax.ShapeDtypeStruct((1, T, N, H), jnp.float32)] * 3
    assert explain(*call(96))["blockwise"].startswith("ok, and None chooses it")
    assert explain(*call(95))["reference"].startswith("ok, and None chooses it")
    few = jax.ShapeDtypeStruct((1, 7, N, H), jnp.float32)
    assert explain(few, *call(4096)[1:])["reference"].startswith("ok, and None chooses it")
    assert explain(*call(128), return_weights=True)["reference"].startswith("ok, and None")


@pytest.mark.slow
@pytest.mark.parametrize("block_sizes", [(3, 7), (5, 1), (1, 6)])
def test_without_dropout_a_block_has_any_size(block_sizes):
    arrays = [normal(seed, 2, 17, N, H) for seed in range(3)]
    call = dict(is_causal=True, implementation="blockwise", block_sizes=block_sizes)
    got = dot_product_attention(*arrays, **call)
    assert_close(got, dot_product_attention(*arrays, is_causal=True), "float32")


@pytest.mark.slow
def test_the_layer_runs_blockwise_and_equals_the_reference():
    config = MultiHeadAttentionConfig(2, 8, dropout=0.2, use_gate=True, num_kv_heads=1)
    x = normal(0, 2, 150, 16)
    params = init_params(jax.random.key(1), config, x.shape)
    lengths = jnp.array([150, 90])
    call = dict(
        use_causal_mask=True,
        value_mask=jnp.arange(150)[None] < lengths[:, None],
        dropout_key=jax.random.key(2),
    )
    run = lambda name: jax.value_and_grad(
        lambda p: (
            multi_head_attention(p, x, x, config=config.replace(implementation=name), **call) ** 2
        ).sum()
    )(params)
    (loss, gradient), (expected, slopes) = run("blockwise"), run("reference")
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_trees_close(gradient, slopes, "float32")
    layer = config.replace(implementation="blockwise")
    with pytest.raises(NotImplementedError, match=r"never holds the weights.*\['reference'\]"):
        multi_head_attention(params, x, x, config=layer, return_attention_scores=True)
