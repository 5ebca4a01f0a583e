"""Calls whose lanes have some of the heads: what a lane reads again stands apart, turned or not.

Arrays of tests are small, so that a tile has all of their heads: here the sizes say one a tile.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, x64
from kernel_cases import arrays_of, assert_beside, distances

from flax_mha import (
    Mask,
    MultiHeadAttentionConfig,
    dot_product_attention,
    init_cache,
    init_params,
    multi_head_attention,
)
from flax_mha.attention.blockwise import backward, forward, tile_sizes
from flax_mha.core.platform import Place

T, S, BLOCKS = 72, 90, (16, 24)
IDS = (np.arange(T)[None] // 20, np.arange(S)[None] // 25)
REAL = np.arange(S)[None] < np.array([S, 31])[:, None]
STAIRS = 7 * np.arange(4)


def by_distance(logits, b, n, t, s):
    return logits - 0.1 * (n * abs(t - s)).astype("float32")


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (9, 30)},
    "offsets": {"mask": Mask.causal(jnp.array([-9, 31]))},
    "padding": {"mask": Mask.padding(key=REAL)},
    "segments": {"mask": Mask.segments(*IDS)},
    "a mask of heads": {"mask": STAIRS[:, None, None] + np.arange(T)[:, None] >= np.arange(S)},
    "bias": {"bias": normal(8, 2, 4, T, S), "is_causal": True},
    "distances": {"distance_bias": distances(9, 4, 121, -60)},
    "soft cap and sinks": {"soft_cap": 2.0, "sinks": normal(10, 4)},
    "dropout": {"dropout_rate": 0.3, "dropout_key": jax.random.key(3)},
    "score": {"score": by_distance},
    "function": {"mask": Mask.function(lambda b, n, t, s: (t + s + n) % 5 > b)},
}


@pytest.fixture
def one_head_a_lane(monkeypatch):
    """One program serves all calls of one signature: those of other sizes are forgotten."""
    monkeypatch.setitem(tile_sizes.NUMBERS_A_TILE, "cpu", 1)
    monkeypatch.setattr(tile_sizes, "FEWEST_TURNED", 16)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.usefixtures("one_head_a_lane")
@pytest.mark.parametrize("name", CALLS)
def test_context_and_gradients(name):
    assert_beside(arrays_of(T, S), "blockwise", 2e-6, block_sizes=BLOCKS, **CALLS[name])


@pytest.mark.slow
@pytest.mark.usefixtures("one_head_a_lane")
def test_bfloat16():
    arrays = arrays_of(T, S, dtype="bfloat16")
    assert_beside(arrays, "blockwise", is_causal=True, block_sizes=BLOCKS)


@pytest.mark.slow
@pytest.mark.usefixtures("one_head_a_lane")
def test_float64_in_x64():
    """Where an index might have 64 bits and the other 32."""
    with x64():
        arrays = {name: x.astype("float64") for name, x in arrays_of(T, S).items()}
        loss = lambda arrays, **how: jnp.sin(dot_product_attention(**arrays, **how)).sum()
        found = jax.grad(loss)(arrays, implementation="blockwise", block_sizes=BLOCKS)
        expected = jax.grad(loss)(arrays, implementation="reference")
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, atol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("one_head_a_lane")
def test_vmap_over_queries_alone():
    arrays = arrays_of(T, S)
    queries = jnp.stack([arrays["query"], -2 * arrays["query"]])
    rest = (arrays["key"], arrays["value"])

    def gradients(implementation, blocks=None):
        call = dict(implementation=implementation, block_sizes=blocks, is_causal=True)
        loss = lambda *qkv: jnp.sin(dot_product_attention(*qkv, **call)).sum()
        return jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, None))(queries, *rest)

    for found, expected in zip(gradients("blockwise", BLOCKS), gradients("reference")):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("one_head_a_lane")
def test_keys_and_values_of_int8(monkeypatch):
    """Their scales stand apart as well: a prompt of several blocks on a cache that holds one."""
    for name in ("LARGEST_BANDED_BLOCK", "FEWEST_QUERIES"):
        monkeypatch.setattr(tile_sizes, name, 16)
    x = normal(0, 2, 50, 32)
    outputs = {}
    for name in ("reference", "blockwise"):
        config = MultiHeadAttentionConfig(4, 8, num_kv_heads=2, implementation=name)
        params = init_params(jax.random.key(1), config, x.shape)
        cache = init_cache(config, 2, 64, "int8")
        call = dict(config=config, use_causal_mask=True)
        _, cache = multi_head_attention(params, x[:, :7], x[:, :7], cache=cache, **call)
        outputs[name], _ = multi_head_attention(params, x[:, 7:], x[:, 7:], cache=cache, **call)
    np.testing.assert_allclose(outputs["blockwise"], outputs["reference"], atol=2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("one_head_a_lane")
@pytest.mark.parametrize(("T", "S"), [(16, 72), (72, 16)])
def test_what_a_single_block_reads_stays_where_it_is(T, S, monkeypatch):
    """Keys that one block of queries reads; queries that one block of keys does."""
    found = {}

    def spy(module, name):
        plain = getattr(module, name)

        def watched(tiling, blocks, corner):
            found[name] = (apart := plain(tiling, blocks, corner)) is not blocks
            return apart

        monkeypatch.setattr(module, name, watched)

    spy(forward, "keys_apart")
    spy(backward, "queries_apart")
    assert_beside(arrays_of(T, S), "blockwise", 2e-6, block_sizes=(16, 16))
    assert found == {"keys_apart": T > 16, "queries_apart": S > 16}


def test_one_sequence_of_many_heads_stands_apart_and_is_turned():
    """By default, on one device: 8 heads of 64, of 2048 tokens."""
    x = jax.ShapeDtypeStruct((1, 2048, 8, 64), "float32")
    tilings = []
    plain = tile_sizes.tiling_of
    loss = lambda x: dot_product_attention(x, x, x, is_causal=True).sum()
    with pytest.MonkeyPatch.context() as patch:
        watched = lambda *call: tilings.append((call[2], plain(*call))) or plain(*call)
        patch.setattr("flax_mha.attention.blockwise.signature.tiling_of", watched)
        jax.jit(jax.grad(loss)).lower(x)
    (found,) = {tiling for place, tiling in tilings if place == Place("cpu")}
    assert found.k < found.K == 8
    assert found.turns_queries
    assert not found.queries_last
