"""Files of layers that are not Keras's own, as KerasHub writes them: nothing in them is lost."""

import h5py
import jax
import keras
import keras_models as models
import numpy as np
import pytest
from helpers import D, random_params, relaxed
from keras_models import attention, numbers, randomize, same_bits, saved_block

from flax_mha import MultiHeadAttentionConfig, param_shapes
from flax_mha.interop.keras import (
    from_keras_weights,
    list_keras_layers,
    load_keras_file,
    save_keras_weights,
    to_keras_weights,
)
from flax_mha.norms import RMSNorm

PLAIN = MultiHeadAttentionConfig(4, 5, use_bias=False, num_kv_heads=2)
TABLED = MultiHeadAttentionConfig(4, 5, use_bias=False, position="relative_bias", scale=1.0)
CONFIGS = {
    "LlamaAttention": PLAIN.replace(position="rotary", sliding_window=3),
    "Qwen3Attention": PLAIN.replace(position="rotary", qk_norm="rms"),
    "GptOssAttention": PLAIN.replace(position="rotary", use_sinks=True),
    "GemmaAttention": PLAIN.replace(position="rotary"),
    "Gemma3Attention": PLAIN.replace(position="rotary", qk_norm=RMSNorm(offset=1.0), scale=0.3),
}
PATH = "layers/block/attention"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{class name: (file, the Keras layer)}, made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("other"), {}

    def get(name, features=D):
        if (name, features) not in made:
            path = folder / f"{name}{features}.weights.h5"
            made[name, features] = path, saved_block(getattr(models, name)(), path, features)
        return made[name, features]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_no_other_class_is_taken_for_keras_s(saved, name):
    message = (
        r"must be Keras's own.*'layers/block/attention', of another class with .*"
        r"'rotary_embedding_layer'.*shapes tell .*'num_heads': 4, 'key_dim': 5.*'num_kv_heads': 2"
        r".*Nothing tells position, sliding_window, attention_axes.*qk_norm.*use_sinks.*scale"
    )
    with pytest.raises(ValueError, match=message):
        load_keras_file(saved(name)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_with_its_config_it_comes_whole_and_goes_back(saved, name, tmp_path):
    path, layer = saved(name)
    config = CONFIGS[name]
    taken, params = load_keras_file(path, None, config)
    assert taken is config
    theirs = numbers(layer)
    if name.startswith("Gemma"):
        turned = [w.ndim == 3 and w.shape[0] in (2, 4) and w.shape[1] == D for w in theirs]
        theirs = [w.swapaxes(0, 1) if turn else w for turn, w in zip(turned, theirs)]
    same_bits(to_keras_weights(params, config), theirs)
    same_bits(jax.tree.leaves(from_keras_weights(theirs, config)), jax.tree.leaves(params))
    doubled = jax.tree.map(lambda x: 2 * x, params)
    save_keras_weights(tmp_path / "b.weights.h5", {PATH: (config, doubled)}, like=path)
    again = load_keras_file(tmp_path / "b.weights.h5", None, config)[1]
    same_bits(jax.tree.leaves(again), jax.tree.leaves(doubled))
    with h5py.File(path) as one, h5py.File(tmp_path / "b.weights.h5") as two:
        norm = "layers/block/norm/vars/0"
        np.testing.assert_array_equal(one[norm], two[norm])


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("Qwen3Attention", PLAIN, r"'_key_dense_layer_norm/vars/0' \[5\], '_query.*qk_norm='rms'"),
        ("Qwen3Attention", PLAIN.replace(qk_norm="l2"), "'_query_dense_layer_norm/vars/0'"),
        ("GptOssAttention", PLAIN, r"place in the config.*'vars/0' \[4\].*use_sinks=True"),
        ("Gemma3Attention", PLAIN, r"'query_norm/vars/0' \[5\].*read_keras_arrays"),
        ("Gemma3Attention", PLAIN.replace(qk_norm="l2"), r"'query_norm/vars/0' \[5\].*by hand"),
        ("LlamaAttention", PLAIN.replace(qk_norm="rms"), r"`params` must hold.*'query_norm'"),
        ("LlamaAttention", PLAIN.replace(use_sinks=True), r"`params` must hold.*'sinks'"),
        ("LlamaAttention", TABLED, r"`params` must hold.*'relative_bias'"),
    ],
)
def test_what_has_no_place_is_refused_by_name(saved, tmp_path, name, config, message):
    path, _ = saved(name)
    with pytest.raises(ValueError, match=message):
        load_keras_file(path, None, config)


def test_what_has_no_place_is_not_left_behind_in_a_copy(saved, tmp_path):
    path, _ = saved("Qwen3Attention")
    params = load_keras_file(saved("LlamaAttention")[0], None, PLAIN)[1]
    with pytest.raises(ValueError, match="'_key_dense_layer_norm/vars/0'"):
        save_keras_weights(tmp_path / "b.weights.h5", {PATH: (PLAIN, params)}, like=path)


def test_a_new_file_has_no_place_for_norms_and_sinks(saved, tmp_path):
    for name, field in (("Qwen3Attention", "qk_norm"), ("GptOssAttention", "use_sinks")):
        params = load_keras_file(saved(name)[0], None, CONFIGS[name])[1]
        layers = {"layers/a": (CONFIGS[name], params)}
        with pytest.raises(ValueError, match=rf"no place for \['{field}'\].*`like=`"):
            save_keras_weights(tmp_path / "a.weights.h5", layers)


class Square(models.GemmaAttention):
    """4 heads of 4 features: `[N, D, H]` and `[D, N, H]` are one shape."""

    heads = (4, 4, 4)


def test_axes_that_the_sizes_of_the_query_alone_do_tell(saved):
    """2 features as the keys have heads, but 4 heads in the query."""
    path, layer = saved("GemmaAttention", 2)
    params = load_keras_file(path, None, PLAIN)[1]
    np.testing.assert_array_equal(params["key"]["kernel"], numbers(layer)[1].swapaxes(0, 1))


@pytest.mark.parametrize("axes", ["NDH", "DNH"])
def test_axes_that_sizes_do_not_tell_are_told(tmp_path, axes):
    path, copy = tmp_path / "a.weights.h5", tmp_path / "b.weights.h5"
    kernel = numbers(saved_block(Square(), path, 4))[0]
    config = PLAIN.replace(num_kv_heads=4)
    with pytest.raises(ValueError, match=r"must tell heads from features.*kernel_axes='NDH'"):
        load_keras_file(path, None, config)
    params = load_keras_file(path, None, config, kernel_axes=axes)[1]
    expected = kernel if axes == "DNH" else kernel.swapaxes(0, 1)
    np.testing.assert_array_equal(params["query"]["kernel"], expected)
    layers = {PATH: (config, jax.tree.map(lambda x: 2 * x, params))}
    with pytest.raises(ValueError, match="must tell heads from features"):
        save_keras_weights(copy, layers, like=path)
    save_keras_weights(copy, layers, like=path, kernel_axes=axes)
    with h5py.File(copy) as h5:
        np.testing.assert_array_equal(h5[f"{PATH}/query_dense/vars/0"], 2 * kernel)
    with pytest.raises(ValueError, match="`kernel_axes` must be one of"):
        load_keras_file(path, None, config, kernel_axes="HND")


def test_the_list_shows_what_lies_beside(saved):
    (found,) = list_keras_layers(saved("Qwen3Attention")[0])
    assert list(found.shapes)[4:] == [
        "_key_dense_layer_norm/vars/0",
        "_query_dense_layer_norm/vars/0",
    ]
    (found,) = list_keras_layers(saved("LlamaAttention")[0])
    assert len(found.shapes) == 4


class Turned(keras.layers.MultiHeadAttention):
    """Somebody's own, of the same parts as Keras's."""


def test_a_list_of_layers_names_the_class(tmp_path):
    with relaxed():
        x = keras.Input((5, D))
        layer = Turned(4, 5, **models.ZEROS)
        model = keras.Model(x, layer(x, x))
        model.save_weights(tmp_path / "turned.weights.h5")
    path, config = tmp_path / "turned.weights.h5", MultiHeadAttentionConfig(4, 5)
    with pytest.raises(ValueError, match="'layers/turned', of another class"):
        load_keras_file(path)
    same_bits(to_keras_weights(load_keras_file(path, None, config)[1], config), numbers(layer))


def test_a_layer_of_keras_s_own_that_is_an_attribute(tmp_path):
    """Older Keras saves a random state with it; heads and features may be of one number."""
    path = tmp_path / "own.weights.h5"
    with relaxed():
        layer = attention("own", num_heads=4, key_dim=5, dropout=0.5)
        holder = keras.Sequential([keras.Input((5, 4)), models.Described(layer)])
        randomize(layer)
        holder.save_weights(path)
    (found,) = list_keras_layers(path)
    with h5py.File(path, "r+") as h5:
        h5[f"{found.path}/_dropout_layer/seed_generator/vars/0"] = np.zeros(2, "uint32")
    config, params = load_keras_file(path)
    assert config == MultiHeadAttentionConfig(4, 5)
    same_bits(to_keras_weights(params, config), numbers(layer))


SOME = MultiHeadAttentionConfig(4, 5, use_bias=("query", "value", "attention_output"))


@pytest.fixture
def whisper(tmp_path):
    """(file, weights) of a layer whose key has no bias, as KerasHub's Whisper has it."""
    path = tmp_path / "whisper.weights.h5"
    params = random_params(param_shapes(SOME.replace(use_bias=True), (1, D)))
    save_keras_weights(path, {PATH: (SOME.replace(use_bias=True), params)})
    with h5py.File(path, "r+") as h5:
        del h5[f"{PATH}/key_dense/vars/1"]
    del params["key"]["bias"]
    return path, params


def test_biases_that_are_absent_stay_absent(whisper, tmp_path):
    path, expected = whisper
    config, params = load_keras_file(path)
    assert config == SOME
    same_bits(jax.tree.leaves(params), jax.tree.leaves(expected))
    weights = to_keras_weights(params, config)
    assert len(weights) == 7
    same_bits(jax.tree.leaves(from_keras_weights(weights, config)), jax.tree.leaves(params))
    doubled = jax.tree.map(lambda x: 2 * x, params)
    save_keras_weights(tmp_path / "b.weights.h5", {PATH: (config, doubled)}, like=path)
    same_bits(
        jax.tree.leaves(load_keras_file(tmp_path / "b.weights.h5")[1]), jax.tree.leaves(doubled)
    )


def test_keras_s_own_layer_has_all_biases_and_gets_zeros(whisper, tmp_path):
    _, params = whisper
    new, copy = tmp_path / "new.weights.h5", tmp_path / "copy.weights.h5"
    save_keras_weights(new, {"layers/multi_head_attention": (SOME, params)})
    layers = {"layers/multi_head_attention": (SOME, jax.tree.map(lambda x: 2 * x, params))}
    save_keras_weights(copy, layers, like=new)
    with relaxed():
        x = keras.Input((5, D))
        layer = attention("own", num_heads=4, key_dim=5)
        model = keras.Model(x, layer(x, x))
        for path, factor in ((new, 1), (copy, 2)):
            randomize(layer)
            model.load_weights(path)
            weights = numbers(layer)
            assert not weights.pop(3).any()
            same_bits(weights, [factor * x for x in to_keras_weights(params, SOME)])


def test_a_copy_does_not_lose_a_bias(whisper, tmp_path):
    path, params = whisper
    config = SOME.replace(use_bias=True)
    params = {**params, "key": {**params["key"], "bias": np.ones((4, 5), "float32")}}
    with pytest.raises(ValueError, match=r"must keep its arrays: .*Received: .*key/bias \[4, 5\]"):
        save_keras_weights(tmp_path / "b.weights.h5", {PATH: (config, params)}, like=path)


def test_dense_kernels_and_a_table_as_in_t5(saved, tmp_path):
    path, layer = saved("T5Attention")
    with pytest.raises(ValueError, match=r"of another class.*\[D, N H\] do not tell heads"):
        load_keras_file(path)
    params = load_keras_file(path, None, TABLED)[1]
    table, *kernels = numbers(layer)
    shapes = [(D, 4, 5)] * 3 + [(4, 5, D)]
    theirs = [table, *(kernel.reshape(s) for kernel, s in zip(kernels, shapes))]
    same_bits(to_keras_weights(params, TABLED), theirs)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    save_keras_weights(tmp_path / "b.weights.h5", {PATH: (TABLED, doubled)}, like=path)
    with h5py.File(tmp_path / "b.weights.h5") as h5:
        np.testing.assert_array_equal(h5[f"{PATH}/output_projector/vars/0"], 2 * kernels[3])
    for wrong, message in (
        (TABLED.replace(key_dim=4), r"'query' must have 4 heads of 4 features.*\[17, 20\]"),
        (TABLED.replace(position=None), r"'vars/0' \[32, 4\].*position='relative_bias'"),
        (TABLED.replace(position=None, use_sinks=True), r"\['sinks'\]\['logits'\] must be \[N\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_keras_file(path, None, wrong)
