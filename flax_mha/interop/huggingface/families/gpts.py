"""Decoders before Llama: fused projections, biases, ALiBi, windows of their own."""

from collections.abc import Mapping
from typing import Any

from flax_mha.interop.huggingface.families.layouts import OLD_ROPE, OUT, fused, linear
from flax_mha.interop.huggingface.family import COMMON, Family, Index, Stack, fields_set
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.readers import always, bias, dropout, heads_by
from flax_mha.interop.huggingface.rope import head_dim, rotary
from flax_mha.positions import Alibi, Rotary

_HEADS = heads_by("num_attention_heads", "hidden_size")
_BUFFERS = ("bias", "masked_bias")  # the causal mask, which files of older versions hold
_NO_CROSS = {"add_cross_attention": "layers that attend to an encoder have no row in such a model"}
_EQUAL_PARTS = {"head_dim": "the heads of such a model are equal parts of its features"}
_GPT_NAMES = {
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}
_GPT_FIELDS = fields_set(
    "activation_function embd_pdrop layer_norm_epsilon n_ctx n_inner n_positions resid_pdrop "
    "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
    "reorder_and_upcast_attn"
)


def _gpt2_scale(fields: Fields, at: Index) -> Mapping[str, Any]:
    is_scaled = fields.flag("scale_attn_weights")
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx")
    if is_scaled and not by_layer:
        return {}
    scale = head_dim(fields) ** -0.5 if is_scaled else 1.0
    return {"scale": scale / (at[0] + 1) if by_layer else scale}


def _neo_window(fields: Fields, at: Index) -> Mapping[str, Any]:
    """`attention_types` is `[[["global", "local"], 12]]`: kinds, and how often they come."""
    size, kind = fields.size("window_size"), fields.entry("attention_layers", at[0])
    rows = fields.entries("attention_types")
    if kind is None:
        kind = _neo_kind(fields, rows or [], at[0])
    if kind not in ("global", "local"):
        fields.fail("attention_layers", "a list of 'global' and 'local'", kind)
    return {"sliding_window": size if kind == "local" else None}


def _neo_kind(fields: Fields, rows: list[Any], layer: int) -> Any:
    for row in rows:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], list)):
            fields.fail("attention_types", "a list of [kinds, times]", rows)
        names, times = row
        if not isinstance(times, int) or not names:
            fields.fail("attention_types", "a list of [kinds, times]", rows)
        if layer < len(names) * times:
            return names[layer % len(names)]
        layer -= len(names) * times
    fields.fail("attention_types", "enough for every layer", rows)


def _gptj_position(fields: Fields, at: Index) -> Mapping[str, Any]:
    return {"position": Rotary(dim=fields.optional_size("rotary_dim"), interleaved=True)}


def _falcon_heads(fields: Fields, at: Index) -> Mapping[str, Any]:
    N, given = fields.size("num_attention_heads"), fields.optional_size("num_kv_heads")
    is_new, is_single = fields.flag("new_decoder_architecture"), fields.flag("multi_query")
    K = (given or N) if is_new else 1 if is_single else N
    return {"num_heads": N, "num_kv_heads": None if K == N else K, "key_dim": head_dim(fields)}


def _falcon_position(fields: Fields, at: Index) -> Mapping[str, Any]:
    """ALiBi is added before the logits are scaled."""
    turned = rotary()(fields, at)
    return {"position": Alibi(head_dim(fields) ** -0.5)} if fields.flag("alibi") else turned


def _mpt(fields: Fields, at: Index) -> Mapping[str, Any]:
    """What stands in `attn_config`."""
    inner = fields.inner("attn_config")
    inner.defaults = {"attn_pdrop": 0.0, "alibi_bias_max": 8, "alibi": True}
    if not inner.flag("alibi"):
        inner.refuse("alibi", "such a model has ALiBi, whatever this field says")
    if inner.number("alibi_bias_max") != 8 and not inner.is_ignored("alibi_bias_max"):
        inner.refuse("alibi_bias_max", "the transformers library computes with 8 whatever it is")
    for name in ("prefix_lm", "attn_uses_sequence_id", "qk_ln"):
        if inner.flag(name):
            inner.refuse(name, "such a model of the transformers library does not read it")
    if inner.get("attn_type") not in (None, "multihead_attention"):
        inner.refuse("attn_type", "known is 'multihead_attention'")
    arguments = {
        "dropout": inner.number("attn_pdrop"),
        "clip_qkv": inner.optional_number("clip_qkv") or None,
        "scale": inner.optional_number("softmax_scale"),
    }
    inner.expect_read(COMMON | {"attn_impl"})
    return arguments


_N_NAMES = {
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embed",
}
_QKV = "query_key_value"

GPTS = (
    Family(
        ("gpt2",),
        (
            Stack(
                "h.{}.attn",
                fused("c_attn", "c_proj", transposed=True, foreign=_BUFFERS),
                (_HEADS, _gpt2_scale, always(use_bias=True), dropout("attn_pdrop")),
            ),
        ),
        names=_GPT_NAMES,
        ignored=_GPT_FIELDS,
        refused={**_NO_CROSS, **_EQUAL_PARTS},
    ),
    Family(
        ("gpt_neo",),
        (
            Stack(
                "h.{}.attn.attention",
                linear(OUT, foreign=_BUFFERS),
                (
                    _HEADS,
                    _neo_window,
                    always(scale=1.0, use_bias=("attention_output",)),
                    dropout("attention_dropout"),
                ),
            ),
        ),
        names={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
        defaults={"attention_types": [[["global", "local"], 12]]},
        ignored=_GPT_FIELDS | fields_set("embed_dropout resid_dropout"),
    ),
    Family(
        ("gpt_neox",),
        (
            Stack(
                "layers.{}.attention",
                fused(_QKV, "dense", within="K", foreign=(*_BUFFERS, *OLD_ROPE)),
                (_HEADS, rotary(), bias("attention_bias"), dropout("attention_dropout")),
            ),
        ),
        names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        defaults={"partial_rotary_factor": 0.25},
        refused=_EQUAL_PARTS,
        ignored=fields_set("use_parallel_residual"),
    ),
    Family(
        ("gptj",),
        (
            Stack(
                "h.{}.attn",
                linear(OUT, foreign=(*_BUFFERS, "embed_positions")),
                (_HEADS, _gptj_position, always(use_bias=False), dropout("attn_pdrop")),
            ),
        ),
        names=_GPT_NAMES,
        ignored=_GPT_FIELDS | fields_set("rotary scale_attn_weights"),
    ),
    Family(
        ("opt",),
        (
            Stack(
                "decoder.layers.{}.self_attn",
                linear(OUT),
                (_HEADS, bias("enable_bias"), dropout("attention_dropout")),
            ),
        ),
        ignored=fields_set(
            "_remove_final_layer_norm activation_dropout activation_function do_layer_norm_before "
            "dropout ffn_dim init_std layer_norm_elementwise_affine layerdrop word_embed_proj_dim"
        ),
    ),
    Family(
        ("bloom",),
        (
            Stack(
                "h.{}.self_attention",
                fused(_QKV, "dense", within="K"),
                (
                    _HEADS,
                    always(use_bias=True, position=Alibi()),
                    dropout("attention_dropout"),
                ),
            ),
        ),
        names=_N_NAMES,
        ignored=fields_set(
            "apply_residual_connection_post_layernorm attention_softmax_in_fp32 "
            "bias_dropout_fusion "
            "layer_norm_epsilon masked_softmax_fusion n_inner offset_alibi seq_length "
            "skip_bias_add "
            "skip_bias_add_qkv slow_but_exact unk_token_id"
        ),
    ),
    Family(
        ("mpt",),
        (
            Stack(
                "blocks.{}.attn",
                fused("Wqkv", "out_proj"),
                (_HEADS, always(use_bias=False, position=Alibi()), _mpt),
            ),
        ),
        names={
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
            "hidden_size": "d_model",
        },
        ignored=fields_set(
            "emb_pdrop embedding_fraction expansion_ratio ffn_config init_config init_device "
            "layer_norm_epsilon learned_pos_emb logit_scale max_seq_len no_bias norm_type "
            "resid_pdrop "
            "verbose"
        ),
    ),
    Family(
        ("falcon",),
        (
            Stack(
                "h.{}.self_attention",
                fused(_QKV, "dense", within="K", foreign=OLD_ROPE),
                (_falcon_heads, _falcon_position, bias("bias"), dropout("attention_dropout")),
            ),
        ),
        ignored=fields_set(
            "activation apply_residual_connection_post_layernorm ffn_hidden_size "
            "layer_norm_epsilon num_ln_in_parallel_attn parallel_attn"
        ),
        refused=_EQUAL_PARTS,
    ),
)
