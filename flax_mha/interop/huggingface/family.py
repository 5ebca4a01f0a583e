"""What a row of the table says: where a family's layers are, and how config.json describes them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from flax_mha.interop.huggingface.fields import Fields
from flax_mha.interop.torch.models import Layout

Index: TypeAlias = tuple[int, ...]  # of a layer: one number, or that of a stage and of a block
# Some arguments of a layer's config, read out of the fields.
Reader: TypeAlias = Callable[[Fields, Index], Mapping[str, Any]]

CAUSAL: Mapping[str, Any] = {"use_causal_mask": True}


class Stack(NamedTuple):
    """Attention layers of one kind that stand in a row.

    Attributes:
        path: the end of such a module's path, with `{}` for each number.
        layout: its arrays, below that path; or a function of the fields and the index.
        readers: what the fields say of the config; together all of its arguments.
        call: what each call passes; or a function of the fields and the index.
        layers: the field that tells how many there are; or a function that gives every index.
        features: the field that tells the query's features D; or a function of fields and index.
        left_out: why a layer is not to be read, where some are not; or None.
        shared: arrays that the first layer's module holds for all.
        aliases: names that stand for others, where one array serves twice.
        remark: what a caller must know besides.
    """

    path: str
    layout: Layout | Callable[[Fields, Index], Layout]
    readers: tuple[Reader, ...]
    call: Mapping[str, Any] | Callable[[Fields, Index], Mapping[str, Any]] = CAUSAL
    layers: str | Callable[[Fields], list[Index]] = "num_hidden_layers"
    features: str | Callable[[Fields, Index], int] = "hidden_size"
    left_out: Callable[[Fields, Index], str | None] | None = None
    shared: tuple[str, ...] = ()
    aliases: Callable[[Fields, Index], Mapping[str, str]] | None = None
    remark: str = ""


class Tower(NamedTuple):
    """A model within a model, whose fields are an object within config.json.

    Attributes:
        field: that object.
        model_type: its family, where it names none.
        prefix: a pattern of what stands before its layers' paths.
        remark: what a caller must know of its layers.
        or_all: whether older files have its fields beside the others, not in an object.
    """

    field: str
    model_type: str
    prefix: str
    remark: str = ""
    or_all: bool = False


class Family(NamedTuple):
    """A row: a model type whose attention can be loaded.

    Attributes:
        types: the values of `model_type`.
        stacks: its layers.
        towers: or the models that it is made of.
        defaults: what transformers has where a field is absent.
        names: its own names of fields, as `{"num_attention_heads": "n_head"}`.
        ignored: its own fields that concern no attention.
        refused: fields that no layer here can serve, where they are set, with the reason.
    """

    types: tuple[str, ...]
    stacks: tuple[Stack, ...] = ()
    towers: tuple[Tower, ...] = ()
    defaults: Mapping[str, Any] = {}
    names: Mapping[str, str] = {}
    ignored: frozenset[str] = frozenset()
    refused: Mapping[str, str] = {}


def fields_set(names: str) -> frozenset[str]:
    """The names of fields, as one text."""
    return frozenset(names.split())


# Of every model: its files, words, training, outputs, blocks and experts, not its attention.
COMMON = fields_set(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
    attn_implementation auto_map dtype model_max_length model_type torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16
    use_cache use_return_dict
    bos_token_id cls_token_id decoder_start_token_id eos_token_id forced_bos_token_id
    forced_decoder_ids forced_eos_token_id mask_token_id pad_token_id prefix sep_token_id
    tokenizer_class vocab_size
    hidden_act hidden_activation intermediate_size initializer_factor initializer_range
    layer_norm_eps mlp_bias rms_norm_eps hidden_dropout hidden_dropout_prob
    max_position_embeddings type_vocab_size classifier_dropout classifier_dropout_prob
    finetuning_task gradient_checkpointing id2label is_decoder is_encoder_decoder label2id
    num_labels problem_type pruned_heads task_specific_params
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate suppress_tokens
    temperature tf_legacy_loss top_k top_p typical_p
    chunk_size_feed_forward output_attentions output_hidden_states pretraining_tp
    cross_attention_hidden_size tie_encoder_decoder tie_word_embeddings
    decoder_sparse_step moe_intermediate_size norm_topk_prob num_experts num_experts_per_tok
    num_local_experts mlp_only_layers output_router_logits router_aux_loss_coef
    router_jitter_noise shared_expert_intermediate_size
    out_features out_indices stage_names
    """
)
# What a row that does not read it has not got; files say so nonetheless, by false or 0.
OFF = fields_set(
    """
    add_cross_attention attention_bias attn_logit_softcapping clip_qkv qk_layernorm qkv_bias
    rotary_value use_bidirectional_attention use_qk_norm use_sliding_window
    """
)
