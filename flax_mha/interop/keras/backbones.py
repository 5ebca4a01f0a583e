"""KerasHub's models, one row each: where their attention layers lie, and what they give to each.

A KerasHub file describes the model, not its attention layers; the model makes them. A row says, as
the model's `__init__` and its blocks' `build` do, which class stands where and what is given to the
layer that is not a field of the model under the same name.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax_mha.interop.keras.arguments import Arguments

Given = Callable[[Arguments, int], dict[str, Any]]


def as_it_is(fields: Arguments, number: int) -> dict[str, Any]:
    return {}


class Part(NamedTuple):
    """The attention layers at one place of a model's blocks.

    `path` below the model's, in which `#` stands for the number that Keras gives to the block: ""
    for the first, "_1" for the next. `row` is of classes.ROWS; `given` what the layer of a number
    is made with; `table` the path of the layer whose table of distances it uses.
    """

    path: str
    row: str
    given: Given = as_it_is
    table: Callable[[Arguments, int], str] | None = None

    def number(self, path: str) -> int | None:
        """The block's number if this part lies there."""
        match = re.fullmatch(self.path.replace("#", r"(?:_(\d+))?"), path)
        return int((match.groups() or [0])[0] or 0) if match else None


class Model(NamedTuple):
    """A model's parts, and its fields that no attention layer is made with.

    `asked` where each call of the whole says whether its attention is causal.
    """

    parts: tuple[Part, ...]
    others: frozenset[str]
    asked: bool = False


EVERY = "name trainable dtype vocabulary_size num_layers intermediate_dim layer_norm_epsilon"
MOE = (
    "num_experts top_k moe_intermediate_dim shared_expert_intermediate_dim norm_top_k_prob "
    "decoder_sparse_step mlp_only_layers output_router_logits router_aux_loss_coefficient "
    "router_aux_loss_coef router_jitter_noise tie_word_embeddings"
)


def model(*parts: Part, others: str = "") -> Model:
    return Model(parts, frozenset(f"{EVERY} {others}".split()))


def decoder(block: str, row: str, given: Given = as_it_is, others: str = "") -> Model:
    """A model of blocks of one kind."""
    return model(Part(f"layers/{block}", row, given), others=others)


def _qwen3_epsilon(fields: Arguments, number: int) -> dict[str, Any]:
    """The decoder does not hand on the model's: the layer's own default counts."""
    return {"layer_norm_epsilon": 1e-5}


def _qwen3_moe_epsilon(fields: Arguments, number: int) -> dict[str, Any]:
    return {"layer_norm_epsilon": 1e-6}


def _gemma(fields: Arguments, number: int) -> dict[str, Any]:
    """Every second layer is local."""
    local = fields["use_sliding_window_attention"] and number % 2 == 0
    return _gemma_block(fields) | {"use_sliding_window_attention": local}


def _gemma_block(fields: Arguments) -> dict[str, Any]:
    """The blocks of Gemma and Gemma 3 hand on neither the scale nor the epsilon."""
    why = "keras_hub 0.32 scales by 1 / sqrt(head_dim) all the same: say which `scale` it is to be"
    fields.only("query_head_dim_normalize", True, why)
    cap = fields["attention_logit_soft_cap"]
    fixed = {"query_head_dim_normalize": True, "layer_norm_epsilon": 1e-6}
    return fixed | {"logit_soft_cap": cap}


def _gemma3(fields: Arguments, number: int) -> dict[str, Any]:
    """Five local layers, then a global one."""
    local = fields["use_sliding_window_attention"] and number % 6 < 5
    factors = fields["local_rope_scaling_factor"], fields["global_rope_scaling_factor"]
    why = "tokens of an image attend to each other in both directions"
    fields.only("vision_encoder", None, why)
    both_ways = fields["use_bidirectional_attention"]
    if both_ways and fields["use_sliding_window_attention"]:
        why = "a window of local layers is then half to the left and half to the right"
        fields.refused["use_bidirectional_attention"] = why
        both_ways = False
    return _gemma_block(fields) | {
        "use_bidirectional_attention": both_ways,
        "use_sliding_window_attention": local,
        "rope_wavelength": 10000.0 if local else 1000000.0,
        "rope_scaling_factor": factors[0] if local else factors[1],
    }


def _gpt_oss(fields: Arguments, number: int) -> dict[str, Any]:
    """Every second layer is local."""
    window = fields["sliding_window"]
    return {"sliding_window": window if number % 2 == 1 else None}


def _falcon(fields: Arguments, number: int) -> dict[str, Any]:
    return {"num_heads": fields["num_attention_heads"]}


def _image(fields: Arguments, number: int) -> dict[str, Any]:
    return {"dropout": fields["attention_dropout"]}


def _t5(fields: Arguments, number: int) -> dict[str, Any]:
    """The encoder's blocks and the decoder's are of one class, numbered in this order."""
    return {"is_decoder": number >= fields["num_layers"]}


def _t5_table(fields: Arguments, number: int) -> str:
    """The first block's table, which its stack hands on from layer to layer."""
    owner = fields["num_layers"] if number >= fields["num_layers"] else 0
    return f"layers/t5_transformer_layer{f'_{owner}' if owner else ''}/self_attention"


SELF, CROSS = "_self_attention_layer", "_cross_attention_layer"
CACHED, OWN = "CachedMultiHeadAttention", "MultiHeadAttention"
IMAGE = "MultiHeadAttention, of images"
PATCHES = "image_shape patch_size dropout_rate"
WHISPER = "WhisperCachedMultiHeadAttention"
ENCODER = Part(f"layers/transformer_encoder#/{SELF}", OWN)
DECODER = Part(f"layers/transformer_decoder#/{SELF}", CACHED)
GEMMA = "use_post_ffw_norm use_post_attention_norm final_logit_soft_cap"
SEQUENCE = "max_sequence_length num_segments embedding_dim"
BLOCK = (
    "activation normalize_first kernel_initializer bias_initializer decoder_sequence_shape "
    "encoder_sequence_shape"
)
LLAMA = decoder(f"llama_transformer_decoder#/{SELF}", "LlamaAttention", others=MOE)
ENCODERS = model(ENCODER, others=SEQUENCE)
DECODERS = model(DECODER, others=SEQUENCE)

# By the registered name, behind "keras_hub>".
MODELS: Mapping[str, Model] = {
    "LlamaBackbone": LLAMA,
    "Llama3Backbone": LLAMA,
    "MistralBackbone": decoder(f"mistral_transformer_decoder#/{SELF}", "CachedMistralAttention"),
    "MixtralBackbone": decoder(
        f"mixtral_transformer_decoder#/{SELF}", "CachedMixtralAttention", others=MOE
    ),
    "QwenBackbone": decoder(f"qwen_transformer_decoder#/{SELF}", "QwenAttention", others=MOE),
    "QwenMoeBackbone": decoder(
        f"qwen_moe_transformer_decoder#/{SELF}", "QwenMoeAttention", others=MOE
    ),
    "Qwen3Backbone": decoder(
        f"qwen3_transformer_decoder#/{SELF}", "Qwen3Attention", _qwen3_epsilon, MOE
    ),
    "Qwen3MoeBackbone": decoder(
        f"qwen3_moe_transformer_decoder#/{SELF}", "Qwen3MoeAttention", _qwen3_moe_epsilon, MOE
    ),
    "GemmaBackbone": decoder(
        "gemma_decoder_block#/attention", "CachedGemmaAttention", _gemma, GEMMA
    ),
    "Gemma3Backbone": decoder(
        "gemma3_decoder_block#/attention",
        "CachedGemma3Attention",
        _gemma3,
        f"{GEMMA} image_size is_embedding_model pooling_intermediate_dim embedding_dim",
    ),
    "GptOssBackbone": decoder(
        "gpt_oss_transformer_decoder#/self_attention_layer", "GptOssAttention", _gpt_oss, MOE
    ),
    "Phi3Backbone": decoder("phi3_decoder#/attention", "Phi3Attention"),
    "FalconBackbone": decoder(
        "falcon_transformer_decoder#/attention_layer",
        "FalconAttention",
        _falcon,
        "feedforward_dropout_rate",
    ),
    "BloomBackbone": decoder(f"bloom_decoder#/{SELF}", "BloomAttention"),
    "GPT2Backbone": DECODERS,
    "OPTBackbone": DECODERS,
    "BertBackbone": ENCODERS,
    "RobertaBackbone": ENCODERS,
    "XLMRobertaBackbone": ENCODERS,
    "DistilBertBackbone": ENCODERS,
    "AlbertBackbone": model(ENCODER, others=f"{SEQUENCE} num_groups num_inner_repetitions"),
    "ElectraBackbone": model(ENCODER, others=f"{SEQUENCE} vocab_size"),
    "BartBackbone": model(
        ENCODER,
        DECODER,
        Part(f"layers/transformer_decoder#/{CROSS}", OWN),
        others=SEQUENCE,
    ),
    "WhisperBackbone": model(
        Part(f"layers/whisper_encoder#/{SELF}", f"{WHISPER}, both ways"),
        Part(f"layers/whisper_decoder#/{SELF}", WHISPER),
        Part(f"layers/whisper_decoder#/{CROSS}", f"{WHISPER}, both ways"),
        others="num_mels max_encoder_sequence_length max_decoder_sequence_length",
    ),
    "T5Backbone": model(
        Part("layers/t5_transformer_layer#/self_attention", "T5MultiHeadAttention", _t5, _t5_table),
        Part("layers/t5_transformer_layer#/cross_attention", "T5MultiHeadAttention, cross"),
        others="activation use_gated_activation tie_embedding_weights",
    ),
    "ViTBackbone": model(
        Part("layers/vi_t_encoder/encoder_layers/vi_t_encoder_block#/mha", IMAGE, _image),
        others=f"{PATCHES} mlp_dim use_mlp_bias use_class_token use_patch_bias",
    ),
    "DeiTBackbone": model(
        Part("layers/dei_t_encoder/encoder_layers/dei_t_encoder_block#/mha", IMAGE, _image),
        others=PATCHES,
    ),
    "TransformerEncoder": model(Part(SELF, OWN), others=BLOCK),
    "TransformerDecoder": model(Part(SELF, CACHED), Part(CROSS, OWN), others=BLOCK)._replace(
        asked=True
    ),
}
