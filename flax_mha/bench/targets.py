"""What to reach, computed from one run: every target with its figures and met or missed."""

import dataclasses
import statistics
from collections.abc import Iterator

from flax_mha.bench.pairs import Pair
from flax_mha.bench.results import LayerResult, Run

LONG = 4096
TIMES_FASTER = {True: 4.0, False: 2.5}  # than every JAX layer, FB at T = 4096; causal, not causal
CAUSAL = 0.6  # of the time without the causal order
WINDOW_GROWTH = 2.2  # of the time, where T doubles and the window stays
DROPOUT = 1.25
DROPOUT_LENGTH = 512
COMPILE = 1.25
IMPORT_SECONDS = 0.1
MEMORY = {
    "attention, T=16384, 8 heads": 256e6,
    "attention, T=16384, 8 heads, dropout 0.1": 256e6,
    "layer, T=16384, 8 heads": 256e6,
    "attention, T=131072, 1 head": 2**30,
}
MEMORY_GROWTH = 2.2


@dataclasses.dataclass(frozen=True)
class Target:
    """A figure that must be at most `limit`, or at least; None was not measured, and why."""

    name: str
    value: float | None
    limit: float
    at_least: bool = False
    unit: str = "x"
    evidence: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "met" if met else "missed"


def targets(run: Run) -> list[Target]:
    """All targets; those that this run has no cases for are listed as not measured."""
    parts = (_never_slower, _long, _torch, _causal, _window, _dropout, _memory, _start)
    return [target for part in parts for target in part(run)]


def _never_slower(run: Run) -> Iterator[Target]:
    for result in run.cases:
        name = f"{result.case.label}: time over the fastest JAX layer's"
        if not result.case.alone:
            yield _compared(name, result, "jax", 1.0)


def _long(run: Run) -> Iterator[Target]:
    for causal, limit in TIMES_FASTER.items():
        name = f"T={LONG} FB{' causal' * causal}: times faster than the fastest JAX layer"
        result = run.find(length=LONG, gradient=True, causal=causal)
        yield _compared(name, result, "jax", limit, faster=True)


def _torch(run: Run) -> Iterator[Target]:
    """Target at T = 4096; other sizes show in the cases' tables."""
    for gradient in (False, True):
        for causal in (False, True):
            name = f"T={LONG} {'FB' if gradient else 'F'}{' causal' * causal}"
            result = run.find(length=LONG, gradient=gradient, causal=causal)
            name += ": times faster than torch's best"
            yield _compared(name, result, "torch", 1.0, faster=True)


def _compared(
    name: str, result: LayerResult | None, family: str, limit: float, faster: bool = False
) -> Target:
    """Ours over a family's fastest, or the inverse; the verdict is by medians."""
    ours = None if result is None else result.row("ours")
    rivals = [] if result is None else result.timed(family)
    if ours is None or not rivals:
        evidence = (
            "this run has no such case" if result is None else f"no times of ours or {family}"
        )
        return Target(name, None, limit, faster, evidence=evidence)
    rival = min(rivals, key=lambda row: row.median)
    minimum = min(row.minimum for row in rivals)
    medians, minima = ours.median / rival.median, ours.minimum / minimum
    if faster:
        medians, minima = 1 / medians, 1 / minima
    evidence = f"{rival.name}; by minima {minima:.2f}"
    return Target(name, medians, limit, faster, evidence=evidence)


def _causal(run: Run) -> Iterator[Target]:
    """Of the layer and of the attention alone: the projections are the same in both cases."""
    pairs = [p for p in run.pairs if p.above.causal and not p.below.causal and not p.above.window]
    pairs = [p for p in pairs if p.above.length >= LONG]
    for pair in pairs:
        yield _in_turns(f"{pair.above.label}, {pair.part}: over not causal", pair, CAUSAL)
    for gradient in (False, True):
        if all(p.above.gradient != gradient for p in pairs):
            name = f"T={LONG} {'FB' if gradient else 'F'}: causal over not causal"
            yield Target(name, None, CAUSAL, evidence="this run lacks one of the two cases")


def _window(run: Run) -> Iterator[Target]:
    """Twice the length with one window: twice the time."""
    pairs = [p for p in run.pairs if p.above.length == 2 * p.below.length and p.above.gradient]
    for pair in pairs:
        yield _in_turns(f"{pair.above.label}: over half the length", pair, WINDOW_GROWTH)
    if not pairs:
        name = "window, FB: time at 2 T over time at T"
        evidence = "no two windowed FB cases with T and 2 T"
        yield Target(name, None, WINDOW_GROWTH, evidence=evidence)


def _dropout(run: Run) -> Iterator[Target]:
    """The surcharge of dropout 0.1 at T = 512; other lengths and rates have no target."""
    pairs = [p for p in run.pairs if p.above.dropout == 0.1 and p.below.dropout == 0]
    pairs = [p for p in pairs if p.above.gradient and p.above.length == DROPOUT_LENGTH]
    for pair in pairs:
        yield _in_turns(f"{pair.above.label}: over without", pair, DROPOUT)
    if not pairs:
        name = f"T={DROPOUT_LENGTH} FB dropout=0.1: over without"
        yield Target(name, None, DROPOUT, evidence="this run lacks one of the two cases")


def _in_turns(name: str, pair: Pair, limit: float) -> Target:
    evidence = f"in turns; by minima {pair.minima:.2f}"
    return Target(name, pair.medians, limit, evidence=evidence)


def _memory(run: Run) -> Iterator[Target]:
    sizes = run.memory or {}
    why = "skipped" if run.memory is None else "the compiler does not say"
    for name, limit in MEMORY.items():
        size = sizes.get(name)
        value = None if size is None else size / 1e6
        yield Target(
            f"temporaries of FB causal: {name}",
            value,
            limit / 1e6,
            unit=" MB",
            evidence=why if value is None else "compiled, not run",
        )
    short, long = (sizes.get(f"layer, T={length}, 8 heads") for length in (8192, 16384))
    growth = long / short if long and short else None
    name = "temporaries of FB causal: T=16384 over T=8192"
    evidence = why if growth is None else "2 is linear, 4 quadratic"
    yield Target(name, growth, MEMORY_GROWTH, evidence=evidence)


def _start(run: Run) -> Iterator[Target]:
    """Compilation and import."""
    seconds = run.compile_seconds or {}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio, evidence = None, "skipped, or no times of ours and linen"
    if {"ours", "linen"} <= set(medians):
        ratio = medians["ours"] / medians["linen"]
        listed = (f"{name} {median:.2f} s" for name, median in medians.items())
        evidence = f"{run.compile_case}, {len(seconds['ours'])} each: {', '.join(listed)}"
    yield Target("compilation of FB over linen's", ratio, COMPILE, evidence=evidence)
    imports = run.import_seconds
    evidence = f"median of {len(imports)} processes" if imports else "skipped"
    value = statistics.median(imports) if imports else None
    name = "`import flax_mha` after `import flax`"
    yield Target(name, value, IMPORT_SECONDS, unit=" s", evidence=evidence)
