"""Parameters leave and come back bit for bit: orbax, flax.serialization, safetensors."""

import jax
import numpy as np
import pytest
from flax import nnx, serialization, traverse_util
from helpers import B, C, D, E, H, M, N, S, T, V, normal, random_params

from flax_mha import MultiHeadAttention, MultiHeadAttentionConfig, param_shapes
from flax_mha import nnx as mha_nnx

CONFIG = MultiHeadAttentionConfig(N, H, V, use_gate=True, output_shape=(E, 2))
SHAPES = (B, T, D), (B, S, M), (B, S, C)
INPUTS = [normal(seed, *shape) for seed, shape in enumerate(SHAPES)]
SPECIAL = [np.nan, -np.inf, -0.0, 1e-45, 1e-40]  # the last two are subnormal or 0
DTYPES = ["float32", "bfloat16", "float16"]


def orbax(tree, like, path):
    """`like` is a tree of shapes and dtypes: `param_shapes` of the layer."""
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint is absent")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "layer", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "layer", like)


def msgpack(tree, like, path):
    (path / "layer.msgpack").write_bytes(serialization.to_bytes(tree))
    return serialization.from_bytes(like, (path / "layer.msgpack").read_bytes())


def safetensors(tree, like, path):
    file = pytest.importorskip("safetensors.flax", reason="safetensors is absent")
    name = str(path / "layer.safetensors")
    file.save_file(traverse_util.flatten_dict(tree, sep="."), name)
    return traverse_util.unflatten_dict(file.load_file(name), sep=".")


FORMATS = pytest.mark.parametrize("saved", [orbax, msgpack, safetensors])


def with_special_numbers(params):
    """In every leaf, numbers that a detour over another dtype, or a comparison, would lose."""

    def planted(leaf):
        special = np.resize(np.array(SPECIAL, "float32"), leaf.shape[-1:]).astype(leaf.dtype)
        return leaf.at[(0,) * (leaf.ndim - 1)].set(special)

    return jax.tree.map(planted, params)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@FORMATS
def test_params_of_every_dtype_come_back_bit_for_bit(saved, tmp_path):
    """Three layers in one tree: a mixed one is what mixed precision saves."""
    like = {dtype: param_shapes(CONFIG.replace(param_dtype=dtype), *SHAPES) for dtype in DTYPES}
    tree = {
        dtype: with_special_numbers(random_params(like[dtype], dtype=dtype)) for dtype in DTYPES
    }
    assert_same_bits(saved(tree, like, tmp_path), tree)


@FORMATS
def test_what_one_module_saves_another_restores(saved, tmp_path):
    """linen's variables to an nnx layer, and back, with equal outputs."""
    linen = MultiHeadAttention.from_config(CONFIG)
    shapes = param_shapes(CONFIG, *SHAPES)
    variables = {"params": random_params(shapes)}
    restored = saved(variables, {"params": shapes}, tmp_path)
    layer = mha_nnx.MultiHeadAttention.from_params(restored["params"], CONFIG)
    assert_same_bits(layer.params, variables["params"])
    expected = linen.apply(variables, *INPUTS)
    np.testing.assert_array_equal(layer(*INPUTS), expected)
    (tmp_path / "back").mkdir()
    again = saved(layer.params, shapes, tmp_path / "back")
    np.testing.assert_array_equal(linen.apply({"params": again}, *INPUTS), expected)


def test_an_nnx_layer_with_its_dropout_stream(tmp_path):
    """The whole state: training goes on with the mask that would have come next."""
    constant = {"class_name": "Constant", "config": {"value": 0.1}}
    config = MultiHeadAttentionConfig(N, H, dropout=0.5, kernel_initializer=constant)

    def make(seed):
        return mha_nnx.MultiHeadAttention.from_config(config, query_features=D, rngs=nnx.Rngs(seed))

    layer, (x, *_) = make(0), INPUTS
    first = layer(x, x, training=True)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(1)))
    restored = nnx.merge(graph, orbax(nnx.state(layer), abstract, tmp_path))
    second = layer(x, x, training=True)
    np.testing.assert_array_equal(restored(x, x, training=True), second)
    assert np.abs(second - first).max() > 0.1
