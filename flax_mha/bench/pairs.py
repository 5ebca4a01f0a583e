"""Our time in one case over our time in another, in the same rounds: a machine's moods cancel."""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_mha import dot_product_attention
from flax_mha.bench import timing
from flax_mha.bench.cases import Case
from flax_mha.bench.data import make_data
from flax_mha.bench.peers.ours import builder
from flax_mha.core.typing import Array


@dataclasses.dataclass
class Pair:
    """Two cases timed in turns. `part` is the layer, or the attention without projections."""

    part: str
    above: Case
    below: Case
    above_samples: list[float] = dataclasses.field(default_factory=list)  # seconds a call
    below_samples: list[float] = dataclasses.field(default_factory=list)

    @property
    def medians(self) -> float:
        return statistics.median(self.above_samples) / statistics.median(self.below_samples)

    @property
    def minima(self) -> float:
        return min(self.above_samples) / min(self.below_samples)

    def to_dict(self) -> dict[str, Any]:
        labels = {"above": self.above.label, "below": self.below.label}
        return dataclasses.asdict(self) | labels


def pairs_of(cases: Sequence[Case]) -> Iterator[Pair]:
    """What the causal order saves, dropout costs, and twice the length with a window costs.

    Example:
        >>> cases = [Case.parse(f"1x64x8x2 {variant}") for variant in ("F", "F causal")]
        >>> [(pair.part, pair.above.label) for pair in pairs_of(cases)]
        [('layer', '1x64x8x2 F causal'), ('attention', '1x64x8x2 F causal')]
    """
    known = {dataclasses.replace(case, alone=False) for case in cases}
    for above in sorted(known, key=lambda case: case.label):
        for below in _simpler(above):
            if below in known:
                yield Pair("layer", above, below)
                if above.causal and not (above.dropout or above.window):
                    yield Pair("attention", above, below)


def _simpler(case: Case) -> Iterator[Case]:
    if case.causal:
        yield dataclasses.replace(case, causal=False)
    if case.dropout:
        yield dataclasses.replace(case, dropout=0.0)
    if case.window is not None and case.length % 2 == 0:
        yield dataclasses.replace(case, length=case.length // 2)


def measure(pair: Pair, seconds: float, rounds: int | None = None) -> None:
    """Fills in the samples."""
    build = {"layer": layer, "attention": attention}[pair.part]
    calls = {"above": build(pair.above), "below": build(pair.below)}
    samples = {"above": pair.above_samples, "below": pair.below_samples}
    estimates = {name: timing.estimate(call) for name, call in calls.items()}
    plans = timing.make_plans(estimates, seconds, rounds)
    most = max(plan.rounds for plan in plans.values())
    plans = {name: dataclasses.replace(plan, rounds=most) for name, plan in plans.items()}
    for name, value in timing.interleave(calls, plans):
        samples[name].append(value)


def layer(case: Case) -> timing.Call:
    """F or FB of our layer."""
    return timing.Call(builder(None)(case, make_data(case)).run)


def attention(case: Case) -> timing.Call:
    """F or FB of the attention alone, of random queries, keys and values."""
    shape = (3, case.batch, case.length, case.heads, case.head_size)
    arrays = tuple(jax.random.normal(jax.random.key(0), shape))

    def attend(query: Array, key: Array, value: Array) -> Array:
        return dot_product_attention(query, key, value, is_causal=case.causal)

    def loss(*arrays: Array) -> Array:
        return jnp.square(attend(*arrays)).sum()

    program = jax.grad(loss, argnums=(0, 1, 2)) if case.gradient else attend
    compiled = jax.jit(program).lower(*arrays).compile()
    return timing.Call(lambda: jax.block_until_ready(compiled(*arrays)))
