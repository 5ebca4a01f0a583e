"""A decoding step as accelerators' compilers make it: reads the cache once, moves none of it."""

import re

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import H100, compile, missing, steps_of

from flax_mha import (
    MultiHeadAttention,
    MultiHeadAttentionConfig,
    dot_product_attention,
    init_cache,
    init_cross_cache,
    init_params,
    multi_head_attention,
)

B, S, N, K, H, D = 8, 8192, 8, 2, 128, 256
KINDS = {
    "line": {},
    "ring": {"sliding_window": S},
    "own heads": {"num_kv_heads": None, "num_heads": 2},
    "rotary": {"position": "rotary"},
    "ALiBi": {"position": "alibi"},
    "float32": {"dtype": "float32"},
}
TPU = "v5e:2x2"
# A GPU keeps no slots that a ring never filled: it writes the cache down without them.
STEPS = [(TPU, kind) for kind in KINDS] + [(H100, kind) for kind in KINDS if kind != "ring"]
UPDATE = re.compile("scatter|dynamic[-_]update[-_]slice")
VIEWS = ("bitcast", "get-tuple-element", "tuple")


@pytest.fixture(params=[TPU, H100])
def chip(request):
    need(request.param)
    return request.param


def need(chip):
    if reason := missing(chip):
        pytest.skip(reason)


def moved(compiled, cache_bytes):
    """Steps that hold as much as one array of the cache, and are neither it nor its update.

    A copy into the chip's own memory is how the compiler reads ahead: it is a read.
    """
    return [
        step
        for step in steps_of(compiled)
        if step.bytes >= cache_bytes
        and step.opcode not in ("parameter", *VIEWS)
        and not UPDATE.search(step.name)
        and not (step.opcode in ("copy-start", "copy-done") and step.on_chip)
    ]


def reads(compiled):
    """How often each array of the updated cache is read; the result that hands it on is no read."""
    steps = steps_of(compiled)
    updated = [step.name for step in steps if UPDATE.search(step.name)]
    return {name: _reads(steps, name) for name in updated}


def _reads(steps, name):
    users = [step for step in steps if name in step.operands and step.opcode != "tuple"]
    return sum(_reads(steps, x.name) if x.opcode in VIEWS else 1 for x in users)


def shapes(make):
    return jax.eval_shape(make)


def config_of(kind, **others):
    options = {"num_heads": N, "num_kv_heads": K, "dtype": "bfloat16", **KINDS[kind], **others}
    return MultiHeadAttentionConfig(key_dim=H, **options)


def compiled_step(kind, chip, batch=B, step=None):
    """(the program, bytes of one array of its cache)."""
    config = config_of(kind)
    x = jax.ShapeDtypeStruct((batch, 1, D), config.dtype)
    params = shapes(lambda: init_params(jax.random.key(0), config, x.shape))
    cache = shapes(lambda: init_cache(config, batch, S, config.dtype))

    def ours(params, x, cache):
        call = dict(config=config, cache=cache, use_causal_mask=True)
        return multi_head_attention(params, x, x, **call)

    program = compile(step or ours, (params, x, cache), chip, donate_argnums=2)
    return program, cache.key.size * cache.key.dtype.itemsize


def in_place(compiled):
    """How many arguments the results take the place of."""
    head = compiled.as_text().splitlines()[0]
    return head.count("-alias)")


@pytest.mark.parametrize(("chip", "kind"), STEPS)
def test_a_step_reads_the_cache_once(chip, kind):
    """Beside a bias, what fits into the chip's own memory is updated there and written back."""
    need(chip)
    compiled, size = compiled_step(kind, chip, batch=32 if kind == "ALiBi" else B)
    assert moved(compiled, size) == []
    assert sorted(reads(compiled).values()) == [1, 1]  # the keys, the values
    assert in_place(compiled) >= 2


def test_a_step_of_one_example(chip):
    """A scatter of one row is an update in place; of two, the whole cache in another layout."""
    compiled, size = compiled_step("line", chip, batch=1)
    assert moved(compiled, size) == []
    assert sorted(reads(compiled).values()) == [1, 1]


def test_linen_compiles_to_the_same(chip):
    module = MultiHeadAttention(num_heads=N, key_dim=H, num_kv_heads=K, dtype="bfloat16")
    step = lambda params, x, cache: module.apply(
        {"params": params}, x, x, cache=cache, use_causal_mask=True
    )
    compiled, size = compiled_step("line", chip, step=step)
    assert moved(compiled, size) == []
    assert sorted(reads(compiled).values()) == [1, 1]


def test_heads_that_are_repeated_would_show(chip):
    """The control: the same step over keys and values that were written down for every head."""

    def step(params, x, cache):
        repeated = lambda y: jnp.repeat(y.swapaxes(1, 2), N // K, axis=2)
        key, value = repeated(cache.key), repeated(cache.value)
        query = jnp.broadcast_to(x[:, :, None, :H], (B, 1, N, H))
        key, value = jax.lax.optimization_barrier((key, value))  # or XLA reads them as they were
        return dot_product_attention(query, key, value), cache

    compiled, size = compiled_step("line", chip, step=step)
    found = moved(compiled, size)
    assert found
    assert max(step.bytes for step in found) >= size * N // K


def test_an_encoder_s_cache_is_read_where_it_lies(chip):
    config = config_of("line")
    source = jax.ShapeDtypeStruct((B, S, D), "bfloat16")
    x = jax.ShapeDtypeStruct((B, 1, D), "bfloat16")
    params = shapes(lambda: init_params(jax.random.key(0), config, x.shape))
    make = lambda params, source: init_cross_cache(params, source, config=config)
    cache = jax.eval_shape(make, params, source)

    def step(params, x, cache):
        return multi_head_attention(params, x, None, config=config, cache=cache)

    compiled = compile(step, (params, x, cache), chip, donate_argnums=2)
    assert moved(compiled, B * K * S * H * 2) == []
