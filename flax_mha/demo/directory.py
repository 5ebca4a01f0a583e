"""The directory of a run, which says whether the run is finished.

    UNFINISHED       there until all is done; says how to go on
    settings.json    what was asked for
    metrics.jsonl    one JSON line a record: start, train, held_out, result
    checkpoints/     the two newest states
    adapters/NAME/   what `adapt` has learned from other texts: adapters.py
    ...              pictures, and what the task makes

The files are written as the run goes on, so that a run that was killed has lost little.
"""

import contextlib
import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from flax_mha.demo import checkpoint
from flax_mha.demo.config_file import settings_from
from flax_mha.demo.processes import Place
from flax_mha.demo.settings import DemoError, Settings

_COMMAND = "python -m flax_mha.demo"
# What --overwrite removes: other files in the directory are not the run's. The settings say that
# there is one: they go last, for without them what is left of a removal that was killed stays.
_OURS = (
    *("metrics.jsonl", "sample.txt", "loss.png"),
    *("attention.html", "attention.png", "attention-*.png", "params.msgpack", "settings.json"),
)


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Where the files of one run are."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """The first file to be there."""
        return self.path / "settings.json"

    @property
    def checkpoints(self) -> Path:
        """See `checkpoint.py`."""
        return self.path / "checkpoints"

    @property
    def adapters(self) -> Path:
        """See `adapters.py`."""
        return self.path / "adapters"

    @property
    def last_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return max(checkpoint.steps(self.checkpoints), default=None)

    @property
    def is_finished(self) -> bool:
        """Whether training ended, and all that follows it."""
        return self.settings_file.is_file() and not self._marker.exists()

    @property
    def resume_command(self) -> str:
        """What to type."""
        return self.command("resume")

    def command(self, name: str) -> str:
        """What to type, of this run."""
        return f"{_COMMAND} {name} {shlex.quote(str(self.path))}"

    @property
    def _marker(self) -> Path:
        return self.path / "UNFINISHED"

    def begin(self, settings: Settings, overwrite: bool) -> None:
        """Makes the directory of a new run.

        Raises:
            DemoError: it holds a run already, or cannot be written.
        """
        self.check_free(overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._marker.write_text(f"This run is not finished. Continue: {self.resume_command}\n")
            if self.settings_file.exists():
                self._clear()
            self.write_settings(settings)
        except OSError as error:
            raise DemoError(f"cannot write the run's files: {error}") from error

    def write_settings(self, settings: Settings) -> None:
        """What was asked for, and the mesh it goes on with."""
        checkpoint.write_at_once(
            self.settings_file, json.dumps(settings.to_dict(), indent=2) + "\n"
        )

    def check_free(self, overwrite: bool) -> None:
        """A run is replaced only where that was asked for; without a checkpoint it is none yet."""
        if self.checkpoints.exists() and not self.settings_file.exists():
            rule = f"{self.path} holds `checkpoints` that are no run's: settings.json is not there"
            raise DemoError(f"{rule}. Choose another place with --out DIR.")
        is_run = self.is_finished or self.last_step is not None
        if is_run and not overwrite:
            state = "a finished run" if self.is_finished else f"a run up to step {self.last_step}"
            remedy = "Choose another place with --out DIR, or replace it with --overwrite"
            resume = "" if self.is_finished else f", or continue: {self.resume_command}"
            raise DemoError(f"{self.path} holds {state} already. {remedy}{resume}")

    def end(self) -> None:
        """All is done."""
        self._marker.unlink()

    def read_settings(self) -> Settings:
        """The settings of the run.

        Raises:
            DemoError: the directory holds no run, or one of an older version of the demo.
        """
        try:
            tables = json.loads(self.settings_file.read_text(encoding="utf-8"))
        except OSError as error:
            remedy = f"Train one: {_COMMAND} train configs/digits.toml"
            raise DemoError(f"{self.path} is not a run: no settings.json. {remedy}") from error
        except (ValueError, RecursionError) as error:
            raise DemoError(f"{self.settings_file} is not valid JSON: {error}") from error
        if not isinstance(tables, dict):
            raise DemoError(f"{self.settings_file} holds no settings. Received: {tables!r}.")
        if "task" not in tables:
            rule = f"{self.path} is a run of an older version: its settings name no task"
            raise DemoError(f"{rule}. Train it again with `train CONFIG --overwrite`.")
        return settings_from(tables)

    def _clear(self) -> None:
        if self.checkpoints.exists():
            shutil.rmtree(self.checkpoints)
        for path in self.adapters.glob("*/adapter.json"):
            shutil.rmtree(path.parent)
        for pattern in _OURS:
            for path in self.path.glob(pattern):
                path.unlink()


def how_to_resume(directory: RunDirectory, place: Place | None) -> str:
    """The command; of many processes, this one's."""
    return directory.resume_command + ("" if place is None else f" {place.options}")


def after_a_loss(path: Path, place: Place) -> str:
    """What a process says when another one, or its own work, was lost."""
    directory = RunDirectory(path)
    if directory.last_step is None:
        return "Nothing was saved yet: start all processes again, by the same commands"
    command = how_to_resume(directory, place)
    elsewhere = f"{directory.resume_command} --set mesh.data=N"
    step = f"from step {directory.last_step} on"
    return (
        f"Start all processes again, {step}, each with its number: {command}\n"
        f"or go on on other devices: {elsewhere}"
    )


class Records:
    """`metrics.jsonl`, and the same records in memory for the picture of the training.

    Of many processes one writes.
    """

    def __init__(self, run: RunDirectory, writes: bool = True) -> None:
        """Reads what is there; a last line that was cut off does not count.

        Raises:
            DemoError: another line is damaged.
        """
        self._writes = writes
        self._path = run.path / "metrics.jsonl"
        text = self._path.read_bytes() if self._path.exists() else b""
        whole = (line for line in text.splitlines(True) if line.endswith(b"\n"))
        self.rows = [self._row(*numbered) for numbered in enumerate(whole, 1)]

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "event" in row:
                return row
        rule = f"line {number} of {self._path} is damaged: it holds no record"
        raise DemoError(f"{rule}. Delete the line to go on without it.")

    def go_back(self, step: int) -> None:
        """Forgets what came after a step, for it is about to come again."""
        earlier = lambda row: row["event"] == "start" or row.get("step", step + 1) <= step  # noqa: E731
        self.rows = [row for row in self.rows if earlier(row)]
        if self._writes:
            checkpoint.write_at_once(self._path, "".join(map(_line, self.rows)))

    def add(self, event: str, **values: Any) -> None:
        """Writes one JSON line."""
        self.rows.append({"event": event, **values})
        if self._writes:
            with self._path.open("a") as file:
                file.write(_line(self.rows[-1]))

    def of(self, event: str) -> list[dict[str, Any]]:
        """The records of one kind."""
        return [row for row in self.rows if row["event"] == event]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
