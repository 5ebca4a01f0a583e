"""Names of axes in nnx: `partition_rules` and `nnx.with_partitioning`, with and without a mesh."""

import contextlib
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import assert_close, assert_trees_close, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_mha import MultiHeadAttention as Linen
from flax_mha import MultiHeadAttentionConfig, apply_constraints, init_params, param_specs
from flax_mha.keras.initializers import Constant
from flax_mha.nnx import MultiHeadAttention

X = normal(1, 8, 6, 16)
RULES = {"heads": "model", "embed": "fsdp"}
NAMES = (None, "model", None)


def numbers(key, shape, dtype):
    """An initializer that compiles fast: small numbers of both signs."""
    return (jnp.arange(math.prod(shape), dtype=dtype) % 7 - 3).reshape(shape) / 10


NAMED = nnx.with_partitioning(numbers, NAMES)
# Which values go where is tested in tests/test_nnx.py; one number compiles in no time.
CONFIG = MultiHeadAttentionConfig(4, 8, kernel_initializer=Constant(0.1))
PLACES = hasattr(nnx, "use_eager_sharding")  # flax 0.12: a Param is laid out when it is made
MESHES = {"none": None, "auto": AxisType.Auto, "explicit": AxisType.Explicit}
EVERY_MESH = pytest.mark.parametrize("kind", MESHES.values(), ids=MESHES)


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("fsdp", "model"), axis_types=(kind,) * 2)


def ambient(kind):
    return contextlib.nullcontext() if kind is None else jax.set_mesh(mesh_of(kind))


def built(config=CONFIG, **fields):
    return MultiHeadAttention.from_config(config, query_features=16, rngs=nnx.Rngs(0), **fields)


def specs_of(layer):
    return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer, nnx.Param)))


@EVERY_MESH
def test_the_specs_are_those_of_the_function(kind):
    with ambient(kind):
        layer = built(partition_rules=RULES)
    assert specs_of(layer) == param_specs(CONFIG, RULES)
    kernel = layer.query.kernel[...]
    if kind is AxisType.Explicit or (kind is not None and PLACES):
        assert kernel.sharding.spec == P("fsdp", "model", None)
    else:
        assert kernel.sharding.is_fully_replicated
    shardings = nnx.get_named_sharding(nnx.state(layer, nnx.Param), mesh := mesh_of(AxisType.Auto))
    assert nnx.to_pure_dict(shardings)["query"]["kernel"] == NamedSharding(
        mesh, P("fsdp", "model", None)
    )


@pytest.mark.parametrize("kind", [None, AxisType.Auto], ids=["none", "auto"])
def test_a_named_layer_gives_the_output_of_the_other(kind):
    expected = built()(X, X)
    with ambient(kind):
        layer = built(partition_rules=RULES)
        assert_close(layer(X, X), expected, "float32")
        assert_close(nnx.jit(lambda layer: layer(X, X))(layer), expected, "float32")


def test_a_layer_on_an_explicit_mesh():
    expected = built()(X, X)
    with ambient(AxisType.Explicit):
        layer = built(partition_rules={"D": "fsdp"})
        assert layer.query.kernel[...].sharding.spec == P("fsdp", None, None)
        assert_close(layer(X, X), expected, "float32")


@EVERY_MESH
def test_initializers_with_partitioning(kind):
    with ambient(kind):
        layer = built(CONFIG.replace(kernel_initializer=NAMED))
    specs = specs_of(layer)
    assert {name: leaves["kernel"] for name, leaves in specs.items()} == {
        name: P(*NAMES) for name in ("query", "key", "value", "attention_output")
    }
    assert specs["query"]["bias"] == P()
    plain = built(CONFIG.replace(kernel_initializer=numbers))
    assert_trees_close(layer.params, plain.params, "float32")
    if kind is not None and PLACES:
        assert layer.query.kernel[...].sharding.spec == P(None, "model", None)


def test_a_wish_to_place_without_a_mesh_is_flax_own_error():
    if not PLACES:
        return  # flax 0.11 knows no such wish
    eager = nnx.with_partitioning(numbers, NAMES, eager_sharding=True)
    with pytest.raises(ValueError, match="mesh context or metadata is required"):
        built(CONFIG.replace(kernel_initializer=eager))


def test_metadata_with_its_own_mesh():
    mesh = mesh_of(AxisType.Auto)
    layer = built(CONFIG.replace(kernel_initializer=nnx.with_partitioning(numbers, NAMES, mesh)))
    assert layer.query.kernel.get_metadata()["mesh"] == mesh
    if PLACES:
        assert layer.query.kernel[...].sharding == NamedSharding(mesh, P(*NAMES))


def test_other_metadata_is_kept():
    marked = nnx.with_metadata(numbers, mark="mine")
    layer = built(CONFIG.replace(kernel_initializer=marked))
    assert layer.query.kernel.get_metadata()["mark"] == "mine"
    assert specs_of(layer)["query"]["kernel"] == P()


@pytest.mark.slow
def test_a_keras_initializer_keeps_its_fans_in_metadata():
    named = nnx.with_partitioning(
        CONFIG.replace(kernel_initializer="he_normal").kernel_initializer, NAMES
    )
    layers = [built(CONFIG.replace(kernel_initializer=init)) for init in (named, "he_normal")]
    assert_trees_close(layers[0].params, layers[1].params, "float32")


@pytest.mark.parametrize("rules", [RULES, None])
def test_from_params_and_set_params_keep_names_and_arrays(rules):
    params = init_params(jax.random.key(0), CONFIG, X.shape)
    config = CONFIG if rules else CONFIG.replace(kernel_initializer=NAMED)
    layer = MultiHeadAttention.from_params(params, config, partition_rules=rules)
    assert_trees_close(layer.params, params, "float32")
    expected = P("fsdp", "model", None) if rules else P(*NAMES)
    assert specs_of(layer)["query"]["kernel"] == expected
    layer.set_params(jax.tree.map(jnp.zeros_like, params))
    assert specs_of(layer)["query"]["kernel"] == expected
    assert float(abs(layer(X, X)).max()) == 0
    graph, state = nnx.split(layer)
    assert specs_of(nnx.merge(graph, state)) == specs_of(nnx.clone(layer)) == specs_of(layer)


def test_from_params_leaves_arrays_where_they_lie():
    params = init_params(jax.random.key(0), CONFIG, X.shape)
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        layer = MultiHeadAttention.from_params(params, CONFIG, partition_rules=RULES)
    assert layer.query.kernel[...].sharding == params["query"]["kernel"].sharding


def test_mapped_layers_add_their_axis():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def stacked(rngs):
        return MultiHeadAttention.from_config(
            CONFIG, query_features=16, rngs=rngs, partition_rules=RULES
        )

    layers = stacked(nnx.Rngs(0))
    assert specs_of(layers)["query"]["kernel"] == P("layers", "fsdp", "model", None)
    assert layers.query.kernel[...].shape == (3, 16, 4, 8)


def test_constraints_act_on_a_state():
    config = CONFIG.replace(kernel_constraint="non_neg", kernel_initializer=NAMED)
    state = nnx.state(built(config), nnx.Param)
    held = nnx.to_pure_dict(apply_constraints(state, config))
    assert float(nnx.to_pure_dict(state)["query"]["kernel"].min()) < 0
    assert float(held["query"]["kernel"].min()) == 0


# --- what is refused ----------------------------------------------------------------------------


def linen_named(initializer=numbers, names=NAMES):
    return CONFIG.replace(kernel_initializer=nn.with_partitioning(initializer, names))


def test_each_module_system_has_its_own_names():
    message = (
        r"Names of axes for params\['query'\]\['kernel'\] must be those of flax\.nnx\. Received: "
        r"Partitioned: `nn\.with_partitioning` is of flax\.linen\. Use `nnx\.with_partitioning`"
    )
    with pytest.raises(TypeError, match=message):
        built(linen_named())
    named = CONFIG.replace(kernel_initializer=NAMED)
    message = (
        r"must be those of flax\.linen\. Received: VariableMetadata: `nnx\.with_partitioning` is"
    )
    with pytest.raises(TypeError, match=message):
        Linen.from_config(named).init(jax.random.key(0), X, X)
    with pytest.raises(TypeError, match=message):
        init_params(jax.random.key(0), named, X.shape)


@pytest.mark.parametrize(
    ("field", "initializer", "message"),
    [
        (
            "kernel_initializer",
            nnx.with_partitioning(numbers, ("model", None)),
            r"\[D, N, H\], of rank 3",
        ),
        (
            "bias_initializer",
            nnx.with_partitioning(nnx.initializers.zeros, NAMES),
            r"params\['query'\]\['bias'\] \[N, H\], of rank 2, must have one partition name",
        ),
    ],
)
def test_names_of_the_wrong_rank_are_refused(field, initializer, message):
    with pytest.raises(ValueError, match=message):
        built(CONFIG.replace(**{field: initializer}))


def test_axes_are_named_once():
    with pytest.raises(ValueError, match=r"The axes of params.* must be named once"):
        built(CONFIG.replace(kernel_initializer=NAMED), partition_rules=RULES)


def test_wrong_rules_are_refused():
    with pytest.raises(ValueError, match="An axis in `rules` must be among"):
        built(partition_rules={"head": "model"})
    with ambient(AxisType.Auto), pytest.raises(ValueError, match="N = 6, 'model' of size 4"):
        built(CONFIG.replace(num_heads=6), partition_rules=RULES)


def test_boxed_params_are_refused_with_the_remedy():
    params = init_params(jax.random.key(0), linen_named(), X.shape)
    with pytest.raises(
        TypeError, match=r"Received: a box, Partitioned.*`nn\.meta\.unbox\(params\)`"
    ):
        MultiHeadAttention.from_params(params, CONFIG)
    with pytest.raises(TypeError, match=r"Received: a box, Partitioned"):
        built().set_params(params)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, AxisType.Auto], ids=["none", "auto"])
def test_named_parameters_are_trained_as_the_others(kind):
    @nnx.jit
    def step(layer, optimizer):
        optimizer.update(layer, nnx.grad(lambda layer: (layer(X, X) ** 2).sum())(layer))

    config = CONFIG.replace(kernel_initializer=NAMED)
    trained = []
    for initializer, mesh in ((numbers, None), (NAMED, kind)):
        with ambient(mesh):
            layer = built(config.replace(kernel_initializer=initializer))
            step(layer, nnx.Optimizer(layer, optax.sgd(0.01), wrt=nnx.Param))
        trained.append(layer)
    assert_trees_close(trained[1].params, trained[0].params, "float32")
    assert specs_of(trained[1])["query"]["kernel"] == P(*NAMES)
    before = built(config).params["query"]["kernel"]
    assert float(abs(trained[0].params["query"]["kernel"] - before).max()) > 1e-4


def test_flax_abstract_models_are_laid_out():
    mesh = mesh_of(AxisType.Auto)
    _, state = nnx.get_abstract_model(lambda: built(partition_rules=RULES), mesh)
    kernel = nnx.to_pure_dict(state)["query"]["kernel"]
    assert kernel.sharding == NamedSharding(mesh, P("fsdp", "model", None))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_flax_finds_the_ambient_mesh_for_the_names(kind):
    if not hasattr(nnx, "as_abstract"):
        return  # flax 0.11 has no such function
    layer = nnx.eval_shape(lambda: built(partition_rules=RULES))
    with ambient(kind):
        layer = nnx.as_abstract(layer)
    assert layer.params["query"]["kernel"].sharding.spec == P("fsdp", "model", None)
