"""Int8 caches: against the same attention in NumPy's rounding, whatever the cache and the call."""

import dataclasses
import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_mha
from flax_mha import MultiHeadAttentionConfig as Config
from flax_mha import forward, init_cache, init_cross_cache, init_params, multi_head_attention
from flax_mha.attention import stored
from flax_mha.attention.contract import Scales
from flax_mha.core.quantization import quantized
from flax_mha.positions import Alibi, Rotary, Score

B, T, D = 3, 17, 32
X = jax.random.normal(jax.random.key(0), (B, T, D))


@dataclasses.dataclass(frozen=True)
class ByHead(Score):
    def __call__(self, logits, b, n, t, s):
        return logits - 0.1 * n.astype("float32")


LAYERS = {
    "heads": Config(num_heads=4, key_dim=8),
    "shared keys": Config(num_heads=4, key_dim=8, num_kv_heads=2, value_dim=6),
    "one key": Config(num_heads=4, key_dim=8, num_kv_heads=1),
    "rotary, norms": Config(num_heads=4, key_dim=8, position=Rotary(), qk_norm="rms"),
    "cap, sinks, gate": Config(num_heads=4, key_dim=8, soft_cap=2.0, use_sinks=True, use_gate=True),
    "alibi": Config(num_heads=4, key_dim=8, position=Alibi()),
    "window": Config(num_heads=4, key_dim=8, sliding_window=5),
    "chunks": Config(num_heads=4, key_dim=8, chunk_size=4),
    "score": Config(num_heads=4, key_dim=8, score=ByHead()),
}
SCORES = {ByHead: lambda x, b, n, t, s: x - 0.1 * n.astype("float32")}
PIECES = {"steps": (1,) * T, "prompt and steps": (12, 1, 1, 1, 1, 1), "pieces": (5, 7, 5)}


def rounded(x):
    """In NumPy: each token's head as 255 steps."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return jnp.asarray(np.rint(x / np.where(scale == 0, 1, scale)) * scale, "float32")


def unrounded(value, scale):
    return value.astype("float32") * scale[..., None]


def expected(config, params, mask=None):
    """The whole sequence at once, of rounded keys and values."""
    made = forward(params, X, X, config=config, use_causal_mask=True)
    made = jax.tree.map(lambda x: x.astype("float32"), made)
    offset = {}
    if isinstance(config.position, Alibi):
        t = np.arange(T)
        slopes = 2.0 ** -np.arange(2.0, 10.0, 2.0)
        distance = np.abs(t[:, None] - t[None])
        offset["bias"] = jnp.asarray(-slopes[:, None, None] * distance[None], "float32")
    window = None if config.sliding_window is None else (config.sliding_window - 1, 0)
    if config.chunk_size is not None:
        chunk = np.arange(T) // config.chunk_size
        mask = jnp.asarray(chunk[:, None] == chunk[None])
    context = flax_mha.dot_product_attention(
        made.query,
        rounded(made.key),
        rounded(made.value),
        mask=mask,
        is_causal=True,
        local_window_size=window,
        soft_cap=config.soft_cap,
        sinks=params["sinks"]["logits"] if config.use_sinks else None,
        score=SCORES.get(type(config.score)),
        **offset,
    )
    context = context if made.gate is None else context * made.gate
    kernel, bias = params["attention_output"]["kernel"], params["attention_output"]["bias"]
    return jnp.einsum("BTNV,NVE->BTE", context, kernel) + bias[None, None]


def decoded(config, params, pieces, cache, x=X, **call):
    outputs, start = [], 0
    for n in pieces:
        new = x[:, start : start + n]
        y, cache = multi_head_attention(params, new, new, config=config, cache=cache, **call)
        outputs.append(y)
        start += n
    return jnp.concatenate(outputs, 1), cache


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_cache_is_attention_of_rounded_keys_and_values(name, pieces, implementation):
    config = LAYERS[name].replace(implementation=implementation)
    params = init_params(jax.random.key(1), config, X.shape)
    got, cache = decoded(config, params, PIECES[pieces], init_cache(config, B, 20, "int8"))
    want = expected(config.replace(implementation="reference"), params)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert cache.key.dtype == cache.value.dtype == jnp.int8
    plain = forward(params, X, X, config=config, use_causal_mask=True).output
    assert 0 < abs(got - plain).max() < 0.03 * abs(plain).max()


def test_half_a_step_at_most_and_zeros_nan_and_inf_stay():
    x = jnp.array(
        [[3.0, -1.7, 0.011], [0, 0, 0], [jnp.nan, 1, 2], [jnp.inf, 1, 2], [2e38, 1, -3e38]]
    )
    value, scale = quantized(x, -1)
    back = np.asarray(unrounded(value, scale))
    x, healthy = np.asarray(x), [0, 1, 4]
    steps = np.abs(x[healthy]).max(-1, keepdims=True) / 127
    assert (np.abs(back - x)[healthy] <= 0.5001 * steps).all()
    assert np.isnan(back[2]).all()
    assert np.isnan(back[3]).all()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_latents_are_rounded_once_and_serve_as_keys_and_values(implementation):
    latent = flax_mha.Latent(rank=12, shared_dim=4)
    config = Config(num_heads=4, key_dim=8, latent=latent, implementation=implementation)
    params = init_params(jax.random.key(1), config, X.shape)
    plain, floats = decoded(config, params, (12, 5), init_cache(config, B, 20))
    got, cache = decoded(config, params, (12, 5), init_cache(config, B, 20, "int8"))
    np.testing.assert_allclose(
        unrounded(cache.key, cache.key_scale), rounded(floats.key), atol=1e-6
    )
    assert 0 < abs(got - plain).max() < 0.03 * abs(plain).max()
    # The floats' own cache, whose latents are those of the int8 one, and its last token again.
    same = dataclasses.replace(floats, key=unrounded(cache.key, cache.key_scale)).rewind(T)
    new = X[:, :1] * 0 + 1
    call = dict(config=config)
    want = multi_head_attention(params, new, new, cache=same, **call)[0]
    step = multi_head_attention(params, new, new, cache=cache, **call)[0]
    np.testing.assert_allclose(step, want, atol=0.02 * float(abs(want).max()))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_an_encoder_s_keys_with_padding_and_the_gradient_of_queries(implementation):
    config = Config(num_heads=4, key_dim=8, num_kv_heads=2, implementation=implementation)
    params = init_params(jax.random.key(1), config, X.shape)
    real = jnp.arange(T)[None] < jnp.array([17, 9, 3])[:, None]
    source = jnp.where(real[..., None], X, jnp.nan)
    make = lambda dtype: init_cross_cache(
        params, source, config=config, value_mask=real, dtype=dtype
    )
    cache, floats = make("int8"), make(None)
    back = lambda x, scale: unrounded(x, jnp.where(jnp.isfinite(scale), scale, 0))
    same = dataclasses.replace(
        floats,
        key=back(cache.key, cache.key_scale),
        value=back(cache.value, cache.value_scale),
    )
    loss = lambda query, cache: jnp.sum(
        jnp.sin(multi_head_attention(params, query, None, config=config, cache=cache)[0])
    )
    query = X[:, :11] * 2
    np.testing.assert_allclose(loss(query, cache), loss(query, same), rtol=1e-5)
    got, want = (jax.grad(loss)(query, x) for x in (cache, same))
    np.testing.assert_allclose(got, want, atol=1e-5)
    twice = lambda cache: jax.jvp(lambda q: jax.grad(loss)(q, cache), (query,), (query,))[1]
    np.testing.assert_allclose(twice(cache), twice(same), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 5], ids=["line", "ring"])
def test_rewind_reorder_and_padding_on_the_right(size):
    config = Config(num_heads=4, key_dim=8, sliding_window=size)
    params = init_params(jax.random.key(1), config, X.shape)
    attend = lambda x, cache, **call: multi_head_attention(
        params, x, x, config=config, cache=cache, **call
    )
    _, cache = attend(X[:, :9], init_cache(config, B, 20, "int8", slack=3))
    want = attend(X[:, 9:10], cache)[0]
    drafts = attend(X[:, 3:6], cache)[1]
    np.testing.assert_array_equal(attend(X[:, 9:10], drafts.rewind(9))[0], want)
    moved = cache.reorder(jnp.array([2, 2, 0]))
    order = np.array([2, 2, 0])
    np.testing.assert_allclose(attend(X[order, 9:10], moved)[0], want[order], atol=1e-6)
    real = jnp.arange(6)[None] < jnp.array([6, 4, 1])[:, None]
    broken = jnp.where(real[..., None], X[:, 9:15], jnp.nan)
    _, padded = attend(broken, cache, value_mask=real)
    assert (padded.length - cache.length).tolist() == [6, 4, 1]
    row = attend(X[2:, 10:11], jax.tree.map(lambda x: x[2:], padded))[0]
    alone = jax.tree.map(lambda x: x[2:], cache)
    _, alone = attend(X[2:, 9:10], alone)
    np.testing.assert_allclose(row, attend(X[2:, 10:11], alone)[0], atol=1e-6)


@pytest.mark.slow
def test_a_token_of_nan_breaks_what_it_breaks_in_a_cache_of_floats():
    config = Config(num_heads=4, key_dim=8)
    params = init_params(jax.random.key(1), config, X.shape)
    broken = X.at[1, 2].set(jnp.nan)
    got, want = (
        decoded(config, params, (1, 1, 1, 1, 3), init_cache(config, B, 20, dtype), broken)[0]
        for dtype in ("int8", None)
    )
    np.testing.assert_array_equal(jnp.isnan(got), jnp.isnan(want))
    assert jnp.isnan(got[1, 2:]).all()
    assert jnp.isnan(got).mean() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_round_no_more_than_they_do_without(dtype):
    config = Config(num_heads=4, key_dim=8, dtype=dtype)
    params = init_params(jax.random.key(1), config, X.shape)
    got, cache = decoded(config, params, (9, 1, 7), init_cache(config, B, 20, "int8"))
    assert got.dtype == dtype
    assert cache.key_scale.dtype == jnp.float32
    want = expected(config, params)
    plain = forward(params, X, X, config=config, use_causal_mask=True).output
    exact = forward(params, X, X, config=config.replace(dtype="float32"), use_causal_mask=True)
    own = abs(plain.astype("float32") - exact.output).max()
    assert abs(got.astype("float32") - want).max() < 3 * own


@pytest.mark.slow
def test_the_bytes_and_what_loops_jit_vmap_export_and_files_make_of_it():
    config = Config(num_heads=4, key_dim=64)
    params = init_params(jax.random.key(1), config, X.shape)
    cache, floats = (init_cache(config, B, 100, dtype) for dtype in ("int8", None))
    nbytes = lambda cache: sum(x.nbytes for x in (cache.key, cache.value))
    assert nbytes(cache) * 4 == nbytes(floats)
    assert cache.key_scale.nbytes * 16 == cache.key.nbytes

    def step(cache, x):
        y, cache = multi_head_attention(params, x, x, config=config, cache=cache)
        return cache, y

    by_scan, ys = jax.lax.scan(step, cache, X[:, :4].swapaxes(0, 1)[:, :, None])
    want, by_hand = decoded(config, params, (1, 1, 1, 1), cache, X[:, :4])
    np.testing.assert_allclose(ys[:, :, 0].swapaxes(0, 1), want, atol=1e-6)
    np.testing.assert_array_equal(by_scan.key, by_hand.key)
    one = jax.tree.map(lambda x: x[:1], cache)
    mapped = jax.vmap(lambda x: step(one, x[None])[1])(X[:, :2])
    np.testing.assert_allclose(mapped[:, 0], decoded(config, params, (2,), cache)[0], atol=1e-6)
    bytes_ = flax.serialization.to_bytes(by_hand)
    back = flax.serialization.from_bytes(cache, bytes_)
    np.testing.assert_array_equal(back.key_scale, by_hand.key_scale)
    with pytest.raises(ValueError, match=r"state of this KVCache has the entries.*key_scale"):
        flax.serialization.from_bytes(floats, bytes_)
    exported = export.export(jax.jit(step))(by_hand, X[:, :1])
    again = export.deserialize(exported.serialize()).call(by_hand, X[:, :1])
    np.testing.assert_allclose(again[1], step(by_hand, X[:, :1])[1], atol=1e-6)


@pytest.mark.slow
def test_the_cache_is_never_widened_as_a_whole():
    """The compiled step's temporaries: below a quarter of what the keys would be in float32."""
    config = Config(num_heads=8, key_dim=64)
    params = init_params(jax.random.key(1), config, (2, 1, D))
    cache = init_cache(config, 2, 4096, "int8")
    x = X[:2, :1]
    step = jax.jit(
        lambda params, cache, x: multi_head_attention(params, x, x, config=config, cache=cache),
        donate_argnums=1,
    )
    memory = step.lower(params, cache, x).compile().memory_analysis()
    widened = 4 * cache.key.nbytes
    if jax.__version_info__ < (0, 10):  # whose XLA moves the widening out of the loop over heads
        assert memory.temp_size_in_bytes < 1.1 * widened  # one array at a time
    else:
        assert memory.temp_size_in_bytes < cache.key.nbytes


def test_many_small_weights_of_float16():
    """1 / 4,000 times a scale of 3 / 400 would have two digits; each operation by itself here."""
    value = jax.random.randint(jax.random.key(0), (1, 4000, 1, 3), 1, 127, "int8")
    scales = Scales(*[jnp.full((1, 4000, 1), 0.0075)] * 2)
    weights = jnp.full((1, 1, 1, 4000), 1 / 4000)
    einsum = functools.partial(jnp.einsum, preferred_element_type="float32")
    got = stored.context(einsum, weights, value, scales, "float16")
    heads = np.asarray(value, np.float64) * np.asarray(scales.value_BSK, np.float64)[..., None]
    np.testing.assert_allclose(got[0, 0], heads.mean(1)[0], rtol=2e-4)


@pytest.mark.parametrize("size", [None, 5], ids=["line", "ring"])
def test_a_step_that_is_given_the_cache_to_write_into(size):
    """Each array once: JAX refuses to donate one twice."""
    config = Config(num_heads=4, key_dim=8, sliding_window=size)
    params = init_params(jax.random.key(1), config, X.shape)
    step = jax.jit(functools.partial(attend, config), donate_argnums=1)
    want, _ = attend(config, params, init_cache(config, B, 20, "int8"))
    got, cache = step(params, init_cache(config, B, 20, "int8"), X[:, :2])
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert step(params, cache, X[:, 2:4])[1].length.tolist() == [4] * B


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_on_a_mesh_a_cache_stays_where_it_is(kind):
    config = Config(num_heads=4, key_dim=8, num_kv_heads=2)
    params = init_params(jax.random.key(1), config, X.shape)
    x, source = X[:2, :6], X[:2]
    want, _ = decoded(config, params, (4, 1, 1), init_cache(config, 2, 8, "int8"), x)
    crossed = multi_head_attention(
        params,
        x,
        None,
        config=config,
        cache=init_cross_cache(params, source, config=config, dtype="int8"),
    )[0]
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    place = lambda spec: lambda x: jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        specs = flax_mha.param_specs(config, {"heads": "model"})
        placed = jax.tree.map(lambda x, spec: place(spec)(x), params, specs)
        cache = init_cache(config, 2, 8, "int8")
        by_rank = {1: P("data"), 3: P("data", "model"), 4: P("data", "model")}
        cache = jax.tree.map(lambda x: place(by_rank[x.ndim])(x), cache)
        step = jax.jit(functools.partial(attend, config))
        outputs, own = [], place(P("data"))(x)
        for start, stop in ((0, 4), (4, 5), (5, 6)):
            y, cache = step(placed, cache, own[:, start:stop])
            outputs.append(y)
        assert cache.key_scale.sharding.spec[:2] == ("data", "model")
        make = jax.jit(lambda p, x: init_cross_cache(p, x, config=config, dtype="int8"))
        read = jax.jit(
            lambda p, x, cache: multi_head_attention(p, x, None, config=config, cache=cache)[0]
        )
        got = read(placed, own, make(placed, place(P("data"))(source)))
    np.testing.assert_allclose(np.concatenate(jax.device_get(outputs), 1), want, atol=1e-5)
    np.testing.assert_allclose(jax.device_get(got), crossed, atol=1e-5)


def attend(config, params, cache, x=X[:, :2]):
    return multi_head_attention(params, x, x, config=config, cache=cache)


def test_bad_input():
    config = Config(num_heads=4, key_dim=8)
    params = init_params(jax.random.key(1), config, X.shape)
    cache, floats = init_cache(config, B, 20, "int8"), init_cache(config, B, 20)
    with pytest.raises(TypeError, match=r"`cache.key` must be int8, for the cache has a `key_sc"):
        attend(config, params, dataclasses.replace(cache, key=floats.key))
    with pytest.raises(TypeError, match=r"`cache.value` must have the compute dtype float32.*int8"):
        attend(config, params, dataclasses.replace(floats, value=cache.value))
    half = dataclasses.replace(cache, value=floats.value, value_scale=None)
    with pytest.raises(ValueError, match=r"as a whole: keys and values have scales, or none has"):
        attend(config, params, half)
    with pytest.raises(ValueError, match=r"`cache.key_scale` must be float32 \[\*batch, K, S\] = "):
        attend(config, params, dataclasses.replace(cache, key_scale=cache.key_scale[..., :5]))
    with pytest.raises(NotImplementedError, match=r"int8 cache has no gradient.*compute dtype"):
        jax.grad(lambda params: attend(config, params, cache)[0].sum())(params)
    with pytest.raises(NotImplementedError, match=r"int8 cache has no gradient"):
        jax.jacfwd(lambda x: attend(config, params, cache, x)[0].sum())(X[:, :2])
    with pytest.raises(ValueError, match=r'`dtype` must be "int8", or None for the compute dtype'):
        init_cross_cache(params, X, config=config, dtype="bfloat16")
    with pytest.raises(TypeError, match="`dtype` must be a floating-point dtype"):
        init_cache(config, B, 4, "int4")
    with pytest.raises(NotImplementedError, match="those of this cache are int8"):
        attend(config.replace(implementation="pallas_interpreted"), params, cache)


def test_a_gradient_that_does_not_pass_what_is_stored_is_there():
    config = Config(num_heads=4, key_dim=8)
    params = init_params(jax.random.key(1), config, X.shape)
    cache = init_cache(config, B, 20, "int8")
    output = lambda part: attend(config, {**params, "attention_output": part}, cache)[0].sum()
    assert jnp.allclose(jax.grad(output)(params["attention_output"])["bias"], B * 2)
