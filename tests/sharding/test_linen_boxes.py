"""Names of axes in linen: `partition_rules`, and initializers that return boxes."""

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from helpers import assert_close, assert_trees_close, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    activity_loss,
    apply_constraints,
    constrain,
    forward,
    init_cache,
    init_cross_cache,
    init_params,
    multi_head_attention,
    param_axes,
    param_specs,
    regularization_loss,
)
from flax_mha.core.boxes import content
from flax_mha.interop.flax import to_flax_params
from flax_mha.interop.keras import to_keras_weights
from flax_mha.interop.torch import to_torch_state_dict
from flax_mha.keras.initializers import GlorotUniform
from flax_mha.linen import BOXES
from flax_mha.sharding.initial import init_boxed

X = normal(1, 8, 6, 16)
KEY = jax.random.key(0)
RULES = {"heads": "model", "embed": "fsdp"}
NAMES = (None, "model", None)


def numbers(key, shape, dtype):
    """An initializer that compiles fast: small numbers of both signs."""
    return (jnp.arange(math.prod(shape), dtype=dtype) % 7 - 3).reshape(shape) / 10


NAMED = nn.with_partitioning(numbers, NAMES)
LOGICAL = nn.with_logical_partitioning(numbers, ("embed", "heads", "kv"))
NAMED_BIAS = nn.with_partitioning(nn.initializers.normal(), ("model", None))
SIZES = dict(num_heads=4, key_dim=8)
PROJECTIONS = ("query", "key", "value")


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("fsdp", "model"), axis_types=(kind,) * 2)


def is_spec(x):
    return isinstance(x, P)


def is_box(x):
    return isinstance(x, nn.meta.AxisMetadata)


# --- partition_rules ----------------------------------------------------------------------------

LAYERS = {
    "plain": dict(SIZES),
    "grouped": dict(SIZES, num_kv_heads=2),
    "extras": dict(SIZES, use_gate=True, qk_norm="rms", use_sinks=True, position="relative_bias"),
    "no-bias": dict(SIZES, use_bias=False),
    "outputs": dict(SIZES, output_shape=(6, 2)),
}


@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
def test_the_specs_are_those_of_the_function(fields):
    layer = MultiHeadAttention(**fields, partition_rules=RULES)
    variables = jax.eval_shape(layer.init, KEY, X, X)
    expected = param_specs(layer.config, RULES)
    assert nn.get_partition_spec(variables) == {"params": expected}
    boxes = jax.tree.leaves(variables, is_leaf=is_box)
    # As flax's own: in some versions of JAX a `PartitionSpec` is a tuple, in others it is not.
    assert {(type(box), type(box.names)) for box in boxes} == {(nn.Partitioned, tuple)}
    mesh = make_mesh()
    assert nn.get_sharding(variables, mesh)["params"] == jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), expected
    )


def test_named_parameters_have_the_values_and_outputs_of_the_others():
    named, plain = (MultiHeadAttention(**SIZES, partition_rules=r) for r in (RULES, None))
    variables, expected = (layer.init(KEY, X, X) for layer in (named, plain))
    assert_trees_close(nn.meta.unbox(variables), expected, "float32")
    output = plain.apply(expected, X, X)
    assert_close(named.apply(variables, X, X), output, "float32")
    assert_close(named.apply(expected, X, X), output, "float32", "unboxed")
    assert_close(plain.apply(variables, X, X), output, "float32", "boxed")


@pytest.mark.slow
def test_init_under_jit_lays_out_what_the_rules_name():
    mesh = make_mesh()
    layer = MultiHeadAttention(**SIZES, partition_rules=RULES)
    with jax.set_mesh(mesh):
        shardings = nn.get_sharding(jax.eval_shape(layer.init, KEY, X, X), mesh)
        variables = jax.jit(layer.init, out_shardings=shardings)(KEY, X, X)
        kernel = variables["params"]["query"]["kernel"].value
        assert kernel.addressable_shards[0].data.shape == (8, 1, 8)
        output = jax.jit(layer.apply)(variables, X, X)
        gradient = jax.jit(jax.grad(lambda v: layer.apply(v, X, X).sum()))(variables)
    assert nn.get_partition_spec(gradient) == nn.get_partition_spec(variables)
    plain = MultiHeadAttention(**SIZES)
    expected = plain.init(KEY, X, X)
    assert_close(output, plain.apply(expected, X, X), "float32")
    slope = jax.grad(lambda v: plain.apply(v, X, X).sum())(expected)
    assert_trees_close(nn.meta.unbox(gradient), slope, "float32")


def test_grouped_heads_follow_where_the_mesh_lets_them():
    layer = MultiHeadAttention(**SIZES, num_kv_heads=2, partition_rules={"N": "model"})
    assert nn.get_partition_spec(layer.init(KEY, X, X))["params"]["key"]["kernel"] == P(*[None] * 3)
    with jax.set_mesh(jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))):
        specs = nn.get_partition_spec(jax.eval_shape(layer.init, KEY, X, X))["params"]
    assert specs["key"]["kernel"] == P(None, "model", None)


@pytest.mark.parametrize("rules", [RULES, [["heads", ["model"]], ["embed", "fsdp"]]])
def test_the_module_stays_a_value(rules):
    """Hashed, compared, cloned and pickled; the config knows nothing of meshes."""
    config = MultiHeadAttentionConfig(**SIZES)
    layer = MultiHeadAttention.from_config(config, partition_rules=rules)
    again = MultiHeadAttention.from_config(layer.config, partition_rules=layer.partition_rules)
    copies = [again, layer.clone(), layer.copy(), pickle.loads(pickle.dumps(layer))]
    assert all(copy == layer and hash(copy) == hash(layer) for copy in copies)
    assert layer.config == config
    assert layer != layer.clone(partition_rules={"N": "data"})
    assert layer.clone(partition_rules=None) == MultiHeadAttention.from_config(config)
    specs = [nn.get_partition_spec(jax.eval_shape(c.init, KEY, X, X)) for c in (layer, *copies)]
    assert all(spec == specs[0] for spec in specs)
    counted = []

    def call(layer, variables):
        counted.append(1)
        return layer.apply(variables, X, X)

    jitted = jax.jit(call, static_argnums=0)
    for copy in (layer, again, layer.clone()):
        jitted(copy, MultiHeadAttention(**SIZES).init(KEY, X, X))
    assert len(counted) == 1


def test_letters_and_names_are_one_field():
    by_name = MultiHeadAttention(**SIZES, partition_rules={"heads": "model"})
    assert by_name == MultiHeadAttention(**SIZES, partition_rules={"N": "model"})


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"head": "model"}, ValueError, "An axis in `rules` must be among .*Did you mean 'heads'"),
        ("model", TypeError, "`rules` must be a mapping"),
        ({"N": 1}, TypeError, "The rule for 'N' must be"),
    ],
)
def test_wrong_rules_are_refused_when_the_module_is_made(rules, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttention(**SIZES, partition_rules=rules)


@pytest.mark.slow
def test_what_the_mesh_cannot_is_refused_at_init():
    layer = MultiHeadAttention(num_heads=6, key_dim=8, partition_rules={"N": "model"})
    narrow = X[..., :15]
    with jax.set_mesh(make_mesh()):
        with pytest.raises(ValueError, match=r"must divide N of params\['query'\].*N = 6, 'model'"):
            layer.init(KEY, X, X)
        with pytest.raises(ValueError, match=r"must divide D of params.*D = 15, 'fsdp' of size 2"):
            MultiHeadAttention(**SIZES, partition_rules=RULES).init(KEY, narrow, narrow)


@pytest.mark.slow
def test_rules_are_asked_where_parameters_are_made_alone():
    """Arrays of whole heads are applied on any mesh: only their making needs one that fits."""
    layer = MultiHeadAttention(num_heads=6, key_dim=8, partition_rules={"N": "model"})
    params = nn.meta.unbox(layer.init(KEY, X, X))
    expected = layer.apply(params, X, X)
    with jax.set_mesh(make_mesh()):
        assert_close(layer.apply(params, X, X), expected, "float32")


@pytest.mark.slow
def test_lifted_transformations_add_their_axis():
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(layer, x, _):
                return layer(x, x), None

            scan = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
                metadata_params={nn.meta.PARTITION_NAME: "layers"},
            )
            return scan(MultiHeadAttention(**SIZES, partition_rules=RULES, name="a"), x, None)[0]

    variables = Layers().init(KEY, X)
    specs = nn.get_partition_spec(variables)["params"]["a"]
    assert specs["query"]["kernel"] == P("layers", "fsdp", "model", None)
    assert variables["params"]["a"]["query"]["kernel"].value.shape == (3, 16, 4, 8)
    assert Layers().apply(variables, X).shape == X.shape


def test_a_cross_cache_takes_boxed_parameters():
    layer = MultiHeadAttention(**SIZES, partition_rules=RULES)
    variables = layer.init(KEY, X, X)
    plain = nn.meta.unbox(variables["params"])
    cache = init_cross_cache(plain, X, config=layer.config)
    output, _ = layer.apply(variables, X, None, cache=cache)
    assert_close(output, layer.apply(variables, X, X), "float32")


def test_states_are_saved_and_restored():
    layer = MultiHeadAttention(**SIZES, partition_rules=RULES)
    variables = layer.init(KEY, X, X)
    saved = serialization.to_bytes(variables)
    empty = jax.tree.map(jnp.zeros_like, variables)
    restored = serialization.from_bytes(empty, saved)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    assert nn.get_partition_spec(restored) == nn.get_partition_spec(variables)


# --- initializers that name the axes ------------------------------------------------------------


def test_initializers_with_partitioning():
    layer = MultiHeadAttention(**SIZES, kernel_initializer=NAMED)
    variables = layer.init(KEY, X, X)
    specs = nn.get_partition_spec(variables)["params"]
    assert {name: leaves["kernel"] for name, leaves in specs.items()} == {
        name: P(*NAMES) for name in (*PROJECTIONS, "attention_output")
    }
    plain = MultiHeadAttention(**SIZES, kernel_initializer=numbers)
    assert_trees_close(nn.meta.unbox(variables), plain.init(KEY, X, X), "float32")
    expected = plain.apply(plain.init(KEY, X, X), X, X)
    assert_close(layer.apply(variables, X, X), expected, "float32")
    shardings = nn.get_sharding(variables, mesh := make_mesh())
    with jax.set_mesh(mesh):
        sharded = jax.jit(layer.init, out_shardings=shardings)(KEY, X, X)
        assert_close(jax.jit(layer.apply)(sharded, X, X), expected, "float32")
    assert sharded["params"]["query"]["kernel"].value.sharding.spec == P(None, "model", None)


def test_initializers_with_logical_partitioning():
    mesh, rules = make_mesh(), (("embed", "fsdp"), ("heads", "model"), ("kv", None))
    layer = MultiHeadAttention(**SIZES, kernel_initializer=LOGICAL)
    names = nn.get_partition_spec(jax.eval_shape(layer.init, KEY, X, X))
    shardings = nn.logical_to_mesh_sharding(names, mesh, rules)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        variables = jax.jit(layer.init, out_shardings=shardings)(KEY, X, X)
        output = jax.jit(layer.apply)(variables, X, X)
    kernel = variables["params"]["query"]["kernel"]
    assert isinstance(kernel, nn.LogicallyPartitioned)
    assert kernel.value.sharding.spec == P("fsdp", "model", None)
    plain = MultiHeadAttention(**SIZES, kernel_initializer=numbers)
    assert_close(output, plain.apply(plain.init(KEY, X, X), X, X), "float32")


@pytest.mark.slow
def test_bias_initializers_where_the_ranks_agree():
    fields = dict(SIZES, use_bias=PROJECTIONS, bias_initializer=NAMED_BIAS)
    variables = MultiHeadAttention(**fields).init(KEY, X, X)
    specs = nn.get_partition_spec(variables)["params"]
    assert {specs[name]["bias"] for name in PROJECTIONS} == {P("model", None)}
    whole = nn.with_partitioning(nn.initializers.normal(), P())
    specs = MultiHeadAttention(**SIZES, bias_initializer=whole).init(KEY, X, X)
    assert nn.get_partition_spec(specs)["params"]["attention_output"]["bias"] == P()


def test_a_box_without_names_stays_one():
    unnamed = nn.with_partitioning(numbers, None)
    variables = MultiHeadAttention(**SIZES, kernel_initializer=unnamed).init(KEY, X, X)
    assert variables["params"]["query"]["kernel"].names is None


def test_a_keras_initializer_keeps_its_fans_in_a_box():
    named = nn.with_partitioning(GlorotUniform(), NAMES)
    boxed, plain = (
        MultiHeadAttention(**SIZES, kernel_initializer=init).init(KEY, X, X)
        for init in (named, "glorot_uniform")
    )
    assert_trees_close(nn.meta.unbox(boxed), plain, "float32")


WRONG_RANKS = [
    (
        "kernel_initializer",
        nn.with_partitioning(numbers, ("model", None)),
        r"params\['query'\]\['kernel'\] \[D, N, H\], of rank 3, must have one partition name an "
        r"axis\. Received: \('model', None\)\. One initializer makes all kernels",
    ),
    (
        "bias_initializer",
        nn.with_partitioning(nn.initializers.zeros, NAMES),
        r"params\['query'\]\['bias'\] \[N, H\], of rank 2",
    ),
    (
        "bias_initializer",
        nn.with_partitioning(nn.initializers.zeros, ("model", None)),
        r"params\['attention_output'\]\['bias'\] \[E\], of rank 1.*`partition_rules`",
    ),
    (
        "kernel_initializer",
        nn.with_partitioning(numbers, P("fsdp", "model", None, None)),
        r"params\['query'\]\['kernel'\] \[D, N, H\], of rank 3",
    ),
    (
        "kernel_initializer",
        nn.with_partitioning(numbers, "abc"),
        r"must have one partition name an axis\. Received: the string 'abc'\. Pass a tuple",
    ),
    (
        "kernel_initializer",
        nn.with_logical_partitioning(numbers, ("embed", "heads")),
        r"params\['query'\]\['kernel'\] \[D, N, H\], of rank 3.*\('embed', 'heads'\)",
    ),
]


@pytest.mark.parametrize(("field", "initializer", "message"), WRONG_RANKS)
def test_names_of_the_wrong_rank_are_refused(field, initializer, message):
    config = MultiHeadAttentionConfig(**SIZES, **{field: initializer})
    with pytest.raises((ValueError, TypeError), match=message):
        MultiHeadAttention.from_config(config).init(KEY, X, X)
    with pytest.raises((ValueError, TypeError), match=message):
        init_params(KEY, config, X.shape)


def test_axes_are_named_once():
    layer = MultiHeadAttention(**SIZES, kernel_initializer=NAMED, partition_rules=RULES)
    message = r"The axes of params\['query'\]\['kernel'\] must be named once\. Received: `partition"
    with pytest.raises(ValueError, match=message):
        layer.init(KEY, X, X)


def test_a_box_around_what_is_no_array_is_refused():
    wrong = nn.with_partitioning(lambda key, shape, dtype: jnp.zeros((1, 2, 3)), NAMES)
    with pytest.raises(TypeError, match=r"must return an array of shape \(16, 4, 8\)"):
        MultiHeadAttention(**SIZES, kernel_initializer=wrong).init(KEY, X, X)


# --- the functions ------------------------------------------------------------------------------

CONFIG = MultiHeadAttentionConfig(
    **SIZES, kernel_initializer=NAMED, kernel_regularizer="l2", kernel_constraint="non_neg"
)


def test_init_params_keeps_boxes_and_the_functions_say_how_to_open_them():
    boxed = init_params(KEY, CONFIG, X.shape)
    assert nn.get_partition_spec(boxed)["key"]["kernel"] == P(*NAMES)
    message = r"params\['\w+'\]\['kernel'\] must be an array\. Received: a box, Partitioned\. "
    message += r"Pass `nn\.meta\.unbox\(params\)`"
    calls = (
        lambda p: multi_head_attention(p, X, X, config=CONFIG),
        lambda p: jax.jit(lambda p: multi_head_attention(p, X, X, config=CONFIG))(p),
        lambda p: forward(p, X, X, config=CONFIG).output,
        lambda p: regularization_loss(p, CONFIG),
        lambda p: init_cross_cache(p, X, config=CONFIG).key,
    )
    for export in (to_torch_state_dict, to_keras_weights, to_flax_params):
        with pytest.raises(TypeError, match=message):
            export(boxed, CONFIG)
    plain = init_params(KEY, CONFIG.replace(kernel_initializer=numbers), X.shape)
    for call in calls:
        with pytest.raises(TypeError, match=message):
            call(boxed)
        assert_close(call(nn.meta.unbox(boxed)), call(plain), "float32")
    cross = init_cross_cache(plain, X, config=CONFIG)
    for value, cache in ((X, init_cache(CONFIG, 8, 6, "float32")), (None, cross)):
        with pytest.raises(TypeError, match=message):
            multi_head_attention(boxed, X, value, config=CONFIG, cache=cache)


def test_gradients_of_boxed_parameters_are_boxed():
    boxed = init_params(KEY, CONFIG, X.shape)

    def loss(params):
        activations = forward(nn.meta.unbox(params), X, X, config=CONFIG)
        return activations.output.sum() + activity_loss(activations, CONFIG)

    assert nn.get_partition_spec(jax.grad(loss)(boxed)) == nn.get_partition_spec(boxed)


def test_constraints_act_inside_boxes():
    """Leaf by leaf, as an optimizer does: boxes go in and come out."""
    boxed = init_params(KEY, CONFIG, X.shape)
    assert float(content(boxed["query"]["kernel"]).min()) < 0
    held = apply_constraints(boxed, CONFIG)
    expected = apply_constraints(nn.meta.unbox(boxed), CONFIG)
    assert_trees_close(nn.meta.unbox(held), expected, "float32")
    assert float(held["query"]["kernel"].value.min()) == 0
    assert nn.get_partition_spec(held) == nn.get_partition_spec(boxed)
    optimizer = optax.chain(optax.sgd(0.1), constrain(CONFIG, ("layer",)))
    params = {"layer": boxed, "other": boxed["query"]["kernel"]}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    stepped = optax.apply_updates(params, updates)
    assert float(stepped["layer"]["key"]["kernel"].value.min()) >= 0
    assert float(stepped["other"].value.min()) < 0


# --- explicit meshes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_on_an_explicit_mesh_arrays_lie_where_they_are_named(jit):
    """There Flax's `unbox` is an assertion; its own layers fail it (flax 0.12)."""
    config = MultiHeadAttentionConfig(**SIZES)
    shapes = {"kernel": jax.ShapeDtypeStruct((16, 4, 8), "float32")}
    logical = (("embed", "fsdp"), ("heads", "model"))
    cases = {
        "rules": (config, RULES, P("fsdp", "model", None)),
        "named": (config.replace(kernel_initializer=NAMED), None, P(None, "model", None)),
        "logical": (config.replace(kernel_initializer=LOGICAL), None, P("fsdp", "model", None)),
    }
    with jax.set_mesh(make_mesh(AxisType.Explicit)), nn.logical_axis_rules(logical):
        for name, (config, rules, spec) in cases.items():

            def make(key):
                return init_boxed(key, "query", shapes, config, rules, BOXES)  # noqa: B023

            box = (jax.jit(make) if jit else make)(KEY)["kernel"]
            assert box.value.sharding.spec == spec, name
            assert box.unbox().shape == (16, 4, 8)
            assert jax.eval_shape(make, KEY)["kernel"].value.sharding.spec == spec, name


@pytest.mark.slow
def test_a_layer_on_an_explicit_mesh():
    layer = MultiHeadAttention(**SIZES, partition_rules={"D": "fsdp"})
    plain = MultiHeadAttention(**SIZES)
    expected = plain.apply(plain.init(KEY, X, X), X, X)
    with jax.set_mesh(make_mesh(AxisType.Explicit)):
        variables = layer.init(KEY, X, X)
        assert_close(layer.apply(variables, X, X), expected, "float32")
    assert variables["params"]["query"]["kernel"].value.sharding.spec == P("fsdp", None, None)


def test_names_for_users_of_logical_rules():
    config = MultiHeadAttentionConfig(**SIZES)
    rules = (("embed", "fsdp"), ("heads", "model"), ("kv_heads", "model"))
    specs = nn.logical_to_mesh(param_axes(config), rules)
    assert specs == param_specs(config, rules)
    shardings = nn.logical_to_mesh_sharding(param_axes(config), make_mesh(), rules)
    params = jax.device_put(init_params(KEY, config, X.shape), shardings)
    assert params["query"]["kernel"].sharding.spec == P("fsdp", "model", None)
