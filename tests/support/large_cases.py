"""Calls of the sizes that kernels are made for, each in its own way; no oracle walks over these."""

import jax
import numpy as np
from attention_cases import Case
from helpers import booleans, normal

from flax_mha import Mask
from flax_mha.attention import DistanceBias


def real(t, *lengths):
    """Booleans [B, t], True before each example's length."""
    return np.arange(t)[None] < np.array(lengths)[:, None]


def packed(t, *ends):
    """Segment ids [1, t] of sequences that end there."""
    return np.searchsorted(np.array(ends), np.arange(t), side="right")[None]


DROPOUT = {"dropout_rate": 0.2, "dropout_key": jax.random.key(7)}
EMPTY_ROWS = np.asarray(booleans(5, 2, 1, 256, 384)) & (np.arange(256) % 5 != 2)[:, None]
# What the rows of one kind of kernel want: even lengths, 64 or 128 features, V = H; and then not.
LARGE = {
    "plain": Case(sizes=(2, 256, 512, 4, 4, 64, 64)),
    "causal": Case({"is_causal": True}, sizes=(2, 512, 512, 4, 2, 64, 64)),
    "causal, long": Case({"is_causal": True}, sizes=(1, 2048, 2048, 2, 1, 128, 128)),
    "causal, T > S": Case({"is_causal": True}, sizes=(1, 640, 256, 2, 2, 64, 64)),
    "causal, 256 features": Case({"is_causal": True}, sizes=(1, 256, 256, 2, 1, 256, 256)),
    "window": Case({"local_window_size": (200, 0)}, sizes=(1, 1024, 1024, 4, 4, 128, 128)),
    "two-sided window": Case({"local_window_size": (90, 33)}, sizes=(1, 700, 700, 2, 1, 64, 64)),
    "padding": Case(
        {"mask": Mask.padding(key=real(512, 512, 77))}, sizes=(2, 256, 512, 4, 2, 64, 64)
    ),
    "padding, 300 x 515": Case(
        {"mask": Mask.padding(real(300, 280, 9), real(515, 515, 130))},
        sizes=(2, 300, 515, 4, 2, 80, 48),
    ),
    "segments": Case(
        {"mask": Mask.segments(packed(1024, 300, 301, 800), packed(1024, 300, 301, 800))},
        sizes=(1, 1024, 1024, 2, 1, 64, 64),
    ),
    "empty rows": Case({"mask": EMPTY_ROWS}, sizes=(2, 256, 384, 4, 2, 64, 64)),
    "bias": Case({"bias": normal(8, 4, 256, 384)}, sizes=(2, 256, 384, 4, 4, 64, 64)),
    "bias of examples, causal": Case(
        {"bias": normal(8, 2, 1, 1, 256), "is_causal": True}, sizes=(2, 256, 256, 4, 1, 64, 64)
    ),
    "additive mask": Case(
        {"bias": np.where(real(256, 256, 77)[:, None, None], normal(8, 1, 4, 256, 256), -1e9)},
        sizes=(2, 256, 256, 4, 4, 64, 64),
    ),
    "distance bias": Case(
        {"distance_bias": DistanceBias(normal(9, 4, 601), first=-300), "is_causal": True},
        sizes=(1, 768, 768, 4, 4, 64, 64),
    ),
    "soft cap and sinks": Case(
        {"soft_cap": 2.0, "sinks": normal(10, 4), "is_causal": True},
        sizes=(2, 384, 384, 4, 2, 64, 64),
    ),
    "dropout": Case({**DROPOUT, "is_causal": True}, sizes=(2, 512, 512, 4, 2, 64, 64)),
    "dropout, 130 x 257": Case(DROPOUT, sizes=(2, 130, 257, 6, 3, 40, 24)),
}  # fmt: skip
