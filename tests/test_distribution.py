"""What people get: a folder that imports wherever it is copied, one address in every place."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import flax_mha

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "flax_mha"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCE = PROJECT["project"]["urls"]["Source"]
OWNER_AND_NAME = r"(?:github(?:usercontent)?\.com|google\.com/github)/([\w.-]+/flax_mha)\b"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "pyproject.toml")),
    *(path for end in ("md", "py") for path in PACKAGE.rglob(f"*.{end}")),
    *(ROOT / "notebooks").glob("*.ipynb"),
    *(ROOT / "configs").glob("*.toml"),
]

NO_METADATA = """
import importlib.metadata, sys

def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = absent
sys.path.insert(0, sys.argv[1])
import flax_mha, flax_mha.nnx, flax_mha.interop.torch
print(flax_mha.__file__, flax_mha.__version__)
"""


@pytest.mark.slow
def test_a_plain_copy_of_the_folder_imports(tmp_path):
    """As people copy a package into Colab: not installed, and so without metadata."""
    shutil.copytree(PACKAGE, tmp_path / "flax_mha", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", NO_METADATA, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        str(tmp_path / "flax_mha" / "__init__.py"),
        flax_mha.__version__,
    ]


def test_the_version_stands_once():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "flax_mha/__init__.py"
    assert "version" not in PROJECT["project"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", flax_mha.__version__)
    assert f"## {flax_mha.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def addresses(text):
    return set(re.findall(OWNER_AND_NAME, text))


def test_the_repository_has_one_address():
    """An owner changes it by one search, for `flax-mha/flax_mha`."""
    found = {str(path.relative_to(ROOT)): addresses(path.read_text("utf-8")) for path in PAGES}
    named = {name: names for name, names in found.items() if names}
    owner_and_name = SOURCE.removeprefix("https://github.com/")
    assert named == {name: {owner_and_name} for name in named}
    assert {"README.md", "pyproject.toml", "notebooks/5_generate.ipynb"} <= set(named)
    colab = "https://colab.research.google.com/github/someone/flax_mha/blob/main/x.ipynb"
    assert addresses(f"{SOURCE} {colab}") == {owner_and_name, "someone/flax_mha"}
