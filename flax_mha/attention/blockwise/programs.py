"""The programs of attention over tiles: the softmax, its tangent, the transpose of that.

    weights = e^(logits - row_max) / row_sum            d_logits: of query, key and biases
    row = sum_s weights d_logits                         d_row_sum = row_sum row
    d_context = sum_s drop(weights d_logits) value + drop(weights) d_value - context row

A key that has all of its row moves row_sum alone: its terms of d_context are left out, for they
cancel but for their rounding, which is large where logits are.

`Tangent` is the linear map (d_query, d_key, ...) -> (d_context, d_row_sum), and `Gradient`, its
transpose, is the backward pass of FlashAttention, written out in `backward`. The result is the same
for every row_max: it has no derivative.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha.attention.blockwise.call import (
    TileTerms,
    product,
    scaled,
    tile_dropper,
    tile_logits,
)
from flax_mha.attention.blockwise.engine import Call, Engine, softmax_parts
from flax_mha.attention.blockwise.forward import Softmax, alone_of
from flax_mha.attention.blockwise.parts import Here
from flax_mha.attention.blockwise.signature import Signature
from flax_mha.attention.blockwise.tile_sum import TileSum
from flax_mha.core.platform import Place
from flax_mha.core.program import Program
from flax_mha.core.typing import Array


@dataclasses.dataclass(frozen=True)
class Forward(Program):
    """(arrays of the signature) -> (context, row_max, row_sum)."""

    engine: Engine
    signature: Signature

    @property
    def count(self) -> int:
        return len(Softmax._fields)

    def run(self, known: list[Array], linear: list[Array], place: Place) -> list[Array]:
        return list(self.engine.at(place).forward(Call(self.signature, known, place)))


@dataclasses.dataclass(frozen=True)
class Tangent(TileSum):
    """(arrays of the signature, the softmax; d_query, d_key, ...) -> (d_context, d_row_sum)."""

    function: "_TileTangent"
    engine: Engine

    @classmethod
    def of(
        cls, engine: Engine, signature: Signature, moving: tuple[str, ...], *, all_keys: bool = True
    ) -> "Tangent":
        """`all_keys` = the softmax that is known is that of the call's keys, and of no others."""
        named = dict(zip(signature.names, signature.parts))
        softmax = softmax_parts(signature)
        return cls(
            signature,
            _TileTangent(signature.names, moving, named["query"].dtype),
            (*signature.parts, *softmax),
            tuple(named[name] for name in moving),
            (softmax.context_BTNV, softmax.row_sum_BNT),
            engine if all_keys else None,
            engine,
        )

    def transpose(self) -> "Gradient":
        return Gradient(self)


@dataclasses.dataclass(frozen=True)
class Gradient(Program):
    """(known of the tangent; cotangents of context and row_sum) -> cotangents of what moves."""

    of: Tangent

    @property
    def count(self) -> int:
        return len(self.of.linear)

    def run(self, known: list[Array], linear: list[Array], place: Place) -> list[Array]:
        split = len(known) - len(Softmax._fields)
        arrays, softmax, (d_context, d_row_sum) = known[:split], Softmax(*known[split:]), linear
        call = Call(self.of.signature, arrays, place)
        gradients = self.of.engine.at(place).backward(call, softmax, (d_context, d_row_sum))
        moving = zip(self.of.function.moving, self.of.linear)
        return [gradients[name].astype(part.dtype) for name, part in moving]

    def transpose(self) -> Tangent:
        return self.of

    def tangent(self, chosen: tuple[int, ...]) -> TileSum:
        return TileSum.transpose(self.of).tangent(chosen)


@dataclasses.dataclass(frozen=True)
class _TileTangent:
    """What one tile adds to (d_context, d_row_sum)."""

    names: tuple[str, ...]
    moving: tuple[str, ...]
    dtype: Any

    def __call__(self, here: Here, known: list[Array], linear: list[Array]) -> list[Array]:
        *arrays, context_bkrv, row_max_bkr, row_sum_bkr = known
        named, moved = dict(zip(self.names, arrays)), dict(zip(self.moving, linear))
        logits = {name: x for name, x in named.items() if name != "value"}
        d_named = {name: moved.get(name, jnp.zeros_like(x)) for name, x in logits.items()}
        of_parts = lambda parts: self._logits(here, parts)  # noqa: E731
        logits_bkrs, d_logits_bkrs = jax.jvp(of_parts, (logits,), (d_named,))

        # Where nothing may be attended e^(logits - inf) is 0, for any logits.
        nowhere = row_sum_bkr == 0
        row_max_bkr = jnp.where(nowhere, jnp.inf, row_max_bkr)
        share_bkr = 1 / jnp.where(nowhere, 1, row_sum_bkr)
        weights_bkrs = jnp.exp(logits_bkrs - row_max_bkr[..., None]) * share_bkr[..., None]
        moved_bkrs = weights_bkrs * d_logits_bkrs
        is_alone_bkrs = weights_bkrs >= alone_of(row_sum_bkr)[..., None]
        sharing_bkrs = jnp.where(is_alone_bkrs, 0, moved_bkrs)
        row_bkr = sharing_bkrs.sum(-1)

        drop = tile_dropper(here.plan, here.blocks, here.tile)
        multiply = lambda a, b: product(here.plan, "bkrs,bksv->bkrv", a, b)  # noqa: E731
        d_context_bkrv = multiply(drop(sharing_bkrs), named["value"])
        if "value" in moved:
            d_context_bkrv += multiply(drop(weights_bkrs), moved["value"])
        d_row_sum_bkr = moved_bkrs.sum(-1) * row_sum_bkr
        return [d_context_bkrv - context_bkrv * row_bkr[..., None], d_row_sum_bkr]

    def _logits(self, here: Here, parts: dict[str, Array]) -> Array:
        """Those of the forward pass, which rounded query and key to the compute dtype."""
        query_bkrh, key_bksh = (parts[name].astype(self.dtype) for name in ("query", "key"))
        score = {name: x for name, x in parts.items() if name.startswith(("operand", "table"))}
        terms = TileTerms(parts.get("bias"), parts.get("distances"), score)
        query_bkrh = scaled(here.plan, query_bkrh)
        arguments = (query_bkrh, key_bksh, terms, here.tile, here.masked)
        return tile_logits(here.plan, here.blocks, *arguments).logits_rs
