"""Meshes of `jax.make_mesh`, whose axes are explicit: one device's numbers, with types.

The results' types are told from the operands: no call needs `out_sharding`, `jax.set_mesh` or a
look at where it runs.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, assert_trees_close, normal
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from thinning import half

import flax_mha
import flax_mha.nnx
from flax_mha import MultiHeadAttentionConfig, dot_product_attention, multi_head_attention
from flax_mha.core.meshes import spec_of, with_auto_axes
from flax_mha.layer.outputs import cross_cache_spec

B, N, H, D = 8, 4, 8, 16
CONFIG = MultiHeadAttentionConfig(N, H, dropout=0.2)
PARAMS = flax_mha.init_params(jax.random.key(1), CONFIG, (B, 1, D))
KEY = jax.random.key(2)


def explicit_mesh(*sizes, names=("data", "model")):
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Explicit,) * len(sizes))


MESH = explicit_mesh(4, 2)


def put(tree, *axes, mesh=MESH):
    return jax.device_put(tree, NamedSharding(mesh, P(*axes)))


def placed(heads=None, features=None):
    """The parameters, their heads along one mesh axis and the features of the model another."""
    letters = {"kernel": (features, heads), "bias": (heads,)}
    of_inputs = {name: letters for name in ("query", "key", "value")}
    output = {"kernel": (heads, None, features), "bias": (features,)}
    axes = {**of_inputs, "attention_output": output}
    return {n: {k: put(x, *axes[n][k]) for k, x in leaves.items()} for n, leaves in PARAMS.items()}


def places(tree):
    return [spec_of(x) for x in jax.tree.leaves(tree)]


# --- where things may be ------------------------------------------------------------------------

# query's axes, the parameters' mesh axes, what the output and the scores come to be
PLACES = {
    "batch": (("data",), {}, P("data", None, None), P("data", None, None, None)),
    "heads": ((), {"heads": "model"}, P(None, None, None), P(None, "model", None, None)),
    "both": (
        ("data",),
        {"heads": "model"},
        P("data", None, None),
        P("data", "model", None, None),
    ),
    "both on one": (
        (("data", "model"),),
        {"heads": "model"},
        P(("data", "model"), None, None),
        P(("data", "model"), None, None, None),
    ),
    "length": (
        (None, "data"),
        {"heads": "model"},
        P(None, "data", None),
        P(None, "model", "data", None),
    ),
    "fsdp": (
        ("data",),
        {"heads": "model", "features": "data"},
        P("data", None, None),
        P("data", "model", None, None),
    ),
    "features": (
        ("data", None, "model"),
        {"features": "model"},
        P("data", None, "model"),
        P("data", None, None, None),
    ),
    "replicated": ((), {}, P(None, None, None), P(None, None, None, None)),
}
IMPLEMENTATIONS = ["reference", "blockwise"]


def attend(implementation, params, x, bias, padding):
    """Causal, with dropout, a bias of heads and padding."""
    config = CONFIG.replace(implementation=implementation)
    call = dict(config=config, use_causal_mask=True, dropout_key=KEY, bias=bias)
    return multi_head_attention(params, x, x, value_mask=padding, **call)


def with_gradient(f):
    loss = lambda *args: (f(*args) ** 2).sum()
    return lambda *args: (f(*args), jax.grad(loss, (0, 1, 2))(*args[:3], *args[3:]))


@functools.cache
def inputs(T):
    return (
        normal(1, B, T, D),
        normal(2, 1, N, T, T),
        jnp.arange(T)[None] < T - jnp.arange(B)[:, None],
    )


@functools.cache
def expected(implementation, T):
    f = functools.partial(attend, implementation)
    return jax.jit(with_gradient(f))(PARAMS, *inputs(T))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "implementation_and_T", "in_context"),
    half(PLACES, [("reference", 16), ("blockwise", 104)], ["", "set_mesh"]),
    ids=str,
)
def test_output_gradient_and_dropout_are_those_of_one_device(
    place, implementation_and_T, in_context
):
    implementation, T = implementation_and_T
    axes, params_axes, output_spec, _ = PLACES[place]
    x, bias, padding = inputs(T)
    bias = put(bias, None, "model" if "heads" in params_axes else None)
    padding = put(padding, *axes[:1])
    params, x = placed(**params_axes), put(x, *axes)
    f = functools.partial(attend, implementation)
    with jax.set_mesh(MESH) if in_context else contextlib.nullcontext():
        output, gradients = jax.jit(with_gradient(f))(params, x, bias, padding)
        eager = f(params, x, bias, padding)
    assert spec_of(output) == spec_of(eager) == output_spec
    assert places(gradients) == places((params, x, bias)), "a gradient is placed as its array"
    assert_close(eager, expected(implementation, T)[0], "float32")
    assert_trees_close((output, gradients), expected(implementation, T), "float32")


@pytest.mark.parametrize("place", PLACES)
def test_everything_that_forward_returns_is_placed(place):
    axes, params_axes, output_spec, scores_spec = PLACES[place]
    x = normal(1, B, 16, D)
    forward = jax.jit(
        lambda p, x: flax_mha.forward(p, x, x, config=CONFIG, return_attention_scores=True)
    )
    result = forward(placed(**params_axes), put(x, *axes))
    assert (spec_of(result.output), spec_of(result.attention_scores)) == (output_spec, scores_spec)
    batch, length = (*axes, None, None)[:2]
    heads = params_axes.get("heads")
    if heads in np.ravel(batch):
        heads = None  # a mesh axis stands once: the first axis keeps it
    for x_BTNH in (result.query, result.key, result.value):
        assert spec_of(x_BTNH) == P(batch, length, heads, None)
    assert_trees_close(result, forward(PARAMS, x), "float32")


@pytest.mark.slow
def test_a_grid_with_two_batch_axes_gate_and_broadcast():
    """Batch axes around the attended ones; the value's batch is broadcast over the query's."""
    config = MultiHeadAttentionConfig(
        N, H, attention_axes=(1, 3), use_gate=True, output_shape=(2, 4)
    )
    query, value = normal(1, 4, 3, 2, 5, D), normal(2, 1, 2, 2, 7, D)
    params = flax_mha.init_params(KEY, config, query.shape, value.shape)
    call = dict(config=config, return_attention_scores=True)
    run = jax.jit(lambda *args: flax_mha.forward(*args, **call))
    for axes, value_axes in ((("data",), ()), ((), (None, None, "model"))):
        result = run(params, put(query, *axes), put(value, *value_axes))
        assert_trees_close(result, run(params, query, value), "float32")
        batch = spec_of(result.output)[0], spec_of(result.output)[2]
        assert batch == (("data", None) if axes else (None, None))
        assert spec_of(result.attention_scores)[:2] == batch
        assert spec_of(result.gate)[:4:2] == spec_of(result.key)[:4:2] or not axes


@pytest.mark.slow
def test_a_query_of_one_example_takes_the_place_of_the_value():
    query, value = normal(1, 1, 16, D), normal(2, B, 16, D)
    output = multi_head_attention(PARAMS, query, put(value, "data"), config=CONFIG)
    assert spec_of(output) == P("data", None, None)
    assert_close(output, multi_head_attention(PARAMS, query, value, config=CONFIG), "float32")


@pytest.mark.slow
def test_a_mesh_of_one_device_and_numpy_parameters():
    mesh, x = explicit_mesh(1, names=("data",)), normal(1, B, 104, D)
    output = multi_head_attention(PARAMS, *[put(x, "data", mesh=mesh)] * 2, config=CONFIG)
    assert_close(output, multi_head_attention(PARAMS, x, x, config=CONFIG), "float32")
    arrays = jax.tree.map(np.asarray, PARAMS)
    again = multi_head_attention(arrays, *[put(x, "data")] * 2, config=CONFIG)
    assert_close(again, output, "float32")


# --- the other entrances ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("jit", [True, False])
def test_dot_product_attention(implementation, jit):
    weights = implementation == "reference"
    q, k = normal(1, 4, 2, 104, N, H), normal(2, 4, 2, 112, N, H)
    mask = np.tril(np.ones((104, 112), int))  # integers: looked at before a trace hides them
    call = dict(mask=mask, implementation=implementation, return_residuals=True)
    call |= dict(dropout_rate=0.2, dropout_key=KEY, return_weights=weights)
    run = lambda q, k: dot_product_attention(q, k, k, **call)
    on_mesh = (jax.jit(run) if jit else run)(put(q, "data", None, None, "model"), put(k, "data"))
    assert_trees_close(on_mesh, run(q, k), "float32")
    context, *others = places(on_mesh)
    assert context == P("data", None, None, "model", None)
    rows = P("data", None, "model", None)
    assert others == [P("data", None, "model", None, None)] * weights + [rows, rows]
    both = put(q, "data", "model")
    assert flax_mha.explain(both, k, k) == flax_mha.explain(q, k, k)


def test_chosen_scores():
    x, rows = normal(1, B, 16, D), jnp.array([3, 5])
    run = lambda p, x: flax_mha.attention_scores(p, x, x, config=CONFIG, query_rows=rows)
    for f in (run, jax.jit(run)):
        scores = f(placed(heads="model"), put(x, "data"))
        assert spec_of(scores) == P("data", "model", None, None)
        assert_close(scores, run(PARAMS, x), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("cache_axes", [(), ("data",), ("data", "model")])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_growing_cache_stays_where_it_is(cache_axes, window, wrap):
    config = CONFIG.replace(sliding_window=window, implementation=None)
    x = normal(1, B, 9, D)
    call = dict(config=config, use_causal_mask=True, return_attention_scores=True)

    def steps(params, x, cache):
        results = []
        for part in (x[:, :6], x[:, 6:7], x[:, 7:]):
            *result, cache = multi_head_attention(params, part, part, cache=cache, **call)
            results.append(result)
        return results, cache

    cache = flax_mha.init_cache(config, B, 16)
    on_mesh = jax.tree.map(lambda x: put(x, *cache_axes[: x.ndim]), cache)
    results, after = wrap(steps)(placed(heads="model"), put(x, "data"), on_mesh)
    assert places(after) == places(on_mesh)
    assert_trees_close((results, after), steps(PARAMS, x, cache), "float32")
    assert not wrap(lambda cache: cache.rewind(8))(after).spoiled.any() or window
    assert places(after.rewind(0)) == places(after)


@pytest.mark.slow
@pytest.mark.parametrize(
    "params_axes", [{"heads": "model"}, {"heads": "model", "features": "data"}]
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_an_encoder_s_cache(params_axes, wrap):
    x, mask = normal(1, B, 6, D), jnp.arange(6)[None] < 6 - jnp.arange(B)[:, None] % 3

    def run(params, x, mask):
        cache = flax_mha.init_cross_cache(params, x, config=CONFIG, value_mask=mask, max_queries=4)
        output, cache = multi_head_attention(params, x[:, :3], None, config=CONFIG, cache=cache)
        return output, cache

    output, cache = wrap(run)(placed(**params_axes), put(x, "data"), put(mask, "data"))
    assert_trees_close((output, cache), run(PARAMS, x, mask), "float32")
    assert spec_of(cache.key) == P("data", "model", None, None)
    assert spec_of(cache.length) == P("data")


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "batch"), [([1, 0, 2, 3, 4, 5, 7, 6], "data"), ([2, 2, 5], None)])
def test_beams_stay_on_their_mesh(rows, batch):
    """Three rows cannot be cut over four devices: they are gathered."""
    cache = flax_mha.init_cache(CONFIG, B, 4)
    cache = jax.tree.map(lambda x: normal(3, *x.shape).astype(x.dtype), cache)
    for reorder in (
        lambda c: c.reorder(np.array(rows)),
        jax.jit(lambda c: c.reorder(jnp.array(rows))),
    ):
        moved = reorder(put(cache, "data"))
        assert {place[0] for place in places(moved)} == {batch}
        assert_trees_close(moved, reorder(cache), "float32")


@pytest.mark.slow
def test_linen_and_its_parameters():
    x = normal(1, B, 104, D)
    layer = flax_mha.MultiHeadAttention(N, H, dropout=0.2)
    for init in (layer.init_with_output, jax.jit(layer.init_with_output)):
        output, variables = init(jax.random.key(1), *[put(x, "data")] * 2)
        assert spec_of(output) == P("data", None, None)
        plain = layer.init_with_output(jax.random.key(1), x, x)
        assert_trees_close((output, variables), plain, "float32")
    apply = lambda p, x: layer.apply({"params": p}, x, x, training=True, rngs={"dropout": KEY})
    on_mesh = apply(placed(heads="model"), put(x, "data"))
    assert_close(on_mesh, apply(PARAMS, x), "float32")


@pytest.mark.slow
def test_nnx_made_and_called_within_the_mesh():
    x = normal(1, B, 16, D)
    make = lambda: flax_mha.nnx.MultiHeadAttention(N, H, query_features=D, rngs=nnx.Rngs(0))
    with jax.set_mesh(MESH):
        output = make()(*[put(x, "data")] * 2)
    assert spec_of(output) == P("data", None, None)
    assert_close(output, make()(x, x), "float32")


# --- transformations ----------------------------------------------------------------------------

ONE = functools.partial(multi_head_attention, config=CONFIG, use_causal_mask=True)
LOSS = lambda p, x: (ONE(p, x, x) ** 2).sum()
TRANSFORMED = {
    "scan": lambda p, x: jax.lax.scan(lambda x, _: (ONE(p, x, x), None), x, None, length=2)[0],
    "vmap over the sharded axis": lambda p, x: jax.vmap(lambda x: ONE(p, x, x))(x),
    "vmap of a batch": lambda p, x: jax.vmap(lambda x: ONE(p, x, x))(x[:, None]),
    "vmap of the gradient": lambda p, x: jax.vmap(jax.grad(lambda x: LOSS(p, x)))(x),
    "gradient of remat": lambda p, x: jax.grad(jax.checkpoint(LOSS))(p, x),
    "gradient of scan": lambda p, x: jax.grad(
        lambda p: (jax.lax.scan(lambda x, _: (ONE(p, x, x), None), x, None, length=2)[0] ** 2).sum()
    )(p),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(name):
    f, x = jax.jit(TRANSFORMED[name]), normal(1, B, 104, D)
    assert_trees_close(f(placed(heads="model"), put(x, "data")), f(PARAMS, x), "float32")


@pytest.mark.slow
def test_without_jit():
    x = normal(1, B, 104, D)
    with jax.disable_jit():
        output = ONE(placed(heads="model"), *[put(x, "data")] * 2)
    assert_close(output, ONE(PARAMS, x, x), "float32")


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("heads", [None, "model"])
def test_one_axis_manual_and_the_other_explicit(check_vma, heads):
    """The gradient inside the shard_map and outside; the manual axis stays manual."""
    x = normal(1, B, 16, D)
    specs = dict(axis_names={"data"}, check_vma=check_vma, in_specs=(P(), P("data")))
    shard = lambda f, out: jax.shard_map(f, out_specs=out, **specs)
    gradient = jax.grad(LOSS)
    total = gradient if check_vma else lambda p, x: jax.lax.psum(gradient(p, x), "data")
    with jax.set_mesh(MESH):
        inside = jax.jit(shard(total, P()))(placed(heads=heads), put(x, "data"))
        outer = jax.jit(
            jax.grad(lambda p, x: (shard(lambda p, x: ONE(p, x, x), P("data"))(p, x) ** 2).sum())
        )
        outside = outer(placed(heads=heads), put(x, "data"))
    assert_trees_close(inside, gradient(PARAMS, x), "float32")
    assert_trees_close(outside, gradient(PARAMS, x), "float32")


# --- without explicit axes, and on two meshes ---------------------------------------------------


def test_without_explicit_axes_nothing_is_done():
    def never():
        raise AssertionError("the results are placed by XLA")

    auto = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    x = normal(1, B, 16, D)
    for array in (x, np.asarray(x), put(x, "data", mesh=auto)):
        assert with_auto_axes(lambda x: x, never, array) is array
        assert "reshard" not in str(jax.make_jaxpr(lambda x: ONE(PARAMS, x, x))(array))
    assert "reshard" in str(jax.make_jaxpr(lambda x: ONE(PARAMS, x, x))(put(x, "data")))


def test_parameters_on_an_auto_mesh_of_the_same_devices():
    auto = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    x = normal(1, B, 16, D)
    params = put(PARAMS, mesh=auto)
    output = ONE(params, *[put(x, "data")] * 2)
    assert spec_of(output) == P("data", None, None)
    assert_close(output, ONE(PARAMS, x, x), "float32")


def test_two_meshes_are_refused():
    params, x = put(PARAMS, mesh=explicit_mesh(2, 4)), put(normal(1, B, 16, D), "data")
    q = normal(1, B, 16, N, H)
    message = r"Arrays of one call must be on one mesh\. Received: .*Move them by `jax.device_put"
    with pytest.raises(ValueError, match=message):
        ONE(params, x, x)
    with pytest.raises(ValueError, match=message):
        dot_product_attention(put(q), put(q, mesh=explicit_mesh(8, 1)), put(q))


def test_wrong_shapes_are_told_as_ever():
    x = put(normal(1, B, 16, D), "data")
    missing = {name: leaves for name, leaves in placed().items() if name != "key"}
    with pytest.raises(ValueError, match="`params` must hold"):
        ONE(missing, x, x)
    with pytest.raises(ValueError, match="for this config and these inputs"):
        ONE(PARAMS, x, x[..., :8])
    with pytest.raises(ValueError, match="`params` must hold"):
        flax_mha.init_cross_cache(missing, x, config=CONFIG)
    q = put(normal(1, B, 16, N, H), "data")
    with pytest.raises(ValueError, match="S, K of key and value must be equal"):
        dot_product_attention(q, q[:, :5], q)


@pytest.mark.parametrize("cut", ["key", "value"])
def test_a_cross_cache_has_its_keys_where_the_key_is_and_its_values_where_the_value_is(cut):
    """Along the length, which `key` and `value` need not share; features are summed away."""
    along = {name: "model" if name == cut else None for name in ("key", "value")}
    key, value = (put(normal(0, B, 4, D), "data", along[name], None) for name in along)
    cache = cross_cache_spec(PARAMS, value, key, None, True)
    assert cache.key == P("data", None, along["key"], None)
    assert cache.value == P("data", None, along["value"], None)
    assert cache.key_scale == P("data", None, along["key"])
    assert cache.value_scale == P("data", None, along["value"])
    by_features = put(normal(0, B, 4, D), "data", None, "model")
    cache = cross_cache_spec(PARAMS, by_features, by_features, None, False)
    assert (cache.key, cache.value, cache.key_scale) == (*[P("data", None, None, None)] * 2, None)
