"""`config.score`: a function of a logit and its pair, with parameters of its own or without."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import B, D, N, T, assert_close, assert_trees_close, normal, random_params, x64
from jax.sharding import PartitionSpec as P

import flax_mha.nnx
from flax_mha import (
    Latent,
    Mask,
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    apply_constraints,
    attention_scores,
    init_params,
    multi_head_attention,
    param_axes,
    param_shapes,
    param_specs,
    regularization_loss,
)
from flax_mha.layer.equation import layer as compiled_layer
from flax_mha.positions import Alibi, RelativeBias, Rotary, Score, alibi_slopes, register

X = normal(0, B, T, D)
SLOPES = jnp.asarray(alibi_slopes(N), "float32")
APART = abs(np.arange(T)[:, None] - np.arange(T))
BUCKETS = jnp.asarray(RelativeBias(8, 16).buckets(np.arange(1 - T, T)))


class OwnAlibi(Score):
    def __call__(self, logits, b, n, t, s):
        return logits - SLOPES[n] * abs(t - s).astype(logits.dtype)


@dataclasses.dataclass(frozen=True)
class Cap(Score):
    size: float = 2.0

    def __call__(self, logits, b, n, t, s):
        return self.size * jnp.tanh(logits / self.size)


class T5(Score):
    def param_sizes(self, num_heads):
        return {"embedding": {"X": 8, "N": num_heads}}

    def __call__(self, logits, b, n, t, s, embedding):
        return logits + embedding[BUCKETS[s - t + T - 1], n]


class Temperature(Score):
    """Of each head, one to begin with; and one number that all share, drawn."""

    def param_sizes(self, num_heads):
        return {"of_head": {"N": num_heads}, "shared": {}}

    def initial(self, name, init_key, shape, dtype):
        one = jnp.ones(shape, dtype)
        return one if name == "of_head" else jax.random.uniform(init_key, shape, dtype)

    def __call__(self, logits, b, n, t, s, *, of_head, shared):
        return logits * of_head[n] + shared


def layer_of(score, **fields):
    config = MultiHeadAttentionConfig(N, 8, score=score, **fields)
    return config, random_params(param_shapes(config, X.shape))


def attend(params, config, x=X, **call):
    return multi_head_attention(params, x, x, config=config, **call)


def results(params, config, **call):
    """The output, and the gradients of parameters and inputs."""

    def loss(params, x):
        output = attend(params, config, x, **call)
        return (output**2).sum(), output

    gradients, output = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, X)
    return output, gradients


def renamed(tree, **names):
    return {names.get(name, name): leaves for name, leaves in tree.items()}


# score: what the package has of it
BUILT_IN = {
    "ALiBi": (OwnAlibi(), {"position": Alibi()}),
    "soft cap": (Cap(0.5), {"soft_cap": 0.5}),
    "T5": (T5(), {"position": RelativeBias(8, 16)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_three_lines_are_the_built_in_one(name, implementation):
    score, fields = BUILT_IN[name]
    config, params = layer_of(score, implementation=implementation)
    plain = config.replace(score=None, **fields)
    output, (of_params, of_x) = results(params, config, use_causal_mask=True)
    named = renamed(params, score="relative_bias")
    expected, (of_named, of_named_x) = results(named, plain, use_causal_mask=True)
    assert_close(output, expected, "float32")
    assert_close(of_x, of_named_x, "float32")
    assert_trees_close(renamed(of_params, score="relative_bias"), of_named, "float32")
    without = {x: leaves for x, leaves in params.items() if x != "score"}
    nothing = attend(without, config.replace(score=None), use_causal_mask=True)
    assert abs(np.asarray(output - nothing)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
def test_a_temperature_of_each_head_is_a_larger_query(implementation):
    config, params = layer_of(Temperature(), implementation=implementation)

    def larger(params, x):
        of_head = params["score"]["of_head"][:, None]
        longer = lambda x: x * jax.lax.broadcast_to_rank(of_head, x.ndim)
        query = jax.tree.map(longer, params["query"])
        tree = {name: x for name, x in params.items() if name != "score"}
        return attend({**tree, "query": query}, config.replace(score=None), x)

    output, gradients = results(params, config)
    assert_close(output, larger(params, X), "float32")
    expected = jax.grad(lambda *data: (larger(*data) ** 2).sum(), (0, 1))(params, X)
    assert_trees_close(gradients, expected, "float32")


@pytest.mark.slow
def test_it_comes_after_cap_bias_and_position_and_before_the_mask():
    @dataclasses.dataclass(frozen=True)
    class Cubed(Score):
        def __call__(self, logits, b, n, t, s):
            return jnp.where(s > t, 50.0, 0.3 * logits + logits**3)

    config, params = layer_of(Cubed(), soft_cap=0.8, position="alibi", use_sinks=True)
    bias = normal(2, B, N, T, T)
    query, key = (
        np.einsum("btd,dnh->btnh", X, params[x]["kernel"]) + np.asarray(params[x]["bias"])
        for x in ("query", "key")
    )
    logits = 0.8 * np.tanh(np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(8) / 0.8)
    logits += np.asarray(bias) - np.asarray(SLOPES)[:, None, None] * APART
    logits = np.where(np.tri(T, dtype=bool), 0.3 * logits + logits**3, -np.inf)
    powers = np.exp(logits)
    sinks = np.exp(np.asarray(params["sinks"]["logits"]))[:, None, None]
    expected = powers / (powers.sum(-1, keepdims=True) + sinks)
    call = dict(bias=bias, use_causal_mask=True)
    _, weights = attend(params, config, return_attention_scores=True, **call)
    assert_close(weights, expected, "float32")
    rows = jnp.array([4, 1])
    some = attention_scores(params, X, X, config=config, query_rows=rows, **call)
    assert_close(some, expected[:, :, np.asarray(rows)], "float32")


@pytest.mark.slow
def test_several_attended_axes_and_batch_axes():
    class ByPlace(Score):
        def __call__(self, logits, b, n, t, s):
            row = abs(t // 4 - s // 4).astype(logits.dtype)
            return logits - row * (b + n).astype(logits.dtype)

    config, params = layer_of(ByPlace(), attention_axes=(1, 3))
    x = normal(1, 2, 3, 5, 4, D)
    b, n, t, s = np.ix_(np.arange(10), np.arange(N), np.arange(12), np.arange(12))
    bias = jnp.asarray(-abs(t // 4 - s // 4) * (b + n), "float32").reshape(2, 5, N, 3, 4, 3, 4)
    expected = attend(params, config.replace(score=None), x, bias=bias)
    assert_close(attend(params, config, x), expected, "float32")


@pytest.mark.slow
def test_dropout_vmap_remat_and_a_mask_of_functions():
    config, params = layer_of(T5(), dropout=0.3)
    mask = Mask.function(lambda b, n, t, s: (s <= t) | (s == n))
    call = dict(dropout_key=jax.random.key(5), attention_mask=mask)
    plain = config.replace(score=None, position=RelativeBias(8, 16))
    named = renamed(params, score="relative_bias")
    expected = attend(named, plain, **call)
    assert_close(attend(params, config, **call), expected, "float32")
    config, plain = config.replace(dropout=0.0), plain.replace(dropout=0.0)
    one = jax.checkpoint(jax.vmap(lambda params, x: attend(params, config, x), (None, 0)))
    gradient = jax.grad(lambda params: (one(params, X) ** 2).sum())(params)
    wanted = jax.grad(lambda params: (attend(params, plain) ** 2).sum())(named)
    assert_trees_close(renamed(gradient, score="relative_bias"), wanted, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_parameters_come_in_the_dtype_of_the_logits(dtype):
    """Strict promotion: a score in float32 of 16-bit heads, in float64 of float64 ones."""
    seen = []

    class Noted(Temperature):
        def __call__(self, logits, b, n, t, s, *, of_head, shared):
            seen.append((logits.dtype, of_head.dtype, shared.dtype))
            return logits * of_head[n] + shared

    with x64():
        config, params = layer_of(Noted(), dtype=dtype)
        output = attend(params, config, X.astype(dtype))
        assert output.dtype == dtype
        kept = {name: x for name, x in params.items() if name != "score"}
        ones = {"of_head": jnp.ones(N), "shared": jnp.float32(2.0)}
        same = attend({**kept, "score": ones}, config, X.astype(dtype))
        assert_close(same, attend(kept, config.replace(score=None), X.astype(dtype)), dtype)
    wide = "float64" if dtype == "float64" else "float32"
    assert {str(x) for dtypes in seen for x in dtypes} == {wide}


def test_equal_configs_are_one_trace():
    traces = []

    @dataclasses.dataclass(frozen=True)
    class Noted(Score):
        by: float

        def __call__(self, logits, b, n, t, s):
            traces.append(self.by)
            return logits * self.by

    size = compiled_layer._cache_size()
    for by in (2.0, 2, 2.0, 3.0):
        config, params = layer_of(Noted(by=float(by)))
        attend(params, config)
    assert compiled_layer._cache_size() == size + 2
    assert set(traces) == {2.0, 3.0}


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_initial_values_are_what_the_score_says_by_name():
    config, _ = layer_of(Temperature())
    first, again = (init_params(jax.random.key(1), config, X.shape)["score"] for _ in range(2))
    assert first["of_head"].tolist() == [1.0] * N
    assert first["shared"].shape == ()
    assert_trees_close(first, again, "float32")
    other = init_params(jax.random.key(2), config, X.shape)["score"]
    assert float(other["shared"]) != float(first["shared"])
    t5, _ = layer_of(T5(), param_dtype="bfloat16")
    table = init_params(jax.random.key(1), t5, X.shape)["score"]["embedding"]
    assert (table.shape, table.dtype.name, bool(table.any())) == ((8, N), "bfloat16", False)


def test_each_parameter_is_drawn_by_its_own_name():
    def drawn(*names):
        score = own(
            param_sizes=lambda self, N: {name: {"N": N} for name in names},
            initial=lambda self, name, init_key, shape, dtype: jax.random.normal(init_key, shape),
            __call__=lambda self, x, b, n, t, s, **params: x,
        )
        config = MultiHeadAttentionConfig(N, 8, score=score())
        return init_params(jax.random.key(1), config, X.shape)["score"]

    both, one = drawn("first", "second"), drawn("second")
    assert abs(np.asarray(both["first"] - both["second"])).max() > 0.1
    np.testing.assert_array_equal(both["second"], one["second"])


def test_modules_hold_the_parameters():
    config, params = layer_of(T5())
    expected = attend(params, config)
    module = MultiHeadAttention.from_config(config)
    variables = module.init(jax.random.key(1), X, X)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
    assert_close(module.apply({"params": params}, X, X), expected, "float32")
    layer = flax_mha.nnx.MultiHeadAttention.from_params(params, config)
    assert_close(layer(X, X), expected, "float32")
    assert layer.score.embedding.shape == (8, N)
    made = flax_mha.nnx.MultiHeadAttention.from_config(
        config, query_features=D, rngs=nnx.Rngs(0), partition_rules={"heads": "model"}
    )
    assert jax.tree.map(jnp.shape, made.params) == jax.tree.map(jnp.shape, params)
    named = MultiHeadAttention.from_config(config, partition_rules={"relpos_buckets": "model"})
    boxed = jax.eval_shape(named.init, jax.random.key(1), X, X)["params"]["score"]["embedding"]
    assert boxed.names == ("model", None)


def test_names_of_axes():
    config, _ = layer_of(T5())
    assert param_axes(config)["score"]["embedding"] == P("relpos_buckets", "heads")
    assert param_specs(config, {"N": "model"})["score"]["embedding"] == P(None, "model")
    config, _ = layer_of(Temperature())
    assert param_axes(config)["score"] == {"of_head": P("heads"), "shared": P()}


def test_no_regularizer_or_constraint_touches_them():
    fields = dict(kernel_regularizer="l2", bias_regularizer="l2", kernel_constraint="non_neg")
    config, params = layer_of(T5(), **fields)
    plain = {name: x for name, x in params.items() if name != "score"}
    assert regularization_loss(params, config) == regularization_loss(plain, config)
    assert_trees_close(apply_constraints(params, config)["score"], params["score"], "float32")


def test_latent_heads_and_rotary_embedding():
    latent = Latent(rank=7, shared_dim=4)
    fields = dict(latent=latent, position=Rotary(dim=4), use_bias=False)
    config, params = layer_of(OwnAlibi(), **fields)
    bias = -np.asarray(SLOPES)[None, :, None, None] * APART.astype("float32")
    expected = attend(params, config.replace(score=None), bias=bias)
    assert_close(attend(params, config), expected, "float32")


# --- saved and read -----------------------------------------------------------------------------


def test_a_registered_score_is_saved_and_read():
    @register
    @dataclasses.dataclass(frozen=True)
    class SavedScore(Score):
        by: float = 2.0
        sizes: tuple[int, ...] = ()

        def __call__(self, logits, b, n, t, s):
            return logits * self.by

    config, _ = layer_of(SavedScore(by=3.0, sizes=(1, 2)))
    text = json.dumps(config.to_dict())
    assert MultiHeadAttentionConfig.from_dict(json.loads(text)) == config
    assert hash(MultiHeadAttentionConfig.from_dict(json.loads(text))) == hash(config)


def test_what_is_not_registered_is_refused_by_name():
    with pytest.raises(TypeError, match=r"whose score is of a class known.*OwnAlibi.*register"):
        layer_of(OwnAlibi())[0].to_dict()
    with pytest.raises(ValueError, match=r"`score\['class_name'\]` must be one of.*'Rotary'"):
        MultiHeadAttentionConfig(N, 8, score={"class_name": "Rotary", "config": {}})
    with pytest.raises(ValueError, match=r"`position\['class_name'\]` must be one of"):
        MultiHeadAttentionConfig(N, 8, position={"class_name": "SavedScore", "config": {}})


# --- refused ------------------------------------------------------------------------------------


def own(**methods):
    return type("Own", (Score,), {"__call__": lambda self, x, b, n, t, s: x, **methods})


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (lambda x, b, n, t, s: x, TypeError, r"`score` must be None or.*holds no functions"),
        (OwnAlibi, TypeError, r"A class is called first"),
        (Alibi(), TypeError, r"`score` must be None or a flax_mha.positions.Score.*Alibi"),
        ("alibi", TypeError, r"`score` must be None or a flax_mha.positions.Score"),
        (own(param_sizes=lambda self, N: {"a": {"N": N}})(), TypeError, r"`Own.__call__`.*, a\)"),
        (own(__call__=lambda self, x: x)(), TypeError, r"`Own.__call__` must take \(logits, b, n"),
        (own(param_sizes=lambda self, N: {"t": {}})(), ValueError, r"a name of its own.*'t'"),
        (own(param_sizes=lambda self, N: {"kernel": {}})(), ValueError, r"a name of its own"),
        (own(param_sizes=lambda self, N: {"a": (N,)})(), TypeError, r"`Own.param_sizes` must be"),
        (own(param_sizes=lambda self, N: {"a": {"heads": N}})(), ValueError, r"axes \['heads'\]"),
        (own(param_sizes=lambda self, N: {"a": {"N": 0}})(), ValueError, r"`a.N` must be"),
        (own(param_sizes=lambda self, N: {"a": {"N": 2.0}})(), TypeError, r"`a.N` must be"),
        (own(__hash__=lambda self: hash([]))(), TypeError, r"fields of `Own` must be hashable"),
    ],
)  # fmt: skip
def test_what_is_no_score_is_refused_where_the_config_is_made(score, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttentionConfig(N, 8, score=score)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda self, x, b, n, t, s: x > 0, TypeError, "must give a logit"),
        (lambda self, x, b, n, t, s: x * jnp.ones(3), ValueError, "must give one number"),
        (lambda self, x, b, n, t, s: x if s > t else -x, TypeError, "jnp.where"),
    ],
    ids=["boolean", "shape", "branch"],
)
def test_what_gives_no_logit_is_refused_in_the_call(function, error, message):
    config, params = layer_of(own(__call__=function)())
    with pytest.raises(error, match=message):
        attend(params, config)


def test_parameters_that_do_not_fit_are_named():
    config, params = layer_of(T5())
    without = {name: x for name, x in params.items() if name != "score"}
    with pytest.raises(ValueError, match=r"`params` must hold \[.*'score'"):
        attend(without, config)
    with pytest.raises(ValueError, match=r"`params` must hold"):
        attend(params, config.replace(score=OwnAlibi()))
    with pytest.raises(ValueError, match=r"`params\['score'\]` must hold \['embedding'\]"):
        attend({**without, "score": {"table": jnp.ones((8, N))}}, config)
    with pytest.raises(ValueError, match=r"\['embedding'\] must be \[X, N\] = \(8, 3\)"):
        attend({**without, "score": {"embedding": jnp.ones((N, 8))}}, config)
    wrong = own(
        param_sizes=lambda self, N: {"a": {"N": N}},
        initial=lambda self, name, init_key, shape, dtype: jnp.ones((7,), dtype),
        __call__=lambda self, x, b, n, t, s, a: x,
    )
    with pytest.raises(TypeError, match="must return an array of shape"):
        init_params(jax.random.key(0), MultiHeadAttentionConfig(N, 8, score=wrong()), X.shape)
