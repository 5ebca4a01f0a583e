"""What else a model of a family may say in config.json: the family, and the fields that it changes.

Each loads and agrees with transformers, or is refused by a field's name.
"""

from typing import Any

from decoder_families import DECODERS
from model_families import ENCODERS, IMAGES, LOCAL, PAIRS, WINDOW, Family, rope

_LINEAR = {"rope_parameters": rope(rope_type="linear", factor=2.5)}
_DYNAMIC = {"rope_parameters": rope(rope_type="dynamic", factor=2.5)}
_YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 40}
_FULL = ["full_attention", "full_attention"]

CHANGES = [
    ("bert", {"is_decoder": True}),
    ("roberta", {"is_decoder": True}),
    ("esm2", {"position_embedding_type": "absolute"}),
    ("esm2", {"emb_layer_norm_before": True}),
    ("modernbert", {"attention_bias": True}),
    ("modernbert", {"layer_types": _FULL}),
    ("albert", {"inner_group_num": 2}),
    ("electra", {"embedding_size": 48}),
    ("vit", {"qkv_bias": False}),
    ("dinov2", {"qkv_bias": False}),
    ("swin", {"qkv_bias": False}),
    ("beit", {"use_relative_position_bias": False}),
    ("dinov3", {"key_bias": True}),
    ("dinov3", {"query_bias": False, "value_bias": False, "proj_bias": False}),
    ("dinov3", {"num_register_tokens": 0}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"reorder_and_upcast_attn": True}),
    ("gpt-neo", {"attention_types": [[["local"], 2]]}),
    ("gpt-neox", {"attention_bias": False}),
    ("gpt-neox", {"rope_parameters": rope(partial_rotary_factor=1.0)}),
    ("gptj", {"rotary_dim": 12}),
    ("opt", {"enable_bias": False}),
    ("falcon", {"alibi": True}),
    ("falcon", {"bias": True}),
    ("falcon", {"multi_query": False}),
    ("falcon-40b", {"num_kv_heads": 4}),
    ("falcon-40b", {"alibi": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": None}),
    ("llama", {"head_dim": None}),
    ("llama", _LINEAR),
    ("llama", _DYNAMIC),
    ("llama", {"rope_parameters": rope(**_YARN)}),
    ("llama", {"rope_parameters": rope(**_YARN, attention_factor=1.3)}),
    ("llama", {"rope_parameters": rope(**_YARN, mscale=0.8, mscale_all_dim=0.4)}),
    ("llama", {"pretraining_tp": 2}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"head_dim": None}),
    ("qwen2", {"use_sliding_window": False, "layer_types": _FULL}),
    ("qwen2", {"layer_types": None, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True}),
    ("gemma", {"attention_bias": True}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"layer_types": None}),
    ("gemma3", {"use_bidirectional_attention": True}),
    ("phi3", {"sliding_window": None, "rope_parameters": rope(partial_rotary_factor=0.5)}),
    ("phi2", {"qk_layernorm": True}),
    ("stablelm", {"use_qkv_bias": False, "num_key_value_heads": 4}),
    ("cohere", {"attention_bias": True}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": None}),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("exaone4", {"layer_types": None}),
    ("exaone4", {"sliding_window": None, "layer_types": _FULL}),
    ("gpt-oss", {"attention_bias": False}),
    ("qwen3-next", {"attention_bias": True}),
    ("olmo", {"clip_qkv": None}),
    ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
    ("gemma4", {"attention_k_eq_v": True}),
    ("gemma4", {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("llama4", {"use_qk_norm": False}),
    ("llama4", {"attn_temperature_tuning": False}),
    ("llama4", {"no_rope_layers": [0, 1]}),
    ("deepseek-v3", {"q_lora_rank": None}),
    ("deepseek-v3", {"rope_interleave": False}),
    ("deepseek-v3", {"rope_parameters": rope()}),
    ("deepseek-v3", {"attention_bias": True}),
    ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("t5", {"num_decoder_layers": 3}),
    ("bart", {"scale_embedding": True}),
]
# With the field that the refusal names.
REFUSED = [
    (
        "gemma4",
        {"layer_types": LOCAL * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
        "num_kv_shared_layers",
    ),
    ("roformer", {"rotary_value": True}, "rotary_value"),
    (
        "beit",
        {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
        "use_shared_relative_position_bias",
    ),
    ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln"),
    ("mpt", {"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm"),
    ("llama", {"rope_parameters": rope(partial_rotary_factor=0.5)}, "partial_rotary_factor"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3", {"attn_logit_softcapping": 1.5}, "attn_logit_softcapping"),
    ("gemma4", {"use_bidirectional_attention": "all"}, "is_causal|use_bidirectional_attention"),
]
# Other classes of a family's model, whose arrays have other names.
CLASSES = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaModel",
    "electra": "ElectraForMaskedLM",
    "distilbert": "DistilBertForSequenceClassification",
    "albert": "AlbertModel",
    "modernbert": "ModernBertModel",
    "roformer": "RoFormerModel",
    "esm2": "EsmModel",
    "vit": "ViTModel",
    "dinov2": "Dinov2ForImageClassification",
    "swin": "SwinModel",
    "beit": "BeitModel",
    "gpt2": "GPT2Model",
    "gpt-neo": "GPTNeoModel",
    "gpt-neox": "GPTNeoXModel",
    "gptj": "GPTJModel",
    "opt": "OPTModel",
    "bloom": "BloomModel",
    "mpt": "MptModel",
    "falcon": "FalconModel",
    "llama": "LlamaModel",
    "mistral": "MistralForSequenceClassification",
    "qwen3": "Qwen3ForTokenClassification",
    "gemma3": "Gemma3TextModel",
    "qwen2-vl": "Qwen2VLModel",
    "t5": "T5Model",
    "bart": "BartModel",
    "whisper": "WhisperModel",
}
_PARTS = {
    "CLIPTextModel": ("clip", "text_config"),
    "CLIPVisionModel": ("clip", "vision_config"),
    "SiglipTextModel": ("siglip", "text_config"),
    "SiglipVisionModel": ("siglip", "vision_config"),
}
_CROSS = {"is_decoder": True, "add_cross_attention": True}
_BASES = {**ENCODERS, **IMAGES, **DECODERS, **PAIRS}


def _changed(base: str, changes: dict[str, Any]) -> Family:
    family = _BASES[base]
    config = {**family.config, **changes}
    if isinstance(changes.get("attn_config"), dict):
        config["attn_config"] = {**family.config["attn_config"], **changes["attn_config"]}
    return family._replace(config=config)


def _spelled(base: str, changes: dict[str, Any]) -> str:
    said = ", ".join(f"{name}={value}" for name, value in changes.items())
    return f"{base} {said[-80:]}"


AGREE = {_spelled(*row): _changed(*row) for row in CHANGES}
REFUSE = {_spelled(*row): (_changed(*row), field) for *row, field in REFUSED}
AGREE |= {model: _BASES[base]._replace(model=model) for base, model in CLASSES.items()}
AGREE |= {
    model: _BASES[base]._replace(
        model=model,
        config=_BASES[base].config[part],
        inputs="tokens" if part == "text_config" else "images",
    )
    for model, (base, part) in _PARTS.items()
}
AGREE["T5EncoderModel"] = _BASES["t5"]._replace(model="T5EncoderModel", inputs="tokens")
REFUSE["BertLMHeadModel beside an encoder"] = (
    _changed("bert", _CROSS)._replace(model="BertLMHeadModel", inputs="tokens beside an encoder"),
    "add_cross_attention",
)
REFUSE["GPT2LMHeadModel beside an encoder"] = (
    _changed("gpt2", _CROSS)._replace(inputs="tokens beside an encoder"),
    "add_cross_attention",
)
