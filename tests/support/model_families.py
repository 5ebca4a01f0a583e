"""Tiny random models of transformers' families: a row each, whose options all matter.

No value is transformers' default where a wrong guess would pass: rotary bases, epsilons, scales,
windows. Heads are wider than hidden / heads where a family allows it, and fewer for keys.
"""

from typing import Any, NamedTuple

T = 130  # tokens: beyond every window
WINDOW = 7
TOKENS = 61  # the vocabulary


class Family(NamedTuple):
    """A model of transformers, and where its attention is.

    Attributes:
        model: the class that is saved.
        config: arguments of its config, nested for a config of several parts.
        attends: names of the classes of its attention modules.
        output: the module within whose output is the attention's; "" is the module itself.
        source: the module within whose first input is the query; "" is the module itself.
        inputs: what it reads; see `model_recordings.py`.
        gain: of its random kernels: the larger, the more its softmax tells keys apart.
    """

    model: str
    config: dict[str, Any]
    attends: tuple[str, ...]
    output: str = "o_proj"
    source: str = ""
    inputs: str = "tokens"
    gain: float = 1.3


ABSENT = object()
LOCAL = ["sliding_attention", "full_attention"]


def rope(theta: float = 53.0, **fields: Any) -> dict[str, Any]:
    """Rotary positions of a base that no family has."""
    return {"rope_type": "default", "rope_theta": theta, **fields}


TWO_ROPES = {"sliding_attention": rope(23.0), "full_attention": rope(97.0)}


def _bert(**changes: Any) -> dict[str, Any]:
    """An encoder's config: 4 heads of 12 features."""
    sizes = {
        "vocab_size": TOKENS,
        "hidden_size": 48,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 140,
        "layer_norm_eps": 0.05,
        "pad_token_id": 0,
    }
    return {k: v for k, v in {**sizes, **changes}.items() if v is not ABSENT}


def _vision(**changes: Any) -> dict[str, Any]:
    """An encoder of images: 4 heads of 12 features, 6 x 5 patches."""
    none = {"vocab_size": ABSENT, "max_position_embeddings": ABSENT, "pad_token_id": ABSENT}
    sizes = {"image_size": (24, 20), "patch_size": 4}
    return _bert(**{**none, **sizes, **changes})


def _bert_like(model: str, name: str, **changes: Any) -> Family:
    return Family(model, _bert(**changes), (f"{name}Attention",), output="output.dense")


_CLIP_TEXT = _bert(num_attention_heads=3, bos_token_id=1, eos_token_id=2)

ENCODERS = {
    "bert": _bert_like("BertModel", "Bert"),
    "roberta": _bert_like("RobertaForMaskedLM", "Roberta"),
    "electra": _bert_like("ElectraForPreTraining", "Electra", embedding_size=20),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        {
            "vocab_size": TOKENS,
            "dim": 48,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 140,
        },
        ("DistilBertSelfAttention",),
        output="out_lin",
    ),
    "albert": Family(
        "AlbertForMaskedLM",
        _bert(embedding_size=20, num_hidden_groups=2),
        ("AlbertAttention",),
        output="dense",
    ),
    "deberta-v2": _bert_like(
        "DebertaV2ForMaskedLM",
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        max_relative_positions=50,
        position_biased_input=False,
        share_att_key=True,
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        _bert(
            layer_norm_eps=ABSENT,
            norm_eps=0.05,
            num_hidden_layers=2,
            layer_types=LOCAL,
            local_attention=10,
            rope_parameters=TWO_ROPES,
            cls_token_id=1,
            sep_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
        ),
        ("ModernBertAttention",),
        output="Wo",
    ),
    "roformer": _bert_like("RoFormerForMaskedLM", "RoFormer", embedding_size=20),
    "esm2": _bert_like(
        "EsmForMaskedLM", "Esm", position_embedding_type="rotary", mask_token_id=3, rope_theta=53.0
    )._replace(source="self"),
}

IMAGES = {
    "vit": Family("ViTForImageClassification", _vision(), ("ViTAttention",)),
    "dinov2": Family("Dinov2Model", _vision(image_size=20), ("Dinov2Attention",)),
    "clip": Family(
        "CLIPModel",
        {"text_config": _CLIP_TEXT, "vision_config": _vision(image_size=20), "projection_dim": 8},
        ("CLIPAttention",),
        output="out_proj",
        inputs="text and images",
    ),
    "siglip": Family(
        "SiglipModel",
        {"text_config": _CLIP_TEXT, "vision_config": _vision(image_size=20)},
        ("SiglipAttention", "MultiheadAttention"),
        output="",
        inputs="text and images",
    ),
    "swin": Family(
        "SwinForImageClassification",
        {
            "image_size": 24,
            "patch_size": 2,
            "embed_dim": 24,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 3,
        },
        ("SwinAttention",),
    ),
    "beit": Family(
        "BeitForImageClassification",
        _vision(use_relative_position_bias=True, image_size=20),
        ("BeitAttention",),
    ),
    "dinov3": Family(
        "DINOv3ViTModel",
        _vision(rope_theta=53.0, num_register_tokens=3),
        ("DINOv3ViTAttention",),
    ),
}
for _name in IMAGES:
    if IMAGES[_name].inputs == "tokens":
        IMAGES[_name] = IMAGES[_name]._replace(inputs="images")

_T5 = {
    "vocab_size": TOKENS,
    "d_model": 40,
    "d_kv": 12,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 50,
    "decoder_start_token_id": 0,
    "layer_norm_epsilon": 0.05,
}
_PAIR = {
    "vocab_size": TOKENS,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
PAIRS = {
    "t5": Family(
        "T5ForConditionalGeneration", _T5, ("T5Attention",), "o", inputs="pairs", gain=0.8
    ),
    "mt5": Family(
        "MT5ForConditionalGeneration", _T5, ("MT5Attention",), "o", inputs="pairs", gain=0.8
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        {**_PAIR, "max_position_embeddings": 140},
        ("BartAttention",),
        "out_proj",
        inputs="pairs",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        {
            **_PAIR,
            "num_mel_bins": 8,
            "max_source_positions": 50,
            "max_target_positions": 140,
        },
        ("WhisperAttention",),
        "out_proj",
        inputs="sound",
    ),
}
