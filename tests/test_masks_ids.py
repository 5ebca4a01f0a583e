"""Segment ids and places of any integer type: what is compared is what was given, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import D, assert_close, normal, random_params, x64

from flax_mha import (
    Mask,
    MultiHeadAttentionConfig,
    attention_scores,
    dot_product_attention,
    multi_head_attention,
    param_shapes,
)

B, L = 2, 6
CONFIG = MultiHeadAttentionConfig(num_heads=3, key_dim=4, position="rotary")
X = normal(1, B, L, D)
PARAMS = random_params(param_shapes(CONFIG, X.shape))
IDS = np.arange(L)[None].repeat(B, 0) // 3  # two documents, 0 and 1


def attend(**call):
    return multi_head_attention(PARAMS, X, X, config=CONFIG, **call)


WIDE = IDS * 2**32  # the lower 32 bits of both ids are 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: attend(segment_ids=WIDE),
        lambda: attend(segment_ids=(IDS, WIDE)),
        lambda: attend(segment_ids=IDS * 2**31),
        lambda: attend(segment_ids=WIDE.astype("uint64")),
        lambda: attend(positions=WIDE),
        lambda: attention_scores(
            PARAMS, X, X, config=CONFIG, query_rows=jnp.array([0]), segment_ids=WIDE
        ),
        lambda: attention_scores(PARAMS, X, X, config=CONFIG, query_rows=np.array([2**32])),
        lambda: Mask.segments(WIDE, WIDE),
        lambda: Mask.causal(np.array([2**32])),
        lambda: Mask.causal(-(2**31) - 1),
    ],
)
def test_what_32_bits_would_cut_is_refused(call):
    with pytest.raises(ValueError, match=r"must fit u?int32.*with values \[-?\d{10}\]"):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
def test_ids_of_every_type(dtype):
    """3000000000 fits uint32 alone; the others hold 100."""
    far = (IDS * (3_000_000_000 if dtype == "uint32" else 100)).astype(dtype)
    assert_close(attend(segment_ids=far), attend(segment_ids=IDS), "float32")
    assert np.abs(attend(segment_ids=far) - attend()).max() > 0.01


def test_types_that_no_type_of_32_bits_holds_are_not_compared():
    """As int32, 3000000000 is -1294967296."""
    unsigned, signed = np.array([3_000_000_000], "uint32"), np.array([-1_294_967_296], "int32")
    with pytest.raises(TypeError, match=r"must have one type.*uint32 and int32"):
        Mask.segments(unsigned, signed)
    with x64():
        assert not Mask.segments(unsigned, signed).as_array(1, 1).any()
        with pytest.raises(TypeError, match=r"uint64 and int64"):
            Mask.segments(unsigned.astype("uint64"), signed.astype("int64"))


@pytest.mark.slow
@pytest.mark.parametrize("length", [16, 128])  # of 128, blocks compare the ids
def test_64_bits_are_kept_where_jax_keeps_them(length):
    x = normal(2, 1, length, 2, 4)
    ids = np.arange(length)[None] * 3 // length
    with x64():
        run = jax.jit(lambda *ids: dot_product_attention(x, x, x, mask=Mask.segments(*ids)))
        near, far = jnp.asarray(ids), jnp.asarray(ids * 2**32 - 2**40)
        assert far.dtype == jnp.int64
        assert_close(run(far, far), run(near, near), "float32")
        assert_close(run(far.astype("uint64"), far.astype("uint64")), run(near, near), "float32")
        small = near.astype("int32")
        assert_close(run(small, near), run(near, near), "float32")
        first = ids[0] == 0  # of 0, 1, 2 and 0, 2^32, 2^33 the first alone are equal
        mixed = Mask.segments(small, far + 2**40).as_array(length, length)
        np.testing.assert_array_equal(mixed[0, 0], np.outer(first, first))


def test_64_bit_ids_in_the_layer():
    with x64():
        far = attend(segment_ids=jnp.asarray(WIDE), use_causal_mask=True)
        near = attend(segment_ids=jnp.asarray(IDS), use_causal_mask=True)
    assert_close(far, near, "float32")


def test_rows_of_a_type_too_small_for_the_length():
    x = normal(3, 1, 300, D)
    call = dict(config=CONFIG, query_rows=np.array([3, 250], "uint8"))
    rows = attention_scores(PARAMS, x, x, **call)
    call["query_rows"] = jnp.array([3, 250])
    assert_close(rows, attention_scores(PARAMS, x, x, **call), "float32")


def test_ids_that_are_no_pair():
    for wrong in (3, [IDS] * 3, "packed"):
        with pytest.raises(TypeError, match=r"`segment_ids` must be integers \[B, T\], or a pair"):
            attend(segment_ids=wrong)
    with pytest.raises(TypeError, match="`positions` must be an array of integers"):
        attend(positions=(IDS, IDS * 1.0))
