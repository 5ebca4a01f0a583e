"""A whole run: read, train, judge, show, draw; and the same from a checkpoint on."""

import contextlib
import dataclasses
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flax_mha.demo import checkpoint, plots, train
from flax_mha.demo.config_file import with_mesh
from flax_mha.demo.directory import Records, RunDirectory, how_to_resume
from flax_mha.demo.extras import require
from flax_mha.demo.mesh import check_mesh, gathered, layout, make_mesh
from flax_mha.demo.pictures import write_maps
from flax_mha.demo.processes import Place, agree, any_of, is_first, join, part
from flax_mha.demo.settings import DemoError, Settings
from flax_mha.demo.tasks import TASKS
from flax_mha.demo.tasks.contract import Task
from flax_mha.demo.terminal import Screen


class Interrupted(Exception):
    """Ctrl-C, with what to do next."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the parts of a run share."""

    task: Task
    directory: RunDirectory
    records: Records
    screen: Screen
    mesh: Mesh
    place: Place | None  # of this process, if it is one of many

    @property
    def resume_command(self) -> str:
        """What to type."""
        return how_to_resume(self.directory, self.place)

    def stops(self, is_asked: bool, records_are_due: bool) -> bool:
        """Alone at once; of many processes all must hear of it, which they do at every record."""
        return is_asked if self.place is None else records_are_due and any_of(is_asked)


def start(
    settings: Settings,
    path: Path,
    *,
    pictures: bool = True,
    overwrite: bool = False,
    place: Place | None = None,
) -> None:
    """Trains, prints what came of it, and leaves the run's files in `path`."""
    task, directory, screen = _task(settings, pictures), RunDirectory(path), _screen(place)
    check_mesh(settings)
    directory.check_free(overwrite)
    screen.say(task.about())
    fingerprint = _fingerprint(task)
    mesh = _met(place, task, fingerprint, step=0)
    train.abstract_state(task, mesh)
    if is_first():
        directory.begin(settings, overwrite)
    run = Run(task, directory, Records(directory, is_first()), screen, mesh, place)

    def begin() -> tuple[train.State, int]:
        run.records.add("start", first_batch_sha256=fingerprint)
        return train.initial_state(task), 0

    _go_on(run, begin, pictures)


def resume(
    path: Path,
    *,
    pictures: bool = True,
    overrides: Sequence[str] = (),
    place: Place | None = None,
) -> None:
    """Goes on from the last checkpoint, to the numbers that an uninterrupted run has.

    `overrides` may change the mesh.
    """
    directory, screen = RunDirectory(path), _screen(place)
    settings = with_mesh(directory.read_settings(), overrides)
    task, total = _task(settings, pictures), settings.train.steps
    check_mesh(settings)
    if directory.is_finished:
        screen.say(f"{path} is finished: all {total} steps are done.")
        return
    step, fingerprint = _last_step(directory), _fingerprint(task)
    started = Records(directory).of("start")
    if not started or started[0]["first_batch_sha256"] != fingerprint:
        rule = f"the data are not those that {path} began with"
        raise DemoError(f"{rule}: their first batch differs. Train anew with `train CONFIG`.")
    mesh = _met(place, task, fingerprint, step)
    like = train.abstract_state(task, mesh)
    state = checkpoint.restore(directory.checkpoints, step, like, layout(mesh, task, like))
    run = Run(task, directory, Records(directory, is_first()), screen, mesh, place)

    def begin() -> tuple[train.State, int]:
        run.records.go_back(step)
        if is_first() and overrides:
            directory.write_settings(settings)
        screen.say(f"Resuming after step {step} of {total}.")
        return state, step

    _go_on(run, begin, pictures)


def inspect(path: Path, text: str | None, *, pictures: bool = True) -> None:
    """Writes what the attention of a run looks at, and says where."""
    if pictures:
        require("matplotlib", "the pictures", "or pass --no-plots")
    task, params, screen = opened(path)
    title = _title(task)
    for file in write_maps(task.maps(params, text), title, path, pictures=pictures):
        screen.say(str(file))


def _title(task: Task) -> str:
    return f"What the attention of the task {task.settings.task!r} looks at"


def opened(path: Path) -> tuple[Task, Any, Screen]:
    """The task and the parameters of a run, which need not be finished, and where to print."""
    directory, screen = RunDirectory(path), Screen()
    task = _task(directory.read_settings(), pictures=False)
    state, step = load(directory, task)
    if not directory.is_finished:
        screen.say(f"{path} is not finished: this is step {step} of {task.settings.train.steps}.")
    return task, state.params, screen


def load(directory: RunDirectory, task: Task) -> tuple[train.State, int]:
    """The last state of a run, and its step.

    Raises:
        DemoError: there is none, or it is damaged.
    """
    step = _last_step(directory)
    return checkpoint.restore(directory.checkpoints, step, train.abstract_state(task)), step


def _last_step(directory: RunDirectory) -> int:
    step = directory.last_step
    if step is None:
        rule = f"{directory.path} has no whole checkpoint yet: nothing was saved"
        raise DemoError(f"{rule}. Train it again with `train CONFIG`.")
    return step


def _screen(place: Place | None) -> Screen:
    """Of many processes the first one prints; errors are printed by all."""
    return Screen(quiet=place is not None and place.number > 0)


def _met(place: Place | None, task: Task, fingerprint: str, step: int) -> Mesh:
    """The mesh, of this process's devices and those of all others that are of one mind with it."""
    join(place)
    tables = task.settings.to_dict()
    mine = {f"{name}.{key}": tables[name][key] for name in tables for key in tables[name]}
    mine |= {"jax": jax.__version__, "the first batch": fingerprint, "the step": step}
    agree(place, mine)
    return make_mesh(task.settings.mesh)


def _task(settings: Settings, pictures: bool) -> Task:
    if pictures:
        require("matplotlib", "the pictures", "or pass --no-plots")
    return TASKS[settings.task](settings)


def _fingerprint(task: Task) -> str:
    """Of the first batch: other data, or another order of them, would have another."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(next(task.batches(0))):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def _go_on(run: Run, begin: Callable[[], tuple[train.State, int]], pictures: bool) -> None:
    started = time.perf_counter()
    try:
        state = _learn(run, *begin())
        _finish(run, state, pictures)
    except KeyboardInterrupt:
        raise Interrupted(_how_to_go_on(run)) from None
    except OSError as error:
        raise DemoError(f"cannot write the run's files: {error}; {_how_to_go_on(run)}") from error
    seconds = time.perf_counter() - started
    run.screen.say(f"\n{seconds:.0f} seconds in all. Files: {run.directory.path}/")


def _how_to_go_on(run: Run) -> str:
    step = run.directory.last_step
    if step is None:
        return "interrupted before the first checkpoint: nothing to continue from"
    return f"interrupted at step {step}; continue with: {run.resume_command}"


def _learn(run: Run, start: train.State, done: int) -> train.State:
    """The trained state; a bar shows the way there. Ctrl-C saves what there is."""
    settings = run.task.settings.train
    step, state = done, start
    due = lambda every: step % every == 0 or step == settings.steps  # noqa: E731
    with _ctrl_c_asks() as is_asked, run.screen.bar(run.task.unit) as bar:
        row = bar.add_task("compiling", total=settings.steps, completed=done, speed=0.0)
        since = _Since(done, time.perf_counter())
        for step, state in train.fit(run.task, start, done, run.mesh):
            stopping = run.stops(is_asked(), due(settings.log_every))
            if due(settings.log_every):
                bar.update(row, completed=step, **_record_loss(run, state, step, since))
            if due(settings.eval_every):
                run.records.add("held_out", step=step, **run.task.glance(gathered(state.params)))
            if stopping or due(settings.checkpoint_every):
                checkpoint.save(run.directory.checkpoints, step, state)
            if stopping:
                part()
                raise KeyboardInterrupt
            if due(settings.log_every):
                since = _Since(step, time.perf_counter())
    return state


class _Since(NamedTuple):
    """Where the speed is counted from."""

    step: int
    seconds: float


def _record_loss(run: Run, state: train.State, step: int, since: _Since) -> dict[str, Any]:
    """A record; what the bar shows of it."""
    loss = train.recent_loss(state, step)
    ((name, value),) = run.task.measures(loss).items()
    seconds = time.perf_counter() - since.seconds
    speed = (step - since.step) * run.task.units_a_step / seconds
    rate = float(train.learning_rate(run.task.settings.train)(step - 1))
    values = {"learning_rate": rate, "units_per_second": speed, name: value}
    run.records.add("train", step=step, loss=loss, **values)
    return {"description": f"{value:.3f} {name.replace('_', ' ')}", "speed": speed}


@contextlib.contextmanager
def _ctrl_c_asks() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of a step, whose state is whole; a second Ctrl-C does not."""
    asked = threading.Event()

    def ask(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(run: Run, state: train.State, pictures: bool) -> None:
    """Judges, shows and draws; then the run is finished. Of many processes one shows and draws."""
    params = gathered(state.params)
    results = run.task.judge(params, run.screen)
    for result in results:
        run.records.add("result", **result)
    if not is_first():
        return
    made = run.task.show(params, run.screen)
    if made:
        (run.directory.path / "sample.txt").write_text(made, encoding="utf-8")
    if pictures:
        write_maps(run.task.maps(params), _title(run.task), run.directory.path)
        lines = run.task.yardsticks(results)
        plots.plot_training(run.records, lines, run.directory.path / "loss.png")
    run.directory.end()
