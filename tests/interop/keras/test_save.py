"""Files that we write: the installed Keras loads them, and nothing else in them has changed."""

import stat
import zipfile

import h5py
import jax
import keras
import numpy as np
import pytest
from helpers import D, H, M, N, T, random_params, relaxed
from keras_models import GROUPED, attention, numbers, randomize, same_bits, whole_model

from flax_mha import MultiHeadAttentionConfig, param_shapes
from flax_mha.interop.keras import (
    list_keras_layers,
    load_keras_file,
    save_keras_weights,
    to_keras_weights,
)

CONFIG = MultiHeadAttentionConfig(num_heads=N, key_dim=H)
LAYER, GROUP = "layers/multi_head_attention", "layers/grouped_query_attention"


def weights(config=CONFIG, seed=0, dtype="float32", D=D, M=D):
    return config, random_params(param_shapes(config, (1, D), (1, M)), seed, dtype)


def functional_model():
    with relaxed():
        x, memory = keras.Input((T, D)), keras.Input((T, M))
        layers = [attention("one", use_gate=True), attention("two", use_bias=False, output_shape=D)]
        layers.append(keras.layers.GroupQueryAttention(**GROUPED, use_gate=True))
        y = layers[0](x, memory)
        y = layers[2](y, layers[1](y, y))
        return keras.Model([x, memory], y), layers


def test_a_new_file_fills_a_keras_model(tmp_path):
    model, layers = functional_model()
    grouped = MultiHeadAttentionConfig(6, H, use_gate=True, num_kv_heads=2)
    ours = {
        LAYER: weights(CONFIG.replace(use_gate=True), M=M),
        f"{LAYER}_1": weights(CONFIG.replace(use_bias=False), seed=1),
        GROUP: weights(grouped, seed=2),
    }
    save_keras_weights(tmp_path / "new.weights.h5", ours)
    with relaxed():
        model.load_weights(tmp_path / "new.weights.h5")
    for layer, (config, params) in zip(layers, ours.values()):
        same_bits(numbers(layer), to_keras_weights(params, config))
    for path, (config, params) in ours.items():
        loaded, same = load_keras_file(tmp_path / "new.weights.h5", path)
        assert loaded == config
        same_bits(jax.tree.leaves(same), jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_in_a_new_file(tmp_path, dtype):
    config, params = weights(CONFIG.replace(param_dtype=dtype), dtype=dtype)
    save_keras_weights(tmp_path / "new.weights.h5", {LAYER: (config, params)})
    loaded, same = load_keras_file(tmp_path / "new.weights.h5")
    assert loaded == config
    same_bits(jax.tree.leaves(same), jax.tree.leaves(params))
    with relaxed():
        x = keras.Input((T, D), dtype=dtype)
        layer = attention("half", dtype=dtype)
        model = keras.Model(x, layer(x, x))
        model.load_weights(tmp_path / "new.weights.h5")
    same_bits(numbers(layer), to_keras_weights(params, config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("like")
    model, layers, _ = whole_model()
    with relaxed():
        model.save(folder / "model.keras")
        model.save_weights(folder / "model.weights.h5")
    return folder, model, layers


def other_numbers(path, names):
    """The file's layers of these names with other numbers."""
    layers = {name: load_keras_file(path, name) for name in names}
    return {
        name: (config, jax.tree.map(lambda x: -x - 1, p)) for name, (config, p) in layers.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.keras", "model.weights.h5"])
def test_a_copy_with_layers_replaced(saved, tmp_path, file):
    folder, model, layers = saved
    before = {name: numbers(layer) for name, layer in layers.items()}
    everything = numbers(model)
    ours = other_numbers(folder / "model.keras", ["encoder/self", "zeta", "td/timed/grouped"])
    save_keras_weights(tmp_path / file, ours, like=folder / file)
    with relaxed():
        randomize(model, seed=9)
        model.load_weights(tmp_path / file)
    for name, layer in layers.items():
        expected = to_keras_weights(*ours[name][::-1]) if name in ours else before[name]
        same_bits(numbers(layer), expected)
    with relaxed():
        model.load_weights(folder / file)  # `like` is as it was
    same_bits(numbers(model), everything)


def test_the_archive_is_a_model_that_keras_loads(tmp_path):
    with relaxed():
        functional_model()[0].save(tmp_path / "model.keras")
    ours = other_numbers(tmp_path / "model.keras", ["one"])
    save_keras_weights(tmp_path / "new.keras", ours, like=tmp_path / "model.keras")
    with relaxed():
        model = keras.models.load_model(tmp_path / "new.keras")
    same_bits(numbers(model.get_layer("one")), to_keras_weights(*ours["one"][::-1]))
    paths = [tmp_path / "model.keras", tmp_path / "new.keras"]
    old, new = [{n: z.read(n) for n in z.namelist()} for z in map(zipfile.ZipFile, paths)]
    assert list(new) == list(old)
    assert [name for name in new if new[name] != old[name]] == ["model.weights.h5"]


@pytest.mark.slow
def test_a_file_may_replace_itself(saved, tmp_path):
    path = tmp_path / "model.weights.h5"
    path.write_bytes((saved[0] / path.name).read_bytes())
    ours = other_numbers(path, ["alpha"])
    with open(path, "rb") as reader:
        save_keras_weights(path, ours, like=path)
        assert reader.read() == (saved[0] / path.name).read_bytes()  # replaced, not overwritten
    same_bits(*map(jax.tree.leaves, (load_keras_file(path, "alpha")[1], ours["alpha"][1])))
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((saved[0] / path.name).stat().st_mode)


def test_bfloat16_in_a_copy(tmp_path):
    config, params = weights(CONFIG.replace(param_dtype="bfloat16"), dtype="bfloat16")
    path = tmp_path / "half.weights.h5"
    save_keras_weights(path, {LAYER: (config, params)})
    ours = other_numbers(path, [LAYER])
    save_keras_weights(path, ours, like=path)
    same_bits(*map(jax.tree.leaves, (load_keras_file(path)[1], ours[LAYER][1])))
    with h5py.File(path) as h5:
        assert h5[f"{LAYER}/query_dense/vars/0"].attrs["dtype"] == "bfloat16"


GROUPED_CONFIG = CONFIG.replace(num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize(
    ("file", "layers", "like", "message"),
    [
        ("a.h5", {LAYER: weights()}, False, r"must end in '.weights.h5'.*a\.h5"),
        ("a.weights.h5", {LAYER: weights()}, "model.keras", r"must end in '.keras'"),
        ("a.keras", {LAYER: weights()}, "model.weights.h5", r"must end in '.weights.h5'"),
        ("a.keras", {"gamma": weights()}, "model.keras", "layer='gamma', which is none of"),
        ("a.keras", {"self": weights()}, "model.keras", "layer='self', which means several"),
        ("a.keras", {"zeta": weights()}, "model.keras", r"'layers/.*query/bias \[3, 11\] float32"),
        (
            "a.keras",
            {"encoder/self": weights(CONFIG.replace(use_gate=True), dtype="float16")},
            "model.keras",
            r"must keep its arrays: query/kernel \[17, 3, 11\] float32.*11\] float16.*Cast",
        ),
        ("a.weights.h5", {"../a": weights()}, False, "names joined by single slashes"),
        ("a.weights.h5", {"/a": weights()}, False, "names joined by single slashes"),
        ("a.weights.h5", {"a//b": weights()}, False, "names joined by single slashes"),
        ("a.weights.h5", {"": weights()}, False, "names joined by single slashes"),
        ("a.weights.h5", {"a": weights(), "a/b": weights()}, False, "'a/b' in 'a'"),
        (
            "a.weights.h5",
            {"a": weights(GROUPED_CONFIG.replace(value_dim=5))},
            False,
            r"'a' is a GroupQueryAttention, which lacks \['value_dim'\]",
        ),
        (
            "a.weights.h5",
            {"a": (CONFIG.replace(use_bias=False), weights()[1])},
            False,
            r"must hold \['kernel'\]",
        ),
    ],
)
def test_what_cannot_be_written(saved, tmp_path, file, layers, like, message):
    like = saved[0] / like if like else None
    with pytest.raises(ValueError, match=message):
        save_keras_weights(tmp_path / file, layers, like=like)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_given_twice(saved, tmp_path):
    path = saved[0] / "model.keras"
    layer = load_keras_file(path, "zeta")
    (zeta,) = (found.path for found in list_keras_layers(path) if found.name == "zeta")
    layers = {"zeta": layer, zeta: layer}
    with pytest.raises(ValueError, match=r"must be given once.*two values for 'layers"):
        save_keras_weights(tmp_path / "a.keras", layers, like=path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.weights.h5"
    path.write_bytes(b"old")
    monkeypatch.delattr(h5py.Group, "create_dataset")
    with pytest.raises(AttributeError):
        save_keras_weights(path, {LAYER: weights()})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_numpy_parameters_are_taken(tmp_path):
    config, params = weights()
    arrays = jax.tree.map(np.asarray, params)
    save_keras_weights(tmp_path / "a.weights.h5", {LAYER: (config, arrays)})
    loaded = load_keras_file(tmp_path / "a.weights.h5")[1]
    same_bits(jax.tree.leaves(loaded), jax.tree.leaves(params))
