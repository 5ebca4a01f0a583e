"""Bits per byte: of compressors by hand, of a model byte by byte."""

import bz2
import lzma
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_mha import MultiHeadAttentionConfig
from flax_mha.demo import evaluate, generate
from flax_mha.demo.compressors import compressed_bits_per_byte
from flax_mha.demo.models.language import Transformer, TransformerSettings

CONTEXT = 6


def small_model(tied_head=True, **attention):
    model = TransformerSettings(layers=1, features=8, context=CONTEXT, tied_head=tied_head)
    return Transformer(model, MultiHeadAttentionConfig(num_heads=2, key_dim=4, **attention))


@pytest.fixture(scope="module")
def trained():
    """A small model with random parameters, large enough for uneven predictions."""
    model = small_model()
    params = model.init(jax.random.key(0), jnp.zeros((1, CONTEXT), jnp.int32))["params"]
    return model, jax.tree.map(lambda leaf: 3 * leaf, params)


def test_compressors_by_hand():
    text = b"def f(x):\n    return x\n" * 40
    packed = {"lzma": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    packed |= {"bz2": bz2.compress(text, 9), "zlib": zlib.compress(text, 9)}
    expected = {name: len(data) * 8 / 920 for name, data in packed.items()}
    assert compressed_bits_per_byte(text) == pytest.approx(expected)
    assert lzma.decompress(packed["lzma"]) == text


@pytest.mark.parametrize("length", [2, 6, 7, 8, 19, 230])
def test_every_byte_but_the_first_is_counted_once(length):
    text = np.arange(length, dtype=np.uint8)
    counts = np.zeros(length, int)
    for windows in evaluate.split_windows(text, CONTEXT):
        np.add.at(counts, windows.targets_BT[windows.counted_BT], 1)
        inside = windows.counted_BT
        np.testing.assert_array_equal(windows.targets_BT[inside], windows.tokens_BT[inside] + 1)
    np.testing.assert_array_equal(counts, [0] + [1] * (length - 1))


@pytest.mark.slow
def test_bits_per_byte_of_a_uniform_model_is_eight(trained):
    model, params = trained
    silent = jax.tree.map(jnp.zeros_like, params)
    text = np.frombuffer(b"any text whatever", np.uint8)
    assert evaluate.bits_per_byte(model, silent, text, CONTEXT) == pytest.approx(8)


@pytest.mark.slow
def test_bits_per_byte_byte_by_byte(trained):
    model, params = trained
    text = np.frombuffer(b"while x: x = f(x)", np.uint8)
    bits = 8.0
    for i in range(1, len(text)):
        # Windows start at multiples of 3; the last that counts byte i holds 3 to 6 bytes before it.
        start = 0 if i <= CONTEXT else 3 * ((i - 1) // 3 - 1)
        tokens = jnp.asarray(text[start:i], jnp.int32)[None]
        logits = np.asarray(model.apply({"params": params}, tokens)[0, -1], np.float64)
        shifted = logits - logits.max()
        bits -= (shifted[text[i]] - math.log(np.exp(shifted).sum())) / math.log(2)
    expected = bits / len(text)
    assert abs(expected - 8) > 0.01
    assert evaluate.bits_per_byte(model, params, text, CONTEXT) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_model_does_not_see_the_future(trained):
    model, params = trained
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6]], jnp.int32)
    changed = tokens.at[0, 4].set(99)
    before, after = (model.apply({"params": params}, x) for x in (tokens, changed))
    np.testing.assert_array_equal(before[0, :4], after[0, :4])
    assert (before[0, 4] != after[0, 4]).any()


def greedy(model, params, text, count, window):
    """A plain loop: the likeliest byte after what `window` shows of the text."""
    for _ in range(count):
        tokens = jnp.asarray(window(text), jnp.int32)[None]
        text = [*text, int(model.apply({"params": params}, tokens)[0, -1].argmax())]
    return bytes(text[-count:])


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [b"", b"abcdef", b"abcdefghij"])
def test_without_a_cache_the_window_slides(trained, prompt):
    """At a temperature near 0 sampling is argmax, which a plain loop can follow."""
    model, params = trained
    how = generate.Sampling(temperature=1e-6)
    sampled = generate.generate_without_cache(model, params, prompt, 9, how)
    text = list(prompt or b"\n")
    assert sampled == greedy(model, params, text, 9, lambda text: text[-CONTEXT:])


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [b"", b"abcdef", b"abcdefghij"])
def test_with_a_cache_the_last_half_is_read_again(trained, prompt):
    model, params = trained
    how = generate.Sampling(temperature=1e-6)
    sampled = generate.generate(model, params, prompt, 15, how)
    start = [0]

    def window(text):
        if len(text) - start[0] >= CONTEXT:
            start[0] = len(text) - CONTEXT // 2
        return text[start[0] :]

    assert sampled == greedy(model, params, list(prompt or b"\n"), 15, window)


@pytest.mark.slow
def test_sampling_by_seed_and_top_k(trained):
    model, params = trained
    draw = lambda **how: generate.generate(model, params, b"ab", 5, generate.Sampling(**how))
    assert draw(seed=1, temperature=3.0) == draw(seed=1, temperature=3.0)
    assert draw(seed=1, temperature=3.0) != draw(seed=2, temperature=3.0)
    assert draw(seed=1, temperature=3.0, top_k=1) == draw(temperature=1e-6)
    keys = jax.random.split(jax.random.key(0), 200)
    logits = jnp.arange(256.0) / 100
    drawn = jax.vmap(lambda key: generate.Sampling(1.0, top_k=3).draw(key, logits))(keys)
    assert set(np.asarray(drawn).tolist()) == {253, 254, 255}


@pytest.mark.slow
def test_a_model_with_positions_of_its_own_has_no_learned_ones():
    model = small_model(position="rotary")
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert "position" not in params
    assert len(generate.generate(model, params, b"abc", 6, generate.Sampling())) == 6


def test_tied_and_untied_heads_have_their_parameters():
    for tied, extra in ((True, set()), (False, {"head"})):
        model = small_model(tied_head=tied)
        shapes = jax.eval_shape(
            lambda model=model: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        )
        assert set(shapes["params"]) == {"block_0", "embed", "final_norm", "position"} | extra
