"""Encoders and decoders in one model, which are joined by layers that attend to the encoder."""

from typing import Any

from flax_mha.interop.huggingface.families.layouts import CROSS, OUT, linear, named, table
from flax_mha.interop.huggingface.family import CAUSAL, Family, Index, Reader, Stack, fields_set
from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.huggingface.readers import always, dropout, heads_by
from flax_mha.positions import RelativeBias

_T5 = named("q", "k", "v", "o")
_TABLE = "relative_attention_bias.weight"
_TO_ENCODER = "its value is the encoder's output"


# --- T5 ------------------------------------------------------------------------------------------


def _t5(path: str, count: str, bidirectional: bool | None) -> Stack:
    """One stack; `bidirectional` says of its distances, None that it attends to the encoder."""
    is_cross = bidirectional is None
    heads = heads_by("num_heads", "d_model", "d_kv")
    plain = always(use_bias=False, scale=1.0)
    readers: tuple[Reader, ...] = (heads, plain, dropout("dropout_rate"))
    if is_cross:
        # files of the first T5s hold a table here, which nothing reads
        layout = linear(_T5, foreign=("relative_attention_bias",), equal=CROSS)
        return Stack(path, layout, readers, {}, count, "d_model", remark=_TO_ENCODER)
    layout = linear(_T5, table(_TABLE))
    call = {} if bidirectional else CAUSAL
    readers = (*readers, _distances(bool(bidirectional)))
    return Stack(path, layout, readers, call, count, "d_model", shared=(_TABLE,))


def _distances(bidirectional: bool) -> Reader:
    def read(fields: Fields, at: Index) -> dict[str, Any]:
        number = fields.size("relative_attention_num_buckets")
        longest = fields.size("relative_attention_max_distance")
        return {"position": RelativeBias(number, longest, bidirectional)}

    return read


def _decoder_layers(fields: Fields) -> list[Index]:
    """As many as the encoder has, where no field of its own says otherwise."""
    name = "num_decoder_layers" if fields.has("num_decoder_layers") else "num_layers"
    number = fields.size(name)
    if number > 10_000:
        fields.fail(name, "at most 10000", number)
    return [(layer,) for layer in range(number)]


# --- BART and its like ---------------------------------------------------------------------------


def _bart(types: str, biases: Any, ignored: str = "") -> Family:
    return Family(
        tuple(types.split()),
        (
            _side("encoder.layers.{}.self_attn", "encoder", biases, {}),
            _side("decoder.layers.{}.self_attn", "decoder", biases, CAUSAL),
            _side("decoder.layers.{}.encoder_attn", "decoder", biases, {}, _TO_ENCODER),
        ),
        ignored=_BART_FIELDS | fields_set(ignored),
    )


def _side(path: str, side: str, biases: Any, call: Any, remark: str = "") -> Stack:
    readers = (
        heads_by(f"{side}_attention_heads", "d_model"),
        always(use_bias=biases),
        dropout("attention_dropout"),
    )
    layout = linear(OUT, equal=CROSS if remark else linear(OUT).equal)
    return Stack(path, layout, readers, call, f"{side}_layers", "d_model", remark=remark)


_BART_FIELDS = fields_set(
    """
    activation_dropout activation_function classif_dropout decoder_ffn_dim decoder_layerdrop dropout
    encoder_ffn_dim encoder_layerdrop init_std max_position_embeddings num_hidden_layers
    scale_embedding normalize_before normalize_embedding add_final_layer_norm
    add_bias_logits static_position_embeddings extra_pos_embeddings force_bos_token_to_be_generated
    decoder_vocab_size share_encoder_decoder_embeddings
    """
)

PAIRS = (
    Family(
        ("t5", "mt5"),
        (
            _t5("encoder.block.{}.layer.0.SelfAttention", "num_layers", True),
            _t5("decoder.block.{}.layer.0.SelfAttention", "", False)._replace(
                layers=_decoder_layers
            ),
            _t5("decoder.block.{}.layer.1.EncDecAttention", "", None)._replace(
                layers=_decoder_layers
            ),
        ),
        ignored=fields_set(
            "d_ff dense_act_fn feed_forward_proj is_gated_act layer_norm_epsilon n_positions "
            "output_past scale_decoder_outputs"
        ),
    ),
    _bart("bart mbart marian pegasus", True),
    _bart(
        "whisper",
        ("query", "value", "attention_output"),
        "apply_spec_augment classifier_proj_size mask_feature_length mask_feature_min_masks "
        "mask_feature_prob mask_time_length mask_time_min_masks mask_time_prob "
        "max_source_positions "
        "max_target_positions median_filter_width num_mel_bins use_weighted_layer_sum",
    ),
)
