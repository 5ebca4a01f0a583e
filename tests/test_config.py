"""The config: Keras's arguments, one hash for equal configs, in and out of dicts and Keras."""

import dataclasses
import inspect
import json

import jax
import numpy as np
import pytest
from flax.core import FrozenDict
from helpers import relaxed

from flax_mha import MultiHeadAttention, MultiHeadAttentionConfig
from flax_mha.config.config import field_names

# What Keras 3.15 has and this package spells otherwise: see the README's table of differences.
KERAS_ONLY = {"flash_attention", "kwargs"}


@pytest.fixture(scope="module")
def keras():
    with relaxed():
        import keras

        yield keras


def test_arguments_are_keras_s_with_its_order_and_defaults(keras):
    theirs = inspect.signature(keras.layers.MultiHeadAttention).parameters
    theirs = {name: p.default for name, p in theirs.items() if name not in KERAS_ONLY}
    ours = inspect.signature(MultiHeadAttentionConfig).parameters
    ours = {name: p for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY}
    assert list(ours) == list(theirs)
    assert {name: p.default for name, p in ours.items()} == theirs


def test_call_is_keras_s_with_its_order_and_defaults(keras):
    theirs = inspect.signature(keras.layers.MultiHeadAttention.call).parameters
    ours = inspect.signature(MultiHeadAttention.__call__).parameters
    ours = {name: p for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY}
    assert list(ours) == list(theirs)
    defaults = {name: (p.default, theirs[name].default) for name, p in ours.items()}
    assert {name for name, (a, b) in defaults.items() if a != b} == {"training"}  # False, None


def test_linen_fields_are_the_config_s_with_its_defaults():
    config = {field.name: field.default for field in dataclasses.fields(MultiHeadAttentionConfig)}
    module = {field.name: field.default for field in dataclasses.fields(MultiHeadAttention)}
    extra = {"lora", "partition_rules", "sow_attention_scores", "parent", "name"}
    assert {name: value for name, value in module.items() if name not in extra} == config


def test_equal_configs_hash_alike_whatever_the_spelling():
    spellings = [
        {"kernel_initializer": "glorot_uniform"},
        {"kernel_initializer": "GlorotUniform"},
        {"kernel_initializer": {"class_name": "GlorotUniform", "config": {"seed": None}}},
        {"kernel_initializer": FrozenDict({"class_name": "GlorotUniform", "config": {}})},
        {"dtype": None, "precision": None, "num_heads": np.int64(2)},
    ]
    configs = [MultiHeadAttentionConfig(**{"num_heads": 2, "key_dim": 4, **s}) for s in spellings]
    assert len(set(configs)) == 1
    highest = [
        MultiHeadAttentionConfig(2, 4, precision=p) for p in ("highest", jax.lax.Precision.HIGHEST)
    ]
    assert len(set(highest)) == 1
    assert MultiHeadAttentionConfig(2, 4, attention_axes=1) == MultiHeadAttentionConfig(
        2, 4, attention_axes=[1]
    )
    assert MultiHeadAttentionConfig(2, 4, output_shape=5) == MultiHeadAttentionConfig(
        2, 4, output_shape=(5,)
    )
    assert MultiHeadAttentionConfig(2, 4) != MultiHeadAttentionConfig(2, 5)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MultiHeadAttentionConfig(2, 4).num_heads = 3


def test_dims_fill_in_defaults_and_follow_a_replace():
    config = MultiHeadAttentionConfig(4, 8)
    assert config.dims == (4, 4, 8, 8)
    assert config.replace(num_heads=6, key_dim=3).dims == (6, 6, 3, 3)
    assert config.replace(num_kv_heads=2, value_dim=5).dims == (4, 2, 8, 5)


RICH = MultiHeadAttentionConfig(
    4, 8, 5, 0.25, False, (3, 2), (2, 1), 7, "he_normal", "ones", "l2",
    {"class_name": "L1", "config": {"l1": 0.5}},
    {"class_name": "L1L2", "config": {"l1": 0.5, "l2": 0.25}}, "max_norm", "non_neg", True, 3,
    num_kv_heads=2, dtype="bfloat16", param_dtype="float32", precision="highest",
    implementation="reference",
)  # fmt: skip


# The fields that Keras's layer does not have.
OURS = [field.name for field in dataclasses.fields(MultiHeadAttentionConfig) if field.kw_only]


@pytest.mark.parametrize("config", [MultiHeadAttentionConfig(2, 4), RICH])
def test_to_dict_is_json_and_from_dict_its_inverse(config):
    fields = json.loads(json.dumps(config.to_dict()))
    assert list(fields) == list(field_names())
    assert MultiHeadAttentionConfig.from_dict(fields) == config


def test_a_callable_works_but_cannot_be_written_down():
    config = MultiHeadAttentionConfig(2, 4, kernel_initializer=jax.nn.initializers.normal())
    with pytest.raises(TypeError, match="initializer"):
        config.to_dict()


@pytest.mark.parametrize(
    ("policy", "dtype", "param_dtype"),
    [
        ("float32", "float32", "float32"),
        ("mixed_bfloat16", "bfloat16", "float32"),
        ("mixed_float16", "float16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("built", [False, True])
def test_from_keras_config(keras, policy, dtype, param_dtype, built):
    shared = dict(RICH.to_dict())
    for name in OURS:
        del shared[name]
    # axes (2, 1) of a rank-4 input; they are resolved by build
    layer = keras.layers.MultiHeadAttention(**shared, dtype=policy, name="mine")
    if built:
        layer.build((2, 3, 5, 7), (2, 3, 5, 7))
    fields = {field.name: field.default for field in dataclasses.fields(RICH)}
    defaults = {name: fields[name] for name in OURS}
    expected = RICH.replace(**{**defaults, "dtype": dtype, "param_dtype": param_dtype})
    assert MultiHeadAttentionConfig.from_keras_config(layer.get_config()) == expected
    through_json = json.loads(json.dumps(layer.get_config()))
    assert MultiHeadAttentionConfig.from_keras_config(through_json) == expected


def test_from_keras_config_refuses_another_layer(keras):
    layer = keras.layers.GroupQueryAttention(8, 4, 2)
    with pytest.raises(ValueError, match=r"must be among .*'num_heads'"):
        MultiHeadAttentionConfig.from_keras_config(layer.get_config())


def test_biases_by_name_have_one_spelling():
    config = MultiHeadAttentionConfig(2, 4, use_bias=("value", "query", "value"))
    assert config.use_bias == config.biases == ("query", "value")
    assert config == config.replace(use_bias=["query", "value"])
    assert hash(config) == hash(MultiHeadAttentionConfig(2, 4, use_bias=["query", "value"]))
    assert config.replace(use_bias=config.projections) == config.replace(use_bias=True)
    assert config.replace(use_bias=()) == config.replace(use_bias=False)
    gated = config.replace(use_gate=True, use_bias=config.projections)
    assert gated.use_bias == (*gated.projections[:3], "attention_output")  # not the gate
    assert gated.replace(use_bias=["gate", *config.projections]).use_bias is True
    fields = json.loads(json.dumps(config.to_dict()))
    assert fields["use_bias"] == ["query", "value"]
    assert MultiHeadAttentionConfig.from_dict(fields) == config


@pytest.mark.parametrize(
    ("use_bias", "error", "message"),
    [
        (("gate",), ValueError, r"in `use_bias` must be among \['query', 'key', 'value', 'atten"),
        (("querry",), ValueError, "Received: 'querry'. Did you mean 'query'"),
        (
            "key",
            TypeError,
            r"tuple of names.*use_bias='key' of type.*`use_bias=\('key',\)",
        ),
        ({"key": True}, TypeError, "True or False, or a tuple of names.*of type dict"),
        ((True, False), ValueError, "Received: True"),
        (None, TypeError, "`use_bias` must be True or False"),
    ],
)
def test_biases_that_are_none(use_bias, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttentionConfig(2, 4, use_bias=use_bias)
