"""Files that the installed Keras wrote: every layer is found, and is what Keras has in memory."""

import json
import subprocess
import sys
import zipfile

import h5py
import jax
import keras
import numpy as np
import pytest
from helpers import D, H, N, V, random_params, relaxed
from keras_models import attention, numbers, ported, randomize, same_bits, whole_model

from flax_mha import MultiHeadAttentionConfig, param_shapes
from flax_mha.interop.keras import (
    list_keras_layers,
    load_keras_file,
    read_keras_arrays,
    save_keras_weights,
    to_keras_weights,
)

NAMES = ["zeta", "alpha", "encoder/self", "encoder/grouped", "another/self", "another/grouped"]
NAMES += ["td/timed/self", "td/timed/grouped", "described/self"]
# What shapes alone tell, as the docstring of load_keras_file has it.
TOLD = ["num_heads", "key_dim", "use_bias", "output_shape", "use_gate", "num_kv_heads"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, {name: Keras layer}, {name: layer of a custom class}) of one model in all forms."""
    folder = tmp_path_factory.mktemp("keras")
    model, layers, custom = whole_model()
    with relaxed():
        model.save(folder / "model.keras")
        model.save_weights(folder / "model.weights.h5")
    without_names(folder / "model.keras", folder / "old.keras")
    return folder, layers, custom


def without_names(path, target):
    """The archive as older versions of Keras wrote it: no user's names beside the weights."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        weights = target.with_suffix(".h5")
        weights.write_bytes(source.read("model.weights.h5"))
        with h5py.File(weights, "r+") as h5:
            names = []
            h5.visititems(lambda _, item: names.append(item.attrs.pop("name", None)))
        assert "alpha" in names
        archive.write(weights, "model.weights.h5")
        for name in ("config.json", "metadata.json"):
            archive.writestr(name, source.read(name))


@pytest.mark.slow
def test_the_names_are_those_of_the_model(saved):
    assert set(NAMES) == set(saved[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["model.keras", "old.keras"])
def test_every_layer_is_found_by_its_name(saved, file, name):
    folder, layers, _ = saved
    if (file, name) == ("old.keras", "described/self"):
        with pytest.raises(ValueError, match="`layer` must be the path or the name"):
            load_keras_file(folder / file, name)
        return
    config, params = load_keras_file(folder / file, name)
    expected_config, expected = ported(layers[name])
    assert config == expected_config
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    same_bits(jax.tree.leaves(params), jax.tree.leaves(expected))


@pytest.mark.parametrize("name", [*NAMES, "undescribed/hidden", "own"])
def test_weights_alone_tell_sizes(saved, name):
    folder, layers, custom = saved
    config, params = load_keras_file(folder / "model.weights.h5", name)
    same_bits(to_keras_weights(params, config), numbers({**layers, **custom}[name]))
    if name in layers:
        expected = ported(layers[name])[0]
        assert config.dims == expected.dims
        assert [getattr(config, x) for x in TOLD] == [getattr(expected, x) for x in TOLD]
        untold = {"dropout": 0.0, "attention_axes": None, "sliding_window": None, "dtype": None}
        assert {x: getattr(config, x) for x in untold} == untold


@pytest.mark.parametrize("name", ["undescribed/hidden", "own"])
def test_layers_of_custom_classes_need_a_config(saved, name):
    folder, _, custom = saved
    message = r"config.json must describe.*custom class.*Pass `config=`.*\(\*\*\{'num_heads': \d"
    with pytest.raises(ValueError, match=message):
        load_keras_file(folder / "model.keras", name)
    config = load_keras_file(folder / "model.weights.h5", name)[0].replace(dropout=0.5)
    taken, params = load_keras_file(folder / "model.keras", name, config)
    assert taken is config
    same_bits(to_keras_weights(params, config), numbers(custom[name]))


@pytest.mark.slow
def test_the_list_of_layers(saved):
    layers = list_keras_layers(saved[0] / "model.keras")
    assert sorted(layer.name for layer in layers) == sorted([*NAMES, "undescribed/hidden", "own"])
    (alpha,) = (layer for layer in layers if layer.name == "alpha")
    assert alpha.path.startswith("layers/multi_head_attention")
    assert alpha.class_name == "MultiHeadAttention"
    assert list(alpha.shapes)[4:6] == ["gate/kernel", "gate/bias"]
    assert alpha.shapes["value/kernel"] == (23, N, V)
    for layer in layers:
        assert load_keras_file(saved[0] / "model.weights.h5", layer.path)
    assert {layer.class_name for layer in layers if layer.name.endswith("grouped")} == {
        "GroupQueryAttention"
    }


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("gamma", r"layer='gamma', which is none of: .*'alpha', query \(17, 3, 11\), value \(23"),
        ("self", r"several of: .*'encoder/self'.*\. A path means one layer"),
        (None, "layer=None, which means several of"),
        ("", "layer='', which is none of"),
        ("pha", "layer='pha', which is none of"),
    ],
)
def test_a_layer_that_is_not_one(saved, layer, message):
    with pytest.raises(ValueError, match=message):
        load_keras_file(saved[0] / "model.keras", layer)
    with pytest.raises(TypeError, match="`layer` must be None or a string"):
        load_keras_file(saved[0] / "model.keras", 3)


def test_a_config_that_does_not_fit(saved):
    path = saved[0] / "model.keras"
    config = load_keras_file(path, "zeta")[0]
    with pytest.raises(
        ValueError, match=r"\['query'\]\['kernel'\] must be \[D, N, H\] = \(17, 2, 11"
    ):
        load_keras_file(path, "zeta", config.replace(num_heads=2))
    with pytest.raises(ValueError, match=r"`params` must hold.*'gate'"):
        load_keras_file(path, "zeta", config.replace(use_gate=True))
    with pytest.raises(TypeError, match="`config` must be a MultiHeadAttentionConfig"):
        load_keras_file(path, "zeta", config.to_dict())


def test_the_other_arrays(saved):
    folder, layers, _ = saved
    arrays = read_keras_arrays(folder / "model.keras", "dense")
    assert [(name, array.shape) for name, array in arrays.items()] == [
        ("vars/0", (D, D)),
        ("vars/1", (D,)),
    ]
    whole = read_keras_arrays(folder / "model.weights.h5")
    (path,) = (path for path in whole if path.endswith("/dense/vars/0"))
    same_bits([whole[path]], [arrays["vars/0"]])
    query = read_keras_arrays(folder / "model.keras", "zeta/query")
    same_bits(query.values(), numbers(layers["zeta"])[:1])
    with pytest.raises(
        ValueError, match=r"one layer of the file.*layer='norm', which means several"
    ):
        read_keras_arrays(folder / "model.keras", "norm")


class Subclassed(keras.Model):
    """Attention in a list, in a dict, in attributes before and after `layers` in the alphabet."""

    def __init__(self):
        super().__init__()
        self.blocks = [attention("first"), attention("second", use_gate=True)]
        self.last = {"one": attention("third", use_bias=False)}
        self.zz = attention("fourth", value_dim=V)

    def build(self, shape):
        for layer in (*self.blocks, *self.last.values(), self.zz):
            layer.build(shape, shape)

    def call(self, x):
        return x


def test_a_subclassed_model(tmp_path):
    with relaxed():
        model = Subclassed()
        model.build((2, 5, D))
        randomize(model).save_weights(tmp_path / "model.weights.h5")
    layers = {layer.name: layer for layer in (*model.blocks, *model.last.values(), model.zz)}
    paths = {found.name: found.path for found in list_keras_layers(tmp_path / "model.weights.h5")}
    assert paths.keys() == layers.keys() == {"first", "second", "third", "fourth"}
    assert paths["second"] == "blocks/multi_head_attention_1"
    for name, layer in layers.items():
        config, params = load_keras_file(tmp_path / "model.weights.h5", name)
        same_bits(to_keras_weights(params, config), numbers(layer))


def test_bfloat16_comes_as_it_is(tmp_path):
    with relaxed():
        x = keras.Input((5, D), dtype="bfloat16")
        layer = attention("half", dtype="bfloat16")
        keras.Model(x, layer(x, x)).save(tmp_path / "half.keras")
    config, params = load_keras_file(tmp_path / "half.keras")
    assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    same_bits(to_keras_weights(params, config), numbers(layer))
    assert params["query"]["kernel"].dtype == jax.numpy.bfloat16


READER = """
import json, sys
sys.modules["keras"] = None
import numpy as np
from flax_mha.interop.keras import list_keras_layers, load_keras_file, to_keras_weights
folder, names = sys.argv[1], json.loads(sys.argv[2])
arrays = {}
for file in ("model.keras", "model.weights.h5"):
    assert len(list_keras_layers(f"{folder}/{file}")) == len(names) + 2
    for name in names:
        config, params = load_keras_file(f"{folder}/{file}", name)
        for i, array in enumerate(to_keras_weights(params, config)):
            arrays[f"{file}|{name}|{i}"] = array
np.savez(f"{folder}/read.npz", **arrays)
assert sys.modules["keras"] is None
assert not any(module.startswith("keras.") for module in sys.modules)
"""


@pytest.mark.slow
def test_keras_is_not_needed(saved):
    folder, layers, _ = saved
    command = [sys.executable, "-c", READER, str(folder), json.dumps(NAMES)]
    subprocess.run(command, check=True, timeout=300)
    with np.load(folder / "read.npz") as arrays:
        for file in ("model.keras", "model.weights.h5"):
            for name in NAMES:
                expected = numbers(layers[name])
                read = [arrays[f"{file}|{name}|{i}"] for i in range(len(expected))]
                same_bits(read, expected)


def test_h5py_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    config = MultiHeadAttentionConfig(num_heads=N, key_dim=H)
    params = random_params(param_shapes(config, (1, D)))
    with pytest.raises(ImportError, match=r"through h5py.*pip install 'flax_mha\[keras\]'"):
        save_keras_weights(tmp_path / "a.weights.h5", {"a": (config, params)})
    with pytest.raises(ImportError, match="through h5py"):
        list_keras_layers(tmp_path / "a.weights.h5")
