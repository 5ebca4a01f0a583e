"""The text: split without overlap, the same every time; windows lie inside it."""

import pathlib
import tomllib

import numpy as np
import pytest

from flax_mha.demo.data import text as texts
from flax_mha.demo.data.text import TextSettings
from flax_mha.demo.settings import DemoError


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library, each file of one letter of its own."""
    for name in ("a.py", "b.py", "c/d.py", "e.py", "test/f.py", "site-packages/g.py", "h.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(path.stem.encode() * 10)
    monkeypatch.setattr(texts.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})


@pytest.mark.usefixtures("library")
def test_every_second_file_is_held_out_whole():
    split = texts.load_split(TextSettings(held_out_every=2))
    assert split.train.tobytes() == b"b" * 10 + b"e" * 10
    assert split.held_out.tobytes() == b"a" * 10 + b"d" * 10


@pytest.mark.usefixtures("library")
def test_caps():
    split = texts.load_split(TextSettings(max_bytes=25, held_out_bytes=12, held_out_every=2))
    assert split.train.tobytes() == b"b" * 10
    assert split.held_out.tobytes() == b"a" * 10 + b"d" * 2


@pytest.mark.slow
def test_the_real_library_is_split_the_same_every_time():
    settings = TextSettings(max_bytes=400_000, held_out_bytes=4000)
    first, second = texts.load_split(settings), texts.load_split(settings)
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.held_out, second.held_out)
    assert len(first.held_out) == 4000
    assert 200_000 < len(first.train) < 400_000
    assert b"import" in first.train.tobytes()
    assert first.held_out.tobytes()[:1000] not in first.train.tobytes()


def test_a_file_is_cut_at_its_tail(tmp_path):
    text = bytes(range(100)) * 2
    path = tmp_path / "text.bin"
    path.write_bytes(text)
    split = texts.load_split(TextSettings(file=str(path), held_out_bytes=15))
    assert (split.train.tobytes(), split.held_out.tobytes()) == (text[:185], text[185:])
    tenth = texts.load_split(TextSettings(file=str(path), held_out_bytes=1000))
    assert (len(tenth.train), len(tenth.held_out)) == (180, 20)
    capped = texts.load_split(TextSettings(file=str(path), max_bytes=50, held_out_bytes=1000))
    assert capped.train.tobytes() + capped.held_out.tobytes() == text[:50]


def test_bad_files(tmp_path):
    with pytest.raises(DemoError, match=r"cannot read the text: .*nothing"):
        texts.load_split(TextSettings(file=str(tmp_path / "nothing")))
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(DemoError, match="too little text in short: 3 training and 0 held-out"):
        texts.load_split(TextSettings(file=str(tmp_path / "short")))


def test_windows_are_contiguous_reach_both_ends_and_repeat_with_the_seed():
    text = np.arange(13, dtype=np.uint8)
    batches = texts.windows(text, 5, 64, seed=3)
    batch = next(batches)
    assert batch.shape == (64, 5)
    np.testing.assert_array_equal(np.diff(batch, axis=1), 1)
    assert (batch.min(), batch.max()) == (0, 12)
    np.testing.assert_array_equal(batch, next(texts.windows(text, 5, 64, seed=3)))
    assert (batch != next(batches)).any()
    assert (batch != next(texts.windows(text, 5, 64, seed=4))).any()


def test_windows_go_on_after_those_that_are_done():
    text = np.arange(200, dtype=np.uint8)
    batches = texts.windows(text, 5, 3, seed=1)
    for _ in range(4):
        next(batches)
    later = texts.windows(text, 5, 3, seed=1, done=4)
    for _ in range(2):
        np.testing.assert_array_equal(next(later), next(batches))


def test_text_shorter_than_a_window():
    with pytest.raises(DemoError, match="3 training bytes hold no window of 5"):
        next(texts.windows(np.zeros(3, np.uint8), 5, 1, seed=0))


def test_what_is_not_said_is_as_in_the_committed_config():
    """Whose figures the guide tells: a file that leaves `[data]` out trains on the same text."""
    path = pathlib.Path(__file__).parents[2] / "configs" / "python_lm.toml"
    assert TextSettings(**tomllib.loads(path.read_text())["data"]) == TextSettings()
