"""Adapters of the flax modules: variables of their own, which train alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_trees_close, normal

import flax_mha.nnx
from flax_mha import Lora, MultiHeadAttention, multi_head_attention

SIZES = dict(num_heads=2, key_dim=8)
LORA = Lora(rank=3, alpha=6, which=("query", "attention_output"))
X = normal(0, 2, 5, 16)
TARGET = normal(1, 2, 5, 16)


def variables_of(layer):
    return layer.init(jax.random.key(0), X, X)


def nnx_layer(**more):
    return flax_mha.nnx.MultiHeadAttention(**SIZES | more, query_features=16, rngs=nnx.Rngs(0))


def test_linen_s_variables():
    """The base's initial values are those without adapters, and so is the first output."""
    variables = variables_of(MultiHeadAttention(**SIZES, lora=LORA))
    shapes = jax.tree.map(lambda x: x.shape, variables["lora"])
    assert shapes == {
        "query": {"a": (16, 3), "b": (3, 2, 8)},
        "attention_output": {"a": (2, 8, 3), "b": (3, 16)},
    }
    plain = MultiHeadAttention(**SIZES)
    base = variables_of(plain)
    jax.tree.map(np.testing.assert_array_equal, base["params"], variables["params"])
    adapted = MultiHeadAttention(**SIZES, lora=LORA).apply(variables, X, X)
    np.testing.assert_array_equal(adapted, plain.apply(base, X, X))


def train_linen(layer, variables):
    """Steps of SGD for the collection "lora" alone."""
    optimizer = optax.sgd(0.5, momentum=0.9)

    def loss(lora):
        output = layer.apply({"params": variables["params"], "lora": lora}, X, X)
        return ((output - TARGET) ** 2).mean()

    lora, state, losses = variables["lora"], optimizer.init(variables["lora"]), []
    for _ in range(10):
        value, gradient = jax.jit(jax.value_and_grad(loss))(lora)
        updates, state = optimizer.update(gradient, state)
        lora, losses = optax.apply_updates(lora, updates), [*losses, float(value)]
    return lora, losses


@pytest.mark.slow
def test_linen_trains_the_adapters_alone():
    layer = MultiHeadAttention(**SIZES, lora=LORA)
    variables = variables_of(layer)
    lora, losses = train_linen(layer, variables)
    assert losses[-1] < 0.8 * losses[0]
    trained = layer.apply({"params": variables["params"], "lora": lora}, X, X)
    call = {"config": layer.config, "lora": lora, "lora_scale": 2.0}
    np.testing.assert_allclose(trained, multi_head_attention(variables["params"], X, X, **call))
    merged = flax_mha.merge_lora(variables["params"], lora, LORA.scale)
    without = MultiHeadAttention(**SIZES).apply({"params": merged}, X, X)
    np.testing.assert_allclose(without, trained, atol=1e-5)


def test_nnx_trains_the_adapters_alone():
    """By what nnx itself offers: `wrt=nnx.LoRAParam`."""
    layer = nnx_layer(lora=LORA)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.5, momentum=0.9), wrt=nnx.LoRAParam)
    before, losses = jax.tree.map(jnp.copy, layer.params), []
    np.testing.assert_array_equal(layer(X, X), nnx_layer()(X, X))

    @nnx.jit
    def step(layer, optimizer):
        loss = lambda layer: ((layer(X, X) - TARGET) ** 2).mean()
        of_adapters = nnx.DiffState(0, nnx.LoRAParam)
        value, gradient = nnx.value_and_grad(loss, argnums=of_adapters)(layer)
        optimizer.update(layer, gradient)
        return value

    for _ in range(10):
        losses.append(float(step(layer, optimizer)))
    assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, layer.params)
    call = {"config": layer.config, "lora": layer.lora_params, "lora_scale": 2.0}
    np.testing.assert_allclose(layer(X, X), multi_head_attention(layer.params, X, X, **call))


def test_nnx_around_what_there_is():
    """`from_params` with adapters of one's own, and others put in their place."""
    layer = nnx_layer(lora=LORA)
    tree = jax.tree.map(lambda x: normal(4, *x.shape), layer.lora_params)
    layer.set_lora_params(tree)
    own = {"lora": LORA, "lora_params": tree}
    again = flax_mha.nnx.MultiHeadAttention.from_params(layer.params, layer.config, **own)
    np.testing.assert_array_equal(again(X, X), layer(X, X))
    assert_trees_close(again.lora_params, tree, "float32", "adapters")
    graph, state = nnx.split(layer)
    np.testing.assert_array_equal(nnx.merge(graph, state)(X, X), layer(X, X))
    assert nnx_layer().lora_params == {}


@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_dropout_in_training(module):
    """Of the adapters alone: the layer itself drops nothing."""
    rule = Lora(rank=3, which=("query",), dropout=0.5)
    if module == "linen":
        layer = MultiHeadAttention(**SIZES, lora=rule)
        variables = variables_of(layer)
        variables["lora"]["query"]["b"] += 1.0

        def run(seed):
            how = {} if seed is None else {"rngs": {"dropout": jax.random.key(seed)}}
            return layer.apply(variables, X, X, training=seed is not None, **how)
    else:
        layer = nnx_layer(lora=rule)
        layer.set_lora_params(jax.tree.map(lambda x: x + 1.0, layer.lora_params))

        def run(seed):
            rngs = None if seed is None else jax.random.key(seed)
            return layer(X, X, training=seed is not None, rngs=rngs)

    np.testing.assert_array_equal(run(1), run(1))
    np.testing.assert_array_equal(run(None), run(None))
    for one, other in ((run(1), run(2)), (run(1), run(None))):
        assert float(abs(one - other).max()) > 1e-3


def test_dropout_of_a_seed_or_of_the_layer_s_stream():
    rule = Lora(rank=3, which=("query",), dropout=0.5)
    seeded = MultiHeadAttention(**SIZES, lora=rule, seed=3)
    assert seeded.apply(variables_of(seeded), X, X, training=True).shape == X.shape
    layer = nnx_layer(lora=rule)
    layer.set_lora_params(jax.tree.map(lambda x: x + 1.0, layer.lora_params))
    one, other = (layer(X, X, training=True) for _ in range(2))
    assert float(abs(one - other).max()) > 1e-3


ADAPTED = variables_of(MultiHeadAttention(**SIZES, lora=LORA))
TREE = ADAPTED["lora"]
BAD = {
    "adapters that nobody reads": (
        lambda: MultiHeadAttention(**SIZES).apply(ADAPTED, X, X),
        r"those of its `lora`, \[\]. Received: \['attention_output', 'query'\].*merge_lora",
    ),
    "one adapter that nobody reads": (
        lambda: MultiHeadAttention(**SIZES, lora=Lora(rank=3, which=["query"])).apply(
            ADAPTED, X, X
        ),
        r"those of its `lora`, \['query'\]. Received: \['attention_output', 'query'\]",
    ),
    "another rank, and so another scale": (
        lambda: MultiHeadAttention(**SIZES, lora=Lora(4, 6, LORA.which)).apply(ADAPTED, X, X),
        r"the rank of its `lora`, 4: alpha / rank is the scale. Received: .*query of rank \(3,\)",
    ),
    "another rank, nnx": (
        lambda: nnx_layer(lora=Lora(4, 6, LORA.which)).set_lora_params(TREE),
        r"the rank of its `lora`, 4",
    ),
    "another rule": (
        lambda: variables_of(MultiHeadAttention(**SIZES, lora=8)),
        "`lora` must be a Lora",
    ),
    "another rule, nnx": (lambda: nnx_layer(lora={"rank": 8}), "`lora` must be a Lora"),
    "no such projection": (
        lambda: variables_of(MultiHeadAttention(**SIZES, lora=Lora(which=["gate"]))),
        r"this layer's projections.*\['gate'\]",
    ),
    "no key": (
        lambda: MultiHeadAttention(**SIZES, lora=Lora(dropout=0.1)).apply(
            variables_of(MultiHeadAttention(**SIZES, lora=Lora())), X, X, training=True
        ),
        "dropout=0.1, no 'dropout' rng stream",
    ),
    "a rank of 0": (lambda: Lora(rank=0), "`Lora.rank` must be"),
    "a rate of 1": (lambda: Lora(dropout=1.0), "`Lora.dropout` must be below 1"),
    "an infinite alpha": (lambda: Lora(alpha=float("inf")), "`Lora.alpha` must be a finite"),
    "one name": (lambda: Lora(which="query"), r"`Lora.which`.*\('query',\)"),
    "adapters for a layer without": (
        lambda: nnx_layer().set_lora_params(TREE),
        r"those of its `lora`, \[\]",
    ),
    "a rule without adapters": (
        lambda: flax_mha.nnx.MultiHeadAttention.from_params(
            nnx_layer().params, nnx_layer().config, lora=LORA
        ),
        "those of its `lora`.*Received: NoneType",
    ),
    "fewer adapters": (
        lambda: nnx_layer(lora=LORA).set_lora_params({"query": TREE["query"]}),
        r"\['query', 'attention_output'\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    attempt, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        attempt()
