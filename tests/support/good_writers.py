"""One call that works for every writer of files; what is refused leaves the folder as it was."""

import contextlib
import os
import pathlib
import tempfile

import jax
from damaged_things import Layers, Place
from damaged_trees import Tree
from damages import Choice, Int, Names, Other
from good_calls import SELF, SQUARE, params_of
from wrong_calls import Good

import flax_mha
from flax_mha import MultiHeadAttentionConfig
from flax_mha.interop import huggingface, keras

PATH = "model.layers.0.self_attn"
LLAMA = MultiHeadAttentionConfig(
    4, 6, num_kv_heads=2, use_bias=False, position=flax_mha.positions.Rotary(base=53.0)
)
OF_LLAMA = params_of(LLAMA, (1, 20))
ADAPTERS = flax_mha.lora_params(jax.random.key(0), LLAMA, (1, 20), rank=2)
KERAS_PATH = "layers/multi_head_attention"


def listing(folder):
    """Every file below a folder, and its bytes."""
    files = {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()}
    return files, sorted(folder.rglob("*"))


def in_a_folder(write, likes=False):
    """`write` in a folder of its own, with a file, a full folder, and a checkpoint if `likes`."""

    def run(**arguments):
        with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
            folder = pathlib.Path(name)
            (folder / "file").write_bytes(b"")
            (folder / "full.weights.h5").mkdir()
            (folder / "full.weights.h5" / "file").write_bytes(b"")
            if likes:
                import checkpoints  # needs safetensors

                checkpoints.write(folder / "like")
            before = listing(folder)
            try:
                write(**arguments)
            except BaseException as error:
                if listing(folder) != before:
                    raise AssertionError(f"wrote before {error}") from error
                raise

    return run


def save_keras(path, config, params):
    keras.save_keras_weights(path, {KERAS_PATH: (config, params)})


def save_keras_like(like, kernel_axes):
    layers = {KERAS_PATH: (SQUARE, SELF)}
    keras.save_keras_weights("old.weights.h5", layers)
    try:
        keras.save_keras_weights("new.weights.h5", layers, like=like, kernel_axes=kernel_axes)
    finally:
        os.remove("old.weights.h5")


def save_layer(config, params):
    layer = huggingface.AttentionLayer(config, params, {})
    huggingface.save_attention("new", {PATH: layer}, like="like")


def save_lora(lora, scale):
    adapter = huggingface.AttentionAdapter(lora, scale)
    huggingface.save_adapter("new", {PATH: adapter}, like="like")


PLACE = Place("new", "full.weights.h5")
LIKE = Place("like", "file")
FILES = [
    Good(
        "save_keras_weights",
        in_a_folder(keras.save_keras_weights),
        dict(
            path=Place("new.weights.h5", "full.weights.h5"),
            layers=Layers({KERAS_PATH: (SQUARE, SELF)}),
        ),
        False,
        like=keras.save_keras_weights,
    ),
    Good(
        "save_keras_weights of a layer",
        in_a_folder(lambda **call: save_keras("new.weights.h5", **call)),
        dict(config=Other(SQUARE), params=Tree(SELF)),
        False,
        like=save_keras,
    ),
    Good(
        "save_keras_weights like a file",
        in_a_folder(save_keras_like),
        dict(like=Place("old.weights.h5"), kernel_axes=Choice("DNH")),
        False,
        like=keras.save_keras_weights,
    ),
    Good(
        "save_attention",
        in_a_folder(huggingface.save_attention, likes=True),
        dict(
            directory=PLACE,
            layers=Layers({PATH: huggingface.AttentionLayer(LLAMA, OF_LLAMA, {})}),
            like=LIKE,
            max_length=Int(8),
            ignore=Names(()),
        ),
        False,
        like=huggingface.save_attention,
    ),
    Good(
        "save_attention of a layer",
        in_a_folder(save_layer, likes=True),
        dict(config=Other(LLAMA), params=Tree(OF_LLAMA)),
        False,
        like=save_layer,
    ),
    Good(
        "save_adapter",
        in_a_folder(huggingface.save_adapter, likes=True),
        dict(
            directory=PLACE,
            adapters=Layers({PATH: huggingface.AttentionAdapter(ADAPTERS, 4.0)}),
            like=LIKE,
            prefix=Other(""),
            max_length=Int(8),
            ignore=Names(()),
        ),
        False,
        like=huggingface.save_adapter,
    ),
    Good(
        "save_adapter of a layer",
        in_a_folder(save_lora, likes=True),
        dict(lora=Tree(ADAPTERS), scale=Other(4.0)),
        False,
        ("lora_scale",),
        like=save_lora,
    ),
]
