"""Settings: what is unknown or of the wrong type is refused, and overrides win."""

import json
import re

import pytest
from demo_helpers import CONFIGS

from flax_mha.demo import options
from flax_mha.demo.config_file import parse_value, read_settings, settings_from
from flax_mha.demo.settings import DemoError

LANGUAGE = {"task": {"name": "language"}}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.toml"
    sections = ["[task]\nname = 'language'", "[model]\nfeatures = 24"]
    sections += ["[attention]\nnum_heads = 3", "[train]\nsteps = 7\n"]
    path.write_text("\n".join(sections))
    return path


def test_file_and_defaults(config):
    settings = read_settings(config)
    assert settings.model.features == 24
    assert settings.train.steps == 7
    assert settings.train.seed == 0
    assert (settings.attention.num_heads, settings.attention.key_dim) == (3, 8)


def test_overrides_win_and_the_last_one_most(config):
    changes = ["attention.num_heads=4", "train.steps=8", "train.steps = 9", "train.prompt=class"]
    settings = read_settings(config, changes)
    assert settings.attention.num_heads == 4
    assert settings.attention.key_dim == 6
    assert settings.train.steps == 9
    assert settings.train.prompt == "class"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("1e-3", 1e-3),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('"4"', "4"),
        ("bfloat16", "bfloat16"),
        ("", ""),
        ("a\nb=1", "a\nb=1"),
        ("1\nb=1", "1\nb=1"),
    ],
)
def test_values_are_toml_or_bare_words(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_attention_takes_the_layers_own_fields():
    table = {"num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "value_dim": 5, "dropout": 0.1}
    table |= {"use_gate": True, "sliding_window": 9, "kernel_regularizer": "l2"}
    attention = settings_from({**LANGUAGE, "attention": table}).attention
    assert attention.dims == (4, 2, 8, 5)
    assert (attention.use_gate, attention.sliding_window) == (True, 9)
    assert attention.kernel_regularizer is not None


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"modell": {}},
            r"unknown section: 'modell'. Did you mean 'model'\?.*task, data, model",
        ),
        (
            {"train": {"step": 1}},
            r"in the task 'language': 'step'. Did you mean 'steps'\?.*seed",
        ),
        (
            {"data": {"zzz": 1}},
            r"\[data\] in the task 'language': 'zzz'. Valid: file, max_bytes",
        ),
        ({"attention": {"num_head": 2}}, r"\[attention\]: 'num_head'.*'num_heads'.*sliding_window"),
        ({"attention": {"output_shape": 2}}, r"unknown key of \[attention\]: 'output_shape'"),
        ({"train": 3}, r"\[train\] must be a section. Received: train = 3"),
        ({"train": {"steps": "many"}}, r"train.steps must be of type int. Received: 'many'"),
        ({"train": {"steps": True}}, r"train.steps must be of type int. Received: True"),
        ({"train": {"steps": 2.0}}, r"train.steps must be of type int. Received: 2.0"),
        ({"train": {"steps": 0}}, r"train.steps must be a number of at least 1. Received: 0"),
        ({"model": {"tied_head": 1}}, r"model.tied_head must be of type bool. Received: 1"),
        ({"model": {"dropout": 1.0}}, r"model.dropout must be below 1. Received: 1.0"),
        ({"train": {"learning_rate": float("nan")}}, r"learning_rate must be a number.*nan"),
        ({"train": {"temperature": 0.0}}, r"train.temperature must be above 0"),
        ({"attention": {"num_heads": "four"}}, r"\[attention\] .*num_heads.*'four'"),
        ({"task": {}}, r"the settings must name a task: \[task\] name = one of language"),
        ({"task": {"name": "langage"}}, r"unknown task: 'langage'. Did you mean 'language'\?"),
        ({"task": {"name": 3}}, r"unknown task: 3. Valid: language"),
        ({"task": {"nam": "language"}}, r"unknown key of \[task\]: 'nam'"),
        ({"attention": {"attention_axes": 1}}, r"unknown key of \[attention\]: 'attention_axes'"),
        ({"attention": {"dropout": 2.0}}, r"\[attention\] .*probability in \[0, 1\].*2.0"),
    ],
)
def test_refusals(tables, message):
    with pytest.raises(DemoError, match=message):
        settings_from({**LANGUAGE, **tables})


@pytest.mark.parametrize("text", ["steps=3", "train.steps", "=3", "train.=3", ".steps=3"])
def test_malformed_overrides(config, text):
    with pytest.raises(DemoError, match=r"--set takes SECTION.KEY=VALUE, .* Received"):
        read_settings(config, [text])


def test_a_fraction_may_be_written_as_a_whole_number():
    assert settings_from({**LANGUAGE, "train": {"clip_norm": 2}}).train.clip_norm == 2.0


def test_unreadable_files(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(DemoError, match=r"broken.toml is not valid TOML"):
        read_settings(broken)
    with pytest.raises(DemoError, match=r"cannot read the settings: .*nothing.toml"):
        read_settings(tmp_path / "nothing.toml")


def test_settings_are_json_and_read_back(config):
    settings = read_settings(config, ["attention.kernel_constraint=max_norm"])
    tables = json.loads(json.dumps(settings.to_dict()))
    assert settings_from(tables) == settings


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_that_come_with_the_project_are_valid(config):
    settings = read_settings(config)
    assert settings.attention.num_heads * settings.attention.key_dim == settings.model.features
    text = config.read_text()
    assert text.startswith(f"# python -m flax_mha.demo train configs/{config.name}\n")
    assert "# Time on two cores: " in text
    assert "# Expect" in text


def test_a_number_that_the_help_calls_the_default_is_it():
    (commands,) = (action.choices for action in options.make_parser({})._actions if action.choices)
    found = {}
    for command, parser in commands.items():
        for action in parser._actions:
            if told := re.fullmatch(r"default: (\S+)", action.help or ""):
                found[command, action.dest] = action.type(told[1]), action.default
    assert {name for _, name in found} == {"rank", "steps", "learning_rate"}
    assert all(told == default for told, default in found.values()), found
