"""What readers of files say of a path that is none; a number would be an open file's."""

import os
import pathlib

import pytest

from flax_mha.interop import huggingface, keras
from flax_mha.interop.torch import load_safetensors

READERS = {
    "keras.list_keras_layers": (keras.list_keras_layers, "path"),
    "keras.load_keras_file": (keras.load_keras_file, "path"),
    "keras.read_keras_arrays": (keras.read_keras_arrays, "path"),
    "keras.load_attention": (keras.load_attention, "path"),
    "torch.load_safetensors": (load_safetensors, "path"),
    "huggingface.load_attention": (huggingface.load_attention, "directory"),
    "huggingface.list_attention": (huggingface.list_attention, "directory"),
    "huggingface.load_adapter": (
        lambda directory: huggingface.load_adapter(directory, like="base"),
        "directory",
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        *[(x, TypeError) for x in (None, True, 1.5, b"model.keras", ["model.keras"])],
        *[(x, ValueError) for x in ("", "model\0.keras")],
    ],
    ids=repr,
)
def test_a_path_that_is_none_is_refused_by_name(reader, wrong, error):
    read, name = READERS[reader]
    with pytest.raises(error, match=f"`{name}` must be a path"):
        read(wrong)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_open_already_stays_open(reader, tmp_path):
    read, name = READERS[reader]
    pathlib.Path(tmp_path, "file").write_bytes(b"PK")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    with pytest.raises(TypeError, match=rf"`{name}` must be a path.* {descriptor} of type int"):
        read(descriptor)
    assert os.read(descriptor, 2) == b"PK"
    os.close(descriptor)
