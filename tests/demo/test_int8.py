"""Int8 beside a run's own numbers: the figures are those of int8 caches and int8 weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import MultiHeadAttentionConfig, quantize_params
from flax_mha.demo import cli, evaluate, int8
from flax_mha.demo.generate import Sampling, Storage
from flax_mha.demo.models.language import Transformer, TransformerSettings
from flax_mha.demo.tasks import TASKS

TEXT = np.frombuffer(b"What is said once is said. " * 4, np.uint8)


@pytest.fixture(scope="module")
def model_and_params():
    """Random and uneven: what is rounded shows."""
    settings = TransformerSettings(layers=1, features=16, context=16)
    model = Transformer(settings, MultiHeadAttentionConfig(num_heads=2, key_dim=8))
    params = model.init(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))["params"]
    return model, jax.tree.map(lambda leaf: 3 * leaf, params)


@pytest.mark.slow
def test_steps_through_a_cache_are_the_whole_window(model_and_params):
    model, params = model_and_params
    whole = evaluate.bits_per_byte(model, params, TEXT, 16)
    assert evaluate.bits_per_byte_by_steps(model, params, TEXT) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_steps_read_what_int8_holds(model_and_params):
    """Near, and not equal: equal would be another cache than the one that was asked for."""
    model, params = model_and_params
    whole = evaluate.bits_per_byte(model, params, TEXT, 16)
    small = evaluate.bits_per_byte_by_steps(model, params, TEXT, "int8")
    assert 1e-6 < abs(small / whole - 1) < 0.02


class Task:
    """What `measure` asks of a task."""

    change_attention = TASKS["language"].change_attention

    def __init__(self, model):
        self.model, self.settings = model, self
        self.attention_paths = [("block_0", "attention")]


@pytest.mark.slow
def test_each_storage_is_measured_as_itself(model_and_params):
    model, params = model_and_params
    draw = (b"ab", 14, Sampling())  # to the context: one compilation
    ways = (Storage(), Storage(cache="int8"), Storage(weights="int8"))
    own, cache, weights = (int8.measure(Task(model), params, x, draw, TEXT) for x in ways)
    # K = 2 heads, 16 slots, H = 8: keys and values in 1 byte and 4 a head; two lengths of 4.
    assert own.cache_bytes == (2 * 2 * 16 * 8 * 4 + 8) == weights.cache_bytes
    assert cache.cache_bytes == (2 * 2 * 16 * (8 + 4) + 8)
    # Four kernels of 16 by 16, and a bias each of 16; a scale for each of 16 outputs.
    assert own.weight_bytes == 4 * (256 + 16) * 4 == cache.weight_bytes
    assert weights.weight_bytes == 4 * (256 + 2 * 16 * 4)
    assert len({x.bits_per_byte for x in (own, cache, weights)}) == 3
    layer = quantize_params(params["block_0"]["attention"])
    small = {**params, "block_0": {**params["block_0"], "attention": layer}}
    expected = evaluate.bits_per_byte(model, small, TEXT, 16)
    assert weights.bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert len(cache.sampled) == 14


@pytest.mark.slow
def test_generate_prints_both(run_of, capsys):
    run = run_of("language")
    assert cli.main(run.train("--no-plots")) == 0
    capsys.readouterr()
    call = [
        "generate",
        str(run.out),
        "--prompt",
        "abcdef",
        "--bytes",
        "20",
        "--temperature",
        "0.05",
    ]
    assert cli.main([*call, "--cache", "int8", "--weights", "int8"]) == 0
    printed = capsys.readouterr().out
    assert "abcdefghabcdefghabcdef" in printed
    assert "float32" in printed
    assert "int8 cache and weights" in printed
    assert "Weights are those of the attention layers" in printed
    row = re.search(r"bits per byte +│ +([\d.]+) │ +([\d.]+) │ +([+-][\d.]+)%", printed)
    before, after, change = map(float, row.groups())
    assert change == pytest.approx(100 * (after / before - 1), abs=0.1)
    assert abs(change) < 2
    assert re.search(r"bytes of the cache +│ +2,056 │ +776 │", printed)
    # float32 is what this run is in: nothing is compared.
    assert cli.main([*call, "--cache", "float32", "--weights", "float32"]) == 0
    assert "bytes per second with the cache" in capsys.readouterr().out


@pytest.mark.slow
def test_float32_of_a_run_that_is_not(run_of, capsys):
    run = run_of("language")
    dtype = "--set=attention.dtype=bfloat16"
    assert cli.main(run.train("--no-plots", "--steps", "2", dtype)) == 0
    assert cli.main(["generate", str(run.out), "--cache", "float32"]) == 2
    assert "--cache float32: the attention of this run is in bfloat16" in capsys.readouterr().err


def test_an_unknown_kind_of_numbers(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "runs", "--cache", "int4"])
    assert "invalid choice: 'int4' (choose from" in capsys.readouterr().err
