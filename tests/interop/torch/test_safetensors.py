"""`.safetensors` files: what is wanted is read, bit for bit; what is corrupt is refused."""

import json
import pickle
import struct
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_params

from flax_mha import MultiHeadAttentionConfig, param_shapes
from flax_mha.interop.torch import from_torch_state_dict, load_safetensors, to_torch_state_dict

numpy_files = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")


def header(name="a", dtype="F32", shape=(3, 4), offsets=(0, 48)):
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def blob(content, data=bytes(48), length=None):
    text = json.dumps(content).encode() if isinstance(content, dict) else content
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_layer_through_a_file(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    config = MultiHeadAttentionConfig(6, 4, num_kv_heads=2, use_bias=False, param_dtype=dtype)
    params = random_params(param_shapes(config, (5, 24)), dtype=dtype)
    layers = {
        name: array
        for layer in ("model.layers.0.", "model.layers.1.")
        for name, array in to_torch_state_dict(params, config, layout="llama", prefix=layer).items()
    }
    numpy_files.save_file({**layers, "ids": np.arange(7)}, path)
    state = load_safetensors(path, prefix="model.layers.1.")
    assert len(state) == 4
    back = from_torch_state_dict(state, config, layout="llama", prefix="model.layers.1.")
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert list(load_safetensors(str(path), ["ids"])) == ["ids"]
    assert len(load_safetensors(path)) == 9


def test_bfloat16_by_hand(tmp_path):
    """1, -2, infinity, a NaN with a payload: written as bytes, so that no library made them."""
    path = tmp_path / "a.safetensors"
    data = bytes.fromhex("803f 00c0 807f c17f")
    path.write_bytes(blob(header(dtype="BF16", shape=(2, 2), offsets=(0, 8)), data))
    array = load_safetensors(path)["a"]
    assert array.dtype == jnp.bfloat16
    assert array.tobytes() == data
    assert array.astype("float32")[0].tolist() == [1.0, -2.0]


@pytest.mark.models
def test_a_file_of_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import safetensors.torch

    path = tmp_path / "a.safetensors"
    tensor = torch.linspace(-1, 1, 12, dtype=torch.bfloat16).reshape(3, 4)
    safetensors.torch.save_file({"a": tensor}, path)
    assert load_safetensors(path)["a"].tobytes() == tensor.view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"'a.safetensors' must be a whole .safetensors file.*0 bytes.*cut short"),
        (b"abc", r"must be a whole .safetensors file.*3 bytes"),
        (blob(header(), length=1 << 62), "must be a whole"),
        (blob(header(), length=90_000_000), "must be a whole"),
        (blob(header(), bytes(40)), "must be a whole"),
        (blob(header(), bytes(60)), "must be a whole"),
        (blob(b"hello"), "must be a whole"),
        (blob(b"\xff{}"), "must be a whole"),
        (blob(b"[" * 100_000), "must be a whole"),
        (blob(header(shape=(1 << 40, 1 << 40))), "must be a whole"),
        (blob(header(shape=(-3, 4))), "must be a whole"),
        (blob(header(offsets=(0, 1 << 40))), "must be a whole"),
        (blob(header(offsets=(8, 0))), "must be a whole"),
        (blob(header(dtype="Q3")), "must be a whole"),
        (blob(header(shape=(1 << 62, 0), offsets=(0, 0)), b""), r"`a` must have a sensible shape"),
        (blob(header(dtype="F8_E4M3", shape=(48,))), r"`a` must have one .*F8_E4M3.*scales"),
    ],
)
def test_corrupt_and_hostile_files(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises((ValueError, TypeError), match=message):
        load_safetensors(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


class Trap:
    """A pickle that would leave a trace."""

    def __reduce__(self):
        return (exec, ("import sys; sys.modules['a_pickle_was_loaded'] = None",))


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("start", [b"", b"PK\x03\x04"])
def test_no_pickle_is_loaded(tmp_path, name, start):
    path = tmp_path / name
    path.write_bytes(start + pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"to load a pickle is to run.*Convert it once"):
        load_safetensors(path)
    assert "a_pickle_was_loaded" not in sys.modules


def test_a_name_says_pickle_where_the_content_says_nothing(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"ustar")
    with pytest.raises(ValueError, match=r"'a.pth', a .pth file.*Convert it once"):
        load_safetensors(path)


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    path = tmp_path / "a.safetensors"
    text = json.dumps(header()).encode().ljust(128)
    path.write_bytes(blob(text))
    assert path.read_bytes()[:1] == b"\x80"
    assert load_safetensors(path)["a"].shape == (3, 4)


@pytest.mark.models
def test_torch_save_is_refused_and_converts_as_the_message_says(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import safetensors.torch

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="a zip file") as caught:
        load_safetensors(path)
    command = str(caught.value).partition("`path`")[2].partition("`")[2].partition("`")[0]
    exec(command, {"safetensors": safetensors, "torch": torch, "path": path})
    assert load_safetensors("model.safetensors")["a"].tolist() == [1, 1]


def test_names_and_prefixes(tmp_path):
    path = tmp_path / "a.safetensors"
    numpy_files.save_file({"h.0.weight": np.ones(2, "float32"), "h.10.weight": np.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"must hold 'h.0.wieght'.*such as \['h.0.weight'\]"):
        load_safetensors(path, ["h.0.wieght"])
    with pytest.raises(ValueError, match=r"under prefix='g.'.*such as \['h.*weight'"):
        load_safetensors(path, prefix="g.")
    with pytest.raises(ValueError, match=r"`names` must be a collection"):
        load_safetensors(path, "h.0.weight")
    with pytest.raises(ValueError, match=r"comes without `prefix`"):
        load_safetensors(path, ["weight"], prefix="h.0.")
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "none.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match='"weight_map" says which file'):
        load_safetensors(index)


def test_without_the_package(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(blob(header()))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'flax_mha\[safetensors\]'"):
        load_safetensors(path)
