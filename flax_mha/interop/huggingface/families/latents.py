"""DeepSeek-V3's latent attention, and Llama 4: chunks, and queries that grow."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_mha.config import Latent
from flax_mha.interop.huggingface.families.grids import grid
from flax_mha.interop.huggingface.families.layer_kinds import has_rope
from flax_mha.interop.huggingface.families.layouts import LLAMA, OLD_ROPE, linear
from flax_mha.interop.huggingface.family import Family, Index, Stack, Tower, fields_set
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.readers import always, bias, dropout, heads, heads_by, kinds
from flax_mha.interop.huggingface.rope import head_dim, mscale, parameters, position
from flax_mha.interop.layout import Entry
from flax_mha.interop.torch.models import Layout, Packing
from flax_mha.norms import RMSNorm
from flax_mha.positions import AxialRotary, QueryGrowth

_DROPOUT = dropout("attention_dropout")

# --- Llama 4 -------------------------------------------------------------------------------------


def _llama4_kind(fields: Fields, layer: int) -> str:
    is_chunked = has_rope(fields, layer) and fields.has("attention_chunk_size")
    return "chunked_attention" if is_chunked else "full_attention"


_KIND = kinds(_llama4_kind)


def _chunks(fields: Fields, at: Index) -> Mapping[str, Any]:
    size, kind = fields.optional_size("attention_chunk_size"), _KIND(fields, at)
    if kind not in ("chunked_attention", "full_attention"):
        fields.refuse("layer_types", f"layers of kind {kind!r} are not known")
    return {"chunk_size": size if kind == "chunked_attention" else None}


def _llama4_position(fields: Fields, at: Index) -> Mapping[str, Any]:
    """Layers turn, by neighbours; of those that do not, queries grow."""
    turned = position(fields, parameters(fields), interleaved=True)
    factor, interval = fields.number("attn_scale"), fields.size("floor_scale")
    grows = fields.get("attn_temperature_tuning")
    if has_rope(fields, at[0]):
        return {"position": turned}
    return {"position": QueryGrowth(factor, interval) if grows else None}


def _llama4_norm(fields: Fields, at: Index) -> Mapping[str, Any]:
    """Of layers that turn: behind the turn, which changes no root mean square."""
    epsilon = fields.number("rms_norm_eps")
    if fields.flag("use_qk_norm") and has_rope(fields, at[0]):
        return {"qk_norm": RMSNorm(epsilon, use_scale=False)}
    return {}


_LLAMA4 = Stack(
    "layers.{}.self_attn",
    linear(LLAMA, foreign=OLD_ROPE),
    (heads, _llama4_position, _llama4_norm, _chunks, bias("attention_bias"), _DROPOUT),
)


def _llama4_axes(fields: Fields, at: Index) -> Mapping[str, Any]:
    """Half of the pairs are columns', half rows'."""
    rope, pairs = fields.inner("rope_parameters"), head_dim(fields) // 4
    base = rope.number("rope_theta") if rope.has("rope_theta") else fields.number("rope_theta")
    if rope.get("rope_type") not in (None, "default"):
        rope.refuse("rope_type", "known is 'default'")
    rope.expect_read()
    sections = (pairs, pairs)
    position = AxialRotary(base, interleaved=True, sections=sections, layout="restarted")
    return {"position": position}


def _llama4_patches(fields: Fields, at: Index) -> Mapping[str, Any]:
    """Columns and rows from 1 on, [2, 1, T]; behind them the class token, which is nowhere."""
    rows, columns = grid(fields)
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    places = 1 + np.stack([x.ravel(), y.ravel()]).astype("int32")[:, None]
    return {"positions": np.pad(places, ((0, 0), (0, 0), (0, 1)))}


_LLAMA4_VISION = Stack(
    "model.layers.{}.self_attn",
    linear(LLAMA),
    (heads_by("num_attention_heads", "hidden_size"), _llama4_axes, always(use_bias=True), _DROPOUT),
    _llama4_patches,
    remark="positions are those of image_size",
)

# --- DeepSeek-V3 ---------------------------------------------------------------------------------


def _latent_heads(fields: Fields, at: Index) -> Mapping[str, Any]:
    """In a head of a file the features that turn stand last, here they stand first."""
    W, U = fields.size("qk_rope_head_dim"), fields.size("qk_nope_head_dim")
    fields.optional_size("num_key_value_heads")  # as many as there are heads, whatever it says
    rank = fields.optional_size("q_lora_rank")
    latent = Latent(fields.size("kv_lora_rank"), W, rank, norm=RMSNorm(_EPSILON))
    return {
        "num_heads": fields.size("num_attention_heads"),
        "key_dim": W + U,
        "value_dim": fields.size("v_head_dim"),
        "latent": latent,
    }


_EPSILON = 1e-6  # of the latents' norms: the field of the model's other norms does not reach them


def _latent_position(fields: Fields, at: Index) -> Mapping[str, Any]:
    """YaRN's growth is one of the logits here, by `mscale_all_dim`."""
    for name in ("head_dim", "qk_head_dim"):
        fields.get(name)  # sums of others
    W = fields.size("qk_rope_head_dim")
    H = W + fields.size("qk_nope_head_dim")
    rope = parameters(fields)
    turned = position(fields, rope, interleaved=fields.flag("rope_interleave"), size=W)
    turned = dataclasses.replace(turned, dim=W)
    all_dim = rope.optional_number("mscale_all_dim")
    if turned.scaling is None or not all_dim:
        return {"position": turned}
    growth = mscale(rope.number("factor"), all_dim) ** 2
    return {"position": turned, "scale": H**-0.5 * growth}


def _latent_bias(fields: Fields, at: Index) -> Mapping[str, Any]:
    if not fields.flag("attention_bias"):
        return {"use_bias": False}
    first = ("query_latent",) if fields.has("q_lora_rank") else ()
    return {"use_bias": (*first, "latent", "shared_key", "attention_output")}


def _latent_layout(fields: Fields, at: Index) -> Layout:
    first = _QUERY_LATENT if fields.has("q_lora_rank") else _QUERY
    query = first[-1].name or ""
    return Layout(
        (*first, *_LATENTS),
        owns=("",),
        foreign=OLD_ROPE,
        packed={
            "kv_a_proj_with_mqa.weight": Packing(0),
            "kv_a_proj_with_mqa.bias": Packing(0),
            "kv_b_proj.weight": Packing(0, "K"),
        },
        shared_last=(query,),
        equal=("D=E",),
    )


_QUERY_LATENT = (
    Entry(("query_latent", "kernel"), "q_a_proj.weight", "Q D"),
    Entry(("query_latent", "bias"), "q_a_proj.bias", "Q"),
    Entry(("query_latent_norm", "scale"), "q_a_layernorm.weight", "(1 Q)"),
    Entry(("query", "kernel"), "q_b_proj.weight", "(N H) Q"),
)
_QUERY = (Entry(("query", "kernel"), "q_proj.weight", "(N H) D"),)
_LATENTS = (
    Entry(("latent", "kernel"), "kv_a_proj_with_mqa.weight[latent]", "L C"),
    Entry(("latent", "bias"), "kv_a_proj_with_mqa.bias[latent]", "L"),
    Entry(("shared_key", "kernel"), "kv_a_proj_with_mqa.weight[shared_key]", "W C"),
    Entry(("shared_key", "bias"), "kv_a_proj_with_mqa.bias[shared_key]", "W"),
    Entry(("latent_norm", "scale"), "kv_a_layernorm.weight", "L"),
    Entry(("key", "kernel"), "kv_b_proj.weight[key]", "(K U) L"),
    Entry(("value", "kernel"), "kv_b_proj.weight[value]", "(K V) L"),
    Entry(("attention_output", "kernel"), "o_proj.weight", "E (N V)"),
    Entry(("attention_output", "bias"), "o_proj.bias", "E"),
)
_DEEPSEEK = Stack(
    "layers.{}.self_attn",
    _latent_layout,
    (_latent_heads, _latent_position, _latent_bias, _DROPOUT),
)

LATENTS = (
    Family(
        ("llama4_text",),
        (_LLAMA4,),
        ignored=fields_set(
            "for_llm_compressor interleave_moe_layer_step intermediate_size_mlp moe_layers"
        ),
    ),
    Family(
        ("llama4_vision_model",),
        (_LLAMA4_VISION,),
        defaults={"rope_theta": 10000.0},
        ignored=fields_set(
            "multi_modal_projector_bias norm_eps num_channels pixel_shuffle_ratio "
            "projector_dropout projector_input_dim projector_output_dim "
            "vision_feature_layer vision_feature_select_strategy vision_output_dim"
        ),
    ),
    Family(
        ("llama4",),
        towers=(
            Tower("text_config", "llama4_text", r"(?:model\.)?language_model\.(?:model\.)?"),
            Tower("vision_config", "llama4_vision_model", r"(?:model\.)?vision_model\."),
        ),
        ignored=fields_set("boi_token_index eoi_token_index image_token_index"),
    ),
    Family(
        ("deepseek_v3",),
        (_DEEPSEEK,),
        ignored=fields_set(
            "aux_loss_alpha ep_size first_k_dense_replace moe_layer_freq n_group n_routed_experts "
            "n_shared_experts num_nextn_predict_layers routed_scaling_factor scoring_func seq_aux "
            "topk_group topk_method"
        ),
    ),
)
