"""Sound Keras files to damage, and what every reader of them must do with the damaged."""

import json
import os
import tracemalloc
import zipfile

import pytest
from helpers import D, H, N, random_params

from flax_mha import MultiHeadAttentionConfig, param_shapes
from flax_mha.interop.keras import (
    list_keras_layers,
    load_keras_file,
    read_keras_arrays,
    save_keras_weights,
)

CONFIG = MultiHeadAttentionConfig(num_heads=N, key_dim=H)
PARAMS = random_params(param_shapes(CONFIG, (1, D)))
LAYER = "layers/multi_head_attention"
KERNEL = f"{LAYER}/query_dense/vars/0"
ENTRY = {"class_name": "MultiHeadAttention", "module": "keras.layers", "registered_name": None}
FIELDS = {"name": "only", "num_heads": N, "key_dim": H, "dtype": "float32"}


def sound_weights(folder):
    path = folder / "model.weights.h5"
    save_keras_weights(path, {LAYER: (CONFIG, PARAMS)})
    return path


def model_config(**fields):
    return {"class_name": "Functional", "config": {"layers": [{**ENTRY, "config": fields}]}}


def sound_members(weights):
    """The members of an archive with these weights."""
    config = json.dumps(model_config(**FIELDS)).encode()
    return {"config.json": config, "model.weights.h5": weights.read_bytes()}


def archive(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def refused(path, message, error=ValueError):
    """Every reader refuses the file with this message, and without allocating much."""
    before = sorted(os.walk(path.parent))
    config = (CONFIG, PARAMS)
    for reader in (
        load_keras_file,
        list_keras_layers,
        read_keras_arrays,
        lambda path: save_keras_weights(path, {LAYER: config}, like=path),
    ):
        tracemalloc.start()
        with pytest.raises(error, match=message):
            reader(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**25
    assert sorted(os.walk(path.parent)) == before
