"""The kept figures against the TPU's compiler of today, as `bench aot` reads it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("libtpu", reason="libtpu: not installed: pip install 'jax[tpu]'")

FIGURES = pathlib.Path(__file__).parent / "figures.json"


def run(*words):
    command = [sys.executable, "-m", "flax_mha.bench", "aot", *words]
    clean = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, env=clean, capture_output=True, text=True)


def test_an_unknown_topology_is_said():
    result = run("--topology", "v9:1x1")
    assert result.returncode == 2
    assert "no topology 'v9:1x1' (such are v5e:2x2, v5p:2x2x1, v6e:2x2)" in result.stderr


@pytest.mark.slow
def test_the_kernel_s_kept_figures_have_not_grown(tmp_path):
    """Those of causal attention; the guide has the commands for all and to write them anew."""
    kept = json.loads(FIGURES.read_text())
    kept["cycles"] = {x: y for x, y in kept["cycles"].items() if "|causal|pallas_tpu|" in x}
    assert len(kept["cycles"]) == 4
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    result = run("--check", str(tmp_path / "kept.json"))
    if result.returncode == 3:
        assert "another compiler counts otherwise" in result.stdout
        pytest.skip(result.stdout.strip())  # names both compilers
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 programs held against" in result.stdout
