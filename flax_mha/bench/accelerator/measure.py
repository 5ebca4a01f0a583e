"""A case measured: each contender compiled, checked, and timed in rounds with the others."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from flax_mha.bench import timing
from flax_mha.bench.accelerator.cases import Case
from flax_mha.bench.accelerator.contenders import CONTENDERS, Attend, absence
from flax_mha.bench.accelerator.textbook import Data, Expected, expect, make_data
from flax_mha.bench.check import LIMITS, NOISE_FACTOR, OTHER_LIMIT, Wrong, relative_error
from flax_mha.bench.memory import temporaries
from flax_mha.bench.peers.contract import Unserved
from flax_mha.bench.results import Row

# What a peer says where it cannot trace a call; a mistake of ours is none of these but the first.
REFUSALS = (NotImplementedError, ValueError, RuntimeError)


class OutOfMemory(Exception):
    """The device has no room for it."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A contender that may be timed: a call is put in the device's queue, its result waited for."""

    start: Callable[[], Any]
    wait: Callable[[Any], Any]


@dataclasses.dataclass
class CaseResult:
    """The contenders of one case."""

    case: Case
    rows: list[Row] = dataclasses.field(default_factory=list)

    def timed(self) -> list[Row]:
        return [row for row in self.rows if row.samples]

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return {"case": self.case.label, "flops": self.case.flops, "contenders": rows}


def measure(case: Case, names: tuple[str, ...], seconds: float, rounds: int | None) -> CaseResult:
    """All that is known of a case; what cannot be timed has its reason."""
    result = CaseResult(case, [Row(name, CONTENDERS[name].family) for name in names])
    ready: dict[str, Ready] = {}
    try:
        with running_out():
            data = make_data(case)
            expected = expect(case, data)
    except OutOfMemory as error:
        for row in result.rows:
            row.status, row.reason = "out of memory", f"of what it is checked against: {error}"
        return result
    for row in result.rows:
        if (found := _admitted(row, case, data, expected)) is not None:
            ready[row.name] = found
    rows = {row.name: row for row in result.rows}
    for name, sample in _samples(ready, rows, seconds, rounds):
        rows[name].samples.append(sample)
    return result


def _admitted(row: Row, case: Case, data: Data, expected: Expected) -> Ready | None:
    """The contender if it may be timed; otherwise the row says why not."""
    if (reason := absence(row.name)) is not None:
        row.status, row.reason = "absent", reason
        return None
    try:
        with running_out():
            build = CONTENDERS[row.name].build
            if build is None:
                return _torch(row, case, data, expected)
            return _compiled(row, build(case), case, data, expected)
    except OutOfMemory as error:
        row.status, row.reason = "out of memory", str(error)
    except Unserved as refusal:
        row.status, row.reason = "unserved", str(refusal)
    except Wrong as error:
        row.status, row.reason = "wrong", str(error)
    except jax.errors.JaxRuntimeError as error:
        row.status, row.reason = "failed", str(error).partition("\n")[0]
    return None


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


def _compiled(row: Row, attend: Attend, case: Case, data: Data, expected: Expected) -> Ready:
    arguments = (data.arrays, data.probe_BTNH, data.dropout_key if case.dropout else None)
    start = time.perf_counter()
    try:
        with running_out():
            lowered = jax.jit(_program(attend, case.gradient)).lower(*arguments)
    except jax.errors.JaxRuntimeError:
        raise
    except REFUSALS as error:
        if row.family == "ours" and not isinstance(error, NotImplementedError):
            raise
        reason = str(error).partition("\n")[0]
        raise Unserved(reason.partition(" Received: ")[0]) from error
    compiled = lowered.compile()
    row.compile_seconds, row.temp_bytes = time.perf_counter() - start, temporaries(compiled)
    run = lambda: compiled(*arguments)  # noqa: E731
    if case.dropout:
        (noisy,) = jax.jit(_program(attend, gradient=False))(*arguments)
        row.error = check_noise(jax.device_get(noisy), expected)
        jax.block_until_ready(run())
    else:
        row.error = check(jax.device_get(run()), case, expected)
    return Ready(run, jax.block_until_ready)


def _program(attend: Attend, gradient: bool) -> Callable[..., tuple[Any, ...]]:
    """The context, or the gradient of each array."""

    def forward(arrays: Any, probe_BTNH: Any, dropout_key: Any) -> tuple[Any, ...]:
        query, key, value, *bias = arrays
        return (attend(query, key, value, bias[0] if bias else None, dropout_key),)

    def loss(arrays: Any, probe_BTNH: Any, dropout_key: Any) -> Any:
        (context_BTNH,) = forward(arrays, probe_BTNH, dropout_key)
        return (context_BTNH.astype("float32") * probe_BTNH.astype("float32")).sum()

    return jax.grad(loss) if gradient else forward


def _torch(row: Row, case: Case, data: Data, expected: Expected) -> Ready:
    from flax_mha.bench.accelerator.torch_sdpa import Attention

    attention = Attention(case, data)
    if case.dropout:
        row.error = check_noise(attention.on_host([attention.context(case.dropout)])[0], expected)
    else:
        row.error = check(attention.on_host(attention.results(0.0)), case, expected)
    return Ready(lambda: attention.results(case.dropout), attention.wait)


def check(actual: Any, case: Case, expected: Expected) -> float:
    """The largest error of the results, relative to each array's largest entry.

    Raises:
        Wrong: the error is above the limit.
    """
    arrays = [np.asarray(x).astype(np.float32) for x in actual]
    error = relative_error(arrays, [np.asarray(x) for x in expected.results])
    exact = case.dtype == "float32"
    limit = LIMITS.get(jax.default_backend(), OTHER_LIMIT) if exact else OTHER_LIMIT
    if not error <= limit:
        raise Wrong(f"its numbers are wrong: error {error:.2g}, at most {limit:.0e} is rounding")
    return error


def check_noise(context: Any, expected: Expected) -> float:
    """How far dropout moves the context, over how far it should, less 1.

    Raises:
        Wrong: another rate would move it so far.
    """
    moved = np.asarray(context).astype(np.float32) - np.asarray(expected.context_BTNH)
    ratio = float(np.sqrt(np.square(moved).mean())) / expected.noise
    if not 1 / NOISE_FACTOR <= ratio <= NOISE_FACTOR:
        raise Wrong(f"its dropout moves the context {ratio:.2g} times as far as it should")
    return abs(ratio - 1)


def _samples(
    ready: Mapping[str, Ready], rows: dict[str, Row], seconds: float, rounds: int | None
) -> Iterator[tuple[str, float]]:
    """(name, seconds a call) of every round; the calls of a sample are in the queue together."""
    estimates = {name: _estimate(contender) for name, contender in ready.items()}
    plans = timing.make_plans(estimates, seconds, rounds)
    for name in timing.schedule({name: plan.rounds for name, plan in plans.items()}):
        rows[name].calls = plans[name].calls
        yield name, _sample(ready[name], plans[name].calls)


def _estimate(contender: Ready) -> float:
    _sample(contender, 1)
    return _sample(contender, 1)


def _sample(contender: Ready, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = contender.start()
    contender.wait(result)
    return (time.perf_counter() - start) / calls
