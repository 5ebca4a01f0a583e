"""Folders that are damaged or hostile, fields from the future: named, and nothing large made."""

import json
import pathlib
import re
import tracemalloc

import checkpoints
import numpy as np
import pytest
from checkpoints import CONFIG, PATHS

from flax_mha.interop.huggingface import list_attention, load_attention

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path):
    return checkpoints.write(tmp_path / "model")


@pytest.fixture
def shards(tmp_path):
    return checkpoints.write(tmp_path / "model", shards=3)


def refused(folder, pattern, error=ValueError, **arguments):
    """Both refuse; the list, too, where no array has to be read for it."""
    with pytest.raises(error, match=pattern):
        load_attention(folder, **arguments)


def index(folder, **changes):
    place = checkpoints.read_index(folder)
    checkpoints.write_index(folder, {**place, **changes})


# --- files ---------------------------------------------------------------------------------------


def test_no_folder(tmp_path):
    refused(tmp_path / "none", r"must be the folder of a checkpoint.*Nothing is downloaded")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", r"must be the folder of a checkpoint")
    refused(tmp_path, r"must hold a config.json.*above, or below")


def test_a_file_that_is_cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    refused(folder, r"'model.safetensors' must be a whole .safetensors file.*cut short")


def test_a_missing_shard(shards):
    (shards / SHARD).unlink()
    refused(shards, rf"must hold '{SHARD}'.*cut short")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/hosts", "..", "a/b.safetensors", "", "c:x"]
)
def test_an_index_that_points_outside(shards, name):
    index(shards, **{f"{PATHS[0]}.q_proj.weight": name})
    refused(shards, r"(must stand in the checkpoint's folder|must have a plain name)")


def test_an_index_with_another_path_separator(shards):
    index(shards, **{f"{PATHS[0]}.q_proj.weight": "a\\b.safetensors"})
    refused(shards, "must have a plain name")


def test_a_link_out_of_the_folder(shards, tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((shards / SHARD).read_bytes())
    (shards / SHARD).unlink()
    (shards / SHARD).symlink_to(outside)
    refused(shards, r"must lie in the folder.*a link to")


def test_the_hub_cache_is_made_of_links(tmp_path):
    """`snapshots/REVISION/name` leads to `blobs/HASH` beside it."""
    made = checkpoints.write(tmp_path / "made")
    cache = tmp_path / "models--x--y"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(made.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(pathlib.Path("../../blobs") / str(number))
    assert list(load_attention(snapshot)) == PATHS


def test_an_index_that_names_an_array_where_it_is_not(shards):
    place = checkpoints.read_index(shards)
    name = next(name for name, file in place.items() if file != SHARD)
    index(shards, **{name: SHARD})
    refused(shards, rf"{re.escape(name)}.*{SHARD}' does not hold")


def test_an_array_in_two_files(shards):
    place = checkpoints.read_index(shards)
    name = next(name for name, file in place.items() if file != SHARD)
    from safetensors.numpy import load_file, save_file

    save_file({**load_file(shards / SHARD), name: np.zeros(2, "float32")}, shards / SHARD)
    refused(shards, rf"Each array must stand in one file.*{re.escape(name)}")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(shards, content):
    (shards / "model.safetensors.index.json").write_text(content)
    refused(shards, r"model.safetensors.index.json must")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("pytorch_model.bin", r"a pickle.*run the code in it.*save_pretrained"),
        ("adapter_model.safetensors", "adapter alone"),
        ("model-q4.gguf", "gguf.*quantised"),
        ("notes.txt", "cut short"),
    ],
)
def test_weights_of_other_kinds(folder, name, pattern):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, rf"must hold model.safetensors.*{name}.*{pattern}")


def test_an_adapter_without_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, r"adapter alone: `load_adapter\(folder, like=\)` reads it")


# --- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("[1, 2]", "config.json must hold an object.*list"),
        ('{"hidden_size": NaN}', "config.json must be JSON.*NaN"),
        ('{"hidden_size": 1e', "config.json must be JSON.*cut short"),
        ("[" * 100_000, "config.json must be JSON"),
        ('{"a": ' + "1" * 10_000 + "}", "config.json must be JSON"),
        ("\xff", "config.json must be JSON"),
    ],
)
def test_no_json(folder, content, pattern):
    (folder / "config.json").write_text(content, encoding="latin-1")
    refused(folder, pattern)


def test_a_config_of_gigabytes_is_not_read(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**33)  # a hole: it takes no room on the disk
    tracemalloc.start()
    refused(folder, r"config.json must have at most \d+ bytes")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"model_type": "lama"}, "`model_type` must be among .*'lama'.*mean 'llama'.*from_linear"),
        ({"model_type": None}, "`model_type` must be among"),
        ({"model_type": ["llama"]}, "`model_type` must be among"),
        ({"model_type": "deberta-v2"}, "bias that depends on query and key"),
        ({"attention_of_2031": 0.5}, r"not known for llama.*`attention_of_2031`: 0.5.*`ignore=\["),
        ({"attention_of_2031": False}, "`attention_of_2031`"),
        ({"hidden_size": 10**12 * 10**6}, "`hidden_size` must be a positive integer"),
        ({"hidden_size": 19}, "D = 19.*D = 20"),
        ({"num_attention_heads": True}, "`num_attention_heads` must be a positive integer"),
        ({"num_attention_heads": -4}, "`num_attention_heads` must be a positive integer"),
        ({"num_attention_heads": 8}, r"q_proj.weight` must be \[N H, D\] = \(48"),
        ({"num_key_value_heads": 4}, r"k_proj.weight` must be \[K H, C\] = \(24"),
        ({"num_key_value_heads": 3}, "multiple of `num_kv_heads`"),
        ({"head_dim": 12}, r"q_proj.weight` must be \[N H, D\] = \(48"),
        ({"num_hidden_layers": 3}, r"must hold the arrays of `model.layers.2.self_attn`.*too many"),
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` must be at most"),
        ({"attention_bias": True}, "missing .*q_proj.bias"),
        ({"attention_bias": "yes"}, "`attention_bias` must be true or false"),
        ({"rope_theta": "big"}, "`rope_theta` must be a number"),
        ({"rope_theta": -1.0}, "base"),
        ({"rope_scaling": [1]}, "`rope_scaling` must be an object"),
        ({"rope_scaling": {"type": "new"}}, "`rope_scaling.rope_type` is not supported.*'new'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "ramp": 3}},
            "`rope_scaling.ramp` is not supported.*'linear'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "`rope_scaling.factor` must be a number"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "depend on the longest text.*max_length=None.*Pass",
        ),
        ({"quantization_config": {"bits": 4}}, "Weights must be floats.*quantization_config"),
    ],
)
def test_fields(folder, fields, pattern):
    checkpoints.write(folder, **fields)
    refused(folder, pattern)


def test_fields_that_are_ignored_by_name(folder):
    checkpoints.write(folder, attention_of_2031=0.5)
    assert list(load_attention(folder, ignore=["attention_of_2031"])) == PATHS
    assert len(list_attention(folder, ignore=["attention_of_2031"])) == 2
    with pytest.raises(TypeError, match="`ignore` must be a list of names"):
        load_attention(folder, ignore="attention_of_2031")


def test_a_length_that_is_none(folder):
    for length in (0, 2.5):
        refused(folder, "max_length", (ValueError, TypeError), max_length=length)


# --- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "array", "error", "pattern"),
    [
        ("q_norm.weight", np.ones(6, "float32"), ValueError, r"unknown .*q_norm.weight"),
        ("q_proj.lora_A.weight", np.ones((2, 20), "float32"), ValueError, "unknown .*lora_A"),
        ("q_proj.weight", np.ones((20, 24), "float32"), ValueError, "transposed"),
        ("q_proj.weight", np.ones((24, 20), "int32"), TypeError, "q_proj.weight"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, name, array, error, pattern):
    weights = {**checkpoints.arrays(), f"{PATHS[0]}.{name}": array}
    refused(checkpoints.write(tmp_path, weights=weights), pattern, error)


def test_an_array_that_is_missing(tmp_path):
    weights = checkpoints.arrays()
    del weights[f"{PATHS[1]}.o_proj.weight"]
    refused(
        checkpoints.write(tmp_path, weights=weights), rf"{PATHS[1]}.*missing \['o_proj.weight'\]"
    )


def test_weights_of_eight_bits(folder):
    """Written by hand: NumPy has no such dtype."""
    names = [f"{path}.{x}.weight" for path in PATHS for x in checkpoints.SHAPES]
    header, offset = {}, 0
    for name in names:
        shape = checkpoints.SHAPES[name.split(".")[-2]]
        size = int(np.prod(shape))
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(offset)
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, "F8_E4M3", TypeError)


def test_two_models_in_one_folder(tmp_path):
    more = checkpoints.arrays(paths=["teacher.layers.0.self_attn"])
    folder = checkpoints.write(tmp_path, weights={**checkpoints.arrays(), **more})
    refused(folder, r"One model's layers.*\['model.', 'teacher.'\]")


def test_a_config_that_is_a_link_out_of_the_folder(folder, tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps(CONFIG))
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    refused(folder, "must lie in the folder")
