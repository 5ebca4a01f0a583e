"""KerasHub's archives read by class, without KerasHub: what is told, what is refused by name."""

import dataclasses
import json

import h5py
import hub_archives as hub
import jax
import numpy as np
import pytest
from keras_models import same_bits

from flax_mha import MultiHeadAttentionConfig, multi_head_attention
from flax_mha.interop.keras import (
    AttentionLayer,
    list_keras_layers,
    load_attention,
    load_keras_file,
    save_keras_weights,
)
from flax_mha.positions import Llama3Scaling, RelativeBias, Rotary

FIRST, SECOND = (f"{hub.DECODER}{x}/{hub.SELF}" for x in ("", "_1"))
LLAMA = MultiHeadAttentionConfig(
    4, 6, use_bias=False, num_kv_heads=2, position=Rotary(777.0), dtype="float32"
)


def test_llama_tells_its_layers(tmp_path):
    path = hub.hub_archive(tmp_path / "a.keras", "LlamaBackbone")
    layers = load_attention(path)
    assert list(layers) == [FIRST, SECOND] == [found.path for found in list_keras_layers(path)]
    for name, layer in layers.items():
        assert isinstance(layer, AttentionLayer)
        assert (layer.config, layer.call) == (LLAMA, {"use_causal_mask": True})
        config, params = load_keras_file(path, name)
        assert config == LLAMA
        same_bits(jax.tree.leaves(params), jax.tree.leaves(layer.params))
    with h5py.File(path.with_suffix(".weights.h5")) as h5:
        kernel = h5[f"{SECOND}/_key_dense/vars/0"][:]
    np.testing.assert_array_equal(layers[SECOND].params["key"]["kernel"], kernel)
    x = np.ones((1, 5, 24), "float32")
    params = layers[FIRST].params
    assert multi_head_attention(params, x, x, config=LLAMA, **layer.call).shape == x.shape


def test_the_backbone_of_a_task_is_found(tmp_path):
    config = hub.entry("LlamaCausalLM", {"backbone": hub.entry("LlamaBackbone")})
    shapes = hub.llama_arrays(1, "layers/llama_backbone/")
    (layer,) = load_attention(hub.written(tmp_path / "a.keras", config, shapes)).values()
    assert layer.config == LLAMA


def test_llama_3_1_turns_by_its_own_scaling(tmp_path):
    fields = {
        "rope_frequency_adjustment_factor": 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_pretraining_sequence_length": 64,
    }
    path = hub.hub_archive(tmp_path / "a.keras", "LlamaBackbone", **fields)
    position = Rotary(777.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 64))
    assert load_keras_file(path, FIRST)[0] == LLAMA.replace(position=position)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling_of_2027": 8},
            "must be understood.*rope_scaling_of_2027=8: it is not known",
        ),
        ({"num_sinks": 1}, "num_sinks=1: it is not known.*config=.*'num_heads': 4"),
        ({"rope_position_scaling_factor": 2.0}, "rope_position_scaling_factor=2.0: keras_hub 0.32"),
        ({"dropout": 0.1}, "dropout=0.1: it drops features of the context"),
        ({"dropout": 0.1, "later": [1]}, r"later=\[1\]: .*; dropout=0.1: "),
        ({"num_query_heads": "4"}, "can be used here.*TypeError"),
        ({"num_query_heads": 0}, "can be used here.*ZeroDivisionError"),
        ({"num_query_heads": 2**40}, "can be used here.*`key_dim`"),
        ({"num_query_heads": 6}, r"\['query'\]\['kernel'\] must be \[D, N, H\] = \(24, 6, 4\)"),
        ({"num_key_value_heads": 4}, r"\['key'\]\['kernel'\] must be \[C, K, H\]"),
        ({"rope_max_wavelength": None}, "can be used here"),
        ({"rope_max_wavelength": -1.0}, "can be used here.*`Rotary.base`"),
        ({"rope_low_freq_factor": 1.0}, "can be used here.*`Llama3Scaling.factor`"),
        ({"dtype": "quantized"}, "can be used here.*quantized"),
        ({"dtype": {"class_name": "QuantizedDTypePolicy"}}, "can be used here.*dtype policy"),
    ],
)
def test_a_field_that_is_set_is_understood_or_refused_by_name(tmp_path, fields, message):
    path = hub.hub_archive(tmp_path / "a.keras", "LlamaBackbone", **fields)
    for reader in (lambda: load_keras_file(path, FIRST), lambda: load_attention(path)):
        with pytest.raises(ValueError, match=message):
            reader()


@pytest.mark.parametrize(
    ("class_name", "change", "message"),
    [
        ("T5Backbone", {"config": {**hub.FIELDS["T5Backbone"], "num_layers": "2"}}, "TypeError"),
        ("T5Backbone", {"config": {**hub.FIELDS["T5Backbone"], "num_layers": None}}, "TypeError"),
        ("T5Backbone", {"config": {**hub.FIELDS["T5Backbone"], "num_layers": 1}}, "table of dist"),
        ("T5Backbone", {"config": 7}, "must have the field 'num_layers'"),
        ("LlamaBackbone", {"config": [1]}, "must have the field"),
        ("LlamaBackbone", {"config": None}, "must have the field"),
    ],
)
def test_nonsense_is_one_error(tmp_path, class_name, change, message):
    config = hub.entry(class_name) | change
    path = hub.written(tmp_path / "a.keras", config, hub.ARRAYS[class_name])
    with pytest.raises(ValueError, match=message):
        load_attention(path)
    assert len(list_keras_layers(path)) == {"T5Backbone": 6, "LlamaBackbone": 2}[class_name]


def test_what_is_off_is_not_set_and_a_config_is_taken_at_its_word(tmp_path):
    later = {"use_later": False, "later": None, "more": []}
    path = hub.hub_archive(tmp_path / "a.keras", "LlamaBackbone", **later)
    assert load_keras_file(path, FIRST)[0] == LLAMA
    path = hub.hub_archive(tmp_path / "b.keras", "LlamaBackbone", dropout=0.1)
    config = LLAMA.replace(dtype=None)
    assert load_keras_file(path, FIRST, config)[0] is config


def test_a_field_may_be_passed_over_by_name(tmp_path):
    path = hub.hub_archive(tmp_path / "a.keras", "LlamaBackbone", dropout=0.1, later=7)
    with pytest.raises(ValueError, match=r"ignore=\['later', 'dropout'\]"):
        load_attention(path)
    with pytest.raises(ValueError, match=r"Received: later=7: it is not known"):
        load_attention(path, ignore=["dropout"])
    with pytest.raises(TypeError, match=r"Write `\('dropout',\)`"):
        load_attention(path, ignore="dropout")
    with pytest.raises(ValueError, match="`max_length` must be a positive integer"):
        load_attention(path, max_length=0)
    layers = load_attention(path, ignore=["later", "dropout"])
    assert layers[FIRST].config == LLAMA


def test_a_field_that_is_missing_is_named(tmp_path):
    config = hub.entry("LlamaBackbone")
    del config["config"]["rope_max_wavelength"]
    path = hub.written(tmp_path / "a.keras", config, hub.llama_arrays())
    with pytest.raises(ValueError, match=r"must have the field 'rope_max_wavelength'"):
        load_keras_file(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registered_name": "mine>LlamaBackbone"}, "as one of Keras's own or of KerasHub's"),
        ({"registered_name": None}, "as one of Keras's own or of KerasHub's"),
        ({"registered_name": 7}, "as one of Keras's own or of KerasHub's"),
        ({"registered_name": "keras_hub>GemmaBackbone"}, "as one of Keras's own or of KerasHub's"),
        ({"registered_name": "keras_hub>SmolLM3Backbone"}, "among .*'SmolLM3Backbone'"),
    ],
)
def test_a_class_is_known_by_its_registered_name(tmp_path, change, message):
    config = hub.entry("LlamaBackbone") | change
    path = hub.written(tmp_path / "a.keras", config, hub.llama_arrays())
    with pytest.raises(ValueError, match=message):
        load_keras_file(path)


def test_a_model_that_is_not_known_is_no_empty_dict(tmp_path):
    for name, message in (("GPTNeoXBackbone", "'GPTNeoXBackbone'"), ("Dense", "hold an attention")):
        path = hub.written(tmp_path / "a.keras", hub.entry(name), {"layers/dense/vars/0": (3, 3)})
        with pytest.raises(ValueError, match=message):
            load_attention(path)


def test_the_later_layers_of_t5_use_the_first_one_s_table(tmp_path):
    path = hub.hub_archive(tmp_path / "a.keras", "T5Backbone")
    layers = load_attention(path)
    stem = "layers/t5_transformer_layer"
    with h5py.File(path.with_suffix(".weights.h5")) as h5:
        tables = {n: h5[f"{stem}{n}/self_attention/vars/0"][:] for n in ("", "_2")}
    for number, owner, both_ways in (("", "", 1), ("_1", "", 1), ("_2", "_2", 0), ("_3", "_2", 0)):
        layer = layers[f"{stem}{number}/self_attention"]
        assert layer.config.position == RelativeBias(bidirectional=bool(both_ways))
        assert (layer.config.scale, layer.config.key_dim) == (1.0, 10)
        assert layer.call == ({} if both_ways else {"use_causal_mask": True})
        table = layer.params["relative_bias"]["embedding"]
        np.testing.assert_array_equal(table, tables[owner])
    cross = layers[f"{stem}_3/cross_attention"]
    assert (cross.config.position, cross.call) == (None, {})
    save_keras_weights(tmp_path / "b.keras", layers, like=path)
    again = load_attention(tmp_path / "b.keras")
    for name in layers:
        same_bits(*(jax.tree.leaves(x[name].params) for x in (layers, again)))


def test_one_table_is_not_written_twice(tmp_path):
    path = hub.hub_archive(tmp_path / "a.keras", "T5Backbone")
    layers = load_attention(path)
    first, second = (f"layers/t5_transformer_layer{n}/self_attention" for n in ("", "_1"))
    doubled = {
        name: layers[name]._replace(params=jax.tree.map(lambda x: 2 * x, layers[name].params))
        for name in (second, first)
    }
    save_keras_weights(tmp_path / "b.keras", doubled, like=path)  # in either order
    same_bits(
        jax.tree.leaves(load_attention(tmp_path / "b.keras")[second].params),
        jax.tree.leaves(doubled[second].params),
    )
    for wrong in ({second: doubled[second]}, {first: layers[first], second: doubled[second]}):
        with pytest.raises(ValueError, match=r"must be that of its owner.*_layer/self_attention"):
            save_keras_weights(tmp_path / "c.keras", wrong, like=path)


def test_a_table_that_is_missing_is_asked_for(tmp_path):
    path = hub.written(tmp_path / "a.keras", hub.entry("T5Backbone"), hub.t5_arrays(1))
    with pytest.raises(ValueError, match="must hold the table of distances of 'T5Backbone'"):
        load_attention(path)


# --- how a functional model calls its layers ----------------------------------------------------


def functional(name, class_entry, nodes):
    layer = {**class_entry, "name": name, "inbound_nodes": nodes}
    return {"class_name": "Functional", "config": {"layers": [layer]}}


BLOCK = {
    "dtype": "float32",
    "num_heads": 3,
    "dropout": 0.0,
    "intermediate_dim": 16,
    "normalize_first": True,
}
ENCODER, DECODER = (hub.entry(f"Transformer{name}", BLOCK) for name in ("Encoder", "Decoder"))
OWN = {
    "module": "keras.layers",
    "class_name": "MultiHeadAttention",
    "registered_name": None,
    "config": {"name": "x", "num_heads": 3, "key_dim": 8, "dtype": "float32"},
}
CACHED = hub.entry("CachedMultiHeadAttention", OWN["config"])
CAUSAL, OPEN = ({"args": [], "kwargs": {"use_causal_mask": x}} for x in (True, False))
DEFAULT, UNNAMED = {"args": [], "kwargs": {}}, {"args": [{}, True], "kwargs": {}}


@pytest.mark.parametrize(
    ("class_entry", "group", "nodes", "causal"),
    [
        (OWN, "multi_head_attention", [DEFAULT], False),
        (OWN, "multi_head_attention", [CAUSAL, CAUSAL], True),
        (CACHED, "cached_multi_head_attention", [DEFAULT], False),
        (
            DECODER,
            f"transformer_decoder/{hub.SELF}",
            [DEFAULT],
            True,
        ),
        (DECODER, f"transformer_decoder/{hub.SELF}", [OPEN], False),
        (
            DECODER,
            "transformer_decoder/_cross_attention_layer",
            [CAUSAL],
            False,
        ),
        (
            ENCODER,
            f"transformer_encoder/{hub.SELF}",
            [CAUSAL],
            False,
        ),
    ],
)
def test_a_call_is_causal_as_the_model_s_own(tmp_path, class_entry, group, nodes, causal):
    config = functional("x", class_entry, nodes)
    path = hub.written(tmp_path / "a.keras", config, hub.plain_arrays(f"layers/{group}"))
    (layer,) = load_attention(path).values()
    assert layer.call == ({"use_causal_mask": True} if causal else {})
    assert layer.config == MultiHeadAttentionConfig(3, 8, dtype="float32")


@pytest.mark.parametrize("nodes", [[CAUSAL, OPEN], [UNNAMED], [7], 7, [{"kwargs": 7}]])
def test_calls_that_do_not_tell_are_refused(tmp_path, nodes):
    config = functional("x", OWN, nodes)
    shapes = hub.plain_arrays("layers/multi_head_attention")
    path = hub.written(tmp_path / "a.keras", config, shapes)
    with pytest.raises(ValueError, match="must tell by name, and alike, whether they are causal"):
        load_attention(path)
    assert load_keras_file(path)[0].num_heads == 3


def test_weights_alone_tell_no_call(tmp_path):
    path = tmp_path / "a.weights.h5"
    hub.written(tmp_path / "a.keras", {}, hub.plain_arrays("layers/multi_head_attention"))
    with pytest.raises(ValueError, match=r"config\.json must tell how the layer is called"):
        load_attention(path)


def test_gpt_2_is_of_keras_s_own_arrays(tmp_path):
    path = hub.hub_archive(tmp_path / "a.keras", "GPT2Backbone")
    (layer,) = load_attention(path).values()
    assert layer.config == MultiHeadAttentionConfig(3, 8, dropout=0.1, dtype="float32")
    assert layer.call == {"use_causal_mask": True}
    shapes = {k: x.shape for k, x in layer.params["key"].items()}
    assert shapes == {"kernel": (24, 3, 8), "bias": (3, 8)}
    assert dataclasses.replace(layer.config, dropout=0.0) != layer.config


# --- a folder, as `save_to_preset` writes it ----------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    path = hub.hub_archive(tmp_path / "a.keras", "LlamaBackbone")
    folder = tmp_path / "preset"
    folder.mkdir()
    path.with_suffix(".weights.h5").rename(folder / "model.weights.h5")
    (folder / "config.json").write_text(json.dumps(hub.entry("LlamaBackbone")))
    return folder


def test_a_preset_s_folder_is_read_as_an_archive_is(tmp_path, folder):
    layers, of_file = load_attention(folder), load_attention(tmp_path / "a.keras")
    assert [x.config for x in layers.values()] == [x.config for x in of_file.values()]
    same_bits(*(jax.tree.leaves([x.params for x in y.values()]) for y in (layers, of_file)))
    assert [found.path for found in list_keras_layers(folder)] == list(layers)
    doubled = {
        name: layer._replace(params=jax.tree.map(lambda x: 2 * x, layer.params))
        for name, layer in layers.items()
    }
    save_keras_weights(tmp_path / "new.weights.h5", doubled, like=folder)
    (tmp_path / "new.weights.h5").replace(folder / "model.weights.h5")
    again = load_attention(folder)
    same_bits(*(jax.tree.leaves([x.params for x in y.values()]) for y in (again, doubled)))
    with pytest.raises(ValueError, match=r"name must end in '\.weights\.h5'"):
        save_keras_weights(tmp_path / "new.keras", doubled, like=folder)


def test_a_folder_that_is_not_whole_is_refused(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("flax_mha.interop.keras.archive.MAX_CONFIG_BYTES", 100)
    with pytest.raises(ValueError, match=r"'config\.json' must be of at most 100 bytes"):
        load_attention(folder)
    monkeypatch.undo()
    (tmp_path / "a.keras").replace(folder / "model.weights.h5")
    with pytest.raises(ValueError, match=r"must be a `\.keras` archive"):
        load_attention(folder)
    (folder / "config.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"'config\.json' must hold one JSON object"):
        load_attention(folder)
    for name in ("model.weights.h5", "config.json"):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=r"or KerasHub's folder of .*weights in several"):
            load_attention(folder)


@pytest.mark.parametrize(
    ("policy", "dtypes"),
    [
        ("bfloat16", ("bfloat16", "bfloat16")),
        (
            {"class_name": "DTypePolicy", "config": {"name": "mixed_bfloat16"}},
            ("bfloat16", "float32"),
        ),
    ],
)
def test_the_policy_tells_the_dtypes(tmp_path, policy, dtypes):
    path = hub.hub_archive(tmp_path / "a.keras", "LlamaBackbone", dtype=policy)
    config = load_keras_file(path, FIRST)[0]
    assert (config.dtype, config.param_dtype) == dtypes


def test_gpt_oss_has_a_window_in_every_second_layer_alone(tmp_path):
    """A query sees `sliding_window` keys before it: with itself one more."""
    fields = {name: hub.FIELDS["LlamaBackbone"][name] for name in hub.COMMON | hub.GROUPED}
    fields |= {"num_layers": 4, "head_dim": 6, "sliding_window": 7, "dropout": 0}
    fields |= {"rope_max_wavelength": 777.0, "rope_scaling_factor": 1.0}
    shapes = {}
    for number in ("", "_1", "_2", "_3"):
        block = f"layers/gpt_oss_transformer_decoder{number}/self_attention_layer"
        kernels = hub.arrays(block, [(24, 4, 6), (24, 2, 6), (24, 2, 6), (4, 6, 24)])
        biases = zip(kernels, [(4, 6), (2, 6), (2, 6), (24,)])
        shapes |= kernels | {name[:-1] + "1": shape for name, shape in biases}
        shapes[f"{block}/vars/0"] = (4,)
    path = hub.written(tmp_path / "a.keras", hub.entry("GptOssBackbone", fields), shapes)
    configs = [layer.config for layer in load_attention(path).values()]
    assert [config.sliding_window for config in configs] == [None, 8, None, 8]
    oss = LLAMA.replace(use_bias=True, use_sinks=True, position=Rotary(777.0, 6))
    assert [config.replace(sliding_window=None) for config in configs] == [oss] * 4
