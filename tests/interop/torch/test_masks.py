"""PyTorch's masks: what they mean there they mean here, and back again, entry by entry."""

import numpy as np
import pytest
from helpers import B, H, N, S, T, assert_close, normal, random_params
from torch_bridge import installed_torch, run, torch_module

from flax_mha import MultiHeadAttentionConfig, multi_head_attention, param_shapes
from flax_mha.interop import torch as interop

E = N * H
CONFIG = MultiHeadAttentionConfig(num_heads=N, key_dim=H)
PARAMS = random_params(param_shapes(CONFIG, (1, E)))
RNG = np.random.default_rng(5)
OPEN = np.arange(S) == 0  # the first key stays open, so that torch has no NaN
HIDDEN_TS = (RNG.random((T, S)) < 0.4) & ~OPEN
HIDDEN_BNTS = (RNG.random((B * N, T, S)) < 0.4) & ~OPEN
PADDED = np.arange(S) >= np.array([[S], [3]])
ADDED = RNG.normal(size=(B * N, T, S)).astype("float32")


def minus_infinity(mask):
    return np.where(mask, np.float32(-np.inf), np.float32(0))


TORCH_MASKS = {
    "none": {},
    "rank 2": {"attn_mask": HIDDEN_TS},
    "rank 3": {"attn_mask": HIDDEN_BNTS},
    "padding": {"key_padding_mask": PADDED},
    "rank 2 and padding": {"attn_mask": HIDDEN_TS, "key_padding_mask": PADDED},
    "rank 3 and padding": {"attn_mask": HIDDEN_BNTS, "key_padding_mask": PADDED},
    "-inf": {"attn_mask": minus_infinity(HIDDEN_TS)},
    "floats": {"attn_mask": ADDED[0]},
    "floats and -inf": {"attn_mask": ADDED + minus_infinity(HIDDEN_BNTS)},
    "floats, padding": {
        "attn_mask": ADDED + minus_infinity(HIDDEN_BNTS),
        "key_padding_mask": minus_infinity(PADDED),
    },
    "padding of floats": {
        "attn_mask": ADDED[0],
        "key_padding_mask": minus_infinity(PADDED) + ADDED[:B, 0],
    },
}


QUICK = ("rank 2", "rank 3 and padding", "floats and -inf", "padding of floats")


@pytest.mark.models
@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in TORCH_MASKS],
)
def test_masks_mean_what_they_mean_in_torch(case):
    masks = TORCH_MASKS[case]
    with torch_module(E, N) as (torch, module):
        config, params = interop.from_torch_module(module)
        query, value = normal(1, B, T, E), normal(2, B, S, E)
        expected, weights = run(torch, module, query, value, value, masks=masks)
        ours = interop.mask_from_torch(**masks, num_heads=N)
        output, scores = multi_head_attention(
            params, query, value, config=config, return_attention_scores=True, **ours
        )
        assert_close(output, expected, "float32")
        assert_close(scores, weights, "float32")
        back = interop.mask_to_torch(**ours, num_heads=N)
        again, _ = run(torch, module, query, value, value, masks=given(back))
        assert_close(again, expected, "float32")


def given(masks):
    return {name: mask for name, mask in masks.items() if mask is not None}


def test_masks_entry_by_entry():
    ours = interop.mask_from_torch(
        ADDED + minus_infinity(HIDDEN_BNTS), minus_infinity(PADDED), num_heads=N
    )
    for b in range(B):
        assert (ours["value_mask"][b] == ~PADDED[b]).all()
        for n in range(N):
            hidden = HIDDEN_BNTS[b * N + n]
            assert (ours["attention_mask"][b, n] == ~hidden).all()
            assert (ours["bias"][b, n] == np.where(hidden, 0, ADDED[b * N + n])).all()
    ours = interop.mask_from_torch(HIDDEN_TS, PADDED)
    assert (ours["attention_mask"] == ~HIDDEN_TS[None]).all()
    assert ours["bias"] is None
    assert interop.mask_from_torch(np.zeros((T, S), "float32"))["attention_mask"] is None
    assert interop.mask_from_torch() == {"attention_mask": None, "value_mask": None, "bias": None}


@pytest.mark.slow
def test_masks_without_a_batch():
    query, value = normal(1, T, E), normal(2, S, E)
    params = PARAMS
    alone = interop.mask_from_torch(HIDDEN_BNTS[:N], PADDED[1], num_heads=N)
    batch = interop.mask_from_torch(HIDDEN_BNTS[:N], PADDED[1:], num_heads=N)
    assert alone["attention_mask"].shape == (N, T, S)
    actual = multi_head_attention(params, query, value, config=CONFIG, **alone)
    expected = multi_head_attention(params, query[None], value[None], config=CONFIG, **batch)
    assert_close(actual, expected[0], "float32")


def test_a_query_that_may_attend_nowhere_has_no_nan():
    x, params = normal(1, B, T, E), PARAMS
    masks = interop.mask_from_torch(np.full((T, T), -np.inf, "float32"))
    output = multi_head_attention(params, x, x, config=CONFIG, **masks)
    assert (output == params["attention_output"]["bias"][None, None]).all()


@pytest.mark.models
def test_torch_tensors_as_masks():
    torch = installed_torch()
    causal = torch.nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.bfloat16)
    ours = interop.mask_from_torch(causal, torch.from_numpy(PADDED))
    assert (ours["attention_mask"] == np.tri(S, dtype=bool)[None]).all()
    assert (ours["value_mask"] == ~PADDED).all()
    assert ours["bias"] is None


def test_masks_back_to_torch():
    dense = ~HIDDEN_BNTS.reshape(B, N, T, S)
    assert (interop.mask_to_torch(dense)["attn_mask"] == HIDDEN_BNTS).all()
    assert (interop.mask_to_torch(~HIDDEN_TS)["attn_mask"] == HIDDEN_TS).all()
    assert (interop.mask_to_torch(value_mask=~PADDED)["key_padding_mask"] == PADDED).all()
    rank3 = interop.mask_to_torch(dense[:, 1], num_heads=N)["attn_mask"]
    assert rank3.shape == (B * N, T, S)
    for b in range(B):
        for n in range(N):
            assert (rank3[b * N + n] == ~dense[b, 1]).all()
    heads_only = interop.mask_to_torch(dense[:1], ~PADDED)["attn_mask"]
    assert (heads_only == np.concatenate([HIDDEN_BNTS[:N]] * B)).all()
    floats = interop.mask_to_torch(~HIDDEN_TS, ~PADDED, ADDED[0])
    assert (floats["attn_mask"] == np.where(HIDDEN_TS, -np.inf, ADDED[0])).all()
    assert (floats["key_padding_mask"] == minus_infinity(PADDED)).all()
    assert {mask.dtype for mask in floats.values()} == {np.dtype("float32")}
    assert all(mask.flags.writeable for mask in floats.values())


@pytest.mark.parametrize(
    ("function", "masks", "message"),
    [
        ("mask_from_torch", {"attn_mask": HIDDEN_BNTS}, r"`num_heads` must be given.*\(6, 5, 7\)"),
        (
            "mask_from_torch",
            {"attn_mask": HIDDEN_BNTS, "num_heads": 4},
            r"\[B N, T, S\] with N = 4",
        ),
        (
            "mask_from_torch",
            {"attn_mask": HIDDEN_BNTS, "key_padding_mask": PADDED[0], "num_heads": N},
            r"\[N, T, S\] with N = 3",
        ),
        ("mask_from_torch", {"attn_mask": PADDED[0]}, r"\[T, S\] or \[B N, T, S\].*\(7,\)"),
        ("mask_from_torch", {"key_padding_mask": HIDDEN_BNTS}, r"must be \[B, S\] or \[S\]"),
        (
            "mask_from_torch",
            {"attn_mask": ADDED[0], "key_padding_mask": ADDED[0, :, 1:]},
            r"must broadcast.*\(1, 5, 7\) and \(5, 1, 1, 6\)",
        ),
        ("mask_from_torch", {"attn_mask": HIDDEN_TS.astype("uint8")}, r"booleans.*\.bool\(\)"),
        ("mask_to_torch", {"attention_mask": ADDED[0]}, r"must be boolean.*`bias=`"),
        ("mask_to_torch", {"attention_mask": ~HIDDEN_TS[None, None, None]}, r"\[B, N, T, S\]"),
        ("mask_to_torch", {"attention_mask": HIDDEN_BNTS[:B]}, r"`num_heads` must be given"),
        (
            "mask_to_torch",
            {"attention_mask": HIDDEN_BNTS[None], "num_heads": N},
            r"\[B, N, T, S\] = \(1, 3, 5, 7\).*\(1, 6, 5, 7\)",
        ),
        ("mask_to_torch", {"bias": HIDDEN_TS}, r"`bias` must be a floating-point array"),
        (
            "mask_to_torch",
            {"attention_mask": HIDDEN_TS, "bias": ADDED[0].T},
            r"must broadcast.*\(1, 1, 5, 7\) and \(1, 1, 7, 5\)",
        ),
    ],
)
def test_masks_that_are_refused(function, masks, message):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(interop, function)(**masks)
