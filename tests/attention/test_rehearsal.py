"""`tests/accelerators` where there is no accelerator: one reason, or a rehearsal on the CPU."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Not needed there: with pytest, the package and what it needs alone, it is one command.
ABSENT = ("keras", "chex", "torch", "matplotlib", "equinox", "h5py", "tensorflow")


@pytest.fixture
def accelerators(tmp_path):
    """Runs the command of `tests/accelerators` where nothing optional is installed."""
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')")

    def run(*arguments, **variables):
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        given = {x: v for x, v in os.environ.items() if x not in ("JAX_PLATFORMS", "XLA_FLAGS")}
        command = [sys.executable, "-m", "pytest", "tests/accelerators", "-p", "no:xdist", "-q"]
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env=given | {"PYTHONPATH": path, **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.slow
def test_one_reason_is_printed(accelerators):
    done = accelerators(JAX_PLATFORMS="cpu")
    reasons = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(reasons) == 1, done.stdout
    assert "JAX has no accelerator here. Where there is one: `python -m pytest" in reasons[0]


@pytest.mark.slow
def test_a_rehearsal_runs_the_tests_on_the_cpu(accelerators):
    chosen = "(bfloat16 and causal and not long and not features) or (0.5 and float32)"
    done = accelerators("-k", chosen, JAX_PLATFORMS="cpu", FLAX_MHA_REHEARSAL="1")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
