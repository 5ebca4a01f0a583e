"""The checkpoint again: bytes stay, arrays that were trained on are written in their places."""

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import PATHS, D, numpy_files

from flax_mha.interop.huggingface import list_attention, load_attention, save_attention

T5 = {
    "model_type": "t5",
    "d_model": D,
    "d_kv": 6,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "relative_attention_num_buckets": 8,
}


def files(folder):
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def doubled(layer):
    return layer._replace(params=jax.tree.map(lambda x: 2 * x, layer.params))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_that_were_not_changed_give_the_same_files(tmp_path, shards, dtype):
    old = checkpoints.write(tmp_path / "old", weights=checkpoints.arrays(dtype), shards=shards)
    (old / "tokenizer.json").write_text("{}")
    (old / "1_Pooling").mkdir()
    (old / "1_Pooling" / "config.json").write_text("{}")
    save_attention(tmp_path / "new", load_attention(old), like=old)
    assert files(tmp_path / "new") == files(old)


@pytest.mark.parametrize("shards", [1, 3])
def test_what_was_trained_on_is_written_and_nothing_else(tmp_path, shards):
    old = checkpoints.write(tmp_path / "old", shards=shards)
    layers = load_attention(old)
    changed = {PATHS[1]: doubled(layers[PATHS[1]])}
    save_attention(tmp_path / "new", changed, like=old)
    again = load_attention(tmp_path / "new")
    for path in PATHS:
        expected = changed.get(path, layers[path]).params
        for ours, theirs in zip(jax.tree.leaves(again[path].params), jax.tree.leaves(expected)):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    before, after = files(old), files(tmp_path / "new")
    different = [name for name, data in before.items() if data != after[name]]
    assert different
    assert all(name.endswith(".safetensors") for name in different)
    assert {x: len(data) for x, data in after.items()} == {x: len(y) for x, y in before.items()}


def test_what_may_be_set_for_a_run(tmp_path):
    old = checkpoints.write(tmp_path / "old")
    layers = load_attention(old)
    set_ = {"dropout": 0.1, "implementation": "blockwise", "dtype": "bfloat16"}
    layers = {name: x._replace(config=x.config.replace(**set_)) for name, x in layers.items()}
    save_attention(tmp_path / "new", layers, like=old)
    assert files(tmp_path / "new") == files(old)


# --- arrays that layers share --------------------------------------------------------------------


def t5(folder):
    linears = {"q.weight": (24, D), "k.weight": (24, D), "v.weight": (24, D), "o.weight": (D, 24)}
    table = {"relative_attention_bias.weight": (8, 4)}
    places = [
        ("encoder.block.0.layer.0.SelfAttention", linears | table),
        ("encoder.block.1.layer.0.SelfAttention", linears),
        ("decoder.block.0.layer.0.SelfAttention", linears | table),
        ("decoder.block.0.layer.1.EncDecAttention", linears),
    ]
    weights = {}
    for seed, (path, shapes) in enumerate(places):
        weights |= checkpoints.arrays(paths=[path], shapes=shapes, seed=seed)
    return checkpoints.write(folder, config=T5, weights=weights), [path for path, _ in places]


def with_table(layer, table):
    return layer._replace(params={**layer.params, "relative_bias": {"embedding": table}})


def test_one_table_for_all_layers_of_a_stack(tmp_path):
    old, names = t5(tmp_path / "old")
    layers = load_attention(old)
    first, second, causal, cross = (layers[name] for name in names)
    table = first.params["relative_bias"]["embedding"]
    assert (table == second.params["relative_bias"]["embedding"]).all()
    assert (table != causal.params["relative_bias"]["embedding"]).any()
    assert cross.config.position is None
    assert cross.call == {}
    assert [x.config.position.bidirectional for x in (first, second, causal)] == [True, True, False]
    assert all(x.config.scale == 1.0 for x in layers.values())
    save_attention(tmp_path / "same", layers, like=old)
    assert files(tmp_path / "same") == files(old)
    both = {name: with_table(layers[name], table + 1) for name in names[:2]}
    save_attention(tmp_path / "new", both, like=old)
    again = load_attention(tmp_path / "new")[names[1]]
    assert (again.params["relative_bias"]["embedding"] == table + 1).all()
    changed = {**layers, names[1]: both[names[1]]}
    with pytest.raises(ValueError, match="one array for 2 layers, which must agree"):
        save_attention(tmp_path / "other", changed, like=old)
    with pytest.raises(ValueError, match=rf"to change it, pass all.*without \['{names[1]}"):
        save_attention(tmp_path / "other", {names[0]: both[names[0]]}, like=old)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["new", "old", "same"]  # no half of one


GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "global_head_dim": 6,
    "num_hidden_layers": 2,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 3,
}


def gemma4(folder, **fields):
    shapes = {f"{x}.weight": shape for x, shape in checkpoints.SHAPES.items()}
    shapes |= {"q_norm.weight": (6,), "k_norm.weight": (6,)}
    weights = checkpoints.arrays(shapes=shapes)
    del weights[f"{PATHS[1]}.v_proj.weight"]
    return checkpoints.write(folder, config={**GEMMA4, **fields}, weights=weights)


def test_keys_that_serve_as_values(tmp_path):
    old = gemma4(tmp_path / "old")
    layers = load_attention(old)
    full = layers[PATHS[1]]
    assert (full.params["key"]["kernel"] == full.params["value"]["kernel"]).all()
    save_attention(tmp_path / "same", layers, like=old)
    assert files(tmp_path / "same") == files(old)
    save_attention(tmp_path / "new", {PATHS[1]: doubled(full)}, like=old)
    again = load_attention(tmp_path / "new")[PATHS[1]].params
    assert (again["value"]["kernel"] == 2 * full.params["value"]["kernel"]).all()
    apart = full._replace(params={**full.params, "value": doubled(full).params["value"]})
    with pytest.raises(ValueError, match=r"k_proj.weight` serves the layer twice"):
        save_attention(tmp_path / "other", {PATHS[1]: apart}, like=old)


def test_layers_that_borrow_keys_are_refused_or_left_out(tmp_path):
    old = gemma4(tmp_path / "old", num_kv_shared_layers=1)
    with pytest.raises(
        ValueError, match=r"`num_kv_shared_layers` is not supported.*leave them out"
    ):
        load_attention(old)
    ignore = ["num_kv_shared_layers"]
    assert list(load_attention(old, ignore=ignore)) == PATHS[:1]
    assert list(list_attention(old, ignore=ignore).left_out) == PATHS[1:]
    save_attention(tmp_path / "new", load_attention(old, ignore=ignore), like=old, ignore=ignore)
    assert files(tmp_path / "new") == files(old)


def test_an_encoder_that_was_saved_alone(tmp_path):
    old, names = t5(tmp_path / "old")
    weights = numpy_files.load_file(old / "model.safetensors")
    encoder = {name: array for name, array in weights.items() if name.startswith("encoder.")}
    folder = checkpoints.write(tmp_path / "encoder", config=T5, weights=encoder)
    assert list(load_attention(folder)) == names[:2]
    left_out = list_attention(folder).left_out
    assert len(left_out) == 2
    assert set(left_out.values()) == {"none of its arrays is in the folder"}
    none = checkpoints.write(tmp_path / "none", config=T5, weights={"a": np.zeros(2)})
    with pytest.raises(ValueError, match="must hold attention layers of t5"):
        load_attention(none)


# --- refusals ------------------------------------------------------------------------------------


def test_no_link_leads_the_copy_elsewhere(tmp_path):
    old = checkpoints.write(tmp_path / "old")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text("x")
    for name, target in (("a", "secret"), ("b", "secret/key.txt")):
        (old / name).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=f"'{name}' must lie in the folder.*secret"):
            save_attention(tmp_path / "new", {}, like=old)
        (old / name).unlink()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["old", "secret"]


@pytest.fixture
def old(tmp_path):
    return checkpoints.write(tmp_path / "old")


def test_like_itself_is_not_written_to(old):
    before = files(old)
    with pytest.raises(ValueError, match="another folder than `like`"):
        save_attention(old, load_attention(old), like=old)
    assert files(old) == before


def test_a_folder_that_holds_something(old, tmp_path):
    (tmp_path / "new").mkdir()
    save_attention(tmp_path / "new", {}, like=old)
    with pytest.raises(ValueError, match="must not exist, or be an empty folder"):
        save_attention(tmp_path / "new", {}, like=old)


def test_layers_that_do_not_fit(old, tmp_path):
    layer = load_attention(old)[PATHS[0]]
    cases = [
        ({"model.layers.7.self_attn": layer}, ValueError, "must be among .*layers.7"),
        (
            {PATHS[0]: layer._replace(config=layer.config.replace(position=None))},
            ValueError,
            "must be that of `like`.*position=None",
        ),
        (
            {
                PATHS[0]: layer._replace(
                    params=jax.tree.map(lambda x: x.astype("bfloat16"), layer.params)
                )
            },
            TypeError,
            "must have the dtype of `like`, F32.*bfloat16.*Cast",
        ),
        (
            {
                PATHS[0]: layer._replace(
                    params={**layer.params, "sinks": {"logits": np.ones(4, "float32")}}
                )
            },
            ValueError,
            "sinks",
        ),
    ]
    for layers, error, pattern in cases:
        with pytest.raises(error, match=pattern):
            save_attention(tmp_path / "new", layers, like=old)
        assert [x.name for x in tmp_path.iterdir()] == ["old"]
