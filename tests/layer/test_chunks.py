"""Attention within chunks of a fixed size: against loops, with a cache, along a context axis."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_trees_close, normal, random_params

from flax_mha import (
    ContextAxis,
    MultiHeadAttentionConfig,
    attention_scores,
    init_cache,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
    zigzag_inverse,
    zigzag_order,
)
from flax_mha.positions import AxialRotary, QueryGrowth, Rotary

B, T, N, H, D, CHUNK = 2, 13, 3, 8, 17, 4


def expected(params, x, allowed):
    """Self-attention by loops, in float64: `allowed(t, s)` of places in raster order."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x_BTD = np.asarray(x, np.float64).reshape(len(x), -1, x.shape[-1])
    heads = {
        name: np.einsum("btd,dnh->btnh", x_BTD, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    }
    context = np.zeros_like(heads["query"])
    for b, t, n in np.ndindex(*context.shape[:3]):
        seen = [s for s in range(x_BTD.shape[1]) if allowed(t, s)]
        logits = [heads["query"][b, t, n] @ heads["key"][b, s, n] / math.sqrt(H) for s in seen]
        powers = np.exp(np.array(logits) - max(logits))
        context[b, t, n] = powers @ heads["value"][b, seen, n] / powers.sum()
    output = params["attention_output"]
    result = np.einsum("btnv,nve->bte", context, output["kernel"]) + output["bias"]
    return result.reshape(x.shape)


def within(causal, chunk=CHUNK):
    return lambda t, s: t // chunk == s // chunk and (s <= t or not causal)


def layer(*lengths, **fields):
    config = MultiHeadAttentionConfig(
        **{"num_heads": N, "key_dim": H, "chunk_size": CHUNK, **fields}
    )
    x = normal(3, B, *(lengths or (T,)), D)
    return config, random_params(param_shapes(config, x.shape)), x


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(T,), (3, 5)], ids=["line", "grid"])
def test_attention_stays_within_chunks(lengths, causal, implementation):
    config, params, x = layer(*lengths, implementation=implementation)
    output = multi_head_attention(params, x, x, config=config, use_causal_mask=causal)
    assert_close(output, expected(params, x, within(causal)), "float32")


@pytest.mark.parametrize("chunk", [1, 5, 12, 13, 14, 1000])
def test_any_size_of_chunk(chunk):
    """Sizes that divide the length and not, one above it; T = 130 takes the kernels in blocks."""
    config, params, x = layer(chunk_size=chunk)
    output = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    assert_close(output, expected(params, x, within(True, chunk)), "float32")


@pytest.mark.slow
def test_blocks_skip_nothing_that_a_chunk_holds():
    config, params, x = layer(130, chunk_size=50, implementation="blockwise")
    x = x[:1]

    def loss(params, implementation):
        layer = config.replace(implementation=implementation)
        return (multi_head_attention(params, x, x, config=layer) ** 2).sum()

    output = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    assert_close(output, expected(params, x, within(True, 50)), "float32")
    assert_trees_close(
        *(jax.grad(loss)(params, name) for name in ("blockwise", "reference")), "float32"
    )


@pytest.mark.slow
@pytest.mark.parametrize("position", [None, "rotary", "alibi", QueryGrowth(0.5, 3)], ids=str)
@pytest.mark.parametrize("pieces", [(1,) * T, (6, 1, 1, 5), (9, 4), (3, 10)], ids=str)
def test_a_cache_gives_what_the_whole_call_gives(pieces, position):
    config, params, x = layer(position=position)
    whole = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    cache, outputs = init_cache(config, B, T + 2), []
    for stop, size in zip(itertools.accumulate(pieces), pieces):
        new = x[:, stop - size : stop]
        output, cache = multi_head_attention(params, new, new, config=config, cache=cache)
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, 1), whole, "float32")


@pytest.mark.slow
def test_each_example_of_a_cache_has_its_own_chunks():
    """Ragged prompts, then steps: an example's chunk goes by its own length."""
    config, params, x = layer()
    lengths = np.array([6, 3])
    real = jnp.asarray(np.arange(7)[None] < lengths[:, None])
    step = jax.jit(
        lambda x, real, cache: multi_head_attention(
            params, x, x, config=config, cache=cache, value_mask=real
        )
    )
    prompt, cache = step(x[:, :7], real, init_cache(config, B, T))
    for b, length in enumerate(lengths):
        one = expected(params, x[b : b + 1, :length], within(True))
        assert_close(prompt[b, :length], one[0], "float32")
    for i in range(3):
        new = jnp.stack([x[b, length + i] for b, length in enumerate(lengths)])[:, None]
        output, cache = step(new, jnp.ones((B, 1), bool), cache)
        for b, length in enumerate(lengths):
            one = expected(params, x[b : b + 1, : length + i + 1], within(True))
            assert_close(output[b, 0], one[0, -1], "float32")


def test_a_prefix_sees_its_chunk_both_ways():
    config, params, x = layer()
    cache = init_cache(config, B, T, is_causal=False)
    output, cache = multi_head_attention(params, x[:, :6], x[:, :6], config=config, cache=cache)
    assert_close(output, expected(params, x[:, :6], within(False)), "float32")
    more, _ = multi_head_attention(params, x[:, 6:], x[:, 6:], config=config, cache=cache)
    assert_close(more[:, -1:], expected(params, x, within(False))[:, -1:], "float32")


@pytest.mark.slow
def test_chunks_follow_the_positions():
    """Packed sequences are as alone; positions that begin elsewhere move the borders."""
    config, params, x = layer(position="rotary")
    call = {"config": config, "use_causal_mask": True}
    ids = jnp.asarray([0] * 6 + [1] * 7)
    packed = multi_head_attention(params, x, x, **call, segment_ids=ids[None])
    alone = [multi_head_attention(params, y, y, **call) for y in (x[:, :6], x[:, 6:])]
    assert_close(packed, jnp.concatenate(alone, 1), "float32")
    mixed = multi_head_attention(params, x, x, **call, segment_ids=jnp.arange(T)[None] % 2)
    for first in (0, 1):  # tokens of two sequences in turns: a chunk reaches twice as far
        alone = multi_head_attention(params, x[:, first::2], x[:, first::2], **call)
        assert_close(mixed[:, first::2], alone, "float32")
    padded = jnp.concatenate([x[:, :2], x], 1)
    at = jnp.concatenate([jnp.zeros(2, "int32"), jnp.arange(T, dtype="int32")])[None]
    real = jnp.asarray(np.arange(T + 2) >= 2)[None]
    output = multi_head_attention(params, padded, padded, **call, positions=at, value_mask=real)
    assert_close(output[:, 2:], multi_head_attention(params, x, x, **call), "float32")
    plain = config.replace(position=None)
    output = multi_head_attention(
        params, x, x, config=plain, positions=jnp.arange(3, T + 3, dtype="uint8")[None]
    )
    assert_close(output, expected(params, x, lambda t, s: (t + 3) // 4 == (s + 3) // 4), "float32")


def test_scores_of_chosen_rows():
    config, params, x = layer()
    call = {"config": config, "use_causal_mask": True}
    _, scores = multi_head_attention(params, x, x, **call, return_attention_scores=True)
    some = attention_scores(params, x, x, **call, query_rows=jnp.array([5, 12]))
    assert_close(some, scores[:, :, jnp.array([5, 12])], "float32")
    assert not scores[:, :, 5, :4].any()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_along_a_context_axis(layout, strategy):
    growth = QueryGrowth(0.5, 3, rotary=Rotary())
    config, params, x = layer(16, chunk_size=6, position=growth, num_heads=4)
    params = random_params(param_shapes(config, x.shape))
    whole = multi_head_attention(params, x, x, config=config, use_causal_mask=True)
    n, axis = 4, ContextAxis("context", strategy, layout)
    order = zigzag_order(16, n) if layout == "zigzag" else np.arange(16)
    back = zigzag_inverse(16, n) if layout == "zigzag" else np.arange(16)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((n,), ("context",), devices=jax.devices()[:n], axis_types=auto)
    with jax.set_mesh(mesh):
        output = multi_head_attention(
            params, x[:, order], x[:, order],
            config=config.replace(context_axis=axis), use_causal_mask=True,
        )  # fmt: skip
    assert_close(output[:, back], whole, "float32")


def test_refusals():
    config, params, x = layer()
    with pytest.raises(ValueError, match=r"chunks or a sliding window"):
        config.replace(sliding_window=3)
    with pytest.raises(ValueError, match=r"whole positions of one axis.*AxialRotary"):
        config.replace(position=AxialRotary(sections=(2, 2)))
    with pytest.raises(ValueError, match="chunk_size"):
        config.replace(chunk_size=0)
    with pytest.raises(NotImplementedError, match=r"CrossCache.*chunk_size=4"):
        init_cross_cache(params, x, config=config)
    plain = config.replace(chunk_size=None)
    cross = init_cross_cache(params, x, config=plain)
    with pytest.raises(NotImplementedError, match=r"CrossCache.*chunk_size=4"):
        multi_head_attention(params, x, None, config=config, cache=cross)
    cache = init_cache(config, B, T)
    with pytest.raises(NotImplementedError, match=r"chunks of a KVCache.*positions"):
        multi_head_attention(
            params, x, x, config=config, cache=cache, positions=jnp.arange(T)[None]
        )
    ring = init_cache(plain.replace(sliding_window=4), B, T)
    with pytest.raises(ValueError, match="ring"):
        multi_head_attention(params, x[:, :1], x[:, :1], config=config, cache=ring)
    again = MultiHeadAttentionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
