"""A learned bias by row and column, against a loop and the transformers library."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, booleans, normal, random_params

import flax_mha
from flax_mha import (
    MultiHeadAttentionConfig,
    attention_scores,
    init_cache,
    init_cross_cache,
    init_params,
    multi_head_attention,
    param_shapes,
)
from flax_mha.positions import DenseBias, DistanceFunction, GridBias

B, N, H, D = 2, 3, 8, 17
IMPLEMENTATIONS = ["reference", "blockwise"]


def dense(table, rows, columns, class_token):
    """`[N, T, T]`: token by token, each with its row and column, or None for the class token."""
    places = [(r, c) for r in range(rows) for c in range(columns)]
    places = [None, *places] if class_token else places
    X, N = table.shape
    bias = np.empty((N, len(places), len(places)))
    for t, at in enumerate(places):
        for s, other in enumerate(places):
            if at is None:
                entry = X - 1 if other is None else X - 3
            elif other is None:
                entry = X - 2
            else:
                down, right = at[0] - other[0], at[1] - other[1]
                entry = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
            bias[:, t, s] = table[entry]
    return bias


def layer(class_token, rows=2, columns=3, **fields):
    position = GridBias(rows, columns, class_token)
    config = MultiHeadAttentionConfig(N, H, position=position, **fields)
    params = random_params(param_shapes(config, (7, D)))
    return config, params, rows * columns + class_token


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("class_token", [False, True])
def test_a_layer_with_a_grid_is_the_layer_with_its_dense_bias(class_token, implementation):
    config, params, T = layer(class_token, implementation=implementation)
    x, more = normal(1, B, T, D), normal(2, B, N, T, T)
    bias = jnp.asarray(dense(np.asarray(params["relative_bias"]["embedding"]), 2, 3, class_token))
    plain = {name: leaf for name, leaf in params.items() if name != "relative_bias"}
    without = config.replace(position=None)
    expected = multi_head_attention(plain, x, x, config=without, bias=bias[None])
    assert_close(multi_head_attention(params, x, x, config=config), expected, "float32")
    both = multi_head_attention(plain, x, x, config=without, bias=bias[None] + more)
    assert_close(multi_head_attention(params, x, x, config=config, bias=more), both, "float32")
    rows = jnp.array([T - 1, 0, 2])
    scores = attention_scores(params, x, x, config=config, query_rows=rows, bias=more)
    _, whole = multi_head_attention(
        plain, x, x, config=without.replace(implementation=None), bias=bias[None] + more,
        return_attention_scores=True,
    )  # fmt: skip
    assert_close(scores, whole[:, :, rows], "float32")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_reaches_the_table(implementation):
    """Each number's is the sum over the pairs that read it."""
    config, params, T = layer(True, implementation=implementation)
    x = normal(1, B, T, D)
    loss = lambda params: (multi_head_attention(params, x, x, config=config) ** 2).sum()
    gradient = jax.grad(loss)(params)["relative_bias"]["embedding"]
    plain = {name: leaf for name, leaf in params.items() if name != "relative_bias"}
    of_bias = lambda bias: (
        multi_head_attention(plain, x, x, config=config.replace(position=None), bias=bias) ** 2
    ).sum()
    table = np.asarray(params["relative_bias"]["embedding"])
    pairs = np.asarray(jax.grad(of_bias)(jnp.asarray(dense(table, 2, 3, True), "float32")[None]))[0]
    index = dense(np.arange(len(table))[:, None], 2, 3, True)[0].astype(int)
    expected = np.zeros_like(table)
    for t, s in np.ndindex(T, T):
        expected[index[t, s]] += pairs[:, t, s]
    assert_close(gradient, expected, "float32")
    assert np.abs(expected).min() > 0


@pytest.mark.slow
def test_16_bits_pictures_masks_and_jit():
    config, params, _ = layer(False)
    x = normal(1, B, 2, 3, D)  # rows and columns attended together: raster order
    flat = multi_head_attention(params, x.reshape(B, 6, D), x.reshape(B, 6, D), config=config)
    picture = multi_head_attention(params, x, x, config=config)
    assert_close(picture.reshape(flat.shape), flat, "float32")
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    low = x.astype("bfloat16")
    output = multi_head_attention(half, low, low, config=config, bias=jnp.zeros((1, 1, 2, 3, 2, 3)))
    assert output.dtype == jnp.bfloat16
    assert_close(output.reshape(flat.shape), flat, "bfloat16")
    # Swin's shifted windows: a mask of windows beside the bias.
    windows = normal(3, 4, 6, D)
    mask = booleans(0, 4, 6, 6) | jnp.eye(6, dtype=bool)[None]
    one = jax.vmap(lambda x, m: multi_head_attention(params, x, x, config=config, attention_mask=m))
    together = multi_head_attention(params, windows, windows, config=config, attention_mask=mask)
    assert_close(one(windows, mask), together, "float32")


def test_a_table_starts_at_zero_and_its_shape_is_checked():
    config, params, T = layer(True)
    fresh = init_params(jax.random.key(0), config, (T, D))
    assert fresh["relative_bias"]["embedding"].shape == (18, N)
    assert not fresh["relative_bias"]["embedding"].any()
    x = normal(1, B, T, D)
    wrong = {**params, "relative_bias": {"embedding": jnp.zeros((15, N))}}
    with pytest.raises(ValueError, match=r"\(18, 3\)"):
        multi_head_attention(wrong, x, x, config=config)
    module = flax_mha.MultiHeadAttention(num_heads=N, key_dim=H, position=config.position)
    expected = multi_head_attention(params, x, x, config=config)
    assert_close(module.apply({"params": params}, x, x), expected, "float32")
    assert module.init(jax.random.key(0), x, x)["params"]["relative_bias"]["embedding"].shape == (
        18,
        N,
    )


def test_a_layer_without_it_compiles_to_the_same_program():
    """No dense array, no table: nothing of it in the text."""
    config = MultiHeadAttentionConfig(N, H, position="rotary")
    x = jax.ShapeDtypeStruct((B, 6, D), "float32")
    params = param_shapes(config, x.shape)
    run = lambda params, x: multi_head_attention(params, x, x, config=config)
    text = jax.jit(run).lower(params, x).as_text()
    assert "gather" not in text


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("longer", ValueError, r"T = S = rows \* columns.*T=8, S=8.*7 tokens"),
        ("cross", ValueError, r"T=7, S=6"),
        ("cache", NotImplementedError, "with a cache it has no meaning.*KVCache"),
        ("encoder", NotImplementedError, "with a cache it has no meaning.*CrossCache"),
        ("context", NotImplementedError, r"context axis would cut.*context_axis=None"),
        ("positions", ValueError, "read by rotary embedding, `QueryGrowth`"),
    ],
)
def test_where_it_is_refused(call, error, message):
    config, params, T = layer(True)
    x, other = normal(1, B, T, D), normal(2, B, T - 1, D)
    longer = normal(3, B, T + 1, D)
    run = lambda q, v, **more: multi_head_attention(params, q, v, **{"config": config, **more})
    calls = {
        "longer": lambda: run(longer, longer),
        "cross": lambda: run(x, other),
        "cache": lambda: run(x, x, cache=init_cache(config, B, T)),
        "encoder": lambda: run(x, None, cache=init_cross_cache(params, x, config=config)),
        "context": lambda: run(x, x, config=config.replace(context_axis="context")),
        "positions": lambda: run(x, x, positions=jnp.arange(T)),
    }
    mesh = jax.make_mesh((1,), ("context",))
    with jax.set_mesh(mesh), pytest.raises(error, match=message):
        calls[call]()


@pytest.mark.parametrize("fields", [(0, 3), (2, -1), (2, 3, 2)])
def test_bad_grids(fields):
    with pytest.raises(ValueError, match=r"GridBias\.(rows|columns|class_token)` must be"):
        GridBias(*fields)


def test_grids_go_to_json_and_back():
    config, _, _ = layer(True)
    back = MultiHeadAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)
    assert config != config.replace(position=GridBias(2, 3))


# --- own biases ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Places(DenseBias):
    """A number for each pair of places, of the first `count` keys."""

    count: int = 4

    @property
    def table_size(self):
        return self.count

    def __call__(self, T, S, num_heads, embedding=None):
        return jnp.broadcast_to(embedding.T[:, None, :S], (num_heads, T, S))


@dataclasses.dataclass(frozen=True)
class Learned(DistanceFunction):
    """A number for each distance up to 2."""

    @property
    def table_size(self):
        return 5

    def __call__(self, distance_L, num_heads, embedding=None):
        return embedding[np.clip(distance_L, -2, 2) + 2].T


def by_distance(table):
    bias = np.empty((N, 4, 4), np.float32)
    for n, t, s in np.ndindex(*bias.shape):
        bias[n, t, s] = table[min(max(s - t, -2), 2) + 2, n]
    return bias


def by_place(table):
    return np.broadcast_to(table.T[:, None], (N, 4, 4))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("position", "bias"),
    [(Places(), by_place), (Learned(), by_distance)],
    ids=["dense", "distance"],
)
def test_own_biases_with_tables(position, bias, implementation):
    x = normal(1, B, 4, D)
    config = MultiHeadAttentionConfig(N, H, position=position, implementation=implementation)
    params = random_params(param_shapes(config, x.shape))
    plain = {name: leaf for name, leaf in params.items() if name != "relative_bias"}
    made = jnp.asarray(bias(np.asarray(params["relative_bias"]["embedding"])))[None]
    expected = multi_head_attention(plain, x, x, config=config.replace(position=None), bias=made)
    assert_close(multi_head_attention(params, x, x, config=config), expected, "float32")


# --- the transformers library -------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (1, 1)], ids=str)
def test_entries_are_swin_s_and_beit_s(grid):
    reason = "needs transformers and torch"
    swin = pytest.importorskip("transformers.models.swin.modeling_swin", reason=reason)
    beit = pytest.importorskip("transformers.models.beit.modeling_beit", reason=reason)
    rows, columns = grid
    module, ours = swin.SwinRelativePositionBias(N, grid), GridBias(*grid)
    T = rows * columns
    expected = module.relative_position_index.view(T, T).numpy()
    np.testing.assert_array_equal(ours.index(T, T), expected)
    assert ours.table_size == len(module.relative_position_bias_table)
    expected = beit.BeitRelativePositionBias.generate_relative_position_index(grid).numpy()
    with_class = GridBias(*grid, class_token=True)
    np.testing.assert_array_equal(with_class.index(T + 1, T + 1), expected)
