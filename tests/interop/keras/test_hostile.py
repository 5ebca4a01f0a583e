"""HDF5 files that Keras never writes: one clear error, nothing large allocated or followed."""

import h5py
import numpy as np
import pytest
from helpers import D, H, N
from keras_damage import (
    CONFIG,
    KERNEL,
    LAYER,
    PARAMS,
    archive,
    refused,
    sound_members,
    sound_weights,
)

from flax_mha.interop.keras import list_keras_layers, load_keras_file, to_keras_weights


@pytest.fixture
def weights(tmp_path):
    return sound_weights(tmp_path)


@pytest.fixture
def members(weights):
    return sound_members(weights)


def test_the_sound_files_are_read(tmp_path, weights, members):
    for path in (weights, archive(tmp_path / "a.keras", members)):
        config, params = load_keras_file(path)
        assert (config.num_heads, config.key_dim) == (N, H)
        for one, two in zip(to_keras_weights(params, config), to_keras_weights(PARAMS, CONFIG)):
            assert (one == two).all()


def soft_link(h5):
    h5["layers/linked"] = h5py.SoftLink(f"/{LAYER}")


def external_link(h5):
    h5["layers/linked"] = h5py.ExternalLink("/etc/passwd", "/")


def cycle(h5):
    h5[f"{LAYER}/again"] = h5["layers"]


def alias(h5):
    h5["other"] = h5[KERNEL]


def external_storage(h5):
    del h5[KERNEL]
    h5.create_dataset(KERNEL, (D, N, H), "float32", external=[("/etc/passwd", 0, 2244)])


def virtual(h5):
    layout = h5py.VirtualLayout((D, N, H), "float32")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (D, N, H))
    del h5[KERNEL]
    h5.create_virtual_dataset(KERNEL, layout)


def compressed(h5):
    del h5[KERNEL]
    h5.create_dataset(KERNEL, data=np.zeros((D, N, H), "float32"), compression="gzip")


def absurd_shape(h5):
    del h5[KERNEL]
    h5.create_dataset(KERNEL, (2**40, N, H), "float32", chunks=(1, N, H))


def unwritten(h5):
    h5.create_dataset("bomb", (2**40,), "float32")


def compound(h5):
    h5["x"] = np.zeros(3, [("a", "f4"), ("b", "f4")])


def strings(h5):
    h5["x"] = np.array([b"one", b"two"], object)


def references(h5):
    h5["x"] = np.array([h5[LAYER].ref], h5py.ref_dtype)


def empty(h5):
    h5["x"] = h5py.Empty("f4")


def named_type(h5):
    h5["x"] = np.dtype("float32")


def name_is_an_array(h5):
    h5[LAYER].create_group("vars").attrs["name"] = [1, 2]


def name_is_long(h5):
    h5[LAYER].create_group("vars").attrs["name"] = "x" * 5000


def deep(h5):
    h5.create_group("/".join(["deep"] * 400))


def keras_2(h5):
    h5.attrs["layer_names"] = ["a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (soft_link, "without links elsewhere.*'layers/linked', of type SoftLink"),
        (external_link, "without links elsewhere.*'layers/linked', of type ExternalLink"),
        (cycle, "must be in one place.*'layers.*another path"),
        (alias, "must be in one place"),
        (external_storage, f"'{KERNEL}' must lie in the file.*external storage"),
        (virtual, "must lie in the file.*a virtual array"),
        (compressed, "must lie in the file.*a filter.*h5repack"),
        (absurd_shape, r"shape \(1099511627776, 3, 11\) must have its \d+ bytes.* 0 bytes"),
        (unwritten, "'bomb' of shape .* must have its 4398046511104 bytes"),
        (compound, "'x' must be an array of numbers"),
        (strings, "'x' must be an array of numbers"),
        (references, "'x' must be an array of numbers"),
        (empty, "'x' must be an array of numbers"),
        (named_type, "groups and arrays only.*'x', of type Datatype"),
        (name_is_an_array, "attribute 'name' of .* must be a string"),
        (name_is_long, "attribute 'name' of .* must be a string of at most"),
        (deep, "at most 1024 characters"),
        (keras_2, "must have Keras 3's layout.*'layer_names'.*save it as `.keras`"),
    ],
)
def test_what_keras_never_writes(tmp_path, weights, members, change, message):
    with h5py.File(weights, "r+") as h5:
        change(h5)
    refused(weights, message)
    members["model.weights.h5"] = weights.read_bytes()
    refused(archive(tmp_path / "a.keras", members), message)


@pytest.mark.parametrize(
    ("path", "array", "message"),
    [
        (KERNEL, np.zeros((D, N * H), "f4"), r"kernels must be query \[D, N, H\]"),
        (KERNEL, np.zeros((D, 2, H), "f4"), "multiple of `num_kv_heads`|must be"),
        (KERNEL, np.zeros((D, N, H), "i1"), r"must have its scale \[1, ..., 3, 11\].*\[3, 11\]"),
        (f"{LAYER}/query_dense/vars/2", np.ones(H, "f4"), "maybe a bias.*vars/2.*quantized"),
        (f"{LAYER}/key_dense/vars/1", np.ones(H, "f4"), r"\['key'\]\['bias'\] must be \[K, H\]"),
    ],
)
def test_layers_that_make_no_sense(tmp_path, weights, members, path, array, message):
    with h5py.File(weights, "r+") as h5:
        h5.pop(path, None)
        h5[path] = array
    members["model.weights.h5"] = weights.read_bytes()
    for file in (weights, archive(tmp_path / "a.keras", members)):
        assert [layer.path for layer in list_keras_layers(file)] == [LAYER]
        with pytest.raises(ValueError, match=message):
            load_keras_file(file)


def test_arrays_that_share_their_bytes(tmp_path):
    """Two headers that point to the same bytes: a file could claim any multiple of its size."""
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as h5:
        h5["one"], h5["two"] = np.zeros(10**4), np.ones(10**4)
        one, two = h5["one"].id.get_offset(), h5["two"].id.get_offset()
    data = path.read_bytes()
    assert one < two == len(data) - 8 * 10**4
    one, two, length = (number.to_bytes(8, "little") for number in (one, two, len(data)))
    end = 40  # where a superblock of version 0 has the file's length
    assert data[end : end + 8] == length
    rest = data[end + 8 : -(8 * 10**4)].replace(two, one)
    path.write_bytes(data[:end] + two + rest)
    with h5py.File(path) as h5:
        assert (h5["one"][:] == h5["two"][:]).all()
    refused(path, "no more bytes than the file.*160000 bytes declared")
