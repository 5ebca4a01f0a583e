"""Attention as pictures: weights, masks, and bands between tokens.

Every function returns a `matplotlib.figure.Figure` that is not registered with pyplot: as the value
of a notebook's cell it is shown, and `figure.savefig("name.png")` writes it. matplotlib is
optional: `pip install 'flax_mha[plots]'`. Guide: `python -m flax_mha guide pictures`.
"""

from flax_mha.plots.bands import plot_bands as plot_bands
from flax_mha.plots.maps import plot_attention as plot_attention
from flax_mha.plots.masks import plot_mask as plot_mask
