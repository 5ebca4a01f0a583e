"""A whole run: read, train, judge, sample, draw; its files appear together at the end, or not."""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from flax import serialization
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flax_mha.demo import compressors, evaluate, generate, plots, tasks, train
from flax_mha.demo.model import Transformer
from flax_mha.demo.settings import DemoError, Settings

_HOW_TO_READ = """\
Every column compares on the same bytes. The compressors start each column from nothing; the model
has learned from the training text, and its {size:,} parameters are not counted."""


@dataclasses.dataclass
class Records:
    """`metrics.jsonl`, and the same records in memory for the loss curve."""

    file: TextIO
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, event: str, **values: Any) -> None:
        """Writes one JSON line."""
        self.rows.append({"event": event, **values})
        self.file.write(json.dumps(self.rows[-1]) + "\n")


def run(settings: Settings, split: tasks.Split, directory: Path, *, pictures: bool = True) -> None:
    """Trains, prints what came of it, and leaves the run's files in `directory`."""
    started = time.perf_counter()
    console = Console()
    if pictures:
        plots.require_matplotlib()
    model = train.make_model(settings)
    train.check_model(model, settings)
    with together(directory) as partial, (partial / "metrics.jsonl").open("w") as file:
        records = Records(file)
        (partial / "settings.json").write_text(json.dumps(settings.to_dict(), indent=2) + "\n")
        console.print(f"Text: {split.source}, {len(split.train):,} bytes to learn from.")
        params = _train(model, settings, split, records, console)
        (partial / "params.msgpack").write_bytes(serialization.to_bytes(jax.device_get(params)))
        baselines = _judge(model, params, settings, split, records, console)
        _sample(model, params, settings, partial / "sample.txt", console)
        if pictures:
            _draw(model, params, settings, split, records, baselines, partial)
    seconds = time.perf_counter() - started
    console.print(f"\n{seconds:.0f} seconds in all. Files: {directory}/", highlight=False)


@contextlib.contextmanager
def together(directory: Path) -> Iterator[Path]:
    """A place for files that move to `directory` when all are done, and vanish otherwise.

    Raises:
        DemoError: the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.TemporaryDirectory(dir=directory, prefix=".unfinished-")
    except OSError as error:
        raise DemoError(f"cannot write the run's files: {error}") from error
    try:
        with unfinished as name:
            yield Path(name)
            for path in sorted(Path(name).iterdir()):
                os.replace(path, directory / path.name)
    finally:
        with contextlib.suppress(OSError):  # not empty: this run's files, or an earlier one's
            directory.rmdir()


def _train(
    model: Transformer, settings: Settings, split: tasks.Split, records: Records, console: Console
) -> Any:
    """The trained parameters; a bar shows the way there."""
    glimpse, context = _prefixes(split.held_out)[0], settings.model.context
    with _bar(console) as bar:
        task = bar.add_task("compiling", total=settings.train.steps, speed=0.0)
        for report in train.fit(model, settings, split.train):
            description = f"{report.bits_per_byte:.3f} bits per byte"
            speed = report.tokens_per_second
            bar.update(task, completed=report.step, description=description, speed=speed)
            values = report._asdict() | {"bits_per_byte": report.bits_per_byte}
            records.add("train", **{name: values[name] for name in values if name != "params"})
            if _is_due(report.step, settings):
                bits = evaluate.bits_per_byte(model, report.params, glimpse, context)
                records.add("held_out", step=report.step, bits_per_byte=bits, bytes=len(glimpse))
    return report.params


def _is_due(step: int, settings: Settings) -> bool:
    return step % settings.train.eval_every < settings.train.log_every


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:,.0f} bytes/s"),
        TimeRemainingColumn(),
        console=console,
    )


def _judge(
    model: Transformer,
    params: Any,
    settings: Settings,
    split: tasks.Split,
    records: Records,
    console: Console,
) -> dict[str, float]:
    """Prints bits per byte beside the compressors'; returns theirs on the shorter prefix."""
    size = train.count_parameters(params)
    results = []
    for text in _prefixes(split.held_out):
        bits = evaluate.bits_per_byte(model, params, text, settings.model.context)
        results.append({"model": bits, **compressors.compressed_bits_per_byte(text.tobytes())})
        records.add("result", bytes=len(text), parameters=size, **results[-1])
    console.print(_table(split.held_out, results))
    console.print(_HOW_TO_READ.format(size=size), soft_wrap=True, highlight=False)
    return {name: bits for name, bits in results[0].items() if name != "model"}


def _prefixes(held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A quarter of the held-out text, and all: the more there is, the better compressors do."""
    return held_out[: max(len(held_out) // 4, 2)], held_out


def _table(held_out: np.ndarray, results: list[dict[str, float]]) -> Table:
    short, whole = (f"{len(text):,}" for text in _prefixes(held_out))
    table = Table(
        "", f"first {short} bytes", f"all {whole} bytes", title="Held-out text, bits per byte"
    )
    for name in results[0]:
        table.add_row(name, *(f"{result[name]:.3f}" for result in results))
    return table


def _sample(
    model: Transformer, params: Any, settings: Settings, path: Path, console: Console
) -> None:
    """Prints generated text, and writes it."""
    train_settings = settings.train
    if not train_settings.sample_bytes:
        return
    prompt = train_settings.prompt.encode()
    how = generate.Sampling(train_settings.temperature, seed=train_settings.seed)
    sampled = generate.generate(model, params, prompt, train_settings.sample_bytes, how)
    text = (prompt + sampled).decode("utf-8", errors="replace")
    path.write_text(text, encoding="utf-8")
    title = f"A sample, at temperature {train_settings.temperature}"
    console.rule(title)
    console.print(Text(printable(text)))
    console.rule()


def printable(text: str) -> str:
    """Control characters as escapes: what a model writes must not steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _draw(
    model: Transformer,
    params: Any,
    settings: Settings,
    split: tasks.Split,
    records: Records,
    baselines: dict[str, float],
    directory: Path,
) -> None:
    """loss.png and attention.png."""
    held_out = f"held-out, first {len(_prefixes(split.held_out)[0]):,} bytes"
    plots.plot_loss(records.rows, held_out, baselines, directory / "loss.png")
    layer = settings.model.layers // 2
    text = plots.snippet(split.held_out, settings.model.context)
    scores_NTS = plots.attention_scores(model, params, text, layer)
    title = f"What the heads of layer {layer} (of {settings.model.layers}, from 0) attend to"
    plots.plot_attention(scores_NTS, text, title, directory / "attention.png")
