"""A layer with a window in several axes: against loops, beside the other arguments, refused."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grid_oracles import attention, neighbors
from helpers import assert_close, assert_trees_close, normal, random_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_mha.nnx
from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    Neighborhood,
    attention_scores,
    init_cache,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
)
from flax_mha.interop.flax import to_flax_params
from flax_mha.interop.keras import from_keras_weights, to_keras_weights

B, N, H, D = 2, 3, 8, 17
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "blockwise"])


def layer(shape, window, **fields):
    config = MultiHeadAttentionConfig(N, H, sliding_window=window, **fields)
    x = normal(3, *shape, D)
    return config, random_params(param_shapes(config, x.shape)), x


def expected(params, x_BTD, allowed_TS):
    """Self-attention by loops, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x_BTD = np.asarray(x_BTD, np.float64)
    heads = [
        np.einsum("btd,dnh->btnh", x_BTD, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    ]
    output = params["attention_output"]
    context = attention(*heads, allowed_TS)
    return np.einsum("btnv,nve->bte", context, output["kernel"]) + output["bias"]


# inputs [batch axes and attended ones, D], attended axes, window
LAYOUTS = {
    "a line": ((B, 11), (1,), (4,)),
    "a picture": ((B, 5, 7), (1, 2), (3, 4)),
    "a picture, axes by default": ((B, 5, 7), None, (3, 4)),
    "a picture, one axis": ((B, 5, 7), (2,), (3,)),
    "columns first": ((B, 5, 7), (2, 1), (4, 3)),
    "a video, each frame": ((B, 2, 5, 7), (-3, -2), (3, 4)),
    "a video": ((B, 3, 4, 5), (1, 2, 3), Neighborhood((2, 3, 3), 1, (True, False, False))),
    "dilated": ((1, 6, 7), (1, 2), Neighborhood((3, 3), dilation=2)),
}


def by_loops(params, x, axes, near):
    """The attended axes last and flat, in the order that `attention_axes` has."""
    rank = x.ndim - 1
    axes = [axis % x.ndim for axis in axes or range(1, rank)]
    order = [i for i in range(rank) if i not in axes] + axes + [rank]
    moved = np.transpose(x, order)
    grid = moved.shape[rank - len(axes) : rank]
    result = expected(params, moved.reshape(-1, np.prod(grid), D), neighbors(grid, *near))
    return np.transpose(result.reshape(moved.shape), np.argsort(order))


@pytest.mark.slow
@IMPLEMENTATIONS
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layer_is_that_of_the_loops(name, implementation):
    shape, axes, window = LAYOUTS[name]
    fields = {"attention_axes": axes, "implementation": implementation}
    config, params, x = layer(shape, window, **fields)
    near = dataclasses.astuple(config.sliding_window)
    wanted = by_loops(params, np.asarray(x), axes, near)
    call = lambda params, x: multi_head_attention(params, x, x, config=config)
    assert_close(call(params, x), wanted, "float32")
    assert_close(jax.jit(call)(params, x), wanted, "float32", "jit")


@pytest.mark.slow
@IMPLEMENTATIONS
def test_gradients_are_those_of_the_mask_as_an_array(implementation):
    config, params, x = layer((B, 5, 7), (3, 3), implementation=implementation)
    allowed = jnp.asarray(neighbors((5, 7), (3, 3)).reshape(5, 7, 5, 7))
    dense = config.replace(sliding_window=None, implementation="reference")

    def loss(params, x, config, mask):
        return (multi_head_attention(params, x, x, config=config, attention_mask=mask) ** 2).sum()

    ours = jax.grad(loss, argnums=(0, 1))(params, x, config, None)
    theirs = jax.grad(loss, argnums=(0, 1))(params, x, dense, allowed)
    assert_trees_close(ours, theirs, "float32")


def test_an_int_counts_along_the_raster_and_a_tuple_counts_all():
    """Keras's w is w - 1 keys either side; (w,) is w keys, at the ends too."""
    config, params, x = layer((1, 6), 2)
    scores = lambda config: multi_head_attention(
        params, x, x, config=config, return_attention_scores=True
    )[1]
    counted = lambda config: (np.asarray(scores(config))[0, 0] > 0).sum(-1).tolist()
    assert counted(config) == [2, 3, 3, 3, 3, 2]
    assert counted(config.replace(sliding_window=(2,))) == [2] * 6


@IMPLEMENTATIONS
def test_causal_order_and_padding_join_it(implementation):
    """`use_causal_mask` is raster order, and no causal axis; padded keys may hold NaN."""
    config, params, x = layer((B, 4, 5), (3, 3), implementation=implementation)
    real = np.arange(20) < np.array([[20], [13]])
    near = neighbors((4, 5), (3, 3)) & np.tril(np.ones((20, 20), bool))
    flat = np.asarray(x).reshape(B, 20, D)
    wanted = np.concatenate(
        [expected(params, flat[b : b + 1], near & real[b]) for b in range(B)]
    ).reshape(x.shape)
    spoiled = jnp.where(real.reshape(B, 4, 5, 1), x, jnp.nan)
    output = multi_head_attention(
        params, x, spoiled, config=config, value_mask=real.reshape(B, 4, 5), use_causal_mask=True
    )
    assert_close(output, wanted, "float32")


@IMPLEMENTATIONS
def test_vmap_over_the_batch(implementation):
    fields = {"attention_axes": (-3, -2), "implementation": implementation}
    config, params, x = layer((B, 5, 7), (3, 3), **fields)
    call = lambda x: multi_head_attention(params, x, x, config=config)
    assert_close(jax.jit(jax.vmap(call))(x), call(x), "float32")


def test_chosen_rows_of_the_scores():
    config, params, x = layer((B, 4, 5), (3, 3))
    rows = attention_scores(params, x, x, config=config, query_rows=[0, 7, 19])
    seen = neighbors((4, 5), (3, 3))[[0, 7, 19]].reshape(3, 4, 5)
    np.testing.assert_array_equal(np.asarray(rows) > 0, np.broadcast_to(seen, rows.shape))


@IMPLEMENTATIONS
def test_an_explicit_mesh(implementation):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    config, params, x = layer((4, 5, 7), (3, 3), implementation=implementation)
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
    call = jax.jit(lambda params, x: multi_head_attention(params, x, x, config=config))
    output = call(jax.tree.map(put, params), put(x, "data"))
    assert_close(output, call(params, x), "float32")
    assert output.sharding.spec[0] == "data"


# --- the config ---------------------------------------------------------------------------------


def test_a_tuple_is_short_for_the_object():
    short = MultiHeadAttentionConfig(N, H, sliding_window=[np.int64(7), 7])
    long = MultiHeadAttentionConfig(N, H, sliding_window=Neighborhood((7, 7)))
    assert short == long
    assert hash(short) == hash(long)
    assert short.sliding_window == Neighborhood((7, 7))
    assert MultiHeadAttentionConfig(N, H, sliding_window=7).sliding_window == 7


def test_through_json():
    near = Neighborhood((7, 5), dilation=(2, 1), is_causal=(True, False))
    config = MultiHeadAttentionConfig(N, H, sliding_window=near, attention_axes=(1, 2))
    assert MultiHeadAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_modules():
    fields = {"sliding_window": (3, 4), "attention_axes": (1, 2)}
    config, params, x = layer((B, 5, 7), **{"window": fields.pop("sliding_window"), **fields})
    wanted = multi_head_attention(params, x, x, config=config)
    linen = MultiHeadAttention(N, H, sliding_window=(3, 4), attention_axes=(1, 2))
    assert linen.config == config
    assert_close(linen.apply({"params": params}, x, x), wanted, "float32")
    module = flax_mha.nnx.MultiHeadAttention(
        N, H, query_features=D, sliding_window=(3, 4), attention_axes=(1, 2), rngs=nnx.Rngs(0)
    )
    assert module.config == config


# --- refused ------------------------------------------------------------------------------------


def call_of(shape, window, source=None, **fields):
    config, params, x = layer(shape, window, **fields)
    source = x if source is None else normal(4, *source, D)
    return multi_head_attention(params, x, source, config=config)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: MultiHeadAttentionConfig(N, H, attention_axes=(1, 2), sliding_window=(7,)),
            ValueError,
            r"one size for each of `attention_axes`.*\(7,\), attention_axes=\(1, 2\).*An int",
        ),
        (
            lambda: call_of((B, 5, 7), (3, 3, 3)),
            ValueError,
            r"one size for each attended axis.*\(3, 3, 3\), attended axes of sizes \(5, 7\)",
        ),
        (lambda: call_of((B, 5, 7), (7, 7)), ValueError, r"axis 0 of \(5, 7\).*at most 5"),
        (
            lambda: call_of((B, 5, 7), Neighborhood((3, 3), dilation=2)),
            ValueError,
            r"3 \* 2 = 6 on axis 0 of \(5, 7\).*window of at most 2, or a dilation of at most 1",
        ),
        (
            lambda: call_of((B, 5, 7), (3, 3), source=(B, 7, 5)),
            ValueError,
            r"queries and keys of one grid.*T=\(5, 7\), S=\(7, 5\)",
        ),
        (
            lambda: MultiHeadAttentionConfig(N, H, sliding_window=(3, 3), chunk_size=4),
            ValueError,
            "chunks or a sliding window",
        ),
        (
            lambda: MultiHeadAttentionConfig(N, H, sliding_window="7"),
            TypeError,
            "an int, a tuple of one for each attended axis, or a Neighborhood",
        ),
        (
            lambda: MultiHeadAttentionConfig(N, H, sliding_window=7.0),
            TypeError,
            "`sliding_window` must be an int",
        ),
        (
            lambda: MultiHeadAttentionConfig(N, H, sliding_window={"size": [3]}),
            ValueError,
            "A field of Neighborhood",
        ),
    ],
)
def test_what_fits_no_axes(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_caches_know_no_grid():
    config, params, x = layer((B, 6), (3,))
    refused = pytest.raises(NotImplementedError, match=r"no window in several axes.*Neighborhood")
    with refused:
        init_cache(config, B, capacity=8)
    with refused:
        init_cross_cache(params, x, config=config)
    plain = config.replace(sliding_window=None)
    for cache, source in (
        (init_cache(plain, B, capacity=8), x),
        (init_cross_cache(params, x, config=plain), None),
    ):
        with refused:
            multi_head_attention(params, x, source, config=config, cache=cache)


def test_other_frameworks_have_no_such_window():
    config, params, _ = layer((B, 5, 7), (3, 3))
    with pytest.raises(ValueError, match=r"Keras's windows lie along the raster.*Neighborhood"):
        to_keras_weights(params, config)
    arrays = to_keras_weights(params, config.replace(sliding_window=None))
    assert_trees_close(from_keras_weights(arrays, config), params, "float32")
    with pytest.raises(ValueError, match=r"has no `sliding_window`.*Neighborhood"):
        to_flax_params(params, config.replace(output_shape=D))


def test_a_grid_of_unknown_size():
    """Sizes that `jax.export` leaves open: batches may be, the grid's axes may not."""
    config, params, _ = layer((B, 5, 7), (3, 3))
    call = jax.jit(lambda params, x: multi_head_attention(params, x, x, config=config))
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def exported(spelled):
        sizes = jax.export.symbolic_shape(spelled)
        return jax.export.export(call)(types, jax.ShapeDtypeStruct((*sizes, D), "float32"))

    x = normal(3, 3, 5, 7, D)
    assert_close(exported("b, 5, 7").call(params, x), call(params, x), "float32")
    with pytest.raises(NotImplementedError, match=re.escape("lengths of a grid must be known")):
        exported("2, r, 7")
