"""Attention of arrays: one contract, one file an implementation, an open choice among them.

Knows no parameters, no config, no flax.
"""

from flax_mha.attention.context import ContextAxis as ContextAxis
from flax_mha.attention.context import zigzag_inverse as zigzag_inverse
from flax_mha.attention.context import zigzag_order as zigzag_order
from flax_mha.attention.context_parallel import (
    context_parallel_attention as context_parallel_attention,
)
from flax_mha.attention.contract import Residuals as Residuals
from flax_mha.attention.dispatch import dot_product_attention as dot_product_attention
from flax_mha.attention.distance import DistanceBias as DistanceBias
from flax_mha.attention.explanation import explain as explain
from flax_mha.attention.implementations import IMPLEMENTATIONS as IMPLEMENTATIONS
from flax_mha.attention.merge import merge as merge
