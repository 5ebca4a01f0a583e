"""Which layers of a decoder are local, and which turn: the rules of single families."""

from collections.abc import Mapping
from typing import Any

from flax_mha.interop.huggingface.family import Index, Reader
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.readers import Kind, all_alike, every, kinds, window
from flax_mha.interop.huggingface.rope import rotary


def alternate(fields: Fields, layer: int) -> str:
    return "full_attention" if layer % 2 else "sliding_attention"


def early(fields: Fields, layer: int) -> str:
    """Qwen2-MoE: with `use_sliding_window`, every other layer before `max_window_layers`."""
    first = fields.get("max_window_layers") or 0
    is_local = fields.flag("use_sliding_window") and layer < first and layer % 2 == 0
    return "sliding_attention" if is_local else "full_attention"


def window_if_used(fields: Fields, at: Index) -> Mapping[str, Any]:
    size = fields.optional_size("sliding_window")
    return {"sliding_window": size if fields.flag("use_sliding_window") else None}


def gemma3_window(fields: Fields, at: Index) -> Mapping[str, Any]:
    """In both directions the field is the whole window's length, not that of one side."""
    read = window(BY_PERIOD)(fields, at)
    if fields.flag("use_bidirectional_attention") and read:
        return {"sliding_window": read["sliding_window"] // 2 + 1}
    return read


ALTERNATE = kinds(alternate)
BY_PERIOD: Kind = every("sliding_window_pattern")
_QWEN3_NEXT = every("full_attention_interval", local="linear_attention")


def exaone4_kind(fields: Fields, at: Index) -> str:
    if not fields.has("sliding_window"):
        fields.get("sliding_window_pattern")
        return all_alike(fields, at)
    return BY_PERIOD(fields, at)


def some_layers(kind: Kind, which: str, interleaved: bool = False) -> Reader:
    """Only layers of a kind turn; without a window, all do."""
    turned = rotary(interleaved)

    def read(fields: Fields, at: Index) -> Mapping[str, Any]:
        has = kind(fields, at) == which or not fields.has("sliding_window")
        return {**turned(fields, at), **({} if has else {"position": None})}

    return read


def smollm3_rope(fields: Fields, at: Index) -> Mapping[str, Any]:
    turned = rotary()(fields, at)
    return turned if has_rope(fields, at[0]) else {}


def has_rope(fields: Fields, layer: int) -> bool:
    given = fields.entry("no_rope_layers", layer)  # 1 where a layer does turn
    interval = fields.size("no_rope_layer_interval")
    return bool((layer + 1) % interval if given is None else given)


def smollm3_kind(fields: Fields, layer: int) -> str:
    is_on = fields.flag("use_sliding_window") and fields.has("sliding_window")
    return "sliding_attention" if is_on and not has_rope(fields, layer) else "full_attention"


def without_softmax(fields: Fields, at: Index) -> str | None:
    is_linear = _QWEN3_NEXT(fields, at) == "linear_attention"
    return "linear_attention: it is no softmax attention" if is_linear else None
