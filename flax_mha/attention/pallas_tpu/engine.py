"""The kernels as an engine: the softmax and its gradient, where they are lowered for a TPU."""

import dataclasses

import jax
import jax.numpy as jnp

from flax_mha.attention.blockwise.engine import Cotangents, Gradients
from flax_mha.attention.blockwise.forward import Softmax
from flax_mha.attention.blockwise.signature import Signature
from flax_mha.attention.pallas_tpu.backward import backward
from flax_mha.attention.pallas_tpu.bias_sums import bias_sums, distance_sums
from flax_mha.attention.pallas_tpu.examples import joins_examples
from flax_mha.attention.pallas_tpu.forward import forward
from flax_mha.attention.pallas_tpu.prepare import Prepared, prepare, skewed, with_spans
from flax_mha.attention.pallas_tpu.spans import key_spans, query_spans
from flax_mha.core import checks
from flax_mha.core.platform import Place
from flax_mha.core.typing import Array


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Runs the kernels; interpreted, on any platform."""

    interpret: bool = False

    def at(self, place: Place) -> "Kernels":
        self._check(place)
        return self

    def forward(self, signature: Signature, known: list[Array], place: Place) -> Softmax:
        call = prepare(signature, known, self.interpret)
        spans = key_spans(call.tiles)
        context, row_max, row_sum = joins_examples(forward)(*with_spans(call, spans))
        return Softmax(call.back_rows(context), call.back_row(row_max), call.back_row(row_sum))

    def backward(
        self,
        signature: Signature,
        known: list[Array],
        softmax: Softmax,
        cotangents: Cotangents,
        place: Place,
    ) -> Gradients:
        call = prepare(signature, known, self.interpret)
        operands = _of_rows(call, softmax, cotangents)
        spans = query_spans(call.tiles)
        d_query, d_key, d_value = joins_examples(backward)(*with_spans(call, spans, **operands))
        scale = signature.options.scale
        gradients = {
            "query": call.back_rows(d_query) * scale,
            "key": call.back_keys(d_key),
            "value": call.back_keys(d_value),
        }
        if "bias" in signature.names or "distances" in signature.names:
            gradients |= _of_biases(call, operands, signature, known)
        return gradients

    def _check(self, place: Place) -> None:
        if self.interpret or place == Place.anywhere():
            return
        if place.platform != "tpu":
            rule = "implementation='pallas_tpu' is a kernel for TPU."
            remedy = "Leave `implementation` None, which runs blockwise here, or name it."
            checks.fail(NotImplementedError, rule, f"a program for {place.platform}", remedy)
        if place.devices > 1:
            rule = "XLA cannot cut implementation='pallas_tpu' over devices by itself."
            remedy = (
                "Call it inside `jax.shard_map`, or place the arrays on a mesh of `jax.make_mesh`."
            )
            checks.fail(NotImplementedError, rule, f"a program of {place.devices} devices", remedy)


def _of_rows(call: Prepared, softmax: Softmax, cotangents: Cotangents) -> dict[str, Array]:
    """What the backward kernels need of each query.

    Divided by row_sum already, and scaled as what dropout keeps. Not one lse = row_max +
    log(row_sum): beside a row_max of 1e8 that is row_max.
    """
    (context, row_max, row_sum), (d_context, d_row_sum) = softmax, cotangents
    nowhere = row_sum == 0
    row_max = jnp.where(nowhere, jnp.inf, row_max)  # e^(logits - inf) is 0
    share = 1 / jnp.where(nowhere, 1, row_sum)
    rate = call.plan.rate
    kept = 1 / (1 - rate) if rate < 1 else 0.0
    d_context = d_context * share.swapaxes(1, 2)[..., None] * kept
    d_context = d_context.astype(call.operands["value"].dtype)
    # Of the rounded d_context, as the products are: so a row of d_logits still sums to 0.
    delta = (d_context.astype(context.dtype) * context).sum(-1).swapaxes(1, 2) * (1 - rate)
    delta -= d_row_sum * row_sum * share
    return {
        "d_context": call.rows(d_context),
        "row_max": call.row(row_max, jnp.inf),
        "delta": call.row(delta),
    }


def _of_biases(
    call: Prepared, operands: dict[str, Array], signature: Signature, known: list[Array]
) -> Gradients:
    plan, arrays = with_spans(call, key_spans(call.tiles), **operands)
    blocks, gradients = signature.blocks(known), {}
    if blocks.bias_bnts is not None:
        sums = joins_examples(bias_sums, summed=("bias",))(plan, arrays)
        gradients["bias"] = call.back_scores(sums, blocks.bias_bnts.shape)
    if blocks.distance_bias is not None:
        bias = blocks.distance_bias
        of_values = lambda x: skewed(  # noqa: E731
            call.plan, dataclasses.replace(bias, values=x), call.first
        )
        sums = joins_examples(distance_sums, summed=("distances",))(plan, arrays)
        (gradients["distances"],) = jax.vjp(of_values, bias.values)[1](sums)
    return gradients
