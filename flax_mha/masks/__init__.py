"""Masks that keep their structure: who may attend to whom, without a `[T, S]` array."""

from flax_mha.masks.blocks import BlockMask as BlockMask
from flax_mha.masks.blocks import block_mask as block_mask
from flax_mha.masks.mask import Mask as Mask
from flax_mha.masks.neighborhood import Neighborhood as Neighborhood
