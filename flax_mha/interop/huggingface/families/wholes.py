"""Models of several towers that have rows of their own: text with images."""

from collections.abc import Mapping
from typing import Any

from flax_mha.interop.huggingface.families.layouts import LLAMA, OLD_ROPE, fused, linear
from flax_mha.interop.huggingface.family import CAUSAL, Family, Index, Stack, Tower, fields_set
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.readers import (
    QKV,
    always,
    dropout,
    heads,
    heads_by,
    kinds,
    late,
    window,
)
from flax_mha.interop.huggingface.rope import parameters, position
from flax_mha.positions import AxialRotary

_TEXT, _VISION = r"(?:.*\.)?text_model\.", r"(?:.*\.)?vision_model\."
_LANGUAGE = r"(?:model\.)?language_model\.(?:model\.)?"
_TOWER = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
_BOTH_WAYS = "the tokens of one picture attend to each other both ways"
_PROJECTIONS = fields_set(
    "projection_dim logit_scale_init_value text_config_dict vision_config_dict"
)


def _texts_and_images(name: str) -> Family:
    """CLIP and its like: one tower of text, one of images."""
    towers = (
        Tower("text_config", f"{name}_text_model", _TEXT),
        Tower("vision_config", f"{name}_vision_model", _VISION),
    )
    return Family((name,), towers=towers, ignored=_PROJECTIONS)


# --- Qwen2-VL ------------------------------------------------------------------------------------


def _qwen2_vl_position(fields: Fields, at: Index) -> Mapping[str, Any]:
    """Time, rows and columns, each with its pairs of features."""
    rope = parameters(fields)
    rope.defaults = {**rope.defaults, "mrope_section": [16, 24, 24]}
    sections = rope.entries("mrope_section") or []
    if rope.get("rope_type") == "mrope" or rope.get("type") == "mrope":
        rope.values = {**rope.values, "rope_type": "default"}
    plain = position(fields, rope)
    return {
        "position": AxialRotary(
            plain.base, plain.dim, scaling=plain.scaling, sections=tuple(sections)
        )
    }


def _visual_position(fields: Fields, at: Index) -> Mapping[str, Any]:
    N, D = fields.size("num_heads"), fields.size("embed_dim")
    rope = fields.inner("rope_parameters")
    base = rope.number("rope_theta") if rope.has("rope_theta") else 10000.0
    if rope.get("rope_type") not in (None, "axial", "default"):
        rope.refuse("rope_type", "known is 'axial'")
    rope.expect_read()
    pairs = D // N // 4
    return {"position": AxialRotary(base, sections=(pairs, pairs), layout="restarted")}


_QWEN2_VL_TEXT = Stack(
    "layers.{}.self_attn",
    linear(LLAMA, foreign=OLD_ROPE),
    (
        heads,
        _qwen2_vl_position,
        always(use_bias=QKV),
        window(kinds(late)),
        dropout("attention_dropout"),
    ),
    CAUSAL,
    remark="with pictures, positions of time, row and column: [3, B, T]",
)
_QWEN2_VL_VISION = Stack(
    "blocks.{}.attn",
    fused("qkv", "proj"),
    (heads_by("num_heads", "embed_dim"), _visual_position, always(use_bias=True)),
    {},
    layers="depth",
    features="embed_dim",
    remark="each picture by itself; positions of row and column: [2, B, T]",
)
_QWEN2_VL_FIELDS = fields_set(
    "image_token_id video_token_id vision_end_token_id vision_start_token_id vision_token_id"
)

WHOLES = (
    _texts_and_images("clip"),
    _texts_and_images("siglip"),
    Family(
        ("gemma3",),
        towers=(
            Tower("text_config", "gemma3_text", _LANGUAGE, _BOTH_WAYS),
            Tower("vision_config", "siglip_vision_model", _TOWER),
        ),
        ignored=fields_set("boi_token_index eoi_token_index image_token_index mm_tokens_per_image"),
    ),
    Family(
        ("llava",),
        towers=(
            Tower("text_config", "llama", _LANGUAGE),
            Tower("vision_config", "clip_vision_model", _TOWER),
        ),
        ignored=fields_set(
            "image_seq_length image_token_id image_token_index multimodal_projector_bias "
            "projector_hidden_act vision_feature_layer vision_feature_select_strategy"
        ),
    ),
    Family(("qwen2_vl_text",), (_QWEN2_VL_TEXT,), ignored=_QWEN2_VL_FIELDS),
    Family(
        ("qwen2_vl_vision",),
        (_QWEN2_VL_VISION,),
        ignored=fields_set(
            "hidden_size in_channels in_chans mlp_ratio patch_size spatial_merge_size "
            "spatial_patch_size temporal_patch_size"
        ),
    ),
    Family(
        ("qwen2_vl",),
        towers=(
            Tower(
                "text_config",
                "qwen2_vl_text",
                r"(?:model\.)?(?:language_model\.)?(?:model\.)?",
                or_all=True,
            ),
            Tower("vision_config", "qwen2_vl_vision", r"(?:model\.)?visual\."),
        ),
        ignored=_QWEN2_VL_FIELDS,
    ),
)
