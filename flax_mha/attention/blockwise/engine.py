"""What computes the softmax and its gradient: blocks of plain JAX here, a kernel elsewhere.

Whatever computes them, the derivatives of every other order are sums over these blocks.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

from flax_mha.attention.blockwise.backward import backward
from flax_mha.attention.blockwise.forward import Softmax, forward
from flax_mha.attention.blockwise.parts import Queries, Rows
from flax_mha.attention.blockwise.signature import Signature
from flax_mha.core.dtypes import wide_dtype
from flax_mha.core.platform import Place
from flax_mha.core.typing import Array

Cotangents = tuple[Array, Array]  # of context and row_sum: the result is the same for any row_max
Gradients = dict[str, Array]  # of the signature's arrays, by their names


class Call(NamedTuple):
    """What is computed, of which arrays, and where the program is lowered for."""

    signature: Signature
    known: list[Array]
    place: Place


class Engine(Protocol):
    """Says what computes a call where it is lowered for, or refuses; static and hashable."""

    def at(self, place: Place) -> "Computation": ...


class Computation(Protocol):
    """What computes a call at its place."""

    def forward(self, call: Call) -> Softmax: ...

    def backward(self, call: Call, softmax: Softmax, cotangents: Cotangents) -> Gradients: ...


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Loops over blocks of queries and keys, on every platform."""

    def at(self, place: Place) -> "Blocks":
        return self

    def forward(self, call: Call) -> Softmax:
        plan, blocks = call.signature.filled(call.known, call.place)
        context, row_max, row_sum = forward(plan, blocks)
        T = plan.tiling.T
        return Softmax(context[:, :T], row_max[..., :T], row_sum[..., :T])

    def backward(self, call: Call, softmax: Softmax, cotangents: Cotangents) -> Gradients:
        plan, blocks = call.signature.filled(call.known, call.place)
        parts = softmax_parts(call.signature)
        fill = lambda part, x: part.fill(plan.tiling, x)  # noqa: E731
        filled = Softmax(*map(fill, parts, softmax))
        d_context, d_row_sum = map(fill, (parts.context_BTNV, parts.row_sum_BNT), cotangents)
        d_query, d_key, d_value, d_terms = backward(plan, blocks, filled, (d_context, d_row_sum))
        named = dict(query=d_query, key=d_key, value=d_value)
        terms = dict(bias=d_terms.bias_bnts, distances=d_terms.values_NL) | d_terms.score
        gradients = named | {name: x for name, x in terms.items() if x is not None}
        parts_of = dict(zip(call.signature.names, call.signature.parts))
        return {name: parts_of[name].trim(x) for name, x in gradients.items()}


def softmax_parts(signature: Signature) -> Any:
    """The kinds of the results: context, row_max and row_sum, in float32 at least."""
    named = dict(zip(signature.names, signature.parts))
    (B, T, N, _), V = named["query"].shape, named["value"].shape[-1]
    wide = wide_dtype(named["query"].dtype)
    context, row = Queries((B, T, N, V), wide), Rows((B, N, T), wide)
    parts: Any = (context, row, row)
    return Softmax(*parts)
