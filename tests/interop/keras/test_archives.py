"""Archives that Keras never writes, and other bytes: nothing unpacked, run or written elsewhere."""

import io
import json
import os
import pickle
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
from keras_damage import (
    CONFIG,
    ENTRY,
    FIELDS,
    LAYER,
    archive,
    model_config,
    refused,
    sound_members,
    sound_weights,
)

from flax_mha.interop.keras import list_keras_layers, load_keras_file, read_keras_arrays


@pytest.fixture
def weights(tmp_path):
    return sound_weights(tmp_path)


@pytest.fixture
def members(weights):
    return sound_members(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"../outside.txt": b"x"}, "relative paths inside it.*'../outside.txt'"),
        ({"/outside.txt": b"x"}, "relative paths inside it"),
        ({"assets/../../x": b"x"}, "relative paths inside it"),
        ({"C:/outside.txt": b"x"}, "relative paths inside it"),
        ({"model.weights.h5": None, "model.weights.npz": b"x"}, "must hold .*npz"),
        ({"config.json": None}, "must hold 'config.json'"),
        ({"config.json": b"{"}, "must hold one JSON object.*JSONDecodeError"),
        ({"config.json": b"[1]"}, "must hold one JSON object.*type list"),
        ({"config.json": b"\xff\xff\xff"}, "must hold one JSON object"),
        ({"config.json": b"[" * 10**6}, "must hold one JSON object.*RecursionError"),
        ({"config.json": b'{"a":' * 10**5 + b"1" + b"}" * 10**5}, "JSON object.*RecursionError"),
        ({"model.weights.h5": b"PK\x03\x04" * 99}, "must be a `.keras` archive .zip. or"),
        ({"model.weights.h5": b"\x89HDF\r\n\x1a\n" + bytes(99)}, "HDF5 file must be whole"),
    ],
)
def test_archives_that_keras_never_writes(tmp_path, members, change, message):
    members = {name: data for name, data in {**members, **change}.items() if data is not None}
    refused(archive(tmp_path / "a.keras", members), message)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(tmp_path, members):
    path = archive(tmp_path / "a.keras", members)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("config.json", b"{}")
    refused(path, "members must differ in name. Received: 'config.json'")


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
def test_decompression_bombs(tmp_path, members, name):
    members[name] = b" " * 2**27
    path = archive(tmp_path / "a.keras", members, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    refused(path, f"'{name}' must be of at most .* bytes.*134217728 bytes declared.*bomb")


@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("change", [-5, 5, 2**31])
def test_a_member_of_another_size_than_declared(tmp_path, members, packed, change):
    path = archive(tmp_path / "a.keras", members, compression=packed)
    data = bytearray(path.read_bytes())
    size = data.rindex(b"PK\x01\x02") + 24  # where model.weights.h5's length is declared
    declared = int.from_bytes(data[size : size + 4], "little") + change
    data[size : size + 4] = declared.to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, "member 'model.weights.h5' must (be whole|be of at most|have its declared)")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 10**30}, r"`num_heads` must be a positive integer below 2\*\*31"),
        ({"num_heads": [3]}, "description of 'layers/.*TypeError.*Pass `config=`"),
        ({"dtype": 5}, "description of .* must be one that can be used"),
        (
            {"dtype": {"class_name": "DTypePolicy"}},
            "description of .* must be one that can be used",
        ),
        ({"dtype": {"class_name": "QuantizedDTypePolicy"}}, "'QuantizedDTypePolicy'"),
        ({"kernel_initializer": {"class_name": "system", "module": "os"}}, "custom class 'system'"),
        ({"kernel_initializer": {"class_name": "Lambda", "module": "keras"}}, "'Lambda'"),
        ({"unknown": 1}, "'unknown'"),
        ({"output_shape": [[[1]]]}, "description of"),
    ],
)
def test_descriptions_that_make_no_sense(tmp_path, members, fields, message):
    members["config.json"] = json.dumps(model_config(**{**FIELDS, **fields})).encode()
    path = archive(tmp_path / "a.keras", members)
    with pytest.raises(ValueError, match=message):
        load_keras_file(path)
    assert load_keras_file(path, config=CONFIG)[0] is CONFIG


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"config": 1},
        {"config": {"layers": [1, None, {"class_name": 3}]}},
        {"config": {"layer": 1}},
    ],
)
def test_config_json_that_describes_nothing(tmp_path, members, config):
    members["config.json"] = json.dumps(config).encode()
    path = archive(tmp_path / "a.keras", members)
    with pytest.raises(ValueError, match=r"config.json must describe the layer.*Pass `config=`"):
        load_keras_file(path)


def named_group(weights, path, name):
    """A copy of the sound layer's group at `path`, with a user's name."""
    with h5py.File(weights, "r+") as h5:
        if path != LAYER:
            h5.copy(LAYER, path)
        h5[path].require_group("vars").attrs["name"] = name


def custom(**config):
    entry = {"class_name": "Block", "module": "mine", "registered_name": "mine>Block"}
    return {**entry, "config": {"name": "block", **config}}


INNER = {**ENTRY, "config": FIELDS}


A, B, A_1 = "layers/block/a", "layers/block/b", "layers/block_1/a"


@pytest.mark.parametrize(
    ("model", "groups", "layer", "is_described"),
    [
        # An attribute of the model's own does not take the config of a listed layer of its name.
        ({"layers": [INNER]}, [LAYER, "extra"], "extra", False),
        ({"layers": [INNER]}, [LAYER, "extra"], LAYER, True),
        ({"layers": [dict(INNER)], "extra": INNER}, [LAYER, "extra"], "extra", True),
        # Of two layers of one name in a custom layer, one entry may be either's.
        ({"layers": [custom(a=INNER)]}, [A], A, True),
        ({"layers": [custom(a=INNER)]}, [B, A], A, False),
        ({"layers": [custom(a=INNER, b=INNER)]}, [A], A, False),
        ({"layers": [custom(a=INNER), custom()]}, [A_1], A_1, False),
        # A list whose names are others than those in the file is not the order of the groups.
        ({"layers": [{**ENTRY, "config": {**FIELDS, "name": "no"}}]}, [LAYER], LAYER, False),
        # Keras's own class, and the one whose arrays lie there.
        ({"layers": [{**INNER, "module": "mine"}]}, [LAYER], LAYER, False),
        ({"layers": [{**INNER, "registered_name": "a>MultiHeadAttention"}]}, [LAYER], LAYER, False),
        ({"layers": [{**INNER, "class_name": "GroupQueryAttention"}]}, [LAYER], LAYER, False),
    ],
)
def test_only_the_layers_own_description_counts(
    tmp_path, weights, members, model, groups, layer, is_described
):
    for path in groups:
        named_group(weights, path, "only")
    with h5py.File(weights, "r+") as h5:
        if LAYER not in groups:
            del h5[LAYER]
    members["model.weights.h5"] = weights.read_bytes()
    members["config.json"] = json.dumps({"class_name": "Functional", "config": model}).encode()
    path = archive(tmp_path / "a.keras", members)
    if is_described:
        assert load_keras_file(path, layer)[0].dtype == "float32"  # which shapes do not tell
    else:
        with pytest.raises(ValueError, match=r"config.json must describe"):
            load_keras_file(path, layer)
    assert load_keras_file(path, groups[-1], CONFIG)[0] is CONFIG


# --- other bytes --------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PYTEST_EVIL"],))


@pytest.mark.parametrize("name", ["model.keras", "model.weights.h5"])
def test_files_of_another_kind(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PYTEST_EVIL", str(tmp_path / "evil"))
    npz = io.BytesIO()
    np.savez(npz, x=np.array([Evil()], object))
    for data in (b"", b"x", b"{}", pickle.dumps(Evil()), b"\x93NUMPY", b"<HDF" + bytes(99)):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "must be a `.keras` archive .zip. or a `.weights.h5` file")
    (tmp_path / name).write_bytes(npz.getvalue())
    refused(tmp_path / name, "The archive must hold")
    with pytest.raises(ValueError, match=r"must be one file.*directory.*zipped=True"):
        list_keras_layers(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_keras_file(tmp_path / "nothing.keras")
    assert not (tmp_path / "evil").exists()


def damaged(data, rng):
    """Cut short, or some bytes changed."""
    data = bytearray(data)
    if rng.random() < 0.3:
        return data[: rng.integers(len(data))]
    for place in rng.integers(len(data) if rng.random() < 0.5 else 4000, size=rng.integers(1, 6)):
        data[place] = rng.integers(256)
    return data


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_give_value_errors_or_numbers(tmp_path, weights, members, seed):
    rng = np.random.default_rng(seed)
    whole = archive(tmp_path / "a.keras", members)
    for path in (weights, whole):
        path.write_bytes(damaged(path.read_bytes(), rng))
        for reader in (load_keras_file, read_keras_arrays):
            tracemalloc.start()
            try:
                message = f"Received: {len(reader(path))} arrays"
            except ValueError as error:
                message = str(error)
            assert "Received: " in message
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2**25
