"""A case measured: each contender compiled, checked, and timed in rounds with the others."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from flax_mha.bench.accelerator.cases import Case
from flax_mha.bench.accelerator.contenders import CONTENDERS, Attend
from flax_mha.bench.accelerator.textbook import Data, Expected, expect, make_data
from flax_mha.bench.check import check_noise, check_numbers
from flax_mha.bench.memory import temporaries
from flax_mha.bench.peers.contract import Unserved, require
from flax_mha.bench.results import CaseResult, Row
from flax_mha.bench.rows import OutOfMemory, admission, fill, running_out
from flax_mha.bench.timing import Call

# What a peer says where it cannot trace a call; a mistake of ours is none of these but the first.
REFUSALS = (NotImplementedError, ValueError, RuntimeError)


def measure(case: Case, names: tuple[str, ...], seconds: float, rounds: int | None) -> CaseResult:
    """All that is known of a case; what cannot be timed has its reason."""
    result = CaseResult(case, [Row(name, CONTENDERS[name].family) for name in names])
    calls: dict[str, Call] = {}
    try:
        with running_out():
            data = make_data(case)
            expected = expect(case, data)
    except OutOfMemory as error:
        for row in result.rows:
            row.status, row.reason = "out of memory", f"of what it is checked against: {error}"
        return result
    for row in result.rows:
        if (found := _admit(row, case, data, expected)) is not None:
            calls[row.name] = found
    fill({row.name: row for row in result.rows}, calls, seconds, rounds)
    return result


def _admit(row: Row, case: Case, data: Data, expected: Expected) -> Call | None:
    """The contender if it may be timed; otherwise the row says why not."""
    with admission(row):
        source = CONTENDERS[row.name]
        require(source.package, source.package)
        if source.build is None:
            return _torch(row, case, data, expected)
        return _compiled(row, source.build(case), case, data, expected)
    return None


def _compiled(row: Row, attend: Attend, case: Case, data: Data, expected: Expected) -> Call:
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
        row.error = check_dropout(jax.device_get(noisy), expected)
        jax.block_until_ready(run())
    else:
        found = _wide(jax.device_get(run()))
        row.error = check_numbers(found, _wide(expected.results), case.dtype)
    return Call(run, jax.block_until_ready)


def _program(attend: Attend, gradient: bool) -> Callable[..., tuple[Any, ...]]:
    """The context, or the gradient of each array."""

    def forward(arrays: Any, probe_BTNH: Any, dropout_key: Any) -> tuple[Any, ...]:
        query, key, value, *bias = arrays
        return (attend(query, key, value, bias[0] if bias else None, dropout_key),)

    def loss(arrays: Any, probe_BTNH: Any, dropout_key: Any) -> Any:
        (context_BTNH,) = forward(arrays, probe_BTNH, dropout_key)
        return (context_BTNH.astype("float32") * probe_BTNH.astype("float32")).sum()

    return jax.grad(loss) if gradient else forward


def _torch(row: Row, case: Case, data: Data, expected: Expected) -> Call:
    from flax_mha.bench.accelerator.torch_sdpa import Attention

    attention = Attention(case, data)
    if case.dropout:
        row.error = check_dropout(attention.on_host([attention.context(case.dropout)])[0], expected)
    else:
        found = attention.on_host(attention.results(0.0))
        row.error = check_numbers(found, _wide(expected.results), case.dtype)
    return Call(lambda: attention.results(case.dropout), attention.wait)


def check_dropout(context: Any, expected: Expected) -> float:
    """How far dropout moves the context, over how far it should, less 1."""
    (noisy_BTNH,) = _wide([context])
    return abs(check_noise(noisy_BTNH - expected.context_BTNH, expected.noise) - 1)


def _wide(arrays: Iterable[Any]) -> list[np.ndarray]:
    return [np.asarray(x).astype(np.float32) for x in arrays]
