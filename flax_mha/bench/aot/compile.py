"""A program compiled for a TPU that is not there, and what is written down of it."""

import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from flax_mha.bench.aot.hlo import Module
from flax_mha.bench.aot.schedule import DUMP_FLAGS, Region, kernels
from flax_mha.bench.command import BenchError

# Where libtpu and JAX must not look for chips; a kept program would leave no schedule.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a second process would abort on a lock file
}
DUMP = "FLAX_MHA_AOT_DUMP"  # the variable with the folder that libtpu writes to
# Rows and columns of a matrix unit; 128 where nothing else is said.
_WIDE = ("v6e", "tpu7x", "v7x")


class Refused(Exception):
    """The compiler does not take the program; the message is its reason."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program.

    Attributes:
        module: its HLO.
        regions: of every kernel, the regions of its schedule; empty without a dump.
        extra_bytes: the peak of its memory besides arguments and results.
    """

    module: Module
    regions: dict[str, list[Region]]
    extra_bytes: int


def environment(dump: str) -> dict[str, str]:
    """The variables of a process in which libtpu writes its schedules to `dump`."""
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {DUMP_FLAGS.format(dump)}".strip()
    return {**os.environ, **ENVIRONMENT, "LIBTPU_INIT_ARGS": flags, DUMP: dump}


def libtpu_version() -> str:
    """The version of libtpu.

    Raises:
        BenchError: it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        rule = "aot needs libtpu, the compiler for TPUs, which needs no TPU."
        remedy = "Run `pip install 'jax[tpu]'`, for the newest in Python 3.12 or later."
        raise BenchError(f"{rule} {remedy}")
    return importlib.metadata.version("libtpu")


def chip(topology: str) -> Any:
    """One chip of a topology such as v5e:2x2.

    Raises:
        BenchError: libtpu knows no such topology.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices[0]
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        examples = "v5e:2x2, v5p:2x2x1, v6e:2x2"
        reason = str(error).splitlines()[0]
        raise BenchError(f"no topology {topology!r} (such are {examples}): {reason}") from error


def unit_width(topology: str) -> int:
    """Rows and columns of one of its matrix units.

    Example:
        >>> unit_width("v5e:2x2"), unit_width("v6e:2x2")
        (128, 256)
    """
    return 256 if topology.startswith(_WIDE) else 128


def compile_for(device: Any, function: Callable[..., Any], arguments: Any) -> Compiled:
    """Compiles `function(*arguments)`, shapes with dtypes, for one chip.

    Raises:
        Refused: the compiler does not take it: it needs more memory than there is, for one.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    lowered = (
        jax.jit(function).trace(*jax.tree.map(place, arguments)).lower(lowering_platforms=("tpu",))
    )
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        _take_dump()
        raise Refused(str(error).splitlines()[0]) from error
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes
    extra = memory.peak_memory_in_bytes - used
    return Compiled(Module(compiled.as_text()), _take_dump(), extra)


def _take_dump() -> dict[str, list[Region]]:
    """Reads what libtpu has written since the last time, and deletes it."""
    if DUMP not in os.environ:
        return {}
    files = [path for path in Path(os.environ[DUMP]).iterdir() if path.is_file()]
    found = kernels(files)
    for path in files:
        path.unlink()
    return found
