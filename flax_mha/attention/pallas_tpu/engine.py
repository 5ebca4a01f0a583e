"""The kernels as an engine: the softmax and its gradient, where they are lowered for a TPU."""

import dataclasses

import jax
import jax.numpy as jnp

from flax_mha.attention.blockwise.engine import Call, Cotangents, Gradients
from flax_mha.attention.blockwise.forward import Softmax
from flax_mha.attention.pallas_tpu.backward import backward
from flax_mha.attention.pallas_tpu.bias_sums import bias_sums, distance_sums, operand_sums
from flax_mha.attention.pallas_tpu.examples import joins_examples
from flax_mha.attention.pallas_tpu.forward import forward
from flax_mha.attention.pallas_tpu.plan import Plan
from flax_mha.attention.pallas_tpu.prepare import Prepared, prepare, skewed, with_spans
from flax_mha.attention.pallas_tpu.spans import key_spans, query_spans
from flax_mha.core import checks
from flax_mha.core.pairs.separated import Separated
from flax_mha.core.platform import Place
from flax_mha.core.typing import Array


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Runs the kernels; interpreted, on any platform."""

    interpret: bool = False

    def at(self, place: Place) -> "Kernels":
        self._check(place)
        return self

    def forward(self, call: Call) -> Softmax:
        made = prepare(call.signature, call.known, self.interpret)
        spans = key_spans(made.tiles)
        context, row_max, row_sum = joins_examples(forward)(*with_spans(made, spans))
        return Softmax(made.back_rows(context), made.back_row(row_max), made.back_row(row_sum))

    def backward(self, call: Call, softmax: Softmax, cotangents: Cotangents) -> Gradients:
        made = prepare(call.signature, call.known, self.interpret)
        operands = _of_rows(made, softmax, cotangents)
        spans = query_spans(made.tiles)
        d_query, d_key, d_value = joins_examples(backward)(*with_spans(made, spans, **operands))
        gradients = {
            "query": made.back_rows(d_query) * call.signature.options.scale,
            "key": made.back_keys(d_key),
            "value": made.back_keys(d_value),
        }
        return gradients | _of_biases(made, operands, call)

    def _check(self, place: Place) -> None:
        if self.interpret or place == Place.anywhere():
            return
        if place.platform != "tpu":
            rule = "implementation='pallas_tpu' is a kernel for TPU."
            remedy = "Leave `implementation` None, which runs blockwise here, or name it."
            checks.fail(NotImplementedError, rule, f"a program for {place.platform}", remedy)
        if not place.takes_kernels:
            rule = "XLA cannot cut implementation='pallas_tpu' over devices by itself."
            remedy = (
                "Call it inside a `jax.shard_map` over all axes, those of one device too, or place "
                "the arrays on a mesh of `jax.make_mesh`."
            )
            evidence = f"a program of {place.devices} devices, with axes that are left to XLA"
            checks.fail(NotImplementedError, rule, evidence, remedy)


def _of_rows(made: Prepared, softmax: Softmax, cotangents: Cotangents) -> dict[str, Array]:
    """What the backward kernels need of each query.

    Divided by row_sum already, and scaled as what dropout keeps. Not one lse = row_max +
    log(row_sum): beside a row_max of 1e8 that is row_max.
    """
    (context, row_max, row_sum), (d_context, d_row_sum) = softmax, cotangents
    nowhere = row_sum == 0
    row_max = jnp.where(nowhere, jnp.inf, row_max)  # e^(logits - inf) is 0
    share = 1 / jnp.where(nowhere, 1, row_sum)
    rate = made.plan.rate
    kept = 1 / (1 - rate) if rate < 1 else 0.0
    d_context = d_context * share.swapaxes(1, 2)[..., None] * kept
    d_context = d_context.astype(made.operands["value"].dtype)
    # Of the rounded d_context, as the products are: so a row of d_logits still sums to 0.
    delta = (d_context.astype(context.dtype) * context).sum(-1).swapaxes(1, 2) * (1 - rate)
    delta -= d_row_sum * row_sum * share
    operands = {
        "d_context": made.rows(d_context),
        "row_max": made.row(row_max, jnp.inf),
        "delta": made.row(delta),
    }
    if d_context.dtype == context.dtype:  # in 16 bits the rounding stays, as in the blocks
        operands["d_alone"] = made.row(jnp.where(row_sum == 1, d_row_sum, jnp.nan), jnp.nan)
    return operands


def _of_biases(made: Prepared, operands: dict[str, Array], call: Call) -> Gradients:
    plan, arrays = with_spans(made, key_spans(made.tiles), **operands)
    blocks, gradients = call.signature.blocks(call.known), {}
    if blocks.bias_bnts is not None:
        sums = joins_examples(bias_sums, summed=("bias",))(plan, arrays)
        gradients["bias"] = made.back_scores(sums, blocks.bias_bnts.shape)
    if blocks.distance_bias is not None:
        bias = blocks.distance_bias
        of_values = lambda x: skewed(  # noqa: E731
            made.plan, dataclasses.replace(bias, values=x), made.first
        )
        sums = joins_examples(distance_sums, summed=("distances",))(plan, arrays)
        (gradients["distances"],) = jax.vjp(of_values, bias.values)[1](sums)
    score = call.signature.blocks(call.known).score if plan.score is not None else None
    return gradients if score is None else gradients | _of_score(made, plan, arrays, score)


def _of_score(made: Prepared, plan: Plan, arrays: dict[str, Array], score: Separated) -> Gradients:
    """Of the floats that a score function closes over, what became operands of them."""
    assert plan.score is not None
    kinds = [f"operand{i}" for i in range(len(score.operands))]
    kinds += [f"table{i}" for i in range(len(score.tables))]
    named, gradients = dict(zip(kinds, plan.score.inputs)), {}
    for name, x in score.moving.items():
        operand = named[name]
        run = joins_examples(operand_sums(operand), summed=(operand,))
        gradients[name] = made.back_operand(run(plan, arrays), x.shape)
    return gradients
