"""param_specs and param_axes: a spec for every array, from rules; what cannot be is refused."""

import jax
import pytest
from flax import linen as nn
from helpers import C, D, E, H, M, N, V
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    init_params,
    multi_head_attention,
    param_axes,
    param_shapes,
    param_specs,
)
from flax_mha.positions import RelativeBias

CONFIGS = {
    "default": MultiHeadAttentionConfig(N, H),
    "value-dim": MultiHeadAttentionConfig(N, H, V),
    "grouped": MultiHeadAttentionConfig(6, H, num_kv_heads=3),
    "one-kv-head": MultiHeadAttentionConfig(8, H, num_kv_heads=1),
    "no-bias": MultiHeadAttentionConfig(N, H, use_bias=False),
    "some-biases": MultiHeadAttentionConfig(N, H, use_bias=("query", "attention_output")),
    "gate": MultiHeadAttentionConfig(N, H, use_gate=True),
    "norms": MultiHeadAttentionConfig(N, H, qk_norm="rms"),
    "relative": MultiHeadAttentionConfig(N, H, position=RelativeBias(8)),
    "sinks": MultiHeadAttentionConfig(N, H, use_sinks=True),
    "two-outputs": MultiHeadAttentionConfig(N, H, output_shape=(E, 2)),
    "three-outputs": MultiHeadAttentionConfig(N, H, V, output_shape=(2, E, 3), use_gate=True),
}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
ALL_RULES = {"embed": "a", "heads": "b", "kv_heads": "b", "head_dim": "c", "relpos_buckets": "d"}
HEADS = MultiHeadAttentionConfig(8, 16)


def mesh(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def is_spec(x):
    return isinstance(x, P)


def structure(tree):
    return jax.tree.structure(tree, is_leaf=is_spec)


def specs_of(*args, **kwargs):
    """{"query/kernel": (names...), ...}."""
    tree = param_specs(*args, **kwargs)
    return {f"{name}/{leaf}": tuple(tree[name][leaf]) for name in tree for leaf in tree[name]}


# --- the tree -----------------------------------------------------------------------------------


@EVERY_CONFIG
def test_the_tree_is_that_of_the_shapes(config):
    shapes = param_shapes(config, (D,), (M,), (C,))
    for tree in (param_axes(config), param_specs(config, {}), param_specs(config, ALL_RULES)):
        assert structure(tree) == structure(shapes)
        assert list(tree) == list(shapes)
        ranks = jax.tree.map(len, tree, is_leaf=is_spec)
        assert ranks == jax.tree.map(lambda leaf: len(leaf.shape), shapes)


@EVERY_CONFIG
def test_the_names_follow_flax_own_rules(config):
    """A law: `nn.logical_to_mesh` of the names gives the specs, for a rule on each name."""
    pairs = tuple(ALL_RULES.items())
    expected = nn.logical_to_mesh(param_axes(config), pairs)
    assert param_specs(config, pairs) == param_specs(config, ALL_RULES) == expected
    whole = jax.tree.map(lambda spec: set(spec) <= {None}, param_specs(config, {}), is_leaf=is_spec)
    assert all(jax.tree.leaves(whole))


def test_every_array_by_its_letters():
    config = MultiHeadAttentionConfig(
        8, 16, use_gate=True, qk_norm="rms", position=RelativeBias(8), use_sinks=True
    )
    letters = dict(D="d", C="c", M="m", E="e", N="n", K="k", H="h", V="v", X="x")
    assert specs_of(config, letters) == {
        "query/kernel": ("d", "n", "h"),
        "query/bias": ("n", "h"),
        "key/kernel": ("c", "k", "h"),
        "key/bias": ("k", "h"),
        "value/kernel": ("m", "k", "v"),
        "value/bias": ("k", "v"),
        "gate/kernel": ("d", "n", "v"),
        "gate/bias": ("n", "v"),
        "attention_output/kernel": ("n", "v", "e"),
        "attention_output/bias": ("e",),
        "query_norm/scale": ("h",),
        "key_norm/scale": ("h",),
        "relative_bias/embedding": ("x", "n"),
        "sinks/logits": ("n",),
    }


def test_of_several_output_axes_the_rule_names_the_first():
    specs = specs_of(CONFIGS["three-outputs"], {"E": "model"})
    assert specs["attention_output/kernel"] == (None, None, "model", None, None)
    assert specs["attention_output/bias"] == ("model", None, None)
    axes = param_axes(CONFIGS["three-outputs"])["attention_output"]["kernel"]
    assert tuple(axes) == ("heads", "head_dim", "embed", None, None)


@pytest.mark.parametrize(
    ("rules", "query", "output"),
    [
        ({"heads": ("x", "y")}, (None, ("x", "y"), None), (("x", "y"), None, None)),
        ({"N": ["x"]}, (None, "x", None), ("x", None, None)),
        ({"embed": "x", "E": None}, ("x", None, None), (None, None, None)),  # a letter goes first
        ({"E": None, "embed": "x"}, ("x", None, None), (None, None, None)),
        ((("embed", "x"), ("mlp", "y")), ("x", None, None), (None, None, "x")),
        # As in Flax, a later pair serves where the mesh axis of an earlier one is taken.
        (
            [["heads", "x"], ["embed", "x"], ["embed", "y"]],
            ("y", "x", None),
            ("x", None, "y"),
        ),
        ((("embed", None), ("embed", "x")), (None, None, None), (None, None, None)),
        ({}, (None, None, None), (None, None, None)),
    ],
)
def test_rules(rules, query, output):
    specs = specs_of(HEADS, rules)
    assert (specs["query/kernel"], specs["attention_output/kernel"]) == (query, output)


def test_frozen_dicts_are_mappings():
    assert specs_of(HEADS, nn.FrozenDict({"N": "x"})) == specs_of(HEADS, {"heads": "x"})


# --- grouped heads ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_heads", "rules", "model", "expected"),
    [
        (None, {"N": "model"}, None, "model"),  # K = N: what holds for N holds for K
        (8, {"N": "model"}, None, "model"),
        (4, {"N": "model"}, None, None),  # nothing is known of the mesh
        (4, {"N": "model"}, 4, "model"),
        (4, {"N": "model"}, 8, None),
        (1, {"N": "model"}, 8, None),
        (2, {"heads": ("data", "model")}, 4, None),
        (4, {"heads": ("data", "model")}, 2, ("data", "model")),
        (4, {"N": "model", "K": None}, 4, None),
        (4, {"N": None, "kv_heads": "model"}, 4, "model"),
        (4, (("heads", "model"),), 4, "model"),
        (4, {"N": "model", "K": "data"}, 8, "data"),
    ],
)
def test_k_follows_n(kv_heads, rules, model, expected):
    config = HEADS.replace(num_kv_heads=kv_heads)
    given = None if model is None else mesh(data=2, model=model)
    specs = specs_of(config, rules, mesh=given)
    arrays = ("key/kernel", "value/kernel", "key/bias", "value/bias")
    assert {specs[name][len(specs[name]) - 2] for name in arrays} == {expected}


def test_an_explicit_rule_for_k_that_does_not_divide_is_refused():
    config = HEADS.replace(num_kv_heads=2)
    message = (
        r"The mesh axis 'model' must divide K of params\['key'\]\['kernel'\] \[C, K, H\]\. "
        r"Received: K = 2, 'model' of size 8\. Leave K without a rule: it follows N where it can\."
    )
    with pytest.raises(ValueError, match=message):
        param_specs(config, {"N": "model", "K": "model"}, mesh=mesh(model=8))


# --- meshes -------------------------------------------------------------------------------------


def test_the_ambient_mesh_is_asked():
    devices = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    config = HEADS.replace(num_kv_heads=2)
    with jax.set_mesh(devices):
        assert specs_of(config, {"N": "model"})["key/kernel"] == (None, None, None)
        with pytest.raises(ValueError, match=r"must name axes of the mesh, \['model'\]"):
            param_specs(config, {"N": "modle"})
        assert specs_of(config, {"N": "tensor"}, mesh=mesh(tensor=2))["key/kernel"][1] == "tensor"
    assert specs_of(config, {"N": "modle"})["query/kernel"] == (None, "modle", None)


def test_inside_shard_map_the_sizes_are_those_of_shards():
    devices = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    seen = []

    def local(x):
        seen.append(param_specs(MultiHeadAttentionConfig(1, 16), {"N": "model"}))
        return x

    jax.shard_map(local, mesh=devices, in_specs=P("model"), out_specs=P("model"))(jax.numpy.ones(8))
    assert tuple(seen[0]["query"]["kernel"]) == (None, "model", None)


def test_features_are_checked_where_they_are_given():
    rules, data = {"embed": "data"}, mesh(data=4)
    assert specs_of(HEADS, rules, mesh=data)["query/kernel"] == ("data", None, None)
    fits = dict(query_shape=(2, 8), value_shape=(2, 12), key_shape=(2, 16), mesh=data)
    assert specs_of(HEADS, rules, **fits)["value/kernel"] == ("data", None, None)
    for name, letter, array in (
        ("query_shape", "D", "query"),
        ("value_shape", "M", "value"),
        ("key_shape", "C", "key"),
    ):
        message = rf"must divide {letter} of params\['{array}'\].*{letter} = 6, 'data' of size 4"
        with pytest.raises(ValueError, match=message):
            param_specs(HEADS, rules, **{**fits, name: (2, 6)})
    alone = HEADS.replace(output_shape=6)  # E is the config's own
    with pytest.raises(ValueError, match=r"must divide E of params\['attention_output'\]"):
        param_specs(alone, {"E": "data"}, mesh=data)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"N": "modle"}, ValueError, r"The rule for 'N' must name axes of the mesh, \['data', 'mo"),
        ({"head": "model"}, ValueError, r"An axis in `rules` must be among .*Did you mean 'heads'"),
        ({"n": "model"}, ValueError, r"An axis in `rules` must be among \['D', 'C', .*'n'"),
        ({"N": 3}, TypeError, r"The rule for 'N' must be the name of a mesh axis, a tuple .*3 of"),
        ({"N": ("model", None)}, TypeError, r"must be the name of a mesh axis, a tuple of names"),
        ("model", TypeError, r"`rules` must be a mapping, or a sequence of pairs"),
        (None, TypeError, r"`rules` must be a mapping.*None of type NoneType"),
        ({("N", "model")}, TypeError, r"`rules` must be a mapping"),
        ((("N", "model", 1),), TypeError, r"sequence of pairs.*\('N', 'model', 1\) among them"),
        (("N", "model"), TypeError, r"sequence of pairs.*'N' among them"),
        (
            {"N": "model", "H": "model"},
            ValueError,
            r"A mesh axis can shard one axis of params\['query'\]\['kernel'\] \[D, N, H\], not two"
            r"\. Received: 'model' for H, which is taken\. Give H a mesh axis of its own",
        ),
        ({"N": ("model", "data"), "D": "data"}, ValueError, "can shard one axis of params"),
        ({"N": ("data", "data")}, ValueError, r"'data', 'data'\) for N, which is taken"),
        ((("heads", "model"), ("embed", "model")), ValueError, r"'model' for D, which is taken"),
        ({"H": "odd"}, ValueError, r"'odd' must divide H of params.*H = 16, 'odd' of size 3"),
        ({"N": ("data", "odd")}, ValueError, r"N = 8, \('data', 'odd'\) of size 6\. A rule of"),
    ],
)  # fmt: skip
def test_refused(rules, error, message):
    with pytest.raises(error, match=message):
        param_specs(HEADS, rules, mesh=mesh(data=2, model=4, odd=3))


def test_a_mesh_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"`mesh` must be a jax.sharding.Mesh or AbstractMesh"):
        param_specs(HEADS, {"N": "model"}, mesh={"model": 8})


def test_a_module_is_no_config():
    layer = MultiHeadAttention(N, H)
    for function in (param_axes, lambda config: param_specs(config, {})):
        with pytest.raises(TypeError, match=r"`config` must be a MultiHeadAttentionConfig"):
            function(layer)


# --- what they are for --------------------------------------------------------------------------


def test_parameters_laid_out_by_the_specs_give_the_same_output():
    devices = jax.make_mesh((2, 4), ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2)
    config = MultiHeadAttentionConfig(8, 4, num_kv_heads=2, use_gate=True, use_sinks=True)
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    params = init_params(jax.random.key(1), config, x.shape)
    rules = {"heads": "model", "embed": "fsdp"}
    specs = param_specs(config, rules, query_shape=x.shape, mesh=devices)
    shardings = jax.tree.map(lambda s: jax.sharding.NamedSharding(devices, s), specs)
    sharded = jax.device_put(params, shardings)
    assert sharded["query"]["kernel"].addressable_shards[0].data.shape == (8, 2, 4)
    assert sharded["key"]["kernel"].addressable_shards[0].data.shape == (8, 2, 4)
    whole = multi_head_attention(params, x, x, config=config)
    output = multi_head_attention(sharded, x, x, config=config)
    assert float(abs(output - whole).max()) < 1e-5
