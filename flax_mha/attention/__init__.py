"""Attention of arrays: one contract, one file an implementation, an open choice among them.

Knows no parameters, no config, no flax.
"""

from flax_mha.attention._contract import Residuals as Residuals
from flax_mha.attention._dispatch import IMPLEMENTATIONS as IMPLEMENTATIONS
from flax_mha.attention._dispatch import dot_product_attention as dot_product_attention
from flax_mha.attention._dispatch import explain as explain
from flax_mha.attention._distance import DistanceBias as DistanceBias
from flax_mha.attention._merge import merge as merge
