"""What every contender must compute: the layer from its equation, one head after another.

It shares no code with the layer under test, and holds one `[T, S]` matrix at a time. Attention of
arrays, in `accelerator`, is the same equation of blocks of queries.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.bench.cases import Case
from flax_mha.bench.data import Data
from flax_mha.bench.masks import allowed
from flax_mha.core.typing import Array, ParamsLike, PRNGKey

_einsum = functools.partial(jnp.einsum, precision="highest")


class Expected(NamedTuple):
    """The numbers that a case has: gradients are those of the output's sum of squares.

    `noise` is how far dropout moves the output, as a root mean square.
    """

    output_BTE: np.ndarray
    params_gradient: Any = None
    x_gradient_BTD: np.ndarray | None = None
    noise: float = 0.0


def expect(case: Case, data: Data) -> Expected:
    """Runs the textbook on a case's data."""

    def loss(params: ParamsLike, x_BTD: Array) -> tuple[Array, Array]:
        output_BTE = textbook(params, x_BTD, case)
        return jnp.square(output_BTE).sum(), output_BTE

    arguments = (data.params, data.x_BTD)
    if not case.gradient:
        expected = Expected(jax.device_get(jax.jit(loss)(*arguments)[1]))
    else:
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (params_gradient, x_gradient), output = jax.device_get(gradient(*arguments))
        expected = Expected(output, params_gradient, x_gradient)
    return expected._replace(noise=_noise(case, data, expected)) if case.dropout else expected


def _noise(case: Case, data: Data, expected: Expected) -> float:
    noisy = jax.jit(functools.partial(textbook, case=case))
    output = jax.device_get(noisy(data.params, data.x_BTD, dropout_key=data.dropout_key))
    return float(np.sqrt(np.square(output - expected.output_BTE).mean()))


def textbook(
    params: ParamsLike, x_BTD: Array, case: Case, dropout_key: PRNGKey | None = None
) -> Array:
    """softmax(q k / sqrt(H)) v over the allowed keys, between the projections."""
    heads = case.batch * case.heads

    def project(name: str) -> Array:
        y_BNTH = _einsum("BTD,DNH->BNTH", x_BTD, params[name]["kernel"])
        y_BNTH += params[name]["bias"][None, :, None, :]
        return y_BNTH.reshape(heads, case.length, case.head_size)

    keys = None if dropout_key is None else jax.random.split(dropout_key, heads)
    inputs = (project("query"), project("key"), project("value"), keys)
    contexts = jax.lax.map(jax.checkpoint(functools.partial(_head, case)), inputs)
    context_BNTH = contexts.reshape(case.batch, case.heads, case.length, case.head_size)
    output = params["attention_output"]
    output_BTE = _einsum("BNTH,NHE->BTE", context_BNTH, output["kernel"])
    return output_BTE + output["bias"][None, None, :]


def _head(case: Case, inputs: tuple[Array, Array, Array, PRNGKey | None]) -> Array:
    query_TH, key_SH, value_SH, dropout_key = inputs
    logits_TS = logits_of(query_TH, key_SH)
    return context_of(logits_TS, value_SH, allowed(case), case.dropout, dropout_key)


def logits_of(query_TH: Array, key_SH: Array) -> Array:
    """q k / sqrt(H), of one head."""
    return _einsum("TH,SH->TS", query_TH, key_SH) / math.sqrt(query_TH.shape[-1])


def context_of(
    logits_TS: Array,
    value_SH: Array,
    allowed_TS: Array | None,
    dropout: float,
    dropout_key: PRNGKey | None,
) -> Array:
    """softmax(logits) v over the allowed keys, of one head; the weights drop if there is a key."""
    if allowed_TS is not None:
        logits_TS = jnp.where(allowed_TS, logits_TS, -jnp.inf)
    weights_TS = jax.nn.softmax(logits_TS)
    if dropout_key is not None:
        kept_TS = jax.random.bernoulli(dropout_key, 1 - dropout, weights_TS.shape)
        weights_TS = jnp.where(kept_TS, weights_TS / (1 - dropout), 0)
    return _einsum("TS,SH->TH", weights_TS, value_SH)
