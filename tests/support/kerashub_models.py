"""KerasHub's models, tiny and random, and what their attention layers are given and answer.

Imported only where keras_hub is: the tests skip without it.
"""

import contextlib
import inspect
import warnings

import jax
import keras
import numpy as np
import pytest
from helpers import relaxed

keras_hub = pytest.importorskip(
    "keras_hub", reason="keras_hub is not installed: pip install keras-hub"
)

LENGTH, WINDOW, BATCH = 130, 17, 2
MODELS = keras_hub.models
GROUPED = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 24,
    "intermediate_dim": 16,
}
PLAIN = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 24,
    "intermediate_dim": 16,
}
EXPERTS = {"num_experts": 3, "top_k": 2}
TURNS = {"rope_max_wavelength": 777.0, "rope_scaling_factor": 2.0}
LOCAL = {"use_sliding_window_attention": True, "sliding_window_size": WINDOW}
IMAGE = {"image_shape": (16, 16, 3), "patch_size": 4, "num_layers": 2, "num_heads": 3}
LLAMA_3 = {
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 64,
}
GEMMA = {
    "head_dim": 10,
    "attention_logit_soft_cap": 0.7,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
}
# Their queries and keys are small: mean squares of 1e-5, beside which the norms' epsilon counts.
NORMED = {"qwen 3", "qwen 3 moe", "gemma 3"}
# What KerasHub takes and stores, and does not compute, or not as anything here does.
REFUSED = {
    "llama": {"rope_position_scaling_factor": 3.0},
    "gemma 2": {"query_head_dim_normalize": False},
    "gemma 3": {"use_bidirectional_attention": True},
    "phi 3": {
        "rope_scaling_type": "su",
        "rope_scaling_short_factor": [1.0, 1.5, 2.0],
        "rope_scaling_long_factor": [1.0, 2.5, 3.0],
    },
}
# name: (backbone, its arguments)
ZOO = {
    "llama": ("LlamaBackbone", GROUPED | {"rope_max_wavelength": 777.0}),
    "llama 3.1": ("Llama3Backbone", GROUPED | LLAMA_3 | {"rope_max_wavelength": 5000.0}),
    "mistral": ("MistralBackbone", GROUPED | TURNS | {"sliding_window": WINDOW, "head_dim": 8}),
    "mixtral": ("MixtralBackbone", GROUPED | TURNS | EXPERTS | {"sliding_window": WINDOW}),
    "qwen 2": ("QwenBackbone", GROUPED | TURNS | LOCAL),
    "qwen moe": (
        "QwenMoeBackbone",
        GROUPED
        | TURNS
        | LOCAL
        | EXPERTS
        | {"moe_intermediate_dim": 8, "shared_expert_intermediate_dim": 8},
    ),
    "qwen 3": (
        "Qwen3Backbone",
        GROUPED
        | TURNS
        | {"head_dim": 10, "sliding_window_size": WINDOW, "layer_norm_epsilon": 1e-3},
    ),
    "qwen 3 moe": (
        "Qwen3MoeBackbone",
        GROUPED
        | TURNS
        | EXPERTS
        | {"head_dim": 10, "sliding_window_size": WINDOW, "moe_intermediate_dim": 8},
    ),
    "gemma": ("GemmaBackbone", GROUPED | {"head_dim": 10}),
    "gemma 2": ("GemmaBackbone", GROUPED | GEMMA | LOCAL),
    "gemma 3": (
        "Gemma3Backbone",
        GROUPED
        | GEMMA
        | LOCAL
        | {
            "num_layers": 6,
            "image_size": 16,
            "global_rope_scaling_factor": 8.0,
            "layer_norm_epsilon": 1e-2,
        },
    ),
    "gpt-oss": (
        "GptOssBackbone",
        GROUPED
        | EXPERTS
        | {
            "sliding_window": WINDOW,
            "head_dim": 10,
            "rope_max_wavelength": 777.0,
            "rope_scaling_factor": 4.0,
        },
    ),
    "phi 3": ("Phi3Backbone", GROUPED | {"rope_max_wavelength": 777.0}),
    "falcon": (
        "FalconBackbone",
        {"num_attention_heads": 3} | {k: v for k, v in PLAIN.items() if k != "num_heads"},
    ),
    "bloom": ("BloomBackbone", PLAIN),
    "gpt 2": ("GPT2Backbone", PLAIN | {"max_sequence_length": LENGTH}),
    "opt": ("OPTBackbone", PLAIN | {"max_sequence_length": LENGTH}),
    "bert": ("BertBackbone", PLAIN),
    "roberta": ("RobertaBackbone", PLAIN),
    "xlm-roberta": ("XLMRobertaBackbone", PLAIN),
    "distil-bert": ("DistilBertBackbone", PLAIN),
    "albert": ("AlbertBackbone", PLAIN | {"embedding_dim": 8, "num_inner_repetitions": 2}),
    "electra": (
        "ElectraBackbone",
        {"vocab_size": 50, "embedding_dim": 24, **PLAIN, "vocabulary_size": None},
    ),
    "bart": ("BartBackbone", PLAIN),
    "whisper": (
        "WhisperBackbone",
        PLAIN
        | {
            "num_mels": 8,
            "max_encoder_sequence_length": 2 * LENGTH,
            "max_decoder_sequence_length": LENGTH,
        },
    ),
    "t5": ("T5Backbone", PLAIN | {"key_value_dim": 10}),
    "vit": ("ViTBackbone", IMAGE | {"hidden_dim": 24, "mlp_dim": 16, "use_mha_bias": False}),
    "deit": ("DeiTBackbone", IMAGE | {"hidden_dim": 24, "intermediate_dim": 16}),
}


ENCODERS = {
    f"{name}Backbone"
    for name in ["Bert", "Roberta", "XLMRoberta", "DistilBert", "Albert", "Electra", "ViT", "DeiT"]
}


@contextlib.contextmanager
def relaxed_models():
    """KerasHub's code warns of its own masks and softmaxes; ours must not."""
    with relaxed(), warnings.catch_warnings(action="ignore", category=UserWarning):
        yield


def built(name):
    class_name, arguments = ZOO[name]
    arguments = {key: value for key, value in arguments.items() if value is not None}
    with relaxed_models():
        model = randomized(getattr(MODELS, class_name)(**arguments))
        for weight in model.weights if name in NORMED else ():
            if weight.path.endswith(("query/kernel", "key/kernel")):
                weight.assign(weight * 0.003)
    return model


def own_model():
    """(x, memory, model): a functional model of KerasHub's blocks and of its layer with a cache."""
    with relaxed_models():
        x, memory = keras.Input((LENGTH, 24)), keras.Input((7, 24))
        layers = keras_hub.layers
        y = layers.TransformerDecoder(16, 3, name="causal")(x)
        y = layers.TransformerEncoder(16, 3, name="both_ways")(y)
        y = layers.TransformerDecoder(16, 3, name="crossed")(y, memory, use_causal_mask=False)
        y = layers.CachedMultiHeadAttention(3, 8, name="cached")(y, memory)
        model = randomized(keras.Model([x, memory], y))
    rng = np.random.default_rng(1)
    x, memory = (rng.normal(size=(BATCH, n, 24)).astype("float32") for n in (LENGTH, 7))
    return x, memory, model


def long_phi(length):
    """(model, inputs) of a Phi 3 with LongRoPE beyond 64 tokens."""
    with relaxed_models():
        phi = MODELS.Phi3Backbone(
            **GROUPED, max_sequence_length=256, pretraining_sequence_length=64, **REFUSED["phi 3"]
        )
    return randomized(phi), {name: x[:, :length] for name, x in inputs_of(phi).items()}


def randomized(model):
    """The model with random weights: kernels of a size at which logits are of order one."""
    rng = np.random.default_rng(len(model.weights))
    with relaxed():
        for weight in model.weights:
            if "seed" not in weight.path:
                rank, is_bias = len(weight.shape), weight.path.endswith(("bias", "beta"))
                spread = {1: 0.4, 2: weight.shape[0] ** -0.5}.get(rank, 24**-0.5)
                middle = 0 if rank > 1 or is_bias else 0.6
                weight.assign(middle + spread * rng.normal(size=weight.shape))
    return model


def inputs_of(model):
    """Inputs of the length, without padding, for whatever the model takes."""
    rng = np.random.default_rng(0)
    made = {}
    given = model.input if isinstance(model.input, dict) else {"images": model.input}
    for name, tensor in given.items():
        if "mask" in name:
            made[name] = np.ones((BATCH, LENGTH), "int32")
        elif len(tensor.shape) == 2:
            top = 2 if "segment" in name else 50
            made[name] = rng.integers(0, top, (BATCH, LENGTH)).astype("int32")
        else:
            rest = [2 * LENGTH if size is None else size for size in tensor.shape[1:]]
            made[name] = rng.normal(size=(BATCH, *rest)).astype("float32")
    return made if isinstance(model.input, dict) else made["images"]


def attention_layers(model):
    """Every layer that has a projection of queries."""
    names = ("query_dense", "_query_dense", "query_projector")
    every = [layer for layer in model._flatten_layers() if any(hasattr(layer, n) for n in names)]
    return list({id(layer): layer for layer in every}.values())


def recorded(model, inputs=None):
    """[(layer, query, value, output)] of one run of the model, by every attention layer in it."""
    inputs = inputs_of(model) if inputs is None else inputs
    layers, records = attention_layers(model), []

    def watch(layer):
        call, names = layer.call, inspect.signature(layer.call)

        def watched(*args, **kwargs):
            output = call(*args, **kwargs)
            given = names.bind(*args, **kwargs).arguments
            x = next(given[n] for n in ("hidden_states", "query", "x", "inputs") if n in given)
            other = given.get("value", given.get("key_value_states"))
            first = output[0] if isinstance(output, tuple) else output
            records.append((layer, x, x if other is None else other, first))
            return output

        return watched

    @jax.jit
    def run(inputs):
        records.clear()
        model(inputs, training=False)
        return [record[1:] for record in records]

    for layer in layers:
        object.__setattr__(layer, "call", watch(layer))
    with relaxed_models():
        arrays = run(inputs)
    for layer in layers:
        del layer.__dict__["call"]
    return [(record[0], *map(np.asarray, row)) for record, row in zip(records, arrays)]


def query_kernel(layer):
    names = ("query_dense", "_query_dense", "query_projector")
    part = next(getattr(layer, name) for name in names if hasattr(layer, name))
    with relaxed():
        return np.asarray(part.kernel)


def saved(model, path):
    with relaxed():
        keras.saving.save_model(model, path)
    return path
