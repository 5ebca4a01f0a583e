"""Gemma 4: heads of another size in full layers, a norm of values, keys that serve as values."""

from collections.abc import Mapping
from typing import Any

from flax_mha.interop.huggingface.families.layouts import LLAMA, OLD_ROPE, linear, norms
from flax_mha.interop.huggingface.family import CAUSAL, Family, Index, Stack, Tower, fields_set
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.readers import always, bias, dropout, kinds, normed
from flax_mha.interop.huggingface.rope import rotary_by_kind
from flax_mha.norms import RMSNorm

_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000.0,
    },
}


def _five_of_six(fields: Fields, layer: int) -> str:
    return "sliding_attention" if (layer + 1) % 6 else "full_attention"


def _kind(fields: Fields, at: Index) -> str:
    """The last layer is full, whatever is said."""
    is_last = at[0] == fields.size("num_hidden_layers") - 1
    return "full_attention" if is_last else kinds(_five_of_six)(fields, at)


def _heads(fields: Fields, at: Index) -> Mapping[str, Any]:
    """Full layers have heads of their own size; newer files say so layer by layer."""
    N, is_full = fields.size("num_attention_heads"), _kind(fields, at) == "full_attention"
    sizes = {name: fields.size(name) for name in ("num_key_value_heads", "head_dim")}
    full = {"head_dim": fields.size("global_head_dim")}
    number = fields.optional_size("num_global_key_value_heads")
    if fields.flag("attention_k_eq_v") and number is not None:
        full["num_key_value_heads"] = number
    if fields.has("per_layer_config"):
        sizes |= _own(fields, at[0])
    elif is_full:
        sizes |= full
    K = sizes["num_key_value_heads"]
    return {"num_heads": N, "num_kv_heads": None if K == N else K, "key_dim": sizes["head_dim"]}


def _own(fields: Fields, layer: int) -> dict[str, int]:
    """The sizes of one layer in `per_layer_config`, whose keys are numbers as text."""
    every = fields.inner("per_layer_config")
    name = next((x for x in every.values if x.isdigit() and int(x) == layer), None)
    if name is None:
        return {}
    inner = every.inner(name)
    for other in set(inner.values) - {"head_dim", "num_key_value_heads"}:
        inner.refuse(other, "a layer's own sizes are those of its heads")
    return {other: inner.size(other) for other in inner.values}


def _window(fields: Fields, at: Index) -> Mapping[str, Any]:
    size = fields.size("sliding_window")
    size = size // 2 + 1 if _is_both_ways(fields) else size
    return {"sliding_window": None if _kind(fields, at) == "full_attention" else size}


def _is_both_ways(fields: Fields) -> bool:
    kind = fields.get("use_bidirectional_attention")
    if kind not in (None, "all", "vision"):
        fields.fail("use_bidirectional_attention", "'all', 'vision' or null", kind)
    return kind == "all"


def _call(fields: Fields, at: Index) -> Mapping[str, Any]:
    return {} if _is_both_ways(fields) else CAUSAL


def _borrows(fields: Fields, at: Index) -> str | None:
    """The last layers may attend to the keys and values of an earlier one."""
    number = fields.get("num_kv_shared_layers") or 0
    if not number or at[0] < fields.size("num_hidden_layers") - number:
        return None
    if not fields.is_ignored("num_kv_shared_layers"):
        reason = "those layers attend to an earlier layer's keys; `ignore` it to leave them out"
        fields.refuse("num_kv_shared_layers", reason)
    return "its keys and values are those of an earlier layer"


def _keys_as_values(fields: Fields, at: Index) -> Mapping[str, str]:
    is_full = _kind(fields, at) == "full_attention"
    if not (fields.flag("attention_k_eq_v") and is_full):
        return {}
    return {"v_proj.weight": "k_proj.weight", "v_proj.bias": "k_proj.bias"}


def _value_norm(fields: Fields, at: Index) -> Mapping[str, Any]:
    return {"value_norm": RMSNorm(fields.number("rms_norm_eps"), use_scale=False)}


_TEXT = Stack(
    "layers.{}.self_attn",
    linear(LLAMA, *norms("q_norm", "k_norm"), foreign=OLD_ROPE),
    (
        _heads,
        rotary_by_kind(_kind, {}),
        _window,
        bias("attention_bias"),
        always(scale=1.0),
        normed(RMSNorm, "rms_norm_eps"),
        _value_norm,
        dropout("attention_dropout"),
    ),
    _call,
    left_out=_borrows,
    aliases=_keys_as_values,
)

GEMMA4 = (
    Family(
        ("gemma4_text",),
        (_TEXT,),
        defaults={"rope_parameters": _ROPE, "global_head_dim": 512},
        ignored=fields_set(
            "enable_moe_block final_logit_softcapping hidden_size_per_layer_input top_k_experts "
            "use_double_wide_mlp vocab_size_per_layer_input"
        ),
    ),
    Family(
        ("gemma4",),
        towers=(
            Tower(
                "text_config",
                "gemma4_text",
                r"(?:model\.)?language_model\.(?:model\.)?",
                "the tokens of one picture may attend to each other both ways",
            ),
            Tower("vision_config", "gemma4_vision", r"(?:model\.)?vision_tower\."),
            Tower("audio_config", "gemma4_audio", r"(?:model\.)?audio_tower\."),
        ),
        ignored=fields_set(
            "audio_token_id boa_token_id boi_token_id eoa_token_id eoa_token_index eoi_token_id "
            "image_token_id video_token_id vision_soft_tokens_per_image"
        ),
    ),
)
