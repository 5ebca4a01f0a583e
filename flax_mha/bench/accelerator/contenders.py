"""The contenders by name, each a function of a case that gives one of the arrays.

To add one of JAX: a function and a line in `CONTENDERS`. It raises `Unserved` with the reason where
it has no way to serve the case.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen

from flax_mha import IMPLEMENTATIONS, dot_product_attention
from flax_mha.bench.accelerator.cases import Case
from flax_mha.bench.masks import allowed
from flax_mha.bench.peers.contract import Unserved
from flax_mha.bench.peers.keras import ready
from flax_mha.core.typing import Array

Attend = Callable[..., Any]  # (query, key, value, bias or None, dropout key or None) -> context


class Source(NamedTuple):
    """Where a contender comes from."""

    build: Callable[[Case], Attend] | None  # None: torch, which is measured in its own way
    package: str = "jax"  # as it is imported
    family: str = "jax"


def ours(case: Case, implementation: str | None = None) -> Attend:
    """What None chooses, or the named one."""
    if (implementation or "").endswith("interpreted"):
        raise Unserved("it interprets a kernel, for tests")

    def attend(query: Array, key: Array, value: Array, bias: Any, dropout_key: Any) -> Array:
        call: dict[str, Any] = dict(implementation=implementation, local_window_size=case.reach)
        call |= dict(dropout_rate=case.dropout, dropout_key=dropout_key)
        return dot_product_attention(query, key, value, bias=bias, is_causal=case.causal, **call)

    return attend


def jax_nn(case: Case, implementation: Any) -> Attend:
    """`jax.nn.dot_product_attention`."""
    if case.dropout:
        raise Unserved("jax.nn.dot_product_attention has no dropout")

    def attend(query: Array, key: Array, value: Array, bias: Any, dropout_key: Any) -> Array:
        call: dict[str, Any] = dict(implementation=implementation, local_window_size=case.reach)
        bias = None if bias is None else bias[None]
        return jax.nn.dot_product_attention(query, key, value, bias, is_causal=case.causal, **call)

    return attend


def flax_linen(case: Case) -> Attend:
    """`flax.linen.dot_product_attention`; every weight draws, as everyone's does."""

    def attend(query: Array, key: Array, value: Array, bias: Any, dropout_key: Any) -> Array:
        call: dict[str, Any] = dict(dropout_rng=dropout_key, dropout_rate=case.dropout)
        call |= dict(broadcast_dropout=False, deterministic=dropout_key is None)
        bias = None if bias is None else bias[None]
        return linen.dot_product_attention(query, key, value, bias, matrix(case), **call)

    return attend


def keras_ops(case: Case) -> Attend:
    """`keras.ops.dot_product_attention`, which chooses a kernel by itself."""
    keras = ready()
    if case.dropout:
        raise Unserved("keras.ops.dot_product_attention has no dropout")
    # One matrix for a window, which Keras has not; a flag for the causal order.
    mask = matrix(case) if case.window is not None else None

    def attend(query: Array, key: Array, value: Array, bias: Any, dropout_key: Any) -> Array:
        bias = None if bias is None else bias[None]
        return keras.ops.dot_product_attention(
            query, key, value, bias=bias, mask=mask, is_causal=case.causal and mask is None
        )

    return attend


def matrix(case: Case) -> Array | None:
    """Booleans `[1, 1, T, T]`, True = may attend; None where every pair may."""
    allowed_TS = allowed(case)
    return None if allowed_TS is None else allowed_TS[None, None]


CONTENDERS: dict[str, Source] = {
    "ours": Source(ours, "flax_mha", "ours"),
    **{
        f"ours/{name}": Source(functools.partial(ours, implementation=name), "flax_mha", "ours")
        for name in IMPLEMENTATIONS
    },
    "jax.nn xla": Source(functools.partial(jax_nn, implementation="xla")),
    "jax.nn cudnn": Source(functools.partial(jax_nn, implementation="cudnn")),
    "linen": Source(flax_linen, "flax"),
    "keras": Source(keras_ops, "keras"),
    "torch sdpa": Source(None, "torch", "torch"),
}
