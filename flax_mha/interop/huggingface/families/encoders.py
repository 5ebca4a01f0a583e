"""Encoders of text and of images."""

from typing import Any

from flax_mha.interop.huggingface.families.layouts import OLD_ROPE, OUT, fused, linear, named
from flax_mha.interop.huggingface.family import (
    CAUSAL,
    Family,
    Index,
    Reader,
    Stack,
    fields_set,
)
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.readers import always, bias, dropout, every, heads, heads_by, when
from flax_mha.interop.huggingface.rope import rotary_by_kind
from flax_mha.interop.torch.models import PACKED
from flax_mha.positions import Rotary

_BERT = named("self.query", "self.key", "self.value", "output.dense")
_OLD_VIT = named("attention.query", "attention.key", "attention.value", "output.dense")
_BLOCK_NORMS = ("LayerNorm", "output.LayerNorm")
_HEADS = heads_by("num_attention_heads", "hidden_size")
_BIASES = always(use_bias=True)
_DROPOUT = dropout("attention_probs_dropout_prob")
_REFUSED = {"add_cross_attention": "layers that attend to an encoder have no row in such a model"}
_IMAGES = fields_set("image_size patch_size num_channels")


def _absolute(fields: Fields, at: Index) -> dict[str, Any]:
    kind = fields.get("position_embedding_type")
    if kind not in (None, "absolute"):
        fields.refuse("position_embedding_type", "its logits depend on queries and distances")
    return {}


def _esm_position(fields: Fields, at: Index) -> dict[str, Any]:
    kind, base = fields.get("position_embedding_type"), fields.number("rope_theta")
    if kind not in ("absolute", "rotary"):
        fields.refuse("position_embedding_type", "known are 'absolute' and 'rotary'")
    return {"position": Rotary(base) if kind == "rotary" else None}


def _bert(types: str, *readers: Reader, ignored: str = "", **row: Any) -> Family:
    """BERT's names below `encoder.layer.0.attention`; causal where it is a decoder."""
    layout = linear(_BERT, foreign=(*_BLOCK_NORMS, "self.rotary_embeddings.inv_freq"))
    stack = Stack(
        "encoder.layer.{}.attention",
        layout,
        (_HEADS, *readers, _BIASES, _DROPOUT),
        when("is_decoder", CAUSAL),
    )
    return Family(
        tuple(types.split()),
        (stack,),
        refused={**_REFUSED, **row.get("refused", {})},
        ignored=fields_set(ignored),
    )


_ALBERT = "encoder.albert_layer_groups.{}.albert_layers.{}.attention"


def _albert_layers(fields: Fields) -> list[Index]:
    groups, inner = fields.size("num_hidden_groups"), fields.size("inner_group_num")
    fields.size("num_hidden_layers")  # how often they run
    if groups * inner > 10_000:
        fields.fail("num_hidden_groups", "at most 10000", groups)
    return [(group, layer) for group in range(groups) for layer in range(inner)]


_MODERN_KIND = every("global_attn_every_n_layers", first=True)
_MODERN_THETAS = {
    "full_attention": "global_rope_theta",
    "sliding_attention": "local_rope_theta",
}


def _modern_window(fields: Fields, at: Index) -> dict[str, Any]:
    """`local_attention` is the whole window's length, the query in its middle."""
    size = fields.size("local_attention") // 2 + 1
    return {"sliding_window": size} if _MODERN_KIND(fields, at) == "sliding_attention" else {}


TEXTS = (
    _bert(
        "bert",
        _absolute,
        ignored="directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers "
        "pooler_size_per_head pooler_type",
    ),
    _bert("roberta", _absolute),
    _bert(
        "electra",
        _absolute,
        ignored="embedding_size summary_activation summary_last_dropout summary_type "
        "summary_use_proj",
    ),
    _bert(
        "roformer",
        always(position=Rotary(interleaved=True)),
        ignored="embedding_size",
        refused={"rotary_value": "values are turned too"},
    ),
    _bert(
        "esm",
        _esm_position,
        ignored="emb_layer_norm_before esmfold_config is_folding_model token_dropout vocab_list",
    ),
    Family(
        ("distilbert",),
        (
            Stack(
                "transformer.layer.{}.attention",
                linear(named("q_lin", "k_lin", "v_lin", "out_lin")),
                (_HEADS, _BIASES, dropout("attention_dropout")),
                {},
            ),
        ),
        names={
            "num_attention_heads": "n_heads",
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
        },
        ignored=fields_set(
            "activation dropout hidden_dim qa_dropout seq_classif_dropout sinusoidal_pos_embds "
            "output_past tie_weights_"
        ),
    ),
    Family(
        ("albert",),
        (
            Stack(
                _ALBERT,
                linear(named("query", "key", "value", "dense"), foreign=("LayerNorm",)),
                (_HEADS, _absolute, _BIASES, _DROPOUT),
                {},
                layers=_albert_layers,
                remark="run num_hidden_layers times",
            ),
        ),
        ignored=fields_set(
            "embedding_size down_scale_factor gap_size net_structure_type num_memory_blocks"
        ),
    ),
    Family(
        ("modernbert",),
        (
            Stack(
                "layers.{}.attn",
                fused("Wqkv", "Wo", foreign=OLD_ROPE),
                (
                    _HEADS,
                    rotary_by_kind(_MODERN_KIND, _MODERN_THETAS, tuple(_MODERN_THETAS)),
                    _modern_window,
                    bias("attention_bias"),
                    dropout("attention_dropout"),
                ),
                {},
            ),
        ),
        defaults={
            "global_attn_every_n_layers": 3,
            "global_rope_theta": 160000.0,
            "local_rope_theta": 10000.0,
        },
        ignored=fields_set(
            "classifier_activation classifier_bias classifier_pooling decoder_bias "
            "deterministic_flash_attn embedding_dropout initializer_cutoff_factor mlp_dropout "
            "norm_bias norm_eps position_embedding_type reference_compile repad_logits_with_grad "
            "sparse_pred_ignore_index sparse_prediction"
        ),
    ),
)


# --- images -------------------------------------------------------------------------------------


_VIT_FIELDS = _IMAGES | fields_set(
    "apply_layernorm drop_path_rate encoder_stride layerscale_value mlp_ratio pooler_act "
    "pooler_output_size reshape_hidden_states use_mask_token use_swiglu_ffn"
)


def _qkv_bias(fields: Fields, at: Index) -> dict[str, Any]:
    return {"use_bias": True if fields.flag("qkv_bias") else ("attention_output",)}


def _clip(path: str, types: str, call: Any, *more: Stack, ignored: str = "") -> Family:
    readers: tuple[Reader, ...] = (_HEADS, _BIASES, dropout("attention_dropout"))
    stack = Stack(path, linear(OUT), readers, call)
    kept = fields_set(f"{ignored} dropout projection_dim projection_size")
    return Family(tuple(types.split()), (stack, *more), ignored=_IMAGES | kept)


# The layer at the end of a SigLIP: one learned query attends to all patches.
_POOLING = Stack(
    "head.attention",
    PACKED,
    (_HEADS, _BIASES),
    {},
    layers=lambda fields: [()] if fields.get("vision_use_head") is not False else [],
    remark="its query is `probe` of the module above",
)
_ENCODER = "encoder.layers.{}.self_attn"

IMAGES = (
    Family(
        ("vit", "dinov2"),
        (Stack("encoder.layer.{}.attention", linear(_OLD_VIT), (heads, _qkv_bias, _DROPOUT), {}),),
        ignored=_VIT_FIELDS,
    ),
    _clip(_ENCODER, "clip_text_model", CAUSAL),
    _clip(_ENCODER, "clip_vision_model", {}),
    _clip(_ENCODER, "siglip_text_model", {}),
    _clip(_ENCODER, "siglip_vision_model", {}, _POOLING),
)
