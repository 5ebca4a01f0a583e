"""config.json in the words of old, and with fields that are not there: transformers says the rest.

What transformers' own config class makes of such a file, written out in full, is what it means.
"""

import json
import re
import shutil

import pytest
from old_spellings import old_spelling

from flax_mha.interop.huggingface import list_attention

model_recordings = pytest.importorskip(
    "model_recordings", reason="torch, transformers or safetensors is not installed: [test-models]"
)
pytestmark = pytest.mark.models
FAMILIES = model_recordings.FAMILIES
UNDONE = model_recordings.CONFIG_ERRORS

LOADED = [name for name in FAMILIES if name not in ("deberta-v2",)]
LENGTHS = {"max_length": 130}
# Fields that say nothing of attention, in any model.
BESIDE = re.compile(
    "token_id|dtype|transformers_version|architectures|vocab_size|dropout|pdrop|initializer|act|"
    "activation|use_cache|tie_word|image_token|video_token|vision_start|vision_end|model_type|"
    "router|experts|moe|mlp|ffn|intermediate|pooler|backbone"
)


@pytest.fixture
def folder_of(recorded, tmp_path):
    """A family's folder with another config.json."""

    def folder(name, config):
        there = recorded(name)[0]
        (tmp_path / name).mkdir(exist_ok=True)
        for file in there.iterdir():
            if file.name != "config.json" and not (tmp_path / name / file.name).exists():
                shutil.copyfile(file, tmp_path / name / file.name)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    return folder


def config_of(recorded, name):
    return json.loads((recorded(name)[0] / "config.json").read_text())


def layers_in(folder):
    layers = list_attention(folder, **LENGTHS)
    return {layer.name: (layer.config, repr(layer.call)) for layer in layers}


def in_full(name, config):
    """What transformers makes of it, and would write."""
    known = model_recordings.model_class(FAMILIES[name]).config_class
    return json.loads(known.from_dict(config).to_json_string(use_diff=False))


def rope_of(config):
    """Without the word of old for its type."""
    rope = config.get("text_config", config)["rope_parameters"]
    return {name: value for name, value in rope.items() if name != "type"}


@pytest.mark.parametrize("name", FAMILIES)
def test_rotary_positions_in_the_words_of_old(recorded, folder_of, name):
    config = config_of(recorded, name)
    old = old_spelling(config)
    if old == config:
        assert "rope_parameters" not in str({**config, "layer_types": ""}) or name == "gemma4"
        return
    assert rope_of(in_full(name, old)) == rope_of(in_full(name, config))
    assert layers_in(folder_of(name, old)) == layers_in(recorded(name)[0])


@pytest.mark.parametrize("name", LOADED)
def test_a_field_of_the_future_is_refused_by_name(recorded, folder_of, name):
    config = {**config_of(recorded, name), "attention_of_tomorrow": 0.7}
    with pytest.raises(ValueError, match="attention_of_tomorrow"):
        layers_in(folder_of(name, config))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_a_field_that_is_absent_is_transformers_default(recorded, folder_of, name):
    """Or asked for by name."""
    config = config_of(recorded, name)
    wrong = []
    for path in fields_of(config):
        less = without(config, path)
        try:
            full = in_full(name, less)
        except (*UNDONE, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
            continue  # transformers cannot do without it
        expected, got = outcome(folder_of(name, full)), outcome(folder_of(name, less))
        asked_for = isinstance(got, str) and (path[-1] in got or isinstance(expected, str))
        if got != expected and not asked_for:
            wrong.append(f"without {'.'.join(path)}: {differences(expected, got)}")
    assert not wrong, "\n".join(wrong)


def fields_of(config, path=()):
    for name, value in config.items():
        if name.endswith("_config") and isinstance(value, dict):
            yield from fields_of(value, (*path, name))
        elif not BESIDE.search(name):
            yield (*path, name)


def without(config, path):
    head, *rest = path
    if rest:
        return {**config, head: without(config[head], rest)}
    return {name: value for name, value in config.items() if name != head}


def outcome(folder):
    """The layers, or why there are none."""
    try:
        return layers_in(folder)
    except (ValueError, NotImplementedError, TypeError) as error:
        return str(error)


def differences(expected, got):
    """What the first other layer says, and what it should."""
    if isinstance(expected, str) or isinstance(got, str):
        return f"{got} instead of {expected}"
    name = next(name for name in expected if got.get(name) != expected[name])
    (ours, our_call), (theirs, their_call) = got[name], expected[name]
    ours, theirs = ours.to_dict() | {"call": our_call}, theirs.to_dict() | {"call": their_call}
    other = [x for x in ours if ours[x] != theirs[x]]
    return ", ".join(f"{name}: {x}={ours[x]} instead of {theirs[x]}" for x in other)
