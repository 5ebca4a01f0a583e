"""What the pictures refuse: each message names the rule, what was received, and the remedy."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import Mask
from flax_mha.plots import plot_attention, plot_bands, plot_mask

N, T, S = 3, 5, 7
WEIGHTS = np.full((N, T, S), 1 / S, np.float32)
GRID = np.full((2, 3, 4, 5), 1 / 20, np.float32)


def with_entry(value):
    scores = WEIGHTS.copy()
    scores[1, 2, 3] = value
    return scores


SCORES = [
    (
        WEIGHTS[None],
        ValueError,
        r"axes \[T, S\] or \[N, T, S\].*\(1, 3, 5, 7\).*Pass `scores\[0\]`",
    ),
    (WEIGHTS[0, 0], ValueError, r"axes \[T, S\] or \[N, T, S\]\. Received: shape \(7,\)\.$"),
    (WEIGHTS[:0], ValueError, r"at least one query, one key and one head.*\(0, 5, 7\)"),
    (WEIGHTS[:, :, :0], ValueError, r"at least one query, one key and one head.*\(3, 5, 0\)"),
    (with_entry(np.nan), ValueError, r"`scores` must be finite.*1 NaN or infinite.*\(1, 2, 3\)"),
    (with_entry(np.inf), ValueError, r"`scores` must be finite.*1 NaN or infinite.*\(1, 2, 3\)"),
    (
        with_entry(-0.5),
        ValueError,
        r"not negative.*smallest value of -0\.5.*jax\.nn\.softmax\(logits",
    ),
    (WEIGHTS.tolist(), TypeError, r"array of numbers.*of type list.*numpy\.asarray\(scores\)"),
    (WEIGHTS.astype(complex), TypeError, r"array of numbers.*dtype complex128"),
    (jax.random.key(0), TypeError, r"array of numbers.*dtype key"),
]


@pytest.mark.parametrize("plot", [plot_attention, plot_bands])
@pytest.mark.parametrize(("scores", "error", "message"), SCORES)
def test_scores(plot, scores, error, message):
    with pytest.raises(error, match=message):
        plot(scores)


LABELS = [
    (["a"] * 4, ValueError, r"`query_labels` must be a sequence of T = 5 strings.*4 labels"),
    ("abcdef", ValueError, r"`query_labels` must be a sequence of T = 5 strings.*6 labels"),
    (b"abcde", TypeError, r"of type bytes.*text\.decode\('latin-1'\)"),
    (jnp.arange(5), TypeError, r"T = 5 strings.*Array.*ids\.tolist\(\)"),
    (set("abcde"), TypeError, r"T = 5 strings.*of type set"),
    (["a", "b", b"c", "d", "e"], TypeError, r"T = 5 strings.*an entry of type bytes"),
    (np.eye(5), TypeError, r"T = 5 strings.*an entry of type ndarray"),
    (5, TypeError, r"T = 5 strings.*of type int"),
]


@pytest.mark.parametrize("plot", [plot_attention, plot_bands, plot_mask])
@pytest.mark.parametrize(("labels", "error", "message"), LABELS)
def test_labels(plot, labels, error, message):
    with pytest.raises(error, match=message):
        plot(WEIGHTS > 1 if plot is plot_mask else WEIGHTS, query_labels=labels)


@pytest.mark.parametrize("plot", [plot_attention, plot_bands, plot_mask])
def test_key_labels_are_counted_by_keys(plot):
    with pytest.raises(ValueError, match=r"`key_labels` must be a sequence of S = 7.*5 labels"):
        plot(WEIGHTS > 1 if plot is plot_mask else WEIGHTS, key_labels="abcde")


@pytest.mark.parametrize("plot", [plot_attention, plot_bands])
def test_head_labels_are_counted_by_heads(plot):
    with pytest.raises(ValueError, match=r"`head_labels` must be a sequence of N = 3.*5 labels"):
        plot(WEIGHTS, head_labels="abcde")


QUERIES = [
    (GRID[0], {"query": (0, 0)}, ValueError, r"\[T1, T2, S1, S2\].*where `query` is.*\(3, 4, 5\)"),
    (GRID[None, None], {"query": (0, 0)}, ValueError, r"\[T1, T2, S1, S2\].*Pass `scores\[0\]`"),
    (GRID, {}, ValueError, r"\[T, S\] or.*over two axes, pass also `query=\(row, column\)`"),
    (GRID, {"query": (2, 0)}, ValueError, r"\(row, column\) within \(T1, T2\) = \(2, 3\).*\(2, 0\)"),
    (GRID, {"query": (0, -1)}, ValueError, r"\(0, -1\).*Count from the top left"),
    (GRID, {"query": 3}, TypeError, r"`query` must be \(row, column\) within.*query=3"),
    (GRID, {"query": (0, 1.0)}, TypeError, r"`query` must be an integer"),
    (GRID, {"query": (0, 0), "image": np.ones((4, 4))}, ValueError, r"\[S1, S2\] = \(4, 5\).*\(4, 4\)"),
    (GRID, {"query": (0, 0), "image": np.ones((4, 5, 3))}, ValueError, r"pass `image\.mean\(-1\)`"),
    (GRID, {"query": (0, 0), "image": np.full((4, 5), np.nan)}, ValueError, r"`image` must be finite"),
    (GRID, {"query": (0, 0), "query_labels": "abc"}, TypeError, r"`query_labels` cannot be drawn where"),
    (GRID, {"query": (0, 0), "key_labels": "abc"}, TypeError, r"`key_labels` cannot be drawn where"),
    (WEIGHTS, {"image": np.ones((4, 5))}, TypeError, r"`image` needs `query=\(row, column\)`"),
]  # fmt: skip


@pytest.mark.parametrize(("scores", "arguments", "error", "message"), QUERIES)
def test_attention_over_two_axes(scores, arguments, error, message):
    with pytest.raises(error, match=message):
        plot_attention(scores, **arguments)


CAUSAL, DENSE = Mask.causal(), np.ones((T, S), bool)
MASKS = [
    (
        (CAUSAL,),
        TypeError,
        r"no lengths of its own.*query_length=None.*plot_mask\(Mask\.causal\(\), 8, 8",
    ),
    ((CAUSAL, 4), TypeError, r"no lengths of its own.*key_length=None"),
    ((CAUSAL, 0, 4), ValueError, r"`query_length` must be a positive integer"),
    ((CAUSAL, 4, 4.0), TypeError, r"`key_length` must be a positive integer"),
    (
        (Mask.padding(key=np.ones((2, 6), bool)), 4, 7),
        ValueError,
        r"`mask\.key_padding` must be \[B, S\]",
    ),
    (
        (Mask.dense(np.ones((S, T), bool)), T, S),
        ValueError,
        r"\[B, N, T, S\].*Did you swap T and S",
    ),
    ((DENSE, 4), ValueError, r"`query_length` must be 5, the length that the array has.*=4"),
    ((DENSE, T, 8), ValueError, r"`key_length` must be 7, the length that the array has.*=8"),
    ((DENSE[0],), ValueError, r"be a Mask, or have the axes \[T, S\].*\(7,\)"),
    (
        (DENSE[None, None, None],),
        ValueError,
        r"be a Mask, or have the axes \[T, S\].*\(1, 1, 1, 5, 7\)",
    ),
    (
        (Mask.function(lambda b, n, t, s: s <= t + b), T, S),
        TypeError,
        r"reads `b`: `examples`.*`examples=1` for the first",
    ),
    ((~Mask.function(lambda b, n, t, s: s <= n), T, S), TypeError, r"reads `n`: `heads` says"),
    ((DENSE[:0],), ValueError, r"`mask` must have at least one query"),
    ((DENSE.astype("float32"),), TypeError, r"`mask` must be boolean.*float32"),
    ((np.full((T, S), 2),), ValueError, r"`mask` must be boolean \(or integer 0/1\)"),
    ((np.ones((5, 13, T, S), bool),), ValueError, r"At most 64 panels.*65.*indexing"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), MASKS)
def test_masks(arguments, error, message):
    with pytest.raises(error, match=message):
        plot_mask(*arguments)


def test_too_many_panels():
    with pytest.raises(ValueError, match=r"At most 64 panels.*each head.*65.*indexing"):
        plot_attention(np.ones((65, 2, 2)))


def test_too_many_colours():
    with pytest.raises(ValueError, match=r"at most 8 heads.*9 heads.*`plot_attention`"):
        plot_bands(np.ones((9, 2, 2)))


@pytest.mark.parametrize(("threshold", "error"), [(1.5, ValueError), ("0.1", TypeError)])
def test_a_threshold_is_a_weight(threshold, error):
    with pytest.raises(error, match=r"`threshold` must be a probability in \[0, 1\]"):
        plot_bands(WEIGHTS, threshold=threshold)


INSIDE_JIT = {
    "attention": lambda x: plot_attention(x),
    "query": lambda x: plot_attention(jnp.broadcast_to(x, (5, 7, 3, 5, 7)), query=(0, 0)),
    "bands": lambda x: plot_bands(x),
    "array": lambda x: plot_mask(x > 0),
    "mask": lambda x: plot_mask(Mask.dense(x > 0), T, S),
}


@pytest.mark.parametrize("draw", INSIDE_JIT.values(), ids=INSIDE_JIT)
def test_inside_jit(draw):
    message = r"needs the numbers of `(scores|mask)`.*inside `jax\.jit`.*tracer.*draw it outside"
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda x: draw(x) and x)(WEIGHTS)


@pytest.mark.parametrize(
    "draw",
    [lambda: plot_attention(WEIGHTS), lambda: plot_bands(WEIGHTS), lambda: plot_mask(DENSE)],
)
def test_matplotlib_missing_is_said(monkeypatch, draw):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"by matplotlib.*pip install 'flax_mha\[plots\]'"):
        draw()
