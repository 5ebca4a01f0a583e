"""Lengths that the devices do not divide: filled up with positions that padding removes."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from flax_mha.attention.context.axis import ContextAxis
from flax_mha.attention.context.over_pairs import over_operands
from flax_mha.attention.contract import Inputs, Output, Residuals
from flax_mha.core import checks
from flax_mha.core.sizes import is_known
from flax_mha.core.typing import Array
from flax_mha.masks import Mask


def filled(inputs: Inputs, axis: ContextAxis, n: int) -> Inputs:
    """The call with T and S filled up to multiples of the n devices.

    Not in zigzag order: what stands in the middle of the sequence would be cut elsewhere.
    """
    (_, T, _, _), S = inputs.query_BTNH.shape, inputs.key_BSKH.shape[1]
    if not is_known(T, S):
        rule = "Along a context axis lengths must be numbers."
        checks.fail(ValueError, rule, f"T = {T}, S = {S}, symbols", "Export one length at a time.")
    if axis.layout == "zigzag" and (T % (2 * n) or S % (2 * n)):
        rule = f"In zigzag order lengths must be multiples of 2 n = {2 * n}, and cannot be filled."
        remedy = "Pad the tokens before `zigzag_order`, with a mask for them."
        checks.fail(ValueError, rule, f"T = {T}, S = {S}, n = {n}", remedy)
    t, s = -T % n, -S % n
    if t == s == 0:
        return inputs
    keys = lambda x: _behind(x, 1, s)  # noqa: E731
    return dataclasses.replace(
        over_operands(inputs, lambda x: _scores(x, t, s, mode="edge")),
        query_BTNH=_behind(inputs.query_BTNH, 1, t),
        key_BSKH=keys(inputs.key_BSKH),
        value_BSKV=keys(inputs.value_BSKV),
        mask=_mask(inputs.mask, S, t, s),
        bias_bnts=_scores(inputs.bias_bnts, t, s),
    )


def trimmed(output: Output, T: int, S: int) -> Output:
    """The output of the positions that were there before."""
    context, weights, residuals = output
    return Output(
        context[:, :T],
        None if weights is None else weights[:, :, :T, :S],
        None if residuals is None else Residuals(*(x[:, :, :T] for x in residuals)),
    )


def _mask(mask: Mask, S: int, t: int, s: int) -> Mask:
    real_bS = mask.key_padding
    if real_bS is None and s:
        real_bS = jnp.ones((1, S), bool)
    return dataclasses.replace(
        mask,
        query_padding=_behind(mask.query_padding, 1, t),
        key_padding=_behind(real_bS, 1, s),
        segment_ids=tuple((_behind(q, 1, t), _behind(k, 1, s)) for q, k in mask.segment_ids),
        dense_masks=tuple(_scores(x, t, s) for x in mask.dense_masks),
    )


def _scores(x: Array | None, t: int, s: int, mode: str = "constant") -> Any:
    """Rows and columns, where there is more than one for all.

    Behind the end of an operand stands what stands at its end: of zeros a score may make NaN.
    """
    if x is None:
        return None
    rows = _behind(x, 2, t if x.shape[2] > 1 else 0, mode)
    return _behind(rows, 3, s if x.shape[3] > 1 else 0, mode)


def _behind(x: Array | None, axis: int, more: int, mode: str = "constant") -> Any:
    if x is None or more == 0:
        return x
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], mode=mode)
