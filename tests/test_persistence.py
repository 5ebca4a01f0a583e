"""Parameters and caches leave and come back bit for bit: orbax, flax.serialization and others."""

import copy
import pickle

import jax
import numpy as np
import pytest
from flax import nnx, serialization, traverse_util
from helpers import B, C, D, E, H, M, N, S, T, V, normal, random_params
from jax import export

from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    init_cache,
    init_cross_cache,
    multi_head_attention,
    param_shapes,
)
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


@pytest.mark.slow
@FORMATS
def test_params_of_every_dtype_come_back_bit_for_bit(saved, tmp_path):
    """Three layers in one tree: a mixed one is what mixed precision saves."""
    like = {dtype: param_shapes(CONFIG.replace(param_dtype=dtype), *SHAPES) for dtype in DTYPES}
    tree = {
        dtype: with_special_numbers(random_params(like[dtype], dtype=dtype)) for dtype in DTYPES
    }
    assert_same_bits(saved(tree, like, tmp_path), tree)


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- caches -------------------------------------------------------------------------------------

CACHED = CONFIG.replace(
    key_dim=6, num_kv_heads=1, output_shape=None, position="rotary", sliding_window=4
)
CACHE_INPUT = normal(3, B, T, D)
CACHE_PARAMS = random_params(param_shapes(CACHED, CACHE_INPUT.shape))


def fresh_caches():
    """A ring, a line and an encoder's; the second is not causal, the third has no mask."""
    line = CACHED.replace(sliding_window=None)
    return {
        "ring": init_cache(CACHED, B, 11, slack=1),
        "line": init_cache(line, B, 11, "bfloat16", is_causal=False),
        "cross": init_cross_cache(CACHE_PARAMS, CACHE_INPUT, config=CACHED, max_queries=50),
    }


def read_all(caches):
    """Each cache after one more call, and what came out."""
    outputs = {}
    for name, cache in caches.items():
        value = None if name == "cross" else CACHE_INPUT
        config = CACHED.replace(dtype=cache.key.dtype, sliding_window=None if name == "line" else 4)
        outputs[name] = multi_head_attention(
            CACHE_PARAMS, CACHE_INPUT, value, config=config, cache=cache
        )
    return {name: output[1] for name, output in outputs.items()}, outputs


@pytest.mark.slow
@pytest.mark.parametrize("saved", [orbax, msgpack, "pickle", "copy"])
def test_caches_come_back_and_go_on(saved, tmp_path):
    """Inside a tree, as among the variables of a module, into a target of shapes alone."""
    if saved == "pickle":
        saved = lambda tree, like, path: pickle.loads(pickle.dumps(tree))
    elif saved == "copy":
        saved = lambda tree, like, path: copy.deepcopy(tree)
    caches, _ = read_all(fresh_caches())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), caches)
    restored = saved({"cache": caches}, {"cache": like}, tmp_path)["cache"]
    assert_same_bits(restored, caches)
    for ours, theirs in zip(
        jax.tree.leaves(read_all(restored)), jax.tree.leaves(read_all(caches)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_state_that_is_another_cache_s():
    caches, state = fresh_caches(), serialization.to_state_dict(fresh_caches())
    assert sorted(state["ring"]) == ["key", "length", "start", "value"]
    assert sorted(state["cross"]) == ["key", "length", "value"]
    older = {**state["cross"], "mask": None}
    assert serialization.from_state_dict(caches["cross"], older).mask is None
    with pytest.raises(ValueError, match=r"`key` must have the shape.*4, 6\).*11, 6\)"):
        serialization.from_state_dict(init_cache(CACHED, B, 11), state["line"])
    with pytest.raises(
        ValueError, match=r"KVCache has the entries.*'start'.*\['key', 'length', 'value'\]"
    ):
        serialization.from_state_dict(caches["line"], state["cross"])


@pytest.mark.parametrize("name", ["ring", "line", "cross"])
def test_a_decoding_step_is_exported(name):
    """`jax.export` writes the kinds of the caches down, with what is static about them."""
    pytest.importorskip("flatbuffers", reason="flatbuffers is absent: jax.export needs it")
    cache = {name: fresh_caches()[name]}
    exported = export.export(jax.jit(read_all))(cache)
    loaded = export.deserialize(bytearray(exported.serialize()))
    assert loaded.in_tree == exported.in_tree
    assert loaded.out_tree == exported.out_tree
    for ours, theirs in zip(jax.tree.leaves(loaded.call(cache)), jax.tree.leaves(read_all(cache))):
        np.testing.assert_allclose(
            np.asarray(ours, "float32"), np.asarray(theirs, "float32"), rtol=1e-5, atol=1e-5
        )
