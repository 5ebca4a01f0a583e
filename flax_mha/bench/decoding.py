"""One decoding step beside flax.linen's `decode=True`: `python -m flax_mha.bench.decoding`.

Both get the same weights, hold a cache of the same capacity, donate it to the step, and are checked
against each other token by token before anything is timed. They take turns, at an early and a late
position of the cache: the ratio of these two says whether a step grows dearer as the text grows.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from flax_mha import MultiHeadAttentionConfig, init_cache, init_params, multi_head_attention
from flax_mha.bench.peers.linen import renamed
from flax_mha.bench.timing import Call, sample
from flax_mha.core.typing import Array

STEPS_A_SAMPLE = 20


@dataclasses.dataclass(frozen=True)
class Size:
    """B examples, D features in N heads, a cache of S slots."""

    B: int
    D: int = 512
    N: int = 8
    S: int = 2048


@dataclasses.dataclass
class Decoder:
    """A layer that reads one token at a time; `cache` is what it has read."""

    step: Callable[[Array, Any], tuple[Array, Any]]
    at: Callable[[int], Any]  # a cache that has read so many tokens
    cache: Any = None

    def read(self, x_B1D: Array) -> Array:
        output, self.cache = self.step(x_B1D, self.cache)
        return output


def ours(size: Size) -> Decoder:
    config, params = config_of(size), weights(size)

    def step(x_B1D: Array, cache: Any) -> Any:
        return multi_head_attention(
            params, x_B1D, x_B1D, config=config, cache=cache, use_causal_mask=True
        )

    def at(position: int) -> Any:
        cache = init_cache(config, size.B, size.S)
        return dataclasses.replace(cache, length=jnp.full(size.B, position, "int32"))

    return Decoder(jax.jit(step, donate_argnums=1), at)


def flax_linen(size: Size) -> Decoder:
    module = linen.MultiHeadDotProductAttention(size.N, decode=True)
    variables = module.init(jax.random.key(0), jnp.zeros((size.B, size.S, size.D)))
    params = renamed(weights(size))

    def step(x_B1D: Array, cache: Any) -> Any:
        output, grown = module.apply({"params": params, "cache": cache}, x_B1D, mutable=["cache"])
        return output, grown["cache"]

    def at(position: int) -> Any:
        cache = jax.tree.map(jnp.copy, variables["cache"])
        return {**cache, "cache_index": jnp.asarray(position, "int32")}

    return Decoder(jax.jit(step, donate_argnums=1), at)


def config_of(size: Size) -> MultiHeadAttentionConfig:
    """Biases are not zero: a layer that mislays one must not agree."""
    D, N = size.D, size.N
    return MultiHeadAttentionConfig(N, D // N, bias_initializer="random_normal")


def weights(size: Size) -> Any:
    return init_params(jax.random.key(0), config_of(size), (size.B, 1, size.D))


def check(decoders: dict[str, Decoder], size: Size, tokens: int = 5) -> float:
    """The greatest difference of the outputs over a few tokens.

    Raises:
        ValueError: they differ by more than float32 explains.
    """
    text = jax.random.normal(jax.random.key(1), (tokens, size.B, 1, size.D))
    outputs = []
    for decoder in decoders.values():
        decoder.cache = decoder.at(0)
        outputs.append(np.stack([decoder.read(x_B1D) for x_B1D in text]))
    error = float(max(np.abs(output - outputs[0]).max() for output in outputs))
    if not error <= 1e-4:
        raise ValueError(f"the layers' outputs differ by {error:.1e}: nothing is timed.")
    return error


def measure(
    decoders: dict[str, Decoder], size: Size, positions: Sequence[int], rounds: int
) -> Iterator[tuple[str, int, float]]:
    """(name, position, seconds a step), in interleaved rounds."""
    x_B1D = jax.random.normal(jax.random.key(2), (size.B, 1, size.D))
    for _ in range(rounds):
        for position in positions:
            for name, decoder in decoders.items():
                decoder.cache = decoder.at(position)
                jax.block_until_ready(decoder.read(x_B1D))
                step = Call(functools.partial(wait, decoder, x_B1D))
                yield name, position, sample(step, STEPS_A_SAMPLE)


def wait(decoder: Decoder, x_B1D: Array) -> None:
    jax.block_until_ready(decoder.read(x_B1D))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints medians, minima and ratios for every batch size asked for."""
    parser = argparse.ArgumentParser(prog="python -m flax_mha.bench.decoding", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B")
    parser.add_argument("--capacity", type=int, default=2048, metavar="S")
    parser.add_argument("--rounds", type=int, default=15, metavar="N")
    options = parser.parse_args(arguments)
    positions = (options.capacity // 32, options.capacity - 64)
    for B in options.batch:
        report(Size(B, S=options.capacity), positions, options.rounds)


def report(size: Size, positions: Sequence[int], rounds: int) -> None:
    decoders = {"flax_mha": ours(size), "linen": flax_linen(size)}
    print(f"{size}: outputs agree to {check(decoders, size):.0e}")
    samples: dict[tuple[str, int], list[float]] = {}
    for name, position, seconds in measure(decoders, size, positions, rounds):
        samples.setdefault((name, position), []).append(1e3 * seconds)
    medians = {key: statistics.median(values) for key, values in samples.items()}
    for (name, position), median in sorted(medians.items(), key=lambda item: item[0][::-1]):
        least = min(samples[name, position])
        ratio = medians["linen", position] / median
        print(
            f"  position {position:5}  {name:9} {median:7.2f} ms (least {least:.2f})  {ratio:.1f}x"
        )
    growth = medians["flax_mha", positions[-1]] / medians["flax_mha", positions[0]]
    print(f"  the last position takes {growth:.2f} times as long as the first")


if __name__ == "__main__":
    main()
