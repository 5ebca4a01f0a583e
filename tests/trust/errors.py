"""Prints the errors of calls with extreme numbers against float64, beside those of jax.nn.

    python tests/trust/errors.py [part of a case's name ...]

A row is a case; a column of an implementation has the error of the context and, behind the stroke,
the largest of its gradients, each relative to the largest entry of what is right. "-" is a
call that jax.nn has no arguments for, or that is NaN there.
"""

import os
import pathlib
import platform
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from extreme_inputs import CASES, Extreme
from extreme_runs import computed, error, expected
from implementations import HERE

COLUMNS = (*HERE, "layer reference", "layer blockwise", "jax.nn")


def cell(case: Extreme, how: str, exact: dict[str, np.ndarray]) -> str:
    if how == "jax.nn" and not case.beside:
        return "-"
    if how == "jax.nn" and case.dtype == "float16":
        return "refused"  # by its default precision, on CPU
    try:
        found = computed(case, how)
    except NotImplementedError:
        return "refused"
    of = {name: error(case, found[name], exact[name]) for name in exact}
    return f"{of.pop('context'):.1e} / {np.max([*of.values()]):.1e}"


def processor() -> str:
    """The family, and nothing that names a machine."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {name.strip(): value.strip() for name, value in found.items()}
    known = [named.get(x) for x in ("vendor_id", "cpu family", "model")]
    return " ".join(x for x in known if x) or platform.machine()


def main(parts: list[str]) -> None:
    print(f"jax {jax.__version__}, numpy {np.__version__}, Python {platform.python_version()}")
    print(f"processor {processor()}\n")
    print("| input | dtype |", " | ".join(COLUMNS), "|")
    print("|---|---|" + "---|" * len(COLUMNS))
    for name, case in CASES.items():
        if parts and not any(part in name for part in parts):
            continue
        exact = expected(case)
        cells = [cell(case, how, exact) for how in COLUMNS]
        print(f"| {name} | {case.dtype} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
