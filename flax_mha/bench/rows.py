"""A contender's row: the reason why it is not timed, or its samples in rounds with the others."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import jax

from flax_mha.bench import timing
from flax_mha.bench.check import Wrong
from flax_mha.bench.peers.contract import Absent, Unserved
from flax_mha.bench.results import Row


class OutOfMemory(Exception):
    """The device has no room for it."""


# What keeps a contender from being timed -> its row's status; beside these "failed", of XLA.
STATUS: dict[type[Exception], str] = {
    Absent: "absent",
    Unserved: "unserved",
    Wrong: "wrong",
    OutOfMemory: "out of memory",
}


@contextlib.contextmanager
def admission(row: Row) -> Iterator[None]:
    """What is raised because a contender cannot be timed becomes its row's status and reason."""
    try:
        with running_out():
            yield
    except tuple(STATUS) as error:
        row.status, row.reason = STATUS[type(error)], str(error)
    except jax.errors.JaxRuntimeError as error:
        row.status, row.reason = "failed", str(error).partition("\n")[0]


@contextlib.contextmanager
def running_out() -> Iterator[None]:
    """Turns what JAX and torch raise for a full device into `OutOfMemory`."""
    try:
        yield
    except RuntimeError as error:  # JaxRuntimeError and torch.OutOfMemoryError are of this kind
        text = str(error)
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text:
            raise OutOfMemory(text.partition("\n")[0]) from error
        raise


def fill(
    rows: Mapping[str, Row], calls: Mapping[str, timing.Call], seconds: float, rounds: int | None
) -> None:
    """Fills in the samples, round by round; where a call is long, its estimate is the first."""
    estimates = {name: timing.estimate(call) for name, call in calls.items()}
    plans = timing.make_plans(estimates, seconds, rounds)
    for name, plan in plans.items():
        rows[name].calls = plan.calls
        if not plan.warm:
            rows[name].samples.append(estimates[name])
            plans[name] = dataclasses.replace(plan, rounds=plan.rounds - 1)
    for name, sample in timing.interleave(calls, plans):
        rows[name].samples.append(sample)
