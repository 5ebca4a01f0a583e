"""attention_fn inside flax's own modules: flax's numbers, and no argument of flax lost."""

import ast
import functools
import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES
from flax import linen as nn
from flax import nnx
from helpers import (
    assert_close,
    assert_trees_close,
    booleans,
    normal,
    open_rows,
    random_params,
    relaxed,
)

from flax_mha import Mask, dot_product_attention
from flax_mha.interop.flax import attention_fn

B, T, S, N, H = 2, 5, 7, 3, 11
D = 17
OURS = inspect.signature(attention_fn).parameters
BLOCKWISE = functools.partial(attention_fn, implementation="blockwise", block_sizes=(2, 4))
FUNCTIONS = {"chosen": attention_fn, "blockwise": BLOCKWISE}
ONLY_NEW = pytest.mark.skipif(
    "is_causal" not in inspect.signature(nnx.dot_product_attention).parameters,
    reason="this flax.nnx has neither is_causal nor grouped heads",
)


# --- no argument is lost ------------------------------------------------------------------------


def passed_by(module):
    """The names of all arguments that a module's source passes to its `attention_fn`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(module)))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.attention_fn":
            names |= {keyword.arg for keyword in node.keywords}
        if isinstance(node, ast.Assign) and "attn_kwargs" in ast.unparse(node.targets[0]):
            if isinstance(node.targets[0], ast.Subscript):
                names.add(node.targets[0].slice.value)
            elif ast.unparse(node.value).startswith("dict("):
                names |= {keyword.arg for keyword in node.value.keywords}
    return names - {None}


@pytest.mark.parametrize("module", [nn.MultiHeadDotProductAttention, nnx.MultiHeadAttention])
def test_every_argument_that_flax_passes_is_named(module):
    names = passed_by(module)
    assert {"mask", "dropout_rng", "broadcast_dropout", "precision", "module"} <= names
    assert names <= set(OURS)


@pytest.mark.parametrize("function", [nn.dot_product_attention, nnx.dot_product_attention])
def test_every_argument_that_flax_has_is_named_with_its_default(function):
    for name, parameter in inspect.signature(function).parameters.items():
        expected = None if name == "promote_dtype" else parameter.default
        assert OURS[name].default == expected, name
    assert list(OURS)[:5] == list(inspect.signature(function).parameters)[:5]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"qk_attn_weights_einsum_cls": lambda: jnp.einsum}, "`qk_attn_weights_einsum`"),
        ({"attn_weights_value_einsum_cls": lambda: jnp.einsum}, "`attn_weights_value_einsum`"),
    ],
)
def test_what_cannot_be_honoured_is_refused_through_the_module(fields, name):
    layer = nn.MultiHeadDotProductAttention(N, qkv_features=N * H, attention_fn=BLOCKWISE, **fields)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(NotImplementedError, match=name):
        jax.eval_shape(layer.init, keys, normal(0, B, T, D))


QUERY, KEY = normal(0, B, T, N, H), normal(1, B, S, N, H)
ONE = QUERY[:, :1]
DROP = {"dropout_rate": 0.3, "broadcast_dropout": False}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"einsum_dot_general": jax.lax.dot_general}, NotImplementedError, "`einsum_dot_general`"),
        ({"input_positions": jnp.arange(T)}, NotImplementedError, "`input_positions`.*Rotate"),
        ({"broadcast_dropout": "yes"}, TypeError, "`broadcast_dropout` must be True or False"),
        (DROP, ValueError, "Dropout needs a PRNG key.*dropout_rng=jax.random.key"),
        ({**DROP, "dropout_rng": 3}, TypeError, "`dropout_key` must be one JAX PRNG key"),
        ({"dropout_rate": 2}, ValueError, r"`dropout_rate` must be a probability"),
        ({"deterministic": None}, TypeError, "`deterministic` must be True or False"),
        ({"dtype": "int32"}, TypeError, "`dtype` must be a floating-point dtype.*int32"),
        ({"dtype": "float64"}, ValueError, "`dtype='float64'` needs JAX's 64-bit mode"),
        ({"module": 3}, TypeError, "`module` must be a flax module.*int"),
        ({"mask": jnp.full((T, S), -1e9)}, ValueError, "must hold 0 and 1 alone.*goes to `bias=`"),
        ({"mask": jnp.ones((S, T))}, ValueError, "`mask` must broadcast to.*Did you swap T and S"),
        ({"query": QUERY.astype(int), "key": KEY.astype(int)}, TypeError, "floating-point"),
        (
            {"query": QUERY.astype("complex64"), "key": KEY.astype("complex64")},
            NotImplementedError,
            "complex numbers have no order, by which a softmax.*query of dtype complex64",
        ),
        ({"implementation": "flash"}, ValueError, "`implementation` must be one of"),
        ({"force_fp32_for_softmax": "yes"}, TypeError, "`force_fp32_for_softmax` must be True or"),
        (
            {"query": ONE, "is_causal": True, "mask": jnp.ones((1, S))},
            ValueError,
            "lets it attend to key 0 alone.*T = 1, S = 7.*Leave `is_causal` out",
        ),
    ],
)
def test_what_is_refused(arguments, error, message):
    arguments = {"query": QUERY, "key": KEY, **arguments}
    with pytest.raises(error, match=message):
        attention_fn(value=arguments["key"], **arguments)


# --- flax.linen ---------------------------------------------------------------------------------


def with_gradients(run, *trees):
    """The output and the gradients of a random sum of it, compiled as one."""

    def scalar(*trees):
        output = run(*trees)
        return (output * normal(9, *output.shape)).sum(), output

    gradients, output = jax.jit(jax.grad(scalar, range(len(trees)), has_aux=True))(*trees)
    return output, gradients


def linen_pair(function, cls=nn.MultiHeadDotProductAttention, **fields):
    fields = {
        "num_heads": N,
        "qkv_features": N * H,
        **fields,
    }
    return cls(**fields, attention_fn=function), cls(**fields)


def variables_of(layer, *inputs):
    """Random kernels and biases of the module's shapes, without running its `init`."""
    init = functools.partial(layer.init, deterministic=True)
    return random_params(jax.eval_shape(init, jax.random.key(0), *inputs))


MASKS = {
    "none": None,
    "floats": open_rows(booleans(3, B, 1, T, S)).astype("float32"),
    "booleans": open_rows(booleans(4, B, N, T, S)),
    "integers": open_rows(booleans(5, 1, 1, 1, S)).astype("int32"),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.slow
def test_linen_module_has_flax_s_numbers_for_every_mask(function, mask):
    check_linen_module(function, mask)


@pytest.mark.slow
def test_linen_module_has_flax_s_numbers():
    check_linen_module("blockwise", "booleans")


def check_linen_module(function, mask):
    ours, flax_s = linen_pair(FUNCTIONS[function])
    query, key, value = normal(0, B, T, D), normal(1, B, S, D), normal(2, B, S, D)
    variables = variables_of(flax_s, query, key, value)
    run = lambda layer: with_gradients(
        lambda *trees: layer.apply(*trees, mask=MASKS[mask]), variables, query, key, value
    )
    for mine, theirs in zip(run(ours), run(flax_s)):
        assert_trees_close(mine, theirs, "float32")


@pytest.mark.parametrize(
    "cls", [nn.SelfAttention, pytest.param(nn.MultiHeadAttention, marks=pytest.mark.slow)]
)
def test_the_other_linen_modules(cls):
    ours, flax_s = linen_pair(attention_fn, cls)
    x = normal(0, B, T, D)
    with relaxed():  # SelfAttention warns that it will be deprecated.
        variables = variables_of(flax_s, x)
        mask = nn.make_causal_mask(x[..., 0])
        run = lambda layer: jax.jit(lambda x: layer.apply(variables, x, mask=mask))(x)
        assert_close(run(ours), run(flax_s), "float32")


@pytest.mark.slow
def test_linen_decodes_step_by_step():
    """flax's cache passes a mask [..., 1, S]; the steps equal one causal pass of flax's own."""
    ours, flax_s = linen_pair(attention_fn, decode=True)
    x = normal(0, B, S, D)
    step = jax.jit(lambda variables, token: ours.apply(variables, token, mutable=["cache"]))
    params = variables_of(flax_s.clone(decode=False), x)["params"]
    cache = jax.jit(ours.init)(jax.random.key(0), x)["cache"]
    outputs = []
    for s in range(S):
        output, state = step({"params": params, "cache": cache}, x[:, s : s + 1])
        cache = state["cache"]
        outputs.append(output)
    assert cache["cache_index"] == S
    mask = nn.make_causal_mask(x[..., 0])
    whole = jax.jit(flax_s.clone(decode=False).apply)({"params": params}, x, mask=mask)
    assert_close(jnp.concatenate(outputs, 1), whole, "float32")


def test_a_structured_mask_passes_through_the_module():
    ours, flax_s = linen_pair(BLOCKWISE)
    x = normal(0, B, T, D)
    variables = variables_of(flax_s, x)
    run = lambda layer, mask: jax.jit(layer.apply)(variables, x, mask=mask)
    expected = run(flax_s, nn.make_causal_mask(x[..., 0]))
    assert_close(run(ours, Mask.causal()), expected, "float32")


def sown(layer, variables, x, **call):
    """The output, and the weights that the module sows."""
    key = call.pop("dropout_rng", None)
    run = functools.partial(layer.apply, sow_weights=True, mutable=["intermediates"], **call)
    output, state = jax.jit(lambda key: run(variables, x, dropout_rng=key))(key)
    return output, state["intermediates"]["attention_weights"][0]


def test_linen_sows_the_weights_before_dropout():
    ours, flax_s = linen_pair(attention_fn, dropout_rate=0.3, broadcast_dropout=False)
    x = normal(0, B, T, D)
    variables = variables_of(flax_s, x)
    quiet, expected = sown(flax_s, variables, x, deterministic=True)
    call = {"deterministic": False, "dropout_rng": jax.random.key(1)}
    loud, weights = sown(ours, variables, x, **call)
    assert jnp.abs(loud - quiet).max() > 1e-2  # weights were dropped
    assert expected.shape == (B, N, T, T)
    assert_close(weights, expected, "float32")


def test_sowing_names_the_implementation_that_cannot():
    """And asks nothing of it where flax would drop what is sown."""
    ours, _ = linen_pair(BLOCKWISE)
    x = normal(0, B, T, D)
    variables = variables_of(ours, x)
    with pytest.raises(NotImplementedError, match=r"'blockwise'.*never holds the weights"):
        sown(ours, variables, x)
    run = functools.partial(ours.apply, sow_weights=True)
    assert jax.eval_shape(run, variables, x).shape == x.shape


def test_flax_s_default_drops_the_same_positions_for_all():
    """No edit of a model: `broadcast_dropout=True`, as flax has it; any number of batch axes."""
    ours, _ = linen_pair(attention_fn, dropout_rate=0.3)
    assert ours.broadcast_dropout
    x = jnp.broadcast_to(normal(0, T, D), (2, 3, T, D))
    variables = variables_of(ours, x)
    run = functools.partial(ours.apply, variables, x, deterministic=False)
    loud = jax.jit(lambda key: run(dropout_rng=key))(jax.random.key(1))
    assert_close(loud, jnp.broadcast_to(loud[0, 0], loud.shape), "float32")


def test_the_flag_decides_whose_positions_are_dropped():
    drop = {"dropout_rate": 0.3, "dropout_rng": jax.random.key(1)}
    attend = lambda **flag: jax.jit(lambda q, k: attention_fn(q, k, k, **drop, **flag))(QUERY, KEY)
    shared, own = attend(), attend(broadcast_dropout=False)
    assert_close(shared[0, :, 0], own[0, :, 0], "float32")
    assert jnp.abs(shared[1] - own[1]).max() > 1e-2


@pytest.mark.slow
def test_dropout_through_the_module():
    ours, _ = linen_pair(attention_fn, dropout_rate=0.3, broadcast_dropout=False)
    x = normal(0, B, T, D)
    variables = variables_of(ours, x)
    run = jax.jit(lambda key: ours.apply(variables, x, deterministic=False, dropout_rng=key))
    key, other = jax.random.split(jax.random.key(1))
    first, again, second = map(run, (key, key, other))
    assert (first == again).all()
    assert jnp.abs(first - second).max() > 1e-2  # another key, another mask


# --- the function -------------------------------------------------------------------------------


@pytest.mark.slow
def test_dropout_is_the_oracle_s():
    case = CASES["dropout"]
    arrays = case.arrays()
    key, rate = case.call["dropout_key"], case.call["dropout_rate"]
    call = {"dropout_rng": key, "dropout_rate": rate, "broadcast_dropout": False}
    loud = jax.jit(lambda arrays: attention_fn(**arrays, **call))(arrays)
    assert_close(loud, case.expected(arrays)[0], "float32")


def program(attend, **call):
    return str(jax.make_jaxpr(functools.partial(attend, **call))(QUERY, KEY, KEY))


def test_dropout_acts_unless_deterministic():
    call = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.3}
    assert program(attention_fn, **call, deterministic=True) == program(dot_product_attention)
    expected = {"dropout_key": call["dropout_rng"], "dropout_rate": 0.3}
    loud = program(attention_fn, **call, broadcast_dropout=False)
    assert loud == program(dot_product_attention, **expected) != program(dot_product_attention)


@pytest.mark.parametrize("batch", [pytest.param((), marks=pytest.mark.slow), (2, 3)])
def test_any_number_of_batch_axes_with_bias(batch):
    query, key = normal(0, *batch, T, N, H), normal(1, *batch, S, N, H)
    call = {"bias": normal(2, *batch, N, T, S), "mask": open_rows(booleans(3, *batch, 1, T, S))}
    run = lambda attend: jax.jit(lambda q, k, call: attend(q, k, k, **call))(query, key, call)
    assert_close(run(attention_fn), run(nn.dot_product_attention), "float32")


def test_a_query_without_a_key_differs_from_flax():
    mask = jnp.ones((B, 1, T, S)).at[:, :, 2].set(0)
    mean = jnp.broadcast_to(KEY.mean(1), (B, N, H))
    run = lambda attend: jax.jit(lambda mask: attend(QUERY, KEY, KEY, mask=mask))(mask)[:, 2]
    assert_close(run(nn.dot_product_attention), mean, "float32")
    assert not run(attention_fn).any()


def test_an_additive_mask_under_jit_removes_every_key_and_is_not_inverted():
    additive = jnp.where(booleans(0, T, S), 0.0, -jnp.inf)
    assert not jax.jit(lambda mask: attention_fn(QUERY, KEY, KEY, mask=mask))(additive).any()


@pytest.mark.parametrize(
    ("dtype", "force"),
    [
        (None, True),
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, marks=pytest.mark.slow),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_dtypes_are_flax_s(dtype, force):
    arrays = [x if dtype else x.astype("bfloat16") for x in (QUERY, KEY, KEY)]
    call = {"dtype": dtype, "force_fp32_for_softmax": force}
    run = lambda attend: jax.jit(functools.partial(attend, **call))(*arrays)
    with relaxed():
        expected = run(nn.dot_product_attention)
    result = run(attention_fn)
    assert result.dtype == expected.dtype == ("float32" if force else "bfloat16")
    assert_close(result, expected, "bfloat16")


def test_mixed_inputs_meet_in_the_wider_dtype():
    run = lambda *arrays, **call: jax.eval_shape(functools.partial(attention_fn, **call), *arrays)
    assert run(QUERY.astype("bfloat16"), KEY, KEY).dtype == "float32"
    promote = lambda arrays, dtype: tuple(x.astype("float16") for x in arrays)
    assert run(QUERY, KEY, KEY, promote_dtype=promote).dtype == "float16"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_precision_reaches_both_products(function):
    run = functools.partial(FUNCTIONS[function], precision="highest")
    text = jax.jit(run).lower(QUERY, KEY, KEY).as_text()
    assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]") >= 2


# --- flax.nnx -----------------------------------------------------------------------------------


def nnx_pair(function, **fields):
    fields = {"decode": False, "bias_init": nnx.initializers.normal(), **fields}
    build = lambda **more: nnx.MultiHeadAttention(
        N, D, N * H, **fields, **more, rngs=nnx.Rngs(params=0, dropout=1)
    )
    return build(attention_fn=function), build()


def nnx_run(layer, x, **call):
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    run = lambda params, x: nnx.merge(graph, params, rest)(x, **call)
    output, gradients = with_gradients(run, params, x)
    return output, [nnx.to_pure_dict(gradients[0]), gradients[1]]


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_nnx_module_has_flax_s_numbers(function):
    x, mask = normal(0, B, T, D), open_rows(booleans(1, B, N, T, T))
    ours, flax_s = (nnx_run(layer, x, mask=mask) for layer in nnx_pair(FUNCTIONS[function]))
    assert_close(ours[0], flax_s[0], "float32")
    assert_trees_close(ours[1][0], flax_s[1][0], "float32")
    assert_close(ours[1][1], flax_s[1][1], "float32")


@pytest.mark.slow
def test_nnx_module_has_flax_s_output():
    x, mask = normal(0, B, T, D), open_rows(booleans(1, B, N, T, T))
    ours, flax_s = nnx_pair(BLOCKWISE)
    run = lambda layer: nnx.jit(lambda layer, x: layer(x, mask=mask))(layer, x)
    assert_close(run(ours), run(flax_s), "float32")


@ONLY_NEW
@pytest.mark.slow
def test_nnx_grouped_heads_and_causal():
    x = normal(0, B, T, D)
    ours, flax_s = nnx_pair(attention_fn, num_kv_heads=1)
    run = lambda layer: nnx.jit(lambda layer, x: layer(x, is_causal=True))(layer, x)
    assert_close(run(ours), run(flax_s), "float32")


@pytest.mark.slow
def test_nnx_decodes_step_by_step():
    ours, flax_s = nnx_pair(attention_fn)
    x = normal(0, B, S, D)
    ours.init_cache(x.shape)
    step = nnx.jit(lambda layer, token: layer(token, decode=True))
    outputs = [step(ours, x[:, s : s + 1]) for s in range(S)]
    mask = nn.make_causal_mask(x[..., 0])
    whole = nnx.jit(lambda layer, x: layer(x, mask=mask))(flax_s, x)
    assert_close(jnp.concatenate(outputs, 1), whole, "float32")


@pytest.mark.slow
def test_nnx_dropout_and_sown_weights():
    ours, flax_s = nnx_pair(attention_fn, dropout_rate=0.3, broadcast_dropout=False)
    x = normal(0, B, T, D)
    loud, quiet = (ours(x, deterministic=flag) for flag in (False, True))
    assert jnp.abs(loud - quiet).max() > 1e-2  # weights were dropped
    weights = [nnx_sown(layer, x) for layer in (ours, flax_s)]
    assert weights[0].shape == (B, N, T, T)
    assert_close(*weights, "float32")


def nnx_sown(layer, x):
    call = lambda layer: layer(x, deterministic=True, sow_weights=True)
    if not hasattr(nnx, "capture"):
        call(layer)
        return layer.attention_weights.value[0]
    _, kept = nnx.capture(nnx.Intermediate)(call)(layer)
    return jax.tree.leaves(kept)[0]


@pytest.mark.slow
def test_nnx_refuses_what_it_cannot_honour():
    x = normal(0, B, T, D)
    layer, _ = nnx_pair(attention_fn, dropout_rate=0.3)
    one = jnp.broadcast_to(x[:1], x.shape)
    loud = layer(one, deterministic=False)  # flax's default: one mask for all examples
    assert_close(loud, jnp.broadcast_to(loud[:1], loud.shape), "float32")
    if "input_positions" in inspect.signature(layer.__call__).parameters:
        with pytest.raises(NotImplementedError, match="`input_positions`"):
            layer(x, deterministic=True, input_positions=np.arange(T))
