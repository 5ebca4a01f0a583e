"""Tiny models of transformers, made when they are first asked for."""

import functools
import os

import pytest

ABSENT = "torch, transformers or safetensors is not installed: pip install -e '.[test-models]'"


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """By family: its folder, and the calls of its attention by their names there."""
    folders = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folders = folders.parent  # the same for all workers
    folders = folders / "families"
    folders.mkdir(exist_ok=True)
    model_recordings = pytest.importorskip("model_recordings", reason=ABSENT)
    return functools.cache(lambda name: model_recordings.recorded(name, folders))
