"""Who computes a case: our implementations, and jax's splash attention beside them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha import IMPLEMENTATIONS, Mask, dot_product_attention, explain
from flax_mha.attention import DistanceBias
from flax_mha.bench.aot.cases import Case
from flax_mha.core.typing import Array

Data = dict[str, Any]
Attend = Callable[[Data], Array]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        attend: (case, T) -> data -> context `[B, T, N, V]`.
        unsupported: (case, T) -> the reason why it cannot; None where it can.
    """

    name: str
    attend: Callable[[Case, int], Attend]
    unsupported: Callable[[Case, int], str | None]


def program(contender: Contender, case: Case, T: int, gradient: bool) -> tuple[Any, Any]:
    """A function and its arguments: the context, or the gradient of every float, given its own."""
    attend, data = contender.attend(case, T), case.data(T)
    if not gradient:
        return attend, (data,)
    floats = [name for name, x in data.items() if jnp.issubdtype(x.dtype, jnp.floating)]

    def pull(data: Data, cotangent_BTNV: Array) -> Any:
        some = {name: data[name] for name in floats}
        _, pulled = jax.vjp(lambda some: attend(data | some), some)
        (gradients,) = pulled(cotangent_BTNV)
        return gradients

    return pull, (data, data["query"])


# --- ours ---------------------------------------------------------------------------------------


def _ours(name: str) -> Contender:
    attend = lambda case, T: functools.partial(_attend, name, case)  # noqa: E731
    return Contender(name, attend, functools.partial(_reason, name))


def _attend(name: str, case: Case, data: Data) -> Array:
    return dot_product_attention(**_call(case, data), implementation=name)


def _call(case: Case, data: Data) -> dict[str, Any]:
    """The arguments of `dot_product_attention`."""
    heads = {name: data[name] for name in ("query", "key", "value")}
    return heads | (_by_functions if case.by_functions else _built_in)(case, data)


def _built_in(case: Case, data: Data) -> dict[str, Any]:
    call: dict[str, Any] = {}
    mask = Mask.causal() if case.is_causal else Mask()
    if case.window is not None:
        mask &= Mask.window(case.window, 0)
    if case.segments:
        mask &= Mask.segments(data["ids"], data["ids"])
    if case.padding:
        mask &= Mask.padding(data["real"], data["real"])
    if case.distance_bias:
        call["distance_bias"] = DistanceBias(data["distances"], first=1 - data["query"].shape[1])
    if case.dropout:
        call["dropout_key"] = jax.random.wrap_key_data(data["words"], impl="threefry2x32")
    return call | dict(
        mask=mask, bias=data.get("bias"), soft_cap=case.soft_cap, dropout_rate=case.dropout
    )


def _by_functions(case: Case, data: Data) -> dict[str, Any]:
    """The same masks, with the causal one in them, and one score, as functions of a pair."""
    ids, slopes, cap = data.get("ids"), data.get("distances"), case.soft_cap or 1.0

    def allowed(b: Array, n: Array, t: Array, s: Array) -> Array:
        near = True if case.window is None else t - s <= case.window
        together = True if ids is None else ids[b, t] == ids[b, s]
        return (s <= t) & near & together

    def score(x: Array, b: Array, n: Array, t: Array, s: Array) -> Array:
        if slopes is not None:
            return x - slopes[n] * (t - s).astype(x.dtype)
        return cap * jnp.tanh(x / cap)

    has_score = case.distance_bias or case.soft_cap is not None
    return dict(mask=Mask.function(allowed), score=score if has_score else None)


def _reason(name: str, case: Case, T: int) -> str | None:
    """What `explain` says of it."""
    told: dict[str, str] = {}
    jax.eval_shape(
        lambda data: told.update(explain(**_call(case, data), platform="tpu")), case.data(T)
    )
    return None if told[name].startswith("ok") else told[name]


# --- splash -------------------------------------------------------------------------------------

_FORWARD = ("block_q", "block_kv")
_FORWARD_COMPUTE = "block_kv_compute"  # 512 keys at a time is its best, of 256, 512 and 1024
_DKV = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
_DQ = ("block_q_dq", "block_kv_dq")


def _splash(name: str, block: int, fused: bool = False) -> Contender:
    def attend(case: Case, T: int) -> Attend:
        return functools.partial(_splash_attend, _splash_kernel(case, T, block, fused), case)

    return Contender(name, attend, _splash_reason)


def _splash_reason(case: Case, T: int) -> str | None:
    asked = {"a bias": case.bias or case.distance_bias, "dropout": case.dropout}
    missing = [what for what, given in asked.items() if given]
    return f"splash attention has no {missing[0].removeprefix('a ')}" if missing else None


def _splash_kernel(case: Case, T: int, block: int, fused: bool) -> Any:
    """jax's kernel with blocks of so many queries and keys; `fused` = one backward kernel."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    names = _FORWARD + _DKV + (() if fused else _DQ)
    sizes: Any = dict.fromkeys(names, min(T, block)) | {_FORWARD_COMPUTE: min(T, block, 512)}
    mask: Any = (masks.CausalMask if case.is_causal else masks.FullMask)((T, T))
    if case.window is not None:
        mask = masks.LocalMask((T, T), (case.window, 0), 0)
    return splash.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * case.N),
        block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=fused),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=case.soft_cap,
    )


def _splash_attend(kernel: Any, case: Case, data: Data) -> Array:
    """In our layout, scaled: splash wants `[N, T, H]` and multiplies by nothing.

    Padding is segment ids to it: removed queries attend to removed keys, where ours attend to none.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    query_BTNH = data["query"] * case.H**-0.5
    heads = [x.swapaxes(1, 2) for x in (query_BTNH, data["key"], data["value"])]
    ids = data.get("ids", data.get("real"))
    segments = None if ids is None else splash.SegmentIds(*[ids.astype("int32")] * 2)
    return jax.vmap(kernel)(*heads, segments).swapaxes(1, 2)


CONTENDERS = {
    contender.name: contender
    for contender in (
        *(_ours(name) for name in IMPLEMENTATIONS if name not in ("pallas_interpreted", "cudnn")),
        _splash("splash 512", 512),
        _splash("splash 1024", 1024),
        _splash("splash fused", 1024, fused=True),
    )
}
# "At its best": those whose memory is linear. The fused backward keeps S / 1024 copies of d_query.
BEST_OF = ("splash 512", "splash 1024")
