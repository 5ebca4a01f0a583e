"""What people install: a wheel and an sdist, in a venv without extras; what checkers say of it.

One venv is made by pip, which needs a package index; mypy and pyright are run where they are
installed, beside this Python or on the PATH.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = ROOT / "tests" / "support" / "example_project"
BUILD = """
import sys, hatchling.build as b
print(b.build_wheel(sys.argv[1]), b.build_sdist(sys.argv[1]))
"""
IMPORT_ALL = """
import importlib, json, pkgutil, flax_mha
names = [m.name for m in pkgutil.walk_packages(flax_mha.__path__, "flax_mha.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
import sys
extras = "h5py keras safetensors torch matplotlib sklearn transformers equinox haiku".split()
print(json.dumps([flax_mha.__file__, len(names), [name for name in extras if name in sys.modules]]))
"""
# What needs an extra, called without it.
NEEDS = """
import pathlib, sys
import numpy as np
from flax_mha.interop.huggingface import load_attention
from flax_mha.interop.keras import load_keras_file
from flax_mha.plots import plot_attention

folder = pathlib.Path(sys.argv[1])
(folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 16, \
"num_attention_heads": 2, "num_hidden_layers": 1}')
for name in ("model.safetensors", "layer.h5"):
    (folder / name).write_bytes(b"\\x02" + 7 * b"\\0" + b"{}")
calls = {
    "plots": lambda: plot_attention(np.ones((1, 2, 2))),
    "safetensors": lambda: load_attention(folder),
    "keras": lambda: load_keras_file(folder / "layer.h5"),
}
for extra, call in calls.items():
    try:
        call()
    except ImportError as error:
        assert f"pip install 'flax_mha[{extra}]'" in str(error), (extra, error)
    else:
        raise SystemExit(f"{extra} was not needed")
"""

pytestmark = pytest.mark.slow


def ran(*command, **how):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **how)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def new_venv(folder, *packages):
    ran(sys.executable, "-m", "venv", folder)
    ran(folder / "bin" / "pip", "install", "--quiet", *packages)
    return folder / "bin" / "python"


def sources(tree, folder):
    files = (path for path in (tree / folder).rglob("*") if path.is_file())
    return {path.relative_to(tree) for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist of a copy of the tree."""
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(
        ".*_cache", "__pycache__", ".git", ".hypothesis", "runs", ".venv"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    python = new_venv(folder / "builder", "hatchling")
    names = ran(python, "-c", BUILD, folder, cwd=folder / "tree").split()[-2:]
    return [folder / name for name in names]


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """The Python of a venv that has the wheel, and nothing that no dependency brings."""
    return new_venv(tmp_path_factory.mktemp("clean") / "venv", built[0])


def test_the_wheel_has_every_file_of_the_package_and_no_other(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    package = {path.as_posix() for path in sources(built[0].parent / "tree", "flax_mha")}
    assert {name for name in names if ".dist-info/" not in name} == package
    assert {"flax_mha/py.typed", "flax_mha/guides/masks.md", "flax_mha/demo/page.html"} <= package
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_has_what_the_wheel_and_the_demo_are_made_of(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    for folder in ("flax_mha", "configs", "notebooks", "tests"):
        assert sources(tree, folder) == sources(built[0].parent / "tree", folder)
    top = {path.name for path in tree.iterdir()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= top
    python = built[0].parent / "builder" / "bin" / "python"
    again = ran(python, "-c", BUILD, tmp_path, cwd=tree).split()[-2]
    names = [set(zipfile.ZipFile(path).namelist()) for path in (built[0], tmp_path / again)]
    assert names[0] == names[1]


def test_without_extras_every_module_imports_and_the_library_works(python, tmp_path):
    file, count, extras = json.loads(ran(python, "-c", IMPORT_ALL, cwd=tmp_path).splitlines()[-1])
    assert pathlib.Path(file).is_relative_to(python.parents[1])
    assert count > 300
    assert extras == []
    assert "(2, 6, 32) (2, 6, 32)" in ran(python, PROJECT / "right_uses.py", cwd=tmp_path)
    assert "# Masks" in ran(python, "-m", "flax_mha", "guide", "masks", cwd=tmp_path)
    assert "train" in ran(python, "-m", "flax_mha.demo", "--help", cwd=tmp_path)


def test_what_needs_an_extra_says_which(python, tmp_path):
    ran(python, "-c", NEEDS, tmp_path, cwd=tmp_path)
    config = ROOT / "configs" / "digits.toml"
    for options in ([], ["--no-plots"]):  # matplotlib's, and scikit-learn's
        command = [python, "-m", "flax_mha.demo", "train", config, *options]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2
        assert "Run `pip install 'flax_mha[demo]'`" in result.stderr


def checker(name):
    beside = pathlib.Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        how = "pip install -e '.[lint]', as .ci/run does"
        pytest.skip(reason=f"{name}, a type checker, is not installed: {how}")
    return found


def lines_found(name, python, file, tmp_path):
    """The numbers of the lines that a checker finds fault with."""
    if name == "mypy":  # optax and others bring no types
        options = [
            "--strict",
            "--ignore-missing-imports",
            "--config-file=",
            "--cache-dir",
            tmp_path,
        ]
        command = [checker(name), *options, "--python-executable", python, file]
    else:
        command = [checker(name), "--pythonpath", python, file]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode in (0, 1), result.stderr
    return {
        int(line) for line in re.findall(rf"{file.name}:(\d+):.* error: ", "\n" + result.stdout)
    }


@pytest.mark.parametrize("name", ["mypy", "pyright"])
def test_a_typed_project_has_no_error_and_a_wrong_one_every(python, tmp_path, name):
    wrong = PROJECT / "wrong_uses.py"
    lines = enumerate(wrong.read_text().splitlines(), 1)
    marked = {number for number, line in lines if line.endswith("# wrong")}
    assert len(marked) >= 5
    assert lines_found(name, python, PROJECT / "right_uses.py", tmp_path) == set()
    assert lines_found(name, python, wrong, tmp_path) == marked
