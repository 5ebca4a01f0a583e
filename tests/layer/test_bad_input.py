"""Every wrong argument is refused before any computation: rule, evidence, remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import (
    Mask,
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    attention_scores,
    dot_product_attention,
    explain,
    forward,
    init_params,
    multi_head_attention,
)

B, T, S, N, H, D, M = 2, 5, 7, 3, 11, 17, 23
CONFIG = MultiHeadAttentionConfig(N, H)
QUERY, VALUE = jnp.zeros((B, T, D)), jnp.zeros((B, S, M))
PARAMS = init_params(jax.random.key(0), CONFIG, QUERY.shape, VALUE.shape)


def call(query=QUERY, value=VALUE, params=PARAMS, config=CONFIG, **arguments):
    return multi_head_attention(params, query, value, config=config, **arguments)


def test_the_call_without_mistake_works():
    assert call().shape == (B, T, D)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, r"`num_heads` must be a positive integer.*num_heads=0"),
        ({"num_heads": True}, TypeError, r"`num_heads` must be a positive integer.*bool"),
        ({"num_heads": 2.0}, TypeError, r"`num_heads` must be a positive integer.*float"),
        ({"num_heads": 2.5}, TypeError, r"num_heads=2\.5 of type float\.$"),
        ({"key_dim": -1}, ValueError, r"`key_dim` must be a positive integer"),
        ({"value_dim": 0}, ValueError, r"`value_dim` must be a positive integer"),
        ({"num_kv_heads": 2}, ValueError, r"multiple of `num_kv_heads` \(K\).*num_heads=3"),
        ({"dropout": 1.5}, ValueError, r"`dropout` must be a probability in \[0, 1\].*1\.5"),
        ({"dropout": "0.1"}, TypeError, r"`dropout` must be a probability.*str"),
        ({"use_bias": 2}, ValueError, r"`use_bias` must be True or False.*use_bias=2"),
        ({"use_bias": 1.0}, TypeError, r"`use_bias` must be True or False.*float"),
        ({"use_gate": None}, TypeError, r"`use_gate` must be True or False"),
        ({"output_shape": (2, 0)}, ValueError, r"`output_shape` must be a positive integer"),
        ({"output_shape": "ab"}, TypeError, r"`output_shape` must be an int or a tuple"),
        ({"attention_axes": 1.0}, TypeError, r"`attention_axes` must be an int or a non-empty"),
        ({"attention_axes": (1, 1)}, ValueError, r"different ints.*\(1, 1\)"),
        ({"attention_axes": ()}, ValueError, r"non-empty sequence"),
        ({"sliding_window": 0}, ValueError, r"`sliding_window` must be a positive integer"),
        ({"seed": "a"}, TypeError, r"`seed` must be an integer"),
        ({"dtype": "int32"}, TypeError, r"`dtype` must be a floating-point dtype.*int32"),
        ({"param_dtype": "flot32"}, TypeError, r"`param_dtype` must be a floating-point dtype"),
        ({"precision": "best"}, ValueError, r"`precision` must be None or among .*highest"),
        ({"implementation": "flash"}, ValueError, r"`implementation` must be one of \['reference"),
        ({"kernel_initializer": "glorot"}, ValueError, r"glorot"),
        ({"kernel_regularizer": "l3"}, ValueError, r"l3"),
        ({"kernel_constraint": 3}, TypeError, r"constraint"),
    ],
)
def test_config(fields, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttentionConfig(**{"num_heads": N, "key_dim": H, **fields})


def test_unknown_field_is_refused_with_the_closest_name():
    with pytest.raises(ValueError, match=r"'num_head'.*Did you mean 'num_heads'"):
        CONFIG.replace(num_head=2)
    with pytest.raises(ValueError, match=r"must be among \['num_heads', 'key_dim'"):
        MultiHeadAttentionConfig.from_dict({"heads": 2})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": [[1.0]]}, TypeError, r"`query` must be a floating-point array.*list"),
        ({"query": None}, TypeError, r"`query` must be a floating-point array.*query=None\.$"),
        ({"value": None}, TypeError, r"value=None\. Self-attention is `value=query`.*`CrossCache`"),
        ({"query": jnp.zeros((B, T, D), int)}, TypeError, r"int32.*Embed token ids first"),
        ({"query": jnp.zeros(D)}, ValueError, r"one rank >= 2.*query \(17,\)"),
        ({"query": jnp.zeros((T, D))}, ValueError, r"one rank >= 2.*query \(5, 17\)"),
        ({"query": jnp.zeros((3, T, D))}, ValueError, r"agree .* batch axis 0.*query \(3, 5, 17\)"),
        ({"query": jnp.zeros((B, T, M))}, ValueError, r"\['query'\]\['kernel'\] must be \[D, N, H\] = \(23, 3, 11\).*\(17, 3, 11\)"),
        ({"key": jnp.zeros((B, T, M))}, ValueError, r"agree in all axes but the last.*key \(2, 5, 23\).*order of arguments is query, value, key"),
        ({"config": {"num_heads": 3}}, TypeError, r"`config` must be a MultiHeadAttentionConfig"),
        ({"config": CONFIG.replace(attention_axes=2)}, ValueError, r"`attention_axes` must be different axes among 0\.\.1"),
        ({"config": CONFIG.replace(attention_axes=(1, -2))}, ValueError, r"different axes"),
        ({"config": CONFIG.replace(dtype="float64")}, ValueError, r"jax_enable_x64"),
        ({"query": QUERY.astype("complex64")}, TypeError, r"`query` must .*complex64.*query\.imag"),
        ({"return_attention_scores": None}, TypeError, r"`return_attention_scores` must be"),
        ({"dropout_key": 0}, TypeError, r"`dropout_key` must be one JAX PRNG key.*jax\.random\.key"),
        ({"dropout_key": jax.random.split(jax.random.key(0))}, ValueError, r"vmap"),
        ({"dropout_key": jnp.zeros(2)}, TypeError, r"dropout_key of dtype float32"),
    ],
)  # fmt: skip
def test_call(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attention_mask": jnp.ones((B, T, S))}, TypeError, r"`attention_mask` must be boolean.*float32.*`bias=`"),
        ({"value_mask": jnp.ones((B, S))}, TypeError, r"`value_mask` must be boolean.*`bias=`"),
        ({"attention_mask": jnp.full((B, T, S), -10000)}, ValueError, r"-10000.*`bias=`"),
        ({"attention_mask": "causal"}, TypeError, r"`attention_mask` must be boolean.*str"),
        ({"attention_mask": jnp.ones((B, S), bool)}, ValueError, r"\(2, 7\).*padding mask is passed as `value_mask=`"),
        ({"attention_mask": jnp.ones((B, S, T), bool)}, ValueError, r"\[B, N, T, S\].*shape \(2, 7, 5\).*Did you swap T and S"),
        ({"attention_mask": jnp.ones((S,), bool)}, ValueError, r"must have one of the shapes \[\(5, 7\), \(2, 5, 7\), \(2, 3, 5, 7\)\]"),
        ({"attention_mask": jnp.ones((1, B, N, T, S), bool)}, ValueError, r"must have one of the shapes"),
        ({"attention_mask": jnp.ones((N, T, S), bool)}, ValueError, r"must broadcast to \[B, N, T, S\] = \(2, 3, 5, 7\).*shape \(3, 5, 7\)"),
        ({"query_mask": jnp.ones((B, S), bool)}, ValueError, r"`query_mask` must have the shape \[\*batch, T\] = \(2, 5\).*\(2, 7\)"),
        ({"value_mask": jnp.ones((B, T), bool)}, ValueError, r"`value_mask` must have the shape \[\*batch, S\] = \(2, 7\)"),
        ({"key_mask": jnp.ones((3, S), bool)}, ValueError, r"`key_mask` must broadcast"),
        ({"value_mask": jnp.ones((B, 1), bool)}, ValueError, r"`value_mask` must have the shape"),
        ({"bias": jnp.ones((B, T, S), int)}, TypeError, r"int32.* Cast it: `bias\.astype\('float32'\)`\.$"),
        ({"bias": jnp.ones((B, T, S), bool)}, TypeError, r"`bias` must .*bool.*Is it a mask"),
        ({"bias": jnp.ones((B, S, T))}, ValueError, r"`bias` must broadcast.*Did you swap"),
        ({"segment_ids": jnp.ones((B, T), int)}, ValueError, r"must be a pair"),
        ({"segment_ids": (jnp.ones((B, T)), jnp.ones((B, S)))}, TypeError, r"`segment_ids` must be an integer array"),
    ],
)  # fmt: skip
def test_masks(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


class Tensor:
    """Stands for a tensor of PyTorch, whose dtype JAX cannot read."""

    def __init__(self, dtype, *shape):
        self.shape, self.dtype = (
            shape,
            type("dtype", (), {"__repr__": lambda _: f"torch.{dtype}"})(),
        )


Tensor.__module__ = "torch"
X, OF_TORCH = Tensor("float32", B, T, D), r"torch\.Tensor\. Pass `{}\.detach\(\)\.cpu\(\)\."


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("query", lambda: call(X, X)),
        ("value", lambda: call(value=Tensor("float32", B, S, M))),
        ("value_mask", lambda: call(value_mask=Tensor("bool", B, S))),
        ("attention_mask", lambda: call(attention_mask=Tensor("bool", T, S))),
        ("bias", lambda: call(bias=Tensor("float32", T, S))),
        ("segment_ids", lambda: call(segment_ids=(Tensor("int64", B, T), Tensor("int64", B, S)))),
        ("dropout_key", lambda: call(dropout_key=Tensor("int64", 2))),
        ("key", lambda: dot_product_attention(Q, Tensor("float32", *K.shape), V)),
        ("mask", lambda: dot_product_attention(Q, K, V, mask=Tensor("bool", T, S))),
        ("query", lambda: MultiHeadAttention(N, H).init(jax.random.key(0), X, X)),
        (
            r"params\['query'\]\['bias'\]",
            lambda: call(params=with_query_bias(Tensor("half", N, H))),
        ),
    ],
)
def test_tensors_of_torch(name, run):
    with pytest.raises(TypeError, match=OF_TORCH.format(name)):
        run()


def with_query_bias(bias):
    return {**PARAMS, "query": {**PARAMS["query"], "bias": bias}}


def test_tensors_of_other_kinds():
    with pytest.raises(TypeError, match=r"query\.detach\(\)\.cpu\(\)\.float\(\)\.numpy\(\)"):
        call(Tensor("bfloat16", B, T, D))  # NumPy has no such type
    other = type("Array", (Tensor,), {"__module__": "mlx.core"})
    with pytest.raises(TypeError, match=r"type mlx\.Array\. Pass `numpy\.asarray\(query\)`"):
        call(other("float32", B, T, D))


@pytest.mark.parametrize(
    ("dtype", "remedy"), [("complex64", "Weights are real"), ("int32", "Cast it"), ("bool", "")]
)
def test_parameters_that_are_no_floats(dtype, remedy):
    params = with_query_bias(jnp.zeros((N, H), dtype))
    message = rf"params\['query'\]\['bias'\] must be floating-point.*dtype {dtype}.*{remedy}"
    with pytest.raises(TypeError, match=message):
        call(params=params)
    with pytest.raises(TypeError, match=message):
        attention_scores(params, QUERY, VALUE, config=CONFIG, query_rows=jnp.array([0]))


def test_a_mask_that_could_be_two_things_is_refused():
    x = jnp.zeros((T, T, D))  # B == T
    params = init_params(jax.random.key(0), CONFIG, x.shape)
    square = jnp.tril(jnp.ones((T, T), bool))
    with pytest.raises(
        ValueError, match=r"ambiguous where B == T.*attention_mask\[None\].*value_mask"
    ):
        multi_head_attention(params, x, x, config=CONFIG, attention_mask=square)
    given = multi_head_attention(params, x, x, config=CONFIG, attention_mask=square[None])
    assert given.shape == x.shape


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([1], r"`params` must be a mapping"),
        ({"params": PARAMS}, r"must hold \['attention_output', 'key', 'query', 'value'\].*\['params'\]"),
        ({**PARAMS, "gate": PARAMS["query"]}, r"`use_gate`"),
        ({**PARAMS, "query": {"kernel": PARAMS["query"]["kernel"]}}, r"params\['query'\].*\['bias', 'kernel'\]"),
        ({**PARAMS, "query": {**PARAMS["query"], "bias": jnp.zeros((N, 5))}}, r"\['query'\]\['bias'\] must be \[N, H\] = \(3, 11\).*shape \(3, 5\)\.(\n|$)"),
        ({**PARAMS, "attention_output": {**PARAMS["attention_output"], "kernel": jnp.zeros((2, H, D))}}, r"\[N, V, E\] = \(3, 11, 17\).*shape \(2, 11, 17\)\.(\n|$)"),
        ({**PARAMS, "key": {**PARAMS["key"], "kernel": jnp.zeros((N, H, M))}}, r"\['key'\]\['kernel'\] must be \[C, K, H\] = \(23, 3, 11\).*\(3, 11, 23\).*transposed"),
    ],
)  # fmt: skip
def test_params(params, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(params=params)


def test_init_params():
    with pytest.raises(TypeError, match=r"`init_key` must be one JAX PRNG key"):
        init_params(0, CONFIG, QUERY.shape)
    with pytest.raises(ValueError, match=r"param_dtype='float64'.*jax_enable_x64"):
        init_params(jax.random.key(0), CONFIG.replace(param_dtype="float64"), QUERY.shape)
    factory = CONFIG.replace(kernel_initializer=jax.nn.initializers.glorot_uniform)
    with pytest.raises(
        TypeError, match=r"must return an array of shape \(17, 3, 11\).*function.*factories"
    ):
        init_params(jax.random.key(0), factory, QUERY.shape)


DROPOUT = {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}
Q, K, V = jnp.zeros((B, T, 6, H)), jnp.zeros((B, S, 2, H)), jnp.zeros((B, S, 2, 13))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": jnp.zeros((T, H))}, ValueError, r"`query` must have the axes \[\.\.\., T, N, H\]"),
        ({"query": Q[:1]}, ValueError, r"batch axes must be equal.*query \(1, 5, 6, 11\)"),
        ({"query": Q[..., :5]}, ValueError, r"H of query and key must be equal"),
        ({"query": Q[:, :, :5]}, ValueError, r"N = 5 query heads must be a multiple of K = 2"),
        ({"key": K[:, :3]}, ValueError, r"S, K of key and value must be equal"),
        ({"key": K.astype("bfloat16")}, TypeError, r"one dtype.*bfloat16"),
        ({"mask": jnp.ones((B, S), bool)}, ValueError, r"`mask` must broadcast to \[\.\.\., N, T, S\]"),
        ({"mask": jnp.ones((S, T), bool)}, ValueError, r"Did you swap T and S"),
        ({"mask": Q}, TypeError, r"`mask` must be boolean.*`bias=`"),
        ({"mask": Mask.padding(key=jnp.ones((B, T), bool))}, ValueError, r"`mask\.key_padding` must be \[B, S\]"),
        ({"mask": Mask.dense(jnp.ones((S, T), bool))}, ValueError, r"Did you swap T and S"),
        ({"bias": jnp.ones((S, T))}, ValueError, r"`bias` must broadcast"),
        ({"dropout_rate": 2}, ValueError, r"`dropout_rate` must be a probability"),
        ({"block_sizes": 128}, TypeError, r"`block_sizes` must be a pair"),
        ({"block_sizes": (0, 4)}, ValueError, r"`block_sizes` must be a positive integer"),
        ({"local_window_size": -1}, ValueError, r"`left` must be a non-negative integer"),
        ({"is_causal": None}, TypeError, r"`is_causal` must be True or False"),
        ({"is_causal": 2}, ValueError, r"`is_causal` must be True or False"),
        ({"return_weights": jnp.ones((), bool)}, TypeError, r"`return_weights` must be True or False"),
        ({"implementation": "flash"}, ValueError, r"`implementation` must be one of \['reference'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [dot_product_attention, explain])
def test_dot_product_attention(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**{"query": Q, "key": K, "value": V, **arguments})


def test_forward_names_its_masks():
    with pytest.raises(TypeError, match=r"given as query_mask, .*Received: the argument mask"):
        forward(PARAMS, QUERY, VALUE, config=CONFIG, mask=None)


def test_masks_that_cannot_be_combined():
    with pytest.raises(ValueError, match=r"only with the same `query_offset`"):
        Mask.causal(jnp.array(1)) & Mask.causal(jnp.array(2))
    with pytest.raises(TypeError, match=r"`query_ids` must be an integer array"):
        Mask.segments(jnp.ones((B, T)), jnp.ones((B, S)))
    with pytest.raises(ValueError, match=r"\[B, length\]"):
        Mask.padding(key=jnp.ones((B, 1, S), bool))
    with pytest.raises(ValueError, match=r"must broadcast to \[B, N, T, S\]"):
        Mask.dense(jnp.ones((1, B, N, T, S), bool))


def test_linen():
    layer = MultiHeadAttention(N, H, dropout=0.5)
    variables = layer.init(jax.random.key(0), QUERY, VALUE)
    with pytest.raises(ValueError, match=r"needs a PRNG key.*rngs=\{'dropout'"):
        layer.apply(variables, QUERY, VALUE, training=True)
    with pytest.raises(TypeError, match=r"`training` must be True or False"):
        layer.apply(variables, QUERY, VALUE, training=None)
    with pytest.raises(TypeError, match=r"`query` must be a floating-point array"):
        layer.apply(variables, np.zeros((B, T), int), VALUE)
    with pytest.raises(ValueError, match=r"`num_heads` must be a positive integer"):
        MultiHeadAttention(0, H).init(jax.random.key(0), QUERY, VALUE)
