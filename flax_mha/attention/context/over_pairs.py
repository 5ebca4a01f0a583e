"""The arrays of a call that stand over pairs of a query and a key, `[b, n, t, s]`.

Biases, dense masks, and the operands of functions of pairs; any axis may have size 1. What a
strategy takes of one of them it takes of all. An operand holds what the function asks of the whole
sequence, positions too, so a part of it says the same wherever it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax_mha.attention.allowed import Allowed
from flax_mha.attention.contract import Inputs
from flax_mha.core.pairs.separated import Separated
from flax_mha.core.typing import Array

Of = Callable[[Array], Array]


def over_pairs(inputs: Inputs, of: Of) -> Inputs:
    """The call with `of(x)` for each of these arrays; see `over_operands`."""
    bias = inputs.bias_bnts
    mask = dataclasses.replace(inputs.mask, dense_masks=tuple(map(of, inputs.mask.dense_masks)))
    inputs = dataclasses.replace(inputs, mask=mask, bias_bnts=None if bias is None else of(bias))
    return over_operands(inputs, of)


def over_operands(inputs: Inputs, of: Of) -> Inputs:
    """The call with `of(x)` for each operand of a function; tables are looked up as a whole.

    Blocks that were found for other pairs are left away: they are found anew.
    """

    def part(function: Separated) -> Separated:
        return dataclasses.replace(function, operands=tuple(map(of, function.operands)))

    where = tuple(Allowed(part(one.pairs)) for one in inputs.where)
    score: Any = None if inputs.score is None else part(inputs.score)
    return dataclasses.replace(inputs, where=where, score=score)
