"""The table of model types beside transformers' own config classes, where that is installed."""

import dataclasses
import itertools
import json
import re

import checkpoints
import pytest

from flax_mha.guides import pages
from flax_mha.interop.huggingface import load_attention
from flax_mha.interop.huggingface.families import FAMILIES, UNSAYABLE
from flax_mha.interop.huggingface.families.defaults import DEFAULTS
from flax_mha.interop.huggingface.family import COMMON, OFF
from flax_mha.interop.huggingface.fields import Fields


def read(model_type, values):
    """The fields of a model type, after its row has read them, of two layers."""
    family = FAMILIES[model_type]
    fields = Fields(values, family.defaults, family.names, max_length=100)
    for tower in family.towers:
        fields.inner(tower.field)
    for stack in family.stacks:
        every = stack.layers(fields) if callable(stack.layers) else [(0,), (1,)]
        if isinstance(stack.layers, str):
            fields.size(stack.layers)
        for at in itertools.islice(every, 2):
            for reader in stack.readers:
                reader(fields, at)
            for told in (stack.call, stack.layout, stack.features, stack.left_out, stack.aliases):
                if callable(told) and not isinstance(told, tuple):
                    told(fields, at)
            if isinstance(stack.features, str):
                fields.size(stack.features)
    for name in family.refused:
        fields.get(name)
    return fields


# Of files on the hub, as far as they differ from what transformers writes now.
FILES = {
    "bert": {
        "directionality": "bidi",
        "pooler_type": "first",
        "position_embedding_type": "absolute",
    },
    "phi3": {"attention_bias": False, "auto_map": {}, "sliding_window": 2047, "rope_scaling": None},
    "bloom": {"n_embed": 1024, "num_attention_heads": 16, "n_layer": 24, "offset_alibi": 100},
    "mpt": {"attn_config": {"alibi": True, "attn_impl": "torch", "clip_qkv": None, "qk_ln": False}},
    "gpt2": {"n_ctx": 1024, "task_specific_params": {"text-generation": {"do_sample": True}}},
    "t5": {"n_positions": 512, "output_past": True, "num_decoder_layers": None},
    "whisper": {"forced_decoder_ids": [[1, 2]], "num_hidden_layers": 4},
    "modernbert": {"position_embedding_type": "absolute", "global_rope_theta": 160000.0},
    "falcon": {"apply_residual_connection_post_layernorm": False, "hidden_size": 4544},
    "mistral": {"attention_bias": False, "use_sliding_window": False},
}


@pytest.mark.parametrize("model_type", FILES)
def test_fields_of_files_on_the_hub(model_type):
    fields = read(model_type, {"model_type": model_type, **FILES[model_type]})
    off = {name for name in OFF if not fields.values.get(name)}
    known = COMMON | FAMILIES[model_type].ignored | off
    assert [name for name in fields.unread() if name not in known] == []


@pytest.mark.parametrize("field", sorted(OFF))
def test_what_is_off_is_passed_over_and_what_is_on_is_not(field, tmp_path):
    """A Mistral reads none of these."""
    fields = {"model_type": "mistral", "sliding_window": None}
    folder = checkpoints.write(tmp_path, **fields, **{field: False})
    assert len(load_attention(folder)) == 2
    checkpoints.write(folder, **fields, **{field: True})
    with pytest.raises(ValueError, match=rf"not known for mistral.*`{field}`"):
        load_attention(folder)


def config_class(model_type):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]


def test_the_guide_lists_every_model_type():
    page = pages.text("your_model")
    listed = page[page.index("## Which models") : page.index("Of each a small model")]
    assert sorted(re.findall(r"`(\w+)`", listed.replace("`model_type`", ""))) == sorted(FAMILIES)


def test_no_type_stands_in_two_rows():
    assert len(FAMILIES) > 60
    assert not set(FAMILIES) & set(UNSAYABLE)
    assert set(DEFAULTS) <= set(FAMILIES)


@pytest.mark.parametrize("model_type", [name for name, row in FAMILIES.items() if row.stacks])
def test_a_field_is_read_or_passed_over_and_not_both(model_type):
    """The config has no fields: all have defaults, for none is a number that may be None."""
    family = FAMILIES[model_type]
    assert not read(model_type, {}).seen & family.ignored


@pytest.mark.models
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_transformers_config_is_understood(model_type):
    cls = config_class(model_type)
    values = json.loads(cls().to_json_string(use_diff=False))
    fields = read(model_type, values)
    known = COMMON | FAMILIES[model_type].ignored
    assert [name for name in fields.unread() if name not in known] == []


@pytest.mark.models
@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_transformers(model_type):
    cls = config_class(model_type)
    theirs = {field.name: field.default for field in dataclasses.fields(cls)}
    theirs |= {"rope_theta": getattr(cls, "default_theta", 10000.0)} | theirs
    family, spelled = FAMILIES[model_type], getattr(cls, "attribute_map", {})
    for name, value in DEFAULTS[model_type].items():
        own = family.names.get(name, name)
        found = next(theirs[x] for x in (own, spelled.get(own), name) if x in theirs)
        found = list(found) if isinstance(found, tuple) else found
        assert found == value, name
