"""Decoders that are made like Llama: separate Linears, rotary positions, grouped heads."""

from typing import Any

from flax_mha.interop.huggingface.families.layer_kinds import (
    ALTERNATE,
    BY_PERIOD,
    early,
    exaone4_kind,
    gemma3_window,
    smollm3_kind,
    smollm3_rope,
    some_layers,
    window_if_used,
    without_softmax,
)
from flax_mha.interop.huggingface.families.layouts import (
    LLAMA,
    OLD_ROPE,
    fused,
    gated,
    linear,
    named,
    norm_biases,
    norms,
    sinks,
)
from flax_mha.interop.huggingface.family import CAUSAL, Family, Index, Reader, Stack, fields_set
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.readers import (
    QKV,
    always,
    bias,
    clip,
    dropout,
    heads,
    if_used,
    kinds,
    late,
    normed,
    same_window,
    scaled,
    soft_cap,
    unless,
    window,
)
from flax_mha.interop.huggingface.rope import rotary, rotary_by_kind
from flax_mha.norms import LayerNorm, RMSNorm

_PATH = "layers.{}.self_attn"
_PLAIN = linear(LLAMA, foreign=OLD_ROPE)
_HEAD_NORMS = linear(LLAMA, *norms("q_norm", "k_norm"), foreign=OLD_ROPE)
_OWN_NORMS = linear(LLAMA, *norms("q_norm", "k_norm", ("N H", "K H")), foreign=OLD_ROPE)
_WIDE_NORMS = linear(LLAMA, *norms("q_norm", "k_norm", ("(N H)", "(K H)")), foreign=OLD_ROPE)
_EACH_NORMS = linear(
    LLAMA,
    *norms("q_layernorm.norms.{N}", "k_layernorm.norms.{K}", ("N H", "K H")),
    foreign=OLD_ROPE,
)
_DROPOUT, _BIAS = dropout("attention_dropout"), bias("attention_bias")
_NO_BIAS, _QKV_BIAS = always(use_bias=False), always(use_bias=QKV)
_RMS = normed(RMSNorm, "rms_norm_eps")
_RMS_OFFSET = normed(RMSNorm, "rms_norm_eps", offset=1.0)
_GEMMA_SCALE = scaled("query_pre_attn_scalar", lambda number: number**-0.5)
_TURNED = rotary(interleaved=True)
_LATE = if_used(kinds(late))
_TWO_THETAS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
_ONE_THETA = {"full_attention": "rope_theta", "sliding_attention": "rope_theta"}


def _llama(types: str, *readers: Reader, layout: Any = _PLAIN, **row: Any) -> Family:
    """A row whose one stack has heads, and a dropout of its weights, as in Llama."""
    stack = {x: row.pop(x) for x in ("call", "left_out", "aliases") if x in row}
    readers = (heads, *readers, _DROPOUT)
    return Family(tuple(types.split()), (Stack(_PATH, layout, readers, **stack),), **row)


def _stablelm_layout(fields: Fields, at: Index) -> Any:
    return _EACH_NORMS if fields.flag("qk_layernorm") else _PLAIN


def _cohere_layout(fields: Fields, at: Index) -> Any:
    return _OWN_NORMS if fields.flag("use_qk_norm") else _PLAIN


_PHI = named("q_proj", "k_proj", "v_proj", "dense")
_PHI_NORMS = (*norms("q_layernorm", "k_layernorm"), *norm_biases("q_layernorm", "k_layernorm"))


def _phi_layout(fields: Fields, at: Index) -> Any:
    extras = _PHI_NORMS if fields.flag("qk_layernorm") else ()
    return linear(_PHI, *extras, foreign=OLD_ROPE)


# --- rows ---------------------------------------------------------------------------------------

_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_GEMMA_BOTH_WAYS = {"use_bidirectional_attention": "only Gemma 3 has a rule for its windows then"}
LLAMAS = (
    _llama("llama", rotary(), _BIAS),
    _llama("mistral mixtral", rotary(), _NO_BIAS, same_window),
    _llama("qwen2", rotary(), _QKV_BIAS, window(_LATE)),
    _llama("qwen2_moe", rotary(), bias("qkv_bias", QKV), window(kinds(early))),
    _llama("qwen3", rotary(), _BIAS, _RMS, window(_LATE), layout=_HEAD_NORMS),
    _llama(
        "qwen3_moe",
        rotary(),
        _BIAS,
        _RMS,
        window_if_used,
        layout=_HEAD_NORMS,
        ignored=fields_set("max_window_layers"),
    ),
    _llama(
        "qwen3_next",
        rotary(),
        bias("attention_bias"),
        always(use_gate=True),
        _RMS_OFFSET,
        layout=gated(LLAMA, *norms("q_norm", "k_norm")),
        left_out=without_softmax,
        defaults={"full_attention_interval": 4, "partial_rotary_factor": 0.25},
        ignored=fields_set(
            "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim "
            "linear_num_key_heads linear_num_value_heads"
        ),
    ),
    _llama("gemma", rotary(), _BIAS, refused=_GEMMA_BOTH_WAYS),
    _llama(
        "gemma2",
        rotary(),
        _BIAS,
        _GEMMA_SCALE,
        soft_cap(),
        window(ALTERNATE),
        ignored=fields_set("final_logit_softcapping cache_implementation"),
        refused=_GEMMA_BOTH_WAYS,
    ),
    _llama(
        "gemma3_text",
        rotary_by_kind(BY_PERIOD, _TWO_THETAS),
        _BIAS,
        _GEMMA_SCALE,
        _RMS_OFFSET,
        gemma3_window,
        layout=_HEAD_NORMS,
        call=unless("use_bidirectional_attention", CAUSAL),
        defaults={"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
        refused={"attn_logit_softcapping": "a Gemma 3 caps no logits, whatever it says"},
        ignored=fields_set("_sliding_window_pattern final_logit_softcapping cache_implementation"),
    ),
    _llama(
        "phi3",
        rotary(),
        _NO_BIAS,
        same_window,
        layout=fused("qkv_proj", "o_proj"),
        ignored=fields_set(
            "embd_pdrop full_attn_mod interpolate_factor lm_head_bias "
            "original_max_position_embeddings resid_pdrop"
        ),
        defaults={"partial_rotary_factor": 1.0},
    ),
    _llama(
        "phi",
        rotary(),
        always(use_bias=True),
        normed(LayerNorm, "layer_norm_eps", "qk_layernorm", use_bias=True),
        layout=_phi_layout,
        ignored=fields_set("embd_pdrop resid_pdrop"),
        defaults={"partial_rotary_factor": 0.5},
    ),
    _llama(
        "stablelm",
        rotary(),
        bias("use_qkv_bias", QKV),
        normed(LayerNorm, "layer_norm_eps", "qk_layernorm", per_head=True),
        layout=_stablelm_layout,
        ignored=fields_set("use_parallel_residual"),
        defaults={"partial_rotary_factor": 0.25},
    ),
    _llama(
        "cohere",
        _TURNED,
        _BIAS,
        normed(LayerNorm, "layer_norm_eps", "use_qk_norm", per_head=True),
        layout=_cohere_layout,
        ignored=fields_set("logit_scale"),
    ),
    _llama(
        "cohere2",
        some_layers(BY_PERIOD, "sliding_attention", interleaved=True),
        _BIAS,
        window(BY_PERIOD),
        ignored=fields_set(
            "logit_scale cache_implementation order_of_interleaved_layers "
            "position_embedding_type rotary_pct use_embedding_sharing "
            "use_gated_activation use_parallel_block use_parallel_embedding"
        ),
        defaults={"sliding_window_pattern": 4},
        refused={"use_qk_norm": "a Cohere2 has no norms of queries and keys"},
    ),
    _llama(
        "glm glm4", _TURNED, bias("attention_bias", QKV), defaults={"partial_rotary_factor": 0.5}
    ),
    _llama(
        "nemotron",
        rotary(),
        _BIAS,
        ignored=fields_set("norm_eps"),
        defaults={"partial_rotary_factor": 0.5},
    ),
    _llama(
        "smollm3",
        smollm3_rope,
        _BIAS,
        window(kinds(smollm3_kind)),
        ignored=fields_set("max_window_layers"),
    ),
    _llama(
        "granite",
        rotary(),
        _BIAS,
        scaled("attention_multiplier", float),
        ignored=fields_set("embedding_multiplier logits_scaling residual_multiplier"),
    ),
    _llama(
        "exaone4",
        some_layers(exaone4_kind, "sliding_attention"),
        _NO_BIAS,
        _RMS,
        window(exaone4_kind),
        layout=_HEAD_NORMS,
    ),
    _llama(
        "gpt_oss",
        rotary(),
        _BIAS,
        always(use_sinks=True),
        window(ALTERNATE),
        layout=linear(LLAMA, sinks("sinks"), foreign=OLD_ROPE),
        ignored=fields_set("experts_per_token initial_context_length swiglu_alpha swiglu_limit"),
        defaults={"rope_parameters": _GPT_OSS_ROPE},
    ),
    _llama("olmo", rotary(), _BIAS, clip()),
    _llama(
        "olmo2",
        rotary(),
        _BIAS,
        normed(RMSNorm, "rms_norm_eps", across_heads=True),
        layout=_WIDE_NORMS,
    ),
    _llama(
        "olmo3",
        rotary_by_kind(BY_PERIOD, _ONE_THETA),
        _BIAS,
        normed(RMSNorm, "rms_norm_eps", across_heads=True),
        window(BY_PERIOD),
        layout=_WIDE_NORMS,
        defaults={"rope_theta": 500000.0, "sliding_window_pattern": 4},
    ),
)
