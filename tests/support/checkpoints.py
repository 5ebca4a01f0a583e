"""Folders as the transformers library writes them, made of NumPy arrays: a Llama of two layers."""

import json
import pathlib

import numpy as np
import pytest

numpy_files = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

N, K, H, D = 4, 2, 6, 20
SHAPES = {"q_proj": (N * H, D), "k_proj": (K * H, D), "v_proj": (K * H, D), "o_proj": (D, N * H)}
CONFIG = {
    "model_type": "llama",
    "hidden_size": D,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "num_hidden_layers": 2,
    "rope_theta": 53.0,
    "vocab_size": 11,
}
PATHS = [f"model.layers.{layer}.self_attn" for layer in range(2)]


def arrays(dtype="float32", shapes=None, paths=PATHS, seed=0):
    random = np.random.default_rng(seed)
    weights = {f"{x}.weight": shape for x, shape in SHAPES.items()} if shapes is None else shapes
    made = {
        f"{path}.{name}": random.normal(size=shape).astype(dtype)
        for path in paths
        for name, shape in weights.items()
    }
    return {**made, "model.embed_tokens.weight": random.normal(size=(11, D)).astype(dtype)}


def write(folder, config=None, weights=None, shards=1, **fields):
    """A folder of one file, or of several with their index; `fields` change config.json."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**(CONFIG if config is None else config), **fields}
    (folder / "config.json").write_text(json.dumps(config))
    weights = arrays() if weights is None else weights
    if shards == 1:
        numpy_files.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    place = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        held = names[shard::shards]
        numpy_files.save_file({name: weights[name] for name in held}, folder / file)
        place |= dict.fromkeys(held, file)
    write_index(folder, place)
    return folder


def write_index(folder, place):
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
