"""Beside the rounds: repeated compilations, the time of the import, the machine's GEMM rate."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

_IMPORT = """\
import time
import flax
start = time.perf_counter()
import flax_mha
print(time.perf_counter() - start)
"""


def import_seconds(runs: int) -> list[float]:
    """What `import flax_mha` adds to `import flax`, each in a new process."""
    command = [sys.executable, "-c", _IMPORT]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    outputs = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        for _ in range(runs)
    )
    return [float(output.stdout) for output in outputs]


def compile_times(
    compilers: Mapping[str, Callable[[], float]], times: int
) -> Iterator[tuple[str, float]]:
    """Yields (name, seconds) of fresh compilations, in interleaved rounds."""
    for _ in range(times):
        for name, compile_fresh in compilers.items():
            yield name, compile_fresh()


def gemm() -> tuple[Callable[[], Any], int]:
    """A square float32 matrix product that waits for its result, and its operations."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    return lambda: jax.block_until_ready(product(x, x)), 2 * size**3
