"""What attention obeys whatever its numbers are, over calls that nobody wrote.

By default one call each, the same on every run; `--hypothesis-profile=long` draws anew. What is
noted of a failure is the `Call` of the arrays and masks.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_calls import (
    CONSTANTS,
    assert_near,
    bias_of,
    calls,
    fewer,
    held,
    sizes_of,
)
from hypothesis import example, given, note
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from random_calls import Call
from random_masks import arrays_of, masks

from flax_mha import Mask, dot_product_attention
from flax_mha.attention import merge

FEW = fewer(10)
LENGTHS = st.integers(1, 13)
# Some of whose queries may attend nowhere.
SOME_NOWHERE = Call(
    mask=(("padding", True, True, True, 0),), bias=((True,) * 4, "normal", 1.0, False)
)


@st.composite
def plain_calls(draw, **fixed):
    """Arrays, a dense mask and a bias, for two implementations; float32."""
    call = sizes_of(draw, LENGTHS) | {"dtype": "float32"} | fixed
    if draw(st.booleans()):
        call |= dict(implementation="reference")
    else:
        call |= dict(block_sizes=draw(st.tuples(*[st.integers(2, 8)] * 2)))
    mask, offset = draw(masks()), draw(st.sampled_from([None, "each"]))
    call |= dict(mask=mask, offset=offset, is_causal=draw(st.booleans()))
    full = (*[True] * len(call["batch"]), True, True, True)
    call |= dict(bias=(full, "normal", 1.0, False))
    made = Call(**{**call, **fixed})
    note(repr(made))
    return made


def dense(call):
    """The call's mask as booleans at full size."""
    return call.allowed().reshape(*call.batch, *call.sizes[1:])


def attend(call, arrays, **arguments):
    how = dict(implementation=call.implementation, block_sizes=call.block_sizes)
    return dot_product_attention(**arrays, **{**how, **arguments})


def pulled(call, arrays, probe, **arguments):
    """The context and the gradients of its product with `probe`, by name."""
    context, pull = jax.vjp(lambda arrays: attend(call, arrays, **arguments), arrays)
    return {"context": context, **pull(probe)[0]}


def probe_of(call):
    return jnp.asarray(call.normal("probe", *call.batch, call.T, call.N, call.V), call.dtype)


def assert_alike(found, expected, dtype="float32"):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert_near(found[name], x, dtype, name)


def taken(arrays, order):
    """The arrays with their keys in another order, or repeated."""
    axes = {"key": -3, "value": -3, "bias": -1}
    return {x: y if x == "query" else jnp.take(y, order, axes[x]) for x, y in arrays.items()}


@pytest.mark.slow
@FEW
@given(plain_calls())
def test_the_order_of_keys_does_not_matter(call):
    arrays, mask, probe = call.arrays(), dense(call), probe_of(call)
    order = call.random("order").permutation(call.S)
    expected = pulled(call, arrays, probe, mask=mask)
    found = pulled(call, taken(arrays, order), probe, mask=mask[..., order])
    back = {x: found.pop(x) for x in ("context", "query")}
    assert_alike(back | taken(found, np.argsort(order)), expected)


@pytest.mark.slow
@FEW
@given(plain_calls(is_causal=True, mask=(), offset=None), st.data())
def test_a_causal_prefix_does_not_see_what_follows(call, data):
    whole = dataclasses.replace(call, S=call.T)
    count = data.draw(st.integers(1, call.T), label="count")
    arrays, cut = whole.arrays(), slice(count)
    heads = {x: arrays[x][..., cut, :, :] for x in ("query", "key", "value")}
    heads["bias"] = arrays["bias"][..., cut, cut]
    expected = attend(call, arrays, is_causal=True)[..., cut, :, :]
    assert_near(attend(call, heads, is_causal=True), expected, "float32", "context")


@pytest.mark.slow
@FEW
@example(dataclasses.replace(SOME_NOWHERE, implementation="reference"), 3)
@given(plain_calls(), st.integers(0, 13))
def test_two_halves_of_the_keys_merge_to_the_whole(call, cut):
    arrays, mask, cut = call.arrays(), dense(call), min(cut, call.S)

    def merged(arrays):
        halves = (np.arange(cut), np.arange(cut, call.S))
        parts = (
            attend(call, taken(arrays, half), mask=mask[..., half], return_residuals=True)
            for half in halves
        )
        return merge(*parts)[0]

    context, pull = jax.vjp(merged, arrays)
    probe = probe_of(call)
    assert_alike({"context": context, **pull(probe)[0]}, pulled(call, arrays, probe, mask=mask))


@st.composite
def shifted(draw):
    """On the grid, for a shift of any size rounds each logit in one known way."""
    call = draw(plain_calls(on_grid=True, scale=0.5))
    full = bias_of(draw, {"batch": call.batch}, st.just(("constant", draw(CONSTANTS))))
    return dataclasses.replace(call, bias=full)


@FEW
@given(shifted())
def test_a_constant_of_any_size_shifts_nothing_but_the_rounding(call):
    note(f"held({call!r})")
    held(call)


@pytest.mark.slow
@FEW
@given(plain_calls(), st.data())
def test_a_key_twice_is_a_bias_of_log_2(call, data):
    arrays, mask, probe = call.arrays(), dense(call), probe_of(call)
    twice = data.draw(st.integers(0, call.S - 1), label="twice")
    order = np.append(np.arange(call.S), twice)
    found = pulled(call, taken(arrays, order), probe, mask=mask[..., order])
    added = np.float32(np.log(2) * (np.arange(call.S) == twice))
    moved = {
        **arrays,
        "bias": arrays["bias"] + jnp.reshape(added, (1,) * len(call.batch) + (1, 1, -1)),
    }
    expected = pulled(call, moved, probe, mask=mask)
    for name, axis in (("key", -3), ("value", -3), ("bias", -1)):
        both = jnp.moveaxis(found[name], axis, 0)
        both = both.at[twice].add(both[-1])[:-1]
        found[name] = jnp.moveaxis(both, 0, axis)
    assert_alike(found, expected)


@pytest.mark.slow
@FEW
@given(calls(["blockwise", "reference"], LENGTHS, dtype="float32", rate=None, return_weights=False,
             return_residuals=False))  # fmt: skip
def test_what_is_forbidden_has_a_gradient_of_exactly_zero(call):
    note(repr(call))
    allowed = call.allowed()
    probe = probe_of(call)
    found = pulled_of(call, call.arrays(), probe)
    B, N, T, S = call.sizes
    seen = allowed.reshape(B, call.K, call.G, T, S)
    unread, nowhere = ~seen.any((2, 3)), ~allowed.any(-1)
    for name in ("key", "value"):
        rows = np.asarray(found[name]).reshape(B, S, call.K, -1).swapaxes(1, 2)
        assert (rows[unread] == 0).all(), name
    for name in ("query", "context"):
        rows = np.asarray(found[name]).reshape(B, T, N, -1).swapaxes(1, 2)
        assert (rows[nowhere] == 0).all(), name
    if call.bias is not None and all(call.bias[0]):
        assert (np.asarray(found["bias"]).reshape(call.sizes)[~allowed] == 0).all()


def pulled_of(call, arrays, probe):
    context, pull = jax.vjp(call.attend, arrays)
    return {"context": context, **pull(probe)[0]}


@pytest.mark.slow
@FEW
@given(calls(["blockwise", "reference"], LENGTHS, dtype="float32", return_weights=False,
             return_residuals=False), st.booleans(), st.booleans())  # fmt: skip
def test_nan_behind_padding_reaches_nothing(call, query, key):
    part = ("padding", query, key, True, 9)
    call = dataclasses.replace(call, mask=(*call.mask, part), mask_as_array=False)
    note(repr(call))
    hidden = call.random("hidden")
    garbage = {}
    for name, x in (arrays := call.arrays()).items():
        gone = gone_rows(call, part, name)
        if gone is None:
            garbage[name] = x
            continue
        bad = hidden.choice([np.nan, np.inf, -np.inf], x.shape)
        garbage[name] = jnp.where(gone[..., None, None], jnp.asarray(bad, x.dtype), x)
    probe = probe_of(call)
    clean, dirty = (pulled_of(call, one, probe) for one in (arrays, garbage))
    for name, x in clean.items():
        np.testing.assert_array_equal(dirty[name], x, err_msg=name)


def gone_rows(call, part, name):
    """Booleans `[*batch, length]` of what padding removes of an array; None = nothing."""
    side = {"query": "query", "key": "key", "value": "key"}.get(name)
    real = None if side is None else arrays_of(part, call)[side]
    return None if real is None else ~real.reshape(*call.batch, -1)


@pytest.mark.slow
@FEW
@given(plain_calls(batch=(4,), K=2), st.sampled_from([0.1, 0.5, 0.9]), st.booleans())
def test_dropout_is_the_same_everywhere(call, rate, shared):
    """By each implementation and block size, under vmap, and over a mesh of eight devices.

    The values are one-hot: what is dropped are the zeros of the context, bit by bit.
    """
    call = dataclasses.replace(call, V=call.S, mask=(), is_causal=False, bias=None, H=2)
    arrays = call.arrays()
    eye = jnp.eye(call.S, dtype="float32")[None, :, None]
    arrays["value"] = jnp.broadcast_to(eye, (4, call.S, call.K, call.S))
    how = dict(dropout_rate=rate, dropout_key=jax.random.key(call.seed), broadcast_dropout=shared)
    run = lambda arrays, **more: dot_product_attention(**arrays, **how, **more)
    expected = run(arrays, implementation="reference")
    blocks = dict(implementation="blockwise", block_sizes=call.block_sizes or (3, 5))
    place = lambda b: jnp.stack([b, 0 * b, 0 * b, 0 * b])
    mapped = jax.vmap(lambda b, one: run(one, **blocks, dropout_start=place(b)))
    mesh = jax.make_mesh((4, 2), ("data", "heads"), devices=jax.devices())
    sharding = NamedSharding(mesh, P("data", None, "heads"))
    spread = jax.tree.map(lambda x: jax.device_put(x, sharding), arrays)
    for found in (
        run(arrays, **blocks),
        mapped(jnp.arange(4, dtype="uint32"), arrays),
        jax.jit(lambda arrays: run(arrays, **blocks))(spread),
    ):
        np.testing.assert_array_equal(np.asarray(found) == 0, np.asarray(expected) == 0)
        assert_near(found, expected, "float32", "context")


def test_the_mask_of_a_call_is_the_one_that_is_drawn():
    """Once by hand, for the masks of random calls are made and read by one description."""
    call = Call(batch=(1,), T=3, S=4, mask=(("causal",), ("not", ("prefix", False, 0))), seed=10)
    length = int(np.random.default_rng([10, 0, *b"prefix"]).integers(0, 6, 1)[0])
    expected = np.array([[s <= t and not s < length for s in range(4)] for t in range(3)])
    np.testing.assert_array_equal(call.allowed()[0, 0], expected)
    mask = call.arguments()["mask"]
    assert isinstance(mask, Mask)
    np.testing.assert_array_equal(mask.as_array(3, 4)[0, 0], expected)
