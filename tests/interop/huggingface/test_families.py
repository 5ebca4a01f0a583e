"""`load_attention` beside transformers: 57 families, tiny random models, whole layers.

Each model is saved by `save_pretrained` and run once in torch; what went in and out of each of its
attention modules is what the loaded layers must give (tests/support/model_recordings.py).
KerasHub's 8 classes are in tests/interop/keras: the two together are the 65 that were measured.
"""

import jax
import numpy as np
import pytest
from config_faults import faults

import flax_mha
from flax_mha.interop.huggingface import load_attention, save_attention

model_recordings = pytest.importorskip(
    "model_recordings", reason="torch, transformers or safetensors is not installed: [test-models]"
)
pytestmark = pytest.mark.models
FAMILIES, SHARDED = model_recordings.FAMILIES, model_recordings.SHARDED
VARIANTS = {"falcon-40b": "falcon", "llama-3.1": "llama"}  # further models of a family
REFUSED = {"deberta-v2": "a bias that depends on query and key"}
LENGTHS = {"phi3-longrope": {"max_length": 130}}  # whose rotary angles depend on the text's length
LOADED = [name for name in FAMILIES if name not in REFUSED]
TOLERANCE = 2e-5  # of the largest entry
MOVES = 1e-3  # a fault moves the output by more
PROMPT = 110  # tokens; the others come one by one
START = 20  # tokens that come one by one from an empty cache: beyond each window of 7


@pytest.fixture(autouse=True)
def compiled_faster():
    """Into slower programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def load(name, folder):
    return load_attention(folder, **LENGTHS.get(name, {}))


def relative_error(output, call, start=0):
    """Of the largest entry; `output` is that of the tokens from `start` on."""
    expected = call.output[:, start : start + output.shape[1]]
    return float(np.abs(np.asarray(output) - expected).max() / np.abs(call.output).max())


def passed(name, call):
    return model_recordings.passed(FAMILIES[name], call)


def attend(layer, query, value, implementation=None, **options):
    config = layer.config.replace(implementation=implementation)
    return flax_mha.multi_head_attention(
        layer.params, query, value, config=config, **layer.call, **options
    )


def attend_once(layer, query, value, **options):
    """Not compiled: faster where it is called once."""
    with jax.disable_jit():
        return attend(layer, query, value, implementation="reference", **options)


def is_causal(layer):
    return bool(layer.call.get("use_causal_mask"))


def test_the_families_are_those_that_were_measured():
    assert len(FAMILIES.keys() - VARIANTS.keys()) == 57
    assert set(VARIANTS.values()) <= FAMILIES.keys()
    # Of 65 at least 62: 8 are KerasHub's.
    assert len(LOADED) - len(VARIANTS) + 8 >= 62


@pytest.mark.parametrize("name", LOADED)
def test_the_whole_call_is_transformers_own(recorded, name):
    folder, calls = recorded(name)
    layers = load(name, folder)
    assert sorted(layers) == sorted(calls)
    errors = {}
    for module, call in calls.items():
        layer, given = layers[module], passed(name, call)
        defined = attend(layer, call.query, call.value, implementation="reference", **given)
        blocks = attend(layer, call.query, call.value, implementation="blockwise", **given)
        errors[module, "reference"] = relative_error(defined, call)
        errors[module, "blockwise"] = relative_error(blocks, call)
    report(name, "whole", errors, given)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_decoding_is_transformers_own(recorded, name):
    folder, calls = recorded(name)
    layers = load(name, folder)
    errors = {}
    for module, call in calls.items():
        layer, given = layers[module], passed(name, call)
        if call.is_cross and call.query.shape[1] > 1:
            errors[module, "cross"] = cross_decoding(layer, call, given)
        elif is_causal(layer):
            errors[module, "start"] = steps(layer, call, given, empty(layer, call), 0, START)
            errors[module, "prompt"] = after_a_prompt(layer, call, given)
    if not errors:
        assert not any(map(is_causal, layers.values()))
        return
    report(name, "decoding", errors, given)
    assert max(errors.values()) <= TOLERANCE, errors


def empty(layer, call):
    return flax_mha.init_cache(layer.config, len(call.query), capacity=call.query.shape[1])


def steps(layer, call, given, cache, start, stop):
    """The largest error of tokens that come one by one."""
    errors = []
    for t in range(start, stop):
        token = call.query[:, t : t + 1]
        output, cache = attend(layer, token, token, cache=cache, **between(given, t, t + 1))
        errors.append(relative_error(output, call, t))
    return max(errors)


def after_a_prompt(layer, call, given):
    prompt, options = call.query[:, :PROMPT], between(given, 0, PROMPT)
    output, cache = attend(layer, prompt, prompt, cache=empty(layer, call), **options)
    later = steps(layer, call, given, cache, PROMPT, call.query.shape[1])
    return max(relative_error(output, call), later)


def between(given, start, stop):
    """Of the positions `[axes, B, T]`, those of some tokens."""
    return {name: array[..., start:stop] for name, array in given.items()}


def cross_decoding(layer, call, given):
    T = call.query.shape[1]
    config = layer.config
    cache = flax_mha.init_cross_cache(
        layer.params, call.value, config=config, max_queries=T, **given
    )
    errors = []
    for start, stop in ((0, 1), (1, 2), (2, 3), (3, T)):
        output, cache = attend(layer, call.query[:, start:stop], None, cache=cache)
        errors.append(relative_error(output, call, start))
    return max(errors)


def report(name, what, errors, given):
    modules = len({module for module, _ in errors})
    print(f"\n{name:18} {what:9} {modules} layers {max(errors.values()):.1e} {', '.join(given)}")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_said_is_refused_by_name(recorded, name):
    with pytest.raises((NotImplementedError, ValueError), match=REFUSED[name]):
        load(name, recorded(name)[0])


@pytest.mark.parametrize("name", LOADED)
def test_the_way_back_is_bit_for_bit(recorded, name, tmp_path):
    from safetensors.numpy import load_file

    folder, _ = recorded(name)
    save_attention(tmp_path / "back", load(name, folder), like=folder, **LENGTHS.get(name, {}))
    files = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == files
    for file in files:
        if file.endswith(".json"):
            assert (tmp_path / "back" / file).read_bytes() == (folder / file).read_bytes()
            continue
        before, after = load_file(folder / file), load_file(tmp_path / "back" / file)
        assert before.keys() == after.keys()
        for array in before:
            assert before[array].dtype == after[array].dtype
            assert before[array].tobytes() == after[array].tobytes(), array


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_transformers_loads_what_is_saved(recorded, name, tmp_path):
    """Twice each array of the attention, and all others as they are."""
    folder, _ = recorded(name)
    layers = load(name, folder)
    twice = {
        module: layer._replace(params=jax.tree.map(lambda x: 2 * x, layer.params))
        for module, layer in layers.items()
    }
    save_attention(tmp_path / "back", twice, like=folder, **LENGTHS.get(name, {}))
    jax.tree.map(
        np.testing.assert_array_equal,
        {module: layer.params for module, layer in load(name, tmp_path / "back").items()},
        {module: layer.params for module, layer in twice.items()},
    )
    before, after = saved_model(name, folder), saved_model(name, tmp_path / "back")
    attention = tuple(
        f"{module}." for module in model_recordings.attention_modules(before, FAMILIES[name])
    )
    for (array, x), (_, y) in zip(before.named_parameters(), after.named_parameters()):
        is_attention = array.startswith(attention) and "LayerNorm" not in array
        is_attention |= "relative_position_bias" in array  # beside BEiT's attention
        assert np.array_equal(y.detach(), (2 if is_attention else 1) * x.detach()), array


def saved_model(name, folder):
    model = model_recordings.model_class(FAMILIES[name])
    model, info = model.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_each_option_moves_the_output(recorded, name):
    """Left out, or planted wrong: by more than 1e-3 of the largest entry. None is for show."""
    folder, calls = recorded(name)
    moves = {}
    for module, layer in load(name, folder).items():
        call = short(calls[module], is_causal(layer))
        given = passed(name, call)
        right = np.asarray(attend_once(layer, call.query, call.value, **given))
        for fault, faulty in faults(layer):
            if fault not in moves:  # another layer has the same option
                moves[fault] = move(right, faulty, call, given)
    refused = sum(map(np.isinf, moves.values()))
    print(f"\n{name:18} {len(moves)} faults, {refused} refused, least {min(moves.values()):.1e}")
    assert {fault: move for fault, move in moves.items() if not move > MOVES} == {}


def move(right, faulty, call, given):
    """Of the largest entry; infinite where it is refused, as its arrays do not fit."""
    if faulty is None:
        return np.inf
    try:
        wrong = np.asarray(attend_once(faulty, call.query, call.value, **given))
    except (ValueError, TypeError):
        return np.inf
    return np.abs(wrong - right).max() / np.abs(right).max()


def short(call, causal, T=40):
    """The first tokens, where they depend on no others: it still reaches beyond the windows."""
    if not causal:
        return call
    positions = None if call.positions is None else call.positions[..., :T]
    return call._replace(query=call.query[:, :T], value=call.value[:, :T], positions=positions)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gemma3", "gpt2", SHARDED])
def test_16_bits_stay_16_bits(recorded, name, dtype, tmp_path):
    folder, _ = recorded(name)
    model_recordings.save_in(dtype, FAMILIES[name], folder, tmp_path / "half")
    layers = load_attention(tmp_path / "half")
    assert {str(x.dtype) for x in jax.tree.leaves([x.params for x in layers.values()])} == {dtype}
    jax.tree.map(
        lambda half, full: np.testing.assert_array_equal(half, full.astype(dtype)),
        {module: layer.params for module, layer in layers.items()},
        {module: layer.params for module, layer in load_attention(folder).items()},
    )
    save_attention(tmp_path / "back", layers, like=tmp_path / "half")
    for file in (tmp_path / "half").iterdir():
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()
