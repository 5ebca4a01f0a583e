"""Norms of the projected heads: of queries and keys (`qk_norm`), of values (`value_norm`)."""

from flax_mha.norms.l2 import L2Norm as L2Norm
from flax_mha.norms.norm import Norm as Norm
from flax_mha.norms.registry import register as register
from flax_mha.norms.scaled import LayerNorm as LayerNorm
from flax_mha.norms.scaled import RMSNorm as RMSNorm
