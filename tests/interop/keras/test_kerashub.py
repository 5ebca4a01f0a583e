"""Every model of KerasHub in the table, from its file: each layer answers as the live one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

pytest.importorskip("keras_hub", reason="keras_hub is not installed: pip install keras-hub")

import kerashub_models as hub
from keras_models import ported, same_bits

from flax_mha import init_cache, multi_head_attention, param_shapes
from flax_mha.interop.keras import (
    AttentionLayer,
    load_attention,
    read_keras_arrays,
    save_keras_weights,
)
from flax_mha.positions import RelativeBias, Rotary

pytestmark = pytest.mark.models
TOLERANCE = 2e-5  # of the largest entry
# On JAX these leave their window out: without the fused product they are what the file says.
DENSE = ["qwen.qwen_attention", "qwen3.qwen3_attention", "qwen3_moe.qwen3_moe_attention"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: (file, records, layers of the file)}, made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("hub"), {}

    def get(name):
        if name not in made:
            model = hub.built(name)
            path = hub.saved(model, folder / f"{len(made)}.keras")
            with pytest.MonkeyPatch.context() as patch:
                for module in DENSE:
                    where = f"keras_hub.src.models.{module}.fused_attention_op_available"
                    patch.setattr(where, lambda: False)
                records = hub.recorded(model)
            made[name] = path, records, load_attention(path)
        return made[name]

    return get


def as_in_the_file(layer, live):
    """Whether the layer of the file is the live one: its query's numbers are no other's."""
    kernel = hub.query_kernel(live)
    mine = np.asarray(layer.params["query"]["kernel"])
    turned = mine.swapaxes(0, 1) if kernel.shape[0] == mine.shape[1] != mine.shape[0] else mine
    return kernel.size == mine.size and (kernel == turned.reshape(kernel.shape)).all()


def pairs(models, name):
    """(path, layer, query, value, output) of each call of the model."""
    _, records, layers = models(name)
    for live, *arrays in records:
        (path,) = [path for path, layer in layers.items() if as_in_the_file(layer, live)]
        yield path, layers[path], *arrays


def error(output, expected):
    return np.abs(np.asarray(output) - expected).max() / np.abs(expected).max()


@functools.partial(jax.jit, static_argnames=("config", "names"))
def compiled(params, query, value, config, names):
    return multi_head_attention(params, query, value, config=config, **dict(names))


def answer(layer, query, value, **changed):
    config = layer.config.replace(**changed)
    return compiled(layer.params, query, value, config, tuple(layer.call.items()))


@pytest.mark.parametrize("name", hub.ZOO)
def test_every_layer_answers_as_the_live_one(models, name):
    seen = set()
    for path, layer, query, value, expected in pairs(models, name):
        seen.add(path)
        for implementation in ("reference", "blockwise"):
            output = answer(layer, query, value, implementation=implementation)
            assert error(output, expected) < TOLERANCE, (path, implementation)
    assert seen == set(models(name)[2])


@functools.partial(jax.jit, static_argnames="config")
def step(params, x, cache, config):
    return multi_head_attention(params, x, x, config=config, cache=cache, use_causal_mask=True)


def causal_calls(models, name):
    return [row for row in pairs(models, name) if row[1].call]


STEPWISE = [name for name in hub.ZOO if hub.ZOO[name][0] not in hub.ENCODERS]


@pytest.mark.parametrize("name", STEPWISE)
def test_decoding_answers_as_the_live_whole(models, name):
    """A prompt beyond the window, then token by token."""
    steps = 6
    for path, layer, x, _, expected in causal_calls(models, name):
        cache = init_cache(layer.config, hub.BATCH, capacity=hub.LENGTH)
        prompt, cache = step(layer.params, x[:, :-steps], cache, layer.config)
        outputs = [prompt]
        for t in range(hub.LENGTH - steps, hub.LENGTH):
            output, cache = step(layer.params, x[:, t : t + 1], cache, layer.config)
            outputs.append(output)
        assert error(np.concatenate(outputs, axis=1), expected) < TOLERANCE, path


QUICK = {"implementation": "reference"}
LEFT_OUT = {
    "position": None,
    "sliding_window": None,
    "qk_norm": None,
    "scale": None,
    "soft_cap": None,
    "use_sinks": False,
}


def without(layer, field):
    """The layer without one of its options, and without the arrays of it."""
    config = layer.config.replace(**{field: LEFT_OUT[field]})
    kept = param_shapes(config, (1, 24))
    return layer._replace(config=config, params={k: layer.params[k] for k in kept})


def planted(config):
    """Configs that are wrong by a little, by what is wrong."""
    position = config.position
    if isinstance(position, Rotary):
        yield "base", {"position": dataclasses.replace(position, base=1.1 * position.base)}
        yield "pairs", {"position": dataclasses.replace(position, interleaved=True)}
        if position.scaling is not None:
            yield "scaling", {"position": dataclasses.replace(position, scaling=None)}
    if isinstance(position, RelativeBias):
        other = dataclasses.replace(position, bidirectional=not position.bidirectional)
        yield "direction", {"position": other}
    if config.sliding_window:
        yield "window", {"sliding_window": config.sliding_window + 1}
    if config.qk_norm is not None:
        yield "offset", {"qk_norm": dataclasses.replace(config.qk_norm, offset=0.5)}
        epsilon = 1.1 * config.qk_norm.epsilon
        yield "epsilon", {"qk_norm": dataclasses.replace(config.qk_norm, epsilon=epsilon)}
    yield "scale", {"scale": 1.1 / np.sqrt(config.key_dim) if config.scale is None else 1.1}


@pytest.mark.parametrize("name", hub.ZOO)
def test_no_option_is_there_for_nothing(models, name):
    """Each left out, or wrong by a little, is found."""
    kinds = {}
    for row in pairs(models, name):
        kinds.setdefault(str(row[1].config), row)
    for path, layer, query, value, expected in kinds.values():
        for field, none in LEFT_OUT.items():
            if getattr(layer.config, field) != none:
                output = answer(without(layer, field), query, value, **QUICK)
                assert error(output, expected) > 1e-3, (path, field)
        for what, changed in planted(layer.config):
            output = answer(layer, query, value, **QUICK, **changed)
            assert error(output, expected) > 1e-4, (path, what)
        if layer.call:
            open_layer = layer._replace(call={})
            assert error(answer(open_layer, query, value, **QUICK), expected) > 1e-3, path


@pytest.mark.parametrize("name", hub.ZOO)
def test_it_goes_back_bit_for_bit(models, name, tmp_path):
    path, _, layers = models(name)
    doubled = {
        name: layer._replace(params=jax.tree.map(lambda x: 2 * x, layer.params))
        for name, layer in layers.items()
    }
    for written, expected in ((layers, path), (doubled, None)):
        save_keras_weights(tmp_path / "copy.keras", written, like=path)
        again = load_attention(tmp_path / "copy.keras")
        same_bits(*(jax.tree.leaves([x.params for x in y.values()]) for y in (again, written)))
        if expected is not None:
            before, after = read_keras_arrays(expected), read_keras_arrays(tmp_path / "copy.keras")
            same_bits([before[key] for key in before], [after[key] for key in before])


@pytest.mark.parametrize("name", hub.ZOO)
def test_a_live_layer_is_read_by_the_same_rows(models, name):
    _, records, layers = models(name)
    for live in {id(record[0]): record[0] for record in records}.values():
        (layer,) = [layer for layer in layers.values() if as_in_the_file(layer, live)]
        if "relative_bias" in layer.params and not live.use_relative_attention_bias:
            with pytest.raises(ValueError, match="table of distances must be the layer's own"):
                ported(live)
            continue
        config, params = ported(live)
        own = config.replace(attention_axes=None, value_dim=None)
        assert own.to_dict() | {"kernel_initializer": None} == layer.config.to_dict() | {
            "kernel_initializer": None
        }
        same_bits(jax.tree.leaves(params), jax.tree.leaves(layer.params))


def test_keras_hub_leaves_windows_out_on_jax():
    """What load_attention says of Qwen's windows; where this fails, KerasHub has mended it."""
    model = hub.built("qwen 3")
    live, x, _, expected = hub.recorded(model)[0]
    config, params = ported(live)
    layer = AttentionLayer(config, params, {"use_causal_mask": True})
    assert error(answer(layer, x, x), expected) > 1e-2
    assert error(answer(layer, x, x, sliding_window=None), expected) < TOLERANCE
    with pytest.MonkeyPatch.context() as patch:
        where = "keras_hub.src.models.qwen3.qwen3_attention.fused_attention_op_available"
        patch.setattr(where, lambda: False)
        assert error(answer(layer, x, x), hub.recorded(model)[0][3]) < TOLERANCE


def test_a_task_s_preset_is_read(tmp_path):
    backbone = hub.built("llama")
    with hub.relaxed_models():
        task = hub.MODELS.LlamaCausalLM(backbone=backbone, preprocessor=None)
        task.save_to_preset(str(tmp_path / "preset"))
    of_file = load_attention(hub.saved(task, tmp_path / "task.keras"))
    of_folder = load_attention(tmp_path / "preset")
    assert [x.config for x in of_file.values()] == [x.config for x in of_folder.values()]
    assert all(name.startswith("layers/llama_backbone/layers/") for name in of_file)
    same_bits(*(jax.tree.leaves([x.params for x in y.values()]) for y in (of_file, of_folder)))
    kernel = hub.query_kernel(hub.attention_layers(backbone)[0])
    np.testing.assert_array_equal(next(iter(of_folder.values())).params["query"]["kernel"], kernel)


def test_blocks_of_kerashub_in_a_model_of_one_s_own(tmp_path):
    x, memory, model = hub.own_model()
    layers = load_attention(hub.saved(model, tmp_path / "own.keras"))
    records = hub.recorded(model, (x, memory))
    assert len(layers) == len(records) == 5
    for live, query, value, expected in records:
        (layer,) = [layer for layer in layers.values() if as_in_the_file(layer, live)]
        assert error(answer(layer, query, value), expected) < TOLERANCE
    assert sum(bool(layer.call) for layer in layers.values()) == 1


@pytest.mark.parametrize("length", [64, hub.LENGTH])
def test_phi_3_turns_long_texts_otherwise(tmp_path, length):
    """KerasHub chooses by each text's length; here the longest is told."""
    model, x = hub.long_phi(length)
    path = hub.saved(model, tmp_path / "phi.keras")
    layers = load_attention(path, max_length=length)
    for live, query, value, expected in hub.recorded(model, x):
        (layer,) = [layer for layer in layers.values() if as_in_the_file(layer, live)]
        assert error(answer(layer, query, value), expected) < TOLERANCE
    other = load_attention(path, max_length=64 + hub.LENGTH - length)
    layer = layer._replace(config=next(iter(other.values())).config)
    assert error(answer(layer, query, value), expected) > 1e-3


def test_what_keras_hub_does_not_do_is_refused_by_name(tmp_path):
    model = hub.MODELS
    for name, (backbone, arguments), message in (
        ("llama", hub.ZOO["llama"], "rope_position_scaling_factor=3.0"),
        ("gemma 2", hub.ZOO["gemma 2"], "query_head_dim_normalize=False"),
        ("phi 3", hub.ZOO["phi 3"], "rope_scaling_type='su'"),
        ("gemma 3", hub.ZOO["gemma 3"], "use_bidirectional_attention=True"),
    ):
        with hub.relaxed_models():
            live = getattr(model, backbone)(**arguments, **hub.REFUSED[name])
        with pytest.raises(ValueError, match=message):
            load_attention(hub.saved(live, tmp_path / f"{name}.keras"))


@pytest.mark.parametrize("name", ["llama", "falcon", "bert", "t5"])
def test_padding_goes_in_as_a_mask(models, name):
    """Texts of 130 and of 77 tokens: what stands at tokens is as in KerasHub."""
    model, path = hub.built(name), models(name)[0]
    inputs, valid = hub.inputs_of(model), np.arange(hub.LENGTH) < np.array([[hub.LENGTH], [77]])
    inputs |= {key: valid.astype("int32") for key in inputs if "mask" in key}
    layers = load_attention(path)
    for live, query, value, expected in hub.recorded(model, inputs):
        (layer,) = [layer for layer in layers.values() if as_in_the_file(layer, live)]
        output = multi_head_attention(
            layer.params, query, value, config=layer.config, value_mask=valid, **layer.call
        )
        assert error(np.asarray(output)[valid], expected[valid]) < TOLERANCE


def test_bfloat16_comes_bit_for_bit(tmp_path):
    with hub.relaxed_models():
        model = hub.MODELS.LlamaBackbone(**hub.GROUPED, dtype="bfloat16")
    path = hub.saved(hub.randomized(model), tmp_path / "llama.keras")
    layer = next(iter(load_attention(path).values()))
    assert (layer.config.dtype, layer.config.param_dtype) == ("bfloat16", "bfloat16")
    config, params = ported(hub.attention_layers(model)[0])
    assert config == layer.config
    same_bits(jax.tree.leaves(params), jax.tree.leaves(layer.params))
    assert params["key"]["kernel"].dtype == "bfloat16"
