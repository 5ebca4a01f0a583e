"""KerasHub's attention classes, one row each: what its arguments say in this package's words.

Written against keras_hub 0.32, class by class from its `build` and `call`. A row is a function of
what the layer was made with; `hidden_dim` is the number of the queries' features. Projections and
their arrays' axes are read off the file (layers.py, places.py); `kernel_axes` tells what sizes may
not.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from flax_mha.interop.keras.arguments import Arguments
from flax_mha.norms import RMSNorm
from flax_mha.positions import (
    Alibi,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RelativeBias,
    Rotary,
    Scaling,
    YarnScaling,
)

Words = dict[str, Any]
CAUSAL: Words = {"use_causal_mask": True}
INPUTS = ("query", "key", "value")
# The dropout behind the weights' product with the values drops features of the context.
_OF_CONTEXT = "it drops features of the context, which is not done here (in training alone)"


def always(words: Words) -> Callable[[Arguments], Words]:
    return lambda a: words


class Row(NamedTuple):
    """One attention class: its config's fields, and what every call of it passes."""

    config: Callable[[Arguments], Words]
    call: Callable[[Arguments], Words] = always(CAUSAL)
    kernel_axes: str = "DNH"


def grouped(a: Arguments, key_dim: int | None = None) -> Words:
    """The sizes of a layer of grouped heads."""
    N = a["num_query_heads"]
    K, H = a["num_key_value_heads"], key_dim or a["hidden_dim"] // N
    return {"num_heads": N, "num_kv_heads": K, "key_dim": H, "use_bias": False}


def linear(factor: float) -> Scaling | None:
    return None if factor == 1 else LinearScaling(factor)


def llama(a: Arguments) -> Words:
    a.only("dropout", 0, _OF_CONTEXT)
    why = "keras_hub 0.32 stores it and turns by the plain positions; older ones divided them"
    a.only("rope_position_scaling_factor", 1, why)
    position = Rotary(a["rope_max_wavelength"], scaling=_llama3(a))
    return grouped(a) | {"position": position}


def _llama3(a: Arguments) -> Scaling | None:
    factor, length = a["rope_frequency_adjustment_factor"], a["rope_pretraining_sequence_length"]
    low, high = a["rope_low_freq_factor"], a["rope_high_freq_factor"]
    return None if low is None else Llama3Scaling(factor, low, high, length)


def _turned(a: Arguments) -> Words:
    """Rotary positions, divided by a factor."""
    scaling = linear(a["rope_scaling_factor"])
    return {"position": Rotary(a["rope_max_wavelength"], scaling=scaling)}


def mistral(a: Arguments) -> Words:
    a.only("dropout", 0, _OF_CONTEXT)
    window = {"sliding_window": a["sliding_window"]}
    return grouped(a, a["head_dim"]) | _turned(a) | window


def mixtral(a: Arguments) -> Words:
    a.only("dropout", 0, _OF_CONTEXT)
    return grouped(a) | _turned(a) | {"sliding_window": a["sliding_window"]}


def _window(a: Arguments) -> Words:
    size, used = a["sliding_window_size"], a["use_sliding_window_attention"]
    return {"sliding_window": size if used else None}


def qwen2(a: Arguments) -> Words:
    a.only("dropout", 0, _OF_CONTEXT)
    return grouped(a) | _turned(a) | _window(a) | {"use_bias": INPUTS}


def qwen3(a: Arguments) -> Words:
    a.only("dropout", 0, _OF_CONTEXT)
    norm = RMSNorm(epsilon=a["layer_norm_epsilon"])
    window = {"sliding_window": a["sliding_window_size"] or None}
    return grouped(a, a["head_dim"]) | _turned(a) | window | {"qk_norm": norm}


def gemma(a: Arguments) -> Words:
    """Gemma interleaves features after turning them: of queries and keys alike, which cancels."""
    N, H = a["num_query_heads"], a["head_dim"]
    usual = a["query_head_dim_normalize"]
    return (
        grouped(a, H)
        | _window(a)
        | {
            "scale": None if usual else 1 / math.sqrt(a["hidden_dim"] // N),
            "soft_cap": a["logit_soft_cap"],
            "dropout": a["dropout"],
            "position": Rotary(10000.0),
        }
    )


def gemma3(a: Arguments) -> Words:
    norm = RMSNorm(epsilon=a["layer_norm_epsilon"], offset=1.0)
    position = Rotary(a["rope_wavelength"], scaling=linear(a["rope_scaling_factor"]))
    both_ways = a["use_bidirectional_attention"]
    if both_ways and a["use_sliding_window_attention"]:
        a.refused["use_bidirectional_attention"] = (
            "with a sliding window it reaches half a window to the left and to the right"
        )
    words = {"position": position, "qk_norm": norm if a["use_query_key_norm"] else None}
    return gemma(a) | words


def _gemma3_call(a: Arguments) -> Words:
    return {} if a["use_bidirectional_attention"] else CAUSAL


def gpt_oss(a: Arguments) -> Words:
    a.only("dropout", 0, _OF_CONTEXT)
    sizes = grouped(a, a["head_dim"])
    window, H, factor = a["sliding_window"], sizes["key_dim"], a["rope_scaling_factor"]
    growth = 0.1 * math.log(factor) + 1
    yarn = YarnScaling(factor, 4096, attention_factor=growth, truncate=False)
    scaling = None if factor == 1 else yarn
    position = Rotary(a["rope_max_wavelength"], H // 2 * 2, scaling=scaling)
    return sizes | {
        "position": position,
        "sliding_window": window + 1 if window else None,  # a query sees `window` keys before it
        "use_bias": True,
        "use_sinks": True,
    }


def phi3(a: Arguments) -> Words:
    a.only("dropout", 0, _OF_CONTEXT)
    return grouped(a) | {"position": Rotary(a["rope_max_wavelength"], scaling=_long(a))}


def _long(a: Arguments) -> Scaling | None:
    """LongRoPE, which KerasHub calls "su": one list of factors for texts up to a length."""
    kind, length = a["rope_scaling_type"], a["pretraining_sequence_length"]
    lists = a["rope_scaling_short_factor"], a["rope_scaling_long_factor"]
    factor = a["max_sequence_length"] / length
    if kind is None:
        return None
    if kind != "su" or a.max_length is None:
        a.refused["rope_scaling_type"] = f"its factors are for texts up to {length} or for longer"
        a.refused["rope_scaling_type"] += ": pass `max_length=` to `load_attention`"
        return None
    return LongRopeScaling(tuple(lists[a.max_length > length]), factor, length)


def plain(a: Arguments) -> Words:
    """Keras's own layer, with a cache or without, as KerasHub's encoders and decoders make it."""
    N = a["num_heads"]
    return {"num_heads": N, "key_dim": a["hidden_dim"] // N, "dropout": a["dropout"]}


def image(a: Arguments) -> Words:
    return plain(a) | {"use_bias": a["use_mha_bias"]}


def whisper(a: Arguments) -> Words:
    return plain(a) | {"use_bias": ("query", "value", "attention_output")}


def bloom(a: Arguments) -> Words:
    a.only("dropout", 0, "it drops features of the output too (in training alone)")
    N = a["num_heads"]
    return {"num_heads": N, "key_dim": a["hidden_dim"] // N, "position": Alibi()}


def falcon(a: Arguments) -> Words:
    """Its logits are scaled after ALiBi is added."""
    N, rate = a["num_heads"], a["attention_dropout_rate"]
    H = a["hidden_dim"] // N
    return {"num_heads": N, "key_dim": H, "dropout": rate, "position": Alibi(1 / math.sqrt(H))}


def t5(a: Arguments) -> Words:
    position = RelativeBias(32, 128, bidirectional=not a["is_decoder"])
    return t5_cross(a) | {"position": position}


def t5_cross(a: Arguments) -> Words:
    H = a["key_value_dim"] or a["hidden_dim"] // a["num_heads"]
    sizes = {"num_heads": a["num_heads"], "key_dim": H, "use_bias": False, "scale": 1.0}
    return sizes | {"dropout": a["dropout"]}


NEITHER = always({})
ROWS = {
    "LlamaAttention": Row(llama),
    "CachedMistralAttention": Row(mistral),
    "CachedMixtralAttention": Row(mixtral),
    "QwenAttention": Row(qwen2),
    "QwenMoeAttention": Row(qwen2),
    "Qwen3Attention": Row(qwen3),
    "Qwen3MoeAttention": Row(qwen3),
    "CachedGemmaAttention": Row(gemma, kernel_axes="NDH"),
    "CachedGemma3Attention": Row(gemma3, _gemma3_call, kernel_axes="NDH"),
    "GptOssAttention": Row(gpt_oss),
    "Phi3Attention": Row(phi3),
    "BloomAttention": Row(bloom),
    "FalconAttention": Row(falcon),
    "T5MultiHeadAttention": Row(t5, lambda a: CAUSAL if a["is_decoder"] else {}),
    "T5MultiHeadAttention, cross": Row(t5_cross, NEITHER),
    "CachedMultiHeadAttention": Row(plain),
    "MultiHeadAttention": Row(plain, NEITHER),
    "MultiHeadAttention, of images": Row(image, NEITHER),
    "WhisperCachedMultiHeadAttention": Row(whisper),
    "WhisperCachedMultiHeadAttention, both ways": Row(whisper, NEITHER),
}
