"""What a run of the demo came to: its figures and its last state."""

import itertools

from flax_mha.demo.directory import RunDirectory
from flax_mha.demo.run import load
from flax_mha.demo.tasks import TASKS


def figures(run, out):
    """All that a run measured, but how fast it was."""
    rows = itertools.chain(*(run.records(event, out) for event in ("train", "held_out", "result")))
    return [{k: row[k] for k in row if k != "units_per_second"} for row in rows]


def last_state(out):
    """The newest state, which is that of the newest checkpoint, and its step."""
    directory = RunDirectory(out)
    settings = directory.read_settings()
    return load(directory, TASKS[settings.task](settings))


def final_state(out):
    state, step = last_state(out)
    assert step == RunDirectory(out).read_settings().train.steps
    return state
