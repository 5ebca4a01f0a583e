"""What every contender must compute: attention from its equation, a block of queries at a time.

The equation is that of `bench.textbook`, which shares no code with the attention under test and
multiplies float32 in full precision.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_mha.bench.accelerator.cases import Case
from flax_mha.bench.masks import allowed
from flax_mha.bench.textbook import context_of, logits_of
from flax_mha.core.typing import Array, PRNGKey

_MOST = 1024  # queries a block


class Data(NamedTuple):
    """The numbers that every contender of a case computes with."""

    arrays: tuple[Array, ...]  # query, key, value `[B, T, N, H]`, and the bias `[N, T, T]`
    probe_BTNH: Array  # FB is the gradient of the context's sum, weighed by it
    dropout_key: PRNGKey


class Expected(NamedTuple):
    """The context, or the gradient of each array. `noise` is how far dropout moves the context."""

    results: tuple[Any, ...]
    context_BTNH: Any = None
    noise: float = 0.0


def make_data(case: Case) -> Data:
    """The same numbers for the same case, of the same JAX."""
    query_key, key_key, value_key, bias_key, probe_key, dropout_key = jax.random.split(
        jax.random.key(0), 6
    )
    draw = lambda key, shape: jax.random.normal(key, shape, jnp.dtype(case.dtype))  # noqa: E731
    arrays = [draw(key, case.shape) for key in (query_key, key_key, value_key)]
    if case.bias:
        arrays.append(draw(bias_key, (case.heads, case.length, case.length)))
    return Data(tuple(arrays), draw(probe_key, case.shape), dropout_key)


def expect(case: Case, data: Data) -> Expected:
    """The textbook's results, on the host; with dropout, of the context alone."""
    wide = tuple(x.astype("float32") for x in data.arrays)
    forward = jax.jit(functools.partial(attention, case=case))
    if case.dropout:
        context, noisy = (jax.device_get(forward(*wide, dropout_key=k)) for k in (None, data[2]))
        noise = float(jnp.sqrt(jnp.square(noisy - context).mean()))
        return Expected((), context, noise)
    if not case.gradient:
        return Expected((jax.device_get(forward(*wide)),))

    def loss(*arrays: Array) -> Array:
        return (attention(*arrays, case=case) * data.probe_BTNH.astype("float32")).sum()

    gradient = jax.jit(jax.grad(loss, argnums=tuple(range(len(wide)))))
    return Expected(jax.device_get(gradient(*wide)))


def attention(
    query_BTNH: Array,
    key_BSNH: Array,
    value_BSNH: Array,
    bias_NTS: Array | None = None,
    *,
    case: Case,
    dropout_key: PRNGKey | None = None,
) -> Array:
    """softmax(q k / sqrt(H) + bias) v over the allowed keys, for one example and head at a time."""
    B, T, N, _ = query_BTNH.shape
    rows = next(size for size in range(min(T, _MOST), 0, -1) if T % size == 0)
    starts = jnp.arange(0, T, rows)

    @jax.checkpoint
    def block(head: Any) -> Array:
        b, n, start = head
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows)  # noqa: E731
        query_RH, key_SH, value_SH = (x[b, :, n] for x in (query_BTNH, key_BSNH, value_BSNH))
        logits_RS = logits_of(cut(query_RH), key_SH)
        if bias_NTS is not None:
            logits_RS += cut(bias_NTS[n])
        allowed_RS = allowed(case, start + jnp.arange(rows))
        block_key = dropout_key
        if dropout_key is not None:
            block_key = jax.random.fold_in(dropout_key, (b * N + n) * T + start)
        return context_of(logits_RS, value_SH, allowed_RS, case.dropout, block_key)

    heads = jnp.meshgrid(jnp.arange(B), jnp.arange(N), starts, indexing="ij")
    context_BNTH = jax.lax.map(block, tuple(x.ravel() for x in heads))
    return context_BNTH.reshape(B, N, T, -1).swapaxes(1, 2)
