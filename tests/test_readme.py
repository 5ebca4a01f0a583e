"""Every Python block of the README and of the guides runs, and prints what its comments say."""

import pathlib
import re

import checkpoints
import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "flax_mha" / "guides").glob("*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


BLOCKS = {
    f"{page.stem}-{i}": (page.name, block)
    for page in PAGES
    for i, block in enumerate(blocks(page), start=1)
}


def test_blocks_are_found():
    found = {page.stem: len(blocks(page)) for page in PAGES}
    assert found == {page.stem: page.read_text().count("```python") for page in PAGES}
    assert found["README"] >= 1
    assert len(BLOCKS) == sum(found.values()) >= 14


# Those of the guides run with the slow tests, all of them.
ROWS = [
    pytest.param(name, marks=[] if name.startswith("README") else pytest.mark.slow)
    for name in BLOCKS
]


@pytest.mark.parametrize("name", ROWS)
def test_block_runs_and_prints_what_it_says(name, capsys, tmp_path, monkeypatch):
    page, block = BLOCKS[name]
    checkpoints.write(tmp_path / "my_model")  # which the README takes for the reader's own
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, page, "exec"), {})
    promised = [line.split("#", 1)[1].strip() for line in block.splitlines() if "print(" in line]
    assert capsys.readouterr().out.splitlines() == promised


def test_the_two_commands_are_single_lines():
    commands = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    setups = [command for command in commands if command.startswith("python3 -m venv .venv && ")]
    assert [command.count("\n") for command in setups] == [1, 1]
    assert "flax_mha.demo train" in setups[0]
    assert "pytest" in setups[1]
