"""`.keras` archives of KerasHub's models, made without KerasHub: config.json and random arrays."""

import json

import h5py
import numpy as np
from keras_damage import archive

DECODER = "layers/llama_transformer_decoder"
SELF = "_self_attention_layer"
COMMON = {"name": "model", "trainable": True, "dtype": "float32", "num_layers": 2}
GROUPED = {"hidden_dim": 24, "num_query_heads": 4, "num_key_value_heads": 2}
FIELDS = {
    "LlamaBackbone": COMMON
    | GROUPED
    | {
        "vocabulary_size": 50,
        "intermediate_dim": 16,
        "rope_max_wavelength": 777.0,
        "rope_position_scaling_factor": 1.0,
        "rope_frequency_adjustment_factor": None,
        "rope_low_freq_factor": None,
        "rope_high_freq_factor": None,
        "rope_pretraining_sequence_length": None,
        "layer_norm_epsilon": 1e-6,
        "dropout": 0,
    },
    "T5Backbone": COMMON
    | {
        "hidden_dim": 24,
        "num_heads": 3,
        "key_value_dim": 10,
        "dropout": 0.1,
        "activation": "relu",
        "use_gated_activation": True,
    },
    "GPT2Backbone": COMMON | {"num_heads": 3, "hidden_dim": 24, "dropout": 0.1},
}


def entry(class_name, fields=(), **other):
    """config.json's entry of a class that KerasHub registers."""
    module = f"keras_hub.src.models.{class_name.lower()}"
    named = {"registered_name": f"keras_hub>{class_name}", "class_name": class_name}
    config = {**FIELDS.get(class_name, {}), **dict(fields)}
    return {"module": module, **named, "config": config, **other}


def arrays(path, shapes, names=("query_dense", "key_dense", "value_dense", "output_dense")):
    return {f"{path}/{name}/vars/0": shape for name, shape in zip(names, shapes)}


def llama_arrays(number=0, above=""):
    block = f"{above}{DECODER}{f'_{number}' if number else ''}/{SELF}"
    shapes = [(24, 4, 6), (24, 2, 6), (24, 2, 6), (4, 6, 24)]
    return arrays(block, shapes, ("_query_dense", "_key_dense", "_value_dense", "_output_dense"))


def plain_arrays(path):
    kernels = arrays(path, [(24, 3, 8)] * 3 + [(3, 8, 24)])
    biases = {key[:-1] + "1": shape[1:] for key, shape in kernels.items() if "output" not in key}
    return kernels | biases | {f"{path}/output_dense/vars/1": (24,)}


def t5_arrays(number, attention="self_attention", table=False):
    path = f"layers/t5_transformer_layer{f'_{number}' if number else ''}/{attention}"
    names = [f"{name}_projector" for name in ("query", "key", "value", "output")]
    kernels = arrays(path, [(24, 30)] * 3 + [(30, 24)], names)
    return kernels | ({f"{path}/vars/0": (32, 3)} if table else {})


T5 = (
    t5_arrays(0, table=True)
    | t5_arrays(1)
    | t5_arrays(2, table=True)
    | t5_arrays(2, "cross_attention")
    | t5_arrays(3)
    | t5_arrays(3, "cross_attention")
)
ARRAYS = {
    "LlamaBackbone": llama_arrays() | llama_arrays(1),
    "T5Backbone": T5,
    "GPT2Backbone": plain_arrays(f"layers/transformer_decoder/{SELF}"),
}


def written(path, config, shapes):
    """The archive of a config.json and random arrays by their paths."""
    rng = np.random.default_rng(0)
    weights = path.with_suffix(".weights.h5")
    with h5py.File(weights, "w") as h5:
        for name, shape in shapes.items():
            h5[name] = rng.normal(size=shape).astype("float32")
    members = {"config.json": json.dumps(config).encode(), "model.weights.h5": weights.read_bytes()}
    return archive(path, members)


def hub_archive(path, class_name, **fields):
    return written(path, entry(class_name, fields), ARRAYS[class_name])
