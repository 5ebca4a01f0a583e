"""One sequence over many devices: the axis, the strategies, the order of the tokens."""

from flax_mha.attention.context.axis import ContextAxis as ContextAxis
from flax_mha.attention.context.layout import zigzag_inverse as zigzag_inverse
from flax_mha.attention.context.layout import zigzag_order as zigzag_order
