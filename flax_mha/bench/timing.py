"""Interleaved rounds: in each, every contender is timed once, so that a disturbance hits all."""

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

MOST_ROUNDS = 25
SHORTEST_SAMPLE = 0.01  # seconds: shorter calls are repeated within a sample
MOST_CALLS = 200
# Where a call is shorter, one untimed call goes before the sample: another's threads and arrays
# were in the caches.
WARM_BELOW = 0.1


@dataclasses.dataclass(frozen=True)
class Call:
    """What is timed. `wait` waits for a result that `start` only puts in a device's queue."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any] = lambda result: None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How often one contender is timed: `rounds` samples of `calls` calls."""

    rounds: int
    calls: int
    warm: bool


def make_plans(
    estimates: Mapping[str, float], seconds: float, rounds: int | None = None
) -> dict[str, Plan]:
    """A plan for each contender's seconds a call, from an equal share of a case's `seconds`.

    At least three rounds, two for calls above 3 seconds, one above 8; but five for those within
    1.5 of the fastest, where the question is who wins. `rounds` overrules.

    Example:
        >>> plans = make_plans({"ours": 0.004, "peer": 5.0}, seconds=2.0)
        >>> plans["ours"], plans["peer"].rounds
        (Plan(rounds=25, calls=3, warm=True), 2)
    """
    share, close = seconds / max(len(estimates), 1), 1.5 * min(estimates.values(), default=0)
    return {
        name: _plan(estimate, share, rounds, estimate <= close)
        for name, estimate in estimates.items()
    }


def _plan(estimate: float, share: float, rounds: int | None, close: bool) -> Plan:
    calls = min(MOST_CALLS, max(1, math.ceil(SHORTEST_SAMPLE / max(estimate, 1e-9))))
    warm = estimate < WARM_BELOW
    cost = max(estimate, 1e-9) * (calls + warm)
    least = 5 if close else 3 if estimate < 3 else 2 if estimate < 8 else 1
    return Plan(rounds or max(least, int(min(MOST_ROUNDS, share / cost))), calls, warm)


def estimate(call: Call) -> float:
    """Seconds of one call; the second one, where the first is short enough to be a surprise."""
    first = sample(call, 1)
    return first if first > 1 else sample(call, 1)


def sample(call: Call, calls: int) -> float:
    """Mean seconds of some calls, in the queue together; results are dropped as they come."""
    start = time.perf_counter()
    for _ in range(calls):
        result = None  # dropped before the next is computed
        result = call.start()
    call.wait(result)
    return (time.perf_counter() - start) / calls


def interleave(calls: Mapping[str, Call], plans: Mapping[str, Plan]) -> Iterator[tuple[str, float]]:
    """Yields (name, seconds a call), round by round.

    Fewer rounds are spread evenly over all; who begins changes, so that nobody always follows the
    one with the largest buffers. The garbage collector waits meanwhile.
    """
    gc.collect()
    gc.disable()
    try:
        for name in schedule({name: plan.rounds for name, plan in plans.items()}):
            if plans[name].warm:
                sample(calls[name], 1)
            yield name, sample(calls[name], plans[name].calls)
    finally:
        gc.enable()
        gc.collect()


def schedule(rounds: Mapping[str, int]) -> Iterator[str]:
    """The order of all samples.

    Example:
        >>> list(schedule({"a": 3, "b": 1}))
        ['a', 'b', 'a', 'a']
    """
    names, total = list(rounds), max(rounds.values(), default=0)
    for index in range(total):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            due = (2 * index * rounds[name] + total) // (2 * total)
            if (2 * (index + 1) * rounds[name] + total) // (2 * total) > due:
                yield name
