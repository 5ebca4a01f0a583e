"""Layers and calls that nobody wrote: against the oracle of loops, as modules, and step by step.

By default a few, the same on every run; `--hypothesis-profile=long` draws anew. What is noted of a
failure are the config's fields and what the call's arrays are made of.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from drawn_calls import assert_near, fewer, maybe
from head_oracles import Extras
from helpers import normal, random_params
from hypothesis import example, given, note
from hypothesis import strategies as st

import flax_mha.nnx
from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    init_cache,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
)
from flax_mha.attention.dropout import keep_mask, words_of

FEW = fewer(10)
SHAPES = {  # attention_axes: (query, value) of features D and M
    None: lambda T, S: ((2, T), (2, S)),
    (1,): lambda T, S: ((2, T, 3), (2, S, 3)),
    -2: lambda T, S: ((2, 3, T), (2, 3, S)),
    (1, 2): lambda T, S: ((2, 2, T), (2, 3, S)),
    (2, 1): lambda T, S: ((1, 3, T), (1, 2, S)),
    (): lambda T, S: ((T,), (S,)),  # no batch at all; the axes are None
}


@st.composite
def fields(draw):
    """A config's fields that the oracle knows."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    return dict(
        num_heads=heads,
        key_dim=draw(st.integers(1, 5)),
        value_dim=draw(st.none() | st.integers(1, 5)),
        num_kv_heads=draw(st.sampled_from([k for k in (1, 2, 3, heads) if heads % k == 0])),
        use_bias=draw(st.booleans() | st.just(("key", "attention_output"))),
        output_shape=draw(st.sampled_from([None, 4, (2, 3)])),
        use_gate=draw(st.booleans()),
        sliding_window=maybe(draw, st.integers(1, 6)),
    )


@st.composite
def extras(draw, axes):
    """Fields beyond Keras's; positions of one attended axis."""
    norms = st.sampled_from(["rms", "l2"])
    along_one = axes in (None, (1,), -2)
    position = st.sampled_from(["rotary", "alibi"]) if along_one else st.none()
    return Extras(
        clip_qkv=maybe(draw, st.sampled_from([0.3, 1.0]), 4),
        qk_norm=maybe(draw, norms, 4),
        value_norm=maybe(draw, norms, 4),
        position=maybe(draw, position, 2),
        scale=maybe(draw, st.sampled_from([0.7, 2.0]), 4),
        soft_cap=maybe(draw, st.just(2.0), 4),
        chunk_size=maybe(draw, st.integers(1, 4), 3) if along_one else None,
    )


@st.composite
def layers(draw):
    """(fields, extras, axes, sizes, which arguments the call has, seed)."""
    axes = draw(st.sampled_from(list(SHAPES)))
    own, more = draw(fields()), draw(extras(axes))
    own["use_sinks"] = draw(st.booleans())
    if more.position == "rotary":
        own["key_dim"] = 2 * draw(st.integers(1, 3))
    if more.chunk_size is not None:
        own["sliding_window"] = None
    lengths = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    names = ("key", "query_mask", "value_mask", "key_mask", "attention_mask", "bias", "segment_ids")
    given_ = {name: draw(st.booleans()) for name in names}
    is_placed = more.position == "rotary" or more.chunk_size is not None
    given_["positions"] = is_placed and draw(st.booleans())
    given_["heads"], given_["examples"] = draw(st.booleans()), draw(st.booleans())
    rate = maybe(draw, st.sampled_from([0.2, 0.5]), 3)
    return own, more, axes, lengths, given_, draw(st.booleans()), rate, draw(st.integers(0, 99))


def rows_shape(axes, shape):
    """[*batch, *T axes] of a padding mask: attended axes last, in their own order."""
    placed = oracles.attended_axes(axes or None, len(shape) + 1)
    return (*(n for i, n in enumerate(shape) if i not in placed), *(shape[i] for i in placed))


def scores_shape(axes, query, value, heads, given_):
    """[*batch, N, *T axes, *S axes] of a mask or bias, with 1 where heads or examples share it."""
    placed = oracles.attended_axes(axes or None, len(query) + 1)
    batch = [n for i, n in enumerate(query) if i not in placed]
    batch = batch if given_["examples"] else [1] * len(batch)
    lengths = [shape[axis] for shape in (query, value) for axis in placed]
    return (*batch, heads if given_["heads"] else 1, *lengths)


def arguments_of(axes, shapes, heads, given_, is_causal, seed):
    random, call = np.random.default_rng(seed), {"use_causal_mask": is_causal}
    query, value = (rows_shape(axes, shape) for shape in shapes)
    for name, shape in (("query_mask", query), ("value_mask", value), ("key_mask", value)):
        if given_[name]:
            call[name] = jnp.asarray(random.random(shape) < 0.8)
    for name, most in (("segment_ids", 2), ("positions", 9)):
        if given_[name]:
            call[name] = tuple(
                jnp.asarray(random.integers(0, most, shape), "int32") for shape in (query, value)
            )
    scores = scores_shape(axes, *shapes, heads, given_)
    if given_["attention_mask"]:
        call["attention_mask"] = jnp.asarray(random.random(scores) < 0.7)
    if given_["bias"]:
        call["bias"] = jnp.asarray(random.normal(size=scores), "float32")
    return call


PLAIN = dict(num_heads=2, key_dim=3, value_dim=2, num_kv_heads=1, use_bias=True, output_shape=None)
MASKED = dict(key=True, query_mask=True, value_mask=True, key_mask=False, attention_mask=True)
MASKED |= dict(bias=True, segment_ids=False, heads=True, examples=False, positions=False)
# Columns before rows: raster order counts as the axes are named.
GATED = PLAIN | dict(use_gate=True, sliding_window=4)
TURNED = (GATED, Extras(), (2, 1), (4, 3), MASKED, True, 0.2, 5)
# All that befalls a head, at positions that the caller tells.
EVERYTHING = Extras(0.7, "rms", "l2", "rotary", 0.7, 2.0, 3)
PLACED = MASKED | dict(positions=True, segment_ids=True, attention_mask=False)
TREATED = (
    PLAIN | dict(key_dim=4, use_sinks=True), EVERYTHING, None, (5, 7), PLACED, False, None, 6
)  # fmt: skip


@FEW
@example(TURNED)
@example(TREATED)
@given(layers())
def test_a_layer_and_its_modules_give_the_oracle_s_numbers(drawn):
    own, more, axes, lengths, given_, is_causal, rate, seed = drawn
    note(f"{drawn!r}")
    query, value = SHAPES[axes](*lengths)
    own = own | dataclasses.asdict(more)
    config = MultiHeadAttentionConfig(**own, attention_axes=axes or None, dropout=rate or 0.0)
    shapes = (*query, 5), (*value, 4), (*value, 3 if given_["key"] else 4)
    arrays = [normal(seed + i, *shape) for i, shape in enumerate(shapes)]
    inputs = arrays if given_["key"] else arrays[:2]
    params = random_params(param_shapes(config, *shapes), seed)
    call = arguments_of(axes, (query, value), config.num_heads, given_, is_causal, seed)

    dropping = {} if rate is None else {"dropout_key": jax.random.key(seed)}
    output, scores = multi_head_attention(
        params, *inputs, config=config, **call, **dropping, return_attention_scores=True
    )
    keep = None if rate is None else kept(scores.shape, axes, query, rate, dropping["dropout_key"])
    known = dict(attention_axes=axes or None, sliding_window=own.get("sliding_window"), extras=more)
    expected = oracles.layer(params, *inputs, **known, keep=keep, rate=rate or 0.0, **call)
    assert_near(output, expected[0], "float32", "output")
    assert_near(scores, expected[1], "float32", "scores")
    assert_slope(params, inputs, config, call | dropping, known | call | dict(keep=keep), rate)
    if rate is None:
        assert_modules(params, inputs, config, call, output)


def kept(shape, axes, query, rate, dropout_key):
    """Dropout's mask in the scores' shape; b, t and s count over all axes of their kind."""
    count = len(oracles.attended_axes(axes or None, len(query) + 1))
    batch, heads, rest = shape[: -2 * count - 1], shape[-2 * count - 1], shape[-2 * count :]
    T, S = (int(np.prod(rest[:count])), int(np.prod(rest[count:])))
    flat = (int(np.prod(batch)), heads, T, S)
    return np.asarray(keep_mask(words_of(dropout_key), rate, flat)).reshape(shape)


def assert_slope(params, inputs, config, call, oracle_call, rate):
    """The slope along one direction of all parameters and inputs, by the oracle's differences."""
    run = lambda params, inputs: multi_head_attention(params, *inputs, config=config, **call)
    random = np.random.default_rng(7)
    tree = (params, list(inputs))
    direction = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), tree)
    output, tangent = jax.jvp(lambda tree: run(*tree), (tree,), (direction,))
    probe = random.normal(size=output.shape)
    _, pull = jax.vjp(lambda tree: run(*tree), tree)
    gradient = pull(jnp.asarray(probe, output.dtype))[0]
    products = jax.tree.map(lambda a, b: np.asarray(a, float) * np.asarray(b), gradient, direction)
    leaves = jax.tree.leaves(products)

    def oracle(step):
        wide = lambda x, d: np.asarray(x, np.float64) + step * np.asarray(d, np.float64)
        (moved, arrays) = jax.tree.map(wide, tree, direction)
        found, _ = oracles.layer(moved, *arrays, rate=rate or 0.0, **oracle_call)
        return (found * probe).sum()

    slope = (oracle(1e-5) - oracle(-1e-5)) / 2e-5
    size = max(1.0, float(np.sqrt(sum((x**2).sum() for x in leaves))))
    assert abs(sum(x.sum() for x in leaves) - slope) <= 2e-5 * size, "gradient"
    assert abs((np.asarray(tangent, np.float64) * probe).sum() - slope) <= 2e-5 * size, "tangent"


def assert_modules(params, inputs, config, call, expected):
    """The linen and nnx modules: the same bits."""
    module = MultiHeadAttention.from_config(config)
    found = module.apply({"params": params}, *inputs, **call)
    np.testing.assert_array_equal(found, expected)
    layer = flax_mha.nnx.MultiHeadAttention.from_params(params, config)
    np.testing.assert_array_equal(layer(*inputs, **call), expected)


# --- caches -------------------------------------------------------------------------------------


@st.composite
def decoders(draw):
    """(fields, how many tokens each call has, slack, seed)."""
    own = draw(fields())
    own |= dict(
        position=draw(st.sampled_from([None, "rotary", "alibi"])),
        qk_norm=draw(st.sampled_from([None, "rms", "l2"])),
        use_sinks=draw(st.booleans()),
        soft_cap=maybe(draw, st.just(2.0)),
        key_dim=draw(st.sampled_from([2, 4])),
    )
    pieces = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    return own, pieces, draw(st.integers(0, 3)), draw(st.integers(0, 99))


@FEW
@given(decoders())
def test_step_by_step_is_one_causal_pass(drawn):
    own, pieces, slack, seed = drawn
    note(f"{drawn!r}")
    config = MultiHeadAttentionConfig(**own)
    x = normal(seed, 2, sum(pieces), 5)
    params = random_params(param_shapes(config, x.shape), seed)
    run = lambda x, **more: multi_head_attention(params, x, x, config=config, **more)
    expected = run(x, use_causal_mask=True)
    cache, outputs, start = init_cache(config, 2, sum(pieces), slack=slack), [], 0
    for count in pieces:
        output, cache = run(x[:, start : start + count], use_causal_mask=True, cache=cache)
        outputs.append(output)
        start += count
    assert_near(jnp.concatenate(outputs, 1), expected, "float32", "output")
    np.testing.assert_array_equal(cache.length, [start] * 2)


@pytest.mark.slow
@FEW
@given(decoders(), st.integers(1, 7), st.booleans())
def test_queries_one_after_the_other_are_one_call_of_an_encoder_s_keys(drawn, S, is_masked):
    own, pieces, _, seed = drawn
    note(f"{drawn!r}, S={S}, is_masked={is_masked}")
    config = MultiHeadAttentionConfig(**own)
    query, value = normal(seed, 2, sum(pieces), 5), normal(seed + 1, 2, S, 4)
    params = random_params(param_shapes(config, query.shape, value.shape), seed)
    mask = jnp.asarray(np.random.default_rng(seed).random((2, S)) < 0.7) if is_masked else None
    expected = multi_head_attention(params, query, value, config=config, value_mask=mask)
    how = dict(config=config, value_mask=mask, max_queries=sum(pieces))
    cache, outputs, start = init_cross_cache(params, value, **how), [], 0
    for count in pieces:
        part = query[:, start : start + count]
        output, cache = multi_head_attention(params, part, None, config=config, cache=cache)
        outputs.append(output)
        start += count
    assert_near(jnp.concatenate(outputs, 1), expected, "float32", "output")
