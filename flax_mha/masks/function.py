"""A mask's function of pairs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from flax_mha.core import checks
from flax_mha.core.pairs.function import PairFunction, mask_function
from flax_mha.masks.blocks import BlockMask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MaskFunction:
    """A function of pairs, and the blocks in which it allows any, where they are known.

    One of a grid says how many `tokens` that has: a call must have as many.
    """

    pair: PairFunction
    blocks: BlockMask | None = None
    tokens: int | None = dataclasses.field(default=None, metadata={"static": True})


def function_of(f: Any, blocks: BlockMask | None = None) -> MaskFunction:
    """The function traced, with its blocks where they were found before."""
    if blocks is not None and not isinstance(blocks, BlockMask):
        rule = "`blocks` must be a BlockMask: `block_mask(f, T, S)`."
        checks.fail(TypeError, rule, f"blocks of type {type(blocks).__name__}")
    return MaskFunction(mask_function(f), blocks)
