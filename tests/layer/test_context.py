"""The layer along a context axis: positions, biases and dropout of the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import axis_of, mesh_of
from flax import nnx
from helpers import assert_trees_close, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_cases import QUICKLY

import flax_mha
import flax_mha.nnx
from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_specs, zigzag_order

B, T, S, D, N, H = 4, 32, 24, 16, 4, 8
SIZES = (2, 2, 2)
KEY = jax.random.key(3)
IDS = jnp.arange(T)[None] // jnp.array([[5], [9], [32], [11]])
REAL = jnp.arange(T)[None] < jnp.array([[32], [20], [7], [32]])

# options of the config; options of the call
CASES = {
    "rotary": (dict(position="rotary", num_kv_heads=2), {}),
    "ALiBi": (dict(position="alibi", sliding_window=6), {}),
    "relative bias": (dict(position="relative_bias", use_gate=True), {}),
    "packed": (dict(position="rotary"), dict(segment_ids=IDS, query_mask=REAL, key_mask=REAL)),
    "dropout": (dict(dropout=0.3, use_sinks=True), dict(dropout_key=KEY)),
}
MASKS = ("segment_ids", "query_mask", "key_mask", "positions")


def params_of(config):
    params = flax_mha.init_params(jax.random.key(1), config, (B, T, D))
    return jax.tree.map(lambda x: x + 0.1 * normal(x.size, *x.shape), params)


def results(config, call, params, x):
    """The output and its gradients, of a loss that is not a mean."""

    def loss(params, x):
        output = multi_head_attention(params, x, x, config=config, use_causal_mask=True, **call)
        return (output**2).sum(), output

    gradients, output = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return output, *gradients


@functools.cache
def expected(name):
    options, call = CASES[name]
    config = MultiHeadAttentionConfig(N, H, **options)
    run = jax.jit(functools.partial(results, config, call))
    return run(params_of(config), normal(0, B, T, D))


def along(name, axis, kind=AxisType.Auto):
    """The results over the mesh, their tokens back in order."""
    options, call = CASES[name]
    config = MultiHeadAttentionConfig(N, H, **options, context_axis=axis)
    n = SIZES[-1]
    order = zigzag_order(T, n) if axis.layout == "zigzag" else np.arange(T)
    call = {name: x[:, order] if name in MASKS else x for name, x in call.items()}
    mesh = mesh_of(SIZES, kind)
    params, x = params_of(config), normal(0, B, T, D)[:, order]
    specs = param_specs(config, {"heads": "heads"}, query_shape=x.shape, mesh=mesh)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(results, config, call), compiler_options=QUICKLY)
        params, x = jax.tree.map(place, params, specs), place(x, P("data", "context"))
        output, d_params, d_x = jax.tree.map(np.asarray, run(params, x))
    back = np.argsort(order)
    return output[:, back], d_params, d_x[:, back]


ROWS = [
    ("rotary", axis_of("ring", "zigzag"), AxisType.Auto),
    ("dropout", axis_of("all_gather"), AxisType.Explicit),
    ("packed", axis_of("all_to_all", "zigzag"), AxisType.Auto),
    *[
        pytest.param(name, axis_of(strategy, layout), kind, marks=pytest.mark.slow)
        for i, name in enumerate(CASES)
        for j, strategy in enumerate(("ring", "all_gather", "all_to_all"))
        for k, layout in enumerate(("contiguous", "zigzag"))
        for kind in ((AxisType.Auto, AxisType.Explicit)[(i + j + k) % 2],)
    ],
]


@pytest.mark.parametrize(("name", "axis", "kind"), ROWS, ids=str)
def test_numbers_of_one_device(name, axis, kind):
    if (name, axis.strategy, kind) == ("rotary", "all_to_all", AxisType.Explicit):
        with pytest.raises(NotImplementedError, match="there are 1"):  # 2 heads of keys over 4
            along(name, axis, kind)
    else:
        assert_trees_close(along(name, axis, kind), expected(name), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    "options",
    [dict(position="rotary"), dict(position="relative_bias"), dict(dropout=0.3)],
    ids=["rotary", "relative bias", "dropout"],
)
def test_inside_the_callers_shard_map(options, layout):
    """The tokens are a device's own, and it knows where they stand."""
    axis, mesh = axis_of("ring", layout), mesh_of((2, 1, 4))
    config = MultiHeadAttentionConfig(N, H, **options)
    params, x = params_of(config), normal(0, B, T, D)
    order = zigzag_order(T, 4) if layout == "zigzag" else np.arange(T)
    call = functools.partial(multi_head_attention, use_causal_mask=True, dropout_key=KEY)

    def part(params, x):
        start = (jax.lax.axis_index("data") * x.shape[0], 0, 0, 0)
        along = config.replace(context_axis=axis)
        return call(params, x, x, config=along, dropout_start=start)

    cut = P("data", "context")
    sharded = jax.shard_map(part, mesh=mesh, in_specs=(P(), cut), out_specs=cut)
    output = jax.jit(sharded, compiler_options=QUICKLY)(params, x[:, order])
    one = call(params, x, x, config=config)
    np.testing.assert_allclose(output[:, np.argsort(order)], one, atol=1e-5)


@pytest.mark.slow
def test_lengths_that_do_not_divide_and_cross_attention():
    config = MultiHeadAttentionConfig(N, H, context_axis="context")
    params, x, source = params_of(config), normal(0, 3, 13, D), normal(1, 3, 7, D)
    one = multi_head_attention(params, x, source, config=config.replace(context_axis=None))
    with jax.set_mesh(mesh_of((1, 2, 4))):
        output = multi_head_attention(params, x, source, config=config)
        no_batch = multi_head_attention(params, x[0], source[0], config=config)
    np.testing.assert_allclose(output, one, atol=1e-5)
    np.testing.assert_allclose(no_batch, one[0], atol=1e-5)


def test_zigzag_of_one_device_is_any_length():
    config = MultiHeadAttentionConfig(
        N, H, position="rotary", context_axis=axis_of("ring", "zigzag")
    )
    params, x = params_of(config), normal(0, 2, 7, D)
    one = multi_head_attention(params, x, x, config=config.replace(context_axis=None))
    with jax.set_mesh(mesh_of((8, 1, 1))):
        output = multi_head_attention(params, x, x, config=config)
    np.testing.assert_allclose(output, one, atol=1e-5)


@pytest.mark.slow
def test_the_modules_take_it():
    x = normal(0, B, T, D)
    with jax.set_mesh(mesh_of((1, 1, 8))):
        layer = flax_mha.MultiHeadAttention(N, H, context_axis="context")
        variables = layer.init(jax.random.key(1), x, x)
        output = layer.apply(variables, x, x, use_causal_mask=True)
        other = flax_mha.nnx.MultiHeadAttention(
            N, H, query_features=D, context_axis=axis_of("all_gather"), rngs=nnx.Rngs(0)
        )
        nnx_output = other(x, x)
    one = flax_mha.MultiHeadAttention(N, H).apply(variables, x, x, use_causal_mask=True)
    np.testing.assert_allclose(output, one, atol=1e-5)
    assert nnx_output.shape == x.shape


def test_a_config_keeps_it():
    config = MultiHeadAttentionConfig(N, H, context_axis="context")
    assert config == MultiHeadAttentionConfig(N, H, context_axis=flax_mha.ContextAxis("context"))
    assert MultiHeadAttentionConfig.from_dict(config.to_dict()) == config
    given = {"name": "context", "layout": "zigzag"}
    axis = MultiHeadAttentionConfig(N, H, context_axis=given).context_axis
    assert axis == flax_mha.ContextAxis("context", layout="zigzag")


# --- what is refused ----------------------------------------------------------------------------


def run_in_shard_map(config, **call):
    params, x = params_of(config), normal(0, B, T, D)
    cut = P(None, "context")
    part = lambda params, x, ids: multi_head_attention(
        params, x, x, config=config, segment_ids=ids, **call
    )
    sharded = jax.shard_map(part, mesh=mesh_of((1, 1, 8)), in_specs=(P(), cut, cut), out_specs=cut)
    return sharded(params, x, IDS)


ALONG = MultiHeadAttentionConfig(N, H, context_axis="context")
REFUSED = {
    "a cache": (
        lambda: multi_head_attention(
            params_of(ALONG),
            normal(0, B, 1, D),
            normal(0, B, 1, D),
            config=ALONG,
            cache=flax_mha.init_cache(ALONG, B, 8),
        ),
        (NotImplementedError, r"cache holds all keys.*context_axis='context'.*replace"),
    ),
    "scores of rows": (
        lambda: flax_mha.attention_scores(
            params_of(ALONG),
            normal(0, B, T, D),
            normal(0, B, T, D),
            config=ALONG,
            query_rows=jnp.array([0]),
        ),
        (NotImplementedError, r"`attention_scores` are of whole sequences.*replace"),
    ),
    "segments of a part": (
        lambda: run_in_shard_map(ALONG.replace(position="rotary")),
        (ValueError, r"nobody knows where its segments begin.*Pass `positions=`"),
    ),
    "a field that is none": (
        lambda: ALONG.replace(context_axis={"name": "context", "startegy": "ring"}),
        (ValueError, r"A field of ContextAxis.*'startegy'.*Did you mean 'strategy'"),
    ),
    "no mesh": (
        lambda: multi_head_attention(
            params_of(ALONG), normal(0, B, T, D), normal(0, B, T, D), config=ALONG
        ),
        (ValueError, r"must be an axis of the mesh.*no mesh.*jax\.set_mesh"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name):
    call, (error, text) = REFUSED[name]
    with pytest.raises(error, match=text):
        call()
