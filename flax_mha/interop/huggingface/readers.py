"""What fields of config.json say of a layer's config: small readers that rows are made of."""

from collections.abc import Callable, Mapping
from typing import Any

from flax_mha.interop.huggingface.family import Index, Reader
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.rope import head_dim

Kind = Callable[[Fields, Index], str]
QKV = ("query", "key", "value")


def heads(fields: Fields, at: Index) -> dict[str, Any]:
    """N, K and H."""
    N, K = fields.size("num_attention_heads"), fields.optional_size("num_key_value_heads")
    return {"num_heads": N, "num_kv_heads": None if K == N else K, "key_dim": head_dim(fields)}


def heads_by(number: str, features: str, size: str | None = None) -> Reader:
    """As many heads as a field says, of a size that another says, or of equal parts."""

    def read(fields: Fields, at: Index) -> dict[str, Any]:
        N, D = fields.size(number), fields.size(features)
        if size is None and D % N:
            fields.fail(features, f"a multiple of {number} = {N}", D)
        return {"num_heads": N, "key_dim": D // N if size is None else fields.size(size)}

    return read


def always(**arguments: Any) -> Reader:
    """What no field says."""
    return lambda fields, at: arguments


def bias(name: str, projections: Any = True) -> Reader:
    """Whether a flag gives these projections a bias."""
    return lambda fields, at: {"use_bias": projections if fields.flag(name) else False}


def dropout(name: str) -> Reader:
    return lambda fields, at: {"dropout": fields.number(name) if fields.has(name) else 0.0}


def scaled(name: str, scale: Callable[[float], float]) -> Reader:
    """The logits' factor, a function of a field."""
    return lambda fields, at: {"scale": scale(fields.number(name))}


def soft_cap(name: str = "attn_logit_softcapping") -> Reader:
    return lambda fields, at: {"soft_cap": fields.optional_number(name)}


def clip(name: str = "clip_qkv") -> Reader:
    return lambda fields, at: {"clip_qkv": fields.optional_number(name)}


def normed(norm: Callable[..., Any], epsilon: str, flag: str | None = None, **how: Any) -> Reader:
    """Queries and keys pass a norm, whose epsilon is a field; where a flag says so."""

    def read(fields: Fields, at: Index) -> dict[str, Any]:
        number = fields.number(epsilon)
        if flag is not None and not fields.flag(flag):
            return {}
        return {"qk_norm": norm(number, **how)}

    return read


# --- kinds of layers and windows ----------------------------------------------------------------


def kinds(default: Callable[[Fields, int], str]) -> Kind:
    """A layer's kind: the list `layer_types`, or else what the family makes of other fields."""

    def kind(fields: Fields, at: Index) -> str:
        made = default(fields, at[0])
        given = fields.entry("layer_types", at[0])
        return made if given is None else given

    return kind


def if_used(kind: Kind) -> Kind:
    """Without `use_sliding_window` there is no window, whatever `layer_types` says."""

    def full_unless_used(fields: Fields, at: Index) -> str:
        this = kind(fields, at)
        is_local = this == "sliding_attention" and not fields.flag("use_sliding_window")
        return "full_attention" if is_local else this

    return full_unless_used


def every(period: str, first: bool = False, local: str = "sliding_attention") -> Kind:
    """One layer of each `period` is full, the last or the first; the others are local."""

    def default(fields: Fields, layer: int) -> str:
        number = fields.size(period)
        return "full_attention" if (layer + (not first)) % number == 0 else local

    return kinds(default)


def all_alike(fields: Fields, at: Index) -> str:
    """`layer_types`, or else all are full."""
    return kinds(lambda fields, layer: "full_attention")(fields, at)


def window(kind: Kind) -> Reader:
    """The window of a layer that is local."""

    def read(fields: Fields, at: Index) -> dict[str, Any]:
        size, this = fields.get("sliding_window"), kind(fields, at)
        if this not in ("full_attention", "sliding_attention"):
            fields.refuse("layer_types", f"layers of kind {this!r} are not known")
        if this == "full_attention" or size is None:
            return {}
        return {"sliding_window": fields.size("sliding_window")}

    return read


def same_window(fields: Fields, at: Index) -> dict[str, Any]:
    """All layers have the window of `sliding_window`, where it is set."""
    return {"sliding_window": fields.optional_size("sliding_window")}


def late(fields: Fields, layer: int) -> str:
    """With `use_sliding_window`, the layers from `max_window_layers` on are local."""
    is_on, size = fields.flag("use_sliding_window"), fields.get("sliding_window")
    first = fields.get("max_window_layers")
    is_local = is_on and size is not None and layer >= (first or 0)
    return "sliding_attention" if is_local else "full_attention"


def when(flag: str, call: Mapping[str, Any]) -> Callable[[Fields, Index], Mapping[str, Any]]:
    """What a call passes where a flag is set."""
    return lambda fields, at: call if fields.flag(flag) else {}


def unless(flag: str, call: Mapping[str, Any]) -> Callable[[Fields, Index], Mapping[str, Any]]:
    """What a call passes where a flag is not set."""
    return lambda fields, at: {} if fields.flag(flag) else call
