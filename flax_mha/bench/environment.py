"""Where a run takes place: device, processor, cores, versions, and what steers the threads."""

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

DISTRIBUTIONS = (
    *("flax_mha", "jax", "jaxlib", "flax", "keras", "equinox", "dm-haiku", "torch"),
    *("numpy", "optax", "matplotlib"),
)
VARIABLES = (
    *("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "KERAS_BACKEND"),
    *("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"),
)


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_omp_wait(policy: str | None) -> str:
    """Says how OpenMP threads wait, before torch reads it; returns what holds, in words.

    torch's threads otherwise spin after each call, on the cores that XLA's next call needs.

    Args:
        policy: "passive" or "active"; None = what the user set, else passive.
    """
    before = os.environ.get("OMP_WAIT_POLICY")
    effective = policy or before or "passive"
    if "torch" in sys.modules and before != effective:
        return f"{before or 'unset'} (torch was imported before, so it stays)"
    os.environ["OMP_WAIT_POLICY"] = effective
    if policy is None and before is not None:
        return f"{effective} (set by the user)"
    return effective


def describe(command: str, omp_wait: str) -> dict[str, Any]:
    """Everything that the numbers depend on, for the report and the JSON file."""
    device = jax.devices()[0]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": device.platform,
        "device": device.device_kind,
        "processor": _processor(),
        "cores": cores(),
        "load_average": _load_average(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "omp_wait": omp_wait,
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def versions() -> dict[str, str | None]:
    """Of every package that matters; None = not installed."""
    found: dict[str, str | None] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _load_average() -> list[float] | None:
    """Of 1, 5 and 15 minutes, where the system tells: a busy machine shows in a run's file."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    """Its name, and where the system tells which kind of it: many share a name."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    told: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), value.strip())
    name = told.get("model name") or platform.processor() or platform.machine()
    kinds = [f"{word} {told[line]}" for line, word in _KINDS.items() if line in told]
    return f"{name} ({' '.join(kinds)})" if kinds else name


_KINDS = {"cpu family": "family", "model": "model"}
