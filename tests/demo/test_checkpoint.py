"""Checkpoints: what was cut off does not count, what is damaged is refused, two are kept."""

import shutil

import jax
import numpy as np
import pytest

from flax_mha.demo import checkpoint
from flax_mha.demo.settings import DemoError


def state(scale):
    arrays = {"kernel": np.arange(3000, dtype=np.float32).reshape(30, 100) * scale}
    return {"params": arrays, "optimizer": (np.int32(4) * np.ones((), np.int32), ())}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_what_is_saved_comes_back_and_two_are_kept(tmp_path):
    assert checkpoint.steps(tmp_path) == []
    for step in (5, 20, 100):
        checkpoint.save(tmp_path, step, state(step))
    assert checkpoint.steps(tmp_path) == [20, 100]
    assert {path.name for path in tmp_path.iterdir()} == {"20", "20.json", "100", "100.json"}
    assert_equal(checkpoint.restore(tmp_path, 100, state(0)), state(100))
    assert_equal(checkpoint.restore(tmp_path, 20, state(0)), state(20))


def test_one_that_was_cut_off_does_not_count_and_goes(tmp_path):
    checkpoint.save(tmp_path, 1, state(1))
    checkpoint.save(tmp_path, 2, state(2))
    (tmp_path / "2.json").unlink()
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.save(tmp_path, 2, state(7))
    assert {path.name for path in tmp_path.iterdir()} == {"1", "1.json", "2", "2.json"}
    assert_equal(checkpoint.restore(tmp_path, 2, state(0)), state(7))


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "one bit": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + b"x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_found(tmp_path, damage):
    checkpoint.save(tmp_path / "whole", 8, state(1))
    count = len(files_of(tmp_path / "whole" / "8"))
    assert count > 5
    for i in range(count):
        broken = tmp_path / f"broken_{i}"
        shutil.copytree(tmp_path / "whole", broken)
        path = files_of(broken / "8")[i]
        DAMAGES[damage](path)
        with pytest.raises(DemoError, match=r"8 is damaged: 1 of its files.*Delete .*8.json"):
            checkpoint.restore(broken, 8, state(0))


def test_a_flipped_bit_of_an_array_which_orbax_does_not_see(tmp_path):
    checkpoint.save(tmp_path, 8, state(1))
    largest = max(files_of(tmp_path / "8"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(DemoError, match="8 is damaged"):
        checkpoint.restore(tmp_path, 8, state(0))


def test_another_model_does_not_fit(tmp_path):
    checkpoint.save(tmp_path, 8, state(1))
    for other in ({"params": np.zeros(3)}, {**state(1), "params": {"kernel": np.zeros((3, 3))}}):
        with pytest.raises(DemoError, match="8 does not fit the run's settings"):
            checkpoint.restore(tmp_path, 8, other)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "{}", '{"arrays": {}}', '{"arrays": 1, "sha256": 2}']
)
def test_a_list_that_is_damaged_is_told(tmp_path, content):
    """As a machine leaves it that lost its power: the checkpoint before it is one command away."""
    checkpoint.save(tmp_path, 4, state(4))
    checkpoint.save(tmp_path, 8, state(8))
    (tmp_path / "8.json").write_text(content)
    with pytest.raises(DemoError, match=r"8 is damaged: its list .*Delete .*8.json to go back"):
        checkpoint.restore(tmp_path, 8, state(0))
    (tmp_path / "8.json").unlink()
    assert checkpoint.steps(tmp_path) == [4]
    assert_equal(checkpoint.restore(tmp_path, 4, state(0)), state(4))
