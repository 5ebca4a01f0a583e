"""Attention of one call and its gradients as dense float64 NumPy, the formulas written out by hand.

Nothing here is shared with the package, nor with the loops of `oracles`, which are slower and can
be verified by eye: `tests/trust/test_random_calls.py` compares the two, and the gradients with
central differences.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Scored(NamedTuple):
    """What a score function makes of all logits, its slope, and how its floats' gradient sums."""

    value_BNTS: Array
    slope_BNTS: Array | float
    d_floats: Callable[[Array], Array]


def unscored(logits_BNTS: Array) -> Scored:
    """Logits as they are."""
    return Scored(logits_BNTS, 1.0, lambda d_BNTS: np.zeros(0))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call: arrays in float64, masks and biases at full size, `keep` False = dropped.

    `rounded` is what a machine makes of a logit with its bias; None leaves it exact.
    """

    query_BTNH: Array
    key_BSKH: Array
    value_BSKV: Array
    allowed_BNTS: Array
    bias_BNTS: Array
    keep_BNTS: Array
    scale: float
    rate: float = 0.0
    soft_cap: float | None = None
    sinks_N: Array | None = None
    score: Callable[[Array], Scored] = unscored
    rounded: Callable[[Array], Array] | None = None

    @property
    def group(self) -> int:
        return self.query_BTNH.shape[2] // self.key_BSKH.shape[2]

    def of_query_heads(self, x_BSKF: Array) -> Array:
        """Query head n reads key head n // G."""
        return np.repeat(x_BSKF, self.group, axis=2)

    def of_key_heads(self, x_BSNF: Array) -> Array:
        """The transpose: the sum over the G query heads of a key head."""
        B, S, N, F = x_BSNF.shape
        return x_BSNF.reshape(B, S, N // self.group, self.group, F).sum(3)

    def dropped(self, x_BNTS: Array) -> Array:
        return np.where(self.keep_BNTS, x_BNTS / (1 - self.rate if self.rate < 1 else np.inf), 0)


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of a call, and what its gradients need."""

    context_BTNV: Array
    weights_BNTS: Array
    row_max_BNT: Array
    row_sum_BNT: Array
    exp_BNTS: Array
    sink_exp_BNT: Array
    cap_slope: Any
    scored: Scored


def attention(problem: Problem) -> Result:
    """softmax(score(cap(scale query . key) + bias), over allowed keys and the sink) . value."""
    key_BSNH = problem.of_query_heads(problem.key_BSKH)
    logits_BNTS = problem.scale * np.einsum("btnh,bsnh->bnts", problem.query_BTNH, key_BSNH)
    cap_slope: Any = 1.0
    if problem.soft_cap is not None:
        bent_BNTS = np.tanh(logits_BNTS / problem.soft_cap)
        logits_BNTS, cap_slope = problem.soft_cap * bent_BNTS, 1 - bent_BNTS**2
    logits_BNTS = logits_BNTS + problem.bias_BNTS
    if problem.rounded is not None:
        logits_BNTS = problem.rounded(logits_BNTS)
    scored = problem.score(logits_BNTS)
    logits_BNTS = np.where(problem.allowed_BNTS, scored.value_BNTS, -np.inf)
    sinks_N = np.full(logits_BNTS.shape[1], -np.inf) if problem.sinks_N is None else problem.sinks_N
    row_max_BNT = np.maximum(logits_BNTS.max(-1, initial=-np.inf), sinks_N[:, None])
    shift_BNT = np.where(np.isneginf(row_max_BNT), 0, row_max_BNT)
    exp_BNTS = np.exp(logits_BNTS - shift_BNT[..., None])
    sink_exp_BNT = np.exp(sinks_N[:, None] - shift_BNT)
    row_sum_BNT = exp_BNTS.sum(-1) + sink_exp_BNT
    weights_BNTS = exp_BNTS / np.where(row_sum_BNT == 0, 1, row_sum_BNT)[..., None]
    value_BSNV = problem.of_query_heads(problem.value_BSKV)
    context_BTNV = np.einsum("bnts,bsnv->btnv", problem.dropped(weights_BNTS), value_BSNV)
    rows = (row_max_BNT, row_sum_BNT, exp_BNTS, sink_exp_BNT)
    return Result(context_BTNV, weights_BNTS, *rows, cap_slope, scored)


def gradients(
    problem: Problem,
    result: Result,
    d_context_BTNV: Array,
    d_weights_BNTS: Array | float = 0.0,
    d_row_sum_BNT: Array | float = 0.0,
) -> dict[str, Array]:
    """Of `query`, `key`, `value`, `bias` (at full size), `sinks` and the score's `floats`.

    The result is the same for every row_max, so that nothing passes through it.
    """
    value_BSNV = problem.of_query_heads(problem.value_BSKV)
    d_kept_BNTS = np.einsum("btnv,bsnv->bnts", d_context_BTNV, value_BSNV)
    d_weights_BNTS = problem.dropped(d_kept_BNTS) + d_weights_BNTS
    delta_BNT = (result.weights_BNTS * d_weights_BNTS).sum(-1)
    d_row_sum_BNT = np.broadcast_to(d_row_sum_BNT, delta_BNT.shape)
    d_scored_BNTS = result.weights_BNTS * (d_weights_BNTS - delta_BNT[..., None])
    d_scored_BNTS = d_scored_BNTS + result.exp_BNTS * d_row_sum_BNT[..., None]
    share_BNT = result.sink_exp_BNT / np.where(result.row_sum_BNT == 0, 1, result.row_sum_BNT)
    d_sinks_BNT = result.sink_exp_BNT * d_row_sum_BNT - share_BNT * delta_BNT
    d_bias_BNTS = d_scored_BNTS * result.scored.slope_BNTS
    d_product_BNTS = d_bias_BNTS * result.cap_slope * problem.scale
    kept_BNTS = problem.dropped(result.weights_BNTS)
    of_key_heads = problem.of_key_heads
    key_BSNH = problem.of_query_heads(problem.key_BSKH)
    return {
        "query": np.einsum("bnts,bsnh->btnh", d_product_BNTS, key_BSNH),
        "key": of_key_heads(np.einsum("bnts,btnh->bsnh", d_product_BNTS, problem.query_BTNH)),
        "value": of_key_heads(np.einsum("bnts,btnv->bsnv", kept_BNTS, d_context_BTNV)),
        "bias": d_bias_BNTS,
        "sinks": d_sinks_BNT.sum((0, 2)),
        "floats": result.scored.d_floats(d_scored_BNTS),
    }


def summed_to(shape: tuple[int, ...], x: Array) -> Array:
    """The transpose of a broadcast from `shape`: sums over the axes that it repeated."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    repeated = tuple(axis for axis, size in enumerate(shape) if size == 1 != x.shape[axis])
    return x.sum(repeated, keepdims=True)
