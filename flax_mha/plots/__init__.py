"""Attention as pictures: weights, masks, and bands between tokens."""

from flax_mha.plots.maps import plot_attention as plot_attention
from flax_mha.plots.maps import plot_bands as plot_bands
from flax_mha.plots.maps import plot_mask as plot_mask
