"""Every Python block of the README runs, and what it prints stands in its comments."""

import pathlib
import re

import jax
import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_blocks_are_found():
    assert len(BLOCKS) == README.count("```python") >= 4


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[2][:40] for block in BLOCKS])
def test_block_runs_and_prints_what_it_says(block, capsys):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(block, "README.md", "exec"), {})
    promised = [line.split("#", 1)[1].strip() for line in block.splitlines() if "print(" in line]
    assert capsys.readouterr().out.splitlines() == promised


def test_the_two_commands_are_single_lines():
    commands = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    setups = [command for command in commands if command.startswith("python3 -m venv .venv && ")]
    assert [command.count("\n") for command in setups] == [1, 1]
    assert "flax_mha.demo train" in setups[0]
    assert "pytest" in setups[1]
