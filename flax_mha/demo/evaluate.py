"""Bits per byte of a text under a model, each byte counted exactly once.

A window of `context` bytes moves on by half its length; of each window but the first, only the
second half is counted, so every byte is predicted from at least half a window of what precedes it.
The first byte of all has nothing before it and costs 8 bits.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_mha.core.typing import Array
from flax_mha.demo.models.language import Transformer, empty_caches

_WINDOWS_AT_ONCE = 32


class Windows(NamedTuple):
    """Inputs, the byte that follows each, and whether that byte is counted here."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    counted_BT: np.ndarray


def bits_per_byte(
    model: Transformer, params: Any, text: np.ndarray, context: int, lora: Any = None
) -> float:
    """The mean over all bytes of `text` of -log2 p(byte | the bytes before it).

    `lora` holds the adapters of a model that has any.
    """
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    batches = split_windows(text, context)
    nats = sum(float(_total_nats(model, variables, windows)) for windows in batches)
    return (8 + nats / math.log(2)) / len(text)


def bits_per_byte_by_steps(
    model: Transformer, params: Any, text: np.ndarray, cache_dtype: str | None = None
) -> float:
    """The same, each byte of a window read alone: what stands before it is in the caches only."""
    batches = split_windows(text, model.model.context)
    nats = sum(float(_stepped_nats(model, cache_dtype, params, windows)) for windows in batches)
    return (8 + nats / math.log(2)) / len(text)


def split_windows(text: np.ndarray, context: int) -> Iterator[Windows]:
    """Batches of one shape; windows beyond the text count nothing."""
    stride = max(1, context // 2)
    starts = np.arange(0, len(text) - 1, stride)
    padded = np.concatenate([text, np.zeros(context + 1, text.dtype)]).astype(np.int32)
    for i in range(0, len(starts), _WINDOWS_AT_ONCE):
        start_B1 = starts[i : i + _WINDOWS_AT_ONCE, None]
        target_BT = start_B1 + 1 + np.arange(context)
        fresh_BT = (start_B1 == 0) | (np.arange(context) >= context - stride)
        windows = padded[target_BT - 1], padded[target_BT], fresh_BT & (target_BT < len(text))
        yield Windows(*(_full_batch(array) for array in windows))


def _full_batch(array: np.ndarray) -> np.ndarray:
    return np.pad(array, ((0, _WINDOWS_AT_ONCE - len(array)), (0, 0)))


@functools.partial(jax.jit, static_argnums=0)
def _total_nats(model: Transformer, variables: Any, windows: Windows) -> Array:
    logits_BTY = model.apply(variables, windows.tokens_BT)
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTY, windows.targets_BT)
    return jnp.sum(jnp.where(windows.counted_BT, nats_BT, 0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stepped_nats(
    model: Transformer, cache_dtype: str | None, params: Any, windows: Windows
) -> Array:
    def step(caches: Any, column: Windows) -> Any:
        token_B1 = column.tokens_BT[:, None]
        logits_B1Y, caches = model.apply({"params": params}, token_B1, caches=caches)
        nats_B = optax.softmax_cross_entropy_with_integer_labels(
            logits_B1Y[:, 0], column.targets_BT
        )
        return caches, jnp.sum(jnp.where(column.counted_BT, nats_B, 0))

    caches = empty_caches(model, len(windows.tokens_BT), cache_dtype)
    return jax.lax.scan(step, caches, jax.tree.map(jnp.transpose, windows))[1].sum()
