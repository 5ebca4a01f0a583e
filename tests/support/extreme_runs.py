"""Attention calls with extreme numbers: what float64 makes of them, how each one computes them.

`python tests/trust/errors.py` prints the errors of all.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from dense_oracle import Problem, attention, gradients
from extreme_inputs import DROPOUT_KEY, INPUTS, TINY, Arrays, Extreme

from flax_mha import (
    ContextAxis,
    MultiHeadAttentionConfig,
    dot_product_attention,
    multi_head_attention,
)
from flax_mha.attention.dropout import keep_mask, words_of

BLOCKS = (4, 3)  # of queries and keys, of which no length is a multiple
STRATEGIES = ("ring", "all_gather", "all_to_all")


def expected(case: Extreme) -> Arrays:
    """The context and every gradient, in float64."""
    a = {name: np.asarray(x).astype(np.float64) for name, x in case.arrays().items()}
    B, T, S, N, _, H = case.sizes
    call, full = dict(case.call), (B, N, T, S)
    rate, causal = call.get("dropout_rate", 0.0), np.arange(S) <= np.arange(T)[:, None]
    keep = keep_mask(words_of(DROPOUT_KEY), rate, full) if rate else np.ones(full, bool)
    problem = Problem(
        *(a[name] for name in INPUTS),
        allowed_BNTS=np.broadcast_to(causal if "is_causal" in call else True, full),
        bias_BNTS=np.broadcast_to(a.get("bias", 0.0), full),
        keep_BNTS=np.asarray(keep),
        scale=call.get("scale", 1 / np.sqrt(H)),
        rate=rate,
        soft_cap=call.get("soft_cap"),
        sinks_N=a.get("sinks"),
    )
    result = attention(problem)
    found = {"context": result.context_BTNV, **gradients(problem, result, a["d_context"])}
    if "bias" in a:
        axes = tuple(i for i, n in enumerate(a["bias"].shape) if n == 1)
        found["bias"] = found["bias"].sum(axes, keepdims=True)
    return {name: found[name] for name in case.names}


# --- what is computed ---------------------------------------------------------------------------


def computed(case: Extreme, how: str) -> Arrays:
    """The same, float64: by an implementation, by "layer" and one, by "jax.nn", or by a strategy.

    A strategy has two devices along the context axis.
    """
    arrays = case.arrays()
    d_context = arrays.pop("d_context")
    standard = how == "jax.nn"
    with (
        jax.set_mesh(two_devices()) if how in STRATEGIES else contextlib.nullcontext(),
        jax.numpy_dtype_promotion("standard" if standard else "strict"),
        jax.numpy_rank_promotion("allow" if standard else "raise"),
    ):
        found = compiled(how, case.sizes, case.call)(arrays, d_context)
    return {name: np.asarray(x).astype(np.float64) for name, x in found.items()}


def two_devices() -> Any:
    types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((2,), ("context",), types, devices=jax.devices()[:2])


@functools.lru_cache(maxsize=64)
def compiled(how: str, sizes: tuple[int, ...], call: tuple[tuple[str, Any], ...]) -> Any:
    """One program for all cases that differ in their numbers alone."""
    name = how.removeprefix("layer ")
    given = dict(call)
    if name == "jax.nn":
        attend = functools.partial(jax.nn.dot_product_attention, **given, implementation="xla")
    elif how.startswith("layer"):
        attend = functools.partial(_layer, sizes, given, name)
    else:
        dropout = {"dropout_key": DROPOUT_KEY} if "dropout_rate" in given else {}
        if how in STRATEGIES:
            name, given = "blockwise", {**given, "context_axis": ContextAxis("context", how)}
        small = sizes[1] * sizes[2] < 10_000 and name == "blockwise"
        blocks = {"block_sizes": BLOCKS} if small else {}
        given = {**given, **dropout, **blocks, "implementation": name}
        attend = functools.partial(dot_product_attention, **given)

    def both(arrays: Arrays, d_context: Any) -> Arrays:
        context, pull = jax.vjp(lambda x: attend(**x), arrays)
        return {"context": context, **pull(d_context)[0]}

    return jax.jit(both)


def _layer(sizes: tuple[int, ...], call: Arrays, name: str, **arrays: Any) -> Any:
    """The layer with projections that change nothing, so that it must give what attention gives."""
    B, T, S, N, K, H = sizes
    dtype, call = arrays["query"].dtype, dict(call)
    of_heads = lambda n: jnp.eye(n * H, dtype=dtype).reshape(n * H, n, H)
    params: Arrays = {name: {"kernel": of_heads(N if name == "query" else K)} for name in INPUTS}
    params["attention_output"] = {"kernel": of_heads(N).transpose(1, 2, 0)}
    if "sinks" in arrays:
        params["sinks"] = {"logits": arrays["sinks"]}
    rate, causal = call.pop("dropout_rate", 0.0), call.pop("is_causal", False)
    config = MultiHeadAttentionConfig(
        num_heads=N, key_dim=H, num_kv_heads=K, use_bias=False, dropout=rate, dtype=dtype.name,
        use_sinks="sinks" in arrays, implementation=name, **call,
    )  # fmt: skip
    query = arrays["query"].reshape(B, T, N * H)
    key, value = (arrays[name].reshape(B, S, K * H) for name in ("key", "value"))
    output = multi_head_attention(
        params, query, value, key,
        config=config, bias=arrays.get("bias"), use_causal_mask=causal,
        dropout_key=DROPOUT_KEY if rate else None,
    )  # fmt: skip
    return output.reshape(B, T, N, H)


# --- how far apart ------------------------------------------------------------------------------


def error(case: Extreme, actual: Any, exact: Any) -> float:
    """The largest error over the largest entry, of 0 over 1; less what XLA takes for 0."""
    if np.isnan(actual).any():
        return float("nan")
    largest = np.abs(exact).max(initial=0.0) or 1.0
    apart = np.abs(actual - exact).max(initial=0.0)
    return float(max(0.0, apart - case.hidden * TINY) / largest)


def errors(case: Extreme, how: str) -> dict[str, float]:
    """The error of the context and of every gradient."""
    exact, found = expected(case), computed(case, how)
    return {name: error(case, found[name], exact[name]) for name in case.names}
