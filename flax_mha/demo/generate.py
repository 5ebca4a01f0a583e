"""Text from a model, with a cache of what was read, or by reading all of it again for every byte.

Both see at most `context` bytes. When these are full, the cache is filled anew with their last
half; without a cache the oldest byte is dropped at every step.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_mha.core.typing import Array, PRNGKey
from flax_mha.demo.models.language import Caches, Transformer, empty_caches


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a byte is drawn from its logits.

    Attributes:
        temperature: the logits are divided by it: below 1 the likely bytes become likelier.
        top_k: only the k likeliest bytes are drawn; 0 = all.
        seed: the same seed gives the same text.
    """

    temperature: float = 0.7
    top_k: int = 0
    seed: int = 0

    def draw(self, sample_key: PRNGKey, logits_Y: Array) -> Array:
        """One byte from softmax(logits / temperature) over the top k."""
        if 0 < self.top_k < logits_Y.size:
            least = jax.lax.top_k(logits_Y, self.top_k)[0][-1]
            logits_Y = jnp.where(logits_Y < least, -jnp.inf, logits_Y)
        return jax.random.categorical(sample_key, logits_Y / self.temperature).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Storage:
    """In what numbers caches and attention weights are: "float32", "int8", None = the run's own."""

    cache: str | None = None
    weights: str | None = None

    @property
    def any_int8(self) -> bool:
        """Whether anything is not in the run's own."""
        return "int8" in (self.cache, self.weights)

    @property
    def cache_dtype(self) -> str | None:
        """For `init_cache`."""
        return "int8" if self.cache == "int8" else None

    def __str__(self) -> str:
        parts = [name for name in ("cache", "weights") if getattr(self, name) == "int8"]
        return f"int8 {' and '.join(parts)}"


def generate(
    model: Transformer,
    params: Any,
    prompt: bytes,
    count: int,
    how: Sampling,
    cache_dtype: str | None = None,
) -> bytes:
    """`count` bytes that follow the prompt, each computed from the cache and the byte before."""
    context, text = model.model.context, _tokens(prompt)
    end = len(text) + count
    while len(text) < end:
        known = text[-(context // 2) :] if len(text) >= context else text
        made = len(text) - (end - count)
        steps = context - len(known)
        keys = _keys(how, made, steps)  # a last round may draw more than is wanted
        continued = _continue(model, how, params, jnp.asarray(known), keys, cache_dtype)
        text = np.concatenate([text, np.asarray(continued)])[:end]
    return bytes(text[-count:].tolist()) if count else b""


@functools.partial(jax.jit, static_argnames=("model", "how", "cache_dtype"))
def _continue(
    model: Transformer,
    how: Sampling,
    params: Any,
    known_T: Array,
    sample_keys: Array,
    cache_dtype: str | None,
) -> Array:
    """One byte for each key: the known ones are read at once, then one at a time."""
    logits_BTY, caches = _read(model, params, known_T, empty_caches(model, 1, cache_dtype))

    def step(carry: tuple[Array, Caches], sample_key: PRNGKey) -> Any:
        logits_Y, caches = carry
        byte = how.draw(sample_key, logits_Y)
        logits_BTY, caches = _read(model, params, byte[None], caches)
        return (logits_BTY[0, -1], caches), byte

    return jax.lax.scan(step, (logits_BTY[0, -1], caches), sample_keys)[1]


def _read(model: Transformer, params: Any, tokens_T: Array, caches: Caches) -> Any:
    return model.apply({"params": params}, tokens_T[None], caches=caches)


def generate_without_cache(
    model: Transformer, params: Any, prompt: bytes, count: int, how: Sampling
) -> bytes:
    """The same, each byte computed from all that stand before it."""
    context, text = model.model.context, _tokens(prompt)
    known = text[-context:]
    tokens_T = jnp.zeros(context, jnp.int32).at[: len(known)].set(jnp.asarray(known))
    keys = _keys(how, 0, count)
    return bytes(_slide(model, how, params, tokens_T, jnp.asarray(len(known)), keys).tolist())


@functools.partial(jax.jit, static_argnames=("model", "how"))
def _slide(
    model: Transformer, how: Sampling, params: Any, tokens_T: Array, length: Array, keys: Array
) -> Array:
    context = tokens_T.shape[0]

    def step(carry: tuple[Array, Array], sample_key: PRNGKey) -> Any:
        """One more byte; a full window first loses its oldest."""
        tokens_T, length = carry
        # Behind `length` stand zeros: the causal mask keeps them from what is read.
        logits_TY = model.apply({"params": params}, tokens_T[None])[0]
        byte = how.draw(sample_key, logits_TY[length - 1])
        full = length == context
        tokens_T = jnp.where(full, jnp.roll(tokens_T, -1), tokens_T)
        length = jnp.where(full, context, length + 1)
        return (tokens_T.at[length - 1].set(byte), length), byte

    return jax.lax.scan(step, (tokens_T, length), keys)[1]


def _keys(how: Sampling, first: int, count: int) -> PRNGKey:
    """One key for each byte, by its place in the text: the same with the cache and without."""
    key = jax.random.key(how.seed)
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(first, first + count))


def _tokens(prompt: bytes) -> np.ndarray:
    return np.frombuffer(prompt or b"\n", np.uint8).astype(np.int32)


def timed(function: Callable[..., bytes], *arguments: Any) -> tuple[bytes, float]:
    """What it returns, and the seconds of a second call: the first one compiles."""
    function(*arguments)
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started
