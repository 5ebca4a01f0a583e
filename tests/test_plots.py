"""Attention as pictures: what is drawn, what stands beside it, and what is refused."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import Mask
from flax_mha.plots import plot_attention, plot_bands, plot_mask

N, T, S = 3, 5, 7


def weights(*shape, seed=0):
    logits = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 2
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_one_head_is_one_panel_with_a_labelled_colour_scale():
    scores = weights(T, S)
    figure = plot_attention(scores)
    panel, scale = figure.axes
    np.testing.assert_array_equal(panel.images[0].get_array(), scores)
    assert panel.images[0].get_clim() == (0, scores.max())
    assert scale.get_ylabel() == "attention weight"
    assert (panel.get_ylabel(), panel.get_xlabel()) == ("query", "key")


def test_matplotlib_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (
        lambda: plot_attention(weights(T, S)),
        lambda: plot_mask(Mask.causal(), 4, 4),
        lambda: plot_bands(weights(T, S)),
    ):
        with pytest.raises(ImportError, match=r"drawn by matplotlib.*pip install 'flax_mha\[plots"):
            call()


def test_a_batch_axis_is_refused():
    with pytest.raises(ValueError, match=r"axes \[T, S\] or \[N, T, S\].*Pass `scores\[0\]`"):
        plot_attention(jnp.asarray(weights(2, N, T, S)))


def test_inside_jit_is_refused():
    with pytest.raises(TypeError, match=r"numbers of `scores`.*inside `jax.jit`.*draw it outside"):
        jax.jit(lambda x: plot_attention(x) and x)(weights(T, S))
