"""`python -m flax_mha`: everything that there is, 80 columns wide, without any extra.

Its command `guide` is tested in tests/guides, `explain` in tests/commands.
"""

import os
import subprocess
import sys

import pytest

import flax_mha
from flax_mha import __main__ as overview
from flax_mha.attention.choice import RULE
from flax_mha.guides import pages

PUBLIC = {
    name
    for name, value in vars(flax_mha).items()
    if callable(value) and value.__module__.startswith("flax_mha.")
}

EXTRAS = ("matplotlib", "keras", "h5py", "torch", "safetensors", "equinox", "haiku")
BARE = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({EXTRAS}))  # importing one of them fails now
runpy.run_module("flax_mha", run_name="__main__")
"""


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment},
    )


@pytest.mark.slow
def test_it_prints_everything_without_any_extra():
    result = run("-c", BARE)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    named = {line.split()[0] for line in lines if line.startswith("  ") and line.split()}
    modules = {
        "flax_mha.nnx",
        "flax_mha.positions",
        "flax_mha.attention",
        "flax_mha.interop.keras",
    }
    assert PUBLIC | modules | {"reference", "blockwise", "None"} <= named
    assert set(pages.topics()) <= named
    flat = " ".join(result.stdout.split())
    assert f"flax_mha {flax_mha.__version__}: Keras's MultiHeadAttention" in flat
    assert RULE in flat
    assert "python -m flax_mha.bench" in flat
    assert "python -m flax_mha.demo" in flat
    assert "python -m flax_mha guide TOPIC" in flat
    assert "python -m flax_mha explain Which implementation serves a call" in flat
    assert "JAX runs on cpu: 1 x cpu" in flat


def test_every_export_stands_below_one_heading():
    files = [file for group in overview.GROUPS.values() for file in group]
    assert sorted(files) == sorted(overview.exports())
    names = [name for exported in overview.exports().values() for name in exported]
    assert sorted(names) == sorted(PUBLIC)


def test_every_line_is_a_docstring():
    modules = [*overview.submodules(), *overview.commands()]
    lines = [overview.summary_of_name(name) for name in PUBLIC]
    lines += [overview.summary(module) for module in modules]
    lines += overview.implementations().values()
    assert [line for line in lines if not line.endswith(".")] == []
    assert flax_mha.forward.__doc__.startswith(overview.summary_of_name("forward"))
    assert overview.__doc__.startswith(overview.summary("flax_mha.__main__"))


@pytest.mark.parametrize("name", ["short", "a_name_of_more_columns_than_its_place"])
def test_a_long_name_has_its_line_below(name):
    heading, *lines = list(overview.section("Names", {name: "word " * 40}))[1:]
    assert heading == "Names"
    assert " ".join(" ".join(lines).split()) == f"{name} {'word ' * 40}".strip()
    assert max(map(len, lines)) <= 80
    assert len({len(line) - len(line.lstrip()) for line in lines[1:]}) == 1


@pytest.mark.slow
def test_a_platform_that_is_not_there_is_said():
    result = run("-m", "flax_mha", JAX_PLATFORMS="tpu")
    assert result.returncode == 0
    assert "JAX runs on nothing, with JAX_PLATFORMS=tpu" in " ".join(result.stdout.split())


@pytest.mark.slow
def test_it_takes_no_other_argument():
    result = run("-m", "flax_mha", "train")
    assert (result.returncode, result.stdout) == (2, "")
    assert "invalid choice: 'train'" in result.stderr
    assert "guide" in result.stderr
