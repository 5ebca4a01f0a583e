"""Whether the arrays of a mask have the sizes of a call."""

from typing import Any

from flax_mha.core import checks
from flax_mha.masks.parts import parts_of

Lengths = tuple[int, int]


def check(mask: Any, B: int, N: int, T: int, S: int, whole: Lengths | None = None) -> None:
    """Refuses those that do not, in unions and complements too.

    `whole` are the lengths of the whole sequence, of which a device has T and S: the keys of dense
    masks, and what blocks and grids are of.
    """
    checks.known_sizes(B=B, N=N, T=T, S=S)
    for part in parts_of(mask):
        _check_own(part, B, N, (T, S), (T, S) if whole is None else whole)


def _check_own(mask: Any, B: int, N: int, here: Lengths, whole: Lengths) -> None:
    (T, S), columns = here, whole[1]
    for name, array, full, letters in (
        ("mask.query_padding", mask.query_padding, (B, T), "[B, T]"),
        ("mask.key_padding", mask.key_padding, (B, S), "[B, S]"),
        *(("mask.segment_ids[0]", q, (B, T), "[B, T]") for q, _ in mask.segment_ids),
        *(("mask.segment_ids[1]", k, (B, S), "[B, S]") for _, k in mask.segment_ids),
    ):
        if array is not None:
            # T and S of 1 would broadcast: one length of padding for all is never meant.
            checks.broadcastable(name, array.shape[:1], full[:1], letters)
            if array.shape[1] != full[1]:
                rule = f"`{name}` must be {letters} = {full}."
                checks.fail(ValueError, rule, f"shape {array.shape}")
    for array in mask.dense_masks:
        swapped = array.shape[-2:] == (columns, T) and columns != T
        remedy = "Did you swap T and S?" if swapped else ""
        checks.broadcastable("mask", array.shape, (B, N, T, columns), "[B, N, T, S]", remedy)
    for length_b in mask.prefix_lengths:
        checks.broadcastable("mask.prefix_lengths", length_b.shape, (B,), "[B]")
    for function in mask.functions:
        _check_grid(function.tokens, T, columns)
        _check_blocks(function.blocks, whole)


def _check_blocks(blocks: Any, lengths: Lengths) -> None:
    if blocks is not None and blocks.lengths != lengths:
        rule = f"`blocks` must be those of T, S = {lengths}."
        evidence = f"a BlockMask of {blocks.lengths}"
        checks.fail(ValueError, rule, evidence, "Make it by `block_mask(f, T, S)`.")


def _check_grid(tokens: int | None, T: int, S: int) -> None:
    """T may be less: a device's queries among all keys, or the first ones."""
    if tokens is not None and (tokens != S or T > S):
        rule = f"A mask of a grid needs T <= S = {tokens}, the tokens of its grid."
        remedy = "For further tokens, join `Neighborhood.function` in a function of your own."
        checks.fail(ValueError, rule, f"T={T}, S={S}", remedy)
