"""What a language model is in int8, beside its own numbers: faster or not, smaller, and how near.

Weights are those of the attention layers, by `quantize_params`; caches are `init_cache`'s of int8.
All else stays as it is. Bits per byte are of bytes that are read one at a time, as in generation:
what precedes a byte is in the caches only.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha import MultiHeadAttentionConfig, quantize_params
from flax_mha.demo import evaluate
from flax_mha.demo.generate import Sampling, Storage, generate, timed
from flax_mha.demo.models.language import empty_caches
from flax_mha.demo.settings import DemoError
from flax_mha.demo.tasks.contract import Task, at
from flax_mha.demo.terminal import Screen

_ROWS = {
    "bytes per second": "{:,.0f}",
    "bits per byte": "{:.4f}",
    "bytes of the cache": "{:,}",
    "bytes of attention weights": "{:,}",
}


def check(stored: Storage, attention: MultiHeadAttentionConfig) -> None:
    """A run that is not of float32 is not made one.

    Raises:
        DemoError: float32 was asked for.
    """
    own = {"weights": attention.param_dtype, "cache": attention.dtype or attention.param_dtype}
    for option, dtype in own.items():
        if getattr(stored, option) == "float32" and jnp.dtype(dtype) != jnp.float32:
            rule = f"--{option} float32: the attention of this run is in {jnp.dtype(dtype)}"
            raise DemoError(f"{rule}. Leave it out for that, or say int8.")


class Measured(NamedTuple):
    """What one way of storing comes to."""

    sampled: bytes
    bytes_per_second: float
    bits_per_byte: float
    cache_bytes: int
    weight_bytes: int


def measure(
    task: Task, params: Any, stored: Storage, draw: tuple[bytes, int, Sampling], text: np.ndarray
) -> Measured:
    """Draws (prompt, count, how), and judges by `text`.

    Raises:
        DemoError: the layers refuse it, as a named implementation refuses caches of int8.
    """
    model: Any = task.model
    if stored.weights == "int8":
        params = task.change_attention(params, lambda _, layer: quantize_params(layer, "int8"))
    dtype = stored.cache_dtype
    caches = jax.eval_shape(lambda: empty_caches(model, 1, dtype))
    one_byte = jnp.zeros((1, 1), jnp.int32)
    read = lambda params, caches: model.apply({"params": params}, one_byte, caches=caches)  # noqa: E731
    try:
        jax.eval_shape(read, params, caches)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise DemoError(f"[attention] {error}") from error
    sampled, seconds = timed(generate, model, params, *draw, dtype)
    bits = evaluate.bits_per_byte_by_steps(model, params, text, dtype)
    weights = [at(params, path) for path in task.attention_paths]
    return Measured(sampled, draw[1] / seconds, bits, _bytes(caches), _bytes(weights))


def show(own: Measured, small: Measured, stored: Storage, task: Task, screen: Screen) -> None:
    """A table of both."""
    attention = task.settings.attention
    columns = ["", str(jnp.dtype(attention.dtype or attention.param_dtype)), str(stored), "change"]
    rows = [
        [label, form.format(a), form.format(b), f"{b / a - 1:+.2%}"]
        for (label, form), a, b in zip(_ROWS.items(), own[1:], small[1:])
    ]
    screen.table("Generation, and held-out bytes read one at a time", columns, rows)
    screen.say("Weights are those of the attention layers: all others stay as they are.")


def _bytes(arrays: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
